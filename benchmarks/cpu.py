"""Training and generation on a CPU, beside transformers' LLaMA with the same weights and beside the bare arithmetic.

    python -m benchmarks.cpu   ->  benchmarks/results/cpu.json

What is compared is timed in turn, round by round, so that what slows the machine slows all of it; quoted are medians,
and medians of the rounds' ratios. Both train as they do by default: ours as train.py does, theirs with AdamW.
"""

import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

import configs
import stage
import train
from model import Transformer, linear_cross_entropy

RESULT = Path(__file__).parent / "results/cpu.json"
PROBE = 2048  # the matrix product that the machine's rate is taken from: PROBE³ multiplications and additions


def interleaved(rounds: int, functions: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of each function in each round, after one that does not count."""
    seconds = {name: [] for name in functions}
    for i in range(rounds + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if i:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """The median over the rounds."""
    return round(statistics.median(a / b for a, b in zip(numerator, denominator, strict=True)), 3)


def probe() -> Callable[[], object]:
    a, b, out = torch.randn(PROBE, PROBE), torch.randn(PROBE, PROBE), torch.empty(PROBE, PROBE)
    return lambda: torch.mm(a, b, out=out)


# ------------------------------------------------------------------------------------------------------------ training


def training_step(model: torch.nn.Module, loss: Callable, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def step() -> None:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def trainers(name: str, rows: int, length: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """(whose, an optimizer step on `rows` rows of `length` tokens), each model made when it is asked for."""
    from tests.test_model import to_transformers

    torch.manual_seed(0)
    experiment = configs.load(f"configs/{name}.py")
    ours = Transformer(experiment.model)
    tokens = torch.randint(experiment.model.vocab_size, (rows, length + 1))
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    train.keep_freed_memory()
    if experiment.pretrain.compile:
        train.compile_blocks(ours)
    yield "ours", training_step(ours, lambda: ours(x, y), train.make_optimizer(ours, experiment.pretrain))
    theirs = to_transformers(Transformer(experiment.model)).train()
    loss = lambda: F.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten())  # noqa: E731
    yield "theirs", training_step(theirs, loss, torch.optim.AdamW(theirs.parameters()))


def peak_memory(whose: str, name: str, rows: int, length: int) -> None:
    """Prints this process's peak memory in MiB, after three steps."""
    step = next(step for who, step in trainers(name, rows, length) if who == whose)
    for _ in range(3):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def train_vs_transformers(name: str, rows: int, length: int, rounds: int) -> dict[str, float]:
    """Tokens/s of both, the share of the probed matrix rate that ours turns into the model's arithmetic, and memory.

    The model's arithmetic, a token: 6 for each weight of a matrix but the embedding, and 12 · n_layers · d_model · T
    for attention (arXiv:2204.02311, appendix B), of which causal attention needs half.
    """
    found = interleaved(rounds, {"probe": probe(), **dict(trainers(name, rows, length))})
    c = configs.load(f"configs/{name}.py").model
    with torch.device("meta"):
        weights = Transformer(c).num_parameters() - c.vocab_size * c.d_model - (2 * c.n_layers + 1) * c.d_model
    flops = {"": 12 * c.n_layers * c.d_model * length, "_causal": 6 * c.n_layers * c.d_model * length}
    bare = [2 * PROBE**3 / seconds for seconds in found["probe"]]
    shares = {
        f"of_matrix_rate{which}": ratio([rows * length * (6 * weights + f) / s for s in found["ours"]], bare)
        for which, f in flops.items()
    }
    peak = {}
    for whose in ("ours", "theirs"):
        code = f"from benchmarks.cpu import peak_memory; peak_memory({whose!r}, {name!r}, {rows}, {length})"
        printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        peak[whose] = int(printed.split()[-1])
    return {
        "tokens_per_second": round(rows * length / statistics.median(found["ours"])),
        "other_tokens_per_second": round(rows * length / statistics.median(found["theirs"])),
        "ratio": ratio(found["theirs"], found["ours"]),
        "probe_gflops": round(statistics.median(bare) / 1e9),
        **shares,
        "peak_mib": peak["ours"],
        "other_peak_mib": peak["theirs"],
        "memory_ratio": round(peak["ours"] / peak["theirs"], 3),
    }


def loss_vs_plain(d_model: int, vocabulary: int, rows: int, rounds: int) -> dict[str, float]:
    """Projection and cross-entropy, forward and backward: chunked, and with all logits at once."""
    x = torch.randn(rows, d_model, requires_grad=True)
    weight = (0.02 * torch.randn(vocabulary, d_model)).requires_grad_()
    targets = torch.randint(vocabulary, (rows,))
    ways = {
        "ours": lambda: linear_cross_entropy(x, weight, targets).backward(),
        "plain": lambda: F.cross_entropy(F.linear(x, weight), targets).backward(),
    }
    found = interleaved(rounds, ways)
    return {name: round(statistics.median(s), 4) for name, s in found.items()} | {
        "ratio": ratio(found["plain"], found["ours"])
    }


# ---------------------------------------------------------------------------------------------------------- generation


def generate_vs_transformers(name: str, batch: int, rounds: int, new: int = 128) -> dict[str, float]:
    """Greedy tokens/s for prompts of 32 tokens: ours, `generate` of transformers, and the bare matrix products that a
    decoding step cannot do without."""
    from tests.test_model import to_transformers

    torch.manual_seed(0)
    ours = Transformer(configs.load(f"configs/{name}.py").model).eval()
    theirs = to_transformers(ours)
    prompts = torch.randint(ours.config.vocab_size, (batch, 32))
    matrices = [w for n, w in ours.named_parameters() if w.dim() == 2 and not n.startswith("embed")]
    inputs = {width: torch.randn(batch, width) for width in {w.shape[1] for w in matrices}}

    @torch.inference_mode()
    def bare() -> None:
        for _ in range(new):
            for w in matrices:
                F.linear(inputs[w.shape[1]], w)

    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    ways = {
        "bare": bare,
        "ours": lambda: ours.generate(prompts.tolist(), new, temperature=0),
        "theirs": lambda: theirs.generate(prompts, **settings),
    }
    found = interleaved(rounds, ways)
    return {
        "tokens_per_second": round(batch * new / statistics.median(found["ours"]), 1),
        "other_tokens_per_second": round(batch * new / statistics.median(found["theirs"]), 1),
        "bare_tokens_per_second": round(batch * new / statistics.median(found["bare"]), 1),
        "ratio": ratio(found["theirs"], found["ours"]),
        "of_bare_rate": ratio(found["bare"], found["ours"]),
    }


def main() -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    found = {
        "device": f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "commit": commit,
        "versions": stage.versions(),
        "generate_tiny_1_vs_transformers": generate_vs_transformers("tiny", 1, 5),
        "generate_tiny_8_vs_transformers": generate_vs_transformers("tiny", 8, 5),
        "train_tiny_8x256_vs_transformers": train_vs_transformers("tiny", 8, 256, 9),
        "train_tiny_2x1024_vs_transformers": train_vs_transformers("tiny", 2, 1_024, 9),
        "train_demo_vs_transformers": train_vs_transformers("demo", 4, 256, 30),
        "loss_4096_vs_plain": loss_vs_plain(128, 4_096, 1_024, 30),
        "loss_32768_vs_plain": loss_vs_plain(256, 32_768, 2_048, 7),
    }
    RESULT.parent.mkdir(exist_ok=True)
    stage.write_json(RESULT, found)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
