"""Speed of the data plane, side by side with what people run, on the embedded corpus and one core.

What lives here: measuring, in four parts.

    prepare   three ways to token shards with the same tokenizer, interleaved: the bare `Tokenizer.encode_batch_fast`;
              what transformers' run_clm.py does (`datasets.map` with the tokenizer, then with group_texts); and
              `pretrain prepare`, text files to committed shards
    loader    the loader alone, packed, causal and masked, inline
    packing   the plan of 10^8 synthetic documents: minutes and peak memory (about 8 GB), each in a fresh process
    wait      the share of a training step spent waiting for data, in the quickstart's shape

    python scripts/bench_data.py [--parts loader,packing,wait] [--repeats 5] [--copies 2] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAYON_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from pretrain.config import ObjectiveConfig, RunConfig, config_from_dict, load_config
from pretrain.data.loader import DataPlane
from pretrain.data.packing import PackingSpec, plan_packing
from pretrain.data.reading.embedded import stdlib_corpus
from pretrain.data.reading.sources import corpus_digest
from pretrain.data.vocabulary import read_vocabulary
from pretrain.files import write_json, write_manifest
from pretrain.prepare import prepare_data

SEQUENCE_LENGTH = 1024
PARTS = ("prepare", "loader", "packing", "wait")
SPECIAL = {
    "pad": "[PAD]",
    "unk": "[UNK]",
    "cls": "[CLS]",
    "sep": "[SEP]",
    "mask": "[MASK]",
    "bos": "<s>",
    "eos": "</s>",
}


def make_tokenizer(directory: Path, texts: list[str], vocab_size: int) -> None:
    """A byte-level BPE tokenizer with every special token, so that both layouts can be timed on it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    directory.mkdir(parents=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", {f"{role}_token": token for role, token in SPECIAL.items()})
    write_manifest(directory, kind="tokenizer", config={}, facts=read_vocabulary(directory).facts())


def bare(tokenizer: Path, texts: list[str], scratch: Path) -> int:
    """`encode_batch_fast` on lists of about a megabyte, and nothing else."""
    fast = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    batch: list[str] = []
    tokens = size = 0
    for text in [*texts, None]:
        if text is not None:
            batch.append(text)
            size += len(text)
        if size >= 1 << 20 or text is None:
            tokens += sum(len(encoding) for encoding in fast.encode_batch_fast(batch, add_special_tokens=False))
            batch, size = [], 0
    return tokens


def run_clm(tokenizer: Path, texts: list[str], scratch: Path) -> int:
    """The two maps of run_clm.py (transformers, examples/pytorch/language-modeling), with its defaults."""
    from datasets import Dataset, disable_progress_bars
    from transformers import PreTrainedTokenizerFast

    disable_progress_bars()
    fast = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer / "tokenizer.json"))
    fast.model_max_length = 1 << 40

    def group_texts(examples: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {key: list(chain(*examples[key])) for key in examples}
        total = (len(joined["input_ids"]) // SEQUENCE_LENGTH) * SEQUENCE_LENGTH
        blocks = {
            key: [ids[start : start + SEQUENCE_LENGTH] for start in range(0, total, SEQUENCE_LENGTH)]
            for key, ids in joined.items()
        }
        blocks["labels"] = blocks["input_ids"].copy()
        return blocks

    raw = Dataset.from_dict({"text": texts})
    cache = {"load_from_cache_file": False, "batched": True}
    tokenized = raw.map(
        lambda examples: fast(examples["text"]),
        remove_columns=["text"],
        cache_file_name=str(scratch / "tokenized.arrow"),
        **cache,
    )
    grouped = tokenized.map(group_texts, cache_file_name=str(scratch / "grouped.arrow"), **cache)
    return len(grouped) * SEQUENCE_LENGTH


def config_for(root: Path, name: str, files: Path, architecture: str = "llama") -> RunConfig:
    """A run that prepares `files`."""
    kind = "mlm" if architecture == "bert" else "causal"
    data = {"train": [str(files)], "sequence_length": SEQUENCE_LENGTH, "workers": 1, "document": "file"}
    return config_from_dict(
        {
            "name": name,
            "out": str(root),
            "data": data,
            "model": {"architecture": architecture},
            "objective": {"kind": kind},
            "optimizer": {"lr": 1e-3},
            "train": {"batch_tokens": 64 * SEQUENCE_LENGTH, "steps": 1},
        }
    )


def ours(tokenizer: Path, files: Path, scratch: Path) -> int:
    """`pretrain prepare`: read, split, encode, write, hash, plan the rows, commit."""
    config = config_for(scratch, "ours", files)
    config.directory.mkdir()
    (config.directory / "tokenizer").symlink_to(tokenizer, target_is_directory=True)
    directory = prepare_data(config)
    splits = json.loads((directory / "manifest.json").read_text())["facts"]["splits"]
    return sum(split["tokens"] for split in splits.values())


def processor_seconds() -> float:
    """Seconds of processor time of this process and its children: what a core is busy for, on a shared machine too."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


WAYS: dict[str, Callable[..., int]] = {"bare": bare, "run_clm": run_clm, "ours": ours}


def time_one(root: Path, way: str) -> float:
    """Processor seconds of one way, libraries loaded before; ours reads the files, the others are given the texts."""
    if way == "run_clm":
        import datasets
        import transformers

        assert {datasets.__name__, transformers.__name__} <= set(sys.modules)
    source = (
        root / "text" if way == "ours" else [path.read_bytes().decode() for path in sorted((root / "text").iterdir())]
    )
    with tempfile.TemporaryDirectory() as scratch:
        start = processor_seconds()
        WAYS[way](root / "tokenizer", source, Path(scratch))
        return processor_seconds() - start


def bench_prepare(root: Path, repeats: int) -> dict[str, Any]:
    """Megabytes of text a second of processor time of the three, the best round of each."""
    size = sum(path.stat().st_size for path in (root / "text").iterdir())
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(repeats):
        for way in WAYS:  # each in a process of its own: one that has worked for a while is slower, whatever it does
            command = [sys.executable, __file__, "--time", way, "--root", str(root)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rates[way].append(size / 1e6 / float(done.stdout.split()[-1]))
    best = {name: max(values) for name, values in rates.items()}
    return {
        "megabytes": size / 1e6,
        "megabytes_per_second": best,
        "all_rounds": rates,
        "ours_to_bare": best["ours"] / best["bare"],
        "ours_to_run_clm": best["ours"] / best["run_clm"],
    }


def bench_loader(root: Path, repeats: int) -> dict[str, float]:
    """Millions of token positions a second of processor time of `DataPlane.batch`, inline; the best round."""
    out = {}
    config = config_for(root, "loader", root / "text")
    config.directory.mkdir()
    (config.directory / "tokenizer").symlink_to(root / "tokenizer", target_is_directory=True)
    directory = prepare_data(config)
    for kind, layout in (("causal", "decoder"), ("mlm", "encoder")):
        for rows in (8, 64, 512):
            data = DataPlane.from_directory(
                directory, objective=ObjectiveConfig(kind=kind), sequence_length=SEQUENCE_LENGTH, rows_per_batch=rows
            )
            steps = max(2, 2048 // rows)
            seconds = []
            for _ in range(repeats):
                start = time.process_time()
                for step in range(steps):
                    data.batch(step)
                seconds.append(time.process_time() - start)
            out[f"{kind}, {rows} rows ({layout})"] = steps * rows * SEQUENCE_LENGTH / min(seconds) / 1e6
    return out


def bench_packing(documents: int) -> list[dict[str, float]]:
    """Plans for two lengths of rows, each made in a process of its own, so that its peak memory can be told."""
    plans = []
    for length in (1024, 512):
        command = [sys.executable, __file__, "--plan", str(length), "--documents", str(documents)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        plans.append(json.loads(done.stdout))
    return plans


def plan(documents: int, sequence_length: int) -> dict[str, float]:
    """Minutes and memory to plan documents with log-normal lengths, 500 tokens on average."""
    generator = np.random.default_rng(0)
    lengths = np.empty(documents, dtype=np.int64)
    for start in range(0, documents, 1 << 22):
        part = lengths[start : start + (1 << 22)]
        part[:] = np.exp(generator.normal(5.714, 1.0, len(part)))
    lengths += 1
    start, busy = time.perf_counter(), time.process_time()
    made = plan_packing(lengths, PackingSpec(sequence_length, "decoder", 1, 1, 64))
    return {
        "documents": documents,
        "sequence_length": sequence_length,
        "tokens": int(lengths.sum()),
        "pieces": len(made.pieces),
        "seconds": time.perf_counter() - start,
        "processor_seconds": time.process_time() - busy,
        "utilisation": made.utilisation,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def bench_wait(root: Path, steps: int) -> dict[str, float]:
    """Train the quickstart's GPT for some steps; the share of their time that the trainer waited for batches."""
    from pretrain.train import build_trainer

    keys = [f"out={root}", f"data.train=[{root / 'text'}]", "data.document=file", f"train.steps={steps}"]
    keys += ["evaluate.every=1000000", "checkpoint.every=1000000", "log.to=[jsonl]"]
    config = load_config("quickstart-gpt", keys)
    config.directory.mkdir()
    (config.directory / "tokenizer").symlink_to(root / "tokenizer", target_is_directory=True)
    prepare_data(config)
    build_trainer(config, evaluators={}).train()
    log = [json.loads(line) for line in (config.directory / "train" / "metrics.jsonl").read_text().splitlines()]
    seconds = np.diff([line["seconds"] for line in log], prepend=0.0)
    waited = sum(line["data_wait"] * spent for line, spent in zip(log, seconds, strict=True))
    return {"steps": steps, "seconds": float(seconds.sum()), "data_wait": waited / float(seconds.sum())}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--copies", type=int, default=2, help="times the embedded corpus is taken")
    parser.add_argument("--vocab-size", type=int, default=16_384)
    parser.add_argument("--documents", type=int, default=100_000_000, help="for the packing plan")
    parser.add_argument("--steps", type=int, default=30, help="to train while the wait for data is measured")
    parser.add_argument("--parts", default=",".join(PARTS), help="what to measure, separated by commas")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    parser.add_argument("--time", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--plan", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    console = Console()
    if options.time is not None:
        print(time_one(options.root, options.time))
        return
    if options.plan is not None:
        print(json.dumps(plan(options.documents, options.plan)))
        return
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        (root / "text").mkdir()
        once = [path.read_bytes().decode() for _, path in stdlib_corpus()]
        texts = once * options.copies
        for number, text in enumerate(texts):
            (root / "text" / f"{number:06d}.txt").write_bytes(text.encode())
        make_tokenizer(root / "tokenizer", once, options.vocab_size)
        measures: dict[str, Callable[[], Any]] = {
            "prepare": lambda: bench_prepare(root, options.repeats),
            "loader": lambda: bench_loader(root, options.repeats),
            "packing": lambda: bench_packing(options.documents),
            "wait": lambda: bench_wait(root, options.steps),
        }
        result = {"corpus": corpus_digest(), **{part: measures[part]() for part in PARTS if part in parts}}
    show(console, result)
    if options.json is not None:
        write_json(options.json, result)


def show(console: Console, result: dict[str, Any]) -> None:
    """The numbers that were measured, as tables and lines."""
    if prepare := result.get("prepare"):
        table = Table(title=f"text to tokens, {prepare['megabytes']:.1f} MB, one core")
        table.add_column("way")
        table.add_column("MB/s", justify="right")
        table.add_column("ours is", justify="right")
        for name, rate in prepare["megabytes_per_second"].items():
            ratio = prepare.get(f"ours_to_{name}")
            table.add_row(name, f"{rate:.2f}", f"{ratio:.2f} x" if ratio is not None else "")
        console.print(table)
    if loader := result.get("loader"):
        table = Table(title="loader alone, one core")
        table.add_column("batch")
        table.add_column("million tokens/s", justify="right")
        for name, rate in loader.items():
            table.add_row(name, f"{rate:.1f}")
        console.print(table)
    for packing in result.get("packing", ()):
        console.print(
            f"packing plan of {packing['documents']:,} documents ({packing['tokens'] / 1e9:.1f} billion tokens) into "
            f"rows of {packing['sequence_length']}: {packing['seconds'] / 60:.2f} min "
            f"({packing['processor_seconds'] / 60:.2f} of the processor), peak {packing['peak_gib']:.1f} GiB, "
            f"{packing['pieces']:,} pieces, {packing['utilisation']:.2%} used",
            highlight=False,
        )
    if wait := result.get("wait"):
        console.print(
            f"data wait in the quickstart's GPT: {wait['data_wait']:.3%} of {wait['steps']} steps", highlight=False
        )


if __name__ == "__main__":
    main()
