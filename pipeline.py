"""Every stage of an experiment by name.

    python pipeline.py configs/demo.py                    every stage that is not done yet
    python pipeline.py configs/demo.py sft dpo            these stages, and the data they need
    python pipeline.py configs/demo.py --status           which stages are done, stale or missing
    torchrun --nproc_per_node=8 pipeline.py configs/base.py sft

Stages, in order: corpus tokenizer pack pretrain sft_data sft dpo_data dpo_reference dpo eval report.
Each stage runs in its own process, so that it gives the same bytes alone and after other stages. A stage makes missing
input that takes minutes. If the input takes hours (a trained model), the stage stops and names the command.
Next: python serve.py configs/demo.py chat, or read runs/demo/REPORT.md
"""

import argparse
import os
import shlex
import signal
from pathlib import Path

import cli

if __name__ == "__main__":
    cli.handle(signal.SIG_DFL)  # Ctrl-C ends the slow imports below without a traceback

import checkpoint
import configs
import data.corpus
import data.pack
import dpo.data
import dpo.reference
import dpo.train
import eval.evaluate
import eval.report
import eval.summary
import machine
import parallel
import sft.data
import sft.train
import stage
import tokenizer.train
import train
from cli import UserError, log
from configs import TRAINED, Experiment
from data.sources import FileRecords
from finetune import Base
from sft.templates import unseen
from stage import Step
from tokenizer import Tokenizer

NAMES = tuple(configs.INPUTS)
BASES = {"sft": "pretrain", "dpo_reference": "sft", "dpo": "sft"}  # stage: the stage whose model it starts from


def step(name: str, owner: Experiment, switches: argparse.Namespace) -> Step:
    """A stage, and the function that makes it. A new stage also needs its inputs in configs/__init__.py: INPUTS."""
    directory, length, template = owner.directory, owner.model.context_length, owner.sft.data.template
    again, command = directory(name) in switches.again, owner.command(name)
    how = {"workers": switches.workers, "force": again}
    if name in TRAINED:
        how = {"force": again, "resume": switches.resume}
    if name in BASES:
        base, spm, command = start(name, owner, switches)
    match name:
        case "corpus":
            module, inputs = data.corpus, [owner.corpus]
        case "tokenizer" if owner.imported:  # it came with the imported model
            return Step(stage.Stage(directory(name), {}, {}, command, __file__), owner.load_tokenizer)
        case "tokenizer":
            module, inputs = tokenizer.train, [owner.tokenizer, directory("corpus"), owner.pack.val_fraction]
            how = {"force": again, "replaced": switches.again}
        case "pack":
            module, inputs = data.pack, [owner.pack, directory("corpus"), directory("tokenizer")]
        case "pretrain":
            module, inputs = train, [owner]
        case "sft_data":
            module, inputs = sft.data, [owner.sft.data, length, directory("tokenizer")]
        case "sft":
            module, inputs = sft.train, [owner.sft, base, directory("sft_data"), spm]
        case "dpo_data":
            module, inputs = dpo.data, [owner.dpo.data, template, length, directory("tokenizer")]
        case "dpo_reference":
            dtype = machine.training_dtype(machine.pick_device(), owner.dpo.train)
            module, inputs, how = dpo.reference, [base, directory("dpo_data"), dtype], {"spm": spm, "force": again}
        case "dpo":
            module, inputs = dpo.train, [owner.dpo, template, base, directory("dpo_data"), spm]
            how["reference"] = directory("dpo_reference")
        case "eval":
            return eval.evaluate.step(owner, switches.checkpoint, again)
        case "report":
            return Step(None, lambda: eval.report.write(owner))  # it has no manifest, because it is written each time
    job, make = module.job(*inputs, directory(name), command), module.train if name in TRAINED else module.build
    return Step(job, lambda: make(job, *inputs, **how))


def start(name: str, experiment: Experiment, switches: argparse.Namespace) -> tuple[Base, Tokenizer, str]:
    """The model that a stage starts from, its tokenizer, and the command that the user types to make the stage."""
    given, template = switches.checkpoint, experiment.sft.data.template
    directory = Path(given) if given else experiment.trained(BASES[name])
    checkpoint.digest(directory)  # UserError if it is no checkpoint
    if name != "sft":
        dpo.train.must_be_taught(directory, template)
    spm = experiment.load_tokenizer(directory)
    pieces = unseen(directory, template, spm, experiment.imported is not None)
    base = Base(directory, experiment.model, pieces, experiment.directory("pack"))
    return base, spm, experiment.command(name) + (f" --checkpoint {shlex.quote(given)}" if given else "")


def make(chosen: list[str], experiment: Experiment, switches: argparse.Namespace, apart: bool = True) -> None:
    """Makes stages, and before them their missing inputs. apart: each stage in its own process."""
    # switches.again: the directories to make again. Others are kept if they are up to date.
    todo = {}
    for name in chosen:
        if name in BASES and BASES[name] not in chosen:
            start(name, experiment, switches)  # if its model is missing: UserError now, not after making data
        inputs = experiment.inputs(name, experiment.directory(name) in switches.again)
        for owner, needed in [*inputs, (experiment.owner(name), name)]:
            todo.setdefault(owner.directory(needed), (owner, needed))
    for directory, (owner, name) in todo.items():
        config = {"corpus": owner.corpus, "sft_data": owner.sft.data, "dpo_data": owner.dpo.data}.get(name)
        if config and (directory in switches.again or stage.read_manifest(directory) is None):
            for source in config.sources:
                if isinstance(source, FileRecords):
                    source.files()  # UserError if they are missing: now, not after hours of training
    kept = [directory for directory in todo if directory not in switches.again]
    stage.warn_of_changed_code(kept, stage.imported_code(__file__))
    *inputs, last = todo.values()

    def make_one(owner: Experiment, name: str) -> None:
        def write() -> None:
            step(name, owner, switches).make()

        cli.apart(write) if apart else write()

    # Under torchrun the other processes wait, however long it takes.
    parallel.lead(lambda: [make_one(*each) for each in inputs], timeout=parallel.DAY)
    make_one(*last)


def main(arguments: argparse.Namespace) -> None:
    check(arguments)
    experiment = configs.load(arguments.config)
    usual = [name for name in NAMES if name != "dpo_reference" or experiment.dpo.reference == "stored"]
    if arguments.status:
        print(status(experiment, arguments, usual[:-1]))
        return
    chosen = [name for name in NAMES if name in (arguments.stages or usual)]
    forced = chosen if arguments.force else []
    if arguments.force_from:
        names = NAMES[NAMES.index(arguments.force_from) : NAMES.index(chosen[-1]) + 1]
        if not names:
            raise UserError(f"--force-from {arguments.force_from} is later than {chosen[-1]}; name an earlier stage")
        forced = [name for name in names if name in usual]
        chosen = [name for name in NAMES if name in chosen or name in forced]
    stage.GOAL = chosen[-1] if arguments.stages else ""
    arguments.again = [experiment.directory(name) for name in forced if experiment.owner(name) is experiment]
    if others := [experiment.directory(name) for name in forced if experiment.owner(name) is not experiment]:
        kept = f"kept, because other experiments own them: {', '.join(map(str, others))}"
        log.warning(f"{kept}; make them again with: {stage.remaker(others[0])}")
    training = {"sft": experiment.sft.train, "dpo": experiment.dpo.train}.get(chosen[0], experiment.pretrain)
    with parallel.joined(training.timeout):  # joins the processes of torchrun, if it started this one
        make(chosen, experiment, arguments, apart="RANK" not in os.environ)
        if following := experiment.following(chosen[-1]):
            log.info(f"next: {following}")


def check(arguments: argparse.Namespace) -> None:
    """UserError for stages that do not exist, and for switches that do not fit together."""
    for name in arguments.stages:
        if name not in NAMES:
            raise UserError(f"no stage {name!r}; {cli.meant(name, NAMES)}")
    if arguments.checkpoint and not Path(arguments.checkpoint).is_dir():
        raise UserError(f"{arguments.checkpoint} is not a checkpoint: there is no such directory")
    rules = [("torchrun", "RANK" in os.environ, TRAINED), ("--resume", arguments.resume != "auto", TRAINED)]
    for switch, given, fits in [*rules, ("--checkpoint", arguments.checkpoint, (*BASES, "eval"))]:
        if given and (len(arguments.stages) != 1 or arguments.stages[0] not in fits):
            raise UserError(f"{switch} is about one stage; name one of {', '.join(fits)}")


def status(experiment: Experiment, switches: argparse.Namespace, names: list[str]) -> str:
    """A table: each stage done, stale (and why) or missing; its seconds; its main number."""
    rows, stale, run = [("stage", "seconds", "result", "state")], [], eval.summary.Run(experiment)
    for name in names:
        directory = experiment.directory(name)
        if stage.read_manifest(directory) is None:
            state = "unfinished" if any(directory.glob("[!.]*")) else "missing"
        else:
            try:
                state = step(name, experiment.owner(name), switches).job.state()
            except UserError as error:  # such as: the model that the stage starts from is missing
                state = f"stale: {error}"
        needs = [need for _, need in experiment.inputs(name)] + [BASES.get(name), *(TRAINED if name == "eval" else ())]
        if state.startswith("done"):
            state = next((f"stale: {need} is stale" for need in stale if need in needs), state)
        if state.startswith("stale"):
            stale.append(name)
        seconds = stage.read_seconds(directory.parent).get(directory.name)
        rows.append((name, "" if seconds is None else f"{seconds:,.1f}", run.result(name), state))
    return cli.table(rows, right=(1,))


def parser(training: bool = False) -> argparse.ArgumentParser:
    """The arguments. training: of train.py CONFIG, which is pipeline.py CONFIG pretrain."""
    p = cli.parser(train.__doc__ if training else __doc__)
    if training:
        p.prog = "train.py"
        p.set_defaults(stages=["pretrain"])
    else:
        p.add_argument("stages", nargs="*", default=[], metavar="STAGE", help="default: every stage")
    p.add_argument("--status", action="store_true", help="show which stages are done; make nothing")
    p.add_argument("--force", action="store_true", help="make the stages again; discard the old ones")
    names = NAMES[: NAMES.index("pretrain") + 1] if training else NAMES
    p.add_argument("--force-from", choices=names, metavar="STAGE", help="make this stage and the later ones again")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    p.add_argument("--workers", type=cli.positive, default=cores, metavar="N", help="processes; default: one per core")
    p.add_argument("--resume", default="auto", metavar="auto|DIR", help="the checkpoint to resume; default: the newest")
    given = "a trained model to start from (sft, dpo) or to measure (eval)"
    p.add_argument("--checkpoint", metavar="DIR", help=argparse.SUPPRESS if training else given)
    p.set_defaults(again=())
    return p


if __name__ == "__main__":
    training = "TRAINING" in globals()  # set by train.py
    cli.run(main, parser(training).parse_intermixed_args())  # stages may stand before and after switches
