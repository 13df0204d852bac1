"""Multiple choice by log-likelihood: the model chooses the ending that it finds likeliest."""

# Choices share beginnings, and so do questions. A row of tokens holds many texts as a tree, in which a token sees the
# tokens before it in its own text: each shared beginning is read once.

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from cli import progress
from eval.language import Subject, token_losses, token_nats
from eval.statistics import p_value, standard_error
from tokenizer import Tokenizer

ROW_TOKENS = 256  # a row of this length takes no text that shares little with the text before
BATCH_TOKENS = {"cpu": 4_096, "cuda": 65_536}  # tokens read at once, padding included


class Question(NamedTuple):
    """choices: (context, ending) of each; the endings are scored. kind: {"field": "syntax"}, say."""

    choices: tuple[tuple[str, str], ...]
    answer: int
    kind: dict[str, str] = {}  # noqa: RUF012 - never written to


class Scored(NamedTuple):
    """The ids of a text. Those from `start` on are scored, each given all ids before it."""

    ids: Sequence[int]
    start: int


def encode(tokenizer: Tokenizer, context: str, ending: str) -> Scored:
    """Context and ending as one text that opens a document."""
    # White space between them belongs to the ending, because a piece holds the space before its word.
    whole = tokenizer.encode(context + ending)
    before = len(tokenizer.encode(context.rstrip()))
    return Scored([tokenizer.bos, *whole], 1 + max(0, min(before, len(whole) - 1)))


def fit(text: Scored, context_length: int) -> Scored:
    """The last ids of a text: context_length inputs, and the id after them, which is only scored."""
    over = max(0, len(text.ids) - context_length - 1)
    return Scored(text.ids[over:], max(1, text.start - over))


def score(subject: Subject, questions: Sequence[Question], what: str = "choices") -> tuple[list[np.ndarray], int]:
    """log p in nats of every ending, per question; and how many questions lost the beginning of a context."""
    length = subject.model.config.context_length
    texts, owners = [], []
    for number, question in enumerate(questions):
        for context, ending in question.choices:
            texts.append(encode(subject.tokenizer, context, ending))
            owners.append(number)
    fitted = [fit(text, length) for text in texts]
    log_p = log_likelihoods(subject, fitted, what)
    truncated = set()
    for i, (ids, start) in enumerate(texts):
        if len(ids) - start > length:  # the ending alone does not fit: score all of it, in windows
            log_p[i] = -token_nats(subject, np.array(ids[1:]))[start - 1 :].sum()
        elif fitted[i] != texts[i]:
            truncated.add(owners[i])
    ends = np.cumsum([len(question.choices) for question in questions])
    return np.split(log_p, ends[:-1]), len(truncated)


def log_likelihoods(subject: Subject, texts: Sequence[Scored], what: str = "choices") -> np.ndarray:
    """log p in nats of the scored ids of each text, (texts,) float64. A text has at most context_length inputs."""
    rows, before = [Tree()], []
    for i in sorted(range(len(texts)), key=lambda i: texts[i].ids):  # equal beginnings become neighbours
        shared = 0
        while shared < min(len(before), len(texts[i].ids)) and before[shared] == texts[i].ids[shared]:
            shared += 1
        if len(rows[-1].tokens) >= ROW_TOKENS + 2 * shared:
            rows.append(Tree())
        rows[-1].add(i, texts[i])
        before = texts[i].ids
    rows.sort(key=lambda row: len(row.tokens))
    budget, batches = BATCH_TOKENS[subject.device.type], [[]]
    for row in rows:  # at least as long as the rows before it
        if batches[-1] and (len(batches[-1]) + 1) * len(row.tokens) > budget:
            batches.append([])
        batches[-1].append(row)
    log_p = np.zeros(len(texts))
    with torch.inference_mode():
        for batch in progress(batches, len(batches), "batches", what):
            read(subject, batch, log_p)
    return log_p


class Tree:
    """Texts as one row of tokens, each with its depth and the index of the token above it (-1: none)."""

    def __init__(self):
        self.nodes: dict[tuple[int, int], int] = {}
        self.tokens: list[int] = []
        self.above: list[int] = []
        self.depths: list[int] = []
        self.scored: list[tuple[int, int, int]] = []  # (text, node before the scored id, the id)

    def add(self, owner: int, text: Scored) -> None:
        node = -1
        for depth, token in enumerate(text.ids):
            if depth >= text.start:
                self.scored.append((owner, node, token))
            if depth == len(text.ids) - 1:
                break  # nothing follows the last token, so nothing reads it
            if (node, token) not in self.nodes:
                self.nodes[node, token] = len(self.tokens)
                self.tokens.append(token)
                self.above.append(node)
                self.depths.append(depth)
            node = self.nodes[node, token]


def read(subject: Subject, rows: Sequence[Tree], log_p: np.ndarray) -> None:
    """Adds log p of what is scored in the rows to their texts."""
    T = len(rows[-1].tokens)
    tokens, depths = torch.zeros(2, len(rows), T, dtype=torch.long)
    mask = np.tile(np.eye(T, dtype=bool), (len(rows), 1, 1, 1))  # (B, 1, queries, keys): a token sees itself
    owners, places = [], []
    for i, row in enumerate(rows):
        tokens[i, : len(row.tokens)] = torch.tensor(row.tokens)
        depths[i, : len(row.tokens)] = torch.tensor(row.depths)
        for node, above in enumerate(row.above):
            if above >= 0:
                mask[i, 0, node, :node] = mask[i, 0, above, :node]  # and all that the token above it sees
        for owner, node, token in row.scored:
            owners.append(owner)
            places.append((i * T + node, token))
    device = subject.device
    hidden = subject.model.hidden(
        tokens.to(device), positions=depths.to(device), mask=torch.from_numpy(mask).to(device)
    )
    needed, indices = np.unique(places, axis=0, return_inverse=True)  # what texts share is scored once
    needed = torch.from_numpy(needed).to(device)
    losses = token_losses(subject, hidden.flatten(0, 1)[needed[:, 0]], needed[:, 1])
    np.subtract.at(log_p, owners, losses[indices])


# ------------------------------------------------------------------------------------------------------------- numbers


def credit(scores: Sequence[np.ndarray], answers: Sequence[int]) -> tuple[np.ndarray, int]:
    """What each question earns, (n,), and the number of ties."""
    # 1 for the right choice, 0 for a wrong one, 1/k where k choices score highest alike and one of them is right.
    earned, ties = np.zeros(len(scores)), 0
    for i, (values, answer) in enumerate(zip(scores, answers, strict=True)):
        best = values.max()
        top = values >= best - 1e-6 * max(1.0, abs(best))  # float32 cannot tell a millionth apart
        earned[i] = top[answer] / top.sum()
        ties += int(top[answer] and top.sum() > 1)
    return earned, ties


def summary(questions: Sequence[Question], scores: Sequence[np.ndarray], majority: bool) -> dict:
    """The numbers of a task. majority: always giving the commonest answer is the baseline, if it beats chance."""
    answers = np.array([question.answer for question in questions])
    per_character = []
    for question, log_p in zip(questions, scores, strict=True):
        lengths = [len(ending.removeprefix(" ")) for _, ending in question.choices]
        per_character.append(log_p / lengths)
    right, ties = credit(scores, answers)
    right_norm, _ = credit(per_character, answers)
    chances = np.array([1 / len(question.choices) for question in questions])
    chance = baseline = float(chances.mean())
    p = p_value(right.sum(), chances)
    numbers = {"accuracy": float(right.mean()), "accuracy_norm": float(right_norm.mean())}
    numbers |= {"stderr": standard_error(right), "stderr_norm": standard_error(right_norm)}
    if majority:
        always = answers == np.bincount(answers).argmax()
        numbers["majority"] = float(always.mean())
        if numbers["majority"] > chance:
            # A sign test: by chance, the model is the better one in half of the questions in which the two differ.
            better, differ = (right > always).sum(), (right != always).sum()
            baseline, p = numbers["majority"], p_value(better, np.full(differ, 0.5))
    numbers |= {"baseline": baseline, "chance": chance, "p_value": p, "ties": ties, "n": len(questions)}
    for name in questions[0].kind:
        kinds = np.array([question.kind[name] for question in questions])
        parts = numbers[f"by_{name}"] = {}
        for kind in sorted(set(kinds)):
            own = right[kinds == kind]
            parts[str(kind)] = {"accuracy": float(own.mean()), "stderr": standard_error(own), "n": len(own)}
    return numbers
