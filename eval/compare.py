"""Compares runs: what differs in their configs, final numbers, curves, and texts for the same prompts and seeds.

    python -m eval.compare demo mine        two or more names of runs, or directories such as runs/mine

Prints a page and writes it with a picture. Reads what the runs wrote, finished or not, and needs no config.

Next: use the better run, such as: python serve.py configs/demo.py generate "The"
"""

import argparse
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


class Stored(Run):
    """The results of a run in a directory. The run may be unfinished, and its config unknown."""

    def __init__(self, home: Path):
        self.home, self.name = home, home.resolve().name
        super().__init__(self)

    def directory(self, name: str) -> Path:
        return self.home / DIRECTORIES[name]

    def all_trained(self) -> dict[str, Path]:
        """The newest checkpoint of each stage that trains."""
        saved = {name: checkpoint.steps(self.directory(name)) for name in TRAINED}
        return {name: newest[0][1] for name, newest in saved.items() if newest}


def load(words: list[str]) -> list[Stored]:
    """The runs. UserError if there are fewer than two, or one is missing, named twice or not trained."""
    runs = {}
    for word in words:
        home = next((path for path in (stage.runs() / word, Path(word)) if path.is_dir()), None)
        if home is None:
            known = [path.parent.name for path in sorted(stage.runs().glob("*/pretrain"))] or ["none"]
            raise UserError(f"no run {word} in {stage.runs()}/; {cli.meant(Path(word).stem, known)}")
        run = Stored(home)
        if not run.finals:
            raise UserError(f"nothing is trained in {home}: no checkpoint in {'/, '.join(TRAINED)}/")
        if runs.setdefault(home.resolve(), run) is not run:
            raise UserError(f"{word} names the run {home} again; name each run once")
        if run.name in [other.name for other in runs.values() if other is not run]:
            run.name = "/".join(home.resolve().parts[-2:])
    if len(runs) < 2:
        raise UserError(f"{words[0]} alone has nothing to be compared with; name two or more runs")
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
                    key = f"input {Path(path).parent.name or path}"
                    settings[key] = settings.get(key, "") + sha256
        for place, values in stage.different(list(about.values())):
            shown = dict(zip(about, map(stage.short, values), strict=True))
            cells = [shown.get(run, "") for run in runs]
            rows.setdefault((place, *cells), [name, place, *cells])  # once: SFT repeats the model's config
    return list(rows.values())


def numbers(runs: list[Stored]) -> list[list[str]]:
    """[stage, number's name, a run's number, …]: the end of each training, then its evaluation."""
    rows = []
    for name in TRAINED:
        ends = [ending(run, name) for run in runs]
        for key in ("step", "of_steps", "tokens", "parameters", "seconds", *SHOWN):
            rows.append([name, key.replace("_", " "), *(show(end[key]) if key in end else "" for end in ends)])
        for task, metric in METRICS.items():
            entries = [run.results.get(name, {}).get(task, {}) for run in runs]
            cells = [with_error(entry, metric, metric) if "n" in entry else "" for entry in entries]
            rows.append([name, f"{task}: {metric}".replace("_", " "), *cells])
    return [row for row in rows if sum(map(bool, row[2:])) > 1]


def ending(run: Stored, name: str) -> dict:
    """The last numbers of a stage's training; {} if it is not trained."""
    if name not in run.finals:
        return {}
    counts = run.finals[name]["counts"]
    end = dict(counts["record"])
    for record in run.metrics(name):
        end |= record if "val_loss" in record else {}
    parameters = round(end["tokens"] / end["tokens_per_parameter"])
    return end | {"of_steps": counts["steps"], "seconds": round(counts["seconds"]), "parameters": parameters}


def texts(runs: list[Stored], name: str) -> list[str]:
    """What the models of a stage write for the same prompts and seeds, side by side."""
    # A base model continues a text; a fine-tuned model answers.
    asked = list(SMOKE)[:3] if name == "pretrain" else TEXTS["prompts"][:3]
    written, lines = {}, [f"The models of {name} write. Nobody selected the texts."]
    for run in runs:
        try:
            written[run.name] = generation.answer(subject(run, name), asked)
        except Exception as error:  # whatever is wrong with one model, the page compares the rest
            lines.append(f"No texts of {run.name}: {error}")
    width = max(24, 108 // max(1, len(written)))
    for answers in zip(*written.values(), strict=True):
        columns = [textwrap.wrap(" ".join(visible(answer["answer"]).split()), width) for answer in answers]
        side = cli.table([list(written), *itertools.zip_longest(*columns, fillvalue="")])
        lines += [f"Seed {answers[0]['seed']}:", block(answers[0]["prompt"]), block(side)]
    return lines


def subject(run: Stored, name: str) -> Subject:
    """The model of a stage, with its tokenizer from this run or from another run beside it."""
    final = run.all_trained()[name]
    wanted = checkpoint.trained_with(final)
    for place in (final / "tokenizer", *run.home.parent.glob("*/tokenizer"), *Path().glob("*/*/tokenizer")):
        if wanted in stage.outputs(place).values():
            model = checkpoint.load_model(final, str(machine.pick_device()))
            return Subject(model, tokenizer.load(place), checkpoint.template(final), EvalConfig(answer_tokens=60))
    raise UserError(f"no tokenizer in {run.home.parent}/*/ has the SHA-256 {wanted[:12]}… that {final} names")


def main(arguments: argparse.Namespace) -> None:
    cli.extra("matplotlib", "matplotlib", "eval.compare")
    from eval import plots

    runs = load(arguments.runs)
    names, rows, common = [run.name for run in runs], changes(runs), ""
    differ = len({checkpoint.trained_with(final) for run in runs for final in run.all_trained().values()}) > 1
    for name in TRAINED:
        common = name if all(name in run.finals for run in runs) else common
    page = [
        f"# {' and '.join(names)}",
        "## What differs",
        table(["stage", "field", *names], rows) if rows else "Nothing.",
    ]
    page += ["## Final numbers", table(["stage", "number", *names], numbers(runs), range(2, len(names) + 2)), READING]
    if differ:
        page.append("The tokenizers differ: compare bits per byte, not losses per token and perplexities.")
    file = (arguments.out or stage.runs() / "compare") / "_".join(run.home.resolve().name for run in runs)
    file.parent.mkdir(parents=True, exist_ok=True)
    plots.compare(runs, Path(f"{file}.png"), differ)
    page += ["## Curves", f"![curves]({file.name}.png)", "## Texts"]
    page += texts(runs, common) if common else ["No stage is trained in all of these runs."]
    text = "\n\n".join(page) + "\n"
    stage.write(Path(f"{file}.md"), text.encode())
    print(text)
    log.info(f"compared: {file}.md")


if __name__ == "__main__":
    p = cli.parser(__doc__, config=False)
    p.add_argument("runs", nargs="+", metavar="RUN", help="the name of a run in runs/, or a directory")
    p.add_argument("--out", type=Path, metavar="DIR", help="where to write; default: compare/ in runs/")
    cli.run(main, p.parse_args())
