"""Hugging Face model directories, read: released models and our own, as Loom models or as transformers has them.

What lives here: which class reads a directory, what may be left out of it, what is refused. What must not: writing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from pretrain.evaluation.loading import check_source, loading
from pretrain.files import ArtifactError
from pretrain.interop import HOMES, from_stock, from_stock_config
from pretrain.models import LoomConfig, LoomPreTrainedModel, join_parts, model_class, model_from_config
from pretrain.trust import check_model

_OWN_CODE = "it carries code of its own, which is not run here; give a model of a stock architecture"
_LOOM_SPARE = (r"^pooler\.", r"^seq_relationship\.")  # what stands beside a language-model head for pairs of sentences
_SENTENCE_HEAD = r"(^|\.)(pooler|seq_relationship|sop_classifier)\."
_OF_TRAINING = (r"^generator\.", r"^embedding_delta\.")  # what a checkpoint holds beside a detector of replaced tokens


def read_state(directory: Path, patterns: Iterable[str] = ("",)) -> dict[str, Tensor]:
    """Every tensor of a model directory's safetensors files with such a name, in the dtype that is stored.

    Raises:
        ArtifactError: when there are none.
    """
    state: dict[str, Tensor] = {}
    for file in _weight_files(directory):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (safe_open is no mapping)
                if any(re.search(pattern, name) for pattern in patterns):
                    state[name] = opened.get_tensor(name)
    return state


def _weight_files(directory: Path) -> list[Path]:
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ArtifactError(
            f"`{directory}` holds no .safetensors file; pickled weights are not read, convert them first"
        )
    return files


def read_config(source: str | Path) -> PreTrainedConfig:
    """The configuration of a model directory or Hub name, stock or Loom; code that it carries is not run.

    Raises:
        ArtifactError: when it is no model directory.
        ValueError: when the Hub does not give it, or transformers does not know the architecture; names the remedy.
    """
    check_source(source)
    with loading(str(source), "model", own_code=_OWN_CODE):
        check_model(source)
        config: PreTrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=False)
    return config


PRETRAINING_TASKS = ("pretraining", "sentence_pretraining", "replaced_token_detection")
"""Tasks of the classes that pretraining makes; the first one has a language-model head alone."""


def stored_task(config: PreTrainedConfig) -> str:
    """Which of `PRETRAINING_TASKS` the class that a config names is for; the first where it names none of them."""
    named = config.architectures or []
    for task in PRETRAINING_TASKS[1:]:
        if isinstance(config, LoomConfig):
            found = model_class(config, task).__name__ if config.kind == "encoder" else None
        else:
            found = HOMES[config.model_type].classes.get(task) if config.model_type in HOMES else None
        if found in named:
            return task
    return PRETRAINING_TASKS[0]


def read_loom(
    source: str | Path, *, note: Callable[[str], None] | None = None, task: str = "pretraining"
) -> LoomPreTrainedModel:
    """Read a model with its language-model head as the Loom class that holds it: fp32, eval mode.

    Takes every family of `interop.HOMES` in every layout that transformers' own class reads (names without the prefix
    of the stack, LayerNorm.gamma, half precision, tied or not), and Loom's own directories. Tensors that take no part
    in language modelling are left out: BERT's pooler and next-sentence head, GPT-2's mask buffers. A detector of
    replaced tokens comes with its generator where one lies in its files, as in a checkpoint.

    Args:
        source: a directory, or a Hub name (a directory of that name comes first). Weights come from safetensors alone.
        note: called with a line that names the tensors that were left out, when there are any.
        task: another one of `PRETRAINING_TASKS`, to read what that class holds (`stored_task` says which).

    Raises:
        ArtifactError: when it is no model directory, or its weights do not fit its config; names them.
        ValueError: when the Hub does not give it, when it has no language-model head, or when its architecture, or a
            value in its config, is not one that we hold; names it.
    """
    config = read_config(source)
    if isinstance(config, LoomConfig):
        loom: LoomPreTrainedModel = _pretrained(model_class(config, task), source, config, spare=_LOOM_SPARE)
        if (
            task != PRETRAINING_TASKS[2]
            and config.tie_word_embeddings
            and loom.lm_head.weight is not loom.get_input_embeddings().weight
        ):
            table = "model.encoder.embed_tokens" if config.kind == "seq2seq" else "model.embed_tokens"
            raise ArtifactError(f"`{source}`: lm_head.weight differs from {table}.weight, to which it is tied")
        loom.config.architectures = [type(loom).__name__]  # the class that was asked for, not the one that was saved
        return loom
    if config.model_type in HOMES and task not in HOMES[config.model_type].classes:
        held = " or ".join(home.name for home in HOMES.values() if task in home.classes)
        raise ValueError(
            f"`{source}` is a {config.model_type} model, which has no class for {task.replace('_', ' ')}; give a model "
            f"of {held} that was saved with its head, or choose another objective"
        )
    from_stock_config(config, task)  # what cannot be held is refused before its weights are fetched
    home = HOMES[config.model_type]
    stock = _pretrained(getattr(transformers, home.classes[task]), source, config, (*home.spare, *_OF_TRAINING), note)
    tensors = stock.state_dict()
    if task == PRETRAINING_TASKS[2] and Path(source).is_dir():
        beside = read_state(Path(source), _OF_TRAINING)
        tensors |= {name: tensor.float() for name, tensor in beside.items()}
    converted, state = from_stock(stock.config, tensors)
    model = model_from_config(converted)
    load_state(model, state)
    nn.Module.eval(model)
    return model


GENERATOR = "generator"
"""The folder beside a published detector of replaced tokens that holds its generator."""


def read_detector(
    source: str | Path, *, note: Callable[[str], None] | None = None, keys: Mapping[str, Any] | None = None
) -> LoomPreTrainedModel:
    """Read a detector of replaced tokens with a generator, so that both can be trained: fp32, eval mode.

    The generator is that of a checkpoint, or the masked language model in the folder `generator` of a published
    discriminator, or, where there is neither, a new one, drawn from torch's generator.

    Args:
        source: as of `read_loom`.
        note: told what was left out, and of a new generator.
        keys: of the config: generator_size, generator and rtd_sharing of a new generator; rtd_weight.

    Raises:
        ArtifactError, ValueError: as `read_loom`; for keys of a new generator where there is one.
    """
    given = dict(keys or {})
    weight = {name: given.pop(name) for name in ("rtd_weight",) if name in given}
    found: Any = read_loom(source, note=note, task=PRETRAINING_TASKS[2])
    beside = Path(source) / GENERATOR
    is_beside = (beside / "config.json").is_file()
    if given and (is_beside or found.generator is not None):
        raise ValueError(
            f"`{source}` has a generator, so `{min(given)}`, which shapes a new one, has no effect; remove it"
        )
    if found.generator is None:
        if not is_beside and note is not None:
            note(f"`{source}` has no generator, nor is one in `{beside}`: a new one begins")
        generator: Any = read_loom(beside) if is_beside else None
        found = join_parts(found, generator, **given)
    found.config.rtd_weight = weight.get("rtd_weight", found.config.rtd_weight)
    detector: LoomPreTrainedModel = found
    return detector


def is_held(source: str | Path) -> bool:
    """Whether `read_loom` takes this model's architecture, with every value of its config.

    Raises:
        ArtifactError: when it is no model directory.
        ValueError: when the Hub does not give it, or transformers does not know the architecture; names the remedy.
    """
    config = read_config(source)
    if isinstance(config, LoomConfig):
        return True
    try:
        from_stock_config(config)
    except ValueError:
        return False
    return True


STOCK_CLASSES: dict[str, Any] = {
    "encoder": AutoModelForMaskedLM,
    "decoder": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
}
"""The Auto class with a token head of each kind of model."""


def read_stock(source: str | Path, kind: str | None = None, task: str = "pretraining") -> PreTrainedModel:
    """Read a model with transformers' registered class and its language-model head: fp32, eval mode.

    Args:
        source: a directory, stock or Loom, or a Hub name.
        kind: encoder, decoder or seq2seq; None takes it from the class that the config names.
        task: another one of `PRETRAINING_TASKS`, to read what that class holds.

    Raises:
        ArtifactError: when it is no model directory, or weights are missing.
        ValueError: when the Hub does not give it, or it has no language-model head; names the remedy.
    """
    config = read_config(source)
    home = config if isinstance(config, LoomConfig) else HOMES.get(config.model_type)
    if kind is None:
        causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or [])
        kind = home.kind if home is not None else "decoder" if causal else "encoder"
        kind = "seq2seq" if getattr(config, "is_encoder_decoder", False) else kind
    found = STOCK_CLASSES[kind]
    if task != PRETRAINING_TASKS[0] and isinstance(config, LoomConfig):
        found = model_class(config, task)
    elif task != PRETRAINING_TASKS[0]:
        found = AutoModelForPreTraining
    model: PreTrainedModel = _pretrained(found, source, config, spare=("",))
    return model


def _pretrained(
    found: Any,
    source: str | Path,
    config: PreTrainedConfig,
    spare: Iterable[str],
    note: Callable[[str], None] | None = None,
) -> Any:
    """The model of a class in fp32, every weight read; tensors that match a pattern of `spare` may be left over."""
    if Path(source).is_dir():
        _weight_files(Path(source))
    with loading(str(source), "model", own_code=_OWN_CODE):
        model, report = found.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
        )
    _refuse_gaps(model, source, report)
    left_over = sorted(report["unexpected_keys"])
    if refused := [name for name in left_over if not any(re.search(pattern, name) for pattern in spare)]:
        raise ArtifactError(
            f"`{source}` has {len(refused)} tensors that {type(model).__name__} does not hold, such as `{refused[0]}`; "
            f"give a model that was saved by that class"
        )
    if left_over and note is not None:
        names = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in left_over))
        note(f"`{source}`: left out {', '.join(names)}; no part of language modelling")
    return model


def _refuse_gaps(model: PreTrainedModel, source: str | Path, report: Mapping[str, Any]) -> None:
    class_name = type(model).__name__
    missing = sorted(report["missing_keys"])
    stack, beside = f"{model.base_model_prefix}.", Path(source) / GENERATOR
    hint = f", or take its generator, `{beside}`" if (beside / "config.json").is_file() else ""
    wanted = "language-model head"
    if class_name.endswith(("ElectraForPreTraining", "ReplacedTokenDetection")):
        wanted, hint = "head that detects replaced tokens", ", or choose another objective"
    head = [name for name in missing if not name.startswith(stack)]
    if head and all(re.search(_SENTENCE_HEAD, name) for name in head):
        wanted, hint = "head for pairs of sentences", ", or choose objective.sentences: none"
    if head:
        raise ArtifactError(
            f"`{source}` ({', '.join(model.config.architectures or ['no class named'])}) has no {wanted}: "
            f"`{head[0]}` is missing; give a model that was saved with one, as {class_name} saves it{hint}"
        )
    if missing:
        raise ArtifactError(
            f"`{source}` lacks {len(missing)} tensors of {class_name}, such as `{missing[0]}`; it is incomplete: copy "
            "it again"
        )
    if report["mismatched_keys"]:
        name, stored, expected = min(report["mismatched_keys"])
        raise ArtifactError(
            f"`{source}`: `{name}` has shape {tuple(stored)}, its config.json asks for {tuple(expected)}; one of the "
            "two is of another model"
        )


def load_state(model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Load a state dict in which tied tensors stand once; every other tensor must be there, and none too many.

    Raises:
        ArtifactError: names the tensors that are missing or left over.
    """
    missing, unexpected = model.load_state_dict(state, strict=False, assign=False)
    missing = [name for name in missing if name not in model.all_tied_weights_keys]
    if missing or unexpected:
        raise ArtifactError(
            f"the weights do not fit the model: missing {missing[:5]}, left over {list(unexpected)[:5]}"
        )
    model.tie_weights()
