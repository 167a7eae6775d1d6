"""Tasks of lm-eval on a model that is in memory: the one door to that library.

What lives here: finding tasks, the model as lm-eval wants it, results as plain numbers. What must not: reading task
files (`evaluation.task_files`), or loading models.

lm-eval runs code of others in four ways, and all are closed unless the caller trusts it: `!function` entries (closed
in `task_files`; those of its own tasks are installed code), metrics that the `evaluate` library fetches as Python
files, Jinja templates outside a sandbox, and answers of the model that a task runs.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pretrain.evaluation.loading import LoadedModel
from pretrain.evaluation.passes import Passes, bare
from pretrain.evaluation.task_files import is_task_file, read_tasks
from pretrain.evaluation.text import prefix_id
from pretrain.files import ArtifactError

_FEWSHOT_SEED = 1234  # lm-eval's own
_DRAWS = 1_000


@dataclass(frozen=True)
class Tasks:
    """Tasks of lm-eval with their data, ready to run: as its `TaskManager.load` gives them.

    `fewshot` holds the number of examples before a question that each task says itself, if any.
    """

    loaded: Mapping[str, Any]
    fewshot: Mapping[str, int | None]
    trust_code: bool

    @property
    def names(self) -> list[str]:
        """Of the single tasks."""
        return list(self.loaded["tasks"])


def load_tasks(names: Sequence[str], *, trust_code: bool = False) -> Tasks:
    """Find tasks and load their data.

    Args:
        names: tasks, groups or tags that lm-eval brings (patterns too), YAML files, folders of these.
        trust_code: whether code may run that comes with a task.

    Raises:
        ValueError: when lm-eval is missing, a task is unknown, its data cannot be had, or it would run code that is
            not trusted; names the remedy.
    """
    library = _library()
    wanted: list[Any] = []
    for name in names:
        wanted += read_tasks(name, trust_code=trust_code) if is_task_file(name) else [name]
    manager = library.manager(include_defaults=any(_is_of_library(entry) for entry in wanted))
    wanted = [found for entry in wanted for found in (_matching(entry, manager) if isinstance(entry, str) else [entry])]
    with _held(trust_code) as refused:
        try:
            loaded = manager.load([_built(entry, manager, library) for entry in wanted])
        except library.failures as error:
            raise _explained(", ".join(names), refused, error) from error
    if refused:
        raise _explained(", ".join(names), refused, None)
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) and not trust_code:
            raise ArtifactError(
                f"--tasks {name}: it runs the model's answers as code; allow that with `pretrain evaluate "
                "--trust-remote-code`, on a machine that may be lost"
            )
    fewshot = {name: task.get_config("num_fewshot") for name, task in loaded["tasks"].items()}
    return Tasks(loaded, fewshot, trust_code)


def run_tasks(
    model: LoadedModel,
    tasks: Tasks,
    passes: Passes,
    *,
    window: int,
    num_fewshot: int | None = None,
    limit: int | None = None,
    standard_errors: bool = True,
) -> dict[str, dict[str, Any]]:
    """The scores of a decoder, by task (and group) and metric, as lm-eval computes them.

    A text that is scored whole is led by BOS once, whether the tokenizer adds it or not; a question with answers
    begins as the tokenizer begins a text, which is lm-eval's way.

    Args:
        model: a decoder.
        tasks: of `load_tasks`.
        passes: how forward passes are run; `progress` is told after each. Every process of `ranks` runs all of it.
        window: positions of a forward pass.
        num_fewshot: examples before each question; None: as the task says. A task that fixes 0 keeps 0.
        limit: at most so many examples of each task.
        standard_errors: give `METRIC_stderr` too, for some metrics from 1,000 draws of the examples.

    Returns:
        For each task its metrics (and `..._stderr` where lm-eval gives one), `examples`, `num_fewshot`, `version`.

    Raises:
        ValueError: for a model that is no decoder, or when a task fails on its data.
    """
    if model.kind != "causal":
        raise ValueError(f"tasks of lm-eval are for decoders, which `{model.source}` is not; leave --tasks out")
    library = _library()
    for name, task in tasks.loaded["tasks"].items():
        default = tasks.fewshot[name]
        asked = num_fewshot if num_fewshot is not None and default != 0 else default or 0
        task.set_config(key="num_fewshot", value=asked)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    scored = library.model(model, passes, window)
    with _held(tasks.trust_code) as refused, passes.of(model.model):
        try:
            found = library.evaluate(
                lm=scored,
                task_dict=dict(tasks.loaded),
                limit=limit,
                bootstrap_iters=_DRAWS if standard_errors else 0,
                log_samples=False,
                confirm_run_unsafe_code=tasks.trust_code,
            )
        except library.failures as error:
            raise _explained(", ".join(tasks.names), refused, error) from error
    return {name: _plain(name, found) for name in found["results"]}


def _plain(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers by metric: lm-eval writes `metric,filter`, where the filter is mostly none."""
    scores: dict[str, Any] = {}
    for key, value in found["results"][name].items():
        metric, _, kind = key.partition(",")
        if isinstance(value, (int, float)) and kind:
            scores[metric if kind == "none" else f"{metric} ({kind})"] = float(value)
    counts = found.get("n-samples", {}).get(name, {})
    if isinstance(counts, Mapping) and "effective" in counts:
        scores["examples"] = counts["effective"]
    for key, theirs in (("num_fewshot", "n-shot"), ("version", "versions")):
        if isinstance(value := found.get(theirs, {}).get(name), (int, float)):
            scores[key] = value
    return scores


# --- lm-eval --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Library:
    """What is used of lm-eval; `failures` are the errors of tasks and their data."""

    manager: Any
    group: Any
    group_config: Any
    evaluate: Any
    model: Any
    failures: tuple[type[Exception], ...]


def _library() -> _Library:
    try:
        import lm_eval
        import lm_eval.api.task as of_tasks
        from jinja2 import TemplateError
        from lm_eval.api.group import Group
        from lm_eval.config.group import GroupConfig
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(
            f"--tasks needs lm-eval, which is not installed ({error}); pip install 'pretrain[eval]'"
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    of_data: type[Exception] = of_tasks.datasets.exceptions.DatasetsError

    class Model(HFLM):  # type: ignore[misc]
        """lm-eval's model of transformers around one that is loaded, without bars of its own."""

        def __init__(self, model: LoadedModel, passes: Passes, window: int) -> None:
            super().__init__(
                pretrained=_Called(model, passes),
                tokenizer=copy.deepcopy(model.tokenizer),  # a padding token may be added to it
                backend="causal",
                max_length=window,
                batch_size=max(1, passes.batch_tokens // window),
                prefix_token_id=prefix_id(model.tokenizer),
                mixed_precision_dtype=passes.autocast,
            )

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, override_bs: Any = None) -> Any:
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            """A window's first token comes after BOS already, so the tokenizer must not add one."""
            added: Any = self.add_bos_token
            self.add_bos_token: Any = False
            try:
                return super().loglikelihood_rolling(requests, disable_tqdm=True)
            finally:
                self.add_bos_token = added

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().generate_until(requests, disable_tqdm=True)

    failures = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, TemplateError)
    return _Library(TaskManager, Group, GroupConfig, lm_eval.evaluate, Model, (*failures, of_data))


class _Called(nn.Module):
    """A model as lm-eval calls it. Whoever waits for a forward pass is told of each."""

    def __init__(self, model: LoadedModel, passes: Passes) -> None:
        super().__init__()
        self._called = [model.model]  # in a list: no submodule, whose mode and ties lm-eval would set
        self._passes = passes
        self._done = 0
        self.config = bare(model.model).config
        self.device = passes.device

    def forward(self, input_ids: torch.Tensor) -> Any:
        with torch.compiler.set_stance("force_eager"):
            output = self._called[0](input_ids=input_ids)
        self._tell(len(input_ids))
        return output

    def generate(self, *given: Any, **options: Any) -> Any:
        model: Any = bare(self._called[0])
        made = model.generate(*given, **options)
        self._tell(len(made))
        return made

    def tie_weights(self) -> None:
        """They are tied already."""

    def _tell(self, rows: int) -> None:
        self._done += rows
        if self._passes.progress is not None:
            self._passes.progress("tasks", self._done, self._done)


@contextmanager
def _held(trust_code: bool) -> Iterator[list[str]]:
    """Keep metrics of the `evaluate` library and free templates away; yields the names of what was asked for.

    Progress bars of lm-eval and of its data are kept away, too.
    """
    import evaluate
    import lm_eval.api.task as of_tasks
    import lm_eval.utils
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    refused: list[str] = []
    silent = functools.partial(of_tasks.tqdm, disable=True)
    bars = of_tasks.datasets
    were_shown = bars.is_progress_bar_enabled()

    def load(name: str, *_: Any, **__: Any) -> Any:
        refused.append(name)
        raise ValueError(f"metric {name} is Python code from elsewhere")

    free = lm_eval.utils.env
    sandbox = ImmutableSandboxedEnvironment(undefined=free.undefined, keep_trailing_newline=True)
    sandbox.filters.update(free.filters)
    with ExitStack() as held:
        held.enter_context(_replaced(of_tasks, "tqdm", silent))
        bars.disable_progress_bars()
        if were_shown:
            held.callback(bars.enable_progress_bars)
        if not trust_code:
            held.enter_context(_replaced(evaluate, "load", load))
            held.enter_context(_replaced(lm_eval.utils, "env", sandbox))
        yield refused


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    own = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, own)


def _matching(name: str, manager: Any) -> list[str]:
    found: list[str] = manager.match_tasks([name])
    if found:
        return found
    near = difflib.get_close_matches(name, manager.all_tasks, n=3)
    hint = f"did you mean {' or '.join(near)}? Else" if near else "`lm_eval ls tasks` lists them;"
    raise ArtifactError(f"--tasks {name}: lm-eval has no such task; {hint} give a task of your own by its YAML file")


def _is_of_library(entry: Any) -> bool:
    """Whether it is, or names, a task that lm-eval brings."""
    if isinstance(entry, str):
        return True
    members = entry.get("task")
    return isinstance(members, list) and any(_is_of_library(member) for member in members)


def _built(entry: Any, manager: Any, library: _Library) -> Any:
    """What `TaskManager.load` takes for a name, a task or a group; of a group that is no file it makes nothing."""
    if isinstance(entry, str) or not isinstance(entry.get("task"), list):
        return entry
    fields = {field.name for field in dataclasses.fields(library.group_config)}
    group = library.group.from_config(library.group_config(**{key: entry[key] for key in entry if key in fields}))
    shared = {key: value for key, value in entry.items() if key not in {*fields, "tag", "task_list"}}
    for member in entry["task"]:
        if shared and isinstance(member, str):
            raise ValueError(f"group {entry['group']} changes {', '.join(shared)} of {member}, which lies elsewhere")
        one = _built(member if isinstance(member, str) else shared | member, manager, library)
        if isinstance(one, library.group):
            group.add(one)
            continue
        found = manager.load([one])
        whole = found.get("groups", {}).get(one) if isinstance(one, str) else None
        for made in found["tasks"].values() if whole is None else [whole]:
            group.add(made)
    return group


def _explained(names: str, refused: Sequence[str], error: Exception | None) -> ValueError:
    """What went wrong in lm-eval, in words that name the remedy."""
    if refused:
        return ArtifactError(
            f"--tasks {names}: metric {', '.join(sorted(set(refused)))} is no metric of lm-eval, and would be fetched "
            "as Python code; name one of lm-eval, or allow it with `pretrain evaluate --trust-remote-code`"
        )
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    if type(error).__name__ == "SecurityError":
        remedy = (
            "a template of it reaches for Python's insides; mend it, or allow it with `pretrain evaluate "
            "--trust-remote-code`"
        )
    elif isinstance(error, OSError) or "offline" in reason.lower() or "connect" in reason.lower():
        remedy = (
            "its data cannot be had from here; name local files (dataset_path: json, dataset_kwargs: {data_files: "
            "...}), or go where the Hub can be reached (see HF_HUB_OFFLINE, HF_DATASETS_OFFLINE)"
        )
    else:
        remedy = "check its YAML file against its data"
    return ArtifactError(f"--tasks {names}: {remedy} ({reason})")
