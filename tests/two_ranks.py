"""Two ranks as two threads of one process, over real gloo groups: an agreement is tested without starting anything.

What lives here: the groups and the threads. What must not: assertions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Self

from torch import distributed

from pretrain.ranks import Ranks

LONG = 60.0


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    """Ranks that find each other through a store in memory."""

    store: Any = None
    groups: int = 0

    def another_group(self, *, timeout: float) -> Self:
        """Called by both ranks, in the same order."""
        store = distributed.PrefixStore(str(self.groups), self.store)
        group = distributed.ProcessGroupGloo(store, self.rank, self.world, timedelta(seconds=timeout))
        object.__setattr__(self, "groups", self.groups + 1)
        return replace(self, group=group, store=store, groups=0)


def two_ranks(function: Callable[[ThreadRanks], Any], *, timeout: float = LONG) -> list[Any]:
    """What `function` returns on each rank, or the error that it raises.

    Args:
        function: gets the rank's side of a group.
        timeout: seconds that a rank waits for the other one in that group.
    """
    store = distributed.HashStore()
    found: list[Any] = [None, None]

    def run(rank: int) -> None:
        try:
            found[rank] = function(ThreadRanks(rank, 2, rank, store=store).another_group(timeout=timeout))
        except BaseException as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    return found
