"""Training: sizes, the same bytes each time, refusals, and what the library's WordPiece trainer really does."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from sample_texts import ALGORITHMS, Text, documents, trained
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from pretrain.config import TokenizerConfig
from pretrain.tokenization import draw_sample, fit_tokenizer
from pretrain.tokenization.train import train_merges

_HASH_ALL = """
import hashlib
from sample_texts import ALGORITHMS, trained
for algorithm in ALGORITHMS:
    print(algorithm, hashlib.sha256(trained(algorithm, vocab_size=500).tokenizer.to_str().encode()).hexdigest())
"""


@pytest.mark.parametrize("algorithm", ["byte-bpe", "bpe", "wordpiece", "unigram"])
def test_vocabulary_is_rounded_up(algorithm: str) -> None:
    made = trained(algorithm, "llama", vocab_size=500, pad_to_multiple=64)
    assert made.vocab_size == made.tokenizer.get_vocab_size(with_added_tokens=True) == 512
    assert sorted(made.tokenizer.get_vocab().values()) == list(range(512))


@pytest.mark.parametrize("algorithm", ["byte-bpe", "bpe", "wordpiece", "unigram"])
def test_small_text_gives_a_smaller_padded_vocabulary(algorithm: str) -> None:
    config = TokenizerConfig.model_validate({"algorithm": algorithm, "vocab_size": 4096})
    with draw_sample([Text("a small text, a small text, a very small text")], 1000) as sample:
        made = fit_tokenizer(config, sample, "gpt2")
    assert made.vocab_size % 64 == 0
    assert made.learnt <= made.vocab_size < made.learnt + 64
    assert "4096 ids were asked for" in made.notes[0]
    assert made.tokenizer.token_to_id("<|unused0|>") == made.learnt
    assert made.tokenizer.decode(made.tokenizer.encode("small text").ids) == "small text"
    assert made.tokenizer.decode([made.learnt], skip_special_tokens=True) == ""


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_order_of_documents_does_not_matter(algorithm: str) -> None:
    config = TokenizerConfig.model_validate({"algorithm": algorithm, "vocab_size": 512})
    shuffled = documents()
    random.Random(1).shuffle(shuffled)
    made = []
    for texts in (documents(), shuffled):
        with draw_sample(texts, 10**6) as sample:
            made.append(fit_tokenizer(config, sample, "bert").tokenizer.to_str())
    assert made[0] == made[1]


def test_same_bytes_in_every_process() -> None:
    seen = set()
    for hash_seed, threads in (("0", "1"), ("1", "2"), ("2", "2")):
        environment = {
            **os.environ,
            "PYTHONHASHSEED": hash_seed,
            "RAYON_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "true",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(Path(__file__).parent), *sys.path))),
        }
        done = subprocess.run(
            [sys.executable, "-c", _HASH_ALL], env=environment, capture_output=True, text=True, check=True
        )
        seen.add(done.stdout)
    assert len(seen) == 1
    assert len(seen.pop().splitlines()) == len(ALGORITHMS)


def test_training_without_a_pre_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="without a pre-tokenizer"):
        train_merges(Tokenizer(models.BPE()), ["text"], first=[], alphabet=["t"], vocab_size=10, min_frequency=1)


@pytest.mark.parametrize("algorithm", ["byte-bpe", "bpe", "wordpiece", "unigram"])
def test_too_small_a_vocabulary_is_refused(algorithm: str) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.vocab_size: 8"):
        trained(algorithm, vocab_size=8, pad_to_multiple=1)


def test_reserved_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unused0"):
        trained("bytes", special_tokens=("<|unused0|>",))


def test_min_frequency() -> None:
    """Pairs, and characters, seen less often than this are not learnt."""
    assert trained("byte-bpe", min_frequency=10**6).learnt == 5 + 256
    assert "。" in trained("bpe", min_frequency=2).tokenizer.get_vocab()
    assert "。" not in trained("bpe", min_frequency=10**6).tokenizer.get_vocab()


def test_text_whose_words_do_not_repeat_is_sampled_further(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    unspaced = [Text("".join(chr(draw.randrange(0x4E00, 0x5E00)) for _ in range(500)), position=n) for n in range(200)]
    spaced = [Text("walking talking " * 100, position=n) for n in range(200)]
    monkeypatch.setattr("pretrain.tokenization.train._DIFFERENT_BYTES", 60_000)
    for texts, is_shrunk in ((unspaced, True), (spaced, False)):
        with draw_sample(texts, 10**7) as sample:
            made = fit_tokenizer(TokenizerConfig(vocab_size=512), sample, "gpt2")
            assert (sample.sample_bytes < sample.corpus_bytes) == is_shrunk
            assert sum(file.sample for file in sample.files.values()) == sample.sample_bytes
            assert any("different words" in note for note in made.notes) == is_shrunk
            if is_shrunk:
                assert 30_000 < sample.sample_bytes <= 61_000


def test_alphabet_leaves_room_for_words() -> None:
    """A text of more characters than ids: the most frequent are kept, and words are learnt still."""
    rare = "".join(map(chr, range(0x4E00, 0x4E00 + 2000))) * 2
    text = Text("walking talking " * 5000 + rare)
    for algorithm in ("bpe", "wordpiece", "unigram"):
        config = TokenizerConfig.model_validate({"algorithm": algorithm, "vocab_size": 512})
        with draw_sample([text], 10**6) as sample:
            made = fit_tokenizer(config, sample, "bert")
        assert made.vocab_size == 512
        assert len(made.tokenizer.encode("walking", add_special_tokens=False).tokens) == 1


def test_library_wordpiece_merges_by_frequency_not_likelihood() -> None:
    """`q` and `##z` only ever stand together, so likelihood joins them first; frequency joins `x` and `##b`."""
    texts = ["ab"] * 20 + ["a"] * 100 + ["xb"] * 100 + ["qz"] * 10
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=8, show_progress=False))
    assert "xb" in tokenizer.get_vocab()
    assert "qz" not in tokenizer.get_vocab()
    # Encoding is the longest match first, not the merges in their order.
    tokenizer.model = models.WordPiece({"[UNK]": 0, "a": 1, "ab": 2, "##b": 3, "##bc": 4, "##c": 5}, unk_token="[UNK]")
    assert tokenizer.encode("abc").tokens == ["ab", "##c"]
