"""Does pretraining pay? Small pretrained models beside the same shapes with new weights, and beside a bag of words.

    python scripts/bench_downstream.py RUNS DATA OUT [--only TEXT] [--table PAGE]

RUNS holds the four runs `small-{bert,gpt}-{en,zh}` as `pretrain run` made them, DATA the labelled sets in folders of
their own (see SETS). Each set is learnt by `pretrain finetune` three times from the pretrained weights and three times
from new ones, with the same rows, order, rate and steps; the test rows are scored once a seed. What is done is not done
again. At the end a table of all that is there, as Markdown.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEEDS = (0, 1, 2)
COMMON = ("optimizer.lr=1e-3", "evaluate.every=25%", "log.to=[jsonl]")


@dataclass(frozen=True)
class Set:
    """A labelled set.

    Attributes:
        folder: below DATA.
        score: of the test rows, for the table.
        epochs: of each model that learns it.
        extra: further overrides.
        words: whether the bag of words answers it.
        task: the shipped task, where the set is a part of one and has a name of its own.
    """

    folder: str
    score: str
    epochs: float
    extra: tuple[str, ...] = ()
    words: bool = True
    task: str | None = None


FEW = ("task.train_limit=1000",)
SHORT = ("task.max_length=128", "task.stride=48")  # the encoders were pretrained on rows of 128
TITLE = ("task.max_length=160", "task.max_target_length=32")
SETS = {
    "mr": Set("classification/mr", "accuracy", 3),
    "mr-1000": Set("classification/mr", "accuracy", 12, FEW, task="mr"),
    "banking77": Set("classification/banking77", "accuracy", 4),
    "go-emotions": Set("classification/go_emotions", "f1_micro", 1, ("task.train_limit=20000",)),
    "sick-entailment": Set("pairs/sick", "accuracy", 4),
    "sick-relatedness": Set("pairs/sick", "pearson", 4),
    "ud-ewt": Set("token/ud-english-ewt", "accuracy", 1),
    "wnut17": Set("token/wnut17", "f1", 5),
    "xquad-en": Set("qa/xquad", "f1", 3, SHORT, words=False),
    "csl-category-zh": Set("classification/csl-category-zh", "accuracy", 3),
    "csl-category-zh-1000": Set("classification/csl-category-zh", "accuracy", 12, FEW, task="csl-category-zh"),
    "ocnli-zh": Set("pairs/ocnli-zh", "accuracy", 2),
    "cmrc2018": Set("qa/cmrc2018-zh", "f1", 2, (*SHORT, "task.train_limit=500"), words=False),
    "csl-title": Set("summarization/csl-title-zh", "rougeL", 5, TITLE, words=False),
    "tatoeba-zh-en": Set("translation/tatoeba-en-zh", "bleu", 1, ("task.train_limit=14000",), words=False),
}
LEARNT = {
    "small-bert-en": (
        "mr", "mr-1000", "banking77", "go-emotions", "sick-entailment", "sick-relatedness", "ud-ewt", "wnut17",
        "xquad-en",
    ),
    "small-bert-zh": ("csl-category-zh", "csl-category-zh-1000", "ocnli-zh", "cmrc2018"),
    "small-gpt-en": (
        "mr", "mr-1000", "banking77", "go-emotions", "sick-entailment", "sick-relatedness", "ud-ewt", "wnut17",
    ),
    "small-gpt-zh": ("csl-category-zh", "csl-category-zh-1000", "ocnli-zh", "csl-title", "tatoeba-zh-en"),
}  # fmt: skip
POOLED = (
    "mr", "mr-1000", "banking77", "go-emotions", "sick-entailment", "sick-relatedness", "csl-category-zh",
    "csl-category-zh-1000", "ocnli-zh",
)  # fmt: skip
"""Sets whose encoders say what they say of a text by the mean of its tokens."""


def command(model: str, task: str, weights: str, runs: Path, data: Path, out: Path) -> list[str]:
    """What is run for one cell of the table."""
    chosen = SETS[task]
    words = [sys.executable, "-m", "pretrain", "finetune"]
    if weights == "words":
        named = [f"task.root={data / chosen.folder}", f"name={task}-words", f"out={out}"]
        return [*words, "bag-of-words", chosen.task or task, *named, *chosen.extra]
    pooling = ["model.classifier_pooling=mean"] if "bert" in model and task in POOLED else []
    return [
        *words,
        str(runs / model / "export"),
        chosen.task or task,
        f"task.root={data / chosen.folder}",
        f"name={task}-{model}-{weights}",
        f"out={out}",
        f"model.weights={weights}",
        f"train.seeds={list(SEEDS)}",
        f"train.epochs={chosen.epochs:g}",
        *COMMON,
        *pooling,
        *chosen.extra,
    ]


def scores(out: Path, name: str, score: str) -> dict[str, Any] | None:
    """Median and spread of a test score; None where it was not made."""
    path = out / name / "result.json"
    if not path.is_file():
        return None
    found: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8"))["summary"].get(f"test/{score}")
    return found


def shown(found: dict[str, Any] | None) -> str:
    """A cell: the median, and the lowest and highest of several seeds."""
    if found is None:
        return ""
    spread = f" ({found['min']:.3f} - {found['max']:.3f})" if len(found["values"]) > 1 else ""
    return f"{found['median']:.3f}{spread}"


def verdict(pretrained: dict[str, Any] | None, random: dict[str, Any] | None) -> str:
    """Whether every pretrained seed beats every one from new weights, none does, or they overlap."""
    if pretrained is None or random is None:
        return ""
    if pretrained["min"] > random["max"]:
        return "better"
    return "worse" if pretrained["max"] < random["min"] else "overlap"


def table(out: Path) -> str:
    """All that was made, as Markdown."""
    lines = [
        "| model | set | score | pretrained | new weights | | bag of words |",
        "|---|---|---|---|---|---|---:|",
    ]
    for model, tasks in LEARNT.items():
        for task in tasks:
            score = SETS[task].score
            cells = [scores(out, f"{task}-{model}-{weights}", score) for weights in ("pretrained", "random")]
            if not any(cells):
                continue
            words = scores(out, f"{task}-words", score)
            row = (model, task, score, *map(shown, cells), verdict(*cells), shown(words))
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing, then show the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default="", help="cells whose name (SET-MODEL-WEIGHTS, SET-words) holds this text")
    parser.add_argument("--table", type=Path, help="write the table here, too")
    parser.add_argument("--show", action="store_true", help="run nothing")
    options = parser.parse_args()
    cells = [(model, task, weights) for model, tasks in LEARNT.items() for task in tasks
             for weights in ("pretrained", "random", "words") if weights != "words" or SETS[task].words]  # fmt: skip
    for model, task, weights in cells:
        name = f"{task}-words" if weights == "words" else f"{task}-{model}-{weights}"
        if options.show or options.only not in name or (options.out / name / "result.json").is_file():
            continue
        sys.stderr.write(f"{name}\n")
        subprocess.run(command(model, task, weights, options.runs, options.data, options.out), check=True)
    made = table(options.out)
    sys.stdout.write(made)
    if options.table is not None:
        options.table.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
