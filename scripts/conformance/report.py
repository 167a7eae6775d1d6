"""What transformers' tests said, read from pytest's XML, and the page that tells it.

What lives here: outcomes, the words for each reason to skip, `docs/conformance.md`. What must not: running anything.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

# (what a reason to skip says, what it means here); the first that is found in it counts.
REASONS = (
    (r"requires (multiple )?accelerator", "needs a GPU, or several: the same command runs these tests there"),
    (r"requires MPS", "needs an Apple GPU"),
    (
        r"requires Flash Attention|flash attention",
        "the package flash-attn: here kernels run through `varlen` and `flex`",
    ),
    (r"requires the kernels library", "the package kernels, which fetches code from the Hub"),
    (r"composite|No subconfigs|does not support SDPA$", "for models made of several models (text beside images)"),
    (
        r"grouped_mm|no sparse experts|output_router_logits|expert parallel|MoE",
        "for mixtures of experts; ours have none",
    ),
    (r"No conversion found", "for classes whose older checkpoints named tensors otherwise; ours have one form"),
    (r"_keep_in_fp32_modules", "no part of ours must stay in float32"),
    (r"No decoder-only language modeling head", "for classes that predict the next token"),
    (
        r"No sequence-to-sequence language modeling head|Model is not an encoder-decoder",
        "for encoder-decoders with a head",
    ),
    (r"already aligned with the targets", "for decoders: an encoder-decoder shifts nothing"),
    (
        r"RoPE|base_model_class",
        "the test sets transformers' own key `rope_parameters` on a base model; `rope_scaling` and "
        "`partial_rotary_factor` are tested in tests/models/test_switches.py",
    ),
    (
        r"sliding window mask",
        "the test sets transformers' own keys `sliding_window` and `use_sliding_window`; `local_window` is tested in "
        "tests/models/test_loom_masks.py, and the designs with windows ran here",
    ),
    (r"does not have position embeddings", "no class of ours lengthens its table of positions (as BERT's does not)"),
    (
        r"does not support output_attentions",
        "the test looks for the argument in the signature, and ours is among **kwargs; attentions are tested by "
        "`test_attention_outputs`",
    ),
    (r"No model with a differentiable loss", "a base model has no loss"),
    (r"_torch_compile_train_cls", "needs a GPU; compiled training is tested in tests/models/test_loom_models.py"),
    (
        r"neither causal_lm_class|several processes|FSDP workers",
        "starts several processes, with a file that the source distribution leaves out; ours: "
        "tests/models/test_stock_habits.py (tensor parallelism), tests/test_engines.py (FSDP2)",
    ),
    (r"chat templates at input", "for tokenizers whose class takes a chat template by name"),
    (r"No integration expected", "expected pieces of a published vocabulary; these are trained on the spot"),
    (r"is_replaced", "the test subtracts outputs, and `is_replaced` is boolean"),
    (
        r"draws new replacements",
        "so its gradient does not vanish, which the test asks for; the detector without a generator (electra) learns "
        "the batch by heart here",
    ),
    (r"uses another name", "an encoder-decoder has two: `encoder_hidden_states` and `decoder_hidden_states`"),
    (
        r"tests of generation are not in the source",
        "transformers' tests of generation are not in its source distribution; ours are in tests/models/",
    ),
)


@dataclass(frozen=True)
class Outcome:
    """One test of one class: `reason` says why it failed or was skipped."""

    case: str
    test: str
    status: str
    reason: str = ""


def read(xml: Path) -> list[Outcome]:
    """The outcomes in pytest's report."""
    outcomes = []
    for found in ElementTree.parse(xml).iter("testcase"):
        case, test = found.get("classname", "").rsplit(".", 1)[-1], found.get("name", "")
        status, reason = "passed", ""
        for kind in ("skipped", "failure", "error"):
            if (entry := found.find(kind)) is not None:
                status = "skipped" if kind == "skipped" else "failed"
                reason = " ".join((entry.get("message") or "").split())
        outcomes.append(Outcome(case, test, status, reason))
    return outcomes


def words_for(reason: str) -> str | None:
    """What a reason to skip means here; None: nobody has said."""
    return next((words for pattern, words in REASONS if re.search(pattern, reason)), None)


def unexplained(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Skips for which there are no words."""
    return [outcome for outcome in outcomes if outcome.status == "skipped" and words_for(outcome.reason) is None]


def page(outcomes: Sequence[Outcome], facts: Mapping[str, str]) -> str:
    """The page, as markdown; facts are its list of circumstances."""
    totals = Counter(outcome.status for outcome in outcomes)
    lines = [
        "# Conformance",
        "",
        "Transformers' own tests of models, configs, training and tokenizers, as its source distribution carries",
        "them, run on every class of `pretrain.models` and on tokenizers of every algorithm, in small shapes. The",
        "distribution is unpacked into a scratch folder; nothing of it is kept here. `scripts/conformance` says what",
        "is run on what.",
        "",
        f"- {totals['passed']:,} passed, {totals['failed']:,} failed, {totals['skipped']:,} skipped",
        *(f"- {name}: {value}" for name, value in facts.items()),
        "",
        "| class | design | passed | failed | skipped |",
        "|---|---|---:|---:|---:|",
    ]
    for case in sorted({outcome.case for outcome in outcomes}):
        counts = Counter(outcome.status for outcome in outcomes if outcome.case == case)
        name, _, design = case.partition("__")
        label = name if name.startswith("Loom") else f"tokenizer, {name.replace('_', '-')}"
        numbers = " | ".join(f"{counts[status]:,}" for status in ("passed", "failed", "skipped"))
        lines.append(f"| {label} | {design.replace('_', '-')} | {numbers} |")
    lines += _failures(outcomes) + _skips(outcomes)
    return "\n".join(lines) + "\n"


def _failures(outcomes: Sequence[Outcome]) -> list[str]:
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    rows = [f"| {outcome.case} | {outcome.test} | {_cell(outcome.reason[:200])} |" for outcome in failed]
    return ["", "## Failed", "", "| class | test | what it said |", "|---|---|---|", *rows] if failed else []


def _skips(outcomes: Sequence[Outcome]) -> list[str]:
    """Every reason, with how often it was given and for which tests."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.status == "skipped":
            groups.setdefault(words_for(outcome.reason) or f"**not explained**: {outcome.reason}", []).append(outcome)
    lines = ["", "## Skipped", "", "| times | why | transformers says | tests |", "|---:|---|---|---|"]
    for words, group in sorted(groups.items(), key=lambda item: -len(item[1])):
        said = dict.fromkeys(_general(outcome.reason) for outcome in group)
        tests = dict.fromkeys(re.sub(r"_\d+_\w+$", "_*", outcome.test) for outcome in group)
        names = ", ".join(f"`{test}`" for test in sorted(tests))
        lines.append(f"| {len(group):,} | {_cell(words)} | {_cell('; '.join(sorted(said)))} | {names} |")
    return lines


def _general(reason: str) -> str:
    """A reason without the name of the class."""
    reason = re.sub(r"<class '[^']*'>|\b(Loom|TestLoom)\w+", "the class", reason)
    return reason.removeprefix("Skipped: ")


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
