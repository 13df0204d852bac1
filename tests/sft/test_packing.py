"""Packing: every text once, in rows that hold it, and as few rows as best fit, decreasing, needs."""

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
    """Best fit, decreasing, by its definition: looks at every row for every text."""
    rows = []
    for text in sorted(range(len(lengths)), key=lambda text: (-lengths[text], text)):
        left = room(lengths, capacity, rows)
        fits = [i for i in range(len(rows)) if left[i] >= lengths[text]]
        if fits:
            rows[min(fits, key=left.__getitem__)].append(text)
        else:
            rows.append([text])
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
def test_rows_are_those_of_the_definition(case):
    """Every text once, no row too full, as many rows with as much room left. Of rows with equal room any will do."""
    lengths, capacity = case
    rows = best_fit(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    left = room(lengths, capacity, rows)
    assert min(left, default=0) >= 0
    assert sorted(left) == sorted(room(lengths, capacity, plainly(lengths, capacity)))


def test_lengths_like_those_of_conversations_fill_their_rows():
    chance = random.Random(0)
    lengths = [min(1_024, max(8, round(chance.lognormvariate(5.5, 0.8)))) for _ in range(2_000)]
    assert len(best_fit(lengths, 1_024)) <= 1.01 * -(-sum(lengths) // 1_024)


@pytest.mark.parametrize("length", [0, -3, 11])
def test_a_text_that_no_row_can_hold_is_named(length):
    with pytest.raises(ValueError, match=f"text 1 has {length} tokens; expected 1 to 10"):
        best_fit([4, length, 7], 10)
