"""Every call in the package that takes bytes or names from outside and could make more of them than data.

A new one fails until it stands here, and so until somebody has thought about it. `json`, `orjson`, `safetensors` and
numpy's raw buffers give data alone, whatever the bytes are; they are free.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pretrain import config_text
from tests.security.hostile import ROOT

PACKAGE = ROOT / "pretrain"

# Never, in no file: they run what they read, or write where it says.
NEVER = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "dill.loads", "joblib.load", "marshal.loads"),
    *("cloudpickle.load", "cloudpickle.loads", "shelve.open", "torch.load", "torch.jit.load", "torch.hub.load"),
    *("pandas.read_pickle", "pd.read_pickle", "eval", "exec", "__import__", "runpy.run_path", "runpy.run_module"),
    *("os.system", "os.popen", "yaml.unsafe_load", "yaml.full_load", "shutil.unpack_archive", "pa.deserialize"),
    *("get_class_from_dynamic_module", "torch.package.PackageImporter", "torch.export.load", "np.memmap.load"),
}
NEVER_ENDS = (".extractall", ".extract", ".read_pickle", ".load_state", ".load_extension")
# Only in the files named here. `guarded`: after `pretrain.trust` has read the small files of the directory.
LISTED: dict[str, dict[str, str]] = {
    "from_pretrained": {
        "evaluation/loading.py": "guarded",
        "model_reading.py": "guarded",
        "tokenizer.py": "guarded",
        "tasks/heads.py": "guarded",
        "tasks/adapters.py": "PEFT, from a directory of our own, safetensors alone",
        "building.py": "guarded: the size of a vocabulary",
        "evaluation/samples.py": "the run's own tokenizer",
        "train.py": "the run's own tokenizer",
    },
    "cached_file": {"trust.py": "the guard's own: JSON alone"},
    "load_dataset": {
        "data/reading/documents.py": "datasets runs no script; names on the Hub alone",
    },
    "import_path": {
        "data/objectives/registry.py": "the user's own function, by objective.kind",
        "data/keeping/filters.py": "the user's own function, by a filter's parameter",
        "train.py": "the user's own function, by evaluate.evaluators",
    },
    "import_module": {
        "plugins.py": "the one place that imports by a name from a config",
        "__init__.py": "our own surface",
        "tasks/__init__.py": "our own tasks, by a fixed list",
        "tasks/metrics.py": "libraries of scores, by fixed names",
        "tasks/embeddings.py": "sentence-transformers' parts, by fixed names",
        "evaluation/vectors.py": "libraries of statistics, by fixed names",
        "evaluation/task_files.py": "the function of a task file, with --trust-remote-code alone",
    },
    "exec_module": {"evaluation/task_files.py": "the function of a task file, with --trust-remote-code alone"},
    "url_to_fs": {"data/reading/remote.py": "bytes", "stores.py": "bytes"},
    "urlopen": {"data/reading/remote.py": "bytes"},
    "ParquetFile": {"data/reading/documents.py": "columns of text or ids", "tasks/rows.py": "plain values"},
    "np.load": {"data/packing.py": "arrays without objects", "data/preparing/unfinished.py": "arrays without objects"},
    "np.memmap": {
        "data/reading/token_files.py": "ids",
        "data/shards.py": "ids",
        "data/preparing/unfinished.py": "counters",
    },
    "yaml.load": {
        "config_text.py": "plain data: a SafeLoader",
        "evaluation/task_files.py": "plain data: SafeLoaders; `!function` with --trust-remote-code alone",
    },
    "Popen": {
        "launching/processes.py": "our own command, without a shell",
        "publishing/background.py": "our own command, without a shell",
    },
    "subprocess.run": {
        "data/preparing/executors.py": "squeue, without a shell",
        "publishing/record.py": "git, without a shell",
    },
}


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """File, dotted name and node of every call in the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if "_recipes" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
                yield path.relative_to(PACKAGE).as_posix(), ast.unparse(node.func), node


CALLS = list(calls())


def constant(call: ast.Call, name: str) -> object:
    """The value of a keyword that stands in the call as it is; `...` for one that is computed, or not there."""
    found = [word.value for word in call.keywords if word.arg == name]
    return found[0].value if found and isinstance(found[0], ast.Constant) else ...


def test_nothing_that_runs_what_it_reads_is_called() -> None:
    assert not [f"{file}: {name}" for file, name, _ in CALLS if name in NEVER or name.endswith(NEVER_ENDS)]


@pytest.mark.parametrize("what", sorted(LISTED))
def test_every_load_path_is_known(what: str) -> None:
    """The places of a call, exactly: a new one is classified, one that is gone is taken out."""
    found = {
        file
        for file, name, call in CALLS
        if (name == what or name.endswith(f".{what}"))
        and not (what == "import_module" and isinstance(call.args[0], ast.Constant))  # a library by its fixed name
    }
    assert found == set(LISTED[what]), f"`{what}`: say here what it reads, and why that is safe"


def test_whoever_loads_from_a_directory_says_whether_its_code_runs() -> None:
    """Unsaid, transformers asks on the terminal, and `y` runs it."""
    for file, name, call in CALLS:
        of_auto_class = "auto" in name.lower() and name.endswith(".from_config")
        if of_auto_class or (name.endswith(".from_pretrained") and "PeftModel" not in name):
            assert any(word.arg == "trust_remote_code" for word in call.keywords), f"{file}: {ast.unparse(call)}"


def test_weights_come_from_safetensors_and_arrays_without_objects() -> None:
    for file, name, call in CALLS:
        if name.endswith((".from_pretrained",)) and any(word.arg == "dtype" for word in call.keywords):
            assert constant(call, "use_safetensors") is True, f"{file}: {ast.unparse(call)}"
        if name in ("np.load", "numpy.load", "np.save", "numpy.save"):
            assert constant(call, "allow_pickle") is False, f"{file}: {ast.unparse(call)}"


def test_no_shell() -> None:
    for file, name, call in CALLS:
        if name.startswith("subprocess."):
            assert constant(call, "shell") in (..., False), f"{file}: {name}"
            assert call.args, name
            assert not isinstance(call.args[0], ast.Constant | ast.JoinedStr), f"{file}: a line for a shell"


def test_yaml_is_plain_data() -> None:
    assert issubclass(config_text._Loader, yaml.SafeLoader)
    assert not any("python" in str(tag) for tag in config_text._Loader.yaml_constructors)


def test_the_list_is_of_files_that_are_there() -> None:
    for files in LISTED.values():
        assert all(Path(PACKAGE / file).is_file() for file in files)
