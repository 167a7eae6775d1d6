"""The section `objective`: which keys each kind takes, and which models and data it fits."""

from __future__ import annotations

from typing import Any

import pytest

from pretrain.changes import RULES, rule_of
from pretrain.config import RunConfig, config_from_dict, config_to_dict, known_keys
from pretrain.config_text import ConfigError

ENCODER, DECODER, PAIRED = {"architecture": "bert"}, {"architecture": "gpt2"}, {"architecture": "t5"}


def run(objective: dict[str, Any], model: dict[str, Any], **data: Any) -> RunConfig:
    return config_from_dict(
        {
            "name": "a",
            "tokenizer": data.pop("tokenizer", {}),
            "data": {"train": ["x.jsonl"], "sequence_length": 32} | data,
            "model": model,
            "objective": objective,
            "optimizer": {"lr": 1e-3},
            "train": {"steps": 2, "batch_tokens": 64},
        }
    )


@pytest.mark.parametrize(
    ("objective", "model", "data"),
    [
        ({"kind": "mlm", "final_rate": 0.1, "whole_words": True, "span": 3.8, "sentences": "order"}, ENCODER, {}),
        ({"kind": "rtd", "rate": 0.2, "span": 2.0}, {"architecture": "electra"}, {}),
        ({"kind": "span-corruption", "rate": 0.5, "span": 8.0}, PAIRED, {"target_length": 20}),
        ({"kind": "translation"}, {"architecture": "transformer"}, {"text_field": ("en", "zh"), "target_length": 48}),
        ({"kind": "causal"}, DECODER, {}),
        ({"kind": "my:own"}, PAIRED, {}),
    ],
)
def test_what_fits_is_taken_and_reads_back(objective: Any, model: Any, data: Any) -> None:
    config = run(objective, model, **data)
    plain = config_to_dict(config)
    assert config_from_dict(plain) == config
    assert {key: plain["objective"][key] for key in objective} == objective
    assert ("target_length" in plain["data"]) == ("target_length" in data)


@pytest.mark.parametrize(
    ("objective", "model", "data", "words"),
    [
        ({"kind": "clm"}, DECODER, {}, "use mlm, causal, rtd, span-corruption, translation or my_module:my_function"),
        ({"kind": "causal", "span": 3.0}, DECODER, {}, "`span` belongs to mlm, rtd, span-corruption and has no effect"),
        ({"kind": "rtd", "keep": 0.1}, ENCODER, {}, "`keep` belongs to mlm and has no effect with `kind: rtd`"),
        ({"kind": "rtd", "sentences": "next"}, ENCODER, {}, "`sentences` belongs to mlm"),
        ({"kind": "translation", "rate": 0.1}, PAIRED, {}, "`rate` belongs to mlm, rtd, span-corruption"),
        ({"kind": "span-corruption", "whole_words": True}, PAIRED, {}, "`whole_words` belongs to mlm, rtd"),
        ({"kind": "mlm", "span": 6.0}, ENCODER, {}, "too long a mean"),
        ({"kind": "mlm", "span": 0.5}, ENCODER, {}, "objective.span"),
        ({"kind": "mlm", "sentences": "both"}, ENCODER, {}, "objective.sentences"),
        ({"kind": "mlm", "final_rate": 1.0}, ENCODER, {}, "objective.final_rate"),
        ({"kind": "mlm"}, PAIRED, {}, "mlm needs an encoder (bert, roberta"),
        ({"kind": "rtd"}, DECODER, {}, "rtd needs an encoder"),
        ({"kind": "span-corruption"}, ENCODER, {}, "span-corruption needs a seq2seq (transformer, t5), not `bert`"),
        ({"kind": "causal"}, PAIRED, {}, "causal needs a decoder"),
        ({"kind": "translation"}, PAIRED, {}, "give [source, target]"),
        ({"kind": "causal"}, DECODER, {"text_field": ("a", "b")}, "are the two sides of objective.kind: translation"),
        ({"kind": "causal"}, DECODER, {"target_length": 9}, "data.target_length: 9 has no effect"),
        ({"kind": "mlm"}, ENCODER | {"generator_size": 0.5}, {}, "model.generator_size belongs to objective.kind: rtd"),
        ({"kind": "mlm", "sentences": "next"}, {"from": "x", "class": "stock"}, {}, "use class: loom"),
        ({"kind": "rtd"}, {"from": "x", "class": "stock"}, {}, "objective.kind: rtd trains heads"),
        ({"kind": "mlm", "whole_words": True}, ENCODER, {"ids_field": "ids"}, "objective.whole_words needs text"),
        ({"kind": "mlm", "sentences": "next"}, ENCODER, {"tokenizer": {"algorithm": "ids"}}, "sentences needs text"),
        (
            {"kind": "translation"},
            PAIRED,
            {"text_field": ("a", "b"), "tokenizer": {"algorithm": "ids"}},
            "translation needs text",
        ),
    ],
)
def test_what_does_not_fit_is_named(objective: Any, model: Any, data: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run(objective, model, **data)
    assert words in str(caught.value)


def test_what_an_objective_predicts_cannot_change_when_a_run_goes_on() -> None:
    for key in known_keys():
        if key.startswith("objective.") or key == "data.target_length":
            assert key in RULES
            assert rule_of(key).resume == "refused"
