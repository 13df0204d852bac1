"""Every stage of an experiment by name.

    python pipeline.py configs/demo.py                    every stage that is not done yet
    python pipeline.py configs/demo.py sft dpo            these stages, and the data they need
    python pipeline.py configs/demo.py --status           which stages are done, stale or missing
    torchrun --nproc_per_node=8 pipeline.py configs/base.py sft

Stages, in order: corpus tokenizer pack pretrain sft_data sft dpo_data dpo_reference dpo eval report.
Each runs in a process of its own, so that it gives the same bytes alone and after others. A stage makes its input if
that takes minutes. If the input takes hours (a trained model), it stops and names the command.
"""

import argparse
import functools
import mmap
import operator
import os
import shlex
from collections.abc import Callable
from pathlib import Path

import cli  # before torch: its handler answers Ctrl-C while the rest is imported

# isort: split
import checkpoint
import configs
import data.stages
import dpo.data
import dpo.reference
import dpo.train
import eval.evaluate
import eval.report
import eval.summary
import finetune
import machine
import parallel
import sft.data
import sft.train
import stage
import train
from cli import UserError, log
from configs import TRAINED, Experiment
from finetune import Base
from sft.templates import unseen
from stage import Step
from tokenizer import Tokenizer


def sft_data(experiment: Experiment, switches: argparse.Namespace) -> Step:
    owner = experiment.owner("sft_data")
    inputs = owner.sft.data, owner.model.context_length, owner.directory("tokenizer")
    job = sft.data.job(*inputs, owner.directory("sft_data"), owner.command("sft_data"))
    return Step(job, lambda: sft.data.build(job, *inputs, switches.workers, switches.force))


def sft_(experiment: Experiment, switches: argparse.Namespace) -> Step:
    owner = experiment.owner("sft")
    base, spm = base_model("sft", owner, switches)
    inputs = owner.sft, base, owner.directory("sft_data"), spm
    job = sft.train.job(*inputs, owner.directory("sft"), command(owner, "sft", switches))
    return Step(job, lambda: sft.train.train(job, *inputs, switches.force, switches.resume))


def dpo_data(experiment: Experiment, switches: argparse.Namespace) -> Step:
    owner = experiment.owner("dpo_data")
    inputs = owner.dpo.data, owner.sft.data.template, owner.model.context_length, owner.directory("tokenizer")
    job = dpo.data.job(*inputs, owner.directory("dpo_data"), owner.command("dpo_data"))
    return Step(job, lambda: dpo.data.build(job, *inputs, switches.workers, switches.force))


def dpo_reference(experiment: Experiment, switches: argparse.Namespace) -> Step:
    base, spm = base_model("dpo_reference", experiment, switches)
    dtype = machine.training_dtype(machine.pick_device(), experiment.dpo.train)
    inputs = base, experiment.directory("dpo_data"), dtype
    directory = experiment.directory("dpo_reference")
    job = dpo.reference.job(*inputs, directory, command(experiment, "dpo_reference", switches))
    return Step(job, lambda: dpo.reference.build(job, *inputs, spm, switches.force))


def dpo_(experiment: Experiment, switches: argparse.Namespace) -> Step:
    config, template = experiment.dpo, experiment.sft.data.template
    base, spm = base_model("dpo", experiment, switches)
    pairs, reference = experiment.directory("dpo_data"), experiment.directory("dpo_reference")
    directory = experiment.directory("dpo")
    job = dpo.train.job(config, template, base, pairs, spm, directory, command(experiment, "dpo", switches))
    inputs = config, template, base, pairs, reference, spm
    return Step(job, lambda: dpo.train.train(job, *inputs, switches.force, switches.resume))


def evaluate(experiment: Experiment, switches: argparse.Namespace) -> Step:
    return eval.evaluate.step(experiment, switches.checkpoint, switches.data, switches.force)


# A new stage also needs its inputs in configs/__init__.py: INPUTS.
STAGES: dict[str, Callable[[Experiment, argparse.Namespace], Step]] = data.stages.STAGES | {
    "pretrain": train.pretrain,
    "sft_data": sft_data,
    "sft": sft_,
    "dpo_data": dpo_data,
    "dpo_reference": dpo_reference,
    "dpo": dpo_,
    "eval": evaluate,
}
BASES = {"sft": "pretrain", "dpo_reference": "sft", "dpo": "sft"}  # whose trained model a stage starts from
NAMES = (*STAGES, "report")  # the report has no manifest: it is written each time


def base_model(name: str, experiment: Experiment, switches: argparse.Namespace) -> tuple[Base, Tokenizer]:
    """The model that a stage starts from, and its tokenizer."""
    directory = base_checkpoint(name, experiment, switches)
    spm = experiment.load_tokenizer(directory)
    pieces = unseen(directory, experiment.sft.data.template, spm, experiment.imported is not None)
    return Base(directory, experiment.model, pieces), spm


def base_checkpoint(name: str, experiment: Experiment, switches: argparse.Namespace) -> Path:
    """The checkpoint that a stage starts from: --checkpoint, or the final one of the stage before."""
    if not switches.checkpoint:
        return experiment.trained(BASES[name])
    checkpoint.digest(Path(switches.checkpoint))  # UserError if it is none, before anything is made or removed
    return Path(switches.checkpoint)


def command(experiment: Experiment, name: str, switches: argparse.Namespace) -> str:
    """What the user types to make a stage, with the --checkpoint that was given."""
    given = f" --checkpoint {shlex.quote(switches.checkpoint)}" if switches.checkpoint else ""
    return experiment.command(name) + given


def make(name: str, experiment: Experiment, switches: argparse.Namespace, made: set, apart: bool = True) -> None:
    """Makes a stage, and before it the inputs that it lacks. apart: each in a process of its own."""
    # made: the directories that this command has made. --force and --resume are about the named stage, not its inputs.
    run = cli.apart if apart else operator.call
    if name in BASES:  # a missing model stops here, before the minutes that making the data takes
        base = base_checkpoint(name, experiment, switches)
        adapter = experiment.sft.lora if name == "sft" else experiment.dpo.lora
        # Not in this process: a process that has computed has threads, and what is forked from it then hangs.
        run(functools.partial(finetune.check_targets, experiment.model, adapter))
        if name == "dpo":
            dpo.train.must_be_taught(base, experiment.sft.data.template)

    def make_inputs() -> None:
        unforced = argparse.Namespace(**vars(switches) | {"force": False, "resume": "auto"})
        for owner, needed in experiment.inputs(name, switches.force):
            if owner.directory(needed) not in made:
                made.add(owner.directory(needed))
                run(functools.partial(make_one, needed, owner, unforced))

    parallel.lead(make_inputs, timeout=parallel.DAY)  # under torchrun the other processes wait, however long it takes
    if experiment.directory(name) not in made:
        made.add(experiment.directory(name))
        run(functools.partial(make_one, name, experiment, switches))


def make_one(name: str, experiment: Experiment, switches: argparse.Namespace) -> None:
    """Makes a stage whose inputs are there."""
    eval.report.write(experiment) if name == "report" else STAGES[name](experiment, switches).make()


def main(arguments: argparse.Namespace) -> None:
    check(arguments)
    experiment = configs.load(arguments.config)
    stage.imported_code(__file__)  # notes the digests of the code that is running now, for every stage
    stage.warned = mmap.mmap(-1, 1)
    if arguments.status:
        print(status(experiment, arguments))
        return
    default = [name for name in NAMES if name != "dpo_reference" or experiment.dpo.reference == "stored"]
    chosen = [name for name in NAMES if name in (arguments.stages or default)]
    first = NAMES[0] if arguments.force else arguments.force_from
    forced = [name for name in chosen if first and NAMES.index(name) >= NAMES.index(first)]
    arguments.replaced = [experiment.directory(name) for name in forced]
    training = {"sft": experiment.sft.train, "dpo": experiment.dpo.train}.get(chosen[0], experiment.pretrain)
    made: set[Path] = set()
    with parallel.joined(training.timeout):  # the processes that torchrun started, if it did
        for name in chosen:
            arguments.force = name in forced
            make(name, experiment, arguments, made, apart="RANK" not in os.environ)
        if following := [name for name in NAMES[NAMES.index(chosen[-1]) + 1 :] if "_" not in name]:
            talk = f", or talk with the model: python serve.py {experiment.path} chat" * (chosen[-1] in ("sft", "dpo"))
            log.info(f"next: {experiment.command(following[0])}{talk}")


def check(arguments: argparse.Namespace) -> None:
    """UserError for stages that do not exist, and for switches that do not fit together."""
    stages = arguments.stages
    if unknown := [name for name in stages if name not in NAMES]:
        raise UserError(f"no stage {unknown[0]!r}; there are {', '.join(NAMES)}")
    if arguments.force and arguments.resume != "auto":
        raise UserError("--force discards what --resume would continue; use one of them")
    rules = [("torchrun", "RANK" in os.environ, TRAINED), ("--resume", arguments.resume != "auto", TRAINED)]
    for switch, given, fits in [*rules, ("--checkpoint", arguments.checkpoint, (*BASES, "eval"))]:
        if given and (len(stages) != 1 or stages[0] not in fits):
            raise UserError(f"{switch} is about one stage; name one of {', '.join(fits)}")


def status(experiment: Experiment, arguments: argparse.Namespace) -> str:
    """A table: each stage done, stale (and why) or missing; its seconds; its main number."""
    rows, stale, run = [("stage", "seconds", "result", "state")], set(), eval.summary.Run(experiment)
    for name, step in STAGES.items():
        if name == "dpo_reference" and experiment.dpo.reference != "stored":
            continue
        directory = experiment.directory(name)
        if stage.read_manifest(directory) is None:
            state = "unfinished" if any(directory.glob("[!.]*")) else "missing"
        else:
            try:
                state = step(experiment, arguments).job.state()
            except UserError as error:  # the model that the stage starts from is missing
                state = f"stale: {error}"
        needs = [*configs.INPUTS[name], BASES.get(name), *(TRAINED if name == "eval" else ())]
        if stale.intersection(needs) and state.startswith("done"):
            state = f"stale: {next(need for need in needs if need in stale)} is stale"
        if state.startswith("stale"):
            stale.add(name)
        seconds = stage.read_seconds(directory.parent).get(directory.name)
        rows.append((name, f"{seconds:,.1f}" if seconds else "", run.result(name), state))
    return cli.table(rows, right=(1,))


def parser() -> argparse.ArgumentParser:
    p = cli.parser(__doc__, places=configs.places)
    p.add_argument("stages", nargs="*", metavar="STAGE", help="default: every stage")
    p.add_argument("--status", action="store_true", help="show what is done, and make nothing")
    cli.add_training_switches(p)
    p.add_argument("--force-from", choices=NAMES, metavar="STAGE", help="make this stage and all later ones again")
    p.add_argument("--checkpoint", metavar="DIR", help="for sft, dpo and eval: a trained model by path")
    p.add_argument("--data", metavar="DIR", help="for eval: where the tasks' files are, instead of DATA")
    p.set_defaults(replaced=())
    return p


if __name__ == "__main__":
    cli.run(main, parser().parse_intermixed_args())  # stages may stand before and after switches
