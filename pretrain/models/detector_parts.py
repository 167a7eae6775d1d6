"""A detector of replaced tokens to train, of parts that were trained elsewhere.

What lives here: which config and which sharing a published pair has, and how its tensors become one model. What must
not: reading or writing files, or what the model computes.
"""

# mypy: disable-error-code="no-untyped-call, no-any-return"
# (transformers' base classes are untyped)

from typing import Any

import torch
from torch import nn

from .configuration_loom import DETECTION_KEYS, LoomEncoderConfig, config_keys
from .modeling_loom_encoder import LoomEncoderForMaskedLM
from .modeling_loom_rtd import LoomEncoderForReplacedTokenDetection

GENERATOR_SIZE = 0.25
"""Of a generator to its discriminator, where nothing is said: ELECTRA-Small's; a quarter to a half did best (Clark et
al. 2020, section 3.2)."""
_TABLES = ("embed_tokens", "embed_positions", "embed_token_types")


@torch.no_grad()
def join_parts(
    discriminator: LoomEncoderForReplacedTokenDetection, generator: LoomEncoderForMaskedLM | None = None, **keys: Any
) -> LoomEncoderForReplacedTokenDetection:
    """A detector to train, of its two published parts, or of the discriminator and a new generator.

    Two parts with one table of embeddings go on sharing it, unless the discriminator's config says that they are
    disentangled; its own part is then the difference of the two tables. A new generator is drawn from torch's
    generator, and begins with the discriminator's embeddings where it shares them.

    Args:
        discriminator: a model without a generator.
        generator: a masked language model of the same design and vocabulary; None for a new one.
        keys: of the config: generator_size (`GENERATOR_SIZE`), generator, rtd_sharing of a new generator; rtd_weight.

    Raises:
        ValueError: where the two do not belong together, or no model can be built.
    """
    base = discriminator.config
    if generator is None:
        keys = {"generator_size": GENERATOR_SIZE} | keys
    else:
        sharing = _sharing(discriminator, generator)
        keys = keys | {"rtd_sharing": sharing} | sizes_of_generator(base, generator.config, sharing)
    config = type(base).from_dict(base.to_dict() | keys)
    config.architectures = [LoomEncoderForReplacedTokenDetection.__name__]
    model = LoomEncoderForReplacedTokenDetection(config)
    state = dict(discriminator.state_dict())
    if generator is not None:
        state |= {f"generator.{name}": tensor for name, tensor in generator.state_dict().items()}
    if model.is_disentangled:
        whole = state.pop("model.embed_tokens.weight")
        state["embedding_delta.weight"] = whole - state.setdefault("generator.model.embed_tokens.weight", whole)
    nn.Module.to(model, discriminator.rtd_head.dense.weight)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert all(name.startswith("generator.") for name in missing), missing
    model.tie_weights()
    return model.eval()


def _sharing(discriminator: LoomEncoderForReplacedTokenDetection, generator: LoomEncoderForMaskedLM) -> str:
    """What two trained parts share, by their tables; what the discriminator's config says, where that can be."""
    stated = str(discriminator.config.rtd_sharing)
    tables = [[getattr(part.model, name, None) for name in _TABLES] for part in (discriminator, generator)]
    pairs = [(ours.weight, theirs.weight) for ours, theirs in zip(*tables, strict=True) if ours and theirs]
    if stated == "tied":
        return stated if all(torch.equal(ours, theirs) for ours, theirs in pairs) else "none"
    return stated if pairs[0][0].shape == pairs[0][1].shape else "none"


def sizes_of_generator(config: LoomEncoderConfig, own: LoomEncoderConfig, sharing: str) -> dict[str, Any]:
    """The keys of a discriminator's config by which its `generator_config` is the generator's own config.

    Raises ValueError where there are none, or the two do not belong together.
    """
    if own.architecture != config.architecture or own.vocab_size != config.vocab_size:
        raise ValueError(
            f"a generator of architecture {own.architecture} with {own.vocab_size} ids does not belong to a "
            f"discriminator of {config.architecture} with {config.vocab_size}; give the pair that was trained together"
        )
    found: dict[str, Any] = {"generator_size": own.hidden_size / config.hidden_size, "rtd_sharing": sharing}
    names = [name for name in config_keys(config.architecture) if name not in DETECTION_KEYS]
    for _ in range(4):  # what one key brings along may have to be said too
        made = type(config).from_dict(config.to_dict() | {"generator": None} | found).generator_config()
        given = {name: getattr(own, name) for name in names if getattr(own, name) != getattr(made, name)}
        if not given:
            break
        found["generator"] = found.get("generator", {}) | given
    else:
        raise ValueError(f"the discriminator's config cannot say what {', '.join(given)} of its generator are")
    return found
