"""Which of two answers a model has learnt to prefer, on held-out pairs."""

import math

import numpy as np
from torch import Tensor

from dpo.data import PairRows
from dpo.reference import of_pairs
from eval.language import Subject, perplexity
from eval.statistics import error_if_alike, ratio

BINS = 10  # of how much two answers differ in length


def preference(subject: Subject, pairs: PairRows, reference: Tensor, beta: float) -> dict:
    """The task `preference`. reference: log-probabilities (pairs, 2) of the model that training started from."""
    # The model wins a pair if its implied reward of the chosen answer is the greater one. A tie counts half: the
    # reference ties all pairs, so the baseline is 0.5. Errors are over prompts, because the pairs of one are alike.
    policy = of_pairs(subject.model, pairs, "preference").numpy()
    rewards = beta * (policy - reference.numpy())
    margins, likelier = rewards[:, 0] - rewards[:, 1], policy[:, 0] - policy[:, 1]
    lengths = np.diff(pairs.bounds)[:, 1:]  # (pairs, 2)
    longer = lengths[:, 0] - lengths[:, 1]
    wins, n = half_ties(margins), len(margins)
    win_rate, stderr = clustered(wins, np.ones(n), pairs.prompts)
    weights = matched(longer)  # always taking the longer answer would win half
    win_rate_matched, stderr_matched = clustered(wins, weights, pairs.prompts)
    chosen, rejected = -policy.sum(0) / lengths.sum(0)  # nats per token
    numbers = {
        "win_rate": win_rate,
        "margin": float(margins.mean()),
        "stderr": stderr,
        "win_rate_length_matched": win_rate_matched,
        "stderr_length_matched": stderr_matched,
        "pairs_length_matched": float(weights.sum()),
        "longer_wins": float(half_ties(longer).mean()),  # what always taking the longer answer wins
        "likelier": float(half_ties(likelier).mean()),  # the chosen answer, whatever the reference says
        "reward_chosen": float(rewards[:, 0].mean()),
        "reward_rejected": float(rewards[:, 1].mean()),
        "perplexity_chosen": perplexity(chosen),
        "perplexity_rejected": perplexity(rejected),
        "baseline": 0.5,
        "prompts": len(np.unique(pairs.prompts)),
        "n": n,
    }
    if len(pairs.names) > 1:
        kinds = numbers["by_kind"] = {}
        for i, name in enumerate(pairs.names):
            kind = (pairs.kinds == i).astype(float)
            rate, error = clustered(wins, kind, pairs.prompts)
            kinds[name] = {"win_rate": rate, "stderr": error, "n": int(kind.sum())}
    return numbers


def half_ties(difference: np.ndarray) -> np.ndarray:
    """1 where the difference is positive, 1/2 where it is 0, else 0."""
    return (np.sign(difference) + 1) / 2


def clustered(wins: np.ndarray, weights: np.ndarray, prompts: np.ndarray) -> tuple[float, float]:
    """The weighted mean of `wins`, and its standard error over prompts; NaN if no pair has a weight."""
    sums, sizes = np.bincount(prompts, weights * wins), np.bincount(prompts, weights)
    sums, sizes = sums[sizes > 0], sizes[sizes > 0]
    if not len(sizes):
        return math.nan, math.nan
    mean, stderr = ratio(sums, sizes)
    decided = (wins[weights > 0] != 0.5).any()  # a model beside itself ties all pairs, by construction
    if decided and not stderr > 1e-9:
        stderr = error_if_alike(mean, len(sizes))
    return mean, stderr


def matched(longer: np.ndarray) -> np.ndarray:
    """A weight for each pair, so that pairs that differ about as much in length have each order equally often."""
    # longer: by how many tokens the chosen answer is the longer one. In a bin, pairs of the rarer order keep weight 1.
    size, weights = np.abs(longer), np.ones(len(longer))
    bins = np.searchsorted(np.quantile(size, np.arange(1, BINS) / BINS), size)
    for number in range(BINS):
        above, below = (bins == number) & (longer > 0), (bins == number) & (longer < 0)
        fewest = min(above.sum(), below.sum())
        for order in (above, below):
            weights[order] = fewest / max(1, order.sum())
    return weights
