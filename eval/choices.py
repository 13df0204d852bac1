"""Multiple choice by log-likelihood: the answer whose ending the model finds likeliest, and what that proves.

One scorer for every task. Choices share beginnings, and so do questions; each is read once: a row of tokens is the trie
of several questions' choices, in which a token sees those above it. Logits are computed where a token is scored, once.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cli import UserError, progress
from eval.language import LOGITS, token_nats
from model import Transformer
from tokenizer import Tokenizer

ROW_TOKENS = 256  # a row that is as long takes no more questions
BATCH_TOKENS = {"cpu": 4_096, "cuda": 65_536}  # in the rows that are read at once, padding included


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
    return Scored([tokenizer.bos, *whole], 1 + max(0, min(len(before), len(whole) - 1)))


def log_likelihoods(
    model: Transformer, questions: Sequence[Sequence[Scored]], what: str = "choices", batch_tokens: int | None = None
) -> list[np.ndarray]:
    """For each question, log p in nats of the scored ids of every choice, float64.

    A choice may be as long as context_length allows: at most that many inputs. batch_tokens: read at once, about.
    """
    device = model.embed.weight.device
    budget = batch_tokens or BATCH_TOKENS[device.type]
    rows = [_Row()]
    asked = (i for i, choices in enumerate(questions) if choices)
    for i in sorted(asked, key=lambda i: questions[i][0].ids):  # beginnings meet those like them
        for number, text in enumerate(questions[i]):
            # Choices whose contexts were cut in different places share nothing: then each may have a row of its own.
            apart = number == 0 or (-1, text.ids[0]) not in rows[-1].nodes
            if apart and len(rows[-1].tokens) >= ROW_TOKENS:
                rows.append(_Row())
            rows[-1].add(i, number, text)
    rows = sorted((row for row in rows if row.scored), key=lambda row: len(row.tokens))
    batches: list[list[_Row]] = []
    for row in rows:  # which is as long as any before it
        if not batches or (len(batches[-1]) + 1) * len(row.tokens) > budget:
            batches.append([])
        batches[-1].append(row)
    found = [np.zeros(len(choices)) for choices in questions]
    total, done = sum(len(row.tokens) for row in rows), 0

    def count() -> tuple[float, float]:
        return done, total

    with torch.inference_mode():
        for batch in progress(batches, count, "tokens", what):
            for row, log_p in zip(batch, _read(model, batch), strict=True):
                for (_, _, question, choice), nats in zip(row.scored, log_p, strict=True):
                    found[question][choice] += nats
            done += sum(len(row.tokens) for row in batch)
    return found


def score(
    model: Transformer, tokenizer: Tokenizer, questions: Sequence[Question], what: str = "choices"
) -> tuple[list[np.ndarray], int]:
    """For each question, log p in nats of every ending given its context, float64; and how many questions had a context
    that does not fit, so that its beginning was cut off. An ending never is: one that is longer than the context is
    read in windows that overlap by half."""
    length = model.config.context_length
    texts = [[encode(tokenizer, *choice) for choice in question.choices] for question in questions]
    long = {i for i, each in enumerate(texts) if any(len(text.ids) - text.start > length for text in each)}
    cut = [[fit(text, length) for text in each] for each in texts]
    scores = log_likelihoods(model, [[] if i in long else each for i, each in enumerate(cut)], what)
    for i in long:
        nats = [token_nats(model, np.array(ids[1:]), ids[0])[start - 1 :] for ids, start in texts[i]]
        scores[i] = np.array([-own.sum() for own in nats])
    return scores, sum(a != b for i, (a, b) in enumerate(zip(texts, cut, strict=True)) if i not in long)


def fit(text: Scored, context_length: int) -> Scored:
    """The last ids of a text: as many as can be inputs, and the one that is only scored."""
    over = max(0, len(text.ids) - context_length - 1)
    return Scored(text.ids[over:], max(1, text.start - over))


class _Row:
    """Questions as one row of tokens: the trie of their choices, in which each token sees those above it.

    tokens, above, depth: of each node its token, the node before it in its text (−1: none) and how many those are.
    scored: (node, id that may follow it, question, choice).
    """

    def __init__(self):
        self.nodes: dict[tuple[int, int], int] = {}
        self.tokens: list[int] = []
        self.above: list[int] = []
        self.depth: list[int] = []
        self.scored: list[tuple[int, int, int, int]] = []

    def add(self, question: int, choice: int, text: Scored) -> None:
        node = -1
        for i, token in enumerate(text.ids):
            if i >= text.start:
                self.scored.append((node, token, question, choice))
            if i == len(text.ids) - 1:
                break  # it is scored, and nothing after it
            if (node, token) not in self.nodes:
                self.nodes[node, token] = len(self.tokens)
                self.tokens.append(token)
                self.above.append(node)
                self.depth.append(i)
            node = self.nodes[node, token]


def _read(model: Transformer, rows: Sequence[_Row]) -> Iterator[np.ndarray]:
    """log p of what is scored in each row."""
    T, device = max(len(row.tokens) for row in rows), model.embed.weight.device
    tokens, positions = np.zeros((2, len(rows), T), dtype=np.int64)
    seen = np.tile(np.eye(T, dtype=bool), (len(rows), 1, 1, 1))  # queries before keys: itself, and those above it
    for i, row in enumerate(rows):
        tokens[i, : len(row.tokens)], positions[i, : len(row.tokens)] = row.tokens, row.depth
        for node, above in enumerate(row.above):
            if above >= 0:
                seen[i, 0, node, :node] = seen[i, 0, above, :node]
    inputs, at, mask = (torch.from_numpy(array).to(device) for array in (tokens, positions, seen))
    hidden = model.hidden(inputs, positions=at, mask=mask).flatten(0, 1)  # (B · T, D)

    places = np.concatenate([[i * T + node for node, *_ in row.scored] for i, row in enumerate(rows)])
    targets = np.concatenate([[token for _, token, *_ in row.scored] for row in rows])
    ends = np.cumsum([len(row.scored) for row in rows])
    yield from np.split(_log_p(model, hidden, places, targets), ends[:-1])


def _log_p(model: Transformer, hidden: Tensor, places: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """log p of each target, (N,) float64, at its row of `hidden`: (rows, D). A row's logits are computed once."""
    order = np.argsort(places, kind="stable")
    needed, first = np.unique(places[order], return_index=True)
    ends, step = [*first, len(order)], max(1, LOGITS[hidden.device.type] // model.config.vocab_size)
    found = np.empty(len(places))
    for start in range(0, len(needed), step):
        rows = needed[start : start + step]
        mine = order[ends[start] : ends[start + len(rows)]]
        logits = model.head(hidden[torch.from_numpy(rows).to(hidden.device)]).float()
        row = torch.from_numpy(np.searchsorted(rows, places[mine])).to(hidden.device)
        column = torch.from_numpy(targets[mine]).to(hidden.device)
        found[mine] = torch.log_softmax(logits, 1)[row, column].double().cpu().numpy()
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
    """Of the mean of independent values from 0 to 1: their deviation (n − 1) over √n. Where all are the same, an error
    of 0 would promise too much: then as if two 0s and two 1s had been among them (Agresti and Coull 1998)."""
    n = len(values)
    if n > 1 and values.min() < values.max():
        return float(values.std(ddof=1)) / math.sqrt(n)
    near = (float(values.sum()) + 2) / (n + 4)
    return math.sqrt(near * (1 - near) / (n + 4))


def p_value(difference: np.ndarray) -> float:
    """How often chance alone would move the mean of paired differences as far from 0, either way (normal
    approximation)."""
    n = len(difference)
    if n < 2 or difference.min() == difference.max():  # no spread to judge by: a sign test
        return min(1.0, 2 * 0.5**n) if difference.any() else 1.0
    error = difference.std(ddof=1) / math.sqrt(n)
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
    found |= {"p_value": p_value(right - baseline), "ties": ties, "n": len(questions)}
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
