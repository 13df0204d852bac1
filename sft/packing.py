"""Packs conversations into rows of one length, so that little is computed for padding."""

import bisect
from collections.abc import Sequence


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of at most `capacity` tokens that hold every text once: for each row the numbers of its texts.

    Best fit, decreasing (Johnson 1974): the longest text first, each into the row where it leaves the least room, or
    into a new row. At most 11/9 of the fewest rows possible. ValueError for a text longer than a row.
    """
    rows: list[list[int]] = []
    rooms: list[tuple[int, int, int]] = []  # sorted: tokens that still fit, minus the last step of the row, the row
    for step, text in enumerate(sorted(range(len(lengths)), key=lambda text: -lengths[text])):
        length = lengths[text]
        if not 0 < length <= capacity:
            raise ValueError(f"text {text} has {length} tokens; expected 1 to {capacity}")
        at = bisect.bisect_left(rooms, (length,))  # the least room that is enough
        if at == len(rooms):
            rows.append([])
            rooms.append((capacity, 0, len(rows) - 1))
        room, _, row = rooms.pop(at)
        rows[row].append(text)
        bisect.insort(rooms, (room - length, -step, row))
    return rows
