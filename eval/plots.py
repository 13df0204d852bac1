"""Pictures of runs as PNG. The same numbers give the same bytes."""

import math
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from configs import TRAINED
from eval.summary import Run
from eval.tasks import METRICS

matplotlib.rcdefaults()  # nothing comes from the user's settings
matplotlib.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "axes.formatter.limits": (-3, 6)}
matplotlib.rcParams |= {"axes.grid": True, "axes.grid.axis": "y", "grid.alpha": 0.25}
PANELS = {  # the label of an axis, and the metrics on it; the last two panels are for DPO
    "loss (nats)": ("loss", "val_loss"),
    "learning rate": ("lr",),
    "gradient norm before clipping": ("grad_norm",),
    "tokens per second": ("tokens_per_second",),
    "reward": ("reward_chosen", "val_reward_chosen", "reward_rejected", "val_reward_rejected"),
    "share of pairs won": ("accuracy", "val_accuracy"),
}


def draw(run: Run, directory: Path) -> list[str]:
    """Draws all pictures into a directory. Returns them as the report shows them."""
    figures = {}
    for name in TRAINED:
        if records := run.metrics(name):
            figures[name] = curves(records, f"{run.experiment.name}: {name}")
    if tasks := run.measured():
        figures["evaluation"] = bars(tasks)
    directory.mkdir(exist_ok=True)
    for name, drawing in figures.items():
        drawing.savefig(directory / f"{name}.png", metadata={"Software": None})
    return [f"![{name}](plots/{name}.png)" for name in figures]


def figure(title: str, panels: int, columns: int) -> Figure:
    rows = math.ceil(panels / columns)
    drawing = Figure(figsize=(11, 1 + 3 * rows), dpi=120, layout="constrained")
    drawing.suptitle(title)
    for number in range(panels):
        drawing.add_subplot(rows, columns, number + 1)
    return drawing


def curves(records: list[dict], title: str) -> Figure:
    """The logged numbers of a training run over its steps. A null leaves a gap."""
    drawing = figure(title, 6 if "reward_chosen" in records[0] else 4, 2)
    steps = [record["step"] for record in records]
    for axis, (label, keys) in zip(drawing.axes, PANELS.items(), strict=False):
        axis.set(xlabel="step", ylabel=label)
        for number, key in enumerate(keys):
            style = f"C{number // 2}" + ("o" if key.startswith("val_") else "-")
            values = [record.get(key) for record in records]
            axis.plot(steps, values, style, markersize=5, markeredgecolor="black", linewidth=1, label=key)
        if len(keys) > 1:
            axis.legend(fontsize="small")
    return drawing


def compare(runs: list[Run], path: Path, in_bytes: bool) -> None:
    """Draws the losses of several runs over the tokens trained: a panel for each stage that two of them have logged."""
    # in_bytes: pretraining in bits per byte, because losses per token of other tokenizers do not compare.
    stages = [name for name in TRAINED if sum(bool(run.metrics(name)) for run in runs) > 1]
    drawing = figure("thin: training; points: held-out", len(stages), max(1, min(2, len(stages))))
    for axis, name in zip(drawing.axes, stages, strict=True):
        bytewise = in_bytes and name == "pretrain"
        axis.set(title=name, xlabel="million tokens trained", ylabel="bits per byte" if bytewise else "loss (nats)")
        for number, run in enumerate(runs):
            records = run.metrics(name)
            if not records:
                continue
            evaluated = [record for record in records if record.get("val_loss")]
            scale = 1.0
            if bytewise:  # the same factor in all steps: bits per nat, and tokens per byte
                scale = evaluated[0]["val_bits_per_byte"] / evaluated[0]["val_loss"] if evaluated else math.nan
            later = records[len(records) // 20 :]  # the first losses, far above all others, would flatten the rest
            label = " " + run.name.replace("$", r"\$")  # matplotlib hides a label that begins with _
            for part, key, style in ((later, "loss", "-"), (evaluated, "val_loss", "o-")):
                tokens = [record["tokens"] / 1e6 for record in part]
                losses = [(record[key] or math.nan) * scale for record in part]
                look = {"linewidth": 0.6, "alpha": 0.5} if key == "loss" else {"label": label}
                axis.plot(tokens, losses, f"C{number}{style}", **look)
        axis.legend()
    drawing.savefig(path, metadata={"Software": None})


def bars(tasks: dict[str, dict]) -> Figure:
    drawing = figure("dashed: baseline; whiskers: two standard errors", len(tasks), 4)
    for axis, (task, entries) in zip(drawing.axes, tasks.items(), strict=True):
        metric = METRICS[task]
        axis.set(title=task, ylabel=metric)
        for name, entry in entries.items():
            axis.bar(name, entry[metric], yerr=2 * (entry["stderr"] or 0), capsize=3)  # null: unknown
            if "baseline" in entry:
                axis.axhline(entry["baseline"], color="black", linestyle="--")
        axis.set_ylim(bottom=0)
    return drawing
