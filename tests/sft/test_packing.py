"""Packing: every text once, in rows that hold it, and as few of them as best fit, decreasing, needs."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft.packing import best_fit

LENGTHS = st.integers(1, 60).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), max_size=80), st.just(capacity))
)


def room(lengths: list[int], capacity: int, rows: list[list[int]]) -> list[int]:
    return [capacity - sum(lengths[i] for i in row) for row in rows]


def plainly(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best fit, decreasing, as its definition says: every row is looked at for every text."""
    rows = []
    for text in sorted(range(len(lengths)), key=lambda text: (-lengths[text], text)):
        left = room(lengths, capacity, rows)
        fits = [i for i in range(len(rows)) if left[i] >= lengths[text]]
        if fits:
            rows[min(fits, key=left.__getitem__)].append(text)
        else:
            rows.append([text])
    return rows


def in_order(lengths: list[int], capacity: int) -> list[list[int]]:
    """First fit without sorting: each text into the first row that has room."""
    rows, left = [], []
    for text, length in enumerate(lengths):
        i = next((i for i, n in enumerate(left) if n >= length), None)
        if i is None:
            rows.append([]), left.append(capacity)
            i = -1
        rows[i].append(text)
        left[i] -= length
    return rows


def test_by_hand():
    # 7, 6, then 4 beside 6 and 3 beside 7, which fills both rows; 2 and 1 share a new one.
    assert best_fit([4, 7, 2, 6, 3, 1], 10) == [[1, 4], [3, 0], [2, 5]]
    assert best_fit([5, 5, 5], 10) == [[0, 1], [2]]
    # 2 goes where it leaves nothing, not into the first row, where it would leave 6.
    assert best_fit([12, 9, 9, 2], 20) == [[0], [1, 2, 3]]
    assert best_fit([10], 10) == [[0]]
    assert best_fit([], 10) == []


@given(LENGTHS)
def test_every_text_once_and_no_row_overfull(case):
    lengths, capacity = case
    rows = best_fit(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(row for row in rows)
    assert all(sum(lengths[i] for i in row) <= capacity for row in rows)
    assert rows == best_fit(tuple(lengths), capacity)


@given(LENGTHS)
def test_rows_are_those_of_the_definition(case):
    """As many, with as much room left; and each text where the least is left. Of rows with equal room any will do."""
    lengths, capacity = case
    found, expected = best_fit(lengths, capacity), plainly(lengths, capacity)
    assert sorted(room(lengths, capacity, found)) == sorted(room(lengths, capacity, expected))
    place = {text: number for number, row in enumerate(found) for text in row}
    rows = [[] for _ in found]
    for text in sorted(range(len(lengths)), key=lambda text: (-lengths[text], text)):
        left = room(lengths, capacity, rows)
        begun = [n for n, row in zip(left, rows, strict=True) if row and n >= lengths[text]]
        assert left[place[text]] == min(begun, default=capacity)
        assert bool(rows[place[text]]) is bool(begun)
        rows[place[text]].append(text)
    assert rows == found


def fewest(lengths: list[int], capacity: int) -> int:
    """The fewest rows possible, by trying everything: a text at a time, into each room that differs."""
    best = len(lengths)

    def place(at: int, room: tuple[int, ...]) -> None:
        nonlocal best
        if len(room) >= best:
            return
        if at == len(lengths):
            best = len(room)
            return
        length = lengths[at]
        for left in {left for left in room if left >= length}:
            i = room.index(left)
            place(at + 1, (*room[:i], left - length, *room[i + 1 :]))
        place(at + 1, (*room, capacity - length))

    lengths = sorted(lengths, reverse=True)
    place(0, ())
    return best


@given(st.lists(st.integers(1, 20), max_size=9))
def test_at_most_11_of_9_of_the_fewest_rows_and_one(lengths):
    assert len(best_fit(lengths, 20)) <= 11 / 9 * fewest(lengths, 20) + 1


@given(st.lists(st.integers(1, 100), min_size=1, max_size=600))
def test_small_texts_fill_their_rows(lengths):
    """Where each is at most a tenth of a row, what is needed is at most 11/9 of what their tokens alone would fill."""
    assert len(best_fit(lengths, 1_000)) <= 11 / 9 * -(-sum(lengths) // 1_000) + 1


def test_fewer_rows_than_without_sorting():
    """On lengths that are distributed as those of conversations are, log-normally, in rows of 1,024."""
    chance = random.Random(0)
    lengths = [min(1_024, max(8, round(chance.lognormvariate(5.5, 0.8)))) for _ in range(2_000)]
    least = -(-sum(lengths) // 1_024)
    found, greedy = len(best_fit(lengths, 1_024)), len(in_order(lengths, 1_024))
    assert found < greedy
    assert found <= 1.01 * least


@pytest.mark.parametrize("length", [0, -3, 11])
def test_a_text_that_no_row_can_hold_is_named(length):
    with pytest.raises(ValueError, match=f"text 1 has {length} tokens; expected 1 to 10"):
        best_fit([4, length, 7], 10)
