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
import os
import shlex
from collections.abc import Callable
from pathlib import Path

import checkpoint
import cli
import configs
import data.stages
import dpo.data
import dpo.reference
import dpo.train
import eval.evaluate
import eval.report
import finetune
import machine
import parallel
import sft.data
import sft.train
import stage
import train
from cli import UserError
from configs import Experiment
from finetune import Base
from sft.templates import unseen
from stage import Step
from tokenizer import Tokenizer


def corpus(experiment: Experiment, arguments: argparse.Namespace) -> Step:
    return data.stages.corpus(experiment, arguments.workers, arguments.force)


def tokenizer(experiment: Experiment, arguments: argparse.Namespace) -> Step:
    return data.stages.tokenizer(experiment, arguments.workers, arguments.force, arguments.replaced)


def pack(experiment: Experiment, arguments: argparse.Namespace) -> Step:
    return data.stages.pack(experiment, arguments.workers, arguments.force)


def pretrain(experiment: Experiment, arguments: argparse.Namespace) -> Step:
    return train.pretrain(experiment, arguments.force, arguments.resume)


def sft_data(experiment: Experiment, arguments: argparse.Namespace) -> Step:
    config, context, spm = experiment.sft.data, experiment.model.context_length, experiment.directory("tokenizer")
    job = sft.data.job(config, context, spm, experiment.directory("sft_data"), experiment.command("sft_data"))
    return Step(job, lambda: sft.data.build(job, config, context, spm, arguments.workers, arguments.force))


def sft_(experiment: Experiment, arguments: argparse.Namespace) -> Step:
    experiment = experiment.owner("sft")
    config, rows = experiment.sft, experiment.directory("sft_data")
    base, spm = base_model("sft", experiment, arguments)
    job = sft.train.job(config, base, rows, spm, experiment.directory("sft"), command(experiment, "sft", arguments))
    return Step(job, lambda: sft.train.train(job, config, base, rows, spm, arguments.force, arguments.resume))


def dpo_data(experiment: Experiment, arguments: argparse.Namespace) -> Step:
    config, template, context = experiment.dpo.data, experiment.sft.data.template, experiment.model.context_length
    spm, directory = experiment.directory("tokenizer"), experiment.directory("dpo_data")
    job = dpo.data.job(config, template, context, spm, directory, experiment.command("dpo_data"))
    return Step(job, lambda: dpo.data.build(job, config, template, context, spm, arguments.workers, arguments.force))


def dpo_reference(experiment: Experiment, arguments: argparse.Namespace) -> Step:
    base, spm = base_model("dpo_reference", experiment, arguments)
    pairs, directory = experiment.directory("dpo_data"), experiment.directory("dpo_reference")
    dtype = machine.training_dtype(machine.pick_device(), experiment.dpo.train)
    job = dpo.reference.job(base, pairs, dtype, directory, command(experiment, "dpo_reference", arguments))
    return Step(job, lambda: dpo.reference.build(job, base, pairs, dtype, spm, arguments.force))


def dpo_(experiment: Experiment, arguments: argparse.Namespace) -> Step:
    config, template = experiment.dpo, experiment.sft.data.template
    base, spm = base_model("dpo", experiment, arguments)
    pairs, reference = experiment.directory("dpo_data"), experiment.directory("dpo_reference")
    directory = experiment.directory("dpo")
    job = dpo.train.job(config, template, base, pairs, spm, directory, command(experiment, "dpo", arguments))
    inputs = config, template, base, pairs, reference, spm
    return Step(job, lambda: dpo.train.train(job, *inputs, arguments.force, arguments.resume))


def evaluate(experiment: Experiment, arguments: argparse.Namespace) -> Step:
    return eval.evaluate.step(experiment, arguments.checkpoint, arguments.data, arguments.force)


# A new stage also needs its directory and its inputs in configs/__init__.py: DIRECTORIES and INPUTS.
STAGES: dict[str, Callable[[Experiment, argparse.Namespace], Step]] = {
    "corpus": corpus,
    "tokenizer": tokenizer,
    "pack": pack,
    "pretrain": pretrain,
    "sft_data": sft_data,
    "sft": sft_,
    "dpo_data": dpo_data,
    "dpo_reference": dpo_reference,
    "dpo": dpo_,
    "eval": evaluate,
}
BASES = {"sft": "pretrain", "dpo_reference": "sft", "dpo": "sft"}  # whose trained model a stage starts from
NAMES = (*STAGES, "report")  # the report has no manifest: it is written anew each time


def base_checkpoint(name: str, experiment: Experiment, arguments: argparse.Namespace) -> Path:
    """The checkpoint that a stage starts from: --checkpoint, or the final one of the stage before."""
    if not arguments.checkpoint:
        return experiment.trained(BASES[name])
    checkpoint.digest(Path(arguments.checkpoint))  # UserError if it is none, before anything is made or removed
    return Path(arguments.checkpoint)


def base_model(name: str, experiment: Experiment, arguments: argparse.Namespace) -> tuple[Base, Tokenizer]:
    """The model that a stage starts from, and its tokenizer."""
    directory = base_checkpoint(name, experiment, arguments)
    spm = experiment.load_tokenizer(directory)
    pieces = unseen(directory, experiment.sft.data.template, spm, experiment.imported is not None)
    return Base(directory, experiment.model, pieces), spm


def command(experiment: Experiment, name: str, arguments: argparse.Namespace) -> str:
    """What the user types to make a stage, with the --checkpoint that was given."""
    given = f" --checkpoint {shlex.quote(arguments.checkpoint)}" if arguments.checkpoint else ""
    return experiment.command(name) + given


# -------------------------------------------------------------------------------------------------------------- making


def make(name: str, experiment: Experiment, arguments: argparse.Namespace, made: set, apart: bool = True) -> None:
    """Makes a stage, and before it the inputs that it lacks. made: directories that this command has seen to already.
    apart: each in a process of its own."""
    directory = experiment.directory(name) if name != "report" else None
    if directory in made:
        return
    made.add(directory)
    if name in BASES:  # before the minutes that making its data takes
        base = base_checkpoint(name, experiment, arguments)
        finetune.check_targets(experiment.model, experiment.sft.lora if name == "sft" else experiment.dpo.lora)
        if name == "dpo":
            dpo.train.must_be_taught(base, experiment.sft.data.template)
    for owner, needed in experiment.inputs(name, arguments.force):
        make(needed, owner, unforced(arguments), made, apart)

    def this_one() -> None:
        eval.report.write(experiment) if name == "report" else STAGES[name](experiment, arguments).make()

    cli.apart(this_one) if apart else this_one()


def main(arguments: argparse.Namespace) -> None:
    experiment = configs.load(arguments.config)
    stage.imported_code(__file__)  # notes the digests of the code that is running now, for every stage
    if unknown := [name for name in arguments.stages if name not in NAMES]:
        raise UserError(f"no stage {unknown[0]!r}; there are {', '.join(NAMES)}")
    if arguments.force and arguments.resume != "auto":
        raise UserError("--force discards what --resume would continue; use one of them")
    for switch, value, fits in (
        ("--checkpoint", arguments.checkpoint, (*BASES, "eval")),
        ("--resume", arguments.resume != "auto", configs.TRAINED),
    ):
        if value and (len(arguments.stages) != 1 or arguments.stages[0] not in fits):
            raise UserError(f"{switch} is about one stage; name one of {', '.join(fits)}")
    if arguments.status:
        print(status(experiment, arguments))
        return
    wanted = arguments.stages or NAMES
    if not arguments.stages and experiment.dpo.reference != "stored":
        wanted = [name for name in NAMES if name != "dpo_reference"]
    chosen = [name for name in NAMES if name in wanted]
    if "RANK" in os.environ:
        make_distributed(chosen, experiment, arguments)
        return
    first_forced = 0 if arguments.force else NAMES.index(arguments.force_from) if arguments.force_from else len(NAMES)
    forced = [name for name in chosen if NAMES.index(name) >= first_forced]
    arguments.replaced = [experiment.directory(name) for name in forced if name in STAGES]
    made: set[Path] = set()
    for name in chosen:
        arguments.force = name in forced
        make(name, experiment, arguments, made)


def unforced(arguments: argparse.Namespace) -> argparse.Namespace:
    """The switches for the inputs of a named stage: --force and --resume are about that stage alone."""
    return argparse.Namespace(**vars(arguments) | {"force": False, "resume": "auto"})


def make_distributed(chosen: list[str], experiment: Experiment, arguments: argparse.Namespace) -> None:
    """Makes one training stage on the processes that torchrun has started."""
    if len(chosen) != 1 or chosen[0] not in configs.TRAINED:
        raise UserError(f"torchrun makes one training stage at a time; name one of {', '.join(configs.TRAINED)}")
    name = chosen[0]
    config = experiment.pretrain if name == "pretrain" else getattr(experiment, name).train

    def make_inputs() -> None:
        made: set[Path] = set()
        for owner, needed in experiment.inputs(name):
            make(needed, owner, unforced(arguments), made, apart=False)

    with parallel.joined(config.timeout):
        parallel.lead(make_inputs, timeout=parallel.DAY)  # the other processes wait, however long it takes
        STAGES[name](experiment, arguments).make()


# -------------------------------------------------------------------------------------------------------------- status


def status(experiment: Experiment, arguments: argparse.Namespace) -> str:
    """A table: each stage done, stale (and why) or missing; its seconds; its main number."""
    rows = [("stage", "seconds", "result", "state")]
    for name, step in STAGES.items():
        directory = experiment.directory(name)
        result = ""
        if name == "dpo_reference" and experiment.dpo.reference != "stored":
            rows.append((name, "", "", "not needed"))
            continue
        try:
            state = step(experiment, arguments).job.state()
            result = main_number(name, directory)
        except UserError as error:  # what it starts from is missing, or its manifest is damaged
            state = f"missing: {error}"
        seconds = stage.read_seconds(directory.parent).get(directory.name)
        rows.append((name, f"{seconds:,.1f}" if seconds else "", result, state))
    wide = max(len(result) for _, _, result, _ in rows)
    return "\n".join(f"{name:13} {seconds:>9}  {result:{wide}}  {state}" for name, seconds, result, state in rows)


def main_number(name: str, directory: Path) -> str:
    """The main number of a finished stage, in words."""
    if (manifest := stage.read_manifest(directory)) is None:
        return ""
    counts = manifest["counts"]
    record = counts.get("record") or {}
    if name == "corpus":
        return f"{counts['documents']:,} documents"
    if name == "tokenizer" and "bytes_per_token" in counts:  # an imported one was not measured
        return f"{counts['bytes_per_token']:.2f} bytes per token"
    if name in ("pack", "sft_data"):
        return f"{counts['train']['tokens']:,} tokens"
    if name == "dpo_data":
        return f"{counts['train']['pairs']:,} pairs"
    if name == "pretrain":
        return f"{record['val_bits_per_byte']:.3f} bits per byte"
    if name == "sft":
        return f"validation loss {record['val_loss']:.3f}"
    if name == "dpo":
        return f"{record['val_accuracy']:.1%} of pairs won"
    return ""


def parser() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
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
