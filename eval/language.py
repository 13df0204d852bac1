"""How well a model predicts held-out text: loss, perplexity, and bits per byte beside what xz needs for the same."""

import lzma
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.pack import Packed
from model import Transformer
from stage import progress
from tokenizer import Tokenizer

WINDOWS = 16  # read at once
LOGITS = 1 << 22  # at most so many at once: 16 MiB in float32, which the next ones reuse


def token_nats(model: Transformer, tokens: np.ndarray, bos: int) -> np.ndarray:
    """−log p of every token, in nats: (N,) float64.

    The tokens are one stream, opened by `bos`: the end token, as if a document had just closed, or the model's own
    beginning. Windows of context_length overlap by half, and each but the first counts only its later half: no token
    past the first window is predicted from less than half a context.
    """
    T, n = model.config.context_length, len(tokens)
    stream = torch.from_numpy(np.concatenate(([bos], tokens)).astype(np.int64))
    step = max(1, T // 2)
    starts = [0, *range(step, n - T, step), n - T] if n > T else [0]  # the last one ends where the stream does
    batches = [starts[i : i + WINDOWS] for i in range(0, len(starts), WINDOWS)]
    rows = max(1, LOGITS // model.config.vocab_size)
    nats, scored, device = np.empty(n), 0, model.embed.weight.device
    with torch.inference_mode():
        for batch in progress(batches, len(batches), "batches", "validation"):
            windows: Tensor = torch.stack([stream[s : s + T + 1] for s in batch]).to(device)  # (B, T + 1)
            hidden = model.hidden(windows[:, :-1])  # (B, T, D)
            for start, window, x in zip(batch, windows, hidden, strict=True):
                new = scored - start  # the first position whose target no earlier window has counted
                for xs, targets in zip(x[new:].split(rows), window[new + 1 :].split(rows), strict=True):
                    losses = F.cross_entropy(model.head(xs).float(), targets, reduction="none")
                    nats[scored : scored + len(targets)] = losses.cpu().double().numpy()
                    scored += len(targets)
    return nats


def validation(model: Transformer, packed: Packed, tokenizer: Tokenizer) -> dict[str, float]:
    """The task `validation`, over all held-out documents, each document's end token included.

    bits_per_byte: total −log₂ likelihood over the UTF-8 bytes of the documents; its standard error, over documents, is
    `stderr`. xz_bits_per_byte, the baseline: the documents joined by newlines, compressed by xz -9.
    """
    nats = token_nats(model, packed.tokens, tokenizer.bos)
    texts = [tokenizer.decode(ids.tolist()).encode() for ids in packed.documents()]
    sizes = np.array([len(text) for text in texts])
    bits = np.add.reduceat(nats, packed.starts) / math.log(2)
    bits_per_byte = bits.sum() / sizes.sum()
    joined = b"\n".join(texts)
    xz = 8 * len(lzma.compress(joined, preset=9)) / len(joined)
    return {
        "loss": float(nats.mean()),
        "perplexity": math.exp(nats.mean()) if nats.mean() < 700 else math.inf,
        "bits_per_byte": float(bits_per_byte),
        "xz_bits_per_byte": xz,
        "stderr": float(np.sqrt(np.square(bits - bits_per_byte * sizes).sum()) / sizes.sum()),
        "baseline": xz,
        "n": len(nats),
    }
