"""Trained models to numbers.

    python -m eval configs/tiny.py   ->  runs/tiny/eval: results.json, generations.json

Every task whose data is there is measured, on every stage that is trained, and kept at once: an interrupted run goes on
with the next task, and data and stages that come later are added. A stage whose model is missing is not trained here:
that takes hours, and is asked of the user.
"""

import argparse
import hashlib
import json
import math
import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import checkpoint
import configs
import data.pack
import data.sources
import machine
import stage
from configs import Experiment
from data.pack import Packed
from eval.generation import answers, smoke
from eval.language import validation
from eval.prompts import LONGER, SMOKE
from eval.tasks import PUBLISHED
from model import Transformer
from stage import Stage, UserError, log
from tokenizer import Tokenizer


class Task(NamedTuple):
    """load: reads what it measures with, whose digest is `data`. measure(model, loaded): its numbers, and texts by
    name. missing: instead of these, why it cannot be measured, and the way to get what it needs."""

    data: str = ""
    load: Callable[[], object] = lambda: None
    measure: Callable[[Transformer, object], tuple[dict, dict]] | None = None
    missing: str | None = None


def plan(experiment: Experiment, spm: Tokenizer, packed: str, held_out: Packed | None) -> dict[str, Task]:
    """Every task by name. packed: the digest of the held-out documents, if there are any."""
    tasks = {"validation": Task(missing=f"no packed tokens; make them with: python -m data.pack {experiment.path}")}
    config = experiment.eval
    if held_out is not None:
        most = config.validation_tokens
        tasks["validation"] = Task(packed, lambda: held_out, lambda model, x: (validation(model, x, spm, most), {}))
    for name, published in PUBLISHED.items():
        if (path := published.find()) is None:
            where = data.sources.raw() / published.file
            tasks[name] = Task(missing=f"no {where}.*; get it with: python -m eval.download {name}")
        else:
            tasks[name] = Task(
                stage.sha256(path),
                lambda published=published, path=path: published.load(path),
                lambda model, x, published=published, name=name: (published.measure(model, spm, x, name), {}),
            )
    settings = [stage.describe(config), stage.describe(SMOKE), LONGER, packed]
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    tasks["smoke"] = Task(digest, measure=lambda model, _: smoke(model, spm, config))
    tasks["prompts"] = Task(digest, lambda: held_out, lambda model, x: answers(model, spm, x, config))
    return tasks


def main(arguments: argparse.Namespace) -> None:
    experiment = configs.load(arguments.config)
    if arguments.data:
        if not Path(arguments.data).is_dir():
            raise UserError(f"no directory {arguments.data}; --data says where the tasks' files are")
        os.environ["DATA"] = arguments.data
    remake = f"python -m eval {experiment.path}"
    if arguments.checkpoint:
        final = Path(arguments.checkpoint)
        trained, directory = {"pretrain": final}, final.parent / f"eval_{final.name}"
        remake += f" --checkpoint {shlex.quote(arguments.checkpoint)}"
    else:
        trained, directory = {"pretrain": experiment.trained("pretrain")}, experiment.directory("eval")
    spm = experiment.load_tokenizer(next(iter(trained.values())))
    for final in trained.values():
        checkpoint.must_match(final, spm.sha256)
    packed, held_out = experiment.directory("pack"), None
    if read := stage.outputs(packed):
        held_out = data.pack.load(packed, spm.sha256, f"python -m data.pack {experiment.path}")["val"]
    tasks = plan(experiment, spm, read.get(f"{packed.parent.name}/{packed.name}/val.bin", ""), held_out)
    for final in trained.values():
        read |= stage.outputs(final)
    read |= {PUBLISHED[name].file: task.data for name, task in tasks.items() if name in PUBLISHED and task.measure}

    # What was read before is compared, as far as it is still there; what has come since is measured now.
    manifest = None if arguments.force else stage.read_manifest(directory)
    was = manifest["read"] if manifest else read
    job = Stage(directory, {"eval": experiment.eval}, {k: read.get(k, digest) for k, digest in was.items()}, remake)
    finished, job.read = job.up_to_date(arguments.force), was | read
    results, texts = ({} if arguments.force else left(directory / f"{n}.json") for n in ("results", "generations"))
    todo, seconds = {}, {}
    for name, final in trained.items():
        of = {"checkpoint": checkpoint.read_manifest(final)["wrote"]["weights.pt"]["sha256"], "tokenizer": spm.sha256}
        kept = {task: entry for task, entry in results.get(name, {}).items() if stands(entry, of, tasks.get(task))}
        todo[name] = {task: of for task in tasks if task not in kept and tasks[task].measure}
        results[name] = {task: kept.get(task, {"skipped": tasks[task].missing}) for task in tasks}
    if finished and not any(todo.values()):
        log.info(f"{table(results, seconds)}\n{directory} is up to date")
        return
    loaded = {task: tasks[task].load() for task in {task for each in todo.values() for task in each}}
    device = machine.pick_device()
    with job.making(keep=not arguments.force):
        (directory / "manifest.json").unlink(missing_ok=True)  # there if a finished evaluation is added to
        for name, final in trained.items():
            log.info(f"{name}: {final}, step {checkpoint.read_manifest(final)['counts'].get('step', 'unknown')}")
            model = checkpoint.load_model(final, str(device))
            for task, of in todo[name].items():
                started = time.perf_counter()
                numbers, written = tasks[task].measure(model, loaded[task])
                seconds[name, task] = time.perf_counter() - started
                results[name][task] = finite(numbers) | of | {"data": tasks[task].data}
                if written:
                    texts.setdefault(name, {}).update(written)
                    stage.write_json(directory / "generations.json", texts)
                stage.write_json(directory / "results.json", unfinished(results, todo, seconds))
                log.info(f"{task}: {seconds[name, task]:.1f} s")
        stage.write_json(directory / "results.json", results)
        measured = {name: sum("skipped" not in entry for entry in each.values()) for name, each in results.items()}
        job.finish({"measured": measured, "machine": machine.name(device), "command": remake})
        log.info(f"{table(results, seconds)}\nevaluated: {directory / 'results.json'}")


def stands(entry: dict, of: dict[str, str], task: Task | None) -> bool:
    """Whether a result is of this checkpoint and tokenizer, and of the task's data, unless that has gone since."""
    if "skipped" in entry or task is None:
        return False
    return entry | of == entry and (task.missing is not None or entry["data"] == task.data)


def left(path: Path) -> dict:
    """What an earlier run has left; nothing if that is not there, or not whole."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def unfinished(results: dict, todo: dict, seconds: dict) -> dict:
    """The results without those tasks that are still to be measured."""
    return {
        name: {task: entry for task, entry in each.items() if task not in todo[name] or (name, task) in seconds}
        for name, each in results.items()
    }


def finite(numbers: dict) -> dict:
    """Numbers as JSON holds them: null for one that is not finite."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in numbers.items()}


HEADLINES = {"validation": "bits_per_byte", "wikitext2": "bits_per_byte", "smoke": "passed", "prompts": "repetition"}


def table(results: dict[str, dict], seconds: dict[tuple[str, str], float]) -> str:
    """Results for the terminal, a line each: the headline with its error, the baseline, and where there are questions
    whether the difference could be chance. seconds: of those measured just now."""
    rows = [["stage", "task", "measure", "", "baseline", "difference", "n", "seconds"]]
    notes = []
    for name, each in results.items():
        for task, entry in each.items():
            if "skipped" in entry:
                notes.append(f"{name} {task} skipped: {entry['skipped']}")
                continue
            metric = HEADLINES.get(task, "accuracy")
            numbers = [entry.get(key) for key in (metric, "stderr", "baseline")]
            value, error, baseline = ("" if number is None else f"{number:.4f}" for number in numbers)
            difference = ""
            if "p_value" in entry:
                way = "above" if entry["accuracy"] > entry["baseline"] else "below"
                difference = f"{way}, p {entry['p_value']:.0e}" if entry["p_value"] < 0.05 else "none, p ≥ 0.05"
            took = f"{seconds[name, task]:.1f}" if (name, task) in seconds else ""
            label = metric.replace("_", " ")
            rows.append([name, task, label, f"{value} ± {error}", baseline, difference, f"{entry['n']:,}", took])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, *notes])


if __name__ == "__main__":
    p = stage.parser(__doc__, makes=True)
    p.add_argument("--checkpoint", metavar="DIR", help="a trained model by path; results go to eval_NAME beside it")
    p.add_argument("--data", metavar="DIR", help="where the tasks' files are, instead of DATA")
    stage.run(main, p.parse_args())
