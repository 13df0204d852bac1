"""Loss against compute: three sizes of model, each trained on three budgets of prose; bits per byte of held-out text.

    DATA=… python -m benchmarks.scaling    ->  benchmarks/results/scaling.json, docs/report/scaling.png

As many runs train at once as there are cores, each with one thread. The recipe is that of configs/prose_tiny.py, but
with batches of 4 rows and a schedule as long as the budget. A run that was interrupted is resumed.
"""

import argparse
import itertools
import math
import os
from concurrent.futures import as_completed
from dataclasses import replace
from pathlib import Path

import numpy as np

import cli
import configs
import stage
from benchmarks.ablations import make, measure, origin, start
from benchmarks.common import RESULTS, about, parser, run, write
from cli import UserError, log
from configs import Experiment
from model import Transformer

SIZES = {  # layers, width, heads
    "micro": (4, 128, 2),
    "middle": (5, 192, 3),
    "tiny": (6, 256, 4),
}
BUDGETS = (2**20, 2**21, 2**22)  # tokens
ROWS, HELD_OUT = 4, 256  # rows of a batch; rows of held-out text
PICTURE = stage.ROOT / "docs/report/scaling.png"


def experiment(base: Experiment, size: str, tokens: int) -> Experiment:
    """The experiment of one run. It shares the packed tokens of `base`."""
    n_layers, d_model, n_heads = SIZES[size]
    model = replace(base.model, n_layers=n_layers, d_model=d_model, n_heads=n_heads, n_kv_heads=None, d_ff=None)
    steps = tokens // (ROWS * model.context_length)
    pretrain = replace(
        base.pretrain,
        steps=steps,
        epochs=None,
        warmup_steps=0,
        warmup_fraction=0.05,
        batch_size=ROWS,
        micro_batch_size=None,
        eval_every=10**6,
        eval_rows=HELD_OUT,
        save_every=250,
    )
    shared = {"corpus": base, "tokenizer": base, "pack": base}
    return replace(base, name=f"scaling_{size}_{tokens}", model=model, pretrain=pretrain, shared=shared)


def power_law(x: list[float], y: list[float]) -> dict[str, float]:
    """a and b of y = a · x^b, fitted to the logarithms by least squares."""
    b, log_a = np.polyfit(np.log(x), np.log(y), 1)
    return {"a": math.exp(log_a), "exponent": b}


def column(budgets: dict[str, dict], name: str) -> list[float]:
    return [each[name] for each in budgets.values()]


def analyse(runs: dict[str, dict]) -> dict:
    """The line of each size in FLOPs, and the best size for the compute of each run where all sizes overlap."""
    computes = {size: column(budgets, "flops") for size, budgets in runs.items()}
    lines = {size: power_law(computes[size], column(budgets, "bits_per_byte")) for size, budgets in runs.items()}
    lowest, highest = max(map(min, computes.values())), min(map(max, computes.values()))
    best = []
    for compute in sorted(itertools.chain(*computes.values())):
        if lowest <= compute <= highest:
            losses = {size: line["a"] * compute ** line["exponent"] for size, line in lines.items()}
            size = min(losses, key=losses.get)
            one = next(iter(runs[size].values()))
            tokens = compute * one["tokens"] / one["flops"]
            which = {"flops": compute, "size": size, "tokens": round(tokens)}
            best.append(which | {"tokens_per_parameter": tokens / one["parameters"], "bits_per_byte": losses})
    return {"lines": lines, "best": best}


def draw(runs: dict[str, dict], found: dict, path: Path) -> None:
    """Draws held-out loss over compute: the runs of each size, and the line fitted to them."""
    from eval.plots import figure

    drawing = figure("held-out loss against compute; dashed: the lines fitted to each size, extended", 1, 1)
    (axis,) = drawing.axes
    axis.set(xlabel="floating-point operations of training", ylabel="bits per byte", xscale="log", yscale="log")
    computes = list(itertools.chain(*(column(budgets, "flops") for budgets in runs.values())))
    ends = np.array([min(computes), max(computes)])
    for size, budgets in runs.items():
        line, parameters = found["lines"][size], column(budgets, "parameters")[0]
        label = f"{size}, {parameters:,} parameters: compute to the power of {line['exponent']:.3f}"
        (dots,) = axis.plot(column(budgets, "flops"), column(budgets, "bits_per_byte"), "o", label=label)
        axis.plot(ends, line["a"] * ends ** line["exponent"], "--", linewidth=1, color=dots.get_color())
    axis.yaxis.set_major_formatter("{x:.2f}")
    axis.yaxis.set_minor_formatter("{x:.2f}")
    axis.legend()
    path.parent.mkdir(exist_ok=True)
    drawing.savefig(path, metadata={"Software": None})


def main(arguments: argparse.Namespace) -> None:
    base, path, budgets, runs = configs.load(arguments.config), RESULTS / "scaling.json", BUDGETS, {}
    if arguments.quick:
        base, budgets = replace(base, pretrain=replace(base.pretrain, compile=False)), (2**10, 2**11)
    elif path.exists():
        runs = stage.read_json(path)["runs"]
    cli.extra("matplotlib", "matplotlib", "the picture")
    make("pack", base)
    made = about("python -m benchmarks.scaling")
    with cli.pool(os.cpu_count(), start) as pool:
        started = {}
        for tokens, size in itertools.product(sorted(budgets, reverse=True), reversed(SIZES)):  # the longest run first
            one = experiment(base, size, tokens)
            made_from = origin(base, one, Transformer)
            if runs.get(size, {}).get(str(tokens), {}).get("made_from") != made_from:
                known = {
                    "tokens": tokens,
                    "flops": tokens * one.model.flops_per_token(one.model.context_length),
                    "commit": made["commit"],
                }
                started[pool.submit(measure, one, Transformer, made_from)] = size, str(tokens), known
        for number, finished in enumerate(as_completed(started), start=1):
            size, tokens, known = started[finished]
            runs.setdefault(size, {})[tokens] = result = finished.result() | known
            if "failed" in result:
                raise UserError(f"{size} diverged on {tokens} tokens; lower the learning rate of {arguments.config}")
            bits = f"{result['bits_per_byte']:.4f} bits per byte"
            log.info(f"{number} of {len(started)}: {size}, {tokens} tokens: {bits}")
            if not arguments.quick:
                stage.write_json(path, made | {"runs": runs})
    runs = {size: dict(sorted(runs[size].items(), key=lambda item: int(item[0]))) for size in SIZES}
    found = analyse(runs)
    write("scaling", "python -m benchmarks.scaling", made | {"runs": runs} | found, arguments.quick)
    if not arguments.quick:
        draw(runs, found, PICTURE)


if __name__ == "__main__":
    run(main, parser(__doc__, "configs/prose_tiny.py"))
