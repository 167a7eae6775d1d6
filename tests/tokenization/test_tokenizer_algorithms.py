"""What each algorithm does to text: special ids, templates, splitting, decoding."""

from __future__ import annotations

import pytest
from sample_texts import ALGORITHMS, ARCHITECTURES, trained

from pretrain.config import TokenizerConfig
from pretrain.tokenization import special_tokens_for
from pretrain.tokenization.algorithms import byte_characters, pre_tokenizer_of, special_tokens_of

HARD = "Ünï\tcode 世界 the\n\n  walking 12345 é́ 😀 \x00 end "


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_special_tokens_have_their_ids(algorithm: str, architecture: str) -> None:
    tokenizer = trained(algorithm, architecture, special_tokens=("<|mine|>",)).tokenizer
    fixed = {
        "bert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
        "modernbert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
        "gpt2": ("<|endoftext|>", "<|pad|>"),
        "llama": ("<unk>", "<s>", "</s>", "<pad>"),
    }[architecture]
    assert special_tokens_for(architecture).tokens == fixed
    assert [tokenizer.token_to_id(token) for token in fixed] == list(range(len(fixed)))
    assert len(fixed) <= tokenizer.token_to_id("<|mine|>") <= len(fixed) + 1
    assert tokenizer.encode("a<|mine|>b", add_special_tokens=False).tokens[1] == "<|mine|>"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_templates(algorithm: str) -> None:
    encoder = trained(algorithm, "bert").tokenizer
    pair = encoder.encode("walk", "talk")
    assert pair.tokens[0] == "[CLS]"
    assert pair.tokens.count("[SEP]") == 2
    assert pair.tokens[-1] == "[SEP]"
    assert set(pair.type_ids) == {0, 1}
    assert encoder.encode("walk", add_special_tokens=False).tokens == encoder.encode("walk").tokens[1:-1]
    llama = trained(algorithm, "llama").tokenizer
    assert llama.encode("walk").tokens == ["<s>", *llama.encode("walk", add_special_tokens=False).tokens]
    assert "</s>" not in llama.encode("walk").tokens
    gpt2 = trained(algorithm, "gpt2").tokenizer
    assert gpt2.encode("walk").ids == gpt2.encode("walk", add_special_tokens=False).ids


@pytest.mark.parametrize("algorithm", ["byte-bpe", "bpe", "unigram", "bytes"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_any_text_comes_back_exactly(algorithm: str, architecture: str) -> None:
    tokenizer = trained(algorithm, architecture).tokenizer
    for text in (HARD, "", " ", "a", "  two  spaces", "\r\n", "".join(map(chr, range(1, 0x250)))):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=True) == text


def test_wordpiece_decodes_to_readable_text() -> None:
    tokenizer = trained("wordpiece", "bert", lowercase=True, strip_accents=True, chinese_characters=True).tokenizer
    encoded = tokenizer.encode("Walking the Café, 天地玄黄。")
    assert tokenizer.decode(encoded.ids, skip_special_tokens=True).startswith("walking")
    assert "cafe, 天地玄黄。" in tokenizer.decode(encoded.ids, skip_special_tokens=True)
    assert tokenizer.encode("Ω", add_special_tokens=False).tokens == ["[UNK]"]
    assert tokenizer.encode("天地", add_special_tokens=False).tokens == ["天", "地"]
    assert not any(token.startswith("##天") for token in tokenizer.get_vocab())


def test_cased_is_the_default() -> None:
    tokenizer = trained("wordpiece", "bert").tokenizer
    assert tokenizer.encode("Walked", add_special_tokens=False).ids != tokenizer.encode("walked").ids[1:-1]
    assert tokenizer.decode(tokenizer.encode("Walked café").ids) == "Walked café"


def test_lower_case_spares_special_tokens() -> None:
    for algorithm in ALGORITHMS:
        tokenizer = trained(algorithm, "bert", lowercase=True, strip_accents=True).tokenizer
        assert tokenizer.encode("A [MASK]", add_special_tokens=False).ids[-1] == 4
        assert tokenizer.decode(tokenizer.encode("CAFÉ").ids, skip_special_tokens=True) == "cafe"


@pytest.mark.parametrize(("digits", "pieces"), [("single", list("12345")), ("threes", ["123", "45"])])
@pytest.mark.parametrize("algorithm", ["byte-bpe", "bpe", "wordpiece", "unigram"])
def test_digits(algorithm: str, digits: str, pieces: list[str]) -> None:
    config = TokenizerConfig.model_validate({"algorithm": algorithm, "digits": digits})
    words = [word for word, _ in pre_tokenizer_of(config).pre_tokenize_str("walk 12345 on")]
    assert [word for word in words if word.isdigit()] == pieces


@pytest.mark.parametrize("algorithm", ["byte-bpe", "bpe", "unigram"])
def test_chinese_characters_are_words(algorithm: str) -> None:
    config = TokenizerConfig.model_validate({"algorithm": algorithm, "chinese_characters": True})
    assert len(pre_tokenizer_of(config).pre_tokenize_str("天地玄黄")) == 4
    together = TokenizerConfig.model_validate({"algorithm": algorithm})
    assert len(pre_tokenizer_of(together).pre_tokenize_str("天地玄黄")) == 1


@pytest.mark.parametrize(("normalize", "expected"), [("none", "ﬁ e\u0301"), ("nfc", "ﬁ é"), ("nfkc", "fi é")])
def test_unicode_forms(normalize: str, expected: str) -> None:
    tokenizer = trained("byte-bpe", "gpt2", normalize=normalize).tokenizer
    assert tokenizer.decode(tokenizer.encode("ﬁ e\u0301").ids) == expected


def test_bytes_are_in_byte_order() -> None:
    made = trained("bytes", "llama")
    assert made.tokenizer.encode("Az\n", add_special_tokens=False).ids == [4 + byte for byte in b"Az\n"]
    assert made.tokenizer.encode("é", add_special_tokens=False).ids == [4 + byte for byte in "é".encode()]
    assert (made.vocab_size, made.learnt) == (320, 260)
    assert len(set(byte_characters())) == 256


def test_mask_takes_the_space_before_it() -> None:
    tokenizer = trained("byte-bpe", "modernbert").tokenizer
    assert tokenizer.encode("the [MASK] walks", add_special_tokens=False).tokens.count("Ġ") == 0


def test_offsets_of_encoders_leave_out_the_space() -> None:
    encoded = trained("byte-bpe", "modernbert").tokenizer.encode("walking walking")
    assert encoded.offsets[encoded.tokens.index("Ġwalking")] == (8, 15)


def test_unknown_architecture_and_double_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="use one of bert"):
        special_tokens_for("mamba")
    for tokens in (("[MASK]",), ("<a>", "<a>"), ("",)):
        with pytest.raises(ValueError, match=r"tokenizer\.special_tokens"):
            special_tokens_of(TokenizerConfig(special_tokens=tokens), "bert")
