"""A run as a page: `python pipeline.py CONFIG report` writes runs/NAME/REPORT.md and plots/. It measures nothing."""

import sys
from pathlib import Path

import stage
from cli import UserError, log
from configs import TRAINED, Experiment
from eval import summary
from eval.markdown import block, main_metric, show, table, with_error
from eval.summary import Run
from eval.tasks import TASKS

LOGGED = ("step", "epoch", "loss", "val_loss", "val_bits_per_byte", "val_accuracy", "val_kl", "lr", "tokens_per_second")
READING = """\
± is one standard error over the items of a task: questions, documents, conversations or prompts. Another
training run differs by more. A baseline needs no model: `xz -9` for bits per byte, chance or always the
commonest answer for accuracy, the frequency of pieces for answers, a tie for preference, how documents
really continue for continuations. An accuracy is above (↑) or below (↓) its baseline at p < 0.05, or the
difference may be chance (=). Perplexity compares models of one tokenizer only."""
ROWS = """\
Training reads {} rows of the held-out text, and a row may open in the middle of a document. The
evaluation reads all of the text, with at least half a context before each token, so its bits per byte
are lower."""


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
    pictures, panels = {}, {}
    for name in TRAINED:
        if records := run.metrics(name):
            pictures[name] = plots.curves(records, f"{run.experiment.name}: {name}")
    for task in TASKS:
        entries = measured(run, task)
        if entries and main_metric(task) != "repetition":
            panels.setdefault(main_metric(task), {})[task] = entries
    if panels:
        pictures["evaluation"] = plots.bars(panels)
    return pictures


def measured(run: Run, task: str) -> dict[str, dict]:
    """The numbers of a task by stage."""
    return {name: entries[task] for name, entries in run.results.items() if "n" in entries.get(task, {})}


def page(run: Run, pictures: dict[str, bytes]) -> str:
    """The report in Markdown that a terminal shows well, too."""
    parts = [f"# {run.experiment.name}", table(["stage", "result", "usual", "meaning"], run.rows())]
    parts += ["    " + line.replace("\n", "\n    ") for line in summary.sample(run)]
    parts += summary.notes(run)
    for name in TRAINED:
        if records := run.metrics(name):
            parts += [f"## Training: {name}", *training(run, name, records)]
    if run.results:
        parts += ["## Evaluation", *evaluation(run)]
    if run.texts:
        parts += ["## Samples", *samples(run)]
    parts += ["## Provenance", *provenance(run), "## Next", following(run)]
    if not pictures:
        parts = [part for part in parts if not part.startswith("![")]
        parts.append("No plots: matplotlib is not installed. `pip install matplotlib`, then the same command again.")
    return "\n\n".join(parts) + "\n"


def training(run: Run, name: str, records: list[dict]) -> list[str]:
    """Facts, the picture, and a table of the points where validation ran."""
    lines = [f"![Curves of {name}](plots/{name}.png)"]
    if name == "pretrain" and "pretrain" in run.results:
        lines.append(ROWS.format(run.finals["pretrain"]["config"]["pretrain"]["eval_rows"]))
    points = [record for record in records if "val_loss" in record] or records[-1:]
    keys = [key for key in LOGGED if key in points[-1]]
    rows = [[show(record.get(key, "")) for key in keys] for record in points[-12:]]
    return [*lines, table([key.replace("_", " ") for key in keys], rows)]


def evaluation(run: Run) -> list[str]:
    """The main number of each task with error and baseline, then all numbers."""
    stages, rows, details = list(run.results), [], []
    for task in TASKS:
        main, entries, cells = main_metric(task), measured(run, task), {}
        for name, entry in entries.items():
            for label, text in labelled(entry, main).items():
                cells.setdefault(label, dict.fromkeys(stages, ""))[name] = text
        if entries:
            first = next(iter(entries.values()))
            baseline = show(first["baseline"]) if "baseline" in first else ""
            rows.append([task, main.replace("_", " "), *cells.pop(main).values(), baseline, show(first["n"])])
        details += [[task, label.replace("_", " "), *texts.values()] for label, texts in cells.items()]
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
        lines += [f"### {task}"] if texts else []
        for i, first in enumerate(next(iter(texts.values()), [])):
            lines += [f"{i + 1}, seed {first['seed']}:", block(first["prompt"].rstrip("\n"))]
            for name, answers in texts.items():
                answer = answers[i].get("answer", answers[i].get("continuation"))
                lines += [f"{name}{remarks(answers[i])}:", block(answer)]
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
    """Commands, seconds, machines, data, versions and digests."""
    made, sources, versions = [], [], {}
    for name, manifest in run.manifests.items():
        counts, directory = manifest["counts"], run.experiment.directory(name)
        seconds = stage.read_seconds(directory.parent).get(directory.name, 0.0)
        command = counts.get("command", run.experiment.command(name))
        made.append([name, command, f"{seconds:,.1f}", counts.get("machine", ""), manifest["sha256"][:16]])
        for source, numbers in counts.get("sources", {}).items():
            if "read" in numbers:
                dropped = ", ".join(f"{n:,} {rule}" for rule, n in numbers["dropped"].items())
                kept = numbers.get("kept", numbers.get("documents"))
                sources.append([name, source, show(numbers["read"]), show(kept), dropped])
        versions[", ".join(f"{package} {version}" for package, version in manifest["versions"].items())] = None
    lines = [table(["stage", "command", "seconds", "machine", "manifest"], made)]
    lines.append("The last column opens the SHA-256 of manifest.json, which holds that of every file read and written.")
    if sources:
        lines.append(table(["stage", "source", "read", "kept", "dropped"], sources))
    return [*lines, summary.wrapped(f"Versions: {'; '.join(versions)}.")]


def following(run: Run) -> str:
    """Commands to try."""
    taught, here = "sft" in run.finals, Path(sys.executable)
    python = here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else "python"
    use = "chat" if taught else 'generate "Return the"'
    return f"""    {python} serve.py {run.experiment.path} {use}
    {python} serve.py {run.experiment.path} api   # a page to {"chat" if taught else "write"} on, and an HTTP API
    {python} train.py configs/tiny.py   # 23 million parameters; Ctrl-C saves, the same command continues
    {python} train.py configs/mine.py   # your own text: README.md shows the ten lines of that config"""
