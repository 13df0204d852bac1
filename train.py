"""Pretraining: the model learns to predict the next token.

    python train.py configs/tiny.py                                 ->  runs/tiny/pretrain
    torchrun --nproc_per_node=8 train.py configs/base.py            the same on eight GPUs

Makes the corpus, the tokenizer and the packed tokens if they are missing. The loop itself is in trainer.py.
"""

import argparse
import math

import torch
from torch import Tensor, nn

import checkpoint
import cli
import configs
import data.pack
import machine
import parallel
import stage
from cli import log
from configs import Experiment
from data.batches import Mixture, Windows, mixture
from data.pack import Packed
from data.stages import make_inputs
from model import ModelConfig, Transformer
from stage import Stage, Step
from trainer import FREE, Task, TrainConfig, run, shared_rows


def pretraining(config: TrainConfig, model: ModelConfig, batches: Mixture, validation: Packed, mixed: bool) -> Task:
    """The task of predicting the next token. batches: of training windows. mixed: log how much each set has given."""
    length = model.context_length
    rows = machine.rows_held(config, parallel.ranks())
    held_out = Windows(validation, length)

    def loss(model: nn.Module, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
        # non_blocking: the CPU does not wait for the copy, and prepares the next operations meanwhile.
        device = next(model.parameters()).device
        tokens = tokens.to(device, non_blocking=True)  # (B, T)
        targets = targets.to(device, non_blocking=True)  # (B, T), shifted by one position: see data/batches.py
        return {"loss": model(tokens, targets)}

    def count_targets(tokens: Tensor, targets: Tensor) -> int:
        return targets.numel()  # every position is trained

    # Every evaluation reads the same rows, so that its numbers can be compared. They are spread over the whole set,
    # because neighbours may come from one document.
    count = min(config.eval_rows, held_out.count)
    chosen = [i * held_out.count // count for i in range(count)]

    def evaluate(model: nn.Module) -> dict[str, float]:
        loss = mean_loss(model, held_out, chosen, rows)
        # A loss per token depends on the tokenizer: with longer pieces there are fewer to guess, and each is harder.
        # Bits per byte can be compared across tokenizers.
        tokens_per_byte = len(validation.tokens) / validation.bytes
        return {
            "val_loss": loss,  # nats per token
            "val_perplexity": math.exp(loss) if loss < 700 else math.inf,  # exp(710) is more than a float can hold
            "val_bits_per_byte": loss * (tokens_per_byte / math.log(2)),
        }

    def seen(step: int) -> dict[str, int]:
        return {name: windows * length for name, windows in batches.seen(step).items()} if mixed else {}

    epoch = sum(windows.count for windows in batches.sets.values()) / config.batch_size  # steps
    return Task(
        batch=batches.batch,
        loss=loss,
        targets=count_targets,
        evaluate=evaluate,
        steps=config.steps or max(1, round(config.epochs * epoch)),
        epoch=epoch,
        flops=config.batch_size * length * model.flops_per_token(length),  # for the MFU
        seen=seen,
        documents=lambda step: "; ".join(batches.documents(step)),
    )


def mean_loss(model: nn.Module, held_out: Windows, chosen: list[int], rows: int) -> float:
    """The mean loss over chosen windows, in nats per token; the same in every process. rows: at a time."""
    device = next(model.parameters()).device
    # In float64: thousands of float32 losses, added one by one, would lose digits.
    total = torch.zeros((), dtype=torch.float64, device=device)
    for windows, counts in shared_rows(chosen, rows):
        tokens, targets = held_out.read(windows)
        mean = model(tokens.to(device), targets.to(device))
        total += mean.double() * (len(windows) * counts)  # the last rows may be fewer: weigh them by their number
    return float(parallel.add_up(total)) / len(chosen)


def train(job: Stage, experiment: Experiment, tokenizer_sha256: str, force: bool, resume: str) -> None:
    """Trains the experiment's model on its packed tokens, unless that is done."""
    config, shape = experiment.pretrain, experiment.model
    packed = data.pack.load(experiment.directory("pack"), tokenizer_sha256)
    others = {}
    for other in experiment.beside:
        others[other.name] = data.pack.load(other.directory("pack"), tokenizer_sha256)["train"]
    # Without phases, a mixture is all of the experiment's own tokens.
    phases, length = experiment.mixture, shape.context_length
    batches = mixture(experiment.name, phases, packed["train"], others, length, config.batch_size, config.seed)
    task = pretraining(config, shape, batches, packed["val"], mixed=bool(phases))

    def make() -> Transformer:
        # On the device "meta" a model has shapes but no memory: a model that cannot fit is refused in a second.
        with torch.device("meta"):
            machine.must_fit(Transformer(shape), config, parallel.ranks())
        model = Transformer(shape)  # random weights, drawn after run() has set the seed
        if experiment.imported:  # a model from Hugging Face: see convert.py
            checkpoint.load_weights(experiment.imported, model)
            log.info(f"training continues from the weights in {experiment.imported}")
        return model

    run(job, make, task, config, force, resume)


def pretrain(experiment: Experiment, force: bool, resume: str) -> Step:
    experiment = experiment.owner("pretrain")
    spm = experiment.load_tokenizer()
    settings = {"model": experiment.model, "pretrain": experiment.pretrain}
    if experiment.mixture:
        settings["mixture"] = experiment.mixture
    # Weights mean nothing without their tokenizer, so its digest is an input like the tokens themselves.
    read = {f"{experiment.owner('tokenizer').name}/tokenizer/spm.model": spm.sha256}
    # `beside`: other experiments whose packed tokens a mixture draws from.
    packed = {owner.name: owner.directory("pack") for owner in (experiment, *experiment.beside)}
    for directory in packed.values():
        read |= stage.outputs(directory)
    if experiment.imported:
        read |= stage.outputs(experiment.imported)
    command = experiment.command("pretrain")
    job = Stage(experiment.directory("pretrain"), settings, read, command, __file__, free=FREE)
    return Step(job, lambda: train(job, experiment, spm.sha256, force, resume))


def main(arguments: argparse.Namespace) -> None:
    experiment = configs.load(arguments.config).owner("pretrain")
    with parallel.joined(experiment.pretrain.timeout):
        # The first process makes missing inputs; the others wait, however long it takes.
        parallel.lead(lambda: make_inputs("pretrain", experiment, arguments.workers, set()), timeout=parallel.DAY)
        pretrain(experiment, arguments.force, arguments.resume).make()
        log.info(f"next: {experiment.command('sft')}")


if __name__ == "__main__":
    p = cli.parser(__doc__)
    cli.add_training_switches(p)
    cli.run(main, p.parse_args())
