"""What the stages of an experiment left on disk, and the main number of each stage."""

import json
import re
import textwrap

import stage
from configs import DIRECTORIES, Experiment
from eval.tasks import TASKS

# For each stage: its main number (a key of its results or of the counts in its manifest), the unit, and what it means.
MAIN = {
    "corpus": ("documents", "documents", "{bytes:,} bytes after cleaning"),
    "tokenizer": ("bytes_per_token", "bytes per token", "how much text fits one token; more is better"),
    "pack": ("train.tokens", "tokens", "to train on; {val[tokens]:,} more are held out"),
    "pretrain": ("validation.bits_per_byte", "bits per byte", "of held-out text; xz -9 needs {baseline:.3f}"),
    "sft_data": ("train.conversations", "conversations", "to train on, in rows that are {packing_efficiency:.1%} full"),
    "sft": ("answers.loss", "nats per token", "loss of held-out answers; piece frequencies give {baseline:.3f}"),
    "dpo_data": ("train.pairs", "pairs", "of a better and a worse answer, to {prompts:,} prompts"),
    "dpo": ("preference.win_rate", "of pairs won", "held-out pairs whose better answer gained more; chance: 0.5"),
}
IN_TRAINING = {"pretrain": "val_bits_per_byte", "sft": "val_loss", "dpo": "val_accuracy"}  # until it is evaluated
METRICS = {"validation": "bits_per_byte", "wikitext2": "bits_per_byte", "answers": "loss", "preference": "win_rate"}
METRICS |= {"smoke": "passed", "prompts": "repetition", "everyday": "repetition", "continuations": "repetition"}
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

    def measured(self, task: str) -> dict[str, dict]:
        """The numbers of a task by stage."""
        return {name: entries[task] for name, entries in self.results.items() if "n" in entries.get(task, {})}

    def usual(self, key: str) -> str:
        """Whether a number is in the range that the config expects."""
        if key not in self.experiment.expected:
            return ""
        low, high = self.experiment.expected[key]
        return f"{low:,} to {high:,} " + ("✓" if low <= self.lookup(key) <= high else "✗ unusual")

    def rows(self) -> list[list[str]]:
        """[stage, main number, whether it is usual, what it means] of each stage that has a number."""
        rows = []
        for name, (path, unit, meaning) in MAIN.items():
            key = f"{name}.{path}"
            number, logged = self.lookup(key), self.lookup(f"{name}.record.{IN_TRAINING.get(name)}")
            if number is not None:
                meaning = meaning.format_map(self.numbers[name] | self.lookup(key.rpartition(".")[0]))
                rows.append([name, f"{digits(number)} {unit}", self.usual(key), meaning])
            elif logged is not None:
                rows.append([name, f"{digits(logged)} {unit}", "", "in training, on part of the held-out data"])
            for other in self.experiment.expected:  # other numbers that the config has a range for
                if other.startswith(f"{name}.") and other != key and self.lookup(other) is not None:
                    rows.append([name, digits(self.lookup(other)), self.usual(other), other])
        if self.results:
            count = sum(len(self.measured(task)) for task in TASKS)
            rows.append(["eval", f"{count} results", "", f"of {', '.join(self.results)}"])
        return rows

    def result(self, name: str) -> str:
        """A stage's main number in words, for `pipeline.py --status`; "" if there is none."""
        return next((result for stage, result, *_ in self.rows() if stage == name), "")

    def metrics(self, name: str) -> list[dict]:
        """What the training of a stage logged."""
        path, records = self.experiment.directory(name) / "metrics.jsonl", []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            try:
                records.append(json.loads(line))
            except ValueError:
                continue  # training was killed while it wrote this line
        return records


# --------------------------------------------------------------------------------------------------------------- words


def notes(run: Run) -> list[str]:
    """What a reader must know before any number."""
    lines, command = [], run.experiment.command("eval")
    for name in DIRECTORIES:
        if name not in run.manifests and (run.experiment.directory(name) / "log.txt").is_file():
            lines.append(f"Note: {name} is unfinished; continue with: {run.experiment.command(name)}")
    for name, final in run.finals.items():
        evaluated = set()
        for entry in run.results.get(name, {}).values():
            evaluated.add(entry.get("checkpoint"))
        if not evaluated - {None}:
            lines.append(f"Note: {name} is not evaluated; evaluate it with: {command}")
        elif evaluated.isdisjoint(file["sha256"] for file in final["wrote"].values()):
            lines.append(f"Note: the results of {name} are of an earlier checkpoint; run: {command} --force")
    lines.append(skipped(run.results))
    return [wrapped(line) for line in lines if line]


def skipped(results: dict[str, dict]) -> str:
    """One line for all tasks that were not measured, and why."""
    reasons = {}
    for entries in results.values():
        for task, entry in entries.items():
            why = entry.get("skipped", "")
            if "eval.download" in why:
                why = "get their data with: python -m eval.download"
            if why:
                reasons.setdefault(why, {})[task] = None
    parts = [f"{', '.join(tasks)} ({why})" for why, tasks in reasons.items()]
    return f"Skipped: {'; '.join(parts)}" if parts else ""


def sample(run: Run) -> list[str]:
    """The first held-out question and each stage's answer; without fine-tuning, the first continuation."""
    task, key = ("answers", "answer") if len(run.texts) > 1 else ("continuations", "continuation")
    first, texts, lines = {}, {}, []
    for name, tasks in run.texts.items():
        if task in tasks:
            first = tasks[task][0]
            texts[name] = first[key]
    if first:
        texts = {"prompt": first["prompt"], **texts, "truth": first["truth"]}
    for who, text in texts.items():
        short = textwrap.shorten(visible(re.sub(MARKUP, " ", text)), 200, placeholder=" …")
        lines.append(wrapped(short, " " * 10, f"{who:9} "))
    return lines


def terminal(run: Run) -> str:
    """The summary for a terminal of 80 columns or more."""
    lines = [run.experiment.name, ""]
    for name, result, usual, meaning in run.rows():
        number, _, unit = result.partition(" ")
        line = f"{name:9} {number:>10} {unit:16} {'usual' * bool(usual)} {usual}"
        lines += [line.rstrip(), wrapped(meaning, " " * 21)]
    parts = ["\n".join(lines), "\n".join(sample(run)), *notes(run)]
    return "\n\n".join(filter(None, parts))


def wrapped(text: str, indent: str = "", first: str | None = None) -> str:
    """A paragraph of at most 80 columns; commands and paths stay whole."""
    options = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(text, 80, initial_indent=first or indent, subsequent_indent=indent, **options)


def visible(text: str) -> str:
    """Text with control and invisible characters as escapes, such as \\x1b."""
    shown = ""
    for c in str(text).replace("\t", "    "):
        shown += c if c.isprintable() or c in "\n\xa0\u3000" else c.encode("unicode_escape").decode()
    return shown


def digits(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:.3f}"


def show(value) -> str:
    """A number with the digits that count. JSON holds null for a number that is not finite."""
    if isinstance(value, float):
        form = ",.0f" if abs(value) >= 1000 else ".3g" if 0 < abs(value) < 0.01 else ".4f"
        return format(value, form)
    if isinstance(value, int):
        return f"{value:,}"
    return "not finite" if value is None else value


def main_metric(task: str) -> str:
    """The metric that `stderr` and `baseline` of a task are about."""
    return METRICS.get(task, "accuracy")


def with_error(entry: dict, key: str, main: str) -> str:
    """A metric of a task with its standard error and, for a tested accuracy, the side of the baseline it is on."""
    text, error = show(entry[key]), entry.get(key.replace(main, "stderr"))
    if error is not None and main in key:
        text += f" ± {error:.2g}"
    if key == "accuracy" and "p_value" in entry:
        side = "↑" if entry["accuracy"] > entry["baseline"] else "↓"
        text += f" {side}" if entry["p_value"] < 0.05 else " ="
    return text
