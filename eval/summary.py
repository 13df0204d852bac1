"""The results of an experiment's stages, read from disk, and a summary for people: one row for each stage."""

import contextlib
import json
import re
import textwrap

import stage
from cli import UserError, visible
from configs import DIRECTORIES, Experiment
from eval.tasks import METRICS

# Main numbers: a stage, then a path in its results or in the counts of its manifest; the unit; the meaning.
PART = "in training, on part of the held-out data"  # until the stage is evaluated
MAIN = {
    "corpus.documents": ("documents", "{bytes:,} bytes after cleaning"),
    "tokenizer.bytes_per_token": ("bytes per token", "how much text fits one token; more is better"),
    "pack.train.tokens": ("tokens", "to train on; {val[tokens]:,} more are held out"),
    "pretrain.validation.bits_per_byte": ("bits per byte", "of held-out text; xz -9 needs {validation[baseline]:.3f}"),
    "pretrain.record.val_bits_per_byte": ("bits per byte", PART),
    "sft_data.train.conversations": ("conversations", "to train on, in rows that are {packing_efficiency:.1%} full"),
    "sft.answers.loss": ("nats per token", "loss of held-out answers; piece frequencies give {answers[baseline]:.3f}"),
    "sft.record.val_loss": ("nats per token", PART),
    "dpo_data.train.pairs": ("pairs", "of a better and a worse answer, to {train[prompts]:,} prompts"),
    "dpo.preference.win_rate": ("of pairs won", "held-out pairs whose better answer gained more; chance: 0.5"),
    "dpo.record.val_accuracy": ("of pairs won", PART),
}
MARKUP = r"<\|im_\w+\|>(system|user|assistant)?|### \w+:"


class Run:
    """The results of all stages, by stage: manifests, manifests of final checkpoints, results, generated texts."""

    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        self.manifests, self.finals, self.numbers = {}, {}, {}
        for name in DIRECTORIES:
            if manifest := stage.read_manifest(experiment.directory(name)):
                self.manifests[name] = manifest
                self.numbers[name] = manifest["counts"]
        with contextlib.suppress(UserError):  # nothing is trained
            for name, final in experiment.all_trained().items():
                self.finals[name] = stage.read_manifest(final)
        self.results = stage.read_json(experiment.directory("eval") / "results.json") or {}
        self.texts = stage.read_json(experiment.directory("eval") / "generations.json") or {}
        self.numbers |= self.results

    def measured(self) -> dict[str, dict]:
        """{task: {stage: its numbers}} of all tasks that were measured."""
        tasks = {}
        for task in METRICS:
            for name, entries in self.results.items():
                if "n" in entries.get(task, {}):
                    tasks.setdefault(task, {})[name] = entries[task]
        return tasks

    def lookup(self, key: str) -> float | None:
        """The number that a key such as "sft.answers.loss" names; None if there is no such number."""
        value = self.numbers
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value if isinstance(value, int | float) else None

    def rows(self) -> list[list[str]]:
        """[stage, number, unit, usual range, meaning] of the main numbers, then of others that have a usual range."""
        expected, rows = self.experiment.expected, []
        for key in dict.fromkeys([*MAIN, *expected]):
            number, usual = self.lookup(key), ""
            if number is None:
                continue
            if key in expected:
                low, high = expected[key]
                usual = f"usual {low:,} to {high:,} {'✓' if low <= number <= high else '✗ unusual'}"
            name = key.partition(".")[0]
            unit, meaning = MAIN.get(key, ("", key))
            meaning = meaning.format_map(self.numbers[name])
            rows.append([name, f"{round(number, 3):,}", unit, usual, meaning])
        if self.results:
            count = sum(map(len, self.measured().values()))
            rows.append(["eval", f"{count}", "results", "", f"of {', '.join(self.results)}"])
        return rows

    def result(self, name: str) -> str:
        """A stage's main number in words, for `pipeline.py --status`; "" if there is none."""
        for row in self.rows():
            if row[0] == name:
                return f"{row[1]} {row[2]}" + (" in training" if row[4] == PART else "")
        return ""

    def metrics(self, name: str) -> list[dict]:
        path = self.experiment.directory(name) / "metrics.jsonl"
        records = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            with contextlib.suppress(ValueError):  # training was killed while it wrote this line
                records.append(json.loads(line))
        return records


def notes(run: Run) -> list[str]:
    """Warnings that a reader needs before the numbers."""
    lines = []
    command = run.experiment.command("eval")
    for name in DIRECTORIES:
        if name not in run.manifests and (run.experiment.directory(name) / "log.txt").is_file():
            lines.append(f"Note: {name} is unfinished; continue with: {run.experiment.command(name)}")
    for name, final in run.finals.items():
        entries = run.results.get(name, {}).values()
        evaluated = {entry["checkpoint"] for entry in entries if "checkpoint" in entry}
        if not evaluated:
            lines.append(f"Note: {name} is not evaluated; evaluate it with: {command}")
        elif evaluated.isdisjoint(file["sha256"] for file in final["wrote"].values()):
            lines.append(f"Note: the results of {name} are of an earlier checkpoint; run: {command} --force")
    for key in run.experiment.expected if run.results else ():
        name = key.partition(".")[0]
        if name in run.numbers and run.lookup(key) is None:
            lines.append(f"Note: the config expects a range of {key}, but there is no such number")
    return [*lines, *skipped(run.results)]


def skipped(results: dict[str, dict]) -> list[str]:
    """One line for all tasks that were not measured, and why; none if all were."""
    reasons = {}
    for entries in results.values():
        for task, entry in entries.items():
            if why := entry.get("skipped"):
                why = re.sub(r"^no .*(: python -m eval.download).*", r"get their data with\1", why)
                reasons.setdefault(why, {})[task] = None
    parts = [f"{', '.join(tasks)} ({why})" for why, tasks in reasons.items()]
    return [f"Skipped: {'; '.join(parts)}"] if parts else []


def sample(run: Run) -> list[str]:
    """The first held-out question, its true answer, and each stage's; without fine-tuning, the first continuation."""
    task, key = ("answers", "answer") if len(run.texts) > 1 else ("continuations", "continuation")
    texts, lines = {}, []
    for name, tasks in run.texts.items():
        for first in tasks.get(task, [])[:1]:
            texts |= {"prompt": first["prompt"], "truth": first["truth"], name: first[key]}
    for who, text in texts.items():
        text = visible(re.sub(MARKUP, " ", text))
        short = textwrap.shorten(text, 200, placeholder=" …")
        lines.append(textwrap.fill(f"{who:9} {short}", 80, subsequent_indent=" " * 10, break_on_hyphens=False))
    return lines


def show(value: float | None) -> str:
    """A number with the digits that count. JSON holds null for a number that is not finite."""
    if isinstance(value, float):
        return f"{value:,.4f}" if abs(value) < 1000 else f"{value:,.6g}"
    return "not finite" if value is None else f"{value:,}"


def with_error(entry: dict, key: str, main: str) -> str:
    """A metric of a task with its standard error and, for a tested accuracy, the side of the baseline it is on."""
    text = show(entry[key])
    if main in key:
        error = entry.get(key.replace(main, "stderr"))
        text += f" ± {error:.2g}" if error else ""  # 0 by construction for a model beside itself
    if key == "accuracy" and "p_value" in entry:
        side = "↑" if entry["accuracy"] > entry["baseline"] else "↓"
        text += f" {side if entry['p_value'] < 0.05 else '='}"
    return text
