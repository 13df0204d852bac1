"""The report: `python pipeline.py CONFIG report` writes runs/NAME/REPORT.md and plots/. It measures nothing."""

import sys
import textwrap
from collections.abc import Sequence

import cli
import stage
from cli import UserError, log, visible
from configs import Experiment
from eval.summary import Run, notes, sample, show, with_error
from eval.tasks import METRICS

READING = """\
± is one standard error over a task's items; two training runs differ by more. Baselines: docs/evaluation.md.
↑, ↓: above or below the baseline, p < 0.05; =: perhaps by chance. Perplexity compares models of one tokenizer only."""


def write(experiment: Experiment) -> None:
    """Writes REPORT.md and its plots, and logs the summary."""
    run = Run(experiment)
    home = stage.runs() / experiment.name
    if not run.manifests and not run.finals:
        raise UserError(f"{experiment.name} has no finished stage; make all with: python pipeline.py {experiment.path}")
    with stage.locked(home):
        try:
            from eval import plots

            pictures = plots.draw(run, home / "plots")
        except ImportError:
            pictures = ["No plots: matplotlib is not installed. `pip install matplotlib`, then the same command again."]
        stage.write(home / "REPORT.md", page(run, pictures).encode())
    for name, number, unit, usual, meaning in run.rows():
        log.info(f"{name:9} {number:>10} {unit:16} {usual}".rstrip())
        log.info(" " * 21 + meaning)
    for line in ["", *sample(run), "", *notes(run)]:
        log.info(line)
    log.info(f"The whole report: {home}/REPORT.md")
    if run.finals:
        use = "chat" if "sft" in run.finals else "generate"
        python = ".venv/bin/python" if ".venv" in sys.executable else "python"  # `make demo` activates no environment
        log.info(f"Next: {python} serve.py {experiment.path} {use}   # or api: a page in the browser")


def page(run: Run, pictures: list[str]) -> str:
    """The report in Markdown that a terminal shows well, too."""
    summary = table(["stage", "number", "unit", "range", "meaning"], run.rows(), [1])
    answers = textwrap.indent("\n".join(sample(run)), "    ")
    parts = [f"# {run.experiment.name}", summary, answers, *notes(run), "## Plots", *pictures]
    if run.results:
        parts += ["## Evaluation", *evaluation(run)]
    if run.texts:
        parts += ["## Samples", *samples(run)]
    parts += ["## Provenance", *provenance(run)]
    return "\n\n".join(filter(None, parts)) + "\n"


def evaluation(run: Run) -> list[str]:
    """The main number of each task with error and baseline, then all numbers."""
    head = ["task", "metric", *run.results]
    rows, others = [], []
    for task, stages in run.measured().items():
        cells, last = {}, []
        for name, entry in stages.items():
            last = [show(entry["baseline"]) if "baseline" in entry else "", show(entry["n"])]
            for label, text in labelled(entry, METRICS[task]).items():
                cells.setdefault(label, dict.fromkeys(run.results, ""))[name] = text
        for label, texts in cells.items():
            row = [task, label.replace("_", " "), *texts.values()]
            if label == METRICS[task]:
                rows.append(row + last)
            else:
                others.append(row)
    numbers = range(2, len(head) + 2)
    main = table([*head, "baseline", "n"], rows, numbers)
    return [main, READING, "### All other numbers", table(head, others, numbers)]


def labelled(entry: dict, main: str, part: str = "") -> dict[str, str]:
    texts = {}
    for key, value in entry.items():
        if isinstance(value, dict):
            texts |= labelled(value, main, f"{part}{key} ")
        elif not isinstance(value, str) and "stderr" not in key and key not in ("baseline", "n"):
            texts[part + key] = with_error(entry, key, main)
    return texts


def samples(run: Run) -> list[str]:
    lines = ["Nobody selected these texts. The prompts are in `eval/prompts.json`."]
    for task in METRICS:
        texts = {name: tasks[task] for name, tasks in run.texts.items() if task in tasks}
        if texts:
            lines.append(f"### {task}")
        for number, answers in enumerate(zip(*texts.values(), strict=True), start=1):
            first = answers[0]
            lines += [f"{number}, seed {first['seed']}:", block(first["prompt"])]
            for name, text in zip(texts, answers, strict=True):
                failed = [rule for rule, verdict in text.get("rules", {}).items() if not verdict["passed"]]
                remark = f" (fails: {', '.join(failed)})" if failed else ""
                lines += [f"{name}{remark}:", block(text.get("answer", text.get("continuation")))]
            if "truth" in first:
                lines += ["truth:", block(first["truth"])]
    return lines


def provenance(run: Run) -> list[str]:
    """Commands, seconds, machines, digests and versions."""
    rows, versions = [], {}
    for name, manifest in run.manifests.items():
        counts = manifest["counts"]
        directory = run.experiment.directory(name)
        seconds = stage.read_seconds(directory.parent).get(directory.name, 0.0)
        command = counts.get("command", run.experiment.command(name))
        rows.append([name, command, f"{seconds:,.1f}", counts.get("machine", ""), manifest["sha256"][:16]])
        versions |= manifest["versions"]
    stages = table(["stage", "command", "seconds", "machine", "SHA-256 of its manifest"], rows, [2])
    return [stages, f"Versions of the latest stage: {', '.join(map(' '.join, versions.items()))}."]


def table(head: list[str], rows: list[list[str]], right: Sequence[int] = ()) -> str:
    """A Markdown table. right: the columns of numbers."""
    cells = [[" ".join(visible(text).split()).replace("|", "\\|") for text in row] for row in (head, *rows)]
    return cli.table(cells, right, markdown=True)


def block(text: str) -> str:
    """Text of a model or a user, unchanged: indented, so that Markdown leaves it alone."""
    return textwrap.indent(visible(text.rstrip("\n").expandtabs(4)) if text.strip() else "(nothing)", "    ")
