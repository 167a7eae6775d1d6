"""Low-rank adapters through PEFT in place of training every weight.

What lives here: the one door to PEFT; adapters put into a model with a head, their checkpoints in PEFT's own form, and
the merged model. What must not: heads, tasks, the loop.

A checkpoint holds what is trained: adapters, and in full the modules that are new beside the pretrained weights. The
pretrained weights lie where they were read from, and must be the same when a run goes on.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from pretrain.config_task import LoraConfig, TunedModel
from pretrain.files import ArtifactError, LateBytes, sha256_file, write_json, write_safetensors
from pretrain.model_dir import copy_tokenizer, write_model
from pretrain.runtime import set_seed
from pretrain.tasks.base import Task
from pretrain.tasks.heads import install, read_model
from pretrain.tasks.metrics import EXTRA
from pretrain.training.state import late_bytes

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FOLDER = "adapter"
"""The folder beside a merged model that holds its adapters alone."""

_NAME = "default"
_KINDS = {
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
}
_OF_OUTPUTS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
_STRATEGIES = ("single", "ddp")


def _peft() -> Any:
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ValueError(f"model.lora needs `peft`, which is not installed: {EXTRA}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings: PEFT calls what transformers no longer likes, and says which layout of weights it found."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def check_choice(chosen: TunedModel, strategy: str) -> None:
    """Refuse what adapters cannot be combined with.

    Raises:
        ValueError: names the key.
    """
    if chosen.adapters is None:
        return
    if chosen.weights == "random":
        raise ValueError(
            "model.lora adapts pretrained weights, and model.weights: random has none; leave one of them out"
        )
    if strategy not in _STRATEGIES:
        raise ValueError(f"train.strategy: {strategy} splits the weights, which model.lora does not; use ddp")
    _peft()


def add_adapters(model: Any, new: Collection[str], lora: LoraConfig, seed: int) -> Any:
    """A model with adapters: they are trained, with what is new in the model, and nothing else.

    Args:
        model: read, with its forward pass installed; it is changed.
        new: names of its parameters that were not read.
        lora: their shape.
        seed: of their first weights.

    Returns:
        PEFT's model around it.

    Raises:
        ValueError: when `targets` names no module, or new weights are in no module of their own.
    """
    peft = _peft()
    whole = _whole_modules(model, new)
    targets: str | list[str] = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha if lora.alpha is not None else 2 * lora.rank,
        lora_dropout=lora.dropout,
        target_modules=targets,
        modules_to_save=whole or None,
    )
    set_seed(seed)
    try:
        with _quiet():
            adapted = peft.get_peft_model(model, config, adapter_name=_NAME)
    except ValueError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"model.lora.targets: {targets}: {reason}") from error
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    wholly = {_whole_name(name, whole) for name in new}
    if left := sorted(wholly - trained):
        raise ValueError(f"model.lora: the new weights `{left[0]}` would not be trained; leave model.lora out")
    return adapted


def _whole_modules(model: nn.Module, new: Collection[str]) -> list[str]:
    """The largest modules that hold nothing but new weights."""
    known = {name for name, _ in model.named_parameters()}
    fresh = set(new) & known
    found: set[str] = set()
    for name in fresh:
        path = name.split(".")
        for length in range(1, len(path)):
            prefix = ".".join(path[:length])
            if all(other in fresh for other in known if other.startswith(f"{prefix}.")):
                found.add(prefix)
                break
        else:
            raise ValueError(
                f"model.lora: the new weight `{name}` is in no module of its own, so that it cannot be trained beside "
                "adapters; leave model.lora out"
            )
    return sorted(found)


def _whole_name(name: str, modules: Collection[str]) -> str:
    """What PEFT calls a parameter of a module that is trained in full."""
    module = next(one for one in modules if name.startswith(f"{one}."))
    return f"base_model.model.{module}.modules_to_save.{_NAME}{name.removeprefix(module)}"


def digest_of(source: str, model: Any) -> str:
    """Which weights the adapters are of: a hash of the files of a directory, or the commit of a Hub's model."""
    path = Path(source)
    if path.is_dir():
        return ",".join(sha256_file(file) for file in sorted(path.glob("*.safetensors")))
    return str(getattr(model.config, "_commit_hash", None))


class AdapterStore:
    """The trainer's model store: every checkpoint holds adapters as PEFT reads them, and the tokenizer.

    Attributes:
        source: what the pretrained weights were read from; PEFT's configuration names it.
        head: the Auto class of the model.
        tokenizer_directory: its files are copied beside the adapters.
    """

    def __init__(self, source: str, head: str, tokenizer_directory: Path) -> None:
        self.source, self.head, self.tokenizer_directory = source, head, tokenizer_directory

    def write(self, model: Any, weights: Mapping[str, Tensor], directory: Path) -> dict[str, str]:
        """Write the adapters' directory; weights that are not trained are left out."""
        made = ((stored, _bytes(weights[name])) for stored, name in sorted(_stored_names(model).items()))
        return {
            WEIGHTS: write_safetensors(directory / WEIGHTS, made, {"format": "pt"}),
            CONFIG: write_json(directory / CONFIG, self._config(model)),
            **copy_tokenizer(self.tokenizer_directory, directory),
        }

    def together(self, model: Any, names: Collection[str]) -> Sequence[Sequence[str]]:
        """All of them: adapters are small, so that one process writes them."""
        return [sorted(names)]

    def write_share(
        self,
        model: Any,
        weights: Mapping[str, Tensor],
        directory: Path,
        shares: Sequence[Collection[str]],
        number: int,
    ) -> dict[str, str]:
        """The one process that has all of them writes them."""
        return self.write(model, weights, directory) if shares[number] else {}

    def read(self, model: Any, directory: Path) -> Mapping[str, Tensor]:
        """The weights by the model's own names: adapters as they are stored, all others as they are.

        Raises:
            ArtifactError: when an adapter is missing or left over.
        """
        homes = _stored_names(model)
        with safe_open(directory / WEIGHTS, framework="pt") as opened:
            stored = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
        if different := sorted(set(stored) ^ set(homes)):
            raise ArtifactError(f"the adapters in `{directory}` are of another shape: `{different[0]}` differs")
        return _Weights({homes[name]: tensor for name, tensor in stored.items()}, model)

    def _config(self, model: Any) -> dict[str, Any]:
        """PEFT's configuration as it reads it; sets as sorted lists."""
        known = model.peft_config[_NAME]
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in known.to_dict().items()}
        kind = _KINDS.get(self.head)
        # PEFT's classes of other tasks take the head for a copy that is trained, as it is where it is new.
        named = kind if kind in _OF_OUTPUTS or known.modules_to_save else None
        plain |= {"base_model_name_or_path": self.source, "task_type": named, "inference_mode": True}
        ready: dict[str, Any] = json.loads(json.dumps(plain, default=str))
        return ready


def _bytes(tensor: Tensor) -> LateBytes:
    return late_bytes(tensor, lambda: tensor)


def _stored_names(model: Any) -> dict[str, str]:
    """By the name under which PEFT stores a tensor, its name in the model."""
    trained = {name: torch.empty(0) for name, one in model.named_parameters() if one.requires_grad}
    homes = {id(tensor): name for name, tensor in trained.items()}
    save_and_load: Any = importlib.import_module("peft.utils.save_and_load")
    stored = save_and_load.get_peft_model_state_dict(
        model, state_dict=dict(trained), adapter_name=_NAME, save_embedding_layers=False
    )
    found = {str(name): homes[id(tensor)] for name, tensor in stored.items()}
    assert set(found.values()) == set(trained), "PEFT leaves out what is trained"
    return found


class _Weights(Mapping[str, Tensor]):
    """Stored tensors, and the model's own for all others."""

    def __init__(self, stored: Mapping[str, Tensor], model: nn.Module) -> None:
        own: Iterable[tuple[str, Tensor]] = model.named_parameters()
        self._tensors = {name: parameter.detach() for name, parameter in own} | dict(stored)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def read_adapted(
    chosen: TunedModel,
    directory: Path,
    task: Task,
    seed: int,
    device: torch.device,
    *,
    trust_remote_code: bool = False,
) -> Any:
    """The pretrained model with the adapters of a directory of our own, as PEFT reads them, in evaluation mode."""
    model, _ = read_model(chosen, task, seed, trust_remote_code=trust_remote_code)
    install(model, task)
    if not (directory / WEIGHTS).is_file():  # PEFT would look for a pickle then
        raise ArtifactError(f"`{directory}` lacks {WEIGHTS}")
    with _quiet():
        adapted = _peft().PeftModel.from_pretrained(model, str(directory), torch_device="cpu")
    return adapted.eval().to(device)


def write_merged(
    chosen: TunedModel, checkpoint: Path, directory: Path, task: Task, seed: int, *, trust_remote_code: bool = False
) -> None:
    """Write the model with its adapters merged in, as plain transformers reads it, and the adapters in a folder of it.

    Args:
        chosen: the `model` section.
        checkpoint: the adapters' directory.
        directory: an existing, empty directory.
        task: whose head the model has.
        seed: of the run.
        trust_remote_code: run the code that the directory carries.
    """
    adapted = read_adapted(chosen, checkpoint, task, seed, torch.device("cpu"), trust_remote_code=trust_remote_code)
    write_model(adapted.merge_and_unload(), directory, tokenizer_directory=checkpoint)
    (directory / FOLDER).mkdir()
    for file in sorted(checkpoint.iterdir()):
        (directory / FOLDER / file.name).write_bytes(file.read_bytes())
    if chosen.from_ is not None and Path(chosen.from_).is_dir():  # a path of this machine is nobody else's base
        known = json.loads((directory / FOLDER / CONFIG).read_text(encoding="utf-8"))
        write_json(directory / FOLDER / CONFIG, known | {"base_model_name_or_path": None})
