"""Compares runs: differences of configs, final numbers, curves, and texts for the same prompts and seeds.

    python -m eval.compare demo mine        two or more names of runs, or directories such as runs/mine

Prints a page, and writes it with a picture to runs/compare/. The runs may be unfinished, their configs unknown.
Next: use the better run, such as: python serve.py configs/demo.py generate "The"
"""

import argparse
import contextlib
import hashlib
import itertools
import textwrap
from pathlib import Path

import checkpoint
import cli
import machine
import stage
import tokenizer
from cli import UserError, log, visible
from configs import DIRECTORIES, TRAINED
from eval import EvalConfig, generation
from eval.language import Subject
from eval.prompts import SMOKE, TEXTS
from eval.report import READING, block, table
from eval.summary import Run, show, with_error
from eval.tasks import METRICS
from metrics import SHOWN

HELD_OUT = ("input packed", "input sft_data", "input dpo_data", "eval_rows", "context_length")  # what sets depend on


class Stored(Run):
    """The results of a run in a directory. The run may be unfinished, and its config unknown."""

    def __init__(self, home: Path, name: str):
        self.home, self.name = home, name
        super().__init__(self)

    def directory(self, name: str) -> Path:
        return self.home / DIRECTORIES[name]

    def all_trained(self) -> dict[str, Path]:
        """The newest checkpoint of each stage that trains."""
        saved = {name: checkpoint.steps(self.directory(name)) for name in TRAINED}
        return {name: newest[0][1] for name, newest in saved.items() if newest}


def load(words: list[str]) -> list[Stored]:
    """The runs. UserError if one is missing, named twice or not trained, or no two have trained the same stage."""
    runs = {}
    for word in words:
        home = next((path for path in (stage.runs() / word, Path(word)) if path.is_dir()), None)
        if home is None:
            known = [path.parent.name for path in sorted(stage.runs().glob("*/pretrain"))] or ["none"]
            raise UserError(f"no run {word} in {stage.runs()}/; {cli.meant(Path(word).stem, known)}")
        if home.resolve() in runs:
            raise UserError(f"{word} names the run {home} again; name each run once")
        runs[home.resolve()] = run = Stored(home, word.rstrip("/"))
        if not run.finals:
            raise UserError(f"nothing is trained in {home}: no checkpoint in {'/, '.join(TRAINED)}/")
    if len(runs) < 2:
        raise UserError(f"{words[0]} alone has nothing to be compared with; name two or more runs")
    stages = [name for run in runs.values() for name in run.finals]
    if len(set(stages)) == len(stages):
        raise UserError(f"no two of these runs have trained the same stage: found {', '.join(stages)}")
    return list(runs.values())


def changes(runs: list[Stored]) -> list[list[str]]:
    """[stage, field, a run's value, …] of all that differs in configs and inputs; "" for a run without the stage."""
    rows = {}
    for name in DIRECTORIES:
        about = {}
        for run in runs:
            if manifest := run.manifests.get(name) or run.finals.get(name):
                about[run] = settings = dict(manifest["config"])
                for path, sha256 in manifest["read"].items():
                    if not path.endswith("_CARD.md"):  # a card has the run's name in it
                        key = f"input {Path(path).parent.name or path}"
                        joined = settings.get(key, "") + sha256  # of all the files of an input
                        settings[key] = hashlib.sha256(joined.encode()).hexdigest() if key in settings else sha256
        for place, values in stage.different(list(about.values())):
            shown = dict(zip(about, map(stage.short, values), strict=True))
            cells = [shown.get(run, "") for run in runs]
            # Every stage that trains repeats the model's shape.
            rows.setdefault(place if place.startswith("model.") else (name, place), [name, place, *cells])
    return list(rows.values())


def numbers(runs: list[Stored]) -> list[list[str]]:
    """[stage, number's name, a run's number, …] of all stages that two or more runs have trained."""
    rows = []
    for name in TRAINED:
        if sum(name in run.finals for run in runs) > 1:
            columns = [ending(run, name) if name in run.finals else {} for run in runs]
            for key in dict.fromkeys(itertools.chain(*columns)):
                rows.append([name, key.replace("_", " "), *(column.get(key, "") for column in columns)])
    return rows


def ending(run: Stored, name: str) -> dict[str, str]:
    """The numbers of a stage's newest checkpoint, and those of its evaluation with their standard errors."""
    counts = run.finals[name]["counts"]
    finished = stage.read_seconds(run.home) if name in run.manifests else {}  # with the last evaluation
    seconds = finished.get(DIRECTORIES[name], counts["seconds"])
    end = counts["record"] | {"of_steps": counts["steps"], "seconds": round(seconds)}
    end["parameters"] = round(end["tokens"] / end["tokens_per_parameter"])
    for record in run.metrics(name):
        if "val_loss" in record and record["step"] <= end["step"]:  # a later step is not in the checkpoint
            end |= {key: record[key] for key in SHOWN if key in record} | {"evaluated_at_step": record["step"]}
    if end.get("evaluated_at_step") == end["step"]:
        del end["evaluated_at_step"]
    keys = ("step", "of_steps", "tokens", "parameters", "seconds", "evaluated_at_step", *SHOWN)
    shown = {key: show(end[key]) for key in keys if key in end}
    for task, metric in METRICS.items():
        entry = run.results.get(name, {}).get(task, {})
        if "n" in entry:
            current = entry["checkpoint"] == checkpoint.digest(run.all_trained()[name])
            shown[f"{task}: {metric}"] = with_error(entry, metric, metric) if current else "of an old checkpoint"
    return shown


def texts(runs: list[Stored]) -> list[str]:
    """Texts for the same prompts and seeds, side by side, by the models of the latest stage that all runs have."""
    common = [name for name in TRAINED if all(name in run.finals for run in runs)]
    if not common:
        return ["No stage is trained in all of these runs."]
    # A base model continues a text; a fine-tuned model answers.
    asked = list(SMOKE)[:3] if common[-1] == "pretrain" else TEXTS["prompts"][:3]
    written, lines = {}, [f"The models of {common[-1]} write. Nobody selected the texts."]
    for run in runs:
        try:
            written[run] = generation.answer(subject(run, common[-1]), asked)
        except Exception as error:  # whatever is wrong with one model, the page compares the rest
            lines.append(f"No texts of {run.name}: {error}")
    width = max(24, 108 // max(1, len(written)))
    for answers in zip(*written.values(), strict=True):
        columns = [textwrap.wrap(" ".join(visible(answer["answer"]).split()), width) for answer in answers]
        side = cli.table([[run.name for run in written], *itertools.zip_longest(*columns, fillvalue="")])
        lines += [f"Seed {answers[0]['seed']}:", block(answers[0]["prompt"]), block(side)]
    return lines


def subject(run: Stored, name: str) -> Subject:
    """The model of a stage, with its tokenizer, wherever that is found."""
    final = run.all_trained()[name]
    wanted = checkpoint.trained_with(final)
    for place in (final / "tokenizer", *run.home.parent.glob("*/tokenizer"), *Path().glob("*/*/tokenizer")):
        wrote = {}
        with contextlib.suppress(UserError):  # a damaged manifest of another run
            wrote = stage.outputs(place)
        if wanted in wrote.values():
            model = checkpoint.load_model(final, str(machine.pick_device()))
            return Subject(model, tokenizer.load(place), checkpoint.template(final), EvalConfig(answer_tokens=60))
    raise UserError(f"no tokenizer in {run.home.parent}/*/ has the SHA-256 {wanted[:12]}… that {final} names")


def main(arguments: argparse.Namespace) -> None:
    cli.extra("matplotlib", "matplotlib", "eval.compare")
    from eval import plots

    runs = load(arguments.runs)
    names = [run.name for run in runs]
    spms = {checkpoint.trained_with(final) for run in runs for final in run.all_trained().values()}
    file = (arguments.out or stage.runs() / "compare") / "_".join(names).replace("/", "-")[:200]
    file.parent.mkdir(parents=True, exist_ok=True)
    plots.compare(runs, Path(f"{file}.png"), in_bytes=len(spms) > 1)
    rows = changes(runs)
    page = [f"# {' and '.join(names)}", "## What differs"]
    page.append(table(["stage", "field", *names], rows) if rows else "Nothing in configs and inputs.")
    page += ["## Final numbers", table(["stage", "number", *names], numbers(runs), range(2, len(names) + 2)), READING]
    if len(spms) > 1:
        page.append("The tokenizers differ: compare bits per byte, not losses per token and perplexities.")
    if any(row[1].endswith(HELD_OUT) for row in rows):
        page.append("The held-out sets may differ (see the first table): held-out numbers can differ for that reason.")
    page += ["## Curves", f"![curves]({file.name}.png)", "## Texts", *texts(runs)]
    text = "\n\n".join(page) + "\n"
    stage.write(Path(f"{file}.md"), text.encode())
    print(text)
    log.info(f"compared: {file}.md")


if __name__ == "__main__":
    p = cli.parser(__doc__, config=False)
    p.add_argument("runs", nargs="+", metavar="RUN", help="the name of a run in runs/, or a directory")
    p.add_argument("--out", type=Path, metavar="DIR", help="where to write; default: compare/ in runs/")
    cli.run(main, p.parse_args())
