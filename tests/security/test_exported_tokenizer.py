"""An exported tokenizer, in a process that cannot import `pretrain`, gives the ids that the run was trained on."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.security.conftest import Made

LINES = 10_000
ELSEWHERE = """
import json, sys
class Nobody:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "pretrain":
            raise ImportError(name)
sys.meta_path.insert(0, Nobody())
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False)
lines = json.load(open(sys.argv[2], encoding="utf-8"))
json.dump(tokenizer(lines, add_special_tokens=False)["input_ids"], open(sys.argv[3], "w"))
"""


def any_text(draw: random.Random) -> str:
    """Words of the corpus, other scripts, spaces of every kind, what looks like a special token."""
    parts = ["river", "stones", " the", "  ", "\t", "\n", "\u00a0", "é", "e\u0301", "中文", "नमस्ते", "👩‍👩‍👧", "ﬁ", "Ⅳ"]
    parts += ["<|endoftext|>", "<s>", "[MASK]", "\u200b", "\ufeff", "12345", "'s", "\x07", "İ", "ß", "\U0010ffff"]
    return "".join(draw.choices(parts, k=draw.randint(0, 20)))


@pytest.mark.slow
def test_ids_of_ten_thousand_lines_are_equal_after_export(made: Made, tmp_path: Path) -> None:
    """A process of its own imports transformers."""
    draw = random.Random(0)
    lines = [any_text(draw) for _ in range(LINES)]
    (tmp_path / "lines.json").write_text(json.dumps(lines), encoding="utf-8")
    words = [str(made.config.directory / "export"), str(tmp_path / "lines.json"), str(tmp_path / "ids.json")]
    subprocess.run([sys.executable, "-c", ELSEWHERE, *words], check=True, cwd=tmp_path, timeout=200)
    ours = Tokenizer.from_file(str(made.config.directory / "tokenizer" / "tokenizer.json"))
    expected = [encoding.ids for encoding in ours.encode_batch(lines, add_special_tokens=False)]
    assert json.loads((tmp_path / "ids.json").read_text()) == expected
