"""Supervised fine-tuning (SFT): a pretrained model learns to answer."""

#     python pipeline.py configs/tiny.py sft   ->  runs/tiny/sft
# The loop is trainer.py's, as in pretraining. This file defines what is trained (an adapter, or with lora=None every
# weight), on which tokens (the assistant's), and how the model is measured.

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import checkpoint
import data.pack
import finetune
import parallel
import sft.data
from finetune import TEXT, Base, Tuning, check_weights
from lora import LoRAConfig
from metrics import show_samples
from model import IGNORED
from sft.data import ConversationConfig, Rows, TextRows
from sft.templates import shown
from stage import Stage, check_types
from tokenizer import Tokenizer
from trainer import TrainConfig

SAMPLES = 2  # answers that each evaluation logs


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """How a model is fine-tuned. Raises TypeError or ValueError, with the field's name, for an impossible value."""

    data: ConversationConfig = ConversationConfig()
    lora: LoRAConfig | None = LoRAConfig()  # the adapter that is trained; None trains every weight of the model
    # Each source's share of the rows; empty: all rows. With "pretraining", the packed text, the model forgets less.
    weights: Mapping[str, float] = field(default_factory=dict)
    train: TrainConfig = TrainConfig(  # a row of a batch is a row of packed conversations
        epochs=3,
        batch_size=32,
        micro_batch_size=4,
        learning_rate=1e-3,  # about ten times that of full fine-tuning: with lora=None try 1e-4
        warmup_fraction=0.1,
        weight_decay=0.0,
        eval_every=50,
        save_every=50,
    )

    def __post_init__(self):
        check_types(self)
        check_weights(self.weights, self.data.sources, text=True)


class FineTuning(Tuning):
    """Learns the conversations that sft.data wrote to a directory. counts: from the manifest there."""

    noun = "packed row"

    def __init__(self, config: SFTConfig, base: Base, directory: Path, counts: dict, spm: Tokenizer):
        self.spm, weights = spm, dict(config.weights) or finetune.ALL
        length, seed = base.shape.context_length, config.train.seed
        sets = {name: Rows(directory, "train", counts, length, seed, name) for name in weights if name != TEXT}
        rows = next(iter(sets.values()))
        if TEXT in weights:
            sets[TEXT] = TextRows(data.pack.load(base.packed, spm.sha256)["train"], length, seed)
        super().__init__(config.train, sets, weights)
        self.held_out = Rows(directory, "val", counts, length)
        # Evenly spaced over the whole set, and the same rows in each evaluation.
        count = min(config.train.eval_rows, self.held_out.count)
        self.chosen = [i * self.held_out.count // count for i in range(count)]
        self.measured = int((self.held_out.read(self.chosen)[1] != IGNORED).sum())  # tokens
        # Logits are made only for trained tokens, and attention stays within a conversation.
        tokens, lengths = config.train.batch_size * length, np.diff(rows.starts) - 1.0
        own = np.square(lengths).sum() / lengths.sum()  # keys of a token of a conversation
        text = self.text_share  # its rows are attended and trained whole
        in_head, keys = tokens * ((1 - text) * rows.trained.mean() + text), tokens * ((1 - text) * own + text * length)
        self.flops = finetune.step_flops(base.shape, config.lora, tokens, in_head, keys)

    def batch(self, step: int, rank: int, ranks: int) -> tuple[Tensor, ...]:
        """Inputs, targets and positions, (rows, T) int64 each, and each row's number in the whole run, (rows,)."""
        # A row packs several conversations, so that there is little padding to compute. Positions restart at 0 in each:
        # to the model this is a new text, which sees no other. `Rows.read` has already shifted the targets: do not
        # shift again. They are IGNORED except where the assistant speaks: the model learns to answer, not to ask.
        size = self.config.batch_size // ranks
        numbers = torch.arange(size) + step * self.config.batch_size + rank * size  # (rows,)
        return *self.mixture.batch(step, rank, ranks), numbers

    def loss(
        self, model: nn.Module, tokens: Tensor, targets: Tensor, positions: Tensor, numbers: Tensor
    ) -> dict[str, Tensor]:
        # LoRA's dropout is random. The seed depends on the micro-batch's first row, so a resumed run draws the same
        # numbers. Another number of processes does too, if it makes the same micro-batches.
        torch.manual_seed(((self.config.seed << 32) + int(numbers[0])) % 2**63)
        # Targets and positions stay on the CPU: the model reads them there without waiting for a GPU.
        tokens = tokens.to(model.embed.weight.device, non_blocking=True)
        return {"loss": model(tokens, targets, positions=positions)}

    def targets(self, tokens: Tensor, targets: Tensor, *rest: Tensor) -> int:
        return int((targets != IGNORED).sum())

    def evaluate(self, model: nn.Module, rows: int) -> dict[str, float]:
        device = model.embed.weight.device
        # One sum in float64, divided at the end: the grouping of the rows changes nothing.
        nats = torch.zeros((), dtype=torch.float64)
        for numbers, counts in parallel.shared_rows(self.chosen, rows):
            tokens, targets, positions = self.held_out.read(numbers)
            mean = model(tokens.to(device), targets, positions=positions)
            nats += mean.cpu().double() * int((targets != IGNORED).sum()) * counts
        mean = float(parallel.add_up(nats)) / self.measured
        # Any of these ids ends an answer: the model may not have learnt which one its template ends with.
        options = {"max_new_tokens": 48, "temperature": 0, "stop": (self.spm.eos, *self.spm.control.values())}
        questions, text, labels = self.questions(), partial(shown, tokenizer=self.spm), ("asked: ", "said:  ")
        show_samples(model, self.config.parallel, questions, text, labels, **options)
        return {"val_loss": mean, "val_perplexity": math.exp(mean) if mean < 700 else math.inf}

    def questions(self) -> list[tuple[str, list[int]]]:
        """The same few held-out questions in each evaluation: their text, and the ids up to the answer."""
        asked, count = [], len(self.held_out.starts) - 1
        for number in range(0, count, max(1, count // SAMPLES))[:SAMPLES]:
            ids, trained = self.held_out.conversation(number)
            first = int(trained.argmax())  # where the first answer begins
            asked.append((shown(ids[1:first].tolist(), self.spm), ids[:first].tolist()))
        return asked


def job(config: SFTConfig, base: Base, rows: Path, spm: Tokenizer, directory: Path, command: str) -> Stage:
    """The stage that fine-tunes the base on the rows in a directory. command: what the user types."""
    settings = {"weights": dict(config.weights), "template": config.data.template}
    return finetune.job("sft", config, settings, base, rows, spm, directory, command, __file__)


def train(
    job: Stage, config: SFTConfig, base: Base, rows: Path, spm: Tokenizer, force: bool = False, resume: str = "auto"
) -> None:
    """Fine-tunes the base, unless it is fine-tuned already."""
    checkpoint.must_match(base.checkpoint, spm.sha256)
    task = FineTuning(config, base, rows, sft.data.load(rows, spm.sha256), spm)
    finetune.tune(job, base, task, config.lora, force, resume)
