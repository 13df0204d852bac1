"""Fine-tuning: how well rows are packed and how fast they are trained, beside padding; LoRA beside training it all.

    DATA=… python -m benchmarks.sft configs/alpaca.py   ->  benchmarks/results/sft.json

Ways to train are timed in turn, a few steps each, each in a process of its own; results are medians, and medians of
the rounds' ratios. Weights are random: what is measured does not depend on them. Useful tokens are those of
conversations, padding left out.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import configs
import lora
import machine
import pipeline
import sft.data
import stage
from benchmarks.common import in_turn, parser, ratio, run, several, training_step, write
from model import IGNORED, Transformer, linear_cross_entropy
from optim import make_optimizers
from sft.data import Rows
from sft.filters import Judge

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


def trainer(way: str, path: str) -> Callable[[], tuple]:
    """Some optimizer steps of a way, which count useful tokens."""
    torch.manual_seed(0)
    machine.keep_freed_memory()
    experiment = configs.load(path)
    model = Transformer(experiment.model)
    if way != "full":
        lora.attach(model, experiment.sft.lora)
    directory = experiment.directory("sft_data")
    counts = stage.finished(directory, experiment.command("sft_data"))["counts"]
    rows = Rows(directory, "train", counts, experiment.model.context_length)
    batches = padded_batches(rows) if way.startswith("padded") else packed_batches(rows)

    def loss(tokens: Tensor, targets: Tensor, positions: Tensor | None = None) -> Tensor:
        if way == "padded_all_logits":
            return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        if way == "masked":
            text = (positions == 0).cumsum(1)
            mask = (text[:, None, :, None] == text[:, None, None, :]) & torch.ones(2 * [tokens.shape[1]]).tril().bool()
            x = model.hidden(tokens, positions=positions, mask=mask)
            return linear_cross_entropy(x.flatten(0, 1), model.head.weight, targets.flatten())
        return model(tokens, targets, positions=positions)

    step = training_step(model, make_optimizers(model, experiment.sft.train), loss)

    def useful() -> int:
        batch = next(batches)
        step(*batch)
        return int((batch[0] != 0).sum())

    return several(useful, BATCHES)


def training(path: str, rounds: int) -> dict[str, float]:
    def timed(*ways: str) -> dict[str, list]:
        return in_turn(rounds, {way: partial(trainer, way, path) for way in ways})

    found = timed("packed", "masked", "padded", "full")
    apart = timed("packed", "padded_all_logits")  # with the others it would not fit 24 GiB
    pace = {way: [seconds / tokens for seconds, tokens, _ in turns] for way, turns in found.items()}
    other = {way: [seconds / tokens for seconds, tokens, _ in turns] for way, turns in apart.items()}
    step = {way: [seconds / BATCHES for seconds, _, _ in turns] for way, turns in found.items()}
    peak = {way: round(turns[-1][2]) for way, turns in (apart | found).items()}
    return {
        "useful_tokens_per_second": {way: round(1 / statistics.median(taken)) for way, taken in pace.items()},
        "seconds_per_step": {way: round(statistics.median(taken), 3) for way, taken in step.items()},
        "peak_mib": peak,
        "packed_vs_padded": ratio(pace["padded"], pace["packed"]),
        "packed_vs_padded_all_logits": ratio(other["padded_all_logits"], other["packed"]),
        "memory_vs_padded": round(peak["packed"] / peak["padded"], 3),
        "memory_vs_padded_all_logits": round(peak["packed"] / peak["padded_all_logits"], 3),
        "by_text_vs_explicit_mask": ratio(pace["masked"], pace["packed"]),
        "lora_steps_vs_full": ratio(step["full"], step["packed"]),
        "lora_memory_vs_full": round(peak["packed"] / peak["full"], 3),
    }


def main(arguments: argparse.Namespace) -> None:
    pipeline.main(pipeline.parser().parse_args([arguments.config, "sft_data"]))
    found = {"preparation": preparation(configs.load(arguments.config))}
    found["training"] = training(arguments.config, 1 if arguments.quick else ROUNDS)
    write("sft", f"python -m benchmarks.sft {arguments.config}", found, arguments.quick)


if __name__ == "__main__":
    run(main, parser(__doc__, "configs/alpaca.py"))
