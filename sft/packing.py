"""Packs conversations into rows of one length, so that almost nothing is computed for padding."""

import bisect
from collections.abc import Sequence


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of at most `capacity` tokens that hold every text once: for each row the numbers of its texts.

    Best fit, decreasing (Johnson 1974): the longest text first, each into the row where it leaves the least room, or
    into a new row. At most 11/9 of the fewest rows possible, and close to the fewest where many texts are short. Raises
    ValueError for a text longer than a row.
    """
    rows: list[list[int]] = []
    with_room: list[list[list[int]]] = [[] for _ in range(capacity + 1)]  # rows by how many tokens still fit
    rooms: list[int] = []  # sorted: the n for which with_room[n] is not empty
    for text in sorted(range(len(lengths)), key=lambda text: -lengths[text]):
        length = lengths[text]
        if not 0 < length <= capacity:
            raise ValueError(f"text {text} has {length} tokens; expected 1 to {capacity}")
        at = bisect.bisect_left(rooms, length)  # the least room that is enough
        if at < len(rooms):
            room = rooms[at]
            row = with_room[room].pop()
            if not with_room[room]:
                del rooms[at]
        else:
            room, row = capacity, []
            rows.append(row)
        row.append(text)
        rest = room - length
        if not with_room[rest]:
            bisect.insort(rooms, rest)
        with_room[rest].append(row)
    return rows
