"""Pretraining: the model learns to predict the next token.

    python train.py configs/tiny.py                                 ->  runs/tiny/pretrain
    torchrun --nproc_per_node=8 train.py configs/base.py            on eight GPUs

Makes the corpus, the tokenizer and the packed tokens if they are missing. The loop itself is in trainer.py.
Next: python serve.py configs/tiny.py generate "The", or fine-tune it: python pipeline.py configs/tiny.py sft
"""

import math
import runpy
from pathlib import Path

if __name__ == "__main__":  # python train.py CONFIG is python pipeline.py CONFIG pretrain
    runpy.run_path(str(Path(__file__).with_name("pipeline.py")), {"TRAINING": True}, run_name="__main__")

import torch
from torch import Tensor, nn

import checkpoint
import data.pack
import machine
import parallel
import stage
from cli import log
from configs import Experiment
from data.batches import Mixture, Windows, mixture
from data.pack import Packed
from metrics import show_samples
from model import ModelConfig, Transformer
from stage import Stage
from tokenizer import Tokenizer
from trainer import FREE, Task, TrainConfig, plan_steps, run


def pretraining(
    config: TrainConfig, model: ModelConfig, batches: Mixture, validation: Packed, mixed: bool, spm: Tokenizer | None
) -> Task:
    """The task of predicting the next token. batches: training windows. mixed: log each set's tokens."""
    # spm: each evaluation shows how the model continues two held-out documents; None: it shows no text.
    length = model.context_length
    held_out = Windows(validation, length)

    def loss(model: nn.Module, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
        device = next(model.parameters()).device
        tokens = tokens.to(device, non_blocking=True)  # (B, T); the CPU does not wait for the copy
        targets = targets.to(device, non_blocking=True)  # (B, T), already shifted by `Windows.read`
        return {"loss": model(tokens, targets)}

    # All evaluations read the same rows, so that losses compare. Rows are far apart: neighbours may share a document.
    count = min(config.eval_rows, held_out.count)
    chosen = [i * held_out.count // count for i in range(count)]

    def evaluate(model: nn.Module, rows: int) -> dict[str, float]:
        if spm:
            show_continuations(model, validation, spm, config.parallel)
        loss = mean_loss(model, held_out, chosen, rows)
        # A loss per token depends on the tokenizer: long pieces are fewer, but harder to guess.
        # Bits per byte can be compared across tokenizers.
        tokens_per_byte = len(validation.tokens) / validation.bytes
        return {
            "val_loss": loss,  # nats per token
            "val_perplexity": math.exp(loss) if loss < 700 else math.inf,  # exp(710) is more than a float can hold
            "val_bits_per_byte": loss * (tokens_per_byte / math.log(2)),
        }

    def seen(step: int) -> dict[str, int]:
        return {name: windows * length for name, windows in batches.seen(step).items()} if mixed else {}

    steps, epoch = plan_steps(config, sum(windows.count for windows in batches.sets.values()), "row")
    return Task(
        batch=batches.batch,
        loss=loss,
        targets=lambda tokens, targets: targets.numel(),  # every position is trained
        evaluate=evaluate,
        steps=steps,
        epoch=epoch,
        flops=config.batch_size * length * model.flops_per_token(length),  # for the MFU
        seen=seen,
        documents=lambda step: "; ".join(batches.documents(step)),
    )


def show_continuations(model: nn.Module, held_out: Packed, spm: Tokenizer, mode: str) -> None:
    """Logs how the model continues 12 tokens from the starts of two held-out documents. mode: TrainConfig.parallel."""
    begun = []
    for start in held_out.starts[:: max(1, len(held_out.starts) // 2)][:2].tolist():
        ids = held_out.tokens[start : start + 12].tolist()
        begun.append((spm.decode(ids), [*spm.opening, *ids]))
    options = {"max_new_tokens": 30, "temperature": 0.8, "seed": 0, "stop": (spm.eos,)}
    show_samples(model, mode, begun, spm.decode, ("text:  ", "model: "), **options)


def mean_loss(model: nn.Module, held_out: Windows, chosen: list[int], rows: int) -> float:
    """The mean loss of the chosen windows, nats per token, over all processes. rows: read at once."""
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64)  # a float32 sum of thousands would lose digits
    for windows, counts in parallel.shared_rows(chosen, rows):
        tokens, targets = held_out.read(windows)
        mean = model(tokens.to(device), targets.to(device))
        total += mean.cpu().double() * (len(windows) * counts)  # weight by rows: the last share may have fewer
    return float(parallel.add_up(total)) / len(chosen)


def train(job: Stage, experiment: Experiment, force: bool, resume: str) -> None:
    """Trains the experiment's model on its packed tokens, unless it is trained already."""
    config, shape, spm = experiment.pretrain, experiment.model, experiment.load_tokenizer()
    packed = data.pack.load(experiment.directory("pack"), spm.sha256)
    others = {}
    for other in experiment.beside:
        others[other.name] = data.pack.load(other.directory("pack"), spm.sha256)["train"]
    phases, length = experiment.mixture, shape.context_length  # no phases: all of the experiment's own tokens
    batches = mixture(experiment.name, phases, packed["train"], others, length, config.batch_size, config.seed)
    task = pretraining(config, shape, batches, packed["val"], bool(phases), spm)

    def make() -> Transformer:
        with torch.device("meta"):  # takes no memory, so a model that does not fit is refused at once
            machine.must_fit(Transformer(shape), config, parallel.ranks())
        if experiment.imported:  # a model from Hugging Face: see convert.py
            log.info(f"training continues from the weights in {experiment.imported}")
            return checkpoint.load_model(experiment.imported, shape=shape)
        return Transformer(shape)  # random weights, drawn after run() has set the seed

    run(job, make, task, config, force, resume)


def job(experiment: Experiment, directory: Path, command: str) -> Stage:
    """The stage that pretrains the experiment's model. command: what the user types."""
    settings = {"model": experiment.model, "pretrain": experiment.pretrain}
    if experiment.mixture:
        settings["mixture"] = experiment.mixture
    # Weights need their tokenizer, so the tokenizer's digest is an input too.
    spm = experiment.load_tokenizer()
    read = {f"{experiment.owner('tokenizer').name}/tokenizer/{spm.file}": spm.sha256}
    for owner in (experiment, *experiment.beside):
        read |= stage.outputs(owner.directory("pack"))
    if experiment.imported:
        read |= stage.outputs(experiment.imported)
    return Stage(directory, settings, read, command, __file__, free=FREE)
