"""Preference learning: pairs read as one row, with a reference that is no second model, beside the usual way.

    DATA=… python -m benchmarks.dpo configs/alpaca.py   ->  benchmarks/results/dpo.json

All ways train the same adapter on the same pairs, PAIRS at a time, and compute the same losses, which is checked first:

- stored: the project's; of the reference there are the log-probabilities;
- adapter_off: the project's; the reference is the model without its adapter, at each step;
- usual: prompt and answer a row, padded to the batch's longest, the chosen answers and then the rejected ones; all
  logits; a second model as reference, at each step;
- usual_together: the same, chosen and rejected answers in one batch.

They are timed in turn, a few steps each, every one in a process of its own; results are medians, and medians of the
rounds' ratios. Weights are random: what is measured does not depend on them.
"""

import argparse
import copy
import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import configs
import lora
import machine
import pipeline
import stage
from benchmarks.common import in_turn, once, parser, ratio, run, several, training_step, write
from dpo.data import PairRows
from dpo.loss import log_probs, preference_loss
from model import IGNORED, Transformer
from optim import make_optimizers

PAIRS, ROUNDS, BATCHES = 8, 3, 3
WAYS = ("stored", "adapter_off", "usual", "usual_together")


def train_pairs(experiment) -> PairRows:
    directory = experiment.directory("dpo_data")
    return PairRows(directory, "train", stage.finished(directory, experiment.command("dpo_data"))["counts"])


def batch(pairs: PairRows, step: int) -> tuple[Tensor, Tensor, Tensor]:
    return pairs.read([pairs.drawn(step * PAIRS + i) for i in range(PAIRS)])


# ------------------------------------------------------------------------------------------------------ the usual way


def padded(ids: Tensor, bounds: Tensor, sides: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Inputs and targets, (rows, longest), of prompts and their answers, 0 the chosen, 1 the rejected ones."""
    rows = []
    for side in sides:
        for row, (p, *ends) in zip(ids, bounds.tolist(), strict=True):
            rows.append((p, torch.cat([row[:p], row[(p, *ends)[side] : ends[side]]])))
    shape = len(rows), max(len(text) for _, text in rows) - 1
    tokens, targets = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORED)
    for i, (p, text) in enumerate(rows):
        tokens[i, : len(text) - 1] = text[:-1]
        targets[i, p - 1 : len(text) - 1] = text[p:]
    return tokens, targets


def usual_log_probs(model: Transformer, ids: Tensor, bounds: Tensor, together: bool) -> Tensor:
    """log π of the answers: (pairs, 2) float64. Padding is behind the texts, where no causal query sees it."""
    found = []
    for sides in [(0, 1)] if together else [(0,), (1,)]:
        tokens, targets = padded(ids, bounds, sides)
        losses = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED)
        found.append(-losses.view(targets.shape).double().sum(1))
    return torch.cat(found).view(2, -1).T


# ----------------------------------------------------------------------------------------------------------- training


def pair_losses(way: str, model: Transformer, base: Transformer | None, stored: Tensor | None, config) -> Callable:
    """Of a way the loss of each pair, as a function of ids, bounds and numbers. base: the usual ways' reference."""

    def losses(ids: Tensor, bounds: Tensor, numbers: Tensor) -> Tensor:
        if way.startswith("usual"):
            together = way == "usual_together"
            with torch.no_grad():
                reference = usual_log_probs(base, ids, bounds, together)
            policy = usual_log_probs(model, ids, bounds, together)
        else:
            if way == "stored":
                reference = stored[numbers]
            else:
                with torch.no_grad(), lora.without(model):
                    reference = log_probs(model, ids, bounds)
            policy = log_probs(model, ids, bounds)
        return preference_loss(policy, reference, bounds.diff(dim=1), config)

    return losses


def check(path: str) -> list[float]:
    """The mean tokens of prompts and answers. AssertionError unless the ways give the first batch the same losses."""
    torch.manual_seed(0)
    experiment = configs.load(path)
    base = Transformer(experiment.model)
    model = copy.deepcopy(base)
    lora.attach(model, experiment.dpo.lora)
    for layer in lora.layers(model).values():
        for b in layer.b.values():
            torch.nn.init.normal_(b, std=5 / experiment.model.d_model)  # trained a little: else all rewards are 0
    pairs = train_pairs(experiment)
    ids, bounds, numbers = batch(pairs, 0)
    with torch.no_grad():
        stored = torch.zeros(pairs.count, 2, dtype=torch.float64)
        stored[numbers] = log_probs(base, ids, bounds)
        found = {way: pair_losses(way, model, base, stored, experiment.dpo.loss)(ids, bounds, numbers) for way in WAYS}
    assert found["usual"].std() > 0.01, f"the adapter hardly changes the model: {found['usual']}"
    for way, losses in found.items():
        torch.testing.assert_close(
            losses, found["usual"], rtol=1e-4, atol=0, msg=lambda text, way=way: f"{way}: {text}"
        )
    return (pairs.bounds[:, 1:] - pairs.bounds[:, :-1]).mean(0).round(1).tolist()


def trainer(way: str, path: str) -> Callable[[], tuple]:
    """Some optimizer steps of a way, which count pairs."""
    torch.manual_seed(0)
    machine.keep_freed_memory()
    experiment = configs.load(path)
    model = Transformer(experiment.model)
    base = copy.deepcopy(model).requires_grad_(False) if way.startswith("usual") else None
    lora.attach(model, experiment.dpo.lora)
    pairs, done = train_pairs(experiment), 0
    stored = -100 * torch.rand(pairs.count, 2, dtype=torch.float64)
    losses = pair_losses(way, model, base, stored, experiment.dpo.loss)
    optimizers = make_optimizers(model, experiment.dpo.train)
    step = training_step(model, optimizers, lambda *batch: losses(*batch).mean())

    def pairs_trained() -> int:
        nonlocal done
        step(*batch(pairs, done))
        done += 1
        return PAIRS

    return several(pairs_trained, BATCHES)


def training(path: str, rounds: int) -> dict:
    own, paces, peaks = WAYS[:2], {}, {}
    found: dict[str, dict[str, float]] = {"speed": {}, "memory": {}}
    for usual in WAYS[2:]:  # one at a time: all logits of both take much memory
        turns = in_turn(rounds, {way: partial(trainer, way, path) for way in (*own, usual)})
        pace = {way: [seconds / count for seconds, count, _ in taken] for way, taken in turns.items()}
        peak = {way: round(taken[-1][2]) for way, taken in turns.items()}
        paces, peaks = pace | paces, peak | peaks
        for way in own:
            found["speed"][f"{way}_vs_{usual}"] = ratio(pace[usual], pace[way])
            found["memory"][f"{way}_memory_vs_{usual}"] = round(peak[way] / peak[usual], 3)
    return {
        "pairs_per_second": {way: round(1 / statistics.median(paces[way]), 2) for way in WAYS},
        "peak_mib": {way: peaks[way] for way in WAYS},
        **found["speed"],
        **found["memory"],
    }


def main(arguments: argparse.Namespace) -> None:
    pipeline.main(pipeline.parser().parse_args([arguments.config, "dpo_data"]))
    tokens = once("the check", check, arguments.config)
    found = {
        "mean_tokens": dict(zip(("prompt", "chosen", "rejected"), tokens, strict=True)),
        "training": training(arguments.config, 1 if arguments.quick else ROUNDS),
    }
    write("dpo", f"python -m benchmarks.dpo {arguments.config}", found, arguments.quick)


if __name__ == "__main__":
    run(main, parser(__doc__, "configs/alpaca.py"))
