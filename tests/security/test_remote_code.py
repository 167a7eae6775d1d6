"""No code that comes with a model, a tokenizer or a data set runs unless `--trust-remote-code` is typed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers import PreTrainedTokenizerFast

from pretrain.config import RunConfig, config_from_dict
from pretrain.config_task import TuningConfig
from pretrain.evaluation.loading import load_model
from pretrain.export import export_model, import_model
from pretrain.files import ArtifactError
from pretrain.launch import train_command
from pretrain.model_reading import read_config, read_loom, read_stock
from pretrain.plugins import import_path
from pretrain.tokenizer import take_tokenizer
from pretrain.trust import check_model, check_tokenizer
from tests.security.conftest import run_config
from tests.security.hostile import ROOT, Marker, change

AUTO_MAP = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoModelForCausalLM": "evil.Model"}


def readers(directory: Path, out: Path) -> dict[str, Any]:
    """What each verb that takes a model reads it with."""
    (out / "tokenizer").mkdir(parents=True, exist_ok=True)
    return {
        "evaluate, generate, fill, attention": lambda: load_model(directory, device="cpu"),
        "run, model.from": lambda: read_loom(directory),
        "run, model.from, class: stock": lambda: read_stock(directory),
        "run, tokenizer.from": lambda: take_tokenizer(str(directory), out / "tokenizer", objective="causal"),
        "resume": lambda: read_config(directory),
        "export": lambda: export_model(directory, out / "export"),
        "import": lambda: import_model(directory, out / "import"),
    }


@pytest.fixture(autouse=True)
def _nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers asks `run the custom code? [y/N]` where nothing was said; a `y` there was never typed as a flag."""

    def ask(*_: object) -> str:
        raise AssertionError("a question on the terminal")

    monkeypatch.setattr("builtins.input", ask)


def plant(directory: Path, marker: Marker, **keys: Any) -> Path:
    """Let every name in the directory lead to a module that makes the marker."""
    (directory / "evil.py").write_text(marker.python)
    (directory / "custom_generate").mkdir()
    (directory / "custom_generate" / "generate.py").write_text(marker.python)
    change(directory, "config.json", model_type="evil", auto_map=AUTO_MAP, custom_pipelines={"x": {"impl": "evil.X"}})
    tokens = {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.Words", "evil.Words"]}}
    change(directory, "tokenizer_config.json", **tokens)
    return change(directory, "config.json", **keys)


def test_it_runs_when_the_flag_is_typed(model: Path, marker: Marker) -> None:
    """Or the tests below would prove nothing."""
    load_model(plant(model, marker), device="cpu", trust_remote_code=True)
    assert marker.made()


@pytest.mark.parametrize("known", [True, False], ids=["a known model_type", "its own model_type"])
def test_code_beside_a_model_is_not_run(known: bool, model: Path, tmp_path: Path, marker: Marker) -> None:
    plant(model, marker, **({"model_type": "gpt2"} if known else {}))
    for name, read in readers(model, tmp_path / "out").items():
        if known:
            read()  # the stock classes of that name are taken
        else:
            with pytest.raises(ValueError, match=r"code|Tokenizer"):
                read()
        assert not marker.made(), name


SWITCHES: list[tuple[str, dict[str, Any]]] = [
    ("config.json", {"trust_remote_code": True}),
    ("config.json", {"text_config": {"deeper": [{"trust_remote_code": True}]}}),
    ("config.json", {"_attn_implementation": "someone/kernel"}),
    ("config.json", {"attn_implementation": "kernels-community/flash-attn@v1:flash_attn"}),
    ("config.json", {"attn_implementation": {"": "sdpa", "text_config": "someone/kernel"}}),
    ("config.json", {"_attn_implementation_internal": "someone/kernel"}),
    ("config.json", {"attn_implementation": "flash_attention_2"}),
    ("config.json", {"experts_implementation": "someone/kernel"}),
    ("config.json", {"use_kernels": True, "kernel_config": {"RMSNorm": "someone/kernel:RMSNorm"}}),
    ("config.json", {"allow_all_kernels": True}),
    ("config.json", {"quantization_config": {"quant_method": "fp8"}}),
    ("config.json", {"text_config": {"quantization_config": {"quant_method": "quark"}}}),
    ("config.json", {"compression_config": {"format": "x"}}),
    ("generation_config.json", {"custom_generate": "someone/sampler"}),
    ("generation_config.json", {"trust_remote_code": True}),
    ("adapter_config.json", {"peft_type": "LORA", "megatron_core": "evil", "base_model_name_or_path": "someone/x"}),
]


@pytest.mark.parametrize(("file", "keys"), SWITCHES, ids=[json.dumps(keys)[:40] for _, keys in SWITCHES])
def test_words_that_switch_on_code_are_refused(file: str, keys: dict[str, Any], model: Path) -> None:
    change(model, file, **keys)
    for read in (read_config, load_model, check_model):
        with pytest.raises(ArtifactError, match=re.escape(file)):
            read(model)
    if file != "adapter_config.json":
        check_model(model, trust_remote_code=True)


def test_words_of_a_tokenizer_that_switch_on_code_are_refused(model: Path, tmp_path: Path) -> None:
    change(model, "tokenizer_config.json", trust_remote_code=True)
    with pytest.raises(ArtifactError, match=r"tokenizer_config\.json says `trust_remote_code"):
        load_model(model, device="cpu")
    with pytest.raises(ValueError, match=r"tokenizer\.from.*trust_remote_code"):
        take_tokenizer(str(model), tmp_path, objective="causal")
    check_tokenizer(model, trust_remote_code=True)


def test_names_of_what_is_installed_are_fine(model: Path) -> None:
    change(model, "config.json", attn_implementation="sdpa", _attn_implementation="eager", quantization_config=None)
    change(model, "config.json", trust_remote_code=False, transformers_weights="model.safetensors")
    load_model(model, device="cpu")


def test_a_taken_tokenizer_names_no_code(model: Path, tmp_path: Path) -> None:
    """Its code does not come along, so whoever loads the published model would be asked to run what is not there."""
    change(model, "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Words", None]})
    (tmp_path / "taken").mkdir()
    take_tokenizer(str(model), tmp_path / "taken", objective="causal")
    assert "auto_map" not in json.loads((tmp_path / "taken" / "tokenizer_config.json").read_text())


def test_templates_of_a_chat_are_rendered_in_a_sandbox(model: Path, marker: Marker) -> None:
    """Of transformers, whose renderer is the one that is used."""
    escape = "{{ cycler.__init__.__globals__.os.makedirs('" + str(marker.path) + "') }}"
    (model / "chat_template.jinja").write_text(escape)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model, trust_remote_code=False)
    with pytest.raises(jinja2.exceptions.SecurityError):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert not marker.made()


# --- run configurations ---------------------------------------------------------------------------------------------


def test_no_key_of_a_run_trusts_remote_code(tmp_path: Path) -> None:
    plain = run_config(tmp_path, "text.txt", ("jsonl",))
    for section in (None, "tokenizer", "data", "model", "train", "evaluate", "export"):
        changed = json.loads(json.dumps(plain))
        (changed if section is None else changed.setdefault(section, {}))["trust_remote_code"] = True
        with pytest.raises(ValueError, match="trust_remote_code"):
            config_from_dict(changed)
    assert "trust" not in json.dumps(RunConfig.model_json_schema())
    assert "trust" not in json.dumps(TuningConfig.model_json_schema())


def test_a_function_of_ones_own_is_found_after_what_is_installed(tmp_path: Path, monkeypatch) -> None:
    """A folder that a stranger packed cannot put its `wandb.py` in the place of the installed one."""
    (tmp_path / "mine.py").write_text("def score(): return 7\n")
    (tmp_path / "sacrebleu.py").write_text("raise SystemExit('shadowed')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert import_path("mine:score")() == 7
    assert sys.path[-1] == str(tmp_path)
    assert str(tmp_path) not in sys.path[:-1]
    assert train_command("run.yaml")[1] == "-Pm"


@pytest.mark.parametrize("path", ["os:system", "subprocess:run", "shutil:rmtree", "builtins:exec", "importlib.abc:x"])
def test_no_function_of_python_itself_is_called(path: str) -> None:
    with pytest.raises(ValueError, match="is a module of Python"):
        import_path(path)


# --- the command line -----------------------------------------------------------------------------------------------

# What transformers asks of the library on import, and what would fetch code.
KERNELS = """
import os
import sys
import types

class Anything:
    def __init__(self, *a, **k): pass
    def __call__(self, *a, **k): return a[0] if a else self
    def __getattr__(self, name): return Anything()

def get_kernel(*a, **k):
    os.makedirs({marker!r}, exist_ok=True)
    return types.ModuleType("kernel")

def decorate(*a, **k):
    return lambda thing: thing

use_kernel_forward_from_hub = use_kernel_func_from_hub = decorate
class Mode:
    INFERENCE = TRAINING = 1

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything
"""


@pytest.mark.slow
def test_no_verb_fetches_a_kernel_even_where_the_library_for_it_is_installed(
    model: Path, models: dict[str, Path], tmp_path: Path, marker: Marker
) -> None:
    """Four processes: each imports torch. The verbs share three readers."""
    library = tmp_path / "library"
    (library / "kernels").mkdir(parents=True)
    (library / "kernels" / "__init__.py").write_text(KERNELS.format(marker=str(marker.path)))
    (library / "kernels-0.18.3.dist-info").mkdir()
    facts = "Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.3\n"
    (library / "kernels-0.18.3.dist-info" / "METADATA").write_text(facts)
    change(model, "config.json", attn_implementation="someone/kernel")
    (tmp_path / "text.txt").write_text("some text\n")
    environment = os.environ | {"PYTHONPATH": f"{library}:{ROOT}"}
    raw = run_config(tmp_path / "runs", str(tmp_path / "text.txt"), ("jsonl",))
    raw["model"] = {"from": str(model)}
    raw["tokenizer"] = {"from": str(model)}
    (tmp_path / "run.yaml").write_text(json.dumps(raw))
    plain = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(model)!r})"
    subprocess.run([sys.executable, "-c", plain], env=environment, capture_output=True, check=False, timeout=200)
    assert marker.made(), "without the guard the name alone fetches it"
    for words in (
        ["evaluate", str(model), str(tmp_path / "text.txt")],
        ["export", str(model), str(tmp_path / "export")],
        ["run", str(tmp_path / "run.yaml")],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "pretrain", *words], env=environment, cwd=tmp_path, capture_output=True, text=True,
            check=False, input="y\n" * 9, timeout=200,
        )  # fmt: skip
        assert done.returncode != 0
        assert "attn_implementation" in done.stderr, f"{words[0]}: {done.stderr[-500:]}"
        assert "Traceback" not in done.stderr
        assert not marker.made(), words[0]
