"""Numbers of a step beside its loss: parts of the loss, and how often the model was right.

What lives here: how what the forward passes of a step say of themselves becomes numbers of the global batch. What must
not: what the numbers mean; a model names them in the `parts` of its output.

A part is a pair on the device, a sum and what it is divided by, and every forward pass names the same ones, on every
process. Both add up over micro-batches and ranks, so that the number is that of the global batch however it is cut.
Nobody waits for the device: the pairs of a step that is logged are sent to the host behind its work, and read when the
loss of that step is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed


class Parts:
    """The pairs of one step, added up."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._sums: Tensor | None = None
        self._mark: Any = None

    def add(self, output: Any) -> None:
        """Add what a forward pass says: `output.parts`, (2,) tensors by name; an output without them adds nothing."""
        pairs: Mapping[str, Tensor] | None = getattr(output, "parts", None)
        if not pairs:
            return
        names = tuple(sorted(pairs))
        if self._names not in ((), names):
            raise ValueError(
                f"the output's parts are {', '.join(names)}, and {', '.join(self._names)} in another micro-batch: each "
                "forward pass on each process has to name the same ones, with 0 for what it has none of"
            )
        own = torch.stack([pairs[name].detach().float() for name in names])  # (parts, 2)
        self._names, self._sums = names, own if self._sums is None else self._sums + own

    def send(self, world: int) -> None:
        """Add up over the processes, and send the sums to the host. Called by all ranks together, once a step."""
        if self._sums is None:
            return
        if world > 1:
            distributed.all_reduce(self._sums)
        if self._sums.device.type == "cuda":
            copy = torch.empty(self._sums.shape, pin_memory=True)
            copy.copy_(self._sums, non_blocking=True)
            event: Any = torch.cuda.Event
            self._mark = event(blocking=True)
            self._mark.record()
            self._sums = copy

    def numbers(self) -> dict[str, float]:
        """Sum over divisor of each part, after `send`; left out where there was nothing to divide by."""
        if self._sums is None:
            return {}
        if self._mark is not None:
            self._mark.synchronize()
        pairs = zip(self._names, self._sums.tolist(), strict=True)
        return {name: total / by for name, (total, by) in pairs if by}
