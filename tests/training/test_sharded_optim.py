"""Optimizers on parts of parameters: flat buffers cut anywhere do what one process does. Ranks are threads here."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain.training import sharded_optim
from pretrain.training.optim import MuonAdamW, StableAdamW
from pretrain.training.sharded_optim import FlatLayout, Member, Piece, sliced_pieces, spread_pieces

SHAPES = {"a": (6, 10), "b": (7, 3), "c": (5, 5), "d": (6, 10), "e": (10, 6)}
TRANSPOSED = {"b", "e"}


class Together:
    """A process group of threads."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.barrier = threading.Barrier(world, timeout=20)
        self.here = threading.local()
        self.values: dict[int, Tensor] = {}
        self.calls: list[tuple[int, int]] = []

    def all_reduce(self, tensor: Tensor, group: Any) -> None:
        assert group is self
        self.calls.append((self.here.rank, tensor.numel()))
        self.values[self.here.rank] = tensor.clone()
        self.barrier.wait()
        total = sum(self.values[rank] for rank in range(self.world))
        self.barrier.wait()
        tensor.copy_(total)

    def all_gather(self, outputs: list[Tensor], tensor: Tensor, group: Any) -> None:
        assert group is self
        self.values[self.here.rank] = tensor.clone()
        self.barrier.wait()
        for rank, output in enumerate(outputs):
            output.copy_(self.values[rank])
        self.barrier.wait()

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        """What `function` gives on each rank."""
        found: dict[int, Any] = {}

        def work(rank: int) -> None:
            self.here.rank = rank
            try:
                found[rank] = function(rank)
            except BaseException:
                self.barrier.abort()
                raise

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [found[rank] for rank in range(self.world)]


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Together]:
    def make(world: int) -> Together:
        group = Together(world)
        monkeypatch.setattr(sharded_optim.distributed, "all_reduce", group.all_reduce)
        monkeypatch.setattr(sharded_optim.distributed, "all_gather", group.all_gather)
        monkeypatch.setattr(sharded_optim.distributed, "get_world_size", lambda group: group.world)
        return group

    return make


def members() -> list[Member]:
    return [Member(name, shape, name in TRANSPOSED) for name, shape in SHAPES.items()]


def offsets() -> list[int]:
    found, total = [], 0
    for member in members():
        found.append(total)
        total += member.numel
    return found


def pieces_of(cut: str, rank: int, world: int) -> tuple[tuple[Piece, ...], int]:
    """The pieces, and the size of the buffer."""
    total = sum(member.numel for member in members())
    if cut == "sliced":
        size = -(-total // (2 * world)) * 2  # an even number, as DeepSpeed's alignment makes it
        return sliced_pieces(members(), offsets(), size, rank), size
    return spread_pieces(members(), rank, world), sum(-(-member.numel // world) for member in members())


@pytest.mark.parametrize("world", [1, 2, 3, 4, 50])
@pytest.mark.parametrize("cut", ["sliced", "spread"])
def test_pieces_hold_every_element_once(cut: str, world: int) -> None:
    wholes = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    rebuilt = {name: torch.full((wholes[name].numel(),), torch.nan) for name in SHAPES}
    holders = dict.fromkeys(SHAPES, 0)
    shared = []
    for rank in range(world):
        pieces, size = pieces_of(cut, rank, world)
        flat = torch.zeros(size)
        for piece in pieces:
            assert flat.narrow(0, piece.offset, piece.numel).count_nonzero() == 0, "two pieces at one place"
            piece.of_flat(flat).copy_(piece.of_whole(wholes[piece.name]))
            rebuilt[piece.name][piece.start : piece.start + piece.numel] = piece.of_flat(flat)
            holders[piece.name] += piece.numel > 0
        shared.append([piece.shared for piece in pieces])
    for name, whole in wholes.items():
        assert torch.equal(rebuilt[name].view(whole.shape), whole)
    assert all(flags == shared[0] for flags in shared), "ranks must agree on who talks"
    for name, flag in zip(SHAPES, shared[0], strict=True):
        assert flag or holders[name] == 1, name


@pytest.mark.parametrize("cut", ["sliced", "spread"])
def test_gathering_keeps_every_bit(together: Callable[[int], Together], cut: str) -> None:
    group = together(3)
    bits = torch.tensor([0.0, -0.0, 1.5, torch.nan, torch.inf, -torch.inf, 1e-45, -3.0, 2.0]).view(3, 3)
    odd_nan = torch.tensor([0x7FC0_1234], dtype=torch.int32).view(torch.float32)
    bits[1, 0] = odd_nan[0]

    def gather(rank: int) -> Tensor:
        member = Member("x", (3, 3))
        (piece,) = spread_pieces([member], rank, 3) if cut == "spread" else sliced_pieces([member], [2], 4, rank)
        return FlatLayout((piece,), group, torch.device("cpu")).gather(piece, piece.of_whole(bits))

    for whole in group.run(gather):
        assert torch.equal(whole.view(torch.int32), bits.view(torch.int32))


def build(kind: str, name: str, parameters: list[Tensor], flags: list[bool]) -> torch.optim.Optimizer:
    group = {"params": parameters, "name": name, "lr": 0.05, "weight_decay": 0.1, "transposed": flags}
    return MuonAdamW([group], fused=True) if kind == "muon" else StableAdamW([group])


def gradient(name: str, step: int) -> Tensor:
    seed = 100 * step + list(SHAPES).index(name)
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(seed)) * (9.0 if step == 2 else 1.0)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("cut", ["sliced", "spread"])
@pytest.mark.parametrize(("kind", "name"), [("muon", "muon"), ("muon", "adam_decay"), ("stable", "adam_decay")])
def test_flat_buffers_are_updated_as_one_process_updates_matrices(
    together: Callable[[int], Together], kind: str, name: str, cut: str, world: int
) -> None:
    start = {key: torch.randn(shape, generator=torch.Generator().manual_seed(1)) for key, shape in SHAPES.items()}
    alone = {key: nn.Parameter(tensor.clone()) for key, tensor in start.items()}
    reference = build(kind, name, list(alone.values()), [key in TRANSPOSED for key in SHAPES])
    for step in range(4):
        for key, parameter in alone.items():
            parameter.grad = gradient(key, step)
        reference.step()
    group = together(world)

    def train(rank: int) -> tuple[tuple[Piece, ...], Tensor, dict[str, Tensor]]:
        pieces, size = pieces_of(cut, rank, world)
        flat = torch.zeros(size)
        for piece in pieces:
            piece.of_flat(flat).copy_(piece.of_whole(start[piece.name]))
        buffer = nn.Parameter(flat.view(1, -1))  # Muon's group takes matrices when it is built
        optimizer: Any = build(kind, name, [buffer], [False])
        buffer.data = flat
        optimizer.layouts = {buffer: FlatLayout(pieces, group if world > 1 else None, torch.device("cpu"))}
        for step in range(4):
            buffer.grad = torch.zeros(size)
            for piece in pieces:
                piece.of_flat(buffer.grad).copy_(piece.of_whole(gradient(piece.name, step)))
            optimizer.step()
        return pieces, buffer.detach(), optimizer.state[buffer]

    states = {key: reference.state[parameter] for key, parameter in alone.items()}
    for pieces, flat, state in group.run(train):
        padding = torch.ones_like(flat)
        assert float(state["step"]) == 4.0
        for piece in pieces:
            expected = piece.of_whole(alone[piece.name].detach())
            torch.testing.assert_close(piece.of_flat(flat), expected, rtol=1e-5, atol=1e-5)
            for key in set(state) - {"step"}:
                torch.testing.assert_close(piece.of_flat(state[key]), piece.of_whole(states[piece.name][key]))
            piece.of_flat(padding).zero_()
        assert (flat * padding).count_nonzero() == 0, "the padding moved"
    if name == "muon" and cut == "sliced":
        gathered = {numel for _, numel in group.calls}
        assert gathered <= {tensor.numel() for tensor in start.values()}, "one matrix at a time"
        # Only what a cut goes through travels.
        pieces, _ = pieces_of(cut, 0, world)
        assert len(group.calls) == 4 * world * sum(piece.shared for piece in pieces) * (world > 1)
