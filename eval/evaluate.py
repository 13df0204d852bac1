"""Trained models to numbers.

    python pipeline.py configs/tiny.py eval   ->  runs/tiny/eval: results.json, generations.json

Every task whose data is there is measured, on every stage that is trained, and kept at once: an interrupted run goes on
with the next task, and data and stages that come later are added. A stage whose model is missing is not trained here:
that takes hours, and is asked of the user.
"""

import functools
import hashlib
import json
import math
import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import checkpoint
import data.pack
import data.sources
import dpo.data
import machine
import sft.data
import stage
from cli import UserError, log
from configs import Experiment
from data.pack import SPLITS, Packed
from dpo.data import PairRows
from dpo.reference import of_pairs
from eval.answers import answers
from eval.generation import continuations, documents, prompts, smoke
from eval.language import validation
from eval.markdown import table
from eval.preference import preference
from eval.prompts import EVERYDAY, LONGER, SMOKE
from eval.tables import MAIN
from eval.tasks import PUBLISHED
from finetune import Base
from model import Transformer
from sft.data import Rows
from sft.templates import unseen
from stage import Stage, Step
from tokenizer import Tokenizer

WRITTEN = ("answers", "smoke", "prompts", "everyday", "continuations")  # the tasks whose texts are kept


class Task(NamedTuple):
    """data: a digest of what its numbers depend on but for model and tokenizer. load: reads that, as far as it is in a
    file. measure(model, loaded, template): its numbers, and what the model has written, if that is to be kept; the
    template is the one by which the model was taught to answer, if it was. missing: instead of these, why it cannot be
    measured, and the way to get what it needs."""

    data: str = ""
    load: Callable[[], object] = lambda: None
    measure: Callable[[Transformer, object, str | None], tuple[dict, list | None]] | None = None
    missing: str | None = None


def plan(experiment: Experiment, spm: Tokenizer, held_out: Packed | str, packed: str, final: Path) -> dict[str, Task]:
    """Every task by name. held_out: documents, whose digest is `packed`, or why there are none. final: the checkpoint
    of the latest stage."""
    config = experiment.eval
    sampling = {name: getattr(config, name) for name in ("temperature", "top_p", "seed")}
    tasks = {"validation": Task(missing=str(held_out))}
    if isinstance(held_out, Packed):
        most = config.validation_tokens
        tasks["validation"] = Task(
            digest(packed, most), lambda: held_out, lambda model, x, _: (validation(model, x, spm, most), None)
        )
    for name, published in PUBLISHED.items():
        if (path := published.find()) is None:
            where = data.sources.raw() / published.file
            tasks[name] = Task(missing=f"no {where}.*; get it with: python -m eval.download {name}")
        else:
            tasks[name] = Task(
                stage.sha256(path),
                lambda published=published, path=path: published.load(path),
                lambda model, x, _, published=published, name=name: (published.measure(model, spm, x, name), None),
            )
    make = experiment.command("sft_data")
    tasks["answers"] = Task(missing=f"no conversations; make them with: {make}")
    directory, context = experiment.directory("sft_data"), experiment.model.context_length
    if stage.read_manifest(directory):
        counts, template = sft.data.load(directory, spm.sha256), sft.data.template(directory)
        splits = [Rows(directory, split, counts, context) for split in SPLITS]
        tasks["answers"] = Task(
            digest(stage.outputs(directory), config.answers, config.answer_tokens, sampling),
            lambda: splits,
            lambda model, x, _: answers(model, *x, template, spm, config),
        )
    tasks["preference"] = pairs(experiment, spm, final)
    asked = digest(stage.describe(SMOKE), LONGER, config.answer_tokens, sampling)
    tasks["smoke"] = Task(asked, measure=lambda model, _, template: smoke(model, spm, template, config))
    tasks["prompts"] = Task(asked, measure=lambda model, _, template: prompts(model, spm, template, config))
    tasks["everyday"] = Task(
        digest(EVERYDAY, config.answer_tokens, sampling),
        measure=lambda model, _, template: prompts(model, spm, template, config, EVERYDAY),
    )
    tasks["continuations"] = Task(missing=str(held_out))
    length = config.prompt_tokens + config.new_tokens
    if isinstance(held_out, Packed) and not documents(held_out, length, 1):
        what = f"no held-out document has more than {length:,} tokens"
        tasks["continuations"] = Task(missing=f"{what}; lower prompt_tokens or new_tokens of EvalConfig")
    elif isinstance(held_out, Packed):
        tasks["continuations"] = Task(
            digest(packed, config.continuations, config.prompt_tokens, config.new_tokens, sampling),
            lambda: held_out,
            lambda model, x, _: continuations(model, spm, x, config),
        )
    return tasks


def pairs(experiment: Experiment, spm: Tokenizer, final: Path) -> Task:
    """The task `preference`, beside the model that `final` began from if it has learnt preferences, else beside the
    fine-tuned one, which would begin it."""
    directory, make = experiment.directory("dpo_data"), experiment.command("dpo_data")
    if not stage.read_manifest(directory):
        return Task(missing=f"no pairs; make them with: {make}")
    try:
        learnt = "dpo" in checkpoint.read_manifest(final)["config"]
        base = checkpoint.base(final) if learnt else experiment.trained("sft")
    except UserError as error:
        return Task(missing=f"no model to compare with: {error}")
    held_out = PairRows(directory, "val", dpo.data.load(directory, spm.sha256))
    beta = checkpoint.read_manifest(final)["config"]["loss"]["beta"] if learnt else experiment.dpo.loss.beta

    start = Base(
        base, experiment.model, unseen(base, experiment.sft.data.template, spm, experiment.imported is not None)
    )

    @functools.cache
    def reference(device: torch.device) -> torch.Tensor:
        return of_pairs(start.load().to(device).eval(), held_out, "reference")

    return Task(
        digest(stage.outputs(directory), checkpoint.digest(base), beta),
        measure=lambda model, *_: (preference(model, held_out, reference(model.embed.weight.device), beta), None),
    )


def digest(*values) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def step(experiment: Experiment, given: str | None, where: str | None, force: bool) -> Step:
    """The stage that measures every trained stage, or the checkpoint `given`. where: a directory in place of DATA."""
    command = experiment.command("eval")
    if given is not None:
        final = Path(os.path.abspath(given))
        config = checkpoint.read_manifest(final)["config"]
        name = "dpo" if "dpo" in config else "pretrain" if checkpoint.template(final) is None else "sft"
        trained, directory = {name: final}, final.parent / f"eval_{final.name}"
        command += f" --checkpoint {shlex.quote(given)}"
    else:
        trained, directory = experiment.all_trained(), experiment.directory("eval")
    if where is not None:
        if not where or not Path(where).is_dir():
            raise UserError(f"no directory {where!r}; --data says where the tasks' files are")
        os.environ["DATA"] = where
        command += f" --data {shlex.quote(where)}"
    read = {}
    for final in trained.values():
        read |= stage.outputs(final)
    read |= stage.outputs(experiment.directory("pack"))
    job = Stage(directory, {"eval": experiment.eval}, read, command, __file__)
    if manifest := stage.read_manifest(directory):  # of what was read before, compare what is still there
        job.read = {path: read.get(path, digest) for path, digest in manifest["read"].items()}
    return Step(job, lambda: evaluate(experiment, job, trained, force))


def evaluate(experiment: Experiment, job: Stage, trained: dict[str, Path], force: bool) -> None:
    """Measures what has not been measured yet."""
    directory = job.directory
    spm = experiment.load_tokenizer(next(iter(trained.values())))
    of, read = {}, {}
    for name, final in trained.items():
        checkpoint.must_match(final, spm.sha256)
        of[name] = {"checkpoint": checkpoint.digest(final), "tokenizer": spm.sha256}
        read |= stage.outputs(final)
    packed = experiment.directory("pack")
    held_out = f"no packed tokens; make them with: {experiment.command('pack')}"
    if stage.read_manifest(packed):
        if stage.read_manifest(final / "tokenizer") and spm.sha256 not in stage.read_manifest(packed)["read"].values():
            held_out = f"{packed} was packed with another tokenizer than the one that {final} brings"
        else:
            held_out = data.pack.load(packed, spm.sha256)["val"]
            read |= stage.outputs(packed)
    tasks = plan(experiment, spm, held_out, read.get(f"{packed.parent.name}/{packed.name}/val.bin", ""), final)
    read |= {PUBLISHED[name].file: task.data for name, task in tasks.items() if name in PUBLISHED and task.measure}

    # What was read before is compared, as far as it is still there; what has come since is measured now.
    manifest = None if force else stage.read_manifest(directory)
    was = manifest["read"] if manifest else read
    job.read = {path: read.get(path, digest) for path, digest in was.items()}
    finished, job.read = job.is_finished(force), was | read
    results = {name: {} for name in of} if force else left(directory, tasks, of)[0]
    if finished and not any(unmeasured(results, tasks).values()):
        for each in results.values():
            each |= {task: {"skipped": tasks[task].missing} for task in tasks if task not in each}
        log.info(overview(results, stage.read_seconds(directory)))
        job.log_up_to_date()
        return
    loaded = {
        task: tasks[task].load() for task in {task for todo in unmeasured(results, tasks).values() for task in todo}
    }
    measure(job, trained, tasks, of, loaded, force)


def measure(job: Stage, trained: dict[str, Path], tasks: dict[str, Task], of: dict, loaded: dict, force: bool) -> None:
    """Measures the tasks that are missing, each on the stages that lack it, and keeps every result at once.

    loaded: the tasks' data. of: by stage, the digests that its results are bound to."""
    directory = job.directory
    with job.making(keep=not force):
        (directory / "manifest.json").unlink(missing_ok=True)  # there if a finished evaluation is added to
        results, texts = left(directory, tasks, of)
        job.earlier = sum(stage.read_seconds(directory).values())
        device = machine.pick_device()
        torch.set_float32_matmul_precision("highest")  # TF32, which training may use, would blur what is compared here
        for name, todo in unmeasured(results, tasks).items():
            final = trained[name]
            model = checkpoint.load_model(final, str(device)) if todo else None
            log.info(f"{name}: {final}, step {checkpoint.read_manifest(final)['counts'].get('step', 'unknown')}")
            for task in todo:
                started = time.perf_counter()
                numbers, written = tasks[task].measure(model, loaded[task], checkpoint.template(final))
                seconds = time.perf_counter() - started
                results[name][task] = finite(numbers) | of[name] | {"data": tasks[task].data}
                if written is not None:
                    texts[name][task] = written
                    stage.write_json(directory / "generations.json", texts)
                stage.write_json(directory / "results.json", results)
                stage.record_seconds(directory / f"{name}-{task}", seconds)
                log.info(f"{task}: {seconds:.1f} s")
            for task in tasks:
                results[name].setdefault(task, {"skipped": tasks[task].missing})
            results[name] = {task: results[name][task] for task in tasks}
        stage.write_json(directory / "results.json", results)
        stage.write_json(directory / "generations.json", texts)
        measured = {name: sum("skipped" not in entry for entry in each.values()) for name, each in results.items()}
        counts = {"measured": measured, "machine": machine.name(device), "command": job.command}
        job.finish(counts, [directory / "results.json", directory / "generations.json"])
        log.info(f"{overview(results, stage.read_seconds(directory))}\nevaluated: {directory / 'results.json'}")


def left(directory: Path, tasks: dict[str, Task], of: dict[str, dict]) -> tuple[dict[str, dict], dict[str, dict]]:
    """The results, and what was written for them, that an earlier run has left and that still stand: of the checkpoints
    and the tokenizer `of` each stage, and of the task's data, unless that has gone since."""
    results, texts = {}, {}
    found, written = (read_json(directory / f"{file}.json") for file in ("results", "generations"))
    for name, digests in of.items():
        texts[name] = {task: each for task, each in written.get(name, {}).items() if isinstance(each, list)}
        results[name] = {
            task: entry
            for task, entry in found.get(name, {}).items()
            if task in tasks
            and isinstance(entry, dict)
            and isinstance(entry.get("n"), int)
            and entry | digests == entry
            and (tasks[task].missing or entry.get("data") == tasks[task].data)
            and (task not in WRITTEN or task in texts[name])
        }
        texts[name] = {task: each for task, each in texts[name].items() if task in results[name]}
    return results, texts


def unmeasured(results: dict[str, dict], tasks: dict[str, Task]) -> dict[str, list[str]]:
    """Of each stage, the tasks that can be measured and have not been."""
    return {
        name: [task for task in tasks if tasks[task].measure and task not in each] for name, each in results.items()
    }


def read_json(path: Path) -> dict[str, dict]:
    """A file of an earlier run: an object for each stage; nothing of what is not there, or not whole."""

    def refuse(constant: str):
        raise ValueError(constant)  # NaN and Infinity, which are not JSON

    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
        return {name: each for name, each in found.items() if isinstance(each, dict)}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def finite(numbers):
    """Numbers as JSON holds them, in tables of tables too: null for one that is not finite."""
    if isinstance(numbers, dict):
        return {key: finite(each) for key, each in numbers.items()}
    return None if isinstance(numbers, float) and not math.isfinite(numbers) else numbers


def overview(results: dict[str, dict], seconds: dict[str, float]) -> str:
    """Results for the terminal: each task's main number with its error, the baseline, and where there are questions
    whether the difference could be chance."""
    rows, notes = [], []
    for name, each in results.items():
        for task, entry in each.items():
            if "skipped" in entry:
                notes.append(f"{name} {task} skipped: {entry['skipped']}")
                continue
            metric = MAIN.get(task, "accuracy")
            shown = ["–" if x is None else f"{x:.4f}" for x in map(entry.get, (metric, "stderr", "baseline"))]
            difference = ""
            if (p := entry.get("p_value")) is not None:
                side = "above" if entry["accuracy"] > entry["baseline"] else "below"
                difference = "none, p ≥ 0.05" if p >= 0.05 else f"{side}, p {f'= {p:.0e}' if p > 1e-99 else '< 1e-99'}"
            took = seconds.get(f"{name}-{task}", 0.0)
            rows.append([name, task, metric.replace("_", " "), " ± ".join(shown[:2]), shown[2], difference])
            rows[-1] += [f"{entry['n']:,}", f"{took:.1f}"]
    head = ["stage", "task", "measure", "value", "baseline", "difference", "n", "seconds"]
    return "\n".join([table(head, rows), *notes])
