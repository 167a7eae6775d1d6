"""Counts the bytes of all tensors that are alive, operation by operation, and keeps the largest sum.

What lives here: a dispatch mode that sees every operation's results, forward and backward, and holds a weak reference
to each storage. What must not: any expectation. Scratch memory within a kernel is not a tensor and is not seen.
"""

from __future__ import annotations

import traceback
import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """While active: `current` and `peak` bytes of the tensors made in it and of those that it was told of.

    With `explain`, `at_peak` tells the bytes of each kind of tensor that was alive at the peak (slow). Storages that
    are emptied and filled again, as fully_shard does with whole parameters, count with the size they have.
    """

    def __init__(self, *, explain: bool = False) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self.at_peak: Counter[str] = Counter()
        self._explain = explain
        self._alive: dict[int, tuple[weakref.ref[Any], str]] = {}
        self._sizes: dict[int, int] = {}
        self._resize: Any = None

    def __enter__(self) -> Self:
        original = self._resize = torch.UntypedStorage.resize_

        def resize(storage: Any, size: int) -> Any:
            result = original(storage, size)
            key = storage._cdata
            if key in self._alive:
                self.current += size - self._sizes[key]
                self._sizes[key] = size
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def know(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were made outside."""
        for tensor in tensors:
            self._see(tensor, "known")

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        self.peak, self.at_peak = 0, Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        label = self._label(func) if self._explain else ""
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf, label)
        if self.current > self.peak:
            self.peak = self.current
            if self._explain:
                self.at_peak = self._bytes()
        return result

    def _bytes(self) -> Counter[str]:
        sizes: Counter[str] = Counter()
        for key, (_, label) in self._alive.items():
            sizes[label] += self._sizes[key]
        return sizes

    def _see(self, tensor: Tensor, label: str) -> None:
        local = getattr(tensor, "_local_tensor", tensor)  # a sharded tensor holds its own part
        storage = local.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return

        def forget(reference: Any) -> None:
            known = self._alive.get(key)
            if known is not None and known[0] is reference:
                del self._alive[key]
                self.current -= self._sizes.pop(key)

        what = f"{label} {tuple(local.shape)} {local.dtype}" if self._explain else ""
        self._alive[key] = (weakref.ref(storage, forget), what)
        self._sizes[key] = storage.nbytes()
        self.current += storage.nbytes()

    @staticmethod
    def _label(func: Any) -> str:
        frames = [frame for frame in traceback.extract_stack() if "/pretrain/" in frame.filename]
        place = f"{frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno}" if frames else "-"
        return f"{func.name().removeprefix('aten::')} {place}"
