"""Trained models to numbers: `pipeline.py CONFIG eval` writes runs/NAME/eval/results.json and generations.json."""

# Every task whose data exists is measured on every trained stage, and each result is saved at once. So an interrupted
# run continues with the next task, and a later run adds new data and stages.

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
from cli import log
from configs import Experiment
from eval import generation
from eval.language import Subject, validation
from eval.preference import preference
from eval.prompts import TEXTS
from eval.summary import skipped, with_error
from eval.tasks import METRICS, PUBLISHED
from finetune import Base
from sft.templates import unseen
from stage import Stage, Step
from tokenizer import Tokenizer

READS = {"validation": "pack", "continuations": "pack", "answers": "sft_data", "preference": "dpo_data"}


def step(experiment: Experiment, given: str | None, force: bool) -> Step:
    """The stage that measures every trained stage, or the checkpoint `given`."""
    command = experiment.command("eval")
    if given is None:
        trained = experiment.all_trained()
        directory = experiment.directory("eval")
    else:
        final = Path(os.path.abspath(given))
        tuned = "sft" if checkpoint.template(final) else "pretrain"
        name = "dpo" if "dpo" in checkpoint.read_manifest(final)["config"] else tuned
        trained = {name: final}
        directory = final.parent / f"eval_{final.name}"
        command += f" --checkpoint {shlex.quote(given)}"
    read = stage.outputs(experiment.directory("pack"))
    for final in trained.values():
        read |= stage.outputs(final)
    for published in PUBLISHED.values():
        if path := published.find():
            read[published.file] = stage.sha256(path)
    # Compare the inputs of an earlier run that still exist. New inputs are measured now.
    before = stage.read_manifest(directory) or {"read": {}}
    compared = {path: read.get(path, digest) for path, digest in before["read"].items()}
    job = Stage(directory, {"eval": experiment.eval}, compared, command, __file__)
    return Step(job, lambda: evaluate(experiment, job, trained, read, force))


def evaluate(experiment: Experiment, job: Stage, trained: dict[str, Path], read: dict[str, str], force: bool) -> None:
    """Measures each task that has not been measured yet. read: digests of all that may be read."""
    spm = experiment.load_tokenizer(list(trained.values())[-1])
    digests, missing = available(experiment, trained, spm, read)
    results, texts, waiting, measures = {}, {}, {}, {}
    for name, final in trained.items():
        checkpoint.must_match(final, spm.sha256)
        identity = {"checkpoint": checkpoint.digest(final), "tokenizer": spm.sha256}
        results[name] = {task: {"skipped": why} for task, why in missing.items()}
        texts[name], waiting[name] = {}, {}
        if not force:  # the owner of a shared model may have measured it; results stay valid if their data is gone
            keep(experiment.owner(name).directory("eval"), name, identity, missing | digests, results, texts)
            keep(job.directory, name, identity, digests, results, texts)
        for task in METRICS:
            if task not in results[name]:
                waiting[name][task] = identity | {"data": digests[task]}
    finished = job.is_finished(force)
    job.read |= read
    for line in skipped(results):
        log.info(line)
    if finished and not any(waiting.values()):
        log.info(f"{job.directory} is up to date")
        return
    torch.set_float32_matmul_precision("highest")  # TF32, which training may use, would blur the comparison
    for task in METRICS:
        if any(task in tasks for tasks in waiting.values()):  # now: damaged data must stop before the long work
            measures[task] = prepare(task, experiment, trained, spm)
    with job.making(keep=not force):
        (job.directory / "manifest.json").unlink(missing_ok=True)  # adds to a finished evaluation
        job.earlier = sum(stage.read_seconds(job.directory).values())
        device = machine.pick_device()
        for name, tasks in waiting.items():
            if not tasks:
                continue
            log.info(f"{name}: {trained[name]}")
            model = checkpoint.load_model(trained[name], str(device))
            subject = Subject(model, spm, checkpoint.template(trained[name]), experiment.eval)
            for task, identity in tasks.items():
                started = time.perf_counter()
                numbers = measures[task](subject)
                seconds = time.perf_counter() - started
                if "texts" in numbers:
                    texts[name][task] = numbers.pop("texts")
                numbers = json.loads(json.dumps(numbers), parse_constant=lambda _: None)  # not finite: null
                results[name][task] = numbers | identity
                save(job.directory, results, texts)
                stage.record_seconds(job.directory / f"{name}-{task}", seconds)
                metric = METRICS[task]
                number = with_error(numbers, metric, metric) if metric in numbers else "skipped"
                log.info(f"{task}: {metric} {number}, {seconds:.1f} s")
        save(job.directory, results, texts)
        measured = {}
        for name, entries in results.items():
            measured[name] = sum("n" in entry for entry in entries.values())
        counts = {"measured": measured, "machine": machine.name(device), "command": job.command}
        job.finish(counts, [job.directory / "results.json", job.directory / "generations.json"])
        log.info(f"evaluated: {job.directory / 'results.json'}")


def available(experiment: Experiment, trained: dict, spm: Tokenizer, read: dict) -> tuple[dict, dict]:
    """{task: digest of everything but the model that its numbers depend on}, {task: why it cannot be measured}."""
    settings = stage.describe(experiment.eval)
    digests = dict.fromkeys(TEXTS, digest(settings, TEXTS))
    missing = {}
    for task, published in PUBLISHED.items():
        if published.file in read:
            digests[task] = read[published.file]
        else:
            missing[task] = f"no {data.sources.raw() / published.file}.*; get it with: python -m eval.download {task}"
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
    """Keeps the results and texts of earlier runs with the same model, tokenizer and data."""
    earlier = stage.read_json(directory / "results.json") or {}
    written = stage.read_json(directory / "generations.json") or {}
    for task, entry in earlier.get(name, {}).items():
        same_data = entry.get("data") == digests.get(task, entry.get("data"))
        if same_data and entry | identity == entry:
            results[name][task] = entry
            if task in written.get(name, {}):
                texts[name][task] = written[name][task]


def prepare(task: str, experiment: Experiment, trained: dict[str, Path], spm: Tokenizer) -> Callable:
    """Reads a task's data. Returns a function that measures a model: it returns numbers, and "texts" if it writes."""
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
        counts = sft.data.load(directory, spm.sha256)
        train = sft.data.Rows(directory, "train", counts, context=0)  # their texts are read one by one, not in rows
        held_out = sft.data.Rows(directory, "val", counts, context=0)
        template = stage.read_manifest(directory)["config"]["sft_data"]["template"]
        return partial(generation.answers, train=train, held_out=held_out, template=template)
    # The reference is the model that DPO started or would start from.
    pairs = dpo.data.PairRows(directory, "val", dpo.data.load(directory, spm.sha256))
    *_, final = trained.values()
    config = checkpoint.read_manifest(final)["config"]
    if "dpo" in config:
        base = checkpoint.base(final)
        beta = config["loss"]["beta"]
    else:
        base = trained.get("sft", final)
        beta = experiment.dpo.loss.beta
    pieces = unseen(base, experiment.sft.data.template, spm, experiment.imported is not None)
    model = Base(base, experiment.model, pieces).load().to(machine.pick_device())
    reference = dpo.reference.of_pairs(model.eval(), pairs, "reference")
    return partial(preference, pairs=pairs, reference=reference, beta=beta)


def save(directory: Path, results: dict, texts: dict) -> None:
    """Writes results.json and generations.json, the tasks in their order."""
    for name, content in (("generations", texts), ("results", results)):
        ordered = {}
        for owner, entries in content.items():
            ordered[owner] = {task: entries[task] for task in METRICS if task in entries}
        stage.write_json(directory / f"{name}.json", ordered)
