"""Trained models to numbers: `pipeline.py CONFIG eval` writes runs/NAME/eval/results.json and generations.json."""

# Every task whose data exists is measured on every stage that is trained, and saved at once: an interrupted run
# continues with the next task, and data and stages that come later are added.

import functools
import hashlib
import itertools
import json
import math
import os
import shlex
import time
from pathlib import Path

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
from eval.generation import continuations, prompts, smoke
from eval.language import Subject, validation
from eval.markdown import main_metric, show, with_error
from eval.preference import preference
from eval.prompts import TEXTS
from eval.summary import skipped
from eval.tasks import PUBLISHED, TASKS
from finetune import Base
from sft.data import Rows
from sft.templates import unseen
from stage import Stage, Step

READS = {"validation": "pack", "continuations": "pack", "answers": "sft_data", "preference": "dpo_data"}


class Tasks:
    """What can be measured on trained models. `missing` says why the other tasks cannot be."""

    def __init__(self, experiment: Experiment, trained: dict[str, Path]):
        self.experiment, self.trained, self.final = experiment, trained, list(trained.values())[-1]
        self.tokenizer = experiment.load_tokenizer(self.final)
        self.digests: dict[str, str] = {}  # of all that a task's numbers depend on, but for the model
        self.missing: dict[str, str] = {}
        self.loaded: dict[str, object] = {}  # data of published tasks
        settings = stage.describe(experiment.eval)
        for name, published in PUBLISHED.items():
            if path := published.find():
                self.digests[name] = stage.sha256(path)
            else:
                where = data.sources.raw() / published.file
                self.missing[name] = f"no {where}.*; get it with: python -m eval.download {name}"
        for name in ("smoke", "prompts", "everyday"):
            self.digests[name] = digest(settings, TEXTS)
        for name, source in READS.items():
            manifest = stage.read_manifest(experiment.directory(source))
            if manifest is None:
                self.missing[name] = f"no {source}; make it with: {experiment.command(source)}"
            elif self.tokenizer.sha256 not in manifest["read"].values():
                self.missing[name] = f"{source} was made with another tokenizer than this model's"
            elif name == "preference" and trained.keys() == {"pretrain"}:
                self.missing[name] = f"no fine-tuned model to compare with; train it with: {experiment.command('sft')}"
            else:
                self.digests[name] = digest(settings, manifest["wrote"])
        if "preference" in self.digests:  # the reference is one of the trained models
            self.digests["preference"] += digest([checkpoint.digest(final) for final in trained.values()])

    @functools.cached_property
    def packed(self) -> Packed:
        return data.pack.load(self.experiment.directory("pack"), self.tokenizer.sha256)["val"]

    @functools.cached_property
    def pairs(self) -> tuple[PairRows, torch.Tensor, float]:
        """The held-out pairs, log-probabilities of the model that DPO started or would start from, and DPO's beta."""
        experiment, config = self.experiment, checkpoint.read_manifest(self.final)["config"]
        directory = experiment.directory("dpo_data")
        rows = PairRows(directory, "val", dpo.data.load(directory, self.tokenizer.sha256))
        base, beta = self.trained.get("sft", self.final), experiment.dpo.loss.beta
        if "dpo" in config:
            base, beta = checkpoint.base(self.final), config["loss"]["beta"]
        pieces = unseen(base, experiment.sft.data.template, self.tokenizer, experiment.imported is not None)
        model = Base(base, experiment.model, pieces).load().to(machine.pick_device())
        return rows, of_pairs(model.eval(), rows, "reference"), beta

    def measure(self, task: str, subject: Subject) -> dict:
        """A task's numbers, with `texts` if the model writes any."""
        if task in PUBLISHED:
            return PUBLISHED[task].measure(subject, self.loaded[task], task)
        if task == "validation":
            return validation(subject, self.packed)
        if task == "continuations":
            return continuations(subject, self.packed)
        if task == "preference":
            return preference(subject, *self.pairs)
        if task == "answers":
            directory, context = self.experiment.directory("sft_data"), self.experiment.model.context_length
            counts = sft.data.load(directory, self.tokenizer.sha256)
            template = stage.read_manifest(directory)["config"]["sft_data"]["template"]
            train, held_out = (Rows(directory, split, counts, context) for split in SPLITS)
            return answers(subject, train, held_out, template)
        return smoke(subject) if task == "smoke" else prompts(subject, TEXTS[task])


def digest(*values) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


# ----------------------------------------------------------------------------------------------------------- the stage


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
    """Measures what has not been measured yet. read: digests of all that may be read."""
    tasks, identity = Tasks(experiment, trained), {}
    for name, final in trained.items():
        checkpoint.must_match(final, tasks.tokenizer.sha256)
        identity[name] = {"checkpoint": checkpoint.digest(final), "tokenizer": tasks.tokenizer.sha256}
    finished = job.is_finished(force)
    job.read |= read
    results, texts = left(job.directory, identity, tasks, force)
    possible = [task for task in TASKS if task in tasks.digests]
    waiting = {name: [task for task in possible if task not in results[name]] for name in trained}
    if line := skipped(results):
        log.info(line)
    if finished and not any(waiting.values()):
        job.log_up_to_date()
        return
    for task in set(itertools.chain(*waiting.values())) & PUBLISHED.keys():
        tasks.loaded[task] = PUBLISHED[task].load(PUBLISHED[task].find())  # damaged data stops before the long work
    with job.making(keep=not force):
        (job.directory / "manifest.json").unlink(missing_ok=True)  # a finished evaluation is added to
        job.earlier = sum(stage.read_seconds(job.directory).values())
        torch.set_float32_matmul_precision("highest")  # TF32, which training may use, would blur the comparison
        device = machine.pick_device()
        for name, final in trained.items():
            if not waiting[name]:
                continue
            log.info(f"{name}: {final}, step {checkpoint.read_manifest(final)['counts'].get('step', 'unknown')}")
            model = checkpoint.load_model(final, str(device))
            subject = Subject(model, tasks.tokenizer, checkpoint.template(final), experiment.eval)
            for task in waiting[name]:
                started = time.perf_counter()
                numbers = finite(tasks.measure(task, subject))
                seconds = time.perf_counter() - started
                if "texts" in numbers:
                    texts[name][task] = numbers.pop("texts")
                results[name][task] = numbers | identity[name] | {"data": tasks.digests[task]}
                save(job.directory, results, texts)
                stage.record_seconds(job.directory / f"{name}-{task}", seconds)
                log.info(f"{task}: {in_words(numbers, main_metric(task))}{seconds:.1f} s")
        save(job.directory, results, texts)
        measured = {name: sum("n" in entry for entry in entries.values()) for name, entries in results.items()}
        counts = {"measured": measured, "machine": machine.name(device), "command": job.command}
        job.finish(counts, [job.directory / "results.json", job.directory / "generations.json"])
        log.info(f"evaluated: {job.directory / 'results.json'}")


def left(directory: Path, identity: dict[str, dict], tasks: Tasks, force: bool) -> tuple[dict, dict]:
    """Results and texts of earlier runs, if model, tokenizer and data are the same; and why tasks are skipped."""
    results, texts = {}, {}
    before = {} if force else stage.read_json(directory / "results.json") or {}
    written = {} if force else stage.read_json(directory / "generations.json") or {}
    for name, digests in identity.items():
        results[name] = {task: {"skipped": why} for task, why in tasks.missing.items()}
        for task, entry in before.get(name, {}).items():
            # A result stands, too, if its data is gone.
            if entry | digests == entry and entry["data"] == tasks.digests.get(task, entry["data"]):
                results[name][task] = entry
        texts[name] = {task: text for task, text in written.get(name, {}).items() if "n" in results[name].get(task, {})}
    return results, texts


def save(directory: Path, results: dict, texts: dict) -> None:
    """Writes results.json and generations.json, the tasks in their order."""
    for name, content in (("generations", texts), ("results", results)):
        ordered = {}
        for owner, entries in content.items():
            ordered[owner] = {task: entries[task] for task in TASKS if task in entries}
        stage.write_json(directory / f"{name}.json", ordered)


def finite(numbers):
    """Numbers as JSON holds them, in nested tables too: null for a number that is not finite."""
    if isinstance(numbers, dict):
        return {key: finite(value) for key, value in numbers.items()}
    return None if isinstance(numbers, float) and not math.isfinite(numbers) else numbers


def in_words(numbers: dict, metric: str) -> str:
    """A task's main number for the log."""
    if metric not in numbers:
        return ""
    baseline = f" (baseline {show(numbers['baseline'])})" if "baseline" in numbers else ""
    return f"{metric.replace('_', ' ')} {with_error(numbers, metric, metric)}{baseline}, "
