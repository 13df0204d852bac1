"""Errors and p-values against enumeration, SciPy and hand-worked cases, above all for few items."""

import itertools
import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from eval.statistics import mean_and_error, p_value, ratio

chances = st.lists(st.sampled_from([1 / 2, 1 / 3, 1 / 4, 1 / 5]), min_size=1, max_size=7).map(np.array)
HALVES = [1 / 2] * 5


@pytest.mark.parametrize(
    ("right", "chances", "p"),
    [
        (0, [1 / 4, 1 / 5], 1),  # chance gives this in 0.6 of all cases
        (2, [1 / 4, 1 / 5], 2 / 20),
        (0, HALVES[:1], 1),
        (5, HALVES, 2 / 32),
        (0, HALVES, 2 / 32),
        (3, HALVES, 1),
        (0, [], 1),
    ],
)
def test_p_values_by_hand(right, chances, p):
    assert p_value(right, np.array(chances)) == pytest.approx(p)


@given(chances)
def test_chance_alone_seldom_looks_significant(chances):
    """Over all outcomes, weighed by their probability: P(p ≤ α) ≤ α, for every α."""
    outcomes = []
    for right in itertools.product((0, 1), repeat=len(chances)):
        probability = math.prod(c if r else 1 - c for r, c in zip(right, chances, strict=True))
        outcomes.append((p_value(sum(right), chances), probability))
    assert sum(probability for _, probability in outcomes) == pytest.approx(1)
    for alpha, _ in outcomes:
        assert sum(probability for p, probability in outcomes if p <= alpha) <= alpha + 1e-9


@given(chances, st.integers(0, 7))
def test_ties_add_no_evidence(chances, ties):
    """A tie among all choices earns its chance, whatever the answer: it tells nothing."""
    more = np.append(chances, np.full(ties, 0.5))
    for right in (0, len(chances)):
        assert p_value(right + ties / 2, more) >= min(0.5, p_value(right, chances)) - 1e-9  # a count is rounded


@pytest.mark.parametrize(("right", "n", "chance"), [(33_900, 67_000, 0.5), (310, 1_000, 0.25), (180, 1_000, 0.25)])
def test_many_questions_against_scipy(right, n, chance):
    tails = stats.binom.cdf(right, n, chance), stats.binom.sf(right - 1, n, chance)
    assert p_value(right, np.full(n, chance)) == pytest.approx(2 * min(tails), rel=1e-6)


def test_standard_errors_by_hand():
    assert mean_and_error(np.array([1.0, 0.0, 1.0, 1.0])) == (0.75, pytest.approx(statistics.stdev([1, 0, 1, 1]) / 2))
    # All alike: as if two 0s and two 1s had been among them.
    assert mean_and_error(np.zeros(24)) == (0, pytest.approx(math.sqrt(2 / 28 * 26 / 28 / 28)))
    assert mean_and_error(np.ones(1)) == (1, pytest.approx(math.sqrt(3 / 5 * 2 / 5 / 5)))


def test_error_of_a_ratio():
    """Five documents, one left out at a time: the jackknife's error is near. The error of one document is unknown."""
    bits, sizes = np.array([9.0, 22, 31, 38, 55]), np.array([10, 20, 30, 40, 50])
    mean, error = ratio(bits, sizes)
    others = [np.delete(bits, i).sum() / np.delete(sizes, i).sum() for i in range(5)]
    assert mean == bits.sum() / sizes.sum()
    assert error == pytest.approx(np.sqrt(4 / 5 * np.square(others - np.mean(others)).sum()), rel=0.15)
    assert np.isnan(ratio(bits[:1], sizes[:1])[1])
