"""Every way to read a text gives the same logits: at once, from a cache, in chunks, packed, in a batch.

Run it after each change of the architecture, on your own config:  CONFIG=configs/mine.py pytest tests/test_layouts.py
"""

import os

import pytest
import torch

import configs
from generate import Continuation, Decoder, Sampling, generate
from model import KVCache, Transformer


@pytest.fixture(scope="module")
def model() -> Transformer:
    config = configs.load(os.environ.get("CONFIG", "configs/demo.py")).model
    torch.manual_seed(0)
    model = Transformer(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(4)  # large enough for attention to matter
    return model


@pytest.fixture(scope="module")
def tokens(model: Transformer) -> torch.Tensor:
    """One text as long as the context, (1, T)."""
    draw = torch.Generator().manual_seed(1)
    return torch.randint(model.config.vocab_size, (1, model.config.context_length), generator=draw)


@pytest.fixture(scope="module")
def plain(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(tokens)


def assert_same(logits: torch.Tensor, plain: torch.Tensor) -> None:
    assert float((logits - plain).abs().max()) <= 2e-5 * float(plain.abs().max())


@torch.inference_mode()
def test_cached_in_chunks(model, tokens, plain):
    """Short and long parts; the last tokens one by one, where a window has moved on."""
    parts = [1, 1, 2, 5, 30, tokens.shape[1] - 59, *[1] * 20]
    cache = KVCache(model, 1, tokens.shape[1])
    logits = [model(part, cache=cache) for part in tokens.split(parts, 1)]
    assert_same(torch.cat(logits, 1), plain)


@torch.inference_mode()
def test_a_batch_of_texts_at_different_places(model, tokens, plain):
    """Beginnings of the text, each in a row of one cache, read on together."""
    T = tokens.shape[1]
    lengths = [1, T // 3, T // 2, T - 4]
    cache = KVCache(model, len(lengths), T)
    for row, length in enumerate(lengths):
        model(tokens[:, :length], cache=cache[row : row + 1])
    following = torch.cat([tokens[:, length : length + 3] for length in lengths])
    logits = model(following, cache=cache)
    for row, length in enumerate(lengths):
        assert_same(logits[row], plain[0, length : length + 3])


@torch.inference_mode()
def test_packed(model, tokens, plain):
    """Texts side by side in one row: a short one, the whole text, and another ending that shares its beginning."""
    T, shared = tokens.shape[1], tokens.shape[1] // 2
    row = torch.cat([tokens[:, :9], tokens, tokens[:, shared:]], 1)
    positions = torch.cat([torch.arange(9), torch.arange(T), torch.arange(shared, T)])[None]
    logits = model(row, positions=positions)
    assert_same(logits[:, :9], plain[:, :9])
    assert_same(logits[:, 9 : 9 + T], plain)
    assert_same(logits[:, 9 + T :], plain[:, shared:])


@torch.inference_mode()
def test_masked(model, tokens, plain):
    """Two texts in one row, kept apart by a mask."""
    T, short = tokens.shape[1], 9
    row = torch.cat([tokens[:, :short], tokens], 1)
    positions = torch.cat([torch.arange(short), torch.arange(T)])[None]
    text = (positions == 0).cumsum(1)
    mask = (text[:, :, None] == text[:, None]) & torch.ones(short + T, short + T, dtype=torch.bool).tril()
    logits = model.head(model.hidden(row, positions=positions, mask=mask[:, None]))
    assert_same(logits[:, short:], plain)


def test_decoding_draws_what_the_plain_logits_say(model, tokens):
    """Greedy texts of different lengths, decoded together, against a forward pass over each whole text."""
    prompts = [tokens[0, :length].tolist() for length in (3, 40, tokens.shape[1] - 30)]
    decoder = Decoder(model, rows=2, chunk=16)
    texts = [Continuation(prompt, 24, Sampling(temperature=0)) for prompt in prompts]
    for text in texts:
        decoder.add(text)
    while decoder:
        decoder.step()
    for text, prompt in zip(texts, prompts, strict=True):
        assert text.ids[len(prompt) :] == generate(model, prompt, 24, temperature=0)
        with torch.inference_mode():
            logits = model(torch.tensor([text.ids[:-1]]))[0, len(prompt) - 1 :]
        best = logits.max(1).values
        drawn = logits.gather(1, torch.tensor(text.ids[len(prompt) :])[:, None])[:, 0]
        assert float((best - drawn).max()) <= 2e-5 * float(logits.abs().max())  # the likeliest, but for rounding
