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
    AutoModelForMultipleChoice,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from .architectures import ARCHITECTURES
from .attention import CAPABILITIES, Capability, pick_backend, refuse_device
from .configuration_loom import (
    DETECTION_KEYS,
    LoomConfig,
    LoomDecoderConfig,
    LoomEncoderConfig,
    LoomSeq2SeqConfig,
    config_keys,
    loom_config,
)
from .costs import flops_per_token, num_multiplied_parameters
from .detector_parts import GENERATOR_SIZE, join_parts, sizes_of_generator
from .dropout import wants_dropout_keys
from .losses import linear_cross_entropy
from .modeling_loom import LoomModel, LoomPreTrainedModel
from .modeling_loom_decoder import LoomDecoderForCausalLM, LoomDecoderModel
from .modeling_loom_decoder_heads import (
    LoomDecoderForQuestionAnswering,
    LoomDecoderForSequenceClassification,
    LoomDecoderForTokenClassification,
)
from .modeling_loom_encoder import LoomEncoderForMaskedLM, LoomEncoderForPreTraining, LoomEncoderModel
from .modeling_loom_heads import (
    LoomEncoderForMultipleChoice,
    LoomEncoderForQuestionAnswering,
    LoomEncoderForSequenceClassification,
    LoomEncoderForTokenClassification,
)
from .modeling_loom_rtd import LoomEncoderForReplacedTokenDetection, LoomReplacedTokenDetectionOutput
from .modeling_loom_seq2seq import LoomSeq2SeqForConditionalGeneration, LoomSeq2SeqModel

__all__ = [
    "ARCHITECTURES",
    "CAPABILITIES",
    "DETECTION_KEYS",
    "GENERATOR_SIZE",
    "Capability",
    "LoomConfig",
    "LoomDecoderConfig",
    "LoomDecoderForCausalLM",
    "LoomDecoderForQuestionAnswering",
    "LoomDecoderForSequenceClassification",
    "LoomDecoderForTokenClassification",
    "LoomDecoderModel",
    "LoomEncoderConfig",
    "LoomEncoderForMaskedLM",
    "LoomEncoderForMultipleChoice",
    "LoomEncoderForPreTraining",
    "LoomEncoderForQuestionAnswering",
    "LoomEncoderForReplacedTokenDetection",
    "LoomEncoderForSequenceClassification",
    "LoomEncoderForTokenClassification",
    "LoomEncoderModel",
    "LoomModel",
    "LoomPreTrainedModel",
    "LoomReplacedTokenDetectionOutput",
    "LoomSeq2SeqConfig",
    "LoomSeq2SeqForConditionalGeneration",
    "LoomSeq2SeqModel",
    "auto_map_of",
    "config_keys",
    "flops_per_token",
    "join_parts",
    "linear_cross_entropy",
    "loom_config",
    "model_class",
    "model_from_config",
    "num_multiplied_parameters",
    "pick_backend",
    "refuse_device",
    "register_hub_code",
    "sizes_of_generator",
    "task_of",
    "wants_dropout_keys",
]

# kind -> task -> (class, the Auto class that finds it)
_CLASSES: dict[str, dict[str, tuple[type[LoomPreTrainedModel], str]]] = {
    "encoder": {
        "base": (LoomEncoderModel, "AutoModel"),
        "pretraining": (LoomEncoderForMaskedLM, "AutoModelForMaskedLM"),
        "sentence_pretraining": (LoomEncoderForPreTraining, "AutoModelForPreTraining"),
        "replaced_token_detection": (LoomEncoderForReplacedTokenDetection, "AutoModelForPreTraining"),
        "classification": (LoomEncoderForSequenceClassification, "AutoModelForSequenceClassification"),
        "token_classification": (LoomEncoderForTokenClassification, "AutoModelForTokenClassification"),
        "question_answering": (LoomEncoderForQuestionAnswering, "AutoModelForQuestionAnswering"),
        "multiple_choice": (LoomEncoderForMultipleChoice, "AutoModelForMultipleChoice"),
    },
    "decoder": {
        "base": (LoomDecoderModel, "AutoModel"),
        "pretraining": (LoomDecoderForCausalLM, "AutoModelForCausalLM"),
        "classification": (LoomDecoderForSequenceClassification, "AutoModelForSequenceClassification"),
        "token_classification": (LoomDecoderForTokenClassification, "AutoModelForTokenClassification"),
        "question_answering": (LoomDecoderForQuestionAnswering, "AutoModelForQuestionAnswering"),
    },
    "seq2seq": {
        "base": (LoomSeq2SeqModel, "AutoModel"),
        "pretraining": (LoomSeq2SeqForConditionalGeneration, "AutoModelForSeq2SeqLM"),
    },
}


def model_class(config: LoomConfig, task: str = "pretraining") -> type[LoomPreTrainedModel]:
    """The class for this config and task.

    Tasks: base (no head), pretraining (the language-model head), classification, token_classification,
    question_answering, multiple_choice, sentence_pretraining (masked tokens and pairs of sentences),
    replaced_token_detection. Raises ValueError for a task that this kind of model does not have.
    """
    classes = _CLASSES[config.kind]
    if task not in classes:
        raise ValueError(f"unknown task {task!r} for a {config.kind}: take one of {', '.join(classes)}")
    return classes[task][0]


def task_of(model: PreTrainedModel) -> str | None:
    """The task of a model's class; the inverse of `model_class`. None: it is not one of ours."""
    classes = _CLASSES[model.config.kind] if isinstance(model.config, LoomConfig) else {}
    return next((task for task, (found, _) in classes.items() if isinstance(model, found)), None)


def model_from_config(config: LoomConfig) -> LoomPreTrainedModel:
    """A new model with initial weights: the class that `config.architectures` names, else its language-model head."""
    named = (config.architectures or [""])[0]
    for found, _ in _CLASSES[config.kind].values():
        if found.__name__ == named:
            return found(config)
    return model_class(config)(config)


def register_hub_code(model: PreTrainedModel) -> None:
    """Make `model.save_pretrained` write the code of this package and an `auto_map` that finds it.

    The directory then loads with `trust_remote_code=True` where this package is not installed, through AutoModel, the
    Auto classes of all tasks, and the model's own.
    """
    for found, auto_class in _CLASSES[model.config.kind].values():
        if isinstance(model, found):
            found.register_for_auto_class(auto_class)
    type(model.config).register_for_auto_class()
    model.config.auto_map = auto_map_of(model)


def auto_map_of(model: PreTrainedModel) -> dict[str, str]:
    """Where Auto classes find the code of this kind of model: their names -> `file.class`, the model's own first."""
    auto_map = {"AutoConfig": f"configuration_loom.{type(model.config).__name__}"}
    for found, auto_class in _CLASSES[model.config.kind].values():
        if auto_class not in auto_map or isinstance(model, found):  # of two classes under one name, the model's own
            auto_map[auto_class] = f"{found.__module__.rsplit('.', 1)[-1]}.{found.__name__}"
    return auto_map


_AUTO_CLASSES = {
    found.__name__: found
    for found in (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForMultipleChoice,
        AutoModelForPreTraining,
        AutoModelForQuestionAnswering,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )
}


def _register() -> None:
    """Tell transformers' Auto classes; of several classes under one name they take the one that the config names."""
    for config_class in (LoomEncoderConfig, LoomDecoderConfig, LoomSeq2SeqConfig):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        by_name: dict[str, list[type[LoomPreTrainedModel]]] = {}
        for found, auto_class in _CLASSES[config_class.kind].values():
            by_name.setdefault(auto_class, []).append(found)
        # As in transformers, pretraining means a language-model head where there is nothing else.
        by_name.setdefault("AutoModelForPreTraining", []).append(_CLASSES[config_class.kind]["pretraining"][0])
        for auto_class, classes in by_name.items():
            registered = classes[0] if len(classes) == 1 else tuple(classes)
            _AUTO_CLASSES[auto_class].register(config_class, registered, exist_ok=True)


_register()
