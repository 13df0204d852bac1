"""The report's pictures as PNG. The same numbers give the same bytes. matplotlib is imported here and nowhere else."""

import io
import math

import matplotlib
from matplotlib.figure import Figure

BLUE, GREY, RED, GREEN = "#1f5fa8", "#777777", "#c0392b", "#3a8f5c"
COLOURS = {"pretrain": BLUE, "sft": "#d9822b", "dpo": GREEN}
PANELS = {  # of a training: the label of an axis, and the metrics on it with their colours
    "loss (nats)": {"loss": BLUE, "val_loss": "black"},
    "learning rate": {"lr": BLUE},
    "gradient norm before clipping": {"grad_norm": BLUE},
    "tokens per second": {"tokens_per_second": BLUE},
    "reward": {"reward_chosen": GREEN, "val_reward_chosen": GREEN, "reward_rejected": RED, "val_reward_rejected": RED},
    "share of pairs won": {"accuracy": BLUE, "val_accuracy": BLUE},
}
UNITS = {"bits_per_byte": "bits per byte", "loss": "nats per token of an answer", "win_rate": "share of pairs won"}
UNITS |= {"passed": "share of prompts passed", "accuracy": "accuracy"}


def figure(width: float, height: float, rows: int, columns: int, **options) -> tuple[Figure, list]:
    """A figure of inches × inches, and its axes. Nothing comes from the user's matplotlib settings."""
    matplotlib.rcdefaults()
    matplotlib.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    drawing = Figure(figsize=(width, height), dpi=120, layout="constrained")
    return drawing, list(drawing.subplots(rows, columns, squeeze=False, **options).flat)


def png(drawing: Figure) -> bytes:
    file = io.BytesIO()
    drawing.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def curves(records: list[dict], title: str) -> bytes:
    """What training logged over its steps, as it was logged."""
    panels = {}
    for label, series in PANELS.items():
        if any(key in record for record in records for key in series):
            panels[label] = series
    rows = math.ceil(len(panels) / 2)
    drawing, axes = figure(11, 1 + 3 * rows, rows, 2, sharex=True)
    drawing.suptitle(title)
    for axis, (label, series) in zip(axes, panels.items(), strict=False):
        for key, colour in series.items():
            curve(axis, records, key, colour)
        axis.set_ylabel(label)
        axis.grid(alpha=0.25)
        if len(series) > 1:
            axis.legend()
    for axis in axes[-2:]:
        axis.set_xlabel("step")
    return png(drawing)


def curve(axis, records: list[dict], key: str, colour: str) -> None:
    """One metric over the steps; a validation metric with dots. A null leaves a gap."""
    steps, values = [], []
    for record in records:
        if key in record:
            steps.append(record["step"])
            values.append(math.nan if record[key] is None else record[key])
    if key.startswith("val_"):
        axis.plot(steps, values, "o-", color=colour, markersize=4, linewidth=1.2, label=key)
    else:
        axis.plot(steps, values, color=colour, linewidth=0.8, alpha=0.7, label=key)
    finite = sorted(value for value in values if math.isfinite(value))
    if key in ("grad_norm", "tokens_per_second") and finite:  # without the highest hundredth, often the first step
        axis.set_ylim(0, 1.15 * finite[int(0.99 * (len(finite) - 1))] or 1)


def bars(panels: dict[str, dict[str, dict[str, dict]]]) -> bytes:
    """{metric: {task: {stage: its numbers}}} beside the baselines. Whiskers are two standard errors either way."""
    sizes = [1 + len(tasks) for tasks in panels.values()]
    drawing, axes = figure(min(13, max(7, 2.5 + 1.2 * sum(sizes))), 4.5, 1, len(panels), width_ratios=sizes)
    handles = {}
    for axis, (metric, tasks) in zip(axes, panels.items(), strict=True):
        for x, entries in enumerate(tasks.values()):
            width = 0.8 / len(entries)
            for i, (stage, entry) in enumerate(entries.items()):
                value, error = (math.nan if entry[key] is None else entry[key] for key in (metric, "stderr"))
                at, colour = x + (i + 0.5) * width - 0.4, COLOURS.get(stage, GREY)
                handles[stage] = axis.bar(at, value, 0.92 * width, color=colour)
                axis.errorbar(at, value, 2 * error, fmt="none", ecolor="black", capsize=3)
                if "baseline" in entry:
                    line = [entry["baseline"]] * 2
                    handles["baseline"] = axis.plot([x - 0.45, x + 0.45], line, "--", color=RED, clip_on=False)[0]
        axis.set_xticks(range(len(tasks)), list(tasks), rotation=25 if len(tasks) > 3 else 0)
        axis.set_xlim(-0.6, len(tasks) - 0.4)
        axis.set_ylim(0, None if metric in ("bits_per_byte", "loss") else 1)
        axis.set_ylabel(UNITS[metric])
        axis.grid(axis="y", alpha=0.25)
        axis.set_axisbelow(True)
    drawing.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles))
    return png(drawing)
