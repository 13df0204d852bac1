"""Multiple choice by log-likelihood: the answer whose ending the model finds likeliest, and what that proves.

One scorer for every task. The choices of a question share a beginning, and it is read once: a row holds it, and then
the rest of each choice, a branch that sees the beginning and itself. Logits are computed where a token is scored, once.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from eval.language import LOGITS, token_nats
from model import Transformer
from stage import UserError, progress
from tokenizer import Tokenizer

ROW_TOKENS = {"cpu": 4_096, "cuda": 65_536}  # in the rows that are read at once, padding included


class Question(NamedTuple):
    """choices: (context, ending) of each, both to be read, the ending to be scored. answer: which is right. kind: by
    what results are told apart, such as {"field": "syntax"}."""

    choices: tuple[tuple[str, str], ...]
    answer: int
    kind: dict[str, str] = {}  # noqa: RUF012 - never written to


class Scored(NamedTuple):
    """ids: a text. start: the first of them that counts; from there on they are scored, each given those before it."""

    ids: Sequence[int]
    start: int


def encode(tokenizer: Tokenizer, context: str, ending: str) -> Scored:
    """Context and ending as one text that begins a document. White space between them belongs to the ending, for words
    are spelt with the space before them."""
    kept = context.rstrip()
    whole, before = tokenizer.encode(context + ending), tokenizer.encode(kept)
    return Scored([tokenizer.bos, *whole], 1 + min(len(before), len(whole) - 1))


def log_likelihoods(
    model: Transformer, questions: Sequence[Sequence[Scored]], what: str = "choices", row_tokens: int | None = None
) -> list[np.ndarray]:
    """For each question, log p in nats of the scored ids of every choice, float64.

    A choice may be as long as context_length allows: at most that many inputs. row_tokens: of rows read at once.
    """
    device = model.embed.weight.device
    budget = row_tokens or ROW_TOKENS[device.type]
    rows = [_row(choices) for choices in questions]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))
    batches, first = [], 0
    for i in range(1, len(order) + 1):  # each row is as long as the last one of its batch
        if i == len(order) or (i + 1 - first) * len(rows[order[i]].tokens) > budget:
            batches.append(order[first:i])
            first = i
    found: list[np.ndarray] = [np.empty(0)] * len(questions)
    done = 0

    def count() -> tuple[float, float]:
        return done, len(questions)

    with torch.inference_mode():
        for batch in progress(batches, count, "questions", what):
            for i, nats in zip(batch, _read(model, [rows[i] for i in batch], device), strict=True):
                found[i] = nats
            done += len(batch)
    return found


def score(
    model: Transformer, tokenizer: Tokenizer, questions: Sequence[Question], what: str = "choices"
) -> tuple[list[np.ndarray], int]:
    """For each question, log p in nats of every ending given its context, float64; and how many questions had a context
    that does not fit, so that its beginning was cut off. An ending never is: one that is longer than the context is
    read in windows that overlap by half."""
    length = model.config.context_length
    texts = [[encode(tokenizer, *choice) for choice in question.choices] for question in questions]
    cut = [[fit(text, length) for text in choices] for choices in texts]
    scores = log_likelihoods(model, cut, what)
    for i, choices in enumerate(texts):
        if any(len(text.ids) - text.start > length for text in choices):
            nats = [token_nats(model, np.array(text.ids[1:]), text.ids[0])[text.start - 1 :] for text in choices]
            scores[i] = np.array([-own.sum() for own in nats])
    return scores, sum(a != b for a, b in zip(texts, cut, strict=True))


def fit(text: Scored, context_length: int) -> Scored:
    """The last ids of a text: as many as can be inputs, and the one that is only scored."""
    over = max(0, len(text.ids) - context_length - 1)
    return Scored(text.ids[over:], max(1, text.start - over))


class _Row(NamedTuple):
    """A question as one row. branch: 0 for the shared beginning, then 1, 2, … by choice. at: the place whose logits a
    target is scored with, choice: the choice that it counts for."""

    tokens: list[int]
    positions: list[int]
    branch: list[int]
    at: list[int]
    targets: list[int]
    choice: list[int]
    choices: int


def _row(choices: Sequence[Scored]) -> _Row:
    inputs = [list(ids[:-1]) for ids, _ in choices]  # the last id is scored, and nothing after it
    shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*inputs, strict=False)))
    row = _Row(inputs[0][:shared], list(range(shared)), [0] * shared, [], [], [], len(choices))
    for number, ((ids, start), own) in enumerate(zip(choices, inputs, strict=True)):
        offset = len(row.tokens) - shared
        row.tokens.extend(own[shared:])
        row.positions.extend(range(shared, len(own)))
        row.branch.extend([number + 1] * (len(own) - shared))
        row.at.extend(i - 1 if i <= shared else i - 1 + offset for i in range(start, len(ids)))
        row.targets.extend(ids[start:])
        row.choice.extend([number] * (len(ids) - start))
    return row


def _read(model: Transformer, rows: Sequence[_Row], device: torch.device) -> Iterator[np.ndarray]:
    """The log-likelihoods of each row's choices."""
    T = max(len(row.tokens) for row in rows)
    tokens, positions, branch = np.zeros((3, len(rows), T), dtype=np.int64)
    branch -= 1  # padding, which nothing but padding sees
    for i, row in enumerate(rows):
        here = i, slice(len(row.tokens))
        tokens[here], positions[here], branch[here] = row.tokens, row.positions, row.branch
    inputs, at, of = (torch.from_numpy(array).to(device) for array in (tokens, positions, branch))
    seen = (of[:, None, :] == of[:, :, None]) | (of[:, None, :] == 0)  # (B, T, T), queries before keys
    hidden = model.hidden(inputs, positions=at, mask=seen.tril()[:, None])  # (B, T, D)

    places = np.concatenate([np.array(row.at) + i * T for i, row in enumerate(rows)])
    targets = np.concatenate([row.targets for row in rows])
    log_p = _log_p(model, hidden.flatten(0, 1), places, targets)
    ends = np.cumsum([len(row.at) for row in rows])
    for row, own in zip(rows, np.split(log_p, ends[:-1]), strict=True):
        yield np.bincount(row.choice, own, minlength=row.choices)


def _log_p(model: Transformer, hidden: Tensor, places: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """log p of each target, (N,) float64, at its row of `hidden`: (rows, D). A row's logits are computed once."""
    order = np.argsort(places, kind="stable")
    needed, first = np.unique(places[order], return_index=True)
    ends, step = [*first, len(order)], max(1, LOGITS // model.config.vocab_size)
    found = np.empty(len(places))
    for start in range(0, len(needed), step):
        rows = needed[start : start + step]
        mine = order[ends[start] : ends[start + len(rows)]]
        logits = model.head(hidden[torch.from_numpy(rows).to(hidden.device)]).float()
        row = torch.from_numpy(np.searchsorted(rows, places[mine])).to(hidden.device)
        column = torch.from_numpy(targets[mine]).to(hidden.device)
        found[mine] = (logits[row, column] - logits.logsumexp(1)[row]).double().cpu().numpy()
    if not np.isfinite(found).all():
        raise UserError("the logits are not finite; the weights are damaged, or their training diverged")
    return found


# -------------------------------------------------------------------------------------------------------- statistics


def credit(scores: Sequence[np.ndarray], answers: Sequence[int]) -> tuple[np.ndarray, int]:
    """What each question earns, (n,), and how many were tied: 1 for the right choice, 0 for another, and where k score
    highest alike, 1/k if the right one is among them. Alike is what float32 cannot tell apart: a millionth."""
    earned, ties = np.zeros(len(scores)), 0
    for i, (values, answer) in enumerate(zip(scores, answers, strict=True)):
        best = values.max()
        top = values >= best - 1e-6 * max(1.0, abs(best))
        earned[i] = top[answer] / top.sum()
        ties += int(top[answer] and top.sum() > 1)
    return earned, ties


def standard_error(values: np.ndarray) -> float:
    """Of the mean of independent values of 0 to 1: their deviation (n − 1) over √n; of one value 0.5, the most it can
    be."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.5


def p_value(difference: np.ndarray) -> float:
    """How often chance alone would move the mean of paired differences as far from 0, either way (normal
    approximation)."""
    error = standard_error(difference)
    if not error > 0:
        return 1.0 if not difference.any() else 0.0
    return math.erfc(abs(float(difference.mean())) / error / math.sqrt(2))


def summary(questions: Sequence[Question], scores: Sequence[np.ndarray], majority: bool) -> dict:
    """accuracy: of the likeliest ending. accuracy_norm: of the likeliest a character of ending. The error of each, and
    the baseline: what chance earns, or, with `majority`, always giving the commonest answer, if that earns more.

    p_value: of accuracy against the baseline, question by question. ties: questions whose right ending scored highest
    together with another. by_…: accuracy by what the questions are told apart by.
    """
    lengths = [np.array([len(ending.removeprefix(" ")) for _, ending in q.choices]) for q in questions]
    answers = np.array([question.answer for question in questions])
    right, ties = credit(scores, answers)
    right_norm, _ = credit([s / n for s, n in zip(scores, lengths, strict=True)], answers)
    chance = np.array([1 / len(question.choices) for question in questions])
    baseline = chance
    found = {"accuracy": float(right.mean()), "accuracy_norm": float(right_norm.mean())}
    found |= {"stderr": standard_error(right), "stderr_norm": standard_error(right_norm)}
    if majority:
        always = (answers == np.bincount(answers).argmax()).astype(float)
        found["majority"] = float(always.mean())
        baseline = max(chance, always, key=np.mean)
    found |= {"baseline": float(baseline.mean()), "chance": float(chance.mean())}
    found |= {"difference_stderr": standard_error(right - baseline), "p_value": p_value(right - baseline)}
    found |= {"ties": ties, "n": len(questions)}
    for name in questions[0].kind:
        kinds = np.array([question.kind[name] for question in questions])
        found[f"by_{name}"] = {
            str(kind): {
                "accuracy": float(right[kinds == kind].mean()),
                "stderr": standard_error(right[kinds == kind]),
                "n": int((kinds == kind).sum()),
            }
            for kind in sorted(set(kinds))
        }
    return found
