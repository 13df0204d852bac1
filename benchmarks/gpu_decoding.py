"""Decoding on one NVIDIA GPU: beside transformers, and texts that come and go. A part of `python -m benchmarks.gpu`."""

import statistics
import time

import torch

import generate
from benchmarks import common
from benchmarks.gpu_kernels import DEVICE, GPU, shape
from benchmarks.gpu_training import to_transformers
from generate import Continuation, Decoder, Sampling
from model import Transformer


def decode(model: Transformer, batch: int) -> dict:
    """Tokens a second of ours and of transformers, and how many times faster ours is."""
    theirs, new = to_transformers(model), 128 if GPU else 4
    prompts = torch.randint(3, model.config.vocab_size, (batch, 16 if GPU else 4))
    listed, there = prompts.tolist(), prompts.to(DEVICE)
    options = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0}
    functions = {
        "ours": lambda: generate.generate(model, listed, new, temperature=0),
        "transformers": lambda: theirs.generate(there, attention_mask=torch.ones_like(there), **options),
    }
    times = common.interleaved(3 if GPU else 1, functions)  # both end on the host
    found = {f"{name}_tokens_per_second": round(batch * new / statistics.median(t)) for name, t in times.items()}
    return found | {"ratio": common.ratio(times["transformers"], times["ours"])}


def serve(model: Transformer) -> dict:
    """Texts that come one by one, every second step, and leave when they are done; and some of them alone."""
    texts, rows, longest = (64, 16, 256) if GPU else (4, 2, 8)
    draw, waiting = torch.Generator().manual_seed(0), []
    for _ in range(texts):
        prompt, new = torch.randint(longest // 8, longest, (2,), generator=draw).tolist()
        ids = torch.randint(3, model.config.vocab_size, (prompt,), generator=draw).tolist()
        waiting.append((ids, max(1, new // 2)))
    alone = waiting[: texts // 8 or 1]
    decoder, came, first, steps, tokens, number = Decoder(model, rows), {}, {}, [], 0, 0
    started = time.perf_counter()
    while waiting or decoder:
        if waiting and number % 2 == 0:
            ids, new = waiting.pop(0)
            text = Continuation(ids, new, Sampling(temperature=0))
            came[text] = time.perf_counter()
            decoder.add(text)
        before = time.perf_counter()
        pairs = decoder.step()
        now, number = time.perf_counter(), number + 1
        steps.append(now - before)
        tokens += len(pairs)
        for text, _ in pairs:
            first.setdefault(text, now - came[text])
    together = tokens / (time.perf_counter() - started)
    started = time.perf_counter()
    for ids, new in alone:
        generate.generate(model, ids, new, temperature=0)
    apart = sum(new for _, new in alone) / (time.perf_counter() - started)
    return {
        "tokens_per_second": round(together),
        "alone_tokens_per_second": round(apart),
        "ratio": round(together / apart, 3),
        "step_ms": round(1e3 * statistics.median(steps), 2),
        "first_token_ms": round(1e3 * statistics.median(first.values()), 2),
        "first_token_worst_ms": round(1e3 * max(first.values()), 2),
    }


def decoding(results) -> None:
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")  # as when a model is served
    config = shape("tiny")
    model = Transformer(config).to(DEVICE).eval()
    for batch in (1, 8, 64) if GPU else (1, 2):
        results.measure(f"decoding/tiny_{batch}", decode, model, batch, needs=8)
    results.measure("serving/tiny", serve, model, needs=8)
