#!/usr/bin/env python
"""Writes a little of everything that the guides work on: text, labelled sentences, minimal pairs, questions, answers.

    python scripts/guide_sample.py .

The text is the reference of the Python language, 79 topics in English that lie in every Python (`pydoc_data.topics`),
so nothing is downloaded. It is enough to try each command of a guide, and far too little for a model that is of use.
"""

from __future__ import annotations

import argparse
import builtins
import csv
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from pydoc_data.topics import topics

ENDINGS = """\
task: endings
dataset_path: json
dataset_kwargs: {data_files: {test: endings.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{begin}}"
doc_to_choice: "{{ends}}"
doc_to_target: "{{right}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def sentences(text: str) -> list[str]:
    """Plain sentences of 6 to 20 words."""
    found = re.findall(r"(?<=[.\n] )[A-Z][a-z]+ [a-z][^.:\n*`\"|=<>]*\.|^[A-Z][a-z ,\n]+\.", text, re.MULTILINE)
    plain = (" ".join(sentence.split()) for sentence in found)
    return [sentence for sentence in plain if 6 <= len(sentence.split()) <= 20]


def swapped(sentence: str, number: int) -> str:
    """The sentence with two neighbouring words in each other's place."""
    words = sentence.rstrip(".").split()
    place = 1 + number % (len(words) - 2)
    words[place], words[place + 1] = words[place + 1], words[place]
    return " ".join(words) + "."


def conversations() -> Iterable[dict[str, list[dict[str, str]]]]:
    """What is asked of a method of Python's own types, and its first line of documentation."""
    for kind in (str, list, dict, set, bytes, int, float, tuple, frozenset):
        for name in sorted(vars(kind)):
            documentation = getattr(getattr(kind, name), "__doc__", None)
            if name.startswith("_") or not documentation:
                continue
            lines = [line for line in documentation.splitlines() if line.strip()]
            yield {
                "messages": [
                    {"role": "user", "content": f"What does {kind.__name__}.{name} do?"},
                    {"role": "assistant", "content": lines[0].strip()},
                ]
            }


def documents_of_builtins() -> Iterable[dict[str, str]]:
    """The documentation of every built-in name, as text of another kind."""
    for name in sorted(vars(builtins)):
        value = getattr(builtins, name)
        members = [getattr(value, member, None) for member in sorted(vars(value))] if isinstance(value, type) else []
        texts = [text for part in (value, *members) if isinstance(text := getattr(part, "__doc__", None), str)]
        if texts:
            yield {"text": "\n\n".join(dict.fromkeys(texts))}


def pieces(text: str, size: int = 1_500) -> Iterable[dict[str, str]]:
    """Documents of whole paragraphs, about `size` characters each."""
    piece: list[str] = []
    for paragraph in text.split("\n\n"):
        piece.append(paragraph)
        if sum(map(len, piece)) > size:
            yield {"text": "\n\n".join(piece)}
            piece = []
    if piece:
        yield {"text": "\n\n".join(piece)}


def write_lines(path: Path, rows: Iterable[object]) -> None:
    """A JSON value a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]], delimiter: str = ",") -> None:
    """Columns with their names in the first line."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def write_sample(folder: Path) -> None:
    """All files of the guides, under `folder`."""
    names = sorted(topics)
    write_lines(folder / "text" / "reference.jsonl", (piece for name in names[4:] for piece in pieces(topics[name])))
    write_lines(
        folder / "held-out" / "reference.jsonl", (piece for name in names[:4] for piece in pieces(topics[name]))
    )
    write_lines(folder / "domain" / "builtins.jsonl", documents_of_builtins())
    write_lines(folder / "chat" / "train.jsonl", conversations())
    found = list(dict.fromkeys(one for name in names for one in sentences(topics[name])))
    labelled = [(swapped(one, number), "swapped") if number % 2 else (one, "right") for number, one in enumerate(found)]
    (folder / "sentences").mkdir(exist_ok=True)
    cut = len(labelled) * 4 // 5
    write_table(folder / "sentences" / "train.csv", ("text", "label"), labelled[:cut])
    write_table(folder / "sentences" / "test.csv", ("text", "label"), labelled[cut:])
    pairs = [(one, swapped(one, number)) for number, one in enumerate(found[cut:])]
    write_table(folder / "pairs.tsv", ("sentence_good", "sentence_bad"), pairs, "\t")
    (folder / "endings.yaml").write_text(ENDINGS, encoding="utf-8")
    halves = (good.split() for good, _ in pairs)
    questions = [(" ".join(words[:-2]), " ".join(words[-2:]), " ".join(words[:-3:-1])) for words in halves]
    write_lines(
        folder / "endings.jsonl",
        (
            {"begin": begin, "ends": [" " + wrong, " " + right] if number % 2 else [" " + right, " " + wrong],
             "right": number % 2}
            for number, (begin, right, wrong) in enumerate(questions)
        ),
    )  # fmt: skip


def main() -> None:
    """Write where the command line says."""
    parser = argparse.ArgumentParser(description="Small files for the guides.")
    parser.add_argument("folder", type=Path, help="where they are written; '.' is here")
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    write_sample(folder)


if __name__ == "__main__":
    main()
