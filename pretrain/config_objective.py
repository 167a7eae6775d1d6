"""The section `objective`: what the model learns to predict.

What lives here: the schema of that section, which keys each kind takes, and which models it is for. What must not:
how a batch is made (`pretrain.data.objectives`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, StrictBool, model_validator

from pretrain.config_types import Section, Share, check_import_path

MODEL_KINDS: dict[str, Literal["encoder", "decoder", "seq2seq"]] = {
    "mlm": "encoder",
    "causal": "decoder",
    "rtd": "encoder",
    "span-corruption": "seq2seq",
    "translation": "seq2seq",
}
"""The kind of model that each objective of ours trains."""

_MASKING = ("rate", "final_rate", "whole_words", "span")
_KEYS: dict[str, tuple[str, ...]] = {
    "mlm": (*_MASKING, "random", "keep", "sentences"),
    "causal": (),
    "rtd": _MASKING,
    "span-corruption": ("rate", "span"),
    "translation": (),
}
"""The keys that each objective of ours takes, beside `kind`."""

LONGEST_SPAN = 10
"""Units of a masked span at most (SpanBERT, Joshi et al. 2019, arXiv 1907.10529, section 3.1)."""
_LONGEST_MEAN = 5.0
CORRUPTED_SPAN = 3.0
"""Mean tokens of a corrupted span (T5, Raffel et al. 2019, arXiv 1910.10683, section 3.1.4)."""

Rate = Annotated[float, Field(gt=0.0, lt=1.0)]


class ObjectiveConfig(Section):
    """What the model learns to predict."""

    kind: str = Field(description="mlm, causal, rtd, span-corruption, translation, or my_module:my_function")
    rate: Rate = Field(0.15, description="mlm, rtd, span-corruption: share of tokens to predict")
    final_rate: Rate | None = Field(None, description="mlm, rtd: the rate at the end of the run, reached in a line")
    random: Share = Field(0.1, description="mlm: of those, the share replaced by a random token")
    keep: Share = Field(0.1, description="mlm: of those, the share left as it is; the rest becomes [MASK]")
    whole_words: StrictBool = Field(False, description="mlm, rtd: the tokens of a word are hidden together")
    span: Annotated[float, Field(ge=1.0)] | None = Field(
        None, description="mean length of hidden runs; mlm, rtd: in tokens, or whole words; span-corruption: 3"
    )
    sentences: Literal["none", "next", "order"] = Field(
        "none", description="mlm: also tell whether a second segment follows the first (next), or comes before it"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.kind not in _KEYS and ":" not in self.kind:
            raise ValueError(f"`kind: {self.kind}` is unknown; use {', '.join(_KEYS)} or my_module:my_function")
        if ":" in self.kind:
            check_import_path(self.kind)
        for key in () if ":" in self.kind else sorted(self.model_fields_set - {"kind", *_KEYS[self.kind]}):
            owners = ", ".join(kind for kind, keys in _KEYS.items() if key in keys)
            raise ValueError(f"`{key}` belongs to {owners} and has no effect with `kind: {self.kind}`; remove it")
        if self.random + self.keep > 1.0:
            raise ValueError(f"random {self.random} + keep {self.keep} is more than 1; what is left over is [MASK]")
        if self.span is not None and self.kind != "span-corruption" and self.span > _LONGEST_MEAN:
            raise ValueError(
                f"`span: {self.span}` is too long a mean: a span has {LONGEST_SPAN} tokens or words at most; give 1 to "
                f"{_LONGEST_MEAN:g} (SpanBERT: 3.8)"
            )
        return self

    @property
    def is_own(self) -> bool:
        """Whether it is a function of one's own, by import path."""
        return self.kind not in _KEYS

    @property
    def model_kind(self) -> Literal["encoder", "decoder", "seq2seq"] | None:
        """The kind of model that it trains; None for a function of one's own, which may train any."""
        return MODEL_KINDS.get(self.kind)

    @property
    def task(self) -> str:
        """What the class of the model that it trains is for."""
        if self.kind == "rtd":
            return "replaced_token_detection"
        return "pretraining" if self.sentences == "none" else "sentence_pretraining"

    @property
    def needs_marks(self) -> bool:
        """Whether the shards must say where words and sentences start."""
        return self.whole_words or self.sentences != "none"

    def effective(self) -> dict[str, Any]:
        """The keys that decide the batches, as plain data.

        Keys that came later than others are left out where they are not given, so that what was written before them
        stays equal to what is written now.
        """
        if self.kind in ("causal", "translation"):
            return {"kind": self.kind}
        plain = self.model_dump()
        always = ["kind", "rate", *(["random", "keep"] if self.is_own or self.kind == "mlm" else [])]
        later = ("final_rate", "whole_words", "span", "sentences")
        given = {key: plain[key] for key in later if plain[key] != type(self).model_fields[key].default}
        return {key: plain[key] for key in always} | given
