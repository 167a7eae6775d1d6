"""Hugging Face model directories: the one place that writes, reads and compares them.

What lives here: a model in its published form (the stock architecture's names and config), its tokenizer beside it,
digests of the memory that was written, released models read as Loom models. What must not: training state, or any
choice of hyper-parameters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
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
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from pretrain.evaluation.loading import check_source, loading
from pretrain.files import ArtifactError, LateBytes, write_bytes, write_json, write_safetensors
from pretrain.interop import (
    HOMES,
    Rule,
    config_json,
    from_stock,
    from_stock_config,
    rules_from_stock,
)
from pretrain.interop.published import code_files, joined_names, published_rules
from pretrain.models import (
    LoomConfig,
    LoomPreTrainedModel,
    join_parts,
    model_class,
    model_from_config,
)
from pretrain.training.state import late_bytes

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions by the names that users give them, of stored weights and of arithmetic."""

_OWN_CODE = "it carries code of its own, which is not run here; give a model of a stock architecture"
_INDEX = "model.safetensors.index.json"
_LOOM_SPARE = (r"^pooler\.", r"^seq_relationship\.")  # what stands beside a language-model head for pairs of sentences
_SENTENCE_HEAD = r"(^|\.)(pooler|seq_relationship|sop_classifier)\."
_OF_TRAINING = (r"^generator\.", r"^embedding_delta\.")  # what a checkpoint holds beside a detector of replaced tokens
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)


def _own_state(model: PreTrainedModel, weights: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
    """Whole tensors by the model's own names, tied ones once.

    The model is asked for its state only without `weights`: a sharded one changes its parameters when it is asked,
    which must not happen in the middle of a step.
    """
    if weights:
        return weights
    return {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}


def _published(rule: Rule, state: Mapping[str, Tensor], dtype: torch.dtype | None) -> tuple[Tensor, LateBytes]:
    """A published tensor that is made when it is written: its like without data, and its bytes."""

    def make(tensors: list[Tensor]) -> Tensor:
        joined = rule.join(tensors)
        return joined.to(dtype) if dtype is not None and joined.is_floating_point() else joined

    like = make([torch.empty_like(state[name], device="meta") for name in rule.loom])
    return like, late_bytes(like, lambda: make([state[name] for name in rule.loom]))


def write_model(
    model: PreTrainedModel,
    directory: Path,
    *,
    weights: Mapping[str, Tensor] | None = None,
    tokenizer_directory: Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    code: bool = False,
) -> dict[str, str]:
    """Write a complete Hugging Face directory: config, generation config, weights, tokenizer, and code if asked for.

    Args:
        model: ours or stock.
        directory: an existing, empty directory.
        weights: all of the model's tensors, whole, by its own names; None takes them from the model.
        tokenizer_directory: its files are copied beside the weights.
        dtype: floating-point tensors are cast to this; None keeps them.
        max_shard_bytes: a larger model is split over several files with an index.
        code: write our model in its own form with its code, whatever stock architecture would hold it.

    Returns:
        SHA-256 of every file, of the memory that was written.
    """
    state = _own_state(model, weights)
    stock_config, rules = published_rules(model, state, code=code)
    published = {rule.stock: _published(rule, state, dtype) for rule in rules}
    stock_config.dtype = next(like.dtype for like, _ in published.values() if like.is_floating_point())
    digests = _write_configs(model, stock_config, directory)
    shards: list[list[str]] = [[]]
    used = 0
    for name, (_, tensor) in published.items():
        if shards[-1] and used + tensor.nbytes > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += tensor.nbytes
    for number, names in enumerate(shards):
        tensors = ((name, published[name][1]) for name in names)
        digests |= _write_shard(directory, number, len(shards), tensors)
    if len(shards) > 1:
        sizes = {name: tensor.nbytes for name, (_, tensor) in published.items()}
        digests |= _write_index(directory, shards, sizes)
    if tokenizer_directory is not None:
        digests |= copy_tokenizer(tokenizer_directory, directory)
    return digests


def write_model_share(
    model: PreTrainedModel,
    directory: Path,
    *,
    weights: Mapping[str, Tensor],
    shares: Sequence[Collection[str]],
    number: int,
    tokenizer_directory: Path | None = None,
    code: bool = False,
) -> dict[str, str]:
    """Write one of several shares of a model directory; the first one brings config, tokenizer and index too.

    Args:
        model: ours or stock.
        directory: an existing directory.
        weights: all of the model's tensors by its own names, whole; those of other shares may hold no data.
        shares: the names of each share; what `joined_names` gives together must be in one.
        number: of the own share, from 0.
        tokenizer_directory: its files are copied beside the weights.
        code: as of `write_model`.

    Returns:
        SHA-256 of every file that was written, of the memory that was written.
    """
    stock_config, rules = published_rules(model, weights, code=code)
    home = {name: place for place, names in enumerate(shares) for name in names}
    published = {rule.stock: _published(rule, weights, None) for rule in rules}
    parts: list[list[str]] = [[] for _ in shares]
    for rule in rules:
        (place,) = {home[name] for name in rule.loom} or {0}
        parts[place].append(rule.stock)
    own = ((name, published[name][1]) for name in parts[number])
    digests = _write_shard(directory, number, len(shares), own)
    if number == 0:
        stock_config.dtype = next(like.dtype for like, _ in published.values() if like.is_floating_point())
        digests |= _write_configs(model, stock_config, directory)
        digests |= _write_index(directory, parts, {name: tensor.nbytes for name, (_, tensor) in published.items()})
        if tokenizer_directory is not None:
            digests |= copy_tokenizer(tokenizer_directory, directory)
    return digests


def _write_configs(model: PreTrainedModel, stock_config: Any, directory: Path) -> dict[str, str]:
    digests = {"config.json": write_json(directory / "config.json", config_json(stock_config))}
    if isinstance(stock_config, LoomConfig):
        for file in code_files(stock_config):
            digests[file.name] = write_bytes(directory / file.name, file.read_bytes())
    if model.can_generate():
        generation = GenerationConfig.from_model_config(stock_config)
        digests["generation_config.json"] = write_json(
            directory / "generation_config.json", json.loads(generation.to_json_string())
        )
    return digests


def copy_tokenizer(source: Path, directory: Path) -> dict[str, str]:
    """Copy a tokenizer's files; return their SHA-256."""
    digests: dict[str, str] = {}
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            digests[name] = write_bytes(directory / name, (source / name).read_bytes())
    return digests


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _write_shard(directory: Path, number: int, count: int, tensors: Iterable[tuple[str, LateBytes]]) -> dict[str, str]:
    file = _shard_name(number, count)
    return {file: write_safetensors(directory / file, tensors, {"format": "pt"})}


def _write_index(directory: Path, shards: Sequence[Sequence[str]], sizes: Mapping[str, int]) -> dict[str, str]:
    weight_map = {name: _shard_name(number, len(shards)) for number, names in enumerate(shards) for name in names}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    return {_INDEX: write_json(directory / _INDEX, index)}


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


class PublishedStore:
    """The trainer's model store: every checkpoint holds the model as it is published, `code` in our own form."""

    def __init__(self, tokenizer_directory: Path | None = None, *, code: bool = False) -> None:
        self.tokenizer_directory, self.code = tokenizer_directory, code

    def write(self, model: PreTrainedModel, weights: Mapping[str, Tensor], directory: Path) -> dict[str, str]:
        """Write the model directory in full precision."""
        return write_model(
            model, directory, weights=weights, tokenizer_directory=self.tokenizer_directory, code=self.code
        )

    def together(self, model: PreTrainedModel, names: Iterable[str]) -> list[list[str]]:
        """The names of the model's tensors; those of one list are joined, so that one process must write them."""
        return joined_names(model, names, code=self.code)

    def write_share(
        self,
        model: PreTrainedModel,
        weights: Mapping[str, Tensor],
        directory: Path,
        shares: Sequence[Collection[str]],
        number: int,
    ) -> dict[str, str]:
        """Write one share of the model directory in full precision."""
        return write_model_share(
            model,
            directory,
            weights=weights,
            shares=shares,
            number=number,
            tokenizer_directory=self.tokenizer_directory,
            code=self.code,
        )

    def read(self, model: PreTrainedModel, directory: Path) -> Mapping[str, Tensor]:
        """The weights by the model's own names, tied ones once, as they are stored; buffers go into the model.

        Bytes are read, and tensors split and transposed, when a weight is asked for.
        """
        state = read_state(directory)
        wanted = next(parameter.dtype for parameter in model.parameters())
        for name, tensor in state.items():
            if tensor.is_floating_point() and tensor.dtype != wanted:  # a silent cast would lose bits
                raise ArtifactError(
                    f"the saved `{name}` in `{directory}` is {tensor.dtype}, the run trains {wanted}; a checkpoint "
                    "holds the full precision: put the whole one back"
                )
        rules = [Rule(name, (name,)) for name in state]
        config = AutoConfig.from_pretrained(directory)
        if isinstance(model.config, LoomConfig) and not isinstance(config, LoomConfig):
            _, rules = rules_from_stock(config, state)
        weights = _StoredWeights(state, rules)
        for name, buffer in model.named_buffers():
            if name in weights:
                buffer.copy_(weights.pop(name))
        return weights


class _StoredWeights(Mapping[str, Tensor]):
    """Published tensors by the model's own names, each made when it is asked for."""

    def __init__(self, state: Mapping[str, Tensor], rules: Iterable[Rule]) -> None:
        self._state = state
        self._homes = {
            name: (rule, number) for rule in rules if not rule.summed for number, name in enumerate(rule.loom)
        }

    def __getitem__(self, name: str) -> Tensor:
        rule, number = self._homes[name]
        return rule.split(self._state[rule.stock])[number]

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)

    def pop(self, name: str) -> Tensor:
        """A tensor, left out from now on."""
        tensor = self[name]
        del self._homes[name]
        return tensor
