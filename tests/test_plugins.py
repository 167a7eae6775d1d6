"""Objects by import path: from the working directory, with a reason when there is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.plugins import import_path


def test_import_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "parts_of_ours.py").write_text("def score(): return 7\n")
    (tmp_path / "broken_parts.py").write_text("from os import nothing_of_this_name\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert import_path("parts_of_ours:score")() == 7
    with pytest.raises(ValueError, match="has no 'other'"):
        import_path("parts_of_ours:other")
    with pytest.raises(ValueError, match="no module 'not_there'"):
        import_path("not_there:score")
    with pytest.raises(ValueError, match=r"cannot import name 'nothing_of_this_name'.*mend the imports"):
        import_path("broken_parts:score")


def test_it_needs_no_torch() -> None:
    code = "import sys, pretrain.plugins; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
