"""What the stages of an experiment have left on disk, for the report."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import configs
import stage
from configs import Experiment
from eval.markdown import number, plural
from eval.tasks import TASKS

STAGES = ("corpus", "tokenizer", "pack", "pretrain", "sft_data", "sft", "dpo_data", "dpo_reference", "dpo", "eval")
LOGGED = {
    "step": "step",
    "epoch": "epoch",
    "loss": "loss",
    "val_loss": "validation",
    "val_bits_per_byte": "bits per byte",
}
LOGGED |= {"val_reward_chosen": "chosen", "val_reward_rejected": "rejected", "val_margin": "margin"}  # rewards
LOGGED |= {"val_accuracy": "pairs right", "val_kl": "KL a token"}
LOGGED |= {"lr": "learning rate", "grad_norm": "gradient norm", "tokens_per_second": "tokens/s"}  # and as it is headed
NEEDED = ("corpus", "tokenizer", "pack", "pretrain", "eval")
TRAINED = ("pretrain", "sft", "dpo")


@dataclass
class Run:
    """What the stages of an experiment have left, by the stage's name."""

    experiment: Experiment
    commands: dict[str, str] = field(default_factory=dict)
    directories: dict[str, Path] = field(default_factory=dict)
    manifests: dict[str, dict] = field(default_factory=dict)
    finals: dict[str, dict] = field(default_factory=dict)
    """Manifests of the trained models."""
    metrics: dict[str, list[dict]] = field(default_factory=dict)
    results: dict[str, dict[str, dict]] = field(default_factory=dict)
    generations: dict[str, dict[str, list]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What a reader must know before any number."""

    @property
    def home(self) -> Path:
        """Where the page goes."""
        return stage.runs() / self.experiment.name

    def tasks(self) -> list[str]:
        """Those that were measured, in their order, others after them."""
        found = {task for entries in self.results.values() for task in entries if measured(entries, task)}
        return sorted(found, key=lambda task: (TASKS.index(task) if task in TASKS else len(TASKS), task))


def measured(entries: dict[str, dict], task: str) -> dict | None:
    """A task's numbers, or None if it was skipped or never asked for."""
    entry = entries.get(task)
    return entry if entry and "skipped" not in entry else None


def read(experiment: Experiment) -> Run:
    """UserError, with the command that makes it, for a stage that every run of ours has and this one lacks."""
    run, lacks = Run(experiment), []
    for name in STAGES:
        known = name in configs.DIRECTORIES
        directory = experiment.directory(name) if known else stage.runs() / experiment.name / name
        command = experiment.command(name)
        needed = name in NEEDED and (name == "eval" or not experiment.imported)
        final = directory / "final"
        if name in TRAINED and stage.read_manifest(directory) is None and stage.read_manifest(final):
            run.manifests[name] = stage.finished(final, command)
            step = run.manifests[name]["counts"]["step"]
            run.notes.append(
                f"The training of {name} is unfinished. This page is about `final/` as it stands, of step {step:,}; "
                f"go on with: `{command}`"
            )
        elif needed or stage.read_manifest(directory):
            run.manifests[name] = stage.finished(directory, command)
        elif name in NEEDED:
            lacks.append(name)
        elif directory.is_dir():
            run.notes.append(f"{name} is unfinished; go on with: `{command}`")
        run.commands[name], run.directories[name] = command, directory
        if name in TRAINED:
            if manifest := stage.read_manifest(final):
                run.finals[name] = manifest
            if (directory / "metrics.jsonl").is_file():
                run.metrics[name] = read_metrics(directory / "metrics.jsonl", run.notes)
    if experiment.imported:
        if "pretrain" not in run.finals and (manifest := stage.read_manifest(experiment.imported)):
            run.finals["pretrain"] = manifest
        if lacks:
            run.notes.append(f"The model was converted by `convert.py from-hf`; it has no {', '.join(lacks)} here.")
    run.results = read_json(run.directories["eval"] / "results.json")
    run.generations = read_json(run.directories["eval"] / "generations.json")
    run.notes += stale(run)
    return run


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def read_metrics(path: Path, notes: list[str]) -> list[dict]:
    """The objects of a metrics.jsonl; lines that are none, as a crash can leave the last one, go into the notes."""
    records, lines = [], [line for line in path.read_bytes().splitlines() if line.strip()]
    for line in lines:
        try:
            record = json.loads(line)
            if type(record["step"]) is int and all(
                record[k] is None or (number(record[k]) and abs(record[k]) < 1e100) for k in LOGGED if k in record
            ):
                records.append(record)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue
    if damaged := len(lines) - len(records):
        notes.append(f"{plural(damaged, 'line')} of {path.parent.name}/metrics.jsonl cannot be read: left out.")
    if not records:
        notes.append(f"{path.parent.name}/metrics.jsonl holds no line: there are no curves of {path.parent.name}.")
    return records


def stale(run: Run) -> list[str]:
    """A line for each stage whose results are not those of the model that is there."""
    found = []
    for name, final in run.finals.items():
        now = {file["sha256"] for file in final["wrote"].values()} | {final["sha256"]}
        of = {entry["checkpoint"] for entry in run.results.get(name, {}).values() if "checkpoint" in entry}
        if name not in run.results:
            found.append(f"{name} is trained but not evaluated; do so with: `{run.commands['eval']}`")
        elif of - now:
            found.append(
                f"The results of {name} are of another checkpoint than the one that is there now; evaluate anew with: "
                f"`{run.commands['eval']} --force`"
            )
    gone = [name for name in run.results if name not in run.finals]
    return found + [f"The model that the results of {name} are of is no longer there." for name in gone]
