"""Transformers' own tests on our classes: the page names every class, and the slow test runs them anew."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pretrain.models

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "conformance.md"


def test_the_page_names_every_class_and_no_failure() -> None:
    page = PAGE.read_text(encoding="utf-8")
    listed = dict.fromkeys(re.findall(r"^\| (Loom\w+) \|", page, re.MULTILINE))
    public = [getattr(pretrain.models, name) for name in pretrain.models.__all__]
    models = {
        found.__name__
        for found in public
        if isinstance(found, type) and issubclass(found, pretrain.models.LoomPreTrainedModel)
    }
    assert set(listed) == models - {"LoomModel", "LoomPreTrainedModel"}  # what the others are made of
    for algorithm in ("wordpiece", "byte-bpe", "unigram"):
        assert f"| tokenizer, {algorithm} |" in page
    assert re.search(r"passed, 0 failed, ", page)
    assert "not explained" not in page


@pytest.mark.slow
def test_no_test_of_transformers_fails(tmp_path: Path) -> None:
    """With the source distribution that PRETRAIN_TRANSFORMERS_SDIST names, or one that pip downloads."""
    command = [sys.executable, "scripts/conformance", "--page", str(tmp_path / "page.md")]
    if given := os.environ.get("PRETRAIN_TRANSFORMERS_SDIST"):
        command += ["--sdist", given]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 2 and not given:
        pytest.skip("pip cannot download the source distribution: name a file in PRETRAIN_TRANSFORMERS_SDIST")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
