"""Conversations into rows of one length, so that nothing is computed for padding."""

from collections.abc import Sequence


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of at most `capacity` tokens that hold every text once: for each row, the numbers of its texts.

    Best fit, decreasing (Johnson 1974): the longest text first, each into the row where the least room is left after
    it; a new row where none has room. At most 11/9 of the fewest rows possible, and close to them where many texts are
    short. Raises ValueError for a text longer than a row.
    """
    rows: list[list[int]] = []
    with_room: list[list[list[int]]] = [[] for _ in range(capacity + 1)]  # by how many tokens a row has room for
    sizes = 0  # bit n is set where there is a row with room for n: the next larger size is one operation away
    for text in sorted(range(len(lengths)), key=lambda text: -lengths[text]):
        length = lengths[text]
        if not 0 < length <= capacity:
            raise ValueError(f"text {text} has {length} tokens; expected 1 to {capacity}")
        if fitting := sizes >> length:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                sizes ^= 1 << room
        else:
            room, row = capacity, []
            rows.append(row)
        row.append(text)
        with_room[room - length].append(row)
        sizes |= 1 << (room - length)
    return rows
