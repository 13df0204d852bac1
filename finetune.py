"""Training a trained model further: what supervised fine-tuning and preference learning share."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import checkpoint
import lora
import machine
import parallel
import stage
from cli import UserError
from lora import LoRAConfig
from model import ModelConfig, Transformer
from stage import Stage
from trainer import FREE as FREE_IN_TRAINING
from trainer import Task, TrainConfig, run

FREE = FREE_IN_TRAINING | {"base", "reference"}  # config fields that may change without making another result


@dataclass(frozen=True)
class Base:
    """The trained model that a run starts from."""

    checkpoint: Path
    """Its checkpoint directory."""
    shape: ModelConfig
    """The shape that the experiment's config gives it."""
    unseen: dict[str, int] | None
    """Control pieces of the template that it has never seen: see `lora.init_end_piece`."""

    def load(self) -> Transformer:
        """The model as training starts with it. UserError if it does not have the config's shape."""
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
            "base": relative(self.checkpoint, directory / "final"),  # as seen from every checkpoint beside it
        }


def relative(base: Path, checkpoint: Path) -> str:
    """The path of a base as a checkpoint records it: relative if both are in runs/ and move together, else absolute."""
    base, checkpoint = base.resolve(), checkpoint.resolve()
    return os.path.relpath(base, checkpoint) if base.is_relative_to(stage.runs().resolve()) else str(base)


def adapt(model: Transformer, adapter: LoRAConfig | None) -> Transformer:
    """The model with a new adapter, if there is to be one."""
    if adapter:
        lora.attach(model, adapter)
    return model


def tune(
    job: Stage, base: Base, task: Task, config: TrainConfig, adapter: LoRAConfig | None, force: bool, resume: str
) -> None:
    """Trains the base, or an adapter on it, in a stage's directory."""

    def make() -> Transformer:
        with torch.device("meta"):
            machine.must_fit(adapt(Transformer(base.shape), adapter), config, parallel.ranks())
        return adapt(base.load(), adapter)

    run(job, make, task, config, force, resume)
