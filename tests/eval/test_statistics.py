"""Errors and p-values against enumeration, SciPy and simulation, above all for few items."""

import itertools
import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from eval.statistics import p_value, ratio, standard_error

chances = st.lists(st.sampled_from([1 / 2, 1 / 3, 1 / 4, 1 / 5]), min_size=1, max_size=7).map(np.array)


def test_two_wrong_answers_of_four_and_five_choices_prove_nothing():
    assert p_value(0, np.array([1 / 4, 1 / 5])) == 1  # chance gives this in 0.6 of all cases
    assert p_value(2, np.array([1 / 4, 1 / 5])) == pytest.approx(2 / 20)


@pytest.mark.parametrize(
    ("right", "n", "p"), [(0, 1, 1), (1, 1, 1), (5, 5, 2 / 32), (0, 5, 2 / 32), (3, 5, 1), (0, 0, 1)]
)
def test_of_two_choices_by_hand(right, n, p):
    assert p_value(right, np.full(n, 0.5)) == pytest.approx(p)


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
        assert p_value(right + ties / 2, more) >= min(0.9, p_value(right, chances)) - 1e-9


@pytest.mark.parametrize(("right", "n", "chance"), [(33_900, 67_000, 0.5), (310, 1_000, 0.25), (180, 1_000, 0.25)])
def test_many_questions_against_scipy(right, n, chance):
    tails = stats.binom.cdf(right, n, chance), stats.binom.sf(right - 1, n, chance)
    assert p_value(right, np.full(n, chance)) == pytest.approx(2 * min(tails), rel=1e-6)


def test_standard_errors_by_hand():
    assert standard_error(np.array([1.0, 0.0, 1.0, 1.0])) == pytest.approx(statistics.stdev([1, 0, 1, 1]) / 2)
    # All alike: as if two 0s and two 1s had been among them.
    assert standard_error(np.zeros(24)) == pytest.approx(math.sqrt(2 / 28 * 26 / 28 / 28))
    assert standard_error(np.ones(1)) == pytest.approx(math.sqrt(3 / 5 * 2 / 5 / 5))
    assert standard_error(np.full(3, 0.5)) == pytest.approx(math.sqrt(1 / 4 / 7))


@pytest.mark.parametrize("n", [5, 8, 20, 50])
@pytest.mark.parametrize("p", [0.5, 0.75, 0.9])
def test_two_errors_either_way_cover_the_truth(n, p):
    covered = 0.0
    for right in range(n + 1):
        values = np.repeat([1.0, 0.0], [right, n - right])
        if abs(values.mean() - p) <= 2 * standard_error(values):
            covered += stats.binom.pmf(right, n, p)
    assert covered > 0.84


def test_error_of_a_ratio():
    """Five documents, one left out at a time: the jackknife's error is near. The error of one document is unknown."""
    bits, sizes = np.array([9.0, 22, 31, 38, 55]), np.array([10, 20, 30, 40, 50])
    mean, error = ratio(bits, sizes)
    others = [np.delete(bits, i).sum() / np.delete(sizes, i).sum() for i in range(5)]
    assert mean == bits.sum() / sizes.sum()
    assert error == pytest.approx(np.sqrt(4 / 5 * np.square(others - np.mean(others)).sum()), rel=0.15)
    assert np.isnan(ratio(bits[:1], sizes[:1])[1])
