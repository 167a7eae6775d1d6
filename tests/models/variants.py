"""Every switch of the Loom models in every position it has, and how far each one lies from the slow reference.

Lives here: the list of variants with the paper each one follows, and `measure`. What must not: the reference itself
(`reference.py`), or the page that shows the errors (`family_page.py`).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
from loom_builders import documents, randomize, relative, tokens
from reference import reference_logits, settings_of, weights_of
from torch import Tensor

from pretrain.models import CAPABILITIES, LoomConfig, loom_config, model_class

KINDS = {"encoder": "bert", "decoder": "gpt2", "seq2seq": "transformer"}
"""The design that a variant is a change of, for each kind of model."""
ONE_STACK = ("encoder", "decoder")
SIZES: dict[str, Any] = {
    "vocab_size": 29,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
LENGTH = 10


@dataclass(frozen=True)
class Variant:
    """One position of one switch: `keys` beside a design's own, and where it is described.

    `theirs` are values that the reference gets in place of the config's, where the config folds one key into another.
    """

    name: str
    source: str
    keys: dict[str, Any]
    kinds: tuple[str, ...] = tuple(KINDS)
    theirs: dict[str, Any] = field(default_factory=dict)
    architecture: str | None = None

    def config(self, kind: str) -> LoomConfig:
        """A tiny config of this variant."""
        return loom_config(self.architecture or KINDS[kind], **(SIZES | self.keys))


@dataclass(frozen=True)
class Errors:
    """Largest difference over the largest value: of logits and gradients in float64, of logits in float32."""

    logits: float
    gradients: float
    float32: float

    def worst(self, other: Errors) -> Errors:
        """The larger of each."""
        mine, theirs = ((errors.logits, errors.gradients, errors.float32) for errors in (self, other))
        return Errors(*(max(pair) for pair in zip(mine, theirs, strict=True)))


LOCAL = {"global_attention_every": 2, "local_window": 4}
ROTARY = {"position_kind": "rotary"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
NTK = {"rope_type": "ntk", "factor": 4.0}

POSITIONS = [
    Variant("learned", "Gehring et al. 2017", {"position_kind": "learned"}),
    Variant("learned, counted from 2", "Liu et al. 2019", {"position_kind": "learned", "position_offset": 2}),
    Variant(
        "sinusoidal, interleaved",
        "Vaswani et al. 2017, 3.5",
        {"position_kind": "sinusoidal", "sinusoidal_layout": "interleaved"},
    ),
    Variant(
        "sinusoidal, halves", "tensor2tensor, Marian", {"position_kind": "sinusoidal", "sinusoidal_layout": "halves"}
    ),
    Variant(
        "sinusoidal, counted from 3", "Vaswani et al. 2017, 3.5", {"position_kind": "sinusoidal", "position_offset": 3}
    ),
    Variant("rotary", "Su et al. 2021", ROTARY),
    Variant(
        "rotary, a base for local layers",
        "Gemma Team 2025",
        ROTARY | LOCAL | {"rope_theta": 500.0, "local_rope_theta": 20.0},
    ),
    Variant("rotary, half of each head", "Black et al. 2022", ROTARY | {"head_dim": 8, "partial_rotary_factor": 0.5}),
    Variant("rotary, linear", "Chen et al. 2023", ROTARY | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    Variant(
        "rotary, NTK",
        "Peng et al. 2023, eq. 16",
        ROTARY | {"head_dim": 8, "rope_theta": 100.0, "rope_scaling": NTK},
        theirs={"rope_theta": 100.0, "rope_scaling": NTK},
    ),
    Variant(
        "rotary, NTK beside local layers",
        "Peng et al. 2023, eq. 16",
        ROTARY | LOCAL | {"head_dim": 8, "rope_theta": 100.0, "rope_scaling": NTK},
        theirs={"rope_theta": 100.0, "rope_scaling": NTK, "local_rope_theta": 100.0},
    ),
    Variant(
        "rotary, YaRN", "Peng et al. 2023, 3.4", ROTARY | {"head_dim": 16, "rope_theta": 100.0, "rope_scaling": YARN}
    ),
    Variant(
        "rotary, YaRN with its own ramp and magnitude",
        "Peng et al. 2023, 3.4",
        ROTARY
        | LOCAL
        | {"head_dim": 16, "partial_rotary_factor": 0.75, "rope_theta": 50.0}
        | {"rope_scaling": YARN | {"beta_fast": 1.5, "beta_slow": 0.2, "attention_factor": 1.3}},
    ),
    Variant("ALiBi", "Press et al. 2021", {"position_kind": "alibi"}),
    Variant(
        "ALiBi, six heads", "Press et al. 2021", {"position_kind": "alibi", "num_attention_heads": 6, "head_dim": 4}
    ),
    Variant("T5 relative", "Raffel et al. 2019, 2.1", {"position_kind": "relative"}),
    Variant(
        "T5 relative, few buckets, windows",
        "Raffel et al. 2019, 2.1",
        {"position_kind": "relative"}
        | {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 9}
        | {"global_attention_every": 2, "local_window": 6},
    ),
    Variant("none", "Haviv et al. 2022", {"position_kind": "none"}),
]
ATTENTION = [
    Variant("multi-head", "Vaswani et al. 2017, 3.2.2", {"num_key_value_heads": 4}),
    Variant("grouped-query", "Ainslie et al. 2023", {"num_key_value_heads": 2}),
    Variant("multi-query", "Shazeer 2019", {"num_key_value_heads": 1}),
    Variant("heads wider than their share", "Raffel et al. 2019", {"head_dim": 6}),
    Variant("another scale", "Yang et al. 2022", {"attention_scale": 0.125}),
    Variant("softcap of scores", "Gemma Team 2024", {"attention_softcap": 1.5}),
    Variant("softcap of scores beside ALiBi", "Gemma Team 2024", {"attention_softcap": 1.5, "position_kind": "alibi"}),
    Variant("softcap of logits", "Gemma Team 2024", {"logit_softcap": 2.0}),
    Variant("QK-norm of each head", "Yang et al. 2025", {"qk_norm": "per_head", "num_key_value_heads": 2}),
    Variant(
        "QK-norm of the full width", "OLMo Team 2024", ROTARY | {"qk_norm": "full_width", "num_key_value_heads": 2}
    ),
    Variant("window in every other layer", "Beltagy et al. 2020", LOCAL),
    Variant("window of odd width", "Beltagy et al. 2020", {"global_attention_every": 2, "local_window": 3}),
    Variant(
        "pattern local, local, global",
        "Gemma Team 2025",
        {"attention_pattern": ["local", "local", "global"], "local_window": 2, "num_hidden_layers": 4},
    ),
    Variant("every layer local", "Jiang et al. 2023", {"attention_pattern": ["local"], "local_window": 4}),
    Variant("no biases", "Raffel et al. 2019", {"attention_bias": False, "mlp_bias": False}),
    Variant("biases of attention alone", "Yang et al. 2024", {"attention_bias": True, "mlp_bias": False}),
]
PARALLEL = {"norm_placement": "pre"}
BLOCKS = [
    Variant("post-norm", "Vaswani et al. 2017, 3.1", {"norm_placement": "post"}),
    Variant("pre-norm", "Xiong et al. 2020", {"norm_placement": "pre"}),
    Variant(
        "pre-norm without the first", "Warner et al. 2024", {"norm_placement": "pre", "first_norm": False}, ONE_STACK
    ),
    Variant("parallel, two norms", "Black et al. 2022", PARALLEL | {"block_kind": "parallel"}, ONE_STACK),
    Variant(
        "parallel, one norm", "Wang and Komatsuzaki 2021", PARALLEL | {"block_kind": "parallel_shared_norm"}, ONE_STACK
    ),
    Variant(
        "parallel without the first norm",
        "Black et al. 2022",
        PARALLEL | {"block_kind": "parallel", "first_norm": False},
        ONE_STACK,
    ),
    Variant("norm of embeddings", "Devlin et al. 2018", {"embedding_norm": True}),
    Variant("no norm of embeddings", "Radford et al. 2019", {"embedding_norm": False}),
    Variant("token types", "Devlin et al. 2018", {"type_vocab_size": 3}, ONE_STACK),
    Variant(
        "embeddings of another size",
        "Lan et al. 2019, 3.1",
        {"embedding_size": 10, "head_transform": True, "head_bias": True, "head_dense_bias": True},
    ),
    Variant(
        "embeddings of another size, untied",
        "Lan et al. 2019, 3.1",
        {"embedding_size": 10, "head_transform": False, "tie_word_embeddings": False, "embedding_norm": True},
    ),
    Variant("one set of weights", "Lan et al. 2019, 3.1", {"num_hidden_groups": 1}, ONE_STACK),
    Variant(
        "two sets of weights for four layers",
        "Lan et al. 2019, 3.1",
        LOCAL | {"num_hidden_groups": 2, "num_hidden_layers": 4},
        ONE_STACK,
    ),
    Variant("another number of decoder layers", "Kasai et al. 2020", {"num_decoder_layers": 1}, ("seq2seq",)),
    Variant("scaled branches", "Radford et al. 2019", {"residual_scale": 0.4}),
    Variant(
        "scaled branches, parallel",
        "IBM Granite",
        PARALLEL | {"block_kind": "parallel", "residual_scale": 0.4},
        ONE_STACK,
    ),
    Variant("scaled embeddings", "Vaswani et al. 2017, 3.4", {"embedding_scale": 3.0}),
    Variant("scaled output", "Raffel et al. 2019", {"output_scale": 0.3}),
    Variant("layer norm without bias", "Warner et al. 2024", {"norm_kind": "layer_norm", "norm_bias": False}),
    Variant("RMS norm", "Zhang and Sennrich 2019", {"norm_kind": "rms_norm", "norm_bias": False}),
    Variant("a large epsilon", "Ba et al. 2016", {"norm_eps": 0.1}),
    Variant(
        "RMS norm, a large epsilon",
        "Zhang and Sennrich 2019",
        {"norm_kind": "rms_norm", "norm_bias": False, "norm_eps": 0.1},
    ),
    Variant("untied head", "Touvron et al. 2023", {"tie_word_embeddings": False}),
    Variant(
        "head with a transform",
        "Devlin et al. 2018",
        {"head_transform": True, "head_bias": True, "head_dense_bias": True},
    ),
    Variant(
        "head with a transform, no biases",
        "Warner et al. 2024",
        {"head_transform": True, "head_bias": False, "head_dense_bias": False},
    ),
    Variant(
        "head with a bias alone",
        "Ott et al. 2019",
        {"head_transform": False, "head_bias": True, "head_dense_bias": False},
    ),
]
_ACTIVATIONS = {
    "relu": "Vaswani et al. 2017, 3.3",
    "relu2": "So et al. 2021",
    "gelu": "Hendrycks and Gimpel 2016",
    "gelu_new": "Hendrycks and Gimpel 2016",
    "gelu_pytorch_tanh": "Hendrycks and Gimpel 2016",
    "silu": "Ramachandran et al. 2017",
}
_GATED = {"relu": "ReGLU", "relu2": "squared ReGLU", "gelu": "GeGLU", "gelu_new": "GeGLU, tanh",
          "gelu_pytorch_tanh": "GeGLU, tanh (PyTorch's name)", "silu": "SwiGLU"}  # fmt: skip
MLPS = [
    *(Variant(act, paper, {"hidden_act": act, "mlp_kind": "plain"}) for act, paper in _ACTIVATIONS.items()),
    *(Variant(name, "Shazeer 2020", {"hidden_act": act, "mlp_kind": "gated"}) for act, name in _GATED.items()),
]
_HEADS = {"head_dim": None, "num_key_value_heads": None}
DESIGNS = [
    Variant("bert", "Devlin et al. 2018", {}, ("encoder",), architecture="bert"),
    Variant("roberta", "Liu et al. 2019", {}, ("encoder",), architecture="roberta"),
    Variant("electra", "Clark et al. 2020", {"embedding_size": 8}, ("encoder",), architecture="electra"),
    Variant("albert", "Lan et al. 2019", {"embedding_size": 8}, ("encoder",), architecture="albert"),
    Variant("modernbert", "Warner et al. 2024", {"local_window": 4}, ("encoder",), architecture="modernbert"),
    Variant("eurobert", "Boizard et al. 2025", {"num_key_value_heads": 2}, ("encoder",), architecture="eurobert"),
    Variant("gpt2", "Radford et al. 2019", {}, ("decoder",), architecture="gpt2"),
    Variant("llama", "Touvron et al. 2023", {"num_key_value_heads": 2}, ("decoder",), architecture="llama"),
    Variant("qwen3", "Yang et al. 2025", {"num_key_value_heads": 2, "head_dim": 6}, ("decoder",), architecture="qwen3"),
    Variant(
        "modernbert-decoder", "Weller et al. 2025", {"local_window": 4}, ("decoder",), architecture="modernbert-decoder"
    ),
    Variant("transformer", "Vaswani et al. 2017", {}, ("seq2seq",), architecture="transformer"),
    Variant("t5", "Raffel et al. 2019", {"head_dim": 6}, ("seq2seq",), architecture="t5"),
]
GROUPS = {"Positions": POSITIONS, "Attention": ATTENTION, "Blocks": BLOCKS, "MLP": MLPS, "Designs": DESIGNS}
CASES = [(variant, kind) for group in GROUPS.values() for variant in group for kind in variant.kinds]


def title_of(variant: Variant) -> str:
    """The title of the variant's group."""
    return next(title for title, variants in GROUPS.items() if variant in variants)


def case_name(value: object) -> str:
    """The name of a test case."""
    return value.name if isinstance(value, Variant) else str(value)


def measure(variant: Variant, kind: str) -> Errors:
    """How far a tiny model of this variant lies from the reference, over packed rows with padding, on every backend."""
    return measure_config(variant.config(kind), variant.theirs, variant.name)


def measure_config(config: LoomConfig, theirs: dict[str, Any], seed: str) -> Errors:
    """The same for any config; `theirs` as in `Variant`."""
    batch = _batch(config, zlib.crc32(seed.encode()) % 1000)
    model = model_class(config)(config)
    randomize(model)
    model.eval()
    weights = weights_of(model)
    expected = reference_logits(settings_of(config, **theirs), weights, batch["ids"], **batch["reference"])
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    real = batch["real"]
    upstream[~real] = 0.0
    gradients = torch.autograd.grad((expected * upstream).sum(), list(weights.values()))
    float32 = _on_each_backend(model, batch)
    worst = Errors(0.0, 0.0, max(relative(logits[real].double(), expected[real]) for logits in float32))
    model.double()
    for logits in _on_each_backend(model, batch):
        model.zero_grad()
        (logits * upstream).sum().backward()
        slopes = [parameter.grad for parameter in model.parameters()]
        exact = relative(logits[real], expected[real])
        worst = worst.worst(Errors(exact, _gradient_error(slopes, gradients), 0.0))
    return worst


def _batch(config: LoomConfig, seed: int) -> dict[str, Any]:
    """Two rows of packed pieces and padding, as the model takes them and as the reference does."""
    ids, pieces = tokens(2, LENGTH, seed=seed, vocabulary=config.vocab_size), documents([6, 3, -1], [LENGTH - 2, 2])
    inputs: dict[str, Tensor] = {"input_ids": ids, "document_ids": pieces}
    reference: dict[str, Tensor] = {"documents": pieces}
    real = pieces != 0
    if config.type_vocab_size and config.kind == "encoder":
        types = torch.randint(0, config.type_vocab_size, ids.shape, generator=torch.Generator().manual_seed(seed))
        inputs["token_type_ids"] = reference["token_types"] = types
    if config.kind == "seq2seq":
        written, out = tokens(2, 7, seed=seed + 1, vocabulary=config.vocab_size), documents([2, 4, -1], [3, 4])
        inputs |= {"decoder_input_ids": written, "decoder_document_ids": out}
        reference |= {"output_ids": written, "output_documents": out}
        real = out != 0
    return {"ids": ids, "inputs": inputs, "reference": reference, "real": real}


def _on_each_backend(model: Any, batch: dict[str, Any]) -> list[Tensor]:
    made = []
    for name, can in CAPABILITIES.items():
        if can.devices is None:
            model.set_attn_implementation(name)
            made.append(model(**batch["inputs"]).logits)
    return made


def _gradient_error(ours: list[Tensor | None], theirs: tuple[Tensor, ...]) -> float:
    """The largest error of any parameter's gradient, over the largest slope of that parameter.

    Some gradients vanish by their mathematics (of a key's bias, without positions that turn): what is left there is
    rounding, so that no scale is taken below a thousandth of the largest of all slopes.
    """
    largest = max(float(slope.abs().max()) for slope in theirs)
    errors = []
    for slope, expected in zip(ours, theirs, strict=True):
        assert slope is not None
        scale = max(float(expected.abs().max()), largest / 1000)
        errors.append(float((slope - expected).abs().max()) / scale)
    return max(errors)
