"""Multiple choice by log-likelihood: the model chooses the ending that it finds likeliest."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from eval.language import Subject, token_losses, token_nats
from eval.statistics import mean_and_error, p_value
from machine import in_batches
from model import IGNORED
from tokenizer import Tokenizer

BATCH_TOKENS = {"cpu": 4_096, "cuda": 65_536}  # tokens read at once


class Question(NamedTuple):
    """choices: (context, ending) of each; the endings are scored. kind: for results by kind, as {"field": "syntax"}."""

    choices: list[tuple[str, str]]
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
    opening = tokenizer.opening if context else [tokenizer.bos]  # the first id of a bare ending is scored too
    start = len(opening) + max(0, min(before, len(whole) - 1))
    return Scored([*opening, *whole], start)


def fit(text: Scored, context_length: int) -> Scored:
    """The last ids of a text: context_length inputs, and the id after them, which is only scored."""
    over = max(0, len(text.ids) - context_length - 1)
    return Scored(text.ids[over:], max(1, text.start - over))


def score(subject: Subject, questions: Sequence[Question], what: str = "choices") -> tuple[list[np.ndarray], int]:
    """log p in nats of every ending, by question; and how many questions lost the beginning of a context."""
    length = subject.model.config.context_length
    texts, owners = [], []
    for number, question in enumerate(questions):
        for context, ending in question.choices:
            texts.append(encode(subject.tokenizer, context, ending))
            owners.append(number)
    log_p, _ = log_likelihoods(subject, [fit(text, length) for text in texts], what)
    truncated = set()
    for i, (ids, start) in enumerate(texts):
        if len(ids) - start > length:  # the ending alone does not fit: score all of it, in windows
            nats = token_nats(subject, np.array(ids[1:]))
            log_p[i] = -nats[start - 1 :].sum()
        elif len(ids) > length + 1:
            truncated.add(owners[i])
    ends = np.cumsum(np.bincount(owners))
    return np.split(log_p, ends[:-1]), len(truncated)


def log_likelihoods(subject: Subject, texts: Sequence[Scored], what: str = "choices") -> tuple[np.ndarray, np.ndarray]:
    """log p in nats of each text's scored ids, (texts,) float64; and whether greedy decoding would write them, bool."""
    # A text has at most context_length inputs. Sorting makes texts with equal beginnings neighbours.
    order = sorted(range(len(texts)), key=lambda i: texts[i].ids)
    log_p = np.zeros(len(texts))
    greedy = np.zeros(len(texts), bool)

    def work(done: int, budget: int) -> int:
        batch = next_batch(texts, order[done:], budget)
        read(subject, texts, batch, log_p, greedy)
        return len(batch)

    budget = BATCH_TOKENS.get(subject.device.type, BATCH_TOKENS["cpu"])
    with torch.inference_mode():
        in_batches(len(texts), budget, work, "texts", what)
    return log_p, greedy


def next_batch(texts: Sequence[Scored], order: Sequence[int], budget: int) -> list[tuple[int, int]]:
    """As many texts from the start of `order` as fit into a budget of tokens: (number, first input to read) of each."""
    # The first text is the base and is read whole. A later text shares its beginning with the base. It is read from the
    # input on that predicts its first different id. If it shares too little, it is read whole and becomes the new base.
    base = Scored([], 0)
    before = size = 0
    batch = []
    for i in order:
        ids, start = texts[i]
        shared = len(os.path.commonprefix((base.ids, ids)))  # noqa: RUF071 - not paths: lists of ids
        first = max(0, shared - 1)
        if start < base.start:
            first = min(first, start - 1)  # the base does not score these ids
        follows = first == before - 1 < len(ids) - 1  # positions that count on would join the two texts
        if follows or 3 * shared < len(ids):
            first = 0
        if batch and size + len(ids) - first > budget:
            break
        if first == 0:
            base = texts[i]
        batch.append((i, first))
        size += len(ids) - first
        before = len(ids)
    return batch


def read(subject: Subject, texts: Sequence[Scored], batch: list, log_p: np.ndarray, greedy: np.ndarray) -> None:
    """Fills in log_p and greedy for a batch of (number of a text, first input to read); 0 makes the text a base."""
    tokens, targets, positions, ends = [], [], [], []
    for i, first in batch:
        ids, start = texts[i]
        tokens += ids[first:-1]
        targets += [IGNORED] * (start - 1 - first) + ids[max(start, first + 1) :]
        positions += range(first, len(ids) - 1)
        ends.append(len(tokens))
    inputs = torch.tensor([tokens]).to(subject.device)
    hidden = subject.model.hidden(inputs, positions=torch.tensor([positions]))[0]  # packed: no text sees another
    targets = torch.tensor(targets)
    scored = targets != IGNORED
    losses, likeliest, hits = np.zeros(len(tokens)), np.ones(len(tokens), bool), []
    losses[scored.numpy()] = token_losses(subject, hidden[scored], targets[scored].to(subject.device), hits)
    likeliest[scored.numpy()] = hits
    parts = zip(np.split(losses, ends[:-1]), np.split(likeliest, ends[:-1]), strict=True)
    for (i, first), part in zip(batch, parts, strict=True):
        if first == 0:
            base = part
        shared = slice(texts[i].start - 1, first)
        log_p[i] = -base[0][shared].sum() - part[0].sum()
        greedy[i] = base[1][shared].all() and part[1].all()


def credit(scores: Sequence[np.ndarray], answers: Sequence[int]) -> np.ndarray:
    """The credit for each question, (n,)."""
    # 1 for the right choice, 0 for a wrong choice, 1/k if k choices tie for the best score and one of them is right.
    earned = np.zeros(len(scores))
    for i, (values, answer) in enumerate(zip(scores, answers, strict=True)):
        best = values.max()
        top = values >= best - 1e-6 * max(1.0, abs(best))  # float32 cannot tell a millionth apart
        earned[i] = top[answer] / top.sum()
    return earned


def summary(questions: Sequence[Question], scores: Sequence[np.ndarray], majority: bool) -> dict:
    """The numbers of a task. majority: the baseline is the most frequent answer to all, if it beats chance."""
    answers = np.array([question.answer for question in questions])
    chances = np.array([1 / len(question.choices) for question in questions])
    per_character = []
    for question, log_p in zip(questions, scores, strict=True):
        per_character.append(log_p / [len(ending.removeprefix(" ")) for _, ending in question.choices])
    right = credit(scores, answers)
    ties = int(((right > 0) & (right < 1)).sum())
    accuracy, stderr = mean_and_error(right)
    accuracy_norm, stderr_norm = mean_and_error(credit(per_character, answers))
    numbers = {"accuracy": accuracy, "accuracy_norm": accuracy_norm, "stderr": stderr, "stderr_norm": stderr_norm}
    chance = baseline = float(chances.mean())
    p = p_value(right.sum(), chances)
    if majority:
        always = answers == np.bincount(answers).argmax()
        numbers["majority"] = float(always.mean())
        if numbers["majority"] > chance:
            # A sign test: by chance, the model is better in half of the questions in which the two differ.
            differ = (right != always).sum()
            baseline = numbers["majority"]
            p = p_value((right > always).sum(), np.full(differ, 0.5))
    numbers |= {"baseline": baseline, "chance": chance, "p_value": p, "ties": ties, "n": len(questions)}
    for name in questions[0].kind:
        kinds = np.array([question.kind[name] for question in questions])
        parts = numbers[f"by_{name}"] = {}
        for kind in sorted(set(kinds.tolist())):
            earned = right[kinds == kind]
            mean, error = mean_and_error(earned)
            parts[kind] = {"accuracy": mean, "stderr": error, "n": len(earned)}
    return numbers
