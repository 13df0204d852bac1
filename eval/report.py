"""A run as a page: `python pipeline.py CONFIG report` writes runs/NAME/REPORT.md and plots/. It measures nothing."""

import re
import sys
import textwrap
from pathlib import Path

import cli
import stage
from cli import UserError, log
from configs import TRAINED, Experiment
from eval import summary
from eval.summary import Run, main_metric, show, visible, with_error
from eval.tasks import TASKS

LOGGED = ("step", "epoch", "loss", "val_loss", "val_bits_per_byte", "val_accuracy", "val_kl", "lr", "tokens_per_second")
NUMBER = re.compile(r"[-−]?[\d.,]+(e[-+]?\d+)?( ± \S+)?( [↑↓=])?|inf|not finite|")
READING = """\
± is one standard error over the items of a task: questions, documents, conversations or prompts. Another
training run differs by more. A baseline needs no model: `xz -9` for bits per byte, chance or always the
commonest answer for accuracy, the frequency of pieces for answers, a tie for preference, how documents
really continue for continuations. An accuracy is above (↑) or below (↓) its baseline at p < 0.05, or the
difference may be chance (=). Perplexity compares models of one tokenizer only."""


def write(experiment: Experiment) -> None:
    """Writes REPORT.md and its plots, and logs the summary."""
    run, home = Run(experiment), stage.runs() / experiment.name
    if not run.manifests and not run.finals:
        raise UserError(f"{experiment.name} has no finished stage; make all with: python pipeline.py {experiment.path}")
    pictures = draw(run)
    with stage.locked(home):
        (home / "plots").mkdir(exist_ok=True)
        for name, png in pictures.items():
            stage.write(home / "plots" / f"{name}.png", png)
        stage.write(home / "REPORT.md", page(run, pictures).encode())
    log.info(f"{summary.terminal(run)}\n\nNext:\n\n{following(run)}\n\nThe whole report: {home / 'REPORT.md'}")


def draw(run: Run) -> dict[str, bytes]:
    """Pictures by name, as PNG; none without matplotlib."""
    try:
        from eval import plots
    except ImportError:
        return {}
    pictures = {}
    for name in TRAINED:
        if records := run.metrics(name):
            pictures[name] = plots.curves(records, f"{run.experiment.name}: {name}")
    if measured := {task: run.measured(task) for task in TASKS if run.measured(task)}:
        pictures["evaluation"] = plots.bars(measured)
    return pictures


def page(run: Run, pictures: dict[str, bytes]) -> str:
    """The report in Markdown that a terminal shows well, too."""
    parts = [f"# {run.experiment.name}", table(["stage", "result", "usual", "meaning"], run.rows())]
    parts.append(textwrap.indent("\n\n".join(summary.sample(run)), "    "))
    parts += summary.notes(run)
    for name in TRAINED:
        if records := run.metrics(name):
            parts += [f"## Training: {name}", f"![Curves of {name}](plots/{name}.png)", training(records)]
    if run.results:
        parts += ["## Evaluation", *evaluation(run)]
    if run.texts:
        parts += ["## Samples", *samples(run)]
    parts += ["## Provenance", *provenance(run), "## Next", following(run)]
    if not pictures:
        parts = [part for part in parts if not part.startswith("![")]
        parts.append("No plots: matplotlib is not installed. `pip install matplotlib`, then the same command again.")
    return "\n\n".join(filter(None, parts)) + "\n"


def training(records: list[dict]) -> str:
    """A table of the last points where validation ran."""
    points = [record for record in records if "val_loss" in record] or records[-1:]
    keys = [key for key in LOGGED if key in points[-1]]
    rows = []
    for record in points[-12:]:
        rows.append([show(record.get(key, "")) for key in keys])
    return table(keys, rows)


def evaluation(run: Run) -> list[str]:
    """The main number of each task with error and baseline, then all numbers."""
    stages, rows, details = list(run.results), [], []
    for task in TASKS:
        main, cells, baseline = main_metric(task), {}, ""
        for name, entry in run.measured(task).items():
            baseline, n = show(entry.get("baseline", "")), show(entry["n"])
            for label, text in labelled(entry, main).items():
                cells.setdefault(label, dict.fromkeys(stages, ""))[name] = text
        for label, texts in cells.items():
            row = [task, label.replace("_", " "), *texts.values()]
            rows.append([*row, baseline, n]) if label == main else details.append(row)
    lines = [table(["task", "metric", *stages, "baseline", "n"], rows), READING]
    lines.append("![The same beside the baselines](plots/evaluation.png)")
    return [*lines, "### All other numbers", table(["task", "metric", *stages], details)]


def labelled(entry: dict, main: str) -> dict[str, str]:
    """{label: text} of the numbers of a task, and of its parts."""
    texts = {}
    for key, value in entry.items():
        if isinstance(value, dict):
            for name, part in value.items():
                texts[f"{key} {name}"] = with_error(part, main, main) if isinstance(part, dict) else show(part)
        elif not isinstance(value, str) and "stderr" not in key and key not in ("baseline", "n"):
            texts[key] = with_error(entry, key, main)
    return texts


def samples(run: Run) -> list[str]:
    """All that the models wrote, side by side."""
    lines = ["All that was generated, none of it selected. The prompts are in `eval/prompts.json`."]
    for task in TASKS:
        texts = {name: tasks[task] for name, tasks in run.texts.items() if task in tasks}
        if texts:
            lines.append(f"### {task}")
        for number, answers in enumerate(zip(*texts.values(), strict=True), start=1):
            first = answers[0]
            lines += [f"{number}, seed {first['seed']}:", block(first["prompt"].rstrip("\n"))]
            for name, text in zip(texts, answers, strict=True):
                lines += [f"{name}{remarks(text)}:", block(text.get("answer", text.get("continuation")))]
            if "truth" in first:
                lines += ["truth:", block(first["truth"])]
    return lines


def remarks(text: dict) -> str:
    """What a reader cannot see in a sample."""
    parts = [] if text.get("ended", True) else ["cut at the greatest length"]
    for rule in text.get("rules", {}).values():
        if not rule["passed"]:
            parts.append(f"FAIL: {rule['rule']}; found {rule['found']}")
    return f" ({'; '.join(parts)})" if parts else ""


def provenance(run: Run) -> list[str]:
    """Commands, seconds, machines, digests and versions."""
    rows, versions = [], {}
    for name, manifest in run.manifests.items():
        counts, directory = manifest["counts"], run.experiment.directory(name)
        seconds = stage.read_seconds(directory.parent).get(directory.name, 0.0)
        command = counts.get("command", run.experiment.command(name))
        rows.append([name, command, f"{seconds:,.1f}", counts.get("machine", ""), manifest["sha256"][:16]])
        versions |= manifest["versions"]
    used = ", ".join(map(" ".join, versions.items()))
    return [
        table(["stage", "command", "seconds", "machine", "manifest"], rows),
        "The last column opens the SHA-256 of manifest.json, which holds that of every file read and written.",
        summary.wrapped(f"Versions of the latest stage: {used}."),
    ]


def following(run: Run) -> str:
    """Commands to try."""
    here = Path(sys.executable)
    python = here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else "python"
    serve = f"    {python} serve.py {run.experiment.path}"
    use = "chat" if "sft" in run.finals else 'generate "Return the"'
    return f"""{serve} {use}
{serve} api   # a page to write on, and an HTTP API
    {python} train.py configs/tiny.py   # 23 million parameters; Ctrl-C saves, the same command continues
    {python} train.py configs/mine.py   # your own text: README.md shows the ten lines of that config"""


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, its columns of numbers aligned to the right."""
    cells, right = [], []
    for row in [[name.replace("_", " ") for name in head], *rows]:
        cells.append([" ".join(visible(text).split()).replace("|", "\\|") for text in row])
    for i, column in enumerate(zip(*cells[1:], strict=True)):
        if all(map(NUMBER.fullmatch, column)):
            right.append(i)
    return cli.table(cells, right, markdown=True)


def block(text: str) -> str:
    """Text of a model or a user, unchanged: indented, so that Markdown leaves it alone."""
    return textwrap.indent(visible(text if text.strip() else "(nothing)"), "    ")
