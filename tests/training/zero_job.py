"""What each process of tests/training/test_zero.py runs: DeepSpeed engines one after the other, against one process.

Called as `python zero_job.py OUT.json SCENARIO...`; rank 0 writes what was found. Every engine trains a tiny tied GPT-2
on ragged rows, all ranks together on one global batch.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.config import RunConfig, config_from_dict
from pretrain.files import ArtifactError
from pretrain.models.configuration_loom import LoomDecoderConfig
from pretrain.models.modeling_loom_decoder import LoomDecoderForCausalLM
from pretrain.ranks import Ranks
from pretrain.training.engines import Engine, make_engine
from pretrain.training.engines.job import close_job, open_job
from pretrain.training.optim import build_optimizer
from pretrain.training.state import whole_state

VOCABULARY, LENGTH, ROWS, LIMIT = 37, 10, 12, 0.5
FROZEN = "model.layers.0.mlp.up_proj.weight"


def tiny_model() -> nn.Module:
    """Sizes that no number of ranks divides evenly."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 18, "intermediate_size": 46, "max_position_embeddings": 16}
    return LoomDecoderForCausalLM(
        LoomDecoderConfig(architecture="gpt2", num_hidden_layers=2, num_attention_heads=2, **sizes)
    )


def rows_of(step: int) -> tuple[Tensor, Tensor]:
    generator = np.random.default_rng(step % 10)
    ids = generator.integers(0, VOCABULARY, (ROWS, LENGTH))
    labels = np.where(np.arange(LENGTH) < generator.integers(2, LENGTH, (ROWS, 1)), ids, -100)
    return torch.tensor(ids), torch.tensor(labels)


def configured(strategy: str, optimizer: str, **train: Any) -> RunConfig:
    lr = 0.01 if optimizer == "muon" else 2e-3
    base = {"steps": 10, "batch_tokens": ROWS * LENGTH, "precision": "fp32", "max_grad_norm": LIMIT}
    return config_from_dict(
        {
            "name": "toy",
            "out": "unused",
            "data": {"train": ["x"], "sequence_length": LENGTH},
            "model": {"architecture": "gpt2"},
            "objective": {"kind": "causal"},
            "optimizer": {"name": optimizer, "lr": lr, "weight_decay": 0.1},
            "train": base | {"strategy": strategy} | train,
        }
    )


def loss_of(model: Callable[..., Any], ids: Tensor, labels: Tensor, targets: int) -> Tensor:
    return model(input_ids=ids, labels=labels, num_items_in_batch=targets).loss


def engine_of(config: RunConfig, model: nn.Module | None = None) -> Engine:
    job = open_job(config)
    model = model or tiny_model()
    return make_engine(
        job.strategy, config.train, job.accelerator, job.ranks, model, build_optimizer(model, config.optimizer)
    )


def accumulate(engine: Engine, step: int, micro: int, factor: float = 1.0) -> float:
    """The gradients of this rank's rows, `micro` at a time; returns the loss of the global batch."""
    ids, labels = (rows[engine.ranks.rank :: engine.ranks.world] for rows in rows_of(step))
    targets = int((rows_of(step)[1][:, 1:] != -100).sum())
    total = 0.0
    for start in range(0, len(ids), micro):
        part = slice(start, start + micro)

        def loss(part: slice = part) -> Tensor:
            return loss_of(engine.model, ids[part], labels[part], targets) * factor

        total += float(engine.backward(loss, last=start + micro >= len(ids)))
    return engine.ranks.sum([total])[0]


def set_rate(optimizer: torch.optim.Optimizer, step: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * min(1.0, (step + 1) / 10)


def train(engine: Engine, steps: range, micro: int) -> list[tuple[float, float]]:
    """(loss, norm) of each step."""
    found = []
    for step in steps:
        set_rate(engine.optimizer, step)
        loss = accumulate(engine, step, micro)
        found.append((loss, engine.update(engine.config.max_grad_norm, lambda norm: True)))
    return found


class Alone:
    """One process with the plain optimizer, on the same global batches."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.model = tiny_model()
        self.optimizer = build_optimizer(self.model, config.optimizer)

    def train(self, steps: range) -> list[tuple[float, float]]:
        found = []
        for step in steps:
            set_rate(self.optimizer, step)
            ids, labels = rows_of(step)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.config.train.precision == "bf16"):
                loss = loss_of(self.model, ids, labels, int((labels[:, 1:] != -100).sum()))
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.max_grad_norm or math.inf)
            self.optimizer.step()
            self.optimizer.zero_grad()
            found.append((loss.item(), float(norm)))
        return found


def whole(engine: Engine) -> dict[str, Tensor]:
    """Every weight and state tensor."""
    tensors = {name: engine.parameter(name).clone() for name in engine.names()}
    for name in engine.names():
        tensors |= {f"{name}/{key}": tensor.clone() for key, tensor in engine.state(name).items()}
    return tensors


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def move(source: Engine, target: Engine) -> None:
    weights = {name: source.parameter(name).clone() for name in source.names()}
    tensors = {name: tensor for name, tensor in whole(source).items() if "/" in name}
    target.load(weights, whole_state(source.groups(), tensors))


# --- scenarios ------------------------------------------------------------------------------------------------------


def parity(strategy: str, optimizer: str, micro: int, steps: int = 50, **keys: Any) -> dict[str, Any]:
    """The largest difference of loss and norm from one process; the share of steps that were clipped."""
    config = configured(strategy, optimizer, **keys)
    alone, engine = Alone(config).train(range(steps)), engine_of(config)
    got = train(engine, range(steps), micro)
    names = dict(tiny_model().named_parameters())
    return {
        "loss": max(abs(a[0] - b[0]) for a, b in zip(alone, got, strict=True)),
        "norm": max(abs(a[1] - b[1]) for a, b in zip(alone, got, strict=True)),
        "clipped": sum(norm > LIMIT for _, norm in got) / steps,
        "falls": got[0][0] - got[-1][0],
        "names": engine.names() == sorted(names),
        "steps": sorted({float(engine.state(name)["step"]) for name in engine.names()}),
    }


def split_parameters() -> str:
    """A DeepSpeed file with which ZeRO-3 splits even tiny parameters, into many sub-groups."""
    path = Path(tempfile.mkdtemp()) / "deepspeed.json"
    section = {"stage3_param_persistence_threshold": 0, "sub_group_size": 600, "stage": "auto"}
    path.write_text(json.dumps({"zero_optimization": section, "gradient_clipping": "auto"}))
    return str(path)


def refusals(strategy: str, **keys: Any) -> dict[str, Any]:
    """Steps that are refused, gradients that are thrown away, gradients that are not finite."""
    engine = engine_of(configured(strategy, "muon", **keys))
    found: dict[str, Any] = {"fresh": all(engine.state(name) == {} for name in engine.names())}
    train(engine, range(2), 4)
    before = whole(engine)
    asked: list[float] = []
    accumulate(engine, 2, 2)
    norm = engine.update(LIMIT, lambda norm: bool(asked.append(norm)))
    found["asked once"] = asked == [norm] and math.isfinite(norm)
    found["refused: nothing moved"] = same(before, whole(engine))
    asked.clear()
    accumulate(engine, 3, 4, factor=math.nan if engine.ranks.rank == engine.ranks.world - 1 else 1.0)
    engine.update(LIMIT, lambda norm: bool(asked.append(norm)) or True)
    found["not finite: nothing moved"] = same(before, whole(engine))
    found["not finite: all ranks know"] = all(not math.isfinite(value) for value in asked) and len(asked) == 1
    accumulate(engine, 4, 4)
    engine.drop()
    ids, labels = rows_of(5)
    engine.backward(lambda: loss_of(engine.model, ids, labels, 1), last=False)
    engine.drop()
    found["dropped: nothing moved"] = same(before, whole(engine))
    # The next step is the one that would have followed at once.
    again = engine_of(configured(strategy, "muon", **keys))
    move(engine, again)
    found["loaded"] = same(before, whole(again))
    found["goes on"] = train(engine, range(5, 7), 2) == train(again, range(5, 7), 2)
    found["goes on: bits"] = same(whole(engine), whole(again))
    engine.clear_state()
    found["cleared"] = all(engine.state(name) == {} for name in engine.names())
    return found


def relay(*optimizers: str) -> dict[str, Any]:
    """One state through all stages and back; the next loss is that of the straight run."""
    found: dict[str, Any] = {}
    for optimizer in optimizers:
        straight = Alone(configured("zero1", optimizer)).train(range(8))
        engine = engine_of(configured("zero1", optimizer))
        train(engine, range(4), 4)
        first, step = whole(engine), 4
        for strategy, keys in (
            ("zero3", {"deepspeed": split_parameters()}),
            ("fsdp2", {}),
            ("zero2", {"offload": "optimizer"}),
            ("zero1", {}),
        ):
            following = engine_of(configured(strategy, optimizer, **keys))
            move(engine, following)
            found[f"{optimizer}: bits into {strategy}"] = same(first, whole(following))
            ((loss, _),) = train(following, range(step, step + 1), 2)
            found[f"{optimizer}: loss in {strategy}"] = abs(loss - straight[step][0]) < 1e-5
            engine, first, step = following, whole(following), step + 1
    return found


def evaluation(strategy: str, **keys: Any) -> dict[str, Any]:
    """Forward passes without gradients between steps."""
    config = configured(strategy, "adamw", **keys)
    alone, engine = Alone(config), engine_of(config)
    alone.train(range(2))
    train(engine, range(2), 4)
    ids, labels = rows_of(9)
    targets = int((labels[:, 1:] != -100).sum())
    engine.model.eval()
    with torch.no_grad():
        difference = loss_of(engine.model, ids, labels, targets) - loss_of(alone.model, ids, labels, targets)
        through_bare = loss_of(engine.bare, ids, labels, targets) - loss_of(alone.model, ids, labels, targets)
    engine.model.train()
    after = [abs(a[0] - b[0]) for a, b in zip(alone.train(range(2, 4)), train(engine, range(2, 4), 2), strict=True)]
    return {"loss": abs(float(difference)), "bare": abs(float(through_bare)), "after": max(after)}


def frozen(strategy: str, other: str) -> dict[str, Any]:
    """A weight that is not trained; and state that flat buffers cannot hold."""

    def model() -> nn.Module:
        model = tiny_model()
        model.get_parameter(FROZEN).requires_grad_(False)
        return model

    config = configured(strategy, "muon", deepspeed=split_parameters())
    engine, start = engine_of(config, model()), tiny_model().get_parameter(FROZEN).detach()
    losses = [loss for loss, _ in train(engine, range(3), 4)]
    following = engine_of(configured(other, "muon"), model())
    move(engine, following)
    found = {
        "named": FROZEN in engine.names() and not engine.shapes()[FROZEN].trained,
        "kept": torch.equal(engine.parameter(FROZEN), start) and engine.state(FROZEN) == {},
        "trains": len(set(losses)) == 3,
        "moves": same(whole(engine), whole(following)),
    }
    before = whole(following)
    weights = {name: tensor for name, tensor in before.items() if "/" not in name}
    state = whole_state(following.groups(), {name: tensor for name, tensor in before.items() if "/" in name})
    one = next(name for name in state.tensors if name.endswith("/step"))
    try:
        following.load(weights, dataclasses.replace(state, tensors={**state.tensors, one: torch.tensor(99.0)}))
    except ArtifactError as error:
        found["other steps are refused"] = "99 updates of" in str(error) or "and 99 of" in str(error)
    found["refused: nothing moved"] = same(before, whole(following))
    return found


def unused(strategy: str) -> str:
    """A parameter that never gets a gradient is refused by name."""
    model = tiny_model()
    model.register_parameter("spare", nn.Parameter(torch.ones(3)))
    engine = engine_of(configured(strategy, "adamw"), model)
    accumulate(engine, 0, 4)
    try:
        engine.update(LIMIT, lambda norm: True)
    except ValueError as error:
        return str(error)
    return "nothing was said"


def scaled(strategy: str, **keys: Any) -> dict[str, Any]:
    """The loss scale of fp16, on fp32 arithmetic, where a power of two changes no bit."""
    plain, engine = (engine_of(configured(strategy, "muon", **keys)) for _ in range(2))
    engine._set_scale(1024.0)
    found: dict[str, Any] = {"same": train(plain, range(3), 4) == train(engine, range(3), 4), "on": engine.scaled}
    before = whole(engine)
    found["same bits"] = same(before, whole(plain))
    accumulate(engine, 3, 4, factor=math.inf if engine.ranks.rank == 0 else 1.0)
    engine.update(LIMIT, lambda norm: math.isfinite(norm))
    found["overflow: nothing moved"] = same(before, whole(engine))
    found["overflow: halved"] = engine.scaler_state()["scale"] == 512.0
    engine._good_steps = 1999
    train(engine, range(3, 4), 4)
    found["doubled"] = engine.scaler_state()["scale"] == 1024.0
    plain.load_scaler_state(engine.scaler_state())
    found["plain engines have none"] = plain.scaler_state() is None
    return found


def checks() -> list[list[str]]:
    """What is compared at start, and that a setting that was changed underneath shows."""
    engine = engine_of(configured("zero2", "muon", precision="bf16"))
    agreed = [what for what, ours, its in engine.checks() if ours != its]
    engine.model.optimizer.clip_grad = 1.0
    return [agreed, [what for what, ours, its in engine.checks() if ours != its]]


SCENARIOS: dict[str, Callable[[], Any]] = {
    "zero1 muon": lambda: parity("zero1", "muon", 4),
    "zero2 muon": lambda: parity("zero2", "muon", 2),
    "zero3 muon": lambda: parity("zero3", "muon", 4, deepspeed=split_parameters()),
    "zero3 muon short": lambda: parity("zero3", "muon", 2, steps=12, deepspeed=split_parameters()),
    "zero1 adamw": lambda: parity("zero1", "adamw", 1),
    "zero2 adamw": lambda: parity("zero2", "adamw", 4),
    "zero3 adamw": lambda: parity("zero3", "adamw", 2),
    "zero1 stable": lambda: parity("zero1", "stable-adamw", 2),
    "zero3 stable": lambda: parity("zero3", "stable-adamw", 2),
    "zero1 offload": lambda: parity("zero1", "muon", 2, offload="optimizer"),
    "zero2 offload": lambda: parity("zero2", "adamw", 1, offload="optimizer"),
    "zero3 offload": lambda: parity("zero3", "muon", 2, offload="all"),
    "fsdp2 muon": lambda: parity("fsdp2", "muon", 4),
    "fsdp2 adamw": lambda: parity("fsdp2", "adamw", 2),
    "fsdp2 stable": lambda: parity("fsdp2", "stable-adamw", 1),
    "unclipped": lambda: parity("zero2", "muon", 2, steps=5, max_grad_norm=None),
    "zero2 bf16": lambda: parity("zero2", "muon", 2, precision="bf16"),
    "zero3 bf16": lambda: parity("zero3", "adamw", 4, precision="bf16"),
    "zero1 refusals": lambda: refusals("zero1"),
    "zero2 refusals": lambda: refusals("zero2"),
    "zero3 refusals": lambda: refusals("zero3", deepspeed=split_parameters()),
    "offload refusals": lambda: refusals("zero2", offload="optimizer"),
    "zero3 offload refusals": lambda: refusals("zero3", offload="all"),
    "relay": lambda: relay("muon"),
    "relay adamw": lambda: relay("adamw", "stable-adamw"),
    "zero2 evaluation": lambda: evaluation("zero2"),
    "zero3 evaluation": lambda: evaluation("zero3", deepspeed=split_parameters()),
    "zero1 frozen": lambda: frozen("zero1", "zero3"),
    "zero3 frozen": lambda: frozen("zero3", "zero2"),
    "zero2 unused": lambda: unused("zero2"),
    "zero3 unused": lambda: unused("zero3"),
    "zero2 scaled": lambda: scaled("zero2"),
    "zero3 scaled": lambda: scaled("zero3", deepspeed=split_parameters()),
    "offload scaled": lambda: scaled("zero1", offload="optimizer"),
    "checks": checks,
}


def main() -> None:
    found = {}
    for name in sys.argv[2:]:
        found[name] = SCENARIOS[name]()
    ranks = Ranks.of_job(timeout=60)
    everyone = ranks.gather(found)
    if ranks.main:
        Path(sys.argv[1]).write_text(json.dumps(everyone))
    close_job()


if __name__ == "__main__":
    main()
