"""Every shipped run builds on the meta device; at the published vocabulary it has the published parameter count."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from pretrain.building import model_config
from pretrain.config import RunConfig, load_config, shipped_directory
from pretrain.interop import stock_config
from pretrain.models import model_from_config

SHIPPED = sorted(path.stem for path in (shipped_directory() / "configs" / "runs").glob("*.yaml"))
NAMES = [name for name in SHIPPED if load_config(name).model.from_ is None]

# name -> (vocabulary, parameters), as published: bert-base-uncased and bert-base-chinese with the MLM head,
# ModernBERT-base with the MLM head, gpt2. The Llama shape is GPT-3 Medium's depth and width, 24 x 1024, with untied
# embeddings and a gated MLP of 2,752: 24 (4 d d + 3 d 2,752 + 2 d) + 2 V d + d.
PUBLISHED = {
    "bert-base": (30_522, 109_514_298),
    "bert-chinese": (21_128, 102_290_312),
    "modernbert-base": (50_368, 149_655_232),
    "gpt2-small": (50_257, 124_439_808),
    "llama-350m": (32_000, 24 * (4 * 1024**2 + 3 * 1024 * 2752 + 2 * 1024) + 2 * 32_000 * 1024 + 1024),
}


AUTO = {"encoder": AutoModelForMaskedLM, "decoder": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM}


def build(config: RunConfig, vocab_size: int) -> torch.nn.Module:
    with torch.device("meta"):
        return model_from_config(model_config(config, {"vocab_size": vocab_size, "special_ids": {}}))


@pytest.mark.parametrize("name", NAMES)
def test_it_builds_and_counts_like_the_stock_class(name: str) -> None:
    config = load_config(name)
    vocab_size = PUBLISHED.get(name, (config.tokenizer.vocab_size, None))[0]
    model = build(config, vocab_size)
    stock = stock_config(model.config)
    with torch.device("meta"):
        # Of a Marian the fixed positions are parameters that do not learn.
        assert model.num_parameters() == AUTO[config.kind].from_config(stock).num_parameters(only_trainable=True)
    assert stock.model_type == ("marian" if config.model.architecture == "transformer" else config.model.architecture)
    if name in PUBLISHED:
        assert model.num_parameters() == PUBLISHED[name][1]


def test_what_goes_on_goes_on_from_a_shipped_run() -> None:
    """The export of the first run, its old text replayed, and held out again what that held out."""
    first, on = load_config("quickstart-gpt"), load_config("quickstart-continue")
    assert set(SHIPPED) - set(NAMES) == {on.name}
    assert on.model.from_ == f"{first.out}/{first.name}/export"
    assert on.data.validation == first.data.validation
    assert on.data.sequence_length == first.data.sequence_length
    (old,) = (source for source in on.data.train if not isinstance(source, str) and source.name == "python")
    assert old.files == first.data.train
