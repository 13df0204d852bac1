"""How likely a model finds the answers of held-out conversations, and what it answers itself."""

import math

import numpy as np
import torch

from cli import progress
from eval.generation import write
from eval.language import Subject, perplexity, token_losses
from eval.statistics import ratio
from sft.data import IGNORED, Rows
from sft.templates import ends, marked, shown
from tokenizer import Tokenizer

BATCH = 8  # rows per forward pass


def answers(subject: Subject, train: Rows, held_out: Rows, template: str) -> dict:
    """The task `answers`: the loss of held-out answers in nats per token, and some answers of the model."""
    # The standard errors are over conversations.
    nats, counts = nats_by_conversation(subject, held_out, ends(template, subject.tokenizer))
    loss, stderr = ratio(nats.sum(1), counts.sum(1))
    loss_words, stderr_words = ratio(nats[:, 0], counts[:, 0])
    texts = written(subject, held_out, template)
    numbers = {
        "loss": loss,
        "perplexity": perplexity(loss),
        "stderr": stderr,
        "loss_words": loss_words,
        "stderr_words": stderr_words,
        "loss_ends": float(nats[:, 1].sum() / max(1, counts[:, 1].sum())),  # of the piece that ends an answer
        "baseline": unigram(train, held_out, subject.tokenizer),
        "marked": sum(text["marked"] for text in texts) / len(texts),
        "ended": sum(text["ended"] for text in texts) / len(texts),
        "conversations": len(counts),
        "n": int(counts.sum()),
    }
    return numbers | {"texts": texts}


def nats_by_conversation(subject: Subject, rows: Rows, ends: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The sum of −log p in nats over a conversation's words, and over the ends of its answers, (conversations, 2)."""
    # The second array counts these tokens. Only trained tokens count.
    device, nats, counts = subject.device, [], []
    starts = range(0, rows.count, BATCH)
    with torch.inference_mode():
        for start in progress(starts, len(starts), "batches", "answers"):
            tokens, targets, positions = rows.read(range(start, min(start + BATCH, rows.count)))
            trained = targets.flatten() != IGNORED
            wanted = targets.flatten()[trained]
            hidden = subject.model.hidden(tokens.to(device), positions=positions.to(device)).flatten(0, 1)
            losses = token_losses(subject, hidden[trained.to(device)], wanted.to(device))
            number = (positions.flatten() == 0).cumsum(0)[trained]  # position 0 opens a conversation
            place = (2 * number + torch.isin(wanted, torch.tensor(ends))).numpy()
            size = 2 * int(number[-1]) + 2
            nats.append(np.bincount(place, losses, size).reshape(-1, 2))
            counts.append(np.bincount(place, minlength=size).reshape(-1, 2))
    nats, counts = np.concatenate(nats), np.concatenate(counts)
    known = counts.sum(1) > 0  # not the padding behind a row
    return nats[known], counts[known]


def unigram(train: Rows, held_out: Rows, tokenizer: Tokenizer) -> float:
    """The loss of held-out answers, if each piece is as likely as it is frequent in the training answers, plus 1."""
    learnt = train.tokens[np.flatnonzero(train.trained)]
    frequency = 1 + np.bincount(learnt, minlength=tokenizer.vocab_size)
    wanted = held_out.tokens[np.flatnonzero(held_out.trained)]
    return float(math.log(frequency.sum()) - np.log(frequency[wanted]).mean())


def written(subject: Subject, held_out: Rows, template: str) -> list[dict]:
    """The model's answers to the first question of some conversations, evenly spaced, beside the true answers."""
    spm, total = subject.tokenizer, len(held_out.starts) - 1
    count = min(subject.config.answers, total)
    prompts, truths, texts = [], [], []
    for i in range(count):
        ids, trained = held_out.conversation(i * total // count)
        first = int(trained.argmax())
        length = int(np.append(trained[first:], False).argmin())
        prompts.append(ids[:first].tolist())
        truths.append(ids[first : first + length].tolist())
    samples = write(subject, prompts, subject.config.answer_tokens, template)
    for prompt, truth, sample in zip(prompts, truths, samples, strict=True):
        text = {"prompt": shown(prompt[1:], spm), "seed": sample["seed"], "answer": shown(sample["new"], spm)}
        text |= {"truth": spm.decode(truth, begins=False), "ended": sample["ended"]}
        text["marked"] = marked(template, sample["new"], spm)
        texts.append(text)
    return texts
