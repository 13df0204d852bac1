"""How well a model predicts held-out text: loss, perplexity, and bits per byte, compared with xz."""

import lzma
import math
import re
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from cli import UserError, progress
from data.pack import Packed
from eval import EvalConfig
from eval.statistics import ratio
from model import Transformer
from tokenizer import Tokenizer

WINDOWS = 16  # per forward pass
LOGITS = {"cpu": 1 << 22, "cuda": 1 << 28}  # computed at once: 16 MiB fit a CPU's caches, 1 GiB is little for a GPU


class Subject(NamedTuple):
    """A model that is measured. template: the chat template in which it learnt to answer, if any."""

    model: Transformer
    tokenizer: Tokenizer
    template: str | None = None
    config: EvalConfig = EvalConfig()

    @property
    def device(self) -> torch.device:
        return self.model.embed.weight.device


# Windows start `step` tokens apart. The default is half a window: so every token after the first window has at least
# half a window of context.
def token_nats(subject: Subject, tokens: np.ndarray, step: int | None = None, what: str | None = None) -> np.ndarray:
    """−log p in nats of every token of a stream that opens a document, (N,) float64. what: names the progress bar."""
    n = len(tokens)
    T = subject.model.config.context_length
    step = step or max(1, T // 2)
    starts = [0]
    if n > T:
        starts = [0, *range(step, n - T, step), n - T]  # the last window ends where the stream ends
    stream = np.insert(tokens.astype(np.int64), 0, subject.tokenizer.bos)
    stream = torch.from_numpy(stream).to(subject.device)
    batches = torch.tensor(starts).split(WINDOWS)
    nats, scored = [], 0
    with torch.inference_mode():
        for batch in progress(batches, len(batches), "batches", what) if what else batches:
            windows = torch.stack([stream[start : start + T + 1] for start in batch])  # (B, T + 1)
            hidden = subject.model.hidden(windows[:, :-1])  # (B, T, D)
            for start, window, x in zip(batch.tolist(), windows, hidden, strict=True):
                new = scored - start  # earlier windows have scored the positions before it
                nats.append(token_losses(subject, x[new:], window[new + 1 :]))
                scored += len(nats[-1])
    return np.concatenate(nats)


def token_losses(
    subject: Subject, hidden: torch.Tensor, targets: torch.Tensor, likeliest: list[bool] | None = None
) -> np.ndarray:
    """−log p in nats of each target, (N,) float64. hidden: (N, D). UserError if one is not finite."""
    # likeliest: this list gets one bool for each target, True if no id is likelier.
    losses = []
    rows = max(1, LOGITS.get(subject.device.type, LOGITS["cpu"]) // subject.model.config.vocab_size)
    for x, wanted in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = subject.model.head(x).float()
        losses.append(F.cross_entropy(logits, wanted, reduction="none"))
        if likeliest is not None:
            highest = logits.amax(1)  # argmax takes 30 times as long
            likeliest += (logits.gather(1, wanted[:, None])[:, 0] == highest).tolist()
    nats = torch.cat(losses).cpu().double().numpy()
    if not np.isfinite(nats).all():
        raise UserError("the logits are not finite; the weights are damaged, or their training diverged")
    return nats


def validation(subject: Subject, held_out: Packed) -> dict[str, float]:
    """The task `validation`: bits per byte of the held-out documents, their end tokens included."""
    every = math.ceil(len(held_out.tokens) / subject.config.validation_tokens)
    documents = list(held_out.documents())[::every]
    nats = token_nats(subject, np.concatenate(documents), what="validation")
    texts, starts = [], [0]
    for ids in documents:
        texts.append(subject.tokenizer.decode(ids.tolist()).encode())
        starts.append(starts[-1] + len(ids))
    bits = np.add.reduceat(nats, starts[:-1]) / math.log(2)  # per document
    bits_per_byte, stderr = ratio(bits, np.array(list(map(len, texts))))
    xz = xz_bits_per_byte(b"\n".join(texts))
    return {
        "loss": float(nats.mean()),
        "perplexity": perplexity(nats.mean()),
        "bits_per_byte": bits_per_byte,
        "xz_bits_per_byte": xz,
        "stderr": stderr,
        "baseline": xz,
        "documents": len(documents),
        "n": len(nats),
    }


def perplexity(nats: float) -> float:
    """e to the mean loss; infinite where a float cannot hold it."""
    return math.exp(nats) if nats < 700 else math.inf


def xz_bits_per_byte(text: bytes) -> float:
    return 8 * len(lzma.compress(text, preset=9)) / len(text)


# As in lm-evaluation-harness: each article is read alone, with repaired spacing. Words and bytes are counted before the
# repair. Windows do not overlap; for `strided_…` they overlap by half.
def wikitext2(subject: Subject, text: str) -> dict[str, float]:
    """The task `wikitext2`, on the raw test set."""
    pages = articles(text)
    ids = [subject.tokenizer.encode_array(detokenized(page).encode()) for page in pages]
    sizes = np.array([len(page.encode()) for page in pages])
    words = sum(len(re.split(r"\s+", page)) for page in pages)
    tokens = sum(map(len, ids))
    numbers = {}
    for prefix, step in (("", subject.model.config.context_length), ("strided_", None)):
        nats = np.zeros(len(ids))
        for i, page in enumerate(progress(ids, len(ids), "articles", f"{prefix}wikitext2")):
            nats[i] = token_nats(subject, page, step).sum()
        total = nats.sum()
        numbers[f"{prefix}token_perplexity"] = perplexity(total / tokens)
        numbers[f"{prefix}word_perplexity"] = perplexity(total / words)
        numbers[f"{prefix}byte_perplexity"] = perplexity(total / sizes.sum())
        bits_per_byte, stderr = ratio(nats / math.log(2), sizes)
        numbers |= {f"{prefix}bits_per_byte": bits_per_byte, f"{prefix}stderr": stderr}
    return numbers | {"baseline": xz_bits_per_byte(text.encode()), "n": tokens}


def articles(text: str) -> list[str]:
    """WikiText, cut before every title line ` = Robert Boulter = `; titles of sections have more signs."""
    return [part for part in re.split(r"(?m)^(?= = [^=\n]+ = $)", text) if part.strip()]


# WikiText separates punctuation from words. These rules, in this order, undo that, as for published perplexities.
SPACING = {"s '": "s'", " @-@ ": "-", " @,@ ": ",", r" @\.@ ": "."}
SPACING |= {" : ": ": ", " ; ": "; ", r" \. ": ". ", " ! ": "! ", r" \? ": "? ", " , ": ", "}
SPACING |= {r"(\()\s*([^\)]*?)\s*(\))": r"\1\2\3", r"(\[)\s*([^\]]*?)\s*(\])": r"\1\2\3"}
SPACING |= {r"({)\s*([^}]*?)\s*(})": r"\1\2\3", r'(")\s*([^"]*?)\s*(")': r"\1\2\3"}
SPACING |= {r"(')\s*([^']*?)\s*(')": r"\1\2\3"}
SPACING |= {"= = = =": "====", "= = =": "===", "= =": "==", " ° ": "°", " \n": "\n", "\n ": "\n"}
SPACING |= {" N ": " 1 ", " 's": "'s"}


def detokenized(text: str) -> str:
    """An article of WikiText with the spaces that people write."""
    for pattern, replacement in SPACING.items():
        text = re.sub(pattern, replacement, text)
    return text
