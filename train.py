"""Pretraining: next-token prediction on packed tokens.

    python train.py configs/tiny.py                                 ->  runs/tiny/pretrain
    torchrun --nproc_per_node=8 train.py configs/base.py            the same on eight GPUs

Makes the corpus, the tokenizer and the packed tokens if they are missing.
"""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor, nn

import checkpoint
import cli
import configs
import data.corpus
import data.pack
import machine
import parallel
import stage
import tokenizer.train as train_tokenizer
from cli import log
from configs import Experiment
from data.batches import Mixture, Windows, mixture
from data.pack import Packed
from model import ModelConfig, Transformer
from stage import Stage, Step
from trainer import FREE, Task, TrainConfig, run, shared_rows


def pretraining(config: TrainConfig, model: ModelConfig, batches: Mixture, validation: Packed, mixed: bool) -> Task:
    """The task of predicting the next token. batches: of training windows. mixed: log what each set has given."""
    length = model.context_length
    held_out = Windows(validation, length)
    count = min(config.eval_rows, held_out.count)
    chosen = [i * held_out.count // count for i in range(count)]
    rows = machine.rows_held(config, parallel.ranks())
    bits = len(validation.tokens) / validation.bytes / math.log(2)  # turns nats per token into bits per byte

    def loss(model: nn.Module, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
        device = next(model.parameters()).device
        return {"loss": model(tokens.to(device, non_blocking=True), targets.to(device, non_blocking=True))}

    def evaluate(model: nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        total = torch.zeros((), dtype=torch.float64, device=device)
        for windows, counts in shared_rows(chosen, rows):
            tokens, targets = held_out.read(windows)
            total += model(tokens.to(device), targets.to(device)).double() * (len(windows) * counts)
        loss = float(parallel.add_up(total)) / count
        return {
            "val_loss": loss,
            "val_perplexity": math.exp(loss) if loss < 700 else math.inf,
            "val_bits_per_byte": loss * bits,
        }

    epoch = sum(windows.count for windows in batches.sets.values()) / config.batch_size
    return Task(
        batch=batches.batch,
        loss=loss,
        targets=lambda tokens, targets: targets.numel(),
        evaluate=evaluate,
        steps=config.steps or max(1, round(config.epochs * epoch)),
        epoch=epoch,
        flops=config.batch_size * length * model.flops_per_token(length),
        seen=lambda step: {name: n * length for name, n in batches.seen(step).items()} if mixed else {},
        documents=lambda step: "; ".join(batches.documents(step)),
    )


# ----------------------------------------------------------------------------------------- the stages, as the pipeline
# makes them: what identifies the stage, and the function that makes it


def corpus(experiment: Experiment, workers: int, force: bool) -> Step:
    experiment = experiment.owner("corpus")
    config = experiment.corpus
    job = data.corpus.job(config, experiment.directory("corpus"), experiment.command("corpus"))
    return Step(job, lambda: data.corpus.build(job, config, workers, force))


def tokenizer(experiment: Experiment, workers: int, force: bool) -> Step:
    experiment = experiment.owner("tokenizer")
    config, val_fraction, corpus = experiment.tokenizer, experiment.pack.val_fraction, experiment.directory("corpus")
    directory, command = experiment.directory("tokenizer"), experiment.command("tokenizer")
    job = train_tokenizer.job(config, corpus, val_fraction, directory, command)
    if experiment.imported:  # the tokenizer came with the model
        return Step(job, experiment.load_tokenizer)
    return Step(job, lambda: train_tokenizer.build(job, config, corpus, val_fraction, force))


def pack(experiment: Experiment, workers: int, force: bool) -> Step:
    experiment = experiment.owner("pack")
    config, corpus, spm = experiment.pack, experiment.directory("corpus"), experiment.directory("tokenizer")
    job = data.pack.job(config, corpus, spm, experiment.directory("pack"), experiment.command("pack"))
    return Step(job, lambda: data.pack.build(job, config, corpus, spm, workers, force))


def pretrain(experiment: Experiment, force: bool, resume: str) -> Step:
    experiment = experiment.owner("pretrain")
    packed = {other.name: other.directory("pack") for other in (experiment, *experiment.beside)}
    spm = experiment.load_tokenizer()
    read = {f"{experiment.owner('tokenizer').name}/tokenizer/spm.model": spm.sha256}
    for directory in packed.values():
        read |= stage.outputs(directory)
    if experiment.imported:
        read |= stage.outputs(experiment.imported)
    settings = {"model": experiment.model, "pretrain": experiment.pretrain}
    if experiment.mixture:
        settings["mixture"] = experiment.mixture
    command = experiment.command("pretrain")
    job = Stage(experiment.directory("pretrain"), settings, read, command, __file__, free=FREE)
    return Step(job, lambda: train(job, experiment, spm.sha256, force, resume))


DATA = {"corpus": corpus, "tokenizer": tokenizer, "pack": pack}


def make_inputs(name: str, experiment: Experiment, workers: int, made: set[Path]) -> None:
    """Makes what a stage reads, and first what that is made from, if missing. made: directories already seen to."""
    for owner, needed in experiment.inputs(name):
        directory = owner.directory(needed)
        if directory not in made:
            made.add(directory)
            make_inputs(needed, owner, workers, made)
            DATA[needed](owner, workers, force=False).make()


def train(job: Stage, experiment: Experiment, tokenizer_sha256: str, force: bool, resume: str) -> None:
    """Trains the experiment's model on its packed tokens, unless that is done."""
    config, shape = experiment.pretrain, experiment.model
    packed = data.pack.load(experiment.directory("pack"), tokenizer_sha256)
    others = {}
    for other in experiment.beside:
        others[other.name] = data.pack.load(other.directory("pack"), tokenizer_sha256)["train"]
    phases, length = experiment.mixture, shape.context_length
    batches = mixture(experiment.name, phases, packed["train"], others, length, config.batch_size, config.seed)
    task = pretraining(config, shape, batches, packed["val"], mixed=bool(phases))

    def make() -> Transformer:
        with torch.device("meta"):
            machine.must_fit(Transformer(shape), config, parallel.ranks())
        model = Transformer(shape)
        if experiment.imported:
            checkpoint.load_weights(experiment.imported, model)
            log.info(f"training continues from the weights in {experiment.imported}")
        return model

    run(job, make, task, config, force, resume)


def main(arguments: argparse.Namespace) -> None:
    experiment = configs.load(arguments.config).owner("pretrain")
    with parallel.joined(experiment.pretrain.timeout):
        # The first process makes what is missing, however long that takes. The others wait.
        parallel.lead(lambda: make_inputs("pretrain", experiment, arguments.workers, set()), timeout=parallel.DAY)
        pretrain(experiment, arguments.force, arguments.resume).make()


if __name__ == "__main__":
    p = cli.parser(__doc__)
    cli.add_training_switches(p)
    cli.run(main, p.parse_args())
