"""The Loom models, registered with transformers' Auto classes on import.

`model_class` names the class for a config and a task. `register_hub_code` prepares a model whose shape has no stock
home to be saved together with its code. Nothing outside torch and transformers is imported in this package, and its
files import each other by `from .sibling` alone: transformers copies them to a model directory by following those.
"""

# mypy: disable-error-code="no-untyped-call"

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from .architectures import ARCHITECTURES
from .attention import CAPABILITIES, Capability, pick_backend
from .configuration_loom import (
    LoomConfig,
    LoomDecoderConfig,
    LoomEncoderConfig,
    LoomSeq2SeqConfig,
    config_keys,
    loom_config,
)
from .costs import flops_per_token, num_multiplied_parameters
from .dropout import wants_dropout_keys
from .losses import linear_cross_entropy
from .modeling_loom import LoomModel, LoomPreTrainedModel
from .modeling_loom_decoder import (
    LoomDecoderForCausalLM,
    LoomDecoderForSequenceClassification,
    LoomDecoderModel,
)
from .modeling_loom_encoder import (
    LoomEncoderForMaskedLM,
    LoomEncoderForSequenceClassification,
    LoomEncoderModel,
)
from .modeling_loom_seq2seq import LoomSeq2SeqForConditionalGeneration, LoomSeq2SeqModel

__all__ = [
    "ARCHITECTURES",
    "CAPABILITIES",
    "Capability",
    "LoomConfig",
    "LoomDecoderConfig",
    "LoomDecoderForCausalLM",
    "LoomDecoderForSequenceClassification",
    "LoomDecoderModel",
    "LoomEncoderConfig",
    "LoomEncoderForMaskedLM",
    "LoomEncoderForSequenceClassification",
    "LoomEncoderModel",
    "LoomModel",
    "LoomPreTrainedModel",
    "LoomSeq2SeqConfig",
    "LoomSeq2SeqForConditionalGeneration",
    "LoomSeq2SeqModel",
    "config_keys",
    "flops_per_token",
    "linear_cross_entropy",
    "loom_config",
    "model_class",
    "model_from_config",
    "num_multiplied_parameters",
    "pick_backend",
    "register_hub_code",
    "wants_dropout_keys",
]

# kind -> task -> (class, the Auto class that finds it)
_CLASSES: dict[str, dict[str, tuple[type[LoomPreTrainedModel], str]]] = {
    "encoder": {
        "base": (LoomEncoderModel, "AutoModel"),
        "pretraining": (LoomEncoderForMaskedLM, "AutoModelForMaskedLM"),
        "classification": (LoomEncoderForSequenceClassification, "AutoModelForSequenceClassification"),
    },
    "decoder": {
        "base": (LoomDecoderModel, "AutoModel"),
        "pretraining": (LoomDecoderForCausalLM, "AutoModelForCausalLM"),
        "classification": (LoomDecoderForSequenceClassification, "AutoModelForSequenceClassification"),
    },
    "seq2seq": {
        "base": (LoomSeq2SeqModel, "AutoModel"),
        "pretraining": (LoomSeq2SeqForConditionalGeneration, "AutoModelForSeq2SeqLM"),
    },
}


def model_class(config: LoomConfig, task: str = "pretraining") -> type[LoomPreTrainedModel]:
    """The class for this config and task: "pretraining" (its language-model head), "classification" or "base"."""
    classes = _CLASSES[config.kind]
    if task not in classes:
        raise ValueError(f"unknown task {task!r} for a {config.kind}: take one of {', '.join(classes)}")
    return classes[task][0]


def model_from_config(config: LoomConfig) -> LoomPreTrainedModel:
    """A new model with initial weights: the class that `config.architectures` names, else its language-model head."""
    named = (config.architectures or [""])[0]
    for found, _ in _CLASSES[config.kind].values():
        if found.__name__ == named:
            return found(config)
    return model_class(config)(config)


def register_hub_code(model: PreTrainedModel) -> None:
    """Make `model.save_pretrained` write the code of this package and an `auto_map` that finds it.

    The directory then loads with `trust_remote_code=True` where this package is not installed, through AutoModel,
    AutoModelForSequenceClassification and the model's own Auto class.
    """
    classes = _CLASSES[model.config.kind]
    auto_map = {"AutoConfig": f"configuration_loom.{type(model.config).__name__}"}
    for found, auto_class in classes.values():
        auto_map[auto_class] = f"{found.__module__.rsplit('.', 1)[-1]}.{found.__name__}"
        if isinstance(model, found):
            found.register_for_auto_class(auto_class)
    type(model.config).register_for_auto_class()
    model.config.auto_map = auto_map


_AUTO_CLASSES = {
    found.__name__: found
    for found in (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
    )
}


def _register() -> None:
    for config_class in (LoomEncoderConfig, LoomDecoderConfig, LoomSeq2SeqConfig):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        for found, auto_class in _CLASSES[config_class.kind].values():
            _AUTO_CLASSES[auto_class].register(config_class, found, exist_ok=True)


_register()
