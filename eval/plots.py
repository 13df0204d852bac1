"""The report's pictures, as PNG: what training logged, and what evaluation found.

matplotlib is imported here and nowhere else. The same numbers give the same bytes: nothing is read from the user's
settings of matplotlib, and a picture carries neither date nor version.
"""

import io
import math

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

INK, GREY, RED = "#1f5fa8", "#777777", "#c0392b"
COLOURS = {"pretrain": "#1f5fa8", "sft": "#d9822b", "dpo": "#3a8f5c"}


def draw(width: float, height: float, fill) -> bytes:
    """A figure of inches × inches, which `fill` draws into, as a PNG of 120 dots an inch."""
    with matplotlib.rc_context(matplotlib.rcParamsDefault | {"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(width, height), dpi=120, layout="constrained", facecolor="white")
        fill(figure)
        file = io.BytesIO()
        FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})
    return file.getvalue()


def curves(records: list[dict], title: str, unit: str) -> bytes:
    """Loss, learning rate, gradient norm and speed over the steps, as logged, and of preferences rewards and the share
    of pairs that are right; a null leaves a gap. unit: of the loss.

    Only the axes are fitted: those of gradient norm and speed leave out the highest hundredth, the first step often.
    """

    def series(key: str) -> tuple[list, list]:
        known = [(r["step"], r[key]) for r in records if key in r]
        return [s for s, _ in known], [math.nan if y is None else y for _, y in known]

    pairs = any("margin" in r for r in records)

    def preferences(reward, right) -> None:
        shown = {"reward_chosen": (reward, COLOURS["dpo"], "chosen"), "reward_rejected": (reward, RED, "rejected")}
        for key, (axes, colour, label) in (shown | {"accuracy": (right, INK, "")}).items():
            axes.plot(*series(key), color=colour, linewidth=0.8, alpha=0.6)
            axes.plot(*series(f"val_{key}"), "o-", color=colour, markersize=4, linewidth=1.2, label=label)
        reward.set_ylabel("reward (dots: validation)")
        reward.legend(frameon=False)
        right.set_ylabel("share of pairs right (dots: validation)")
        right.axhline(0.5, color=GREY, linestyle="--", linewidth=1)

    def fill(figure: Figure) -> None:
        figure.suptitle(title)
        (loss, lr), (norm, speed), *more = figure.subplots(3 if pairs else 2, 2, sharex=True)
        if pairs:
            preferences(*more[0])
        loss.plot(*series("loss"), color=INK, linewidth=0.8, alpha=0.6, label="training, the batch of a step")
        loss.set_ylabel(f"loss ({unit})")
        steps, found = series("val_loss")
        if finite := [(y, s) for s, y in zip(steps, found, strict=True) if math.isfinite(y)]:
            best, at = min(finite)
            loss.plot(steps, found, "o-", color="black", markersize=4, linewidth=1.2, label="validation")
            loss.plot([at], [best], "*", color=RED, markersize=13, label=f"best: {best:.4f} at step {at:,}")
        loss.legend(frameon=False)
        lr.plot(*series("lr"), color=INK)
        lr.set_ylabel("learning rate")
        lr.ticklabel_format(axis="y", scilimits=(-2, 3))
        lr.set_ylim(bottom=0)
        norm.set_ylabel("gradient norm before clipping")
        speed.set_ylabel("tokens a second")
        for axes, key in ((norm, "grad_norm"), (speed, "tokens_per_second")):
            steps, found = series(key)
            axes.plot(steps, found, color=INK, linewidth=0.8)
            if known := sorted(y for y in found if math.isfinite(y)):
                axes.set_ylim(0, 1.15 * known[int(0.99 * (len(known) - 1))] or 1)
        speed.yaxis.set_major_formatter(EngFormatter(sep=""))
        for axes in figure.axes:
            axes.grid(alpha=0.25)
        for axes in more[0] if pairs else (norm, speed):
            axes.set_xlabel("step")

    return draw(11, 10 if pairs else 7, fill)


def bars(groups: list[dict]) -> bytes:
    """What was found by stage beside the baseline, a panel a unit.

    groups: panels, each {"label": of its axis, "tasks": {task: {"baseline": b, "stages": {stage: (number, error)}}}}.
    Whiskers are two standard errors either way.
    """

    def panel(axes, label: str, tasks: dict) -> None:
        stages = list(dict.fromkeys(stage for task in tasks.values() for stage in task["stages"]))
        width = 0.8 / len(stages)
        for i, stage in enumerate(stages):
            own = [(x, *task["stages"][stage]) for x, task in enumerate(tasks.values()) if stage in task["stages"]]
            at, found, errors = zip(*own, strict=True)
            at = [x + (i + 0.5) * width - 0.4 for x in at]
            whiskers = [2 * error for error in errors]
            axes.bar(at, found, 0.92 * width, color=COLOURS.get(stage, GREY), label=stage)
            axes.errorbar(at, found, whiskers, fmt="none", ecolor="black", capsize=3, label="± 2 standard errors")
        marked = [(x, task["baseline"]) for x, task in enumerate(tasks.values()) if task["baseline"] is not None]
        for x, y in marked:
            axes.plot([x - 0.45, x + 0.45], [y, y], "--", color=RED, linewidth=1.5, clip_on=False, label="baseline")
        axes.set_xticks(range(len(tasks)), list(tasks), rotation=25 if len(tasks) > 4 else 0)
        axes.set_xlim(-0.6, len(tasks) - 0.4)
        axes.set_ylim(0, 1 if label.startswith("share") else None)
        axes.set_ylabel(label)
        axes.set_xlabel("task")
        axes.grid(axis="y", alpha=0.25)
        axes.set_axisbelow(True)

    sizes = [1 + len(group["tasks"]) for group in groups]

    def fill(figure: Figure) -> None:
        row, named = figure.subplots(1, len(groups), squeeze=False, width_ratios=sizes)[0], {}
        for axes, group in zip(row, groups, strict=True):
            panel(axes, group["label"], group["tasks"])
            named |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=len(named), frameon=False)

    return draw(min(11, max(7, 2.5 + 1.2 * sum(sizes))), 4.5, fill)
