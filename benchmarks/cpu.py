"""Training and decoding on a CPU, beside transformers' LLaMA with the same weights and beside the bare arithmetic.

    python -m benchmarks.cpu   ->  benchmarks/results/cpu.json

What is compared is timed in turn, round by round, so that what slows the machine slows all of it; quoted are medians,
and medians of the rounds' ratios. Both train as they do by default: ours as train.py does, theirs with AdamW.
"""

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import configs
import machine
import stage
from benchmarks import decoding
from model import Transformer, linear_cross_entropy
from optim import make_optimizers

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


def training_step(
    model: torch.nn.Module, loss: Callable, optimizers: list[torch.optim.Optimizer]
) -> Callable[[], None]:
    def step() -> None:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def trainer(whose: str, name: str, rows: int, length: int) -> Callable[[], None]:
    """An optimizer step on `rows` rows of `length` tokens: "ours", "theirs", or theirs "keeping" freed memory as ours
    does."""
    torch.manual_seed(0)
    experiment = configs.load(f"configs/{name}.py")
    model = Transformer(experiment.model)
    tokens = torch.randint(experiment.model.vocab_size, (rows, length + 1))
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    if whose != "theirs":
        machine.keep_freed_memory()
    if whose == "ours":
        if experiment.pretrain.compile:
            machine.compile_blocks(model, torch.device("cpu"))
        optimizers = make_optimizers(model, experiment.pretrain)
        return training_step(model, lambda: model(x, y), optimizers)
    from tests.test_model import to_transformers

    model = to_transformers(model).train()
    loss = lambda: F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten())  # noqa: E731
    return training_step(model, loss, [torch.optim.AdamW(model.parameters())])


def worker(*arguments) -> None:
    """A process that trains: it does what the lines of its standard input say and prints the seconds it took, or for
    "peak" the most memory it had until then, in MiB."""
    step, matrix = trainer(*arguments), None
    for line in sys.stdin:
        if line == "peak\n":
            print(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024, flush=True)
            matrix = probe()  # only now, lest it count
            matrix()
        else:
            started = time.perf_counter()
            step() if line == "step\n" else matrix()
            print(time.perf_counter() - started, flush=True)


def train_vs_transformers(name: str, rows: int, length: int, rounds: int) -> dict[str, float]:
    """Tokens/s of both, the share of the probed matrix rate that ours turns into the model's arithmetic, and memory.

    Each trains in a process of its own, as it does by default, a step in turn; the matrix rate is probed in ours. The
    model's arithmetic is that of ModelConfig.flops_per_token; of attention's share causal attention needs half.
    """
    workers, seconds = {}, {"probe": []}
    for whose in ("ours", "theirs", "keeping"):
        code = f"from benchmarks.cpu import worker; worker({whose!r}, {name!r}, {rows}, {length})"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        workers[whose] = subprocess.Popen([sys.executable, "-c", code], text=True, **pipes)
        seconds[whose] = []

    def ask(whose: str, what: str) -> float:
        workers[whose].stdin.write(what + "\n")
        workers[whose].stdin.flush()
        taken = float(workers[whose].stdout.readline())
        time.sleep(0.05)  # until its threads sleep
        return taken

    peak = {}
    for whose in workers:
        ask(whose, "step"), ask(whose, "step"), ask(whose, "step")
        peak[whose] = round(ask(whose, "peak"))
    for _ in range(rounds):
        seconds["probe"].append(ask("ours", "probe"))
        for whose in workers:
            seconds[whose].append(ask(whose, "step"))
    for process in workers.values():
        process.communicate()

    c = configs.load(f"configs/{name}.py").model
    rate = {whose: round(rows * length / statistics.median(times)) for whose, times in seconds.items()}
    flops = c.flops_per_token(length)
    arithmetic = {"": flops, "_causal": flops - 6 * c.n_layers * c.d_model * length}
    work = [2 * PROBE**3 * s / p / (rows * length) for s, p in zip(seconds["ours"], seconds["probe"], strict=True)]
    return {
        "tokens_per_second": rate["ours"],
        "other_tokens_per_second": rate["theirs"],
        "ratio": ratio(seconds["theirs"], seconds["ours"]),
        "ratio_if_theirs_keeps_freed_memory_too": ratio(seconds["keeping"], seconds["ours"]),
        "probe_gflops": round(2 * PROBE**3 / statistics.median(seconds["probe"]) / 1e9),
        **{f"of_matrix_rate{which}": ratio([n] * rounds, work) for which, n in arithmetic.items()},
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


def main() -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    found = {
        "device": f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "commit": commit,
        "versions": stage.versions(),
        **decoding.results(),
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
