"""The report's pictures as PNG. The same numbers give the same bytes. matplotlib is imported here and nowhere else."""

import io
import math

import matplotlib
from matplotlib.figure import Figure

from eval.summary import main_metric

BLUE, RED, GREEN = "#1f5fa8", "#c0392b", "#3a8f5c"
COLOURS = {"pretrain": BLUE, "sft": "#d9822b", "dpo": GREEN}
PANELS = {  # of a training: the label of an axis, and the metrics on it with their colours
    "loss (nats)": {"loss": BLUE, "val_loss": "black"},
    "learning rate": {"lr": BLUE},
    "gradient norm before clipping": {"grad_norm": BLUE},
    "tokens per second": {"tokens_per_second": BLUE},
    "reward": {"reward_chosen": GREEN, "val_reward_chosen": GREEN, "reward_rejected": RED, "val_reward_rejected": RED},
    "share of pairs won": {"accuracy": BLUE, "val_accuracy": BLUE},
}


def figure(panels: int, columns: int) -> tuple[Figure, list]:
    """A figure and the axes of its panels. Nothing comes from the user's matplotlib settings."""
    matplotlib.rcdefaults()
    matplotlib.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    rows = math.ceil(panels / columns)
    drawing = Figure(figsize=(11, 1 + 3 * rows), dpi=120, layout="constrained")
    axes = []
    for number in range(panels):
        axes.append(drawing.add_subplot(rows, columns, number + 1))
        axes[-1].grid(axis="y", alpha=0.25)
    return drawing, axes


def png(drawing: Figure) -> bytes:
    file = io.BytesIO()
    drawing.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def curves(records: list[dict], title: str) -> bytes:
    """What training logged over its steps, as it was logged. A null leaves a gap."""
    logged = {key for record in records for key in record}
    panels = [label for label, series in PANELS.items() if logged.intersection(series)]
    drawing, axes = figure(len(panels), 2)
    drawing.suptitle(title)
    for axis, label in zip(axes, panels, strict=True):
        axis.set(xlabel="step", ylabel=label)
        for key, colour in PANELS[label].items():
            steps, values = [], []
            for record in records:
                if key in record:
                    steps.append(record["step"])
                    values.append(number(record, key))
            style = "o-" if key.startswith("val_") else "-"
            axis.plot(steps, values, style, color=colour, markersize=4, linewidth=1, label=key)
        if len(PANELS[label]) > 1:
            axis.legend()
    return png(drawing)


def bars(tasks: dict[str, dict[str, dict]]) -> bytes:
    """{task: {stage: its numbers}} beside the baselines. Whiskers are two standard errors either way."""
    drawing, axes = figure(len(tasks), 4)
    for axis, (task, entries) in zip(axes, tasks.items(), strict=True):
        metric = main_metric(task)
        axis.set(title=task, ylabel=metric.replace("_", " "))
        for stage, entry in entries.items():
            error = 2 * number(entry, "stderr")
            axis.bar(stage, number(entry, metric), yerr=error, color=COLOURS.get(stage), capsize=3)
            if "baseline" in entry:
                axis.axhline(entry["baseline"], color=RED, linestyle="--")
    return png(drawing)


def number(record: dict, key: str) -> float:
    return math.nan if record[key] is None else record[key]
