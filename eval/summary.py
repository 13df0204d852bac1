"""What the stages of an experiment left on disk, and the main number of each stage."""

import json
import re
import textwrap

import stage
from configs import DIRECTORIES, TRAINED, Experiment
from eval.markdown import visible

# For each stage: its main number (a key of its results or of the counts in its manifest), the unit, and what it means.
MAIN = {
    "corpus": ("documents", "documents", "{bytes:,} bytes after cleaning"),
    "tokenizer": ("bytes_per_token", "bytes per token", "how much text fits one token; more is better"),
    "pack": ("train.tokens", "tokens", "to train on; {val[tokens]:,} more are held out"),
    "pretrain": (
        "validation.bits_per_byte",
        "bits per byte",
        "of held-out text; xz -9 needs {validation[baseline]:.3f}",
    ),
    "sft_data": ("train.conversations", "conversations", "to train on, in rows that are {packing_efficiency:.1%} full"),
    "sft": (
        "answers.loss",
        "nats per token",
        "loss of held-out answers; piece frequencies give {answers[baseline]:.3f}",
    ),
    "dpo_data": ("train.pairs", "pairs", "of a better and a worse answer, to {train[prompts]:,} prompts"),
    "dpo": ("preference.win_rate", "of pairs won", "held-out pairs whose better answer gained more; chance: 0.5"),
}
IN_TRAINING = {"pretrain": "val_bits_per_byte", "sft": "val_loss", "dpo": "val_accuracy"}  # until it is evaluated
MARKUP = r"<\|im_\w+\|>(system|user|assistant)?|### \w+:"


class Run:
    """What the stages left, by stage: manifests, manifests of final checkpoints, results, and texts of the models."""

    def __init__(self, experiment: Experiment):
        self.experiment, self.manifests, self.finals, self.numbers = experiment, {}, {}, {}
        for name in DIRECTORIES:
            directory = experiment.directory(name)
            if manifest := stage.read_manifest(directory):
                self.manifests[name], self.numbers[name] = manifest, manifest["counts"]
            if final := stage.read_manifest(directory / "final"):
                self.finals[name] = final
        if experiment.imported and "pretrain" not in self.finals:
            self.finals["pretrain"] = stage.read_manifest(experiment.imported)
        self.results = stage.read_json(experiment.directory("eval") / "results.json") or {}
        self.texts = stage.read_json(experiment.directory("eval") / "generations.json") or {}
        self.numbers |= self.results

    def lookup(self, key: str) -> float | None:
        """The number that a key such as "sft.answers.loss" names."""
        value = self.numbers
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def result(self, name: str) -> str:
        """A stage's main number in words, for `pipeline.py --status` too; "" if there is none."""
        if name == "eval" and self.results:
            return f"{sum('n' in entry for entries in self.results.values() for entry in entries.values())} results"
        if name not in MAIN:
            return ""
        path, unit, _ = MAIN[name]
        number = self.lookup(f"{name}.{path}")
        if number is None and name in TRAINED:
            number = self.lookup(f"{name}.record.{IN_TRAINING[name]}")
        return "" if number is None else f"{digits(number)} {unit}"

    def usual(self, key: str) -> str:
        """Whether a number is in the range that the config expects."""
        if key not in self.experiment.expected:
            return ""
        low, high = self.experiment.expected[key]
        return f"{low:,} to {high:,} " + ("✓" if low <= self.lookup(key) <= high else "✗ unusual")

    def rows(self) -> list[list[str]]:
        """[stage, main number, whether it is usual, what it means] of each stage that has a number."""
        rows = []
        for name, (path, _, meaning) in MAIN.items():
            key = f"{name}.{path}"
            if self.lookup(key) is not None:
                rows.append([name, self.result(name), self.usual(key), meaning.format_map(self.numbers[name])])
            elif self.result(name):
                rows.append([name, self.result(name), "", "in training, on part of the held-out data"])
            for other in self.experiment.expected:  # other numbers that the config has a range for
                if other.startswith(f"{name}.") and other != key and self.lookup(other) is not None:
                    rows.append([name, digits(self.lookup(other)), self.usual(other), other])
        if self.results:
            rows.append(["eval", self.result("eval"), "", f"of {', '.join(self.results)}"])
        return rows

    def metrics(self, name: str) -> list[dict]:
        """What the training of a stage logged."""
        path, records = self.experiment.directory(name) / "metrics.jsonl", []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            try:
                records.append(json.loads(line))
            except ValueError:
                continue  # training was killed while it wrote this line
        return records


def digits(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:.3f}"


def notes(run: Run) -> list[str]:
    """What a reader must know before any number."""
    lines, command = [], run.experiment.command("eval")
    for name in DIRECTORIES:
        if name not in run.manifests and (run.experiment.directory(name) / "log.txt").is_file():
            lines.append(f"Note: {name} is unfinished; continue with: {run.experiment.command(name)}")
    for name, final in run.finals.items():
        digests = {file["sha256"] for file in final["wrote"].values()}
        evaluated = {entry.get("checkpoint") for entry in run.results.get(name, {}).values()} - {None}
        if not evaluated:
            lines.append(f"Note: {name} is not evaluated; evaluate it with: {command}")
        elif not evaluated & digests:
            lines.append(f"Note: the results of {name} are of an earlier checkpoint; run: {command} --force")
    if why := skipped(run.results):
        lines.append(why)
    return [wrapped(line) for line in lines]


def wrapped(text: str, indent: str = "", first: str | None = None) -> str:
    """A paragraph of at most 80 columns; commands and paths stay whole."""
    options = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(text, 80, initial_indent=first or indent, subsequent_indent=indent, **options)


def skipped(results: dict[str, dict]) -> str:
    """One line for all tasks that were not measured, and why."""
    reasons: dict[str, list[str]] = {}
    for entries in results.values():
        for task, entry in entries.items():
            why = entry.get("skipped", "")
            if "eval.download" in why:
                why = "get their data with: python -m eval.download"
            if why and task not in reasons.setdefault(why, []):
                reasons[why].append(task)
    parts = [f"{', '.join(tasks)} ({why})" for why, tasks in reasons.items()]
    return f"Skipped: {'; '.join(parts)}" if parts else ""


def sample(run: Run) -> list[str]:
    """The first held-out question and each stage's answer; without fine-tuning, the first continuation."""
    task, key = ("answers", "answer") if len(run.texts) > 1 else ("continuations", "continuation")
    texts = {name: tasks[task][0] for name, tasks in run.texts.items() if tasks.get(task)}
    if not texts:
        return []
    first = next(iter(texts.values()))
    said = {"prompt": first["prompt"]} | {name: text[key] for name, text in texts.items()} | {"truth": first["truth"]}
    lines = []
    for who, text in said.items():
        short = textwrap.shorten(visible(re.sub(MARKUP, " ", text)), 200, placeholder=" …")
        lines.append(wrapped(short, " " * 10, f"{who:9} "))
    return lines


def terminal(run: Run) -> str:
    """The summary for a terminal of 80 columns or more."""
    lines = [run.experiment.name, ""]
    for name, result, usual, meaning in run.rows():
        number, _, unit = result.partition(" ")
        line = f"{name:9} {number:>10} {unit:16} " + f"usual {usual}" * bool(usual)
        lines += [line.rstrip(), wrapped(meaning, " " * 21)]
    parts = ["\n".join(lines), "\n".join(sample(run)), *notes(run)]
    return "\n\n".join(part for part in parts if part)
