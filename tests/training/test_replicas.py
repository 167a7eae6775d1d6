"""The hash finds what differs, and says who is odd; what it costs is one pass."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pretrain.training.replicas import Replicas, ReplicasDifferError


class Other:
    """Ranks in one process: each one's values are gathered beforehand."""

    def __init__(self, copies: list[dict[str, torch.Tensor]], parts: list[int] | None = None) -> None:
        self.parts = parts or [0] * len(copies)
        self.copies = copies
        self.told: list[list[Any]] = [[], []]
        for rank in range(len(copies)):
            self._ask(rank)

    def engine(self, rank: int, gather: Any) -> Any:
        held = self.copies[rank].items
        return SimpleNamespace(held=held, part=self.parts[rank], ranks=SimpleNamespace(gather=gather))

    def _ask(self, rank: int) -> None:
        """Note what a rank would tell at both meetings."""
        answers: list[Any] = []

        def gather(value: Any) -> list[Any]:
            answers.append(value)
            return [[0, 1], [0, 2]] if len(answers) == 1 else [{"x": 1}, {"x": 2}]

        with pytest.raises(ReplicasDifferError):
            Replicas(4, self.engine(rank, gather), ["a", "b"]).check(4, lambda: "")
        for place, answer in enumerate(answers):
            self.told[place].append(answer)

    def check(self, step: int = 4) -> str:
        """The error of rank 0; empty when all is well."""
        meetings = iter(self.told)
        replicas = Replicas(4, self.engine(0, lambda _: next(meetings)), [f"host{n}" for n in range(len(self.copies))])
        try:
            replicas.check(step, lambda: "Go on.")
        except ReplicasDifferError as error:
            return str(error)
        return ""


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(300, 400, generator=generator),
        "a.weight/exp_avg": torch.randn(300, 400, generator=generator),
        "a.weight/step": torch.tensor(7.0),
        "b.bias": torch.randn(5, generator=generator).to(torch.bfloat16),
        "empty": torch.zeros(0, 3),
    }


def changed(name: str, change: Any) -> dict[str, torch.Tensor]:
    made = tensors()
    change(made[name])
    return made


def flip(tensor: torch.Tensor, place: int, bit: int) -> None:
    tensor.view(-1).view(torch.int32)[place] ^= -(1 << 31) if bit == 31 else 1 << bit


def test_equal_copies_pass_and_one_is_compared_once() -> None:
    assert Other([tensors(), tensors(), tensors()]).check() == ""
    asked: list[Any] = []

    def gather(value: Any) -> list[Any]:
        asked.append(value)
        return [value, value]

    engine = SimpleNamespace(held=tensors().items, part=0, ranks=SimpleNamespace(gather=gather))
    replicas = Replicas(4, engine, ["a", "b"])  # type: ignore[arg-type]
    assert [step for step in range(1, 10) if replicas.due(step)] == [4, 8]
    replicas.check(4, lambda: "")
    replicas.check(4, lambda: "")  # a save of the same step
    assert len(asked) == 1


def test_any_single_bit_is_found() -> None:
    whole = Replicas(1, None, [])._hash  # type: ignore[arg-type]
    expected = int(whole(tensors()["a.weight"]))
    for bit in range(32):
        for place in (0, 1, 65_535, 65_536, 119_999):
            made = changed("a.weight", lambda tensor, place=place, bit=bit: flip(tensor, place, bit))
            assert int(whole(made["a.weight"])) != expected, (bit, place)


def test_changes_that_could_cancel_are_found() -> None:
    whole = Replicas(1, None, [])._hash  # type: ignore[arg-type]
    weight = tensors()["a.weight"]
    expected = int(whole(weight))
    signs = weight.clone()
    signs.view(-1)[[10, 70_000]] *= -1
    swapped = weight.clone()
    swapped.view(-1)[[3, 65_539]] = swapped.view(-1)[[65_539, 3]]  # the same place of two chunks
    chunks = torch.cat([weight.view(-1)[65_536:], weight.view(-1)[:65_536]])
    zero = torch.zeros(4)
    assert len({expected, *(int(whole(tensor)) for tensor in (signs, swapped, chunks, -weight))}) == 5
    assert int(whole(zero)) != int(whole(-zero))  # bits, not values
    assert int(whole(torch.tensor([torch.nan]))) == int(whole(torch.tensor([torch.nan])))
    assert int(whole(weight.t())) == int(whole(weight.t().contiguous()))


def test_the_highest_bit_alone_is_told() -> None:
    """What the ranks tell each other first is as wide as the hashes: the sign of one float64 changes nothing below."""
    exact = {"a": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    other = {"a": torch.tensor([1.0, -2.0], dtype=torch.float64)}
    assert "`a` is the first tensor that differs" in Other([exact, other]).check()


def test_the_minority_is_named_with_the_first_tensor() -> None:
    odd = changed("a.weight/exp_avg", lambda tensor: flip(tensor, 5, 0))
    told = Other([tensors(), tensors(), odd]).check(8)
    assert told.startswith("step 8: rank 2 (host2) no longer holds the same as the other ranks; `a.weight/exp_avg`")
    assert "Go on." in told
    other = changed("b.bias", lambda tensor: tensor.neg_())
    assert "ranks 1 (host1), 2 (host2) no longer hold" in Other([tensors(), other, odd, tensors(), tensors()]).check()


def test_without_a_majority_nobody_is_accused() -> None:
    odd = changed("b.bias", lambda tensor: tensor.neg_())
    told = Other([tensors(), odd]).check()
    assert "ranks 0 (host0), 1 (host1) no longer hold the same, and it cannot be told which" in told
    assert "cannot be told" in Other([tensors(), odd, odd, tensors()]).check()


def test_only_ranks_of_one_part_are_compared() -> None:
    """Hybrid sharding: ranks 0 and 2 hold one half, 1 and 3 the other."""
    halves = [tensors(0), tensors(1), tensors(0), tensors(1)]
    assert Other(halves, [0, 1, 0, 1]).check() == ""
    halves[3]["a.weight/step"] += 1
    assert "ranks 1 (host1), 3 (host3) no longer hold" in Other(halves, [0, 1, 0, 1]).check()
    assert "`a.weight/step` is the first" in Other(halves, [0, 1, 0, 1]).check()
