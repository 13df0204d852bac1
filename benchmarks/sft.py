"""Fine-tuning: how well rows are packed and how fast they are trained, beside padding; LoRA beside training it all.

    DATA=… python -m benchmarks.sft configs/alpaca.py   ->  benchmarks/results/sft.json

Ways to train are timed in turn, a step each, every one in a process of its own; quoted are medians, and medians of the
rounds' ratios. Weights are random: what is measured does not depend on them. Useful tokens are those of conversations,
padding left out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import cli
import configs
import lora
import machine
import pipeline
import sft.data
import stage
from benchmarks.cpu import ratio
from model import IGNORED, Transformer, linear_cross_entropy
from optim import make_optimizers
from sft.data import Rows
from sft.filters import Judge

RESULT = Path(__file__).parent / "results/sft.json"
ROUNDS, BATCHES, ROWS, CONVERSATIONS = 5, 3, 4, 32  # batches differ in length: a round is of several


def preparation(experiment) -> dict[str, float]:
    """Reading, judging, spelling and packing, the tokenizer already made."""
    config, context = experiment.sft.data, experiment.model.context_length
    spm = experiment.load_tokenizer()
    with tempfile.TemporaryDirectory() as directory:
        started = time.perf_counter()
        encode = partial(sft.data.encode, config, spm, context)
        splits, sources = sft.data.gather(config, encode, Judge(config.filters), workers=2)
        counts = {s: sft.data.write(Path(directory), s, splits[s], list(sources), context) for s in splits}
        seconds = time.perf_counter() - started
    greedy, room = 0, 0
    for item in splits["train"]:  # as they come, each row until full
        if room < len(item.ids) - 1:
            greedy, room = greedy + 1, context
        room -= len(item.ids) - 1
    train = counts["train"]
    return {
        "conversations": sum(count["read"] for count in sources.values()),
        "seconds": round(seconds, 1),
        "rows": train["rows"],
        "packing_efficiency": round(train["packing_efficiency"], 4),
        "greedy_packing_efficiency": round(train["packing_efficiency"] * train["rows"] / greedy, 4),
    }


def packed_batches(rows: Rows) -> Iterator[tuple[Tensor, ...]]:
    for step in range(1_000_000):
        yield rows.read([rows.drawn(step * ROWS + i) for i in range(ROWS)])


def padded_batches(rows: Rows) -> Iterator[tuple[Tensor, Tensor]]:
    """Conversations drawn at random, each in a row of its own as long as the longest."""
    rng = np.random.default_rng(0)
    while True:
        cases = [rows.conversation(int(i)) for i in rng.choice(len(rows.starts) - 1, CONVERSATIONS, replace=False)]
        length = max(len(ids) for ids, _ in cases) - 1
        tokens, targets = torch.zeros(len(cases), length, dtype=torch.int64), torch.full((len(cases), length), IGNORED)
        for row, (ids, trained) in enumerate(cases):
            tokens[row, : len(ids) - 1] = torch.from_numpy(ids[:-1])
            targets[row, : len(ids) - 1] = torch.from_numpy(np.where(trained[1:], ids[1:], IGNORED))
        yield tokens, targets


def trainer(way: str, path: str) -> Callable[[], int]:
    """An optimizer step of a way; it gives the useful tokens in it."""
    torch.manual_seed(0)
    machine.keep_freed_memory()
    experiment = configs.load(path)
    model = Transformer(experiment.model)
    if way != "full":
        lora.attach(model, experiment.sft.lora)
    optimizers = make_optimizers(model, experiment.sft.train)
    directory = experiment.directory("sft_data")
    counts = stage.finished(directory, experiment.command("sft_data"))["counts"]
    rows = Rows(directory, "train", counts, experiment.model.context_length)
    padded = way.startswith("padded")
    batches = padded_batches(rows) if padded else packed_batches(rows)

    def loss(tokens: Tensor, targets: Tensor, positions: Tensor | None = None) -> Tensor:
        if way == "padded_all_logits":
            return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        if way == "masked":
            text = (positions == 0).cumsum(1)
            mask = (text[:, None, :, None] == text[:, None, None, :]) & torch.ones(2 * [tokens.shape[1]]).tril().bool()
            x = model.hidden(tokens, positions=positions, mask=mask)
            return linear_cross_entropy(x.flatten(0, 1), model.head.weight, targets.flatten())
        return model(tokens, targets, positions=positions)

    def step() -> int:
        batch = next(batches)
        loss(*batch).backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if padded:
            return int((batch[0] != 0).sum())
        return int(batch[0].numel() - (batch[0] == 0).sum())

    return step


def worker(step: Callable[[], int]) -> None:
    """A process that trains: for every line of its standard input BATCHES steps; it prints seconds, useful tokens, and
    the most memory it has had, in MiB."""
    for _ in sys.stdin:
        started = time.perf_counter()
        tokens = sum(step() for _ in range(BATCHES))
        seconds = time.perf_counter() - started
        peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
        print(json.dumps([seconds, tokens, peak]), flush=True)


def timed(
    path: str, *ways: str, module: str = "benchmarks.sft", rounds: int = ROUNDS
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, int]]:
    """For each way of the module's `trainer` seconds a useful token, or whatever its steps count, and seconds a step,
    round by round, and peak MiB."""
    workers, found = {}, {way: [] for way in ways}
    for way in ways:
        code = f"from benchmarks.sft import worker; from {module} import trainer; worker(trainer({way!r}, {path!r}))"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        workers[way] = subprocess.Popen([sys.executable, "-c", code], text=True, **pipes)
    for i in range(rounds + 1):
        for way, process in workers.items():
            process.stdin.write("\n")
            process.stdin.flush()
            numbers = json.loads(process.stdout.readline())
            time.sleep(0.05)  # until its threads sleep
            if i:
                found[way].append(numbers)
    for process in workers.values():
        process.communicate()
    pace = {way: [seconds / tokens for seconds, tokens, _ in numbers] for way, numbers in found.items()}
    step = {way: [seconds / BATCHES for seconds, _, _ in numbers] for way, numbers in found.items()}
    return pace, step, {way: round(numbers[-1][2]) for way, numbers in found.items()}


def training(path: str) -> dict[str, float]:
    pace, step, peak = timed(path, "packed", "masked", "padded", "full")
    other, _, more = timed(path, "packed", "padded_all_logits")  # apart: with the others it would not fit 24 GiB
    return {
        "useful_tokens_per_second": {way: round(1 / statistics.median(taken)) for way, taken in pace.items()},
        "seconds_per_step": {way: round(statistics.median(taken), 3) for way, taken in step.items()},
        "peak_mib": more | peak,
        "packed_vs_padded": ratio(pace["padded"], pace["packed"]),
        "packed_vs_padded_all_logits": ratio(other["padded_all_logits"], other["packed"]),
        "by_text_vs_explicit_mask": ratio(pace["masked"], pace["packed"]),
        "lora_steps_vs_full": ratio(step["full"], step["packed"]),
        "lora_memory_vs_full": round(peak["packed"] / peak["full"], 3),
    }


def main(arguments: argparse.Namespace) -> None:
    experiment = configs.load(arguments.config)
    pipeline.main(pipeline.parser().parse_args([arguments.config, "sft_data"]))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    found = {
        "command": f"python -m benchmarks.sft {Path(arguments.config).name}",
        "commit": commit,
        "machine": machine.name(torch.device("cpu")),
        "cores": len(os.sched_getaffinity(0)),
        "versions": stage.versions(),
        "preparation": preparation(experiment),
        "training": training(arguments.config),
    }
    stage.write_json(RESULT, found)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    cli.run(main, cli.parser(__doc__).parse_args())
