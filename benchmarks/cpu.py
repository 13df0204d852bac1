"""Training speed on a CPU, beside transformers' LLaMA with the same weights, and the chunked loss beside the plain one.

    python -m benchmarks.cpu   ->  benchmarks/results/cpu.json

Each pair is timed in turn, step by step, so that what slows the machine slows both; quoted is the median of the ratios.
"""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import configs
import stage
from model import Transformer, linear_cross_entropy

RESULT = Path(__file__).parent / "results/cpu.json"


def compare(ours: Callable[[], None], other: Callable[[], None], rounds: int) -> dict[str, float]:
    """Median seconds of both, and the median over the rounds of other / ours: above 1, ours is faster."""
    times = []
    for function in (ours, other):
        function()  # warm-up
    for _ in range(rounds):
        pair = []
        for function in (ours, other):
            started = time.perf_counter()
            function()
            pair.append(time.perf_counter() - started)
        times.append(pair)
    mine, theirs = zip(*times, strict=True)
    return {
        "seconds": round(statistics.median(mine), 4),
        "other_seconds": round(statistics.median(theirs), 4),
        "ratio": round(statistics.median(b / a for a, b in times), 3),
    }


def training_step(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def train_vs_transformers(name: str, rows: int, rounds: int) -> dict[str, float]:
    """A whole optimizer step on `rows` rows of a config's context, both models with fused AdamW."""
    from tests.test_model import to_transformers

    torch.manual_seed(0)
    config = configs.load(f"configs/{name}.py").model
    ours = Transformer(config)
    theirs = to_transformers(ours).train()
    tokens = torch.randint(config.vocab_size, (rows, config.context_length + 1))
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    plain = lambda: F.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten())  # noqa: E731
    found = compare(training_step(ours, lambda: ours(x, y)), training_step(theirs, plain), rounds)
    return found | {"tokens_per_second": round(y.numel() / found["seconds"])}


def loss_vs_plain(d_model: int, vocabulary: int, rows: int, rounds: int) -> dict[str, float]:
    """Projection and cross-entropy, forward and backward: chunked, and with all logits at once."""
    x = torch.randn(rows, d_model, requires_grad=True)
    weight = (0.02 * torch.randn(vocabulary, d_model)).requires_grad_()
    targets = torch.randint(vocabulary, (rows,))
    return compare(
        lambda: linear_cross_entropy(x, weight, targets).backward(),
        lambda: F.cross_entropy(F.linear(x, weight), targets).backward(),
        rounds,
    )


def main() -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    found = {
        "device": f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "commit": commit,
        "versions": stage.versions(),
        "train_demo_vs_transformers": train_vs_transformers("demo", 4, 30),
        "train_tiny_vs_transformers": train_vs_transformers("tiny", 2, 7),
        "loss_4096_vs_plain": loss_vs_plain(128, 4_096, 1_024, 30),
        "loss_32768_vs_plain": loss_vs_plain(256, 32_768, 2_048, 7),
    }
    RESULT.parent.mkdir(exist_ok=True)
    stage.write_json(RESULT, found)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
