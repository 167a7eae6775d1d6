"""Which pieces share a row: best-fit decreasing over a histogram of their sizes, in one row or in a pair of rows.

What lives here: the choice. What must not: pieces, or where they come from.

Pieces of one size are handled together, and rows of one make too: the work does not grow with the number of documents.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass
class Group:
    """`count` rows of one make: `items` are (length, how many of it) in the order they were placed."""

    count: int
    documents: int
    items: tuple[tuple[int, int], ...]


def best_fit(histogram: npt.NDArray[Any], capacity: int, cap: int) -> list[Group]:
    """Best-fit decreasing over a histogram: each length goes where the least room is left that still holds it."""
    done: list[Group] = []
    open_rows: dict[int, list[Group]] = {}  # by room left
    rooms: list[int] = []  # the keys of open_rows, sorted

    def put(group: Group, room: int) -> None:
        if room == 0 or group.documents >= cap:
            done.append(group)
            return
        if room not in open_rows:
            open_rows[room] = []
            insort(rooms, room)
        open_rows[room].append(group)

    for length in range(capacity, 0, -1):
        left = int(histogram[length])
        while left:
            at = bisect_left(rooms, length)
            if at == len(rooms):
                fill = min(capacity // length, cap, left)
                put(Group(left // fill, fill, ((length, fill),)), capacity - fill * length)
                left %= fill
                continue
            room = rooms[at]
            group = open_rows[room][-1]
            fill = min(room // length, cap - group.documents, left)
            count = min(group.count, left // fill)
            left -= count * fill
            group.count -= count
            if group.count == 0:
                open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room]
                rooms.pop(at)
            put(Group(count, group.documents + fill, (*group.items, (length, fill))), room - fill * length)
    return done + [group for room in rooms for group in open_rows[room]]


def best_fit_pairs(sizes: IntArray, counts: IntArray, capacity: tuple[int, int], cap: int) -> list[Group]:
    """The same where each piece takes room in two rows at once, as an encoder's and a decoder's.

    Args:
        sizes: (C, 2) of the classes of pieces; each fits an empty pair of rows.
        counts: (C,) pieces of each class.
        capacity: positions of the two rows.
        cap: most pieces of a row.

    Returns:
        Groups whose items name classes; they are placed from the last to the first.
    """
    done: list[Group] = []
    smallest = np.minimum.accumulate(sizes, axis=0)  # (C, 2) what the classes still to come need at least
    open_groups: list[Group] = []
    rooms = np.empty((0, 2), dtype=np.int64)  # of each open group
    share = 1.0 / np.array(capacity)
    for number in range(len(sizes) - 1, -1, -1):
        size, left = sizes[number], int(counts[number])
        added: list[tuple[Group, IntArray]] = []
        while left:
            rest = rooms - size
            fitting = np.flatnonzero((rest >= 0).all(axis=1))
            if len(fitting):
                at = int(fitting[np.argmin((rest[fitting] * share).sum(axis=1))])
                group, room = open_groups[at], rooms[at].copy()
                fill = min(int((room // size).min()), cap - group.documents, left)
                count = min(group.count, left // fill)
                group.count -= count
                if group.count == 0:
                    open_groups.pop(at)
                    rooms = np.delete(rooms, at, axis=0)
                made = Group(count, group.documents + fill, (*group.items, (number, fill)))
            else:
                room = np.array(capacity)
                fill = min(int((room // size).min()), cap, left)
                count = left // fill
                made = Group(count, fill, ((number, fill),))
            left -= made.count * fill
            added.append((made, room - fill * size))  # it has no room for more of this class, or there are no more
        open_groups += [made for made, _ in added]
        rooms = np.concatenate([rooms, *(room[None] for _, room in added)])
        if number:
            closed = (rooms < smallest[number - 1]).any(axis=1)
            closed |= np.array([group.documents for group in open_groups]) >= cap
            done += [group for group, is_closed in zip(open_groups, closed, strict=True) if is_closed]
            open_groups = [group for group, is_closed in zip(open_groups, closed, strict=True) if not is_closed]
            rooms = rooms[~closed]
    return done + open_groups
