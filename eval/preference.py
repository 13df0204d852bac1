"""How often a model has learnt to prefer the chosen answer of a held-out pair."""

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
    # The model wins a pair if it implies a greater reward for the chosen answer. A tie counts half: the reference ties
    # all pairs, so the baseline is 0.5. Errors are over prompts, because the pairs of a prompt are alike.
    policy = of_pairs(subject.model, pairs, "preference").numpy()
    rewards = beta * (policy - reference.numpy())
    lengths = np.diff(pairs.bounds)[:, 1:]  # (pairs, 2)
    wins = chosen_greater(rewards)
    win_rate, stderr = clustered(wins, np.ones(len(wins)), pairs.prompts)
    weights = matched(lengths[:, 0] - lengths[:, 1])  # always taking the longer answer would win half
    win_rate_matched, stderr_matched = clustered(wins, weights, pairs.prompts)
    chosen, rejected = -policy.sum(0) / lengths.sum(0)  # nats per token
    numbers = {
        "win_rate": win_rate,
        "margin": float((rewards[:, 0] - rewards[:, 1]).mean()),
        "stderr": stderr,
        "win_rate_length_matched": win_rate_matched,
        "stderr_length_matched": stderr_matched,
        "pairs_length_matched": float(weights.sum()),
        "longer_wins": float(chosen_greater(lengths).mean()),  # the win rate of always taking the longer answer
        "likelier": float(chosen_greater(policy).mean()),  # how often the chosen answer is likelier
        "reward_chosen": float(rewards[:, 0].mean()),
        "reward_rejected": float(rewards[:, 1].mean()),
        "perplexity_chosen": perplexity(chosen),
        "perplexity_rejected": perplexity(rejected),
        "baseline": 0.5,
        "prompts": len(np.unique(pairs.prompts)),
        "n": len(wins),
    }
    if len(pairs.names) > 1:
        numbers["by_kind"] = {}
        for i, name in enumerate(pairs.names):
            kind = (pairs.kinds == i).astype(float)
            rate, error = clustered(wins, kind, pairs.prompts)
            numbers["by_kind"][name] = {"win_rate": rate, "stderr": error, "n": int(kind.sum())}
    return numbers


def chosen_greater(values: np.ndarray) -> np.ndarray:
    """1 for each pair whose first value is the greater one, 1/2 for a tie, else 0. values: (pairs, 2)."""
    chosen, rejected = values.T
    return (np.sign(chosen - rejected) + 1) / 2


def clustered(wins: np.ndarray, weights: np.ndarray, prompts: np.ndarray) -> tuple[float, float]:
    """The weighted mean of `wins`, and its standard error over prompts; NaN if no pair has a weight."""
    counted = weights > 0
    _, prompts = np.unique(prompts[counted], return_inverse=True)
    if not len(prompts):
        return math.nan, math.nan
    sizes = np.bincount(prompts, weights[counted])
    mean, stderr = ratio(np.bincount(prompts, (weights * wins)[counted]), sizes)
    decided = (wins[counted] != 0.5).any()  # a model beside itself ties all pairs, by construction
    if decided and not stderr > 1e-9:
        stderr = error_if_alike(mean, len(sizes))
    return mean, stderr


def matched(longer: np.ndarray) -> np.ndarray:
    """A weight for each pair, so that pairs that differ about as much in length have each order equally often."""
    # longer: by how many tokens the chosen answer is longer. In a bin, pairs of the rarer order keep weight 1.
    size = np.abs(longer)
    weights = np.ones(len(longer))
    edges = np.quantile(size, np.arange(1, BINS) / BINS)
    bins = np.searchsorted(edges, size)
    for number in range(BINS):
        above = (bins == number) & (longer > 0)
        below = (bins == number) & (longer < 0)
        fewest = min(above.sum(), below.sum())
        weights[above] = fewest / max(1, above.sum())
        weights[below] = fewest / max(1, below.sum())
    return weights
