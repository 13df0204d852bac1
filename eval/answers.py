"""How likely a model finds the answers of held-out conversations, and what it answers itself."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from cli import UserError, progress
from eval import EvalConfig
from eval.generation import sampled
from eval.language import LOGITS, perplexity, ratio
from model import Transformer
from sft.data import IGNORED, Rows
from sft.templates import ends, marked, shown
from tokenizer import Tokenizer

BATCH = 8  # rows read at once


def answers(
    model: Transformer, train: Rows, held_out: Rows, template: str, tokenizer: Tokenizer, config: EvalConfig
) -> tuple[dict, list[dict]]:
    """The task `answers`: the loss, in nats a token, of what the assistant says in held-out conversations, the end of
    each answer included, and apart from the words (`loss_words`, `loss_ends`): a pretrained model has never seen the
    piece that ends one. And for some of them, evenly spaced, what the model says to the same question.

    The standard error is over conversations. The baseline needs no model: each token as frequent as it is in the
    answers of the training conversations. marked: the share of the model's answers with a mark of the template in them.
    """
    nats, counts = nats_by_conversation(model, held_out, ends(template, tokenizer))
    loss, stderr = ratio(nats.sum(1), counts.sum(1))
    of_words, stderr_words = ratio(nats[:, 0], counts[:, 0])
    texts = written(model, held_out, template, tokenizer, config)
    numbers = {
        "loss": loss,
        "perplexity": perplexity(loss),
        "stderr": stderr,
        "loss_words": of_words,
        "stderr_words": stderr_words,
        "loss_ends": float(nats[:, 1].sum() / max(1, counts[:, 1].sum())),
        "baseline": unigram(train, held_out, tokenizer.vocab_size),
        "marked": sum(text["marked"] for text in texts) / len(texts),
        "ended": sum(text["ended"] for text in texts) / len(texts),
        "conversations": len(counts),
        "n": int(counts.sum()),
    }
    return numbers, texts


def nats_by_conversation(model: Transformer, rows: Rows, ends: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """−log p of each conversation's trained tokens together, in nats, and how many they are: (conversations, 2) each,
    for words and for the ends of answers."""
    device, most = model.embed.weight.device, max(1, LOGITS[model.embed.weight.device.type] // model.config.vocab_size)
    batches = [range(i, min(i + BATCH, rows.count)) for i in range(0, rows.count, BATCH)]
    found = []
    with torch.inference_mode():
        for batch in progress(batches, len(batches), "batches", "answers"):
            tokens, targets, positions = rows.read(batch)
            live = targets.flatten() != IGNORED
            hidden = model.hidden(tokens.to(device), positions=positions).flatten(0, 1)[live.to(device)]
            wanted = targets.flatten()[live].to(device)
            pairs = zip(hidden.split(most), wanted.split(most), strict=True)
            losses = torch.cat([F.cross_entropy(model.head(x).float(), y, reduction="none") for x, y in pairs])
            text = (positions.flatten() == 0).cumsum(0)[live]  # which text of the batch each is of
            place = 2 * text + torch.isin(targets.flatten()[live], torch.tensor(ends))
            counts = place.bincount(minlength=2 * int(text[-1]) + 2)
            nats = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, place, losses.double().cpu())
            found.append([each.view(-1, 2)[counts.view(-1, 2).sum(1) > 0].numpy() for each in (nats, counts)])
    nats, counts = (np.concatenate(part) for part in zip(*found, strict=True))
    if not np.isfinite(nats).all():
        raise UserError("the logits are not finite; the weights are damaged, or their training diverged")
    return nats, counts


def unigram(train: Rows, held_out: Rows, pieces: int) -> float:
    """Cross-entropy, in nats a token, of held-out answers under the frequencies of pieces in the others, plus one."""
    frequency = 1 + np.bincount(train.tokens[np.flatnonzero(train.trained)], minlength=pieces)
    wanted = held_out.tokens[np.flatnonzero(held_out.trained)]
    return float(math.log(frequency.sum()) - np.log(frequency[wanted]).mean())


def written(model: Transformer, held_out: Rows, template: str, tokenizer: Tokenizer, config: EvalConfig) -> list[dict]:
    """For some conversations, evenly spaced: `prompt`, as the template spells it, `seed`, the model's `answer`, the
    conversation's own (`truth`), whether the model's `ended` and whether it is `marked`."""
    total = len(held_out.starts) - 1
    count, cases = min(config.answers, total), []
    for i in range(count):
        ids, trained = held_out.conversation(i * total // count)
        first = int(trained.argmax())
        last = first + int(np.append(trained[first:], False).argmin())
        cases.append((ids[:first].tolist(), ids[first:last].tolist()))
    new = sampled(model, [prompt for prompt, _ in cases], config.answer_tokens, ends(template, tokenizer), config)
    return [
        {
            "prompt": shown(prompt[1:], tokenizer),
            "seed": config.seed + i,
            "answer": shown(own, tokenizer),
            "truth": tokenizer.decode(truth, begins=False),
            "ended": len(own) < config.answer_tokens,
            "marked": marked(template, own, tokenizer),
        }
        for i, ((prompt, truth), own) in enumerate(zip(cases, new, strict=True))
    ]
