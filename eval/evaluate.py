"""Trained models to numbers: `pipeline.py CONFIG eval` writes runs/NAME/eval/results.json and generations.json."""

# Every task whose data exists is measured on every stage that is trained, and saved at once: an interrupted run
# continues with the next task, and data and stages that come later are added.

import hashlib
import json
import os
import shlex
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import checkpoint
import data.pack
import data.sources
import dpo.data
import dpo.reference
import machine
import sft.data
import stage
from cli import UserError, log
from configs import Experiment
from eval import generation
from eval.language import Subject, validation
from eval.preference import preference
from eval.prompts import TEXTS
from eval.summary import main_metric, skipped, with_error
from eval.tasks import PUBLISHED, TASKS
from finetune import Base
from sft.templates import unseen
from stage import Stage, Step
from tokenizer import Tokenizer

READS = {"validation": "pack", "continuations": "pack", "answers": "sft_data", "preference": "dpo_data"}


def step(experiment: Experiment, given: str | None, where: str | None, force: bool) -> Step:
    """The stage that measures every trained stage, or the checkpoint `given`. where: a directory in place of DATA."""
    command, directory = experiment.command("eval"), experiment.directory("eval")
    if given is None:
        trained = experiment.all_trained()
    else:
        final = Path(os.path.abspath(given))
        tuned = "sft" if checkpoint.template(final) else "pretrain"
        name = "dpo" if "dpo" in checkpoint.read_manifest(final)["config"] else tuned
        trained, directory = {name: final}, final.parent / f"eval_{final.name}"
        command += f" --checkpoint {shlex.quote(given)}"
    if where is not None:
        if not where or not Path(where).is_dir():
            raise UserError(f"no directory {where!r}; --data says where the tasks' files are")
        os.environ["DATA"] = where
        command += f" --data {shlex.quote(where)}"
    read = stage.outputs(experiment.directory("pack"))
    for final in trained.values():
        read |= stage.outputs(final)
    for published in PUBLISHED.values():
        if path := published.find():
            read[published.file] = stage.sha256(path)
    # What an earlier run read is compared, if it still exists. What is new is measured now.
    before = stage.read_manifest(directory) or {"read": {}}
    compared = {path: read.get(path, digest) for path, digest in before["read"].items()}
    job = Stage(directory, {"eval": experiment.eval}, compared, command, __file__)
    return Step(job, lambda: evaluate(experiment, job, trained, read, force))


def evaluate(experiment: Experiment, job: Stage, trained: dict[str, Path], read: dict[str, str], force: bool) -> None:
    """Measures each task that has not been measured yet. read: digests of all that may be read."""
    spm = experiment.load_tokenizer(list(trained.values())[-1])
    digests, missing = available(experiment, trained, spm, read)
    results, texts, identity, waiting, prepared = {}, {}, {}, {}, {}
    for name, final in trained.items():
        checkpoint.must_match(final, spm.sha256)
        identity[name] = {"checkpoint": checkpoint.digest(final), "tokenizer": spm.sha256}
        results[name], texts[name] = {}, {}
        if not force:
            keep(job.directory, name, identity[name], digests, results[name], texts[name])
        for task, why in missing.items():
            results[name].setdefault(task, {"skipped": why})
        waiting[name] = [task for task in TASKS if task in digests and task not in results[name]]
    finished = job.is_finished(force)
    job.read |= read
    if line := skipped(results):
        log.info(line)
    if finished and not any(waiting.values()):
        log.info(f"{job.directory} is up to date")
        return
    torch.set_float32_matmul_precision("highest")  # TF32, which training may use, would blur the comparison
    for task in set().union(*waiting.values()):  # damaged data stops before the long work
        prepared[task] = prepare(task, experiment, trained, spm)
    with job.making(keep=not force):
        (job.directory / "manifest.json").unlink(missing_ok=True)  # a finished evaluation is added to
        job.earlier = sum(stage.read_seconds(job.directory).values())
        device = machine.pick_device()
        for name, final in trained.items():
            if not waiting[name]:
                continue
            log.info(f"{name}: {final}, step {checkpoint.read_manifest(final)['counts'].get('step', 'unknown')}")
            model = checkpoint.load_model(final, str(device))
            subject = Subject(model, spm, checkpoint.template(final), experiment.eval)
            for task in waiting[name]:
                started = time.perf_counter()
                numbers = prepared[task](subject)
                seconds = time.perf_counter() - started
                if "texts" in numbers:
                    texts[name][task] = numbers.pop("texts")
                numbers = json.loads(json.dumps(numbers), parse_constant=lambda _: None)  # not finite: null
                results[name][task] = numbers | identity[name] | {"data": digests[task]}
                save(job.directory, results, texts)
                stage.record_seconds(job.directory / f"{name}-{task}", seconds)
                metric = main_metric(task)
                number = with_error(numbers, metric, metric) if metric in numbers else "skipped"
                log.info(f"{task}: {metric.replace('_', ' ')} {number}, {seconds:.1f} s")
        save(job.directory, results, texts)
        measured = {}
        for name, entries in results.items():
            measured[name] = sum("n" in entry for entry in entries.values())
        counts = {"measured": measured, "machine": machine.name(device), "command": job.command}
        job.finish(counts, [job.directory / "results.json", job.directory / "generations.json"])
        log.info(f"evaluated: {job.directory / 'results.json'}")


def available(experiment: Experiment, trained: dict, spm: Tokenizer, read: dict) -> tuple[dict[str, str], dict]:
    """{task: digest of all that its numbers depend on, but for the model}, and {task: why it cannot be measured}."""
    digests, missing, settings = {}, {}, stage.describe(experiment.eval)
    for task, published in PUBLISHED.items():
        if published.file in read:
            digests[task] = read[published.file]
        else:
            where = data.sources.raw() / published.file
            missing[task] = f"no {where}.*; get it with: python -m eval.download {task}"
    for task in TEXTS:
        digests[task] = digest(settings, TEXTS)
    for task, source in READS.items():
        manifest = stage.read_manifest(experiment.directory(source))
        if manifest is None:
            missing[task] = f"no {source}; make it with: {experiment.command(source)}"
        elif spm.sha256 not in manifest["read"].values():
            missing[task] = f"{source} was made with another tokenizer than this model's"
        elif task == "preference" and trained.keys() == {"pretrain"}:
            missing[task] = f"no fine-tuned model to compare with; train it with: {experiment.command('sft')}"
        else:
            digests[task] = digest(settings, manifest["wrote"])
    if "preference" in digests:  # the reference is one of the trained models
        digests["preference"] += digest(list(map(checkpoint.digest, trained.values())))
    return digests, missing


def digest(*values) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def keep(directory: Path, name: str, identity: dict, digests: dict, results: dict, texts: dict) -> None:
    """Takes over the results and texts of earlier runs with the same model, tokenizer and data."""
    earlier = stage.read_json(directory / "results.json") or {}
    written = stage.read_json(directory / "generations.json") or {}
    for task, entry in earlier.get(name, {}).items():
        # A result also stands if its data is gone.
        if entry | identity == entry and entry["data"] == digests.get(task, entry["data"]):
            results[task] = entry
            if task in written.get(name, {}):
                texts[task] = written[name][task]


def prepare(task: str, experiment: Experiment, trained: dict[str, Path], spm: Tokenizer) -> Callable[[Subject], dict]:
    """Reads a task's data. Returns the function that measures a model: the task's numbers, and "texts" if it writes."""
    if task in PUBLISHED:
        published = PUBLISHED[task]
        return partial(published.measure, loaded=published.load(published.find()), name=task)
    if task == "smoke":
        return generation.smoke
    if task in TEXTS:
        return partial(generation.prompts, asked=TEXTS[task])
    directory = experiment.directory(READS[task])
    if READS[task] == "pack":
        measure = validation if task == "validation" else generation.continuations
        return partial(measure, held_out=data.pack.load(directory, spm.sha256)["val"])
    if task == "answers":
        counts, context = sft.data.load(directory, spm.sha256), experiment.model.context_length
        train, held_out = (sft.data.Rows(directory, split, counts, context) for split in data.pack.SPLITS)
        template = stage.read_manifest(directory)["config"]["sft_data"]["template"]
        return partial(generation.answers, train=train, held_out=held_out, template=template)
    # The reference is the model that DPO started or would start from.
    pairs = dpo.data.PairRows(directory, "val", dpo.data.load(directory, spm.sha256))
    final = list(trained.values())[-1]
    base, beta, config = trained.get("sft", final), experiment.dpo.loss.beta, checkpoint.read_manifest(final)["config"]
    if "dpo" in config:
        base, beta = checkpoint.base(final), config["loss"]["beta"]
    pieces = unseen(base, experiment.sft.data.template, spm, experiment.imported is not None)
    model = Base(base, experiment.model, pieces).load().to(machine.pick_device())
    reference = dpo.reference.of_pairs(model.eval(), pairs, "reference")
    return partial(preference, pairs=pairs, reference=reference, beta=beta)


def save(directory: Path, results: dict, texts: dict) -> None:
    """Writes results.json and generations.json, the tasks in their order."""
    for name, content in (("generations", texts), ("results", results)):
        ordered = {}
        for owner, entries in content.items():
            ordered[owner] = {task: entries[task] for task in TASKS if task in entries}
        stage.write_json(directory / f"{name}.json", ordered)
