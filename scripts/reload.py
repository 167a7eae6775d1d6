"""Load finished runs with plain transformers, in a process that never imports pretrain, and show what they can do.

    python scripts/reload.py runs/quickstart-gpt runs/quickstart-bert runs/quickstart-continue

Compares the logits with those that the training code computed (`report/logits.safetensors`), prints sampled text or
filled masks, and ends with a table. Of a model that went on from another one it says what was gained and forgotten.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import yaml
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, logging, set_seed

PROMPTS = ("def read_file(path):\n", "import os\n\n\nclass")
PROMPTS_OF_BOTH = ("template <typename T>\n", "def read_file(path):\n")  # of a model that went on from Python to C++
MASKED = ("for i in [MASK](10):", "return [MASK]", "if x is not [MASK]:")
TOLERANCE = 1e-5


def load(directory: Path) -> tuple[torch.nn.Module, object, bool]:
    """The exported model and tokenizer, and whether it is causal."""
    config = json.loads((directory / "config.json").read_text())
    causal = config["architectures"][0].endswith(("LMHeadModel", "ForCausalLM"))
    auto = AutoModelForCausalLM if causal else AutoModelForMaskedLM
    model = auto.from_pretrained(directory, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(directory), causal


def compare(model: torch.nn.Module, run: Path) -> float:
    """The largest difference of the logits, over the largest logit."""
    expected = load_file(run / "report" / "logits.safetensors")
    mask = expected["attention_mask"]
    with torch.no_grad():
        logits = model(input_ids=expected["input_ids"], attention_mask=mask).logits[mask.bool()]
    return float((logits - expected["logits"]).abs().max() / expected["logits"].abs().max())


def show_text(model: torch.nn.Module, tokenizer: object, prompts: tuple[str, ...], console: Console) -> None:
    """Sample a continuation of each prompt."""
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")
        set_seed(0)
        out = model.generate(
            **ids, max_new_tokens=60, do_sample=True, temperature=0.7, top_k=40, pad_token_id=tokenizer.pad_token_id
        )
        console.rule("sampled")
        console.print(tokenizer.decode(out[0], skip_special_tokens=True), markup=False, highlight=False)


def show_masks(model: torch.nn.Module, tokenizer: object, console: Console) -> None:
    """Fill the mask of each text."""
    for text in MASKED:
        ids = tokenizer(text.replace("[MASK]", tokenizer.mask_token), return_tensors="pt")
        with torch.no_grad():
            logits = model(**ids).logits[0, ids["input_ids"][0] == tokenizer.mask_token_id][0]
        best = logits.softmax(-1).topk(5)
        words = ", ".join(
            f"{tokenizer.decode([token]).strip()} {share:.2f}" for share, token in zip(*map(list, best), strict=True)
        )
        console.print(f"{text}  ->  {words}", markup=False, highlight=False)


def went_on(run: Path) -> bool:
    """Whether the run began with a trained model."""
    return "from" in yaml.safe_load((run / "train" / "config.yaml").read_text(encoding="utf-8"))["model"]


def facts(run: Path, model: torch.nn.Module, difference: float) -> dict[str, str]:
    """What the table says of a run."""
    result = json.loads((run / "train" / "result.json").read_text())
    scores = json.loads((run / "report" / "scores.json").read_text())
    rows = {
        "architecture": f"{model.config.model_type}, {model.num_parameters():,} parameters",
        "trained": f"{result['tokens']:,} tokens in {result['seconds'] / 60:.1f} min",
        "tokens/s": f"{result['tokens_per_second']:,.0f}",
    }
    for split, values in scores.items():
        if isinstance(values, dict):
            for name in ("loss", "accuracy", "bits_per_byte"):
                if values.get(name) is not None:
                    rows[f"{split}: {name.replace('_', ' ')}"] = f"{values[name]:.4f}"
            first, last = (result.get(key, {}).get(f"{split}/bits_per_byte") for key in ("scores_at_start", "scores"))
            if "bits_per_byte_before" in values:  # of the model it went on from, in its own pieces, on the whole set
                first, last = values["bits_per_byte_before"], values["bits_per_byte"]
            if went_on(run) and first is not None and last is not None:
                rows[f"{split}: gained (-), forgotten (+)"] = f"{last - first:+.4f}"
    rows["logits, stock class against ours"] = f"equal within {difference:.1e}"
    rows["model (AutoModel loads it)"] = str(run / "export")
    rows["tokenizer"] = str(run / "tokenizer")
    rows["shards"] = str(run / "data")
    rows["checkpoints, metrics"] = str(run / "train")
    return rows


def main(runs: list[str]) -> int:
    """Reload every run; exit code 1 when the logits of one differ."""
    console = Console()
    logging.disable_progress_bar()
    columns: dict[str, dict[str, str]] = {}
    equal = True
    for run in map(Path, runs):
        model, tokenizer, causal = load(run / "export")
        difference = compare(model, run)
        equal &= difference <= TOLERANCE
        console.rule(f"[bold]{run.name}, loaded by transformers alone")
        if causal:
            show_text(model, tokenizer, PROMPTS_OF_BOTH if went_on(run) else PROMPTS, console)
        else:
            show_masks(model, tokenizer, console)
        columns[run.name] = facts(run, model, difference)
    table = Table(title="quickstart")
    table.add_column("")
    for name in columns:
        table.add_column(name, overflow="fold")
    for label in dict.fromkeys(label for rows in columns.values() for label in rows):
        table.add_row(label, *(rows.get(label, "") for rows in columns.values()))
    console.print(table)
    assert "pretrain" not in sys.modules
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
