"""Items of several lengths put into rows of one length."""

from __future__ import annotations

import bisect

import numpy as np


class Rows:
    """Row i holds `items[starts[i]:starts[i + 1]]`: int64 arrays, so that millions of rows take little memory."""

    def __init__(self, row_of: np.ndarray):
        self.items = np.argsort(row_of, kind="stable")
        self.starts = np.searchsorted(row_of[self.items], np.arange(row_of.max(initial=-1) + 2))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.items[self.starts[row] : self.starts[row + 1]]


def best_fit(lengths: np.ndarray, capacity: int) -> Rows:
    """Rows whose lengths add up to `capacity` at most: longest items first, each into the fullest row that it fits.

    The same lengths give the same rows. Raises `ValueError` for an item longer than a row.
    """
    if lengths.max(initial=0) > capacity:
        raise ValueError(f"an item of {lengths.max()} does not fit into {capacity}")
    row_of = np.zeros(len(lengths), np.int64)
    rows_with: dict[int, list[int]] = {}  # by the room that is left in them
    rooms: list[int] = []  # the keys, sorted
    n_rows = 0
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            row, room = n_rows, capacity
            n_rows += 1
        else:
            room = rooms[place]
            row = rows_with[room].pop()
            if not rows_with[room]:
                del rows_with[room], rooms[place]
        row_of[item] = row
        room -= length
        if room:
            if room not in rows_with:
                bisect.insort(rooms, room)
                rows_with[room] = []
            rows_with[room].append(row)
    return Rows(row_of)
