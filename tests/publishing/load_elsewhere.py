"""Run by `test_whole_way.py` in a process that cannot import `pretrain`: revisions of a repository, loaded.

Usage: python load_elsewhere.py REPO REVISION... Prints a JSON object: for each revision the sum of all weights, as a
hexadecimal float, and the ids of the tokenizer for a text.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    """Load each revision as anybody would."""
    sys.modules["pretrain"] = None  # type: ignore[assignment]
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    repository, *revisions = sys.argv[1:]
    found = {}
    for revision in revisions:
        model = AutoModelForMaskedLM.from_pretrained(repository, revision=revision)
        tokenizer = AutoTokenizer.from_pretrained(repository, revision=revision)
        total = sum(parameter.double().sum().item() for parameter in model.parameters())
        found[revision] = [float(total).hex(), tokenizer("7 8 9")["input_ids"]]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
