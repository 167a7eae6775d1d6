"""The wheel carries everything: installed in a clean environment, a shipped run starts by its bare name."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(ROOT),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_what_is_in_the_wheel(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "pretrain/_recipes/configs/runs/quickstart-gpt.yaml" in names
    assert "pretrain/_recipes/tokenizer/README.md" in names
    top = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert top == {"pretrain"}, "no other importable name may be installed"


def test_a_shipped_run_by_its_bare_name(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    site = next(environment.glob("lib/python*/site-packages"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # The dependencies of this environment, without this checkout (an editable install is a .pth file, unread here).
    path = os.pathsep.join([str(site), sysconfig.get_path("purelib")])
    command = [str(environment / "bin" / "python"), "-m", "pretrain", "run", "quickstart-gpt"]
    overrides = ["name=tiny", "train.steps=2", "train.batch_tokens=512", "data.sequence_length=64"]
    overrides += ["model.hidden_size=32", "model.num_hidden_layers=1", "evaluate.max_tokens=512"]
    overrides += ["tokenizer.vocab_size=512", "tokenizer.max_bytes=300_000"]
    done = subprocess.run(
        [*command, *overrides],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "tiny" / "export" / "model.safetensors").is_file()
