"""Standard errors and p-values that also hold for few items, and where all of them are right or all wrong."""

import math

import numpy as np


def standard_error(values: np.ndarray) -> float:
    """The standard error of the mean of independent values between 0 and 1."""
    if values.min() == values.max():
        return error_if_alike(float(values.mean()), len(values))
    return float(values.std(ddof=1)) / math.sqrt(len(values))


def error_if_alike(share: float, n: int) -> float:
    """The standard error of a share where n items all score alike. Their spread is 0, but the next may differ."""
    # Agresti and Coull 1998: as if two items with score 0 and two with score 1 had been among them.
    n_more = n + 4
    share_more = (share * n + 2) / n_more
    return math.sqrt(share_more * (1 - share_more) / n_more)


def ratio(totals: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """sum(totals) / sum(sizes) over n items and its standard error, which is NaN for a single item."""
    mean, n = totals.sum() / sizes.sum(), len(sizes)
    if n == 1:
        return float(mean), math.nan
    residuals = totals - mean * sizes
    spread = np.sqrt(np.square(residuals).sum() * (n / (n - 1)))
    return float(mean), float(spread / sizes.sum())


def p_value(right: float, chances: np.ndarray) -> float:
    """How often chance alone is as far out as `right` successes: twice the smaller tail, exactly."""
    # chances: (n,), how likely each item succeeds by chance. Their number has a Poisson binomial distribution.
    probabilities = np.ones(1)
    for chance, n in zip(*np.unique(chances, return_counts=True), strict=True):
        probabilities = np.convolve(probabilities, binomial(n, chance))
    right = round(right, 6)  # ties give thirds, whose sum is not quite whole
    # Half a success, from a tie, is rounded towards the mean: ties add no evidence.
    lower = probabilities[: math.ceil(right) + 1].sum()
    upper = probabilities[math.floor(right) :].sum()
    return float(min(1.0, 2 * lower, 2 * upper))


def binomial(n: int, chance: float) -> np.ndarray:
    """Probabilities of 0 to n successes, (n + 1,)."""
    log_factorials = np.concatenate([[0.0], np.log(np.arange(1, n + 1)).cumsum()])
    log_ways = log_factorials[n] - log_factorials - log_factorials[::-1]
    successes = np.arange(n + 1)
    return np.exp(log_ways + successes * np.log(chance) + successes[::-1] * np.log1p(-chance))
