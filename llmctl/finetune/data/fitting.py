"""Examples of several lengths put into rows of one length."""

from __future__ import annotations

import bisect
from collections.abc import Sequence


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of item numbers whose lengths add up to `capacity` at most: longest first, each into the fullest row it fits.

    The same lengths give the same rows. Raises `ValueError` for an item longer than a row.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if order and lengths[order[0]] > capacity:
        raise ValueError(f"an item of {lengths[order[0]]} does not fit into {capacity}")
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # by room that is left, which has at most `capacity` values
    rooms: list[int] = []
    for item in order:
        place = bisect.bisect_left(rooms, lengths[item])
        if place == len(rooms):
            rows.append([item])
            row, room = len(rows) - 1, capacity
        else:
            room = rooms[place]
            row = open_rows[room].pop()
            rows[row].append(item)
            if not open_rows[room]:
                del open_rows[room], rooms[place]
        room -= lengths[item]
        if room:
            if room not in open_rows:
                bisect.insort(rooms, room)
                open_rows[room] = []
            open_rows[room].append(row)
    return rows
