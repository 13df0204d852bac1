"""Means with standard errors, and p-values. They also hold for few items, and if all items score alike."""

import math

import numpy as np
import torch
from torch.distributions import Binomial


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """The mean of independent values between 0 and 1, and its standard error."""
    mean = float(values.mean())
    n = len(values)
    if values.min() == values.max():
        return mean, error_if_alike(mean, n)
    return mean, float(values.std(ddof=1)) / math.sqrt(n)


def error_if_alike(share: float, n: int) -> float:
    """The standard error of a share where n items all score alike. Their spread is 0, but the next may differ."""
    # Agresti and Coull 1998: as if there were two more items with score 0 and two with score 1.
    n_more = n + 4
    share_more = (share * n + 2) / n_more
    return math.sqrt(share_more * (1 - share_more) / n_more)


def ratio(totals: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """sum(totals) / sum(sizes) over n items and its standard error, which is NaN for a single item."""
    n = len(sizes)
    size = sizes.sum()
    mean = totals.sum() / size
    if n == 1:
        return float(mean), math.nan
    squares = np.square(totals - mean * sizes).sum()
    spread = np.sqrt(squares * (n / (n - 1)))
    return float(mean), float(spread / size)


def p_value(right: float, chances: np.ndarray) -> float:
    """The probability that chance is as extreme as `right` successes: exactly twice the smaller tail, at most 1."""
    # chances: (n,), each item's chance of success. The number of successes has a Poisson binomial distribution.
    probabilities = np.ones(1)
    for chance, n in zip(*np.unique(chances, return_counts=True), strict=True):
        successes = Binomial(int(n), torch.tensor(chance))
        logs = successes.log_prob(successes.enumerate_support())
        probabilities = np.convolve(probabilities, logs.exp().numpy())
    right = round(right, 6)  # ties give thirds, whose sum is not quite whole
    # Half a success, from a tie, is rounded towards the mean: ties add no evidence.
    lower = probabilities[: math.ceil(right) + 1].sum()
    upper = probabilities[math.floor(right) :].sum()
    return float(min(1.0, 2 * lower, 2 * upper))
