"""What supervised fine-tuning (SFT) and preference learning (DPO) share: both train a trained model further."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import checkpoint
import lora
import machine
import parallel
import stage
from cli import UserError, log
from data.batches import Mixture, Phase, Shuffled
from data.sources import Records
from lora import LoRAConfig
from model import ModelConfig, Transformer
from stage import Stage
from trainer import FREE as FREE_IN_TRAINING
from trainer import Task, TrainConfig, run

FREE = FREE_IN_TRAINING | {"base", "reference"}  # config fields that may change when a run is resumed
ALL = {"": 1}  # the weights of a mixture of one set: "", all sources together


def check_weights(weights: Mapping[str, float], sources: Iterable[Records]) -> None:
    """ValueError for weights that are not positive numbers, or not of these sources. Empty is allowed."""
    if not weights:
        return
    Phase(start=0, weights=weights)  # raises the error
    unknown = set(weights) - {source.name for source in sources}
    if unknown:
        raise ValueError(f"weights names {', '.join(sorted(unknown))}; expected names of the data's sources")


# ------------------------------------------------------------------------------------------------------ the base model


@dataclass(frozen=True)
class Base:
    """The trained model that a run starts from."""

    checkpoint: Path
    """Its checkpoint directory."""
    shape: ModelConfig
    """The shape that the experiment's config gives it."""
    unseen: dict[str, int] | None
    """Control pieces of the template that the model has never seen, for `lora.init_end_piece`."""

    def load(self) -> Transformer:
        """The model as training starts with it. UserError if its shape is not the config's."""
        model = checkpoint.load_model(self.checkpoint)
        if replace(model.config, kernels=self.shape.kernels) != self.shape:
            raise UserError(f"{self.checkpoint} holds a model of another shape than the config describes")
        if self.unseen:
            lora.init_end_piece(model, **self.unseen)
        return model

    def settings(self, name: str, config: TrainConfig, adapter: LoRAConfig | None, directory: Path) -> dict:
        """What the manifest of a stage called `name` records about how it trains this base."""
        return {
            "model": self.shape,
            name: config,
            "lora": adapter,
            "begin": self.unseen,
            "base": relative(self.checkpoint, directory / "final"),  # all checkpoints of a stage are siblings
        }


def relative(base: Path, checkpoint: Path) -> str:
    """The path of a base as a checkpoint records it: relative if both are in runs/ and move together, else absolute."""
    base, checkpoint = base.resolve(), checkpoint.resolve()
    return os.path.relpath(base, checkpoint) if base.is_relative_to(stage.runs().resolve()) else str(base)


def adapt(model: Transformer, adapter: LoRAConfig | None) -> Transformer:
    """The model, with a new adapter if the config asks for one."""
    if adapter:
        lora.attach(model, adapter)
    return model


# ------------------------------------------------------------------------------------------------------------ the task


class Tuning:
    """The `Task` of SFT and DPO without what differs: a subclass adds `loss`, `targets`, `evaluate` and `flops`."""

    tokens = None
    row = None

    def __init__(self, config: TrainConfig, sets: Mapping[str, Shuffled], weights: Mapping[str, float], noun: str):
        """sets: the training rows by source, or all under "". noun: what a row is called."""
        empty = [name for name, rows in sets.items() if not rows.count]
        if empty:
            holds = sets[empty[0]].holds  # "conversations" or "pairs"
            raise UserError(f"weights names {', '.join(empty)}, but no training {holds} are left of it")
        self.config, self.sets = config, sets
        self.mixture = Mixture(sets, [Phase(start=0, weights=weights)], config.batch_size)
        count = sum(rows.count for rows in sets.values())
        self.epoch = count / config.batch_size  # steps
        if count < config.batch_size:
            log.warning(
                f"a batch has {config.batch_size} {noun}s, but the training data has only {count}: each step sees all "
                "of them, some twice; lower batch_size"
            )

    def task(self) -> Task:
        """What the training loop needs."""
        return Task(
            batch=self.batch,
            loss=self.loss,
            targets=self.targets,
            evaluate=self.evaluate,
            steps=self.config.steps or max(1, round(self.config.epochs * self.epoch)),
            epoch=self.epoch,
            flops=self.flops(),
            tokens=self.tokens,
            row=self.row,
            seen=self.seen,
            documents=self.documents,
        )

    def batch(self, step: int, rank: int, ranks: int) -> tuple[Tensor, ...]:
        return self.mixture.batch(step, rank, ranks)

    def seen(self, step: int) -> dict[str, int]:
        """Tokens drawn from each source before a step; empty if the config has no weights."""
        if "" in self.sets:
            return {}
        return {name: round(rows * self.sets[name].length) for name, rows in self.mixture.seen(step).items()}

    def documents(self, step: int) -> str:
        return "; ".join(self.mixture.documents(step))


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def tune(
    job: Stage, base: Base, task: Task, config: TrainConfig, adapter: LoRAConfig | None, force: bool, resume: str
) -> None:
    """Trains the base, or an adapter on it, in a stage's directory."""

    def make() -> Transformer:
        with torch.device("meta"):
            machine.must_fit(adapt(Transformer(base.shape), adapter), config, parallel.ranks())
        return adapt(base.load(), adapter)

    run(job, make, task, config, force, resume)


# ------------------------------------------------------------------------------------------------------ counting FLOPs


class Sizes(NamedTuple):
    """How many weights a token is multiplied with in a forward pass."""

    blocks: int
    head: int
    adapter: int

    def trained(self, in_blocks: float, in_head: float) -> float:
        """FLOPs of a training step in which so many tokens pass the blocks, and so many the output projection.

        A weight costs 2 FLOPs forward, 2 for the gradient of its input, and 2 for its own gradient unless it is frozen.
        """
        frozen = self.adapter > 0
        plain = in_blocks * self.blocks + in_head * self.head
        return (4 if frozen else 6) * plain + 6 * self.adapter * in_blocks


def sizes(shape: ModelConfig, adapter: LoRAConfig | None) -> Sizes:
    """Counted from the layers, so that a changed architecture counts right."""
    with torch.device("meta"):  # no memory, no random draws
        model = Transformer(shape)
        blocks = sum(layer.weight.numel() for layer in model.blocks.modules() if isinstance(layer, nn.Linear))
        adapt(model, adapter)
    added = machine.numbers(p for p in model.parameters() if p.requires_grad) if adapter else 0
    return Sizes(blocks, model.head.weight.numel(), added)
