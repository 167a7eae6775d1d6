"""The six algorithms as untrained parts: special tokens, normalizer, pre-tokenizer, decoder, post-processor, model.

What lives here: everything that decides ids apart from the learnt vocabulary, and `assemble`, which puts a learnt
vocabulary and these parts together. What must not: reading text, counting, training, writing files.

Choices, all of them visible in the `tokenizer.json` that results:

* byte-bpe  GPT-2's byte alphabet and splitting pattern; every text is encoded, and decodes to itself.
* bpe       characters, a space is `▁` and belongs to the word after it (never put before the first word), characters
            outside the vocabulary become the byte tokens `<0x00>` ... `<0xFF>`.
* unigram   as bpe, with a unigram language model in the place of merges.
* wordpiece BERT's normalizer, pre-tokenizer and longest-match-first encoding; an unknown word is one unknown token.
* bytes     one id a byte, in byte order, no merges.
* ids       the text is numbers with white space between them, and number n has id n; nothing is learnt. For sequences
            that are no text (DNA, music, states) and for data of ready ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from pretrain.config import TokenizerConfig
from pretrain.config_model import DECODERS, ENCODERS, KINDS, SEQ2SEQ

SPACE = "▁"
CONTINUATION = "##"
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))

# GPT-2's pattern (Radford et al. 2019) without the English clitics, with combining marks inside words.
_WORDS = r" ?[\p{L}\p{M}]+| ?\p{N}+| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+"
_BETWEEN_HAN = "(?<=[\\p{Han}\u3000-\u303f\uff00-\uff65]) (?=[\\p{Han}\u3000-\u303f\uff00-\uff65])"


@dataclass(frozen=True)
class SpecialTokens:
    """Special tokens in the order of their ids, and the role each one has in `transformers`.

    `tokens[i]` has id `first + i`. `roles` maps names such as `pad_token` to tokens; further tokens have none.
    """

    tokens: tuple[str, ...]
    roles: Mapping[str, str]
    first: int = 0

    def with_more(self, tokens: Sequence[str]) -> SpecialTokens:
        """The same, followed by further tokens without a role.

        Raises:
            ValueError: when one of them is empty or there already.
        """
        for index, token in enumerate(tokens):
            if not token or token in self.tokens or token in tokens[:index]:
                raise ValueError(
                    f"tokenizer.special_tokens: `{token}` is empty or stands twice (there already: "
                    f"{', '.join(self.tokens)}); remove it"
                )
        return SpecialTokens((*self.tokens, *tokens), self.roles, self.first)

    def id_of(self, role: str) -> int | None:
        """The id of a role such as `mask_token`; None when there is no such token."""
        token = self.roles.get(role)
        return None if token is None else self.first + self.tokens.index(token)


_ENCODER = SpecialTokens(
    ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    },
)
_DECODER = SpecialTokens(
    ("<unk>", "<s>", "</s>", "<pad>"),
    {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
)
# As T5 numbers them; the decoder begins with padding.
_SEQ2SEQ = SpecialTokens(("<pad>", "</s>", "<unk>"), {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"})
_SPECIAL_TOKENS = {
    **dict.fromkeys(ENCODERS, _ENCODER),
    **dict.fromkeys(DECODERS, _DECODER),
    **dict.fromkeys(SEQ2SEQ, _SEQ2SEQ),
    "gpt2": SpecialTokens(
        ("<|endoftext|>", "<|pad|>"),
        {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"},
    ),
}


def special_tokens_for(architecture: str) -> SpecialTokens:
    """The special tokens of an architecture, ids fixed.

    Raises:
        ValueError: on an architecture that is not known.
    """
    if architecture not in _SPECIAL_TOKENS:
        known = ", ".join(_SPECIAL_TOKENS)
        raise ValueError(f"model.architecture: `{architecture}` has no special tokens of its own; use one of {known}")
    return _SPECIAL_TOKENS[architecture]


def special_tokens_of(config: TokenizerConfig, architecture: str) -> SpecialTokens:
    """The architecture's special tokens, an unknown token where the algorithm needs one, then the user's own."""
    special = special_tokens_for(architecture)
    if config.algorithm in ("wordpiece", "unigram", "ids") and "unk_token" not in special.roles:
        special = SpecialTokens((*special.tokens, "<|unk|>"), {**special.roles, "unk_token": "<|unk|>"})
    if config.algorithm == "ids":  # the numbers come first, so that each is its own id
        special = SpecialTokens(special.tokens, special.roles, first=config.vocab_size)
    return special.with_more(config.special_tokens)


def model_input_names(architecture: str) -> list[str]:
    """What the tokenizer returns for a model: token types are for BERT and its kin that have two."""
    two = architecture in ("bert", "electra", "albert")
    return ["input_ids", *(["token_type_ids"] if two else []), "attention_mask"]


# --- parts ----------------------------------------------------------------------------------------------------------


def byte_characters() -> list[str]:
    """The 256 characters that stand for bytes in GPT-2's alphabet; item `b` stands for byte `b`."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    characters = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in characters:
            characters[byte] = chr(256 + len(characters) - len(printable))
    return [characters[byte] for byte in range(256)]


def normalizer_of(config: TokenizerConfig) -> normalizers.Normalizer | None:
    """Unicode form, lower case, accents; for wordpiece within BERT's own normalizer."""
    steps: list[normalizers.Normalizer] = []
    if config.normalize != "none":
        steps.append(normalizers.NFC() if config.normalize == "nfc" else normalizers.NFKC())
    if config.algorithm == "wordpiece":
        steps.append(
            normalizers.BertNormalizer(
                clean_text=True,
                handle_chinese_chars=config.chinese_characters,
                strip_accents=config.strip_accents,
                lowercase=config.lowercase,
            )
        )
    else:
        if config.lowercase:
            steps.append(normalizers.Lowercase())
        if config.strip_accents:  # accents are characters of their own in the decomposed form only
            steps.extend((normalizers.NFD(), normalizers.StripAccents(), normalizers.NFC()))
    if not steps:
        return None
    return steps[0] if len(steps) == 1 else normalizers.Sequence(steps)


def pre_tokenizer_of(config: TokenizerConfig) -> pre_tokenizers.PreTokenizer:
    """How text falls into words: digits and Chinese characters first, then the algorithm's own pattern."""
    steps: list[pre_tokenizers.PreTokenizer] = []
    if config.algorithm == "ids":
        return pre_tokenizers.WhitespaceSplit()
    if config.algorithm == "bytes":  # ids do not depend on the words here; short words keep encoding fast
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if config.digits == "single":
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    elif config.digits == "threes":
        steps.append(pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"))
    if config.chinese_characters and config.algorithm != "wordpiece":  # BERT's normalizer sets them apart by itself
        steps.append(pre_tokenizers.Split(Regex(r"\p{Han}"), "isolated"))
    if config.algorithm == "byte-bpe":
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
    elif config.algorithm == "wordpiece":
        steps.append(pre_tokenizers.BertPreTokenizer())
    else:
        steps.append(pre_tokenizers.Split(Regex(_WORDS), "isolated"))
        steps.append(pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never", split=False))
    return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)


def decoder_of(config: TokenizerConfig) -> decoders.Decoder | None:
    """How ids become text again; None puts a space between tokens."""
    if config.algorithm == "ids":
        return None
    if config.algorithm in ("byte-bpe", "bytes"):
        return decoders.ByteLevel()
    if config.algorithm == "wordpiece":
        words = decoders.WordPiece(prefix=CONTINUATION, cleanup=True)
        if not config.chinese_characters:
            return words
        # Chinese is written without spaces: take out those that joining the tokens put between its characters.
        return decoders.Sequence([words, decoders.Fuse(), decoders.Replace(Regex(_BETWEEN_HAN), "")])
    return decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])


def post_processor_of(config: TokenizerConfig, architecture: str, special: SpecialTokens) -> processors.PostProcessor:
    """What is added around a text: [CLS] A [SEP] (B [SEP]) for encoders, BOS for decoders, EOS behind seq2seq's texts.

    These are the stock models' habits: gpt2 adds nothing, and a decoder's EOS stands in prepared data alone.
    """
    begin, end = special.roles.get("bos_token"), special.roles.get("eos_token")
    steps: list[processors.PostProcessor] = []
    encoder = special.id_of("cls_token") is not None
    if config.algorithm in ("byte-bpe", "bytes"):
        # gpt2 counts the space before a word to the word's characters, encoders (spans, entities) do not.
        steps.append(processors.ByteLevel(trim_offsets=encoder))
    if encoder:
        steps.append(
            processors.TemplateProcessing(
                single="[CLS]:0 $A:0 [SEP]:0",
                pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
                special_tokens=[("[CLS]", special.id_of("cls_token")), ("[SEP]", special.id_of("sep_token"))],
            )
        )
    elif KINDS[architecture] == "seq2seq":
        steps.append(
            processors.TemplateProcessing(
                single=f"$A:0 {end}:0",
                pair=f"$A:0 {end}:0 $B:1 {end}:1",
                special_tokens=[(end, special.id_of("eos_token"))],
            )
        )
    elif begin is not None and begin != end:
        steps.append(
            processors.TemplateProcessing(
                single=f"{begin}:0 $A:0",
                pair=f"{begin}:0 $A:0 {begin}:1 $B:1",
                special_tokens=[(begin, special.id_of("bos_token"))],
            )
        )
    elif not steps:  # transformers would write this one where there is none, and the file would change on saving
        steps.append(processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[]))
    return steps[0] if len(steps) == 1 else processors.Sequence(steps)


def untrained_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Normalizer and pre-tokenizer around an empty model: what a library trainer starts from."""
    model = models.WordPiece(unk_token="[UNK]") if config.algorithm == "wordpiece" else models.BPE()
    tokenizer = Tokenizer(model)
    if (normalizer := normalizer_of(config)) is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer_of(config)
    return tokenizer


def assemble(config: TokenizerConfig, architecture: str, special: SpecialTokens, model: models.Model) -> Tokenizer:
    """Put a learnt model and the parts together; the special tokens (and padding) must be in the model's vocabulary."""
    tokenizer = untrained_tokenizer(config)
    tokenizer.model = model
    if (decoder := decoder_of(config)) is not None:
        tokenizer.decoder = decoder
    tokenizer.post_processor = post_processor_of(config, architecture, special)
    # The mask stands for a word and for the space that the word carries, so it takes the space before it.
    mask = special.roles.get("mask_token") if config.algorithm not in ("wordpiece", "ids") else None
    tokenizer.add_special_tokens(
        [AddedToken(token, lstrip=token == mask, normalized=False, special=True) for token in special.tokens]
    )
    return tokenizer
