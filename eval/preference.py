"""Which of two answers a model has learnt to prefer, on held-out pairs."""

import math

import numpy as np
from torch import Tensor

from dpo.data import PairRows
from dpo.reference import of_pairs
from eval.language import perplexity, ratio
from model import Transformer

BINS = 10  # of how far two answers differ in length


def preference(model: Transformer, pairs: PairRows, reference: Tensor, beta: float) -> dict:
    """The task `preference`. A pair is won if the model, beside the reference, has raised the chosen answer's
    log-probability more than the rejected one's: the reward that it implies is greater. A tie, as all pairs are of the
    reference itself, counts half, and so the baseline is 0.5. reference: `of_pairs` of the model that training began
    with.

    Standard errors are over prompts, with all of their pairs. win_rate_length_matched: pairs weighed so that in each
    tenth, by how far the two answers differ in length, the chosen answer is the longer one as often as the shorter one;
    who looked at lengths alone would win half of them. longer_wins: what that one would win of all pairs. likelier: the
    share of pairs in which the chosen answer is the likelier one of the model, whatever the reference thinks.
    """
    policy = of_pairs(model, pairs, "preference")
    rewards = beta * (policy - reference)
    margins = (rewards[:, 0] - rewards[:, 1]).numpy()
    lengths = np.diff(pairs.bounds)[:, 1:]  # (pairs, 2)
    longer = lengths[:, 0] - lengths[:, 1]
    wins, even = half_ties(margins), np.ones(len(margins))
    weights = matched(longer)
    win_rate, stderr = clustered(wins, even, pairs.prompts)
    balanced, stderr_balanced = clustered(wins, weights, pairs.prompts)
    kinds = {name: pairs.kinds == i for i, name in enumerate(pairs.names)}
    found = {
        "win_rate": win_rate,
        "margin": float(margins.mean()),
        "stderr": stderr,
        "win_rate_length_matched": balanced,
        "stderr_length_matched": stderr_balanced,
        "pairs_length_matched": float(weights.sum()),
        "longer_wins": float(half_ties(longer).mean()),
        "likelier": float(half_ties((policy[:, 0] - policy[:, 1]).numpy()).mean()),
        "reward_chosen": float(rewards[:, 0].mean()),
        "reward_rejected": float(rewards[:, 1].mean()),
        "perplexity_chosen": perplexity(-float(policy[:, 0].sum()) / lengths[:, 0].sum()),
        "perplexity_rejected": perplexity(-float(policy[:, 1].sum()) / lengths[:, 1].sum()),
        "baseline": 0.5,
        "prompts": len(np.unique(pairs.prompts)),
        "n": len(margins),
    }
    if len(kinds) > 1:
        found["by_kind"] = {}
        for name, own in kinds.items():
            rate, error = clustered(wins[own], even[own], pairs.prompts[own])
            found["by_kind"][name] = {"win_rate": rate, "stderr": error, "n": int(own.sum())}
    return found


def half_ties(difference: np.ndarray) -> np.ndarray:
    """1 where it is positive, a half where it is 0."""
    return (np.sign(difference) + 1) / 2


def clustered(wins: np.ndarray, weights: np.ndarray, prompts: np.ndarray) -> tuple[float, float]:
    """The weighted mean of `wins`, and its standard error over prompts; NaN where nothing has any weight. Where all are
    won, or lost, the error is as if two prompts more had been won and two lost (Agresti and Coull 1998)."""
    if not weights.any():
        return math.nan, math.nan
    sums, sizes = (np.bincount(prompts, weights=x) for x in (weights * wins, weights))
    sums, sizes = sums[sizes > 0], sizes[sizes > 0]
    mean, stderr = ratio(sums, sizes)
    if mean in (0, 1):
        n = len(sizes) + 4
        share = (mean * len(sizes) + 2) / n
        stderr = math.sqrt(share * (1 - share) / n)
    return mean, stderr


def matched(longer: np.ndarray) -> np.ndarray:
    """For each pair a weight, so that among pairs that differ about as much in length both orders weigh the same.

    longer: by how many tokens the chosen answer is the longer one. Of the order that is the commoner in a bin each pair
    weighs the less; where there is but one order, nothing.
    """
    size, weights = np.abs(longer), np.ones(len(longer))
    bins = np.searchsorted(np.quantile(size, np.arange(1, BINS) / BINS), size)
    for each in range(BINS):
        orders = [(bins == each) & (np.sign(longer) == sign) for sign in (1, -1)]
        fewest = min(own.sum() for own in orders)
        for own in orders:
            weights[own] = fewest / max(1, own.sum())
    return weights
