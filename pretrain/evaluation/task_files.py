"""Files of lm-eval tasks that lie here: what they say, and whether they would run code.

What lives here: YAML of tasks as plain data, its includes, the members of a group. What must not: running a task
(`evaluation.harness`).

lm-eval's own loader imports whatever a `!function` names and whatever Python file lies beside the YAML. Here a file
is data; functions are looked up when the caller trusts them, and else refused.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pretrain.files import ArtifactError

_FUNCTION = "!function"
_PLAIN = "tag:yaml.org,2002:"
_NOT_OF_A_TASK = ("group", "tag", "task_list")
_TRUST = "read it, then allow it with `pretrain evaluate --trust-remote-code`"


def is_task_file(name: str) -> bool:
    """Whether a name is a place of files here rather than a task that lm-eval brings."""
    return Path(name).suffix in (".yaml", ".yml") or Path(name).is_dir() or name.startswith(("/", "./", "../", "~"))


def read_tasks(name: str, *, trust_code: bool) -> list[dict[str, Any]]:
    """The tasks of a YAML file (a group: with its members), or all single tasks of a folder.

    Data files are looked for from the working directory, as lm-eval does, and beside the YAML file.

    Args:
        name: the file or folder.
        trust_code: whether its `!function` entries, and other switches of code, may act.

    Raises:
        ValueError: when it is not there, is no task, or would run code that is not trusted; names the remedy.
    """
    place = Path(name).expanduser()
    if place.is_dir():
        found = [_read(_only(files, task), trust_code) for task, files in _named(place).items()]
        tasks = [_task_alone(task) for task in found if isinstance(task.get("task"), str)]
        if not tasks:
            raise ArtifactError(f"--tasks {name}: no .yaml file in that folder has a `task`")
        return tasks
    if not place.is_file():
        raise ArtifactError(f"--tasks {name}: there is no such file; give a YAML file, a folder, or a name of lm-eval")
    return [_with_members(_read(place, trust_code), place, trust_code)]


def _named(folder: Path) -> dict[str, list[Path]]:
    """The files of tasks and groups in a folder by name; those without a name are there to be included."""
    found: dict[str, list[Path]] = {}
    for file in sorted([*folder.rglob("*.yaml"), *folder.rglob("*.yml")]):
        try:
            content = yaml.load(file.read_text(encoding="utf-8"), Loader=_Names)
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            continue  # whoever names it is told
        name = content.get("group", content.get("task")) if isinstance(content, dict) else None
        if isinstance(name, str):
            found.setdefault(name, []).append(file)
    return found


class _Names(yaml.SafeLoader):
    """Takes every tag for nothing."""


_Names.add_constructor(None, lambda _loader, _node: None)


def _only(files: list[Path], name: str) -> Path:
    if len(files) > 1:
        raise ArtifactError(f"`{files[0]}` and `{files[1]}` are both called {name}; rename one of them")
    return files[0]


def _with_members(
    content: dict[str, Any], file: Path, trust_code: bool, outer: tuple[Path, ...] = ()
) -> dict[str, Any]:
    """A group with the tasks beside it in place of their names."""
    members = content.get("task")
    if isinstance(members, str):
        return _task_alone(content)
    if not isinstance(members, list):
        raise ArtifactError(f"`{file}` is no task: it has no `task`; give a YAML file that lm-eval takes")
    beside = _named(file.parent)
    resolved: list[Any] = []
    for member in members:
        name = member if isinstance(member, str) else member.get("task") if isinstance(member, dict) else None
        place = _only(beside[name], name) if isinstance(name, str) and name in beside else None
        if place is None or place.resolve() in outer:
            resolved.append(member)  # of lm-eval, or written out in the group
            continue
        known = _with_members(_read(place, trust_code), place, trust_code, (*outer, place.resolve()))
        resolved.append(known if isinstance(member, str) else known | member)
    return {**content, "task": resolved}


def _task_alone(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key not in _NOT_OF_A_TASK}


def _read(file: Path, trust_code: bool, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """One file with what it includes; its own keys win."""
    path = file.resolve()
    if path in seen:
        raise ArtifactError(f"`{file}` includes itself; break the circle")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_loader(path, trust_code))
    except FileNotFoundError as error:
        raise ArtifactError(f"`{seen[-1]}` includes `{file}`, which is not there") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ArtifactError(f"`{file}` is not YAML: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"`{file}` is no task: it does not hold named entries")
    merged: dict[str, Any] = {}
    includes = content.pop("include", None) or []
    for name in includes if isinstance(includes, list) else [includes]:
        merged |= _read(path.parent / str(name), trust_code, (*seen, path))
    merged |= content
    _refuse_switches(merged, file, trust_code)
    _find_data_files(merged, path.parent)
    return merged


def _loader(path: Path, trust_code: bool) -> Any:
    """YAML's safe loader, and `!function`."""

    class Loader(yaml.SafeLoader):
        pass

    def function(_: Any, node: Any) -> Any:
        if not trust_code:
            raise ArtifactError(
                f"`{path}`, line {node.start_mark.line + 1}: !function {node.value} runs Python code; {_TRUST}"
            )
        return _find_function(str(node.value), path)

    def unknown(_: Any, node: Any) -> Any:
        raise ArtifactError(f"`{path}`, line {node.start_mark.line + 1}: {node.tag} is not plain YAML; remove it")

    Loader.add_constructor(_FUNCTION, function)
    Loader.add_constructor(None, unknown)
    return Loader


def _find_function(name: str, path: Path) -> Any:
    """`module.function`, of a Python file beside the YAML file or of an installed module."""
    module_name, _, function = name.rpartition(".")
    file = path.parent / f"{module_name.replace('.', '/')}.py"
    try:
        if file.is_file():
            spec = importlib.util.spec_from_file_location(f"task_code_{abs(hash(file))}", file)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(module_name)
        return getattr(module, function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ArtifactError(f"`{path}`: !function {name} is not to be found ({error})") from error


def _refuse_switches(content: Mapping[str, Any], file: Path, trust_code: bool) -> None:
    """Entries by which a task asks for code without a `!function`."""
    if trust_code:
        return
    of_data = content.get("dataset_kwargs")
    if isinstance(of_data, dict) and of_data.get("trust_remote_code"):
        raise ArtifactError(f"`{file}`: dataset_kwargs.trust_remote_code asks to run the data set's code; remove it")
    if content.get("unsafe_code"):
        raise ArtifactError(f"`{file}`: unsafe_code says that answers of the model are run as code; {_TRUST}")
    for metric in content.get("metric_list") or ():
        if isinstance(metric, dict) and metric.get("hf_evaluate"):
            raise ArtifactError(f"`{file}`: metric {metric.get('metric')} is Python code from the Hub; {_TRUST}")
    if ".yaml" in str(content.get("use_prompt")) or str(content.get("use_prompt")).startswith("promptsource"):
        raise ArtifactError(f"`{file}`: use_prompt reads a file that may hold code; write the prompt in doc_to_text")


def _find_data_files(content: dict[str, Any], folder: Path) -> None:
    """Relative `data_files` that are not in the working directory are taken from beside the YAML file."""
    of_data = content.get("dataset_kwargs")
    if not isinstance(of_data, dict) or "data_files" not in of_data:
        return

    def found(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: found(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [found(inner) for inner in value]
        beside = folder / str(value)
        return str(beside) if not Path(str(value)).exists() and beside.exists() else value

    content["dataset_kwargs"] = {**of_data, "data_files": found(of_data["data_files"])}
