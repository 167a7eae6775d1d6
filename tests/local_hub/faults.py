"""Faults that the local Hub makes when it is told to: lost connections, refusals, slow answers, lies.

What lives here: which request is hit, and by what. What must not: how an answer is sent.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["drop", "cut", "lose", "status", "slow", "hang"]


@dataclass
class Fault:
    """One fault and the requests that it hits.

    Attributes:
        kind: `drop` closes the connection before the request is read, `cut` in the middle of its body, `lose` after it
            was carried out and before the answer; `status` answers with `status`; `slow` waits `seconds` first; `hang`
            never answers.
        method: of the request; any when empty.
        path: a regular expression that is looked for in the path.
        after: requests that fit and are spared first.
        times: how often it strikes; None: for ever.
        status: the answer of `status`.
        retry_after: seconds, sent as `Retry-After` with it.
        seconds: of `slow`.
    """

    kind: Kind
    method: str = ""
    path: str = ""
    after: int = 0
    times: int | None = 1
    status: int = 503
    retry_after: int | None = None
    seconds: float = 0.0

    def hits(self, method: str, path: str) -> bool:
        """Whether it strikes this request; counts."""
        if (self.method and method != self.method) or not re.search(self.path, path):
            return False
        if self.after > 0:
            self.after -= 1
            return False
        if self.times is not None:
            if self.times <= 0:
                return False
            self.times -= 1
        return True


@dataclass
class Faults:
    """What is planned to go wrong.

    Attributes:
        lying_sizes: path in the repository -> the size that is claimed of it.
        lying_digests: path in the repository -> the SHA-256 that is claimed of it.
        unlisted: paths that are kept silent about.
    """

    lying_sizes: dict[str, int] = field(default_factory=dict)
    lying_digests: dict[str, str] = field(default_factory=dict)
    unlisted: set[str] = field(default_factory=set)
    _planned: list[Fault] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, *faults: Fault) -> None:
        """Plan faults; of several that hit a request the first one counts."""
        with self._lock:
            self._planned += faults

    def clear(self) -> None:
        """Everything works again."""
        with self._lock:
            self._planned.clear()
        self.lying_sizes.clear()
        self.lying_digests.clear()
        self.unlisted.clear()

    def of(self, method: str, path: str) -> Fault | None:
        """The fault that strikes a request."""
        with self._lock:
            return next((fault for fault in self._planned if fault.hits(method, path)), None)
