"""How well a model predicts held-out text: loss, perplexity, and bits per byte beside what xz needs for the same."""

import lzma
import math
import re

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cli import UserError, progress
from data.pack import Packed
from model import Transformer
from tokenizer import Tokenizer

WINDOWS = 16  # read at once
LOGITS = {"cpu": 1 << 22, "cuda": 1 << 28}  # at most so many at once: 16 MiB, which a CPU's next ones reuse; 1 GiB


def token_nats(
    model: Transformer, tokens: np.ndarray, bos: int, step: int | None = None, what: str | None = None
) -> np.ndarray:
    """−log p of every token, in nats: (N,) float64.

    The tokens are one stream, opened by `bos`: the end token, as if a document had just closed, or the model's own
    beginning. Windows of context_length lie `step` apart, and each counts what the one before has not; by default they
    overlap by half, so that no token past the first window is predicted from less than half a context. what: for the
    progress bar, if there is to be one.
    """
    T, n = model.config.context_length, len(tokens)
    stream = torch.from_numpy(np.concatenate(([bos], tokens)).astype(np.int64))
    step = step or max(1, T // 2)
    starts = [0, *range(step, n - T, step), n - T] if n > T else [0]  # the last one ends where the stream does
    batches = [starts[i : i + WINDOWS] for i in range(0, len(starts), WINDOWS)]
    nats, scored, device = np.empty(n), 0, model.embed.weight.device
    rows = max(1, LOGITS[device.type] // model.config.vocab_size)
    with torch.inference_mode():
        for batch in progress(batches, len(batches), "batches", what) if what else batches:
            windows: Tensor = torch.stack([stream[s : s + T + 1] for s in batch]).to(device)  # (B, T + 1)
            hidden = model.hidden(windows[:, :-1])  # (B, T, D)
            for start, window, x in zip(batch, windows, hidden, strict=True):
                new = scored - start  # the first position whose target no earlier window has counted
                for xs, targets in zip(x[new:].split(rows), window[new + 1 :].split(rows), strict=True):
                    losses = F.cross_entropy(model.head(xs).float(), targets, reduction="none")
                    nats[scored : scored + len(targets)] = losses.cpu().double().numpy()
                    scored += len(targets)
    if not np.isfinite(nats).all():
        raise UserError("the logits are not finite; the weights are damaged, or their training diverged")
    return nats


def validation(model: Transformer, packed: Packed, tokenizer: Tokenizer, most: int) -> dict[str, float]:
    """The task `validation`, over the held-out documents, each document's end token included; over every k-th of them,
    if together they have more than `most` tokens.

    bits_per_byte: total −log₂ likelihood over the UTF-8 bytes of the documents; its standard error, over documents, is
    `stderr`. xz_bits_per_byte, the baseline: the documents joined by newlines, compressed by xz -9.
    """
    documents = list(packed.documents())[:: math.ceil(len(packed.tokens) / most)]
    nats = token_nats(model, np.concatenate(documents), tokenizer.bos, what="validation")
    texts = [tokenizer.decode(ids.tolist()).encode() for ids in documents]
    starts = np.cumsum([0, *map(len, documents[:-1])])
    bits_per_byte, stderr = ratio(np.add.reduceat(nats, starts) / math.log(2), np.array([len(text) for text in texts]))
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


def wikitext2(model: Transformer, tokenizer: Tokenizer, text: str) -> dict[str, float]:
    """The task `wikitext2`, on the raw test set, as lm-evaluation-harness measures it: articles one by one, with their
    spacing mended, but counted in words and bytes as they were; in windows that do not overlap, so that a token has 0
    to context_length − 1 before it. `strided_…`: in windows that overlap by half.

    token_perplexity compares models of one tokenizer only; the others compare all.
    """
    pages = articles(text)
    words = sum(len(re.split(r"\s+", page)) for page in pages)
    sizes = np.array([len(page.encode()) for page in pages])
    ids = [tokenizer.encode_array(detokenized(page).encode()) for page in pages]
    found, tokens = {}, sum(map(len, ids))
    for prefix, step in (("", model.config.context_length), ("strided_", None)):
        each = progress(ids, len(ids), "articles", f"wikitext2, {prefix or 'harness '}windows".replace("_", " "))
        nats = np.array([token_nats(model, page, tokenizer.bos, step).sum() for page in each])
        bits_per_byte, stderr = ratio(nats / math.log(2), sizes)
        found |= {
            f"{prefix}token_perplexity": perplexity(nats.sum() / tokens),
            f"{prefix}word_perplexity": perplexity(nats.sum() / words),
            f"{prefix}byte_perplexity": perplexity(nats.sum() / sizes.sum()),
            f"{prefix}bits_per_byte": bits_per_byte,
            f"{prefix}stderr": stderr,
        }
    return found | {"baseline": xz_bits_per_byte(text.encode()), "n": tokens}


def articles(text: str) -> list[str]:
    """WikiText cut before every line that is an article's title, `` = Robert Boulter = ``; sections have more signs."""
    return [part for part in re.split(r"(?m)^(?= = [^=\n]+ = $)", text) if part.strip()]


# WikiText sets punctuation apart from words. In this order, these rules put it back: its perplexities are published so.
PAIRS = ((r"\(", r"\)"), (r"\[", r"\]"), ("{", "}"), ('"', '"'), ("'", "'"))
LITERAL = (("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°"), (" \n", "\n"), ("\n ", "\n"))
SPACING = (
    ("s '", "s'"),
    *((f" @{sign}@ ", sign) for sign in "-,."),
    *((re.escape(f" {sign} "), f"{sign} ") for sign in ":;.!?,"),
    *((rf"({a})\s*([^{b}]*?)\s*({b})", r"\1\2\3") for a, b in PAIRS),
    *((re.escape(found), put) for found, put in LITERAL),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def detokenized(text: str) -> str:
    """An article of WikiText as people space it."""
    for pattern, replacement in SPACING:
        text = re.sub(pattern, replacement, text)
    return text


# ------------------------------------------------------------------------------------------------------------ numbers


def perplexity(nats: float) -> float:
    """e to the mean loss; infinite past what a float holds."""
    return math.exp(nats) if nats < 700 else math.inf


def ratio(bits: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """Bits a byte over n documents, and its standard error (that of a ratio of two sums); NaN if there is only one."""
    mean, n = bits.sum() / sizes.sum(), len(sizes)
    spread = np.sqrt(np.square(bits - mean * sizes).sum() * (n / (n - 1))) if n > 1 else math.nan
    return float(mean), float(spread / sizes.sum())


def xz_bits_per_byte(text: bytes) -> float:
    """What `xz -9` needs."""
    return 8 * len(lzma.compress(text, preset=9)) / len(text)
