"""Supervised fine-tuning (SFT): a pretrained model learns to answer."""

#     python pipeline.py configs/tiny.py sft   ->  runs/tiny/sft
#
# The loop is trainer.py's, as in pretraining. This file says what is different: what is trained (an adapter over the
# frozen model, or with lora=None every weight), on which tokens (those that the assistant says), and how it is
# measured.

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import checkpoint
import finetune
import generate
import machine
import parallel
import sft.data
import stage
from cli import log
from finetune import Base, Tuning, check_weights, device_of
from lora import LoRAConfig
from model import ModelConfig, Transformer
from sft.data import IGNORED, ConversationConfig, Rows
from sft.templates import shown
from stage import Stage, check_types
from tokenizer import Tokenizer
from trainer import TrainConfig, shared_rows

SAMPLES, SAMPLE_TOKENS = 2, 48  # answers that each evaluation logs, and their length


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """How a model is fine-tuned. Raises TypeError or ValueError, with the field's name, for an impossible value."""

    data: ConversationConfig = ConversationConfig()
    lora: LoRAConfig | None = LoRAConfig()
    """The adapter that is trained. None trains every weight of the model."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """How often each source of `data` is drawn from, in any unit. Empty: every row once an epoch."""
    train: TrainConfig = TrainConfig(
        epochs=3,
        batch_size=32,
        micro_batch_size=4,
        # An adapter takes about ten times the learning rate of full fine-tuning. With lora=None try 1e-4.
        learning_rate=1e-3,
        warmup_fraction=0.1,
        weight_decay=0.0,
        eval_every=50,
        save_every=50,
    )
    """A row of a batch is a row of packed conversations."""

    def __post_init__(self):
        check_types(self)
        check_weights(self.weights, self.data.sources)


class FineTuning(Tuning):
    """The task of learning the conversations in a finished directory of sft.data; counts: from its manifest."""

    def __init__(self, config: SFTConfig, shape: ModelConfig, directory: Path, counts: dict, spm: Tokenizer):
        self.adapter, self.shape, self.spm = config.lora, shape, spm
        weights = dict(config.weights) or finetune.ALL
        length, seed = shape.context_length, config.train.seed
        sets = {name: Rows(directory, "train", counts, length, seed, name) for name in weights}
        super().__init__(config.train, sets, weights, "row")
        self.held_out = Rows(directory, "val", counts, length)
        # Evenly spaced, so that every source of the held-out rows is measured, and the same rows at each evaluation.
        count = min(config.train.eval_rows, self.held_out.count)
        self.chosen = [i * self.held_out.count // count for i in range(count)]
        self.measured = int((self.held_out.read(self.chosen)[1] != IGNORED).sum())  # tokens

    def batch(self, step: int, rank: int, ranks: int) -> tuple[Tensor, ...]:
        """Inputs, targets and positions, (rows, T) int64 each, and the number of each row counted over all steps."""
        # A row packs several conversations, so that nothing is computed for padding. Three things keep them apart:
        # - positions count from 0 in each. The model takes a restart as a new text, which sees none of the others.
        # - targets are already shifted by one inside each conversation (`Rows.read`). To shift again would train the
        #   model to skip a token; the loss would fall all the same, and the answers would be nonsense.
        # - targets are IGNORED except where the assistant speaks. Else the model would learn to ask, too.
        size = self.config.batch_size // ranks
        numbers = torch.arange(size) + step * self.config.batch_size + rank * size  # (rows,)
        return *self.mixture.batch(step, rank, ranks), numbers

    def loss(
        self, model: nn.Module, tokens: Tensor, targets: Tensor, positions: Tensor, numbers: Tensor
    ) -> dict[str, Tensor]:
        # LoRA's dropout draws random numbers. Seed them by the first row of the micro-batch: a resumed run then draws
        # the same as one that was never interrupted, and so does one of several processes.
        torch.manual_seed(((self.config.seed << 32) + int(numbers[0])) % 2**63)
        # Targets and positions stay on the CPU: there the model can see, without waiting for a GPU, which rows need
        # logits and where conversations begin.
        tokens = tokens.to(device_of(model), non_blocking=True)
        return {"loss": model(tokens, targets, positions=positions)}

    def targets(self, tokens: Tensor, targets: Tensor, positions: Tensor, numbers: Tensor) -> int:
        # Micro-batches are weighed by their trained tokens, not by their rows: a long answer counts for more tokens.
        return int((targets != IGNORED).sum())

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        device, ranks = device_of(model), parallel.ranks()
        # Sums in float64, divided once at the end: the mean over tokens does not depend on how rows are grouped.
        nats = torch.zeros((), dtype=torch.float64, device=device)
        for rows, counts in shared_rows(self.chosen, machine.rows_held(self.config, ranks)):
            tokens, targets, positions = self.held_out.read(rows)
            mean = model(tokens.to(device), targets, positions=positions)
            nats += mean.double() * int((targets != IGNORED).sum()) * counts
        mean = float(parallel.add_up(nats)) / self.measured
        # FSDP shards the weights: there one process cannot generate alone.
        if parallel.rank() == 0 and (ranks == 1 or self.config.parallel == "ddp"):
            show_samples(model, self.held_out, self.spm)
        return {"val_loss": mean, "val_perplexity": math.exp(mean) if mean < 700 else math.inf}

    def flops(self) -> float:
        """Of a training step: as PaLM counts them (arXiv:2204.02311), but only for what is really computed."""
        rows = next(iter(self.sets.values()))
        # Logits are made only where a token is trained.
        trained = rows.trained.mean()
        per_token = finetune.sizes(self.shape, self.adapter).trained(1, trained)
        # Attention reaches back to the beginning of a conversation, not of the row.
        lengths = np.diff(rows.starts) - 1.0
        reach = np.square(lengths).sum() / lengths.sum()
        per_token += 12 * self.shape.n_layers * self.shape.d_model * reach
        return self.config.batch_size * self.shape.context_length * per_token


def show_samples(model: Transformer, held_out: Rows, spm: Tokenizer) -> None:
    """Logs how the model answers the same few held-out questions: numbers alone do not show a model that babbles."""
    count = len(held_out.starts) - 1
    # Any control piece ends the sample. A model that has not learnt to stop would else run on.
    stop = (spm.eos, *spm.control.values())
    with torch.autocast(device_of(model).type, enabled=False):
        for number in range(0, count, max(1, count // SAMPLES))[:SAMPLES]:
            ids, trained = held_out.conversation(number)
            first = int(trained.argmax())  # where the first answer begins
            new = generate.generate(model, ids[:first].tolist(), SAMPLE_TOKENS, temperature=0, stop=stop)
            question = " ".join(shown(ids[1:first].tolist(), spm).split())
            answer = " ".join(shown(new, spm).split())
            log.info(f"asked: {question[-200:]}\nsaid:  {answer}")


def job(config: SFTConfig, base: Base, rows: Path, spm: Tokenizer, directory: Path, command: str) -> Stage:
    """The stage that fine-tunes the base on the rows in a directory. command: what the user types."""
    settings = {"weights": dict(config.weights), "template": config.data.template}
    settings |= base.settings("sft", config.train, config.lora, directory)
    # Digests of everything that is read: when one changes, the stage is out of date and says so.
    read = stage.outputs(rows) | {"tokenizer/spm.model": spm.sha256} | stage.outputs(base.checkpoint)
    return Stage(directory, settings, read, command, __file__, free=finetune.FREE)


def train(
    job: Stage, config: SFTConfig, base: Base, rows: Path, spm: Tokenizer, force: bool = False, resume: str = "auto"
) -> None:
    """Fine-tunes the base, unless that is done."""
    checkpoint.must_match(base.checkpoint, spm.sha256)
    counts = sft.data.load(rows, spm.sha256)
    task = FineTuning(config, base.shape, rows, counts, spm).task()
    finetune.tune(job, base, task, config.train, config.lora, force, resume)
