"""Why parallel attention won: an LSTM and a Transformer of equal parameters, on equal tokens, at growing lengths.

    python scripts/bench_parallel.py docs/parallel.md            # about half an hour on two cores
    python scripts/bench_parallel.py /tmp/parallel.md --quick    # a minute, numbers for nothing

Both predict the next byte of the Python standard library's source. A step has the same tokens at every length (fewer,
longer rows). Steps of the two are timed in turn in one process, so that what else the machine does strikes both. The
loss is of held-out rows of that length after the same number of tokens. Then both go on from a prompt: the Transformer
with its cache of keys and values, without it, and the LSTM with its state. The page gets a plot beside it (.svg;
needs matplotlib: `pip install 'pretrain[plots]'`).

What lives here: the race and the page. What must not: the Transformer, which is the library's Llama.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pretrain.models import loom_config, model_from_config  # noqa: E402
from pretrain.runtime import describe_machine, keep_freed_memory  # noqa: E402

LENGTHS = (64, 128, 256, 512, 1024)
VOCABULARY = 256
TOLERANCE = 0.01  # of the parameters


class LSTM(nn.Module):
    """Bytes to logits by stacked LSTMs (Hochreiter and Schmidhuber 1997), with the head tied to the embeddings."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.stack = nn.LSTM(width, width, layers, batch_first=True)

    def forward(self, ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """(B, L) bytes -> logits (B, L, 256) and the state to go on from."""
        hidden, state = self.stack(self.embed(ids), state)
        return functional.linear(hidden, self.embed.weight), state


@dataclass
class Racer:
    """One model with its optimizer; `logits` maps (B, L) bytes to (B, L, 256)."""

    name: str
    model: nn.Module
    logits: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)

    @property
    def parameters(self) -> int:
        """How many there are, tied ones once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def step(self, rows: Tensor, rate: float) -> float:
        """One update on (B, L + 1) bytes; seconds."""
        started = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.loss(rows)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - started

    def loss(self, rows: Tensor) -> Tensor:
        """Mean nats a byte."""
        return functional.cross_entropy(self.logits(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


def transformer(width: int, layers: int, length: int) -> Racer:
    """The library's Llama."""
    config = loom_config(
        "llama",
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64 or 1,
        max_position_embeddings=length,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = model_from_config(config).train()
    return Racer("Transformer", model, lambda ids: model(input_ids=ids, return_logits=True, use_cache=False).logits)


def lstm(parameters: int, layers: int = 2) -> Racer:
    """Two LSTM layers as wide as gives the same number of parameters."""
    width = next(
        width for width in range(8, 4096) if VOCABULARY * width + layers * (8 * width * width + 8 * width) >= parameters
    )
    torch.manual_seed(0)
    model = LSTM(width, layers)
    made = Racer("LSTM", model, lambda ids: model(ids)[0])
    assert abs(made.parameters / parameters - 1) < 2 * TOLERANCE, (made.parameters, parameters)
    return made


def corpus() -> np.ndarray:
    """The bytes of the standard library's modules, in the order of their names."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return np.frombuffer(b"\n".join(file.read_bytes() for file in files), dtype=np.uint8)


def rows_of(text: np.ndarray, count: int, length: int, generator: np.random.Generator) -> Tensor:
    """(count, length + 1) bytes from random places."""
    starts = generator.integers(0, len(text) - length - 1, count)
    return torch.from_numpy(np.stack([text[start : start + length + 1] for start in starts]).astype(np.int64))


@dataclass(frozen=True)
class Race:
    """What one length gave, by racer: seconds a step (median) and nats a byte."""

    length: int
    seconds: dict[str, float]
    losses: dict[str, float]


def race(length: int, *, width: int, layers: int, tokens: int, steps: int, text: np.ndarray) -> Race:
    """Train both in turn on the same batches."""
    one = transformer(width, layers, length)
    racers = (one, lstm(one.parameters))
    held_out, seen = text[-len(text) // 20 :], text[: -len(text) // 20]
    generator = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {racer.name: [] for racer in racers}
    for step in range(steps):
        rows = rows_of(seen, tokens // length, length, generator)
        rate = 2e-3 * min(1.0, (step + 1) / max(1, steps // 20)) * (1 - step / steps)
        for racer in racers:
            seconds[racer.name].append(racer.step(rows, rate))
    test = rows_of(held_out, max(1, 4 * tokens // length), length, np.random.default_rng(1))
    losses = {}
    for racer in racers:
        racer.model.eval()
        with torch.no_grad():
            losses[racer.name] = statistics.fmean(float(racer.loss(part)) for part in test.split(8))
    return Race(length, {name: statistics.median(times[1:]) for name, times in seconds.items()}, losses)


def decode(width: int, layers: int, prompt: int, new: int) -> dict[str, float]:
    """Milliseconds a token of going on from a prompt, one row."""
    ids = torch.randint(0, VOCABULARY, (1, prompt), generator=torch.Generator().manual_seed(0))
    one = transformer(width, layers, prompt + new)
    two = lstm(one.parameters)
    one.model.eval()
    two.model.eval()

    def cached() -> None:
        output = one.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        for _ in range(new):
            following = output.logits[:, -1:].argmax(-1)
            output = one.model(input_ids=following, past_key_values=output.past_key_values, use_cache=True)

    def uncached() -> None:
        row = ids
        for _ in range(new):
            logits = one.model(input_ids=row, use_cache=False, logits_to_keep=1).logits
            row = torch.cat((row, logits[:, -1:].argmax(-1)), dim=1)

    def stateful() -> None:
        logits, state = two.model(ids)
        for _ in range(new):
            logits, state = two.model(logits[:, -1:].argmax(-1), state)

    ways = {"Transformer, cache": cached, "Transformer, no cache": uncached, "LSTM, state": stateful}
    took: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for _ in range(3):  # in turn
            for name, way in ways.items():
                started = time.perf_counter()
                way()
                took[name].append((time.perf_counter() - started) / new * 1000)
    return {name: statistics.median(times) for name, times in took.items()}


def page(races: list[Race], decoded: dict[int, dict[str, float]], about: dict[str, Any], command: str) -> str:
    """The page, in Markdown."""
    lines = [
        "# Why parallel attention won",
        "",
        f"Written by `{command}` at commit {_commit()}, {describe_machine(torch.device('cpu'))}, fp32, one seed.",
        "",
        f"A Transformer (Llama, {about['layers']} x {about['width']}) and an LSTM (2 layers) of {about['parameters']:,}"
        f" and {about['lstm']:,} parameters",
        f"predict the next byte of Python's standard library. Every step has {about['tokens']:,} tokens; losses are of",
        f"held-out text after {about['steps']:,} steps, in nats a byte.",
        "",
        "![step time and loss by length](parallel.svg)",
        "",
        "| length | Transformer, ms a step | LSTM, ms a step | LSTM / Transformer | Transformer, loss | LSTM, loss |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for one in races:
        ours, theirs = one.seconds["Transformer"], one.seconds["LSTM"]
        lines.append(
            f"| {one.length} | {ours * 1000:.0f} | {theirs * 1000:.0f} | {theirs / ours:.2f} | "
            f"{one.losses['Transformer']:.3f} | {one.losses['LSTM']:.3f} |"
        )
    lines += [
        "",
        *_words(races, about["tokens"]),
        "",
        "## Going on from a prompt, one row, milliseconds a token",
        "",
        "| prompt + new tokens | " + " | ".join(next(iter(decoded.values()))) + " |",
        "|---" + "|---:" * 3 + "|",
    ]
    for length, times in decoded.items():
        lines.append(f"| {length} | " + " | ".join(f"{value:.2f}" for value in times.values()) + " |")
    lines += [
        "",
        "The LSTM's state has one size. The Transformer's cache grows with the length, and so does reading it; without",
        "it every token costs the whole row again.",
    ]
    return "\n".join(lines) + "\n"


def _words(races: list[Race], tokens: int) -> list[str]:
    """What the table says, and what it cannot say."""
    ratios = [one.seconds["LSTM"] / one.seconds["Transformer"] for one in races]
    gains = [one.losses["LSTM"] - one.losses["Transformer"] for one in races]
    rows, last = tokens // races[-1].length, races[-1].length
    text = f"""
After the same tokens the Transformer's loss is {min(gains):.2f} to {max(gains):.2f} nats a byte lower. An LSTM waits at
every position for the one before it: it is parallel over rows alone, of which there are {rows} at length {last}.
Attention is parallel over positions too, at the price of a product that grows with the square of the length."""
    if max(ratios) < 1:
        text += f"""

**On this machine that waiting costs nothing**: a step of the LSTM takes {min(ratios):.2f} to {max(ratios):.2f} of the
Transformer's time at every length, probably as few rows keep a few cores busy, and as a Transformer has more small
operations beside its products. The LSTM could take two to three steps in the time of one; what it reaches then was not
measured. Nor was a device with thousands of lanes, where few rows would leave most of them idle."""
    return text.strip().splitlines()


def plot(races: list[Race], path: Path) -> None:
    """Step time and loss by length."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "parallel"
    from matplotlib import pyplot

    figure, (times, losses) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    lengths = [one.length for one in races]
    for name, colour in (("Transformer", "#2f6fbf"), ("LSTM", "#c2571a")):
        times.plot(lengths, [one.seconds[name] * 1000 for one in races], "o-", color=colour, label=name)
        losses.plot(lengths, [one.losses[name] for one in races], "o-", color=colour, label=name)
    for axes, words in ((times, "milliseconds a step"), (losses, "nats a byte, held out")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.set_xlabel("length of a row (same tokens a step)")
        axes.set_ylabel(words)
        axes.grid(alpha=0.3)
        axes.legend()
    times.set_ylim(bottom=0)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def main() -> None:
    """Race, and write the page and its plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the page to write; the plot lies beside it")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8192, help="a step")
    parser.add_argument("--steps", type=int, default=120, help="of each model at each length")
    parser.add_argument("--quick", action="store_true", help="tiny models and few steps, to see that it runs")
    parsed = parser.parse_args()
    if parsed.quick:
        parsed.width, parsed.layers, parsed.tokens, parsed.steps = 64, 2, 2048, 4
    keep_freed_memory()
    text = corpus()
    races = []
    for length in LENGTHS:
        sizes = {"width": parsed.width, "layers": parsed.layers, "tokens": parsed.tokens, "steps": parsed.steps}
        races.append(race(length, text=text, **sizes))
        sys.stderr.write(f"{races[-1]}\n")
    decoded = {prompt + 64: decode(parsed.width, parsed.layers, prompt, 64) for prompt in (64, 448, 960)}
    one = transformer(parsed.width, parsed.layers, LENGTHS[-1])
    about = {**vars(parsed), "parameters": one.parameters, "lstm": lstm(one.parameters).parameters}
    plot(races, parsed.out.with_suffix(".svg"))
    parsed.out.write_text(page(races, decoded, about, f"python scripts/bench_parallel.py {parsed.out}"))


if __name__ == "__main__":
    main()
