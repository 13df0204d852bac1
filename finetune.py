"""The parts that supervised fine-tuning (SFT) and preference learning (DPO) share: both train a trained model."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import checkpoint
import lora
import machine
import parallel
import stage
from cli import UserError
from data.batches import Mixture, Phase, Shuffled
from data.sources import Records
from lora import LoRAConfig
from model import ModelConfig, Transformer
from stage import Stage
from tokenizer import Tokenizer
from trainer import FREE as FREE_IN_TRAINING
from trainer import Task, TrainConfig, plan_steps, run

FREE = FREE_IN_TRAINING | {"base", "reference"}  # config fields that may change when a run is resumed
TEXT = "pretraining"  # in the weights of a mixture for SFT: the packed text
ALL = {"": 1}  # the weights of a mixture of one set: "", all sources together


def check_weights(weights: Mapping[str, float], sources: Iterable[Records], text: bool = False) -> None:
    """ValueError if weights are not positive or do not fit the sources. Empty is allowed. text: so is TEXT."""
    names = {source.name for source in sources}
    if TEXT in names:
        raise ValueError(f"a source has the name {TEXT}, which in weights means the packed text; expected another name")
    if weights:
        Phase(start=0, weights=weights)  # raises the error
    known = names | ({TEXT} if text else set())
    if unknown := set(weights) - known:
        raise ValueError(f"weights names {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    if weights and names.isdisjoint(weights):
        raise ValueError(f"weights names only {TEXT}, the packed text; expected a source of conversations beside it")


@dataclass(frozen=True)
class Base:
    """The trained model that a run starts from."""

    checkpoint: Path  # its checkpoint directory
    shape: ModelConfig  # the shape that the experiment's config gives it
    unseen: dict[str, int] | None  # the template's control pieces that it has never seen, for `lora.init_end_piece`
    packed: Path | None = None  # the directory of the experiment's packed text

    def load(self) -> Transformer:
        """The model in its state before training. UserError if its shape is not the config's."""
        model = checkpoint.load_model(self.checkpoint, shape=self.shape)
        if self.unseen:
            lora.init_end_piece(model, **self.unseen)
        return model


def job(
    name: str, config, settings: dict, base: Base, data: Path, spm: Tokenizer, directory: Path, command: str, code: str
) -> Stage:
    """The stage `name`, which trains the base. settings: more values to record. data: the directory of the data."""
    settings |= {"model": base.shape, name: config.train, "lora": config.lora, "begin": base.unseen}
    # A relative path if both are in runs/, so that runs/ can be moved.
    start, final = base.checkpoint.resolve(), (directory / "final").resolve()
    settings["base"] = os.path.relpath(start, final) if start.is_relative_to(stage.runs().resolve()) else str(start)
    # Digests of everything that is read: if one changes, the stage is out of date.
    read = stage.outputs(data) | {f"tokenizer/{spm.file}": spm.sha256} | stage.outputs(base.checkpoint)
    if TEXT in config.weights:
        read |= stage.outputs(base.packed)
    return Stage(directory, settings, read, command, code, free=FREE)


def adapt(model: Transformer, adapter: LoRAConfig | None) -> Transformer:
    """Adds a new adapter to the model, if the config has one. Returns the model."""
    if adapter:
        lora.attach(model, adapter)
    return model


class Tuning(Task):
    """The shared part of the tasks of SFT and DPO. A subclass adds `loss`, `targets`, `evaluate` and `flops`."""

    noun = "row"  # what a batch consists of

    def __init__(self, config: TrainConfig, sets: Mapping[str, Shuffled], weights: Mapping[str, float]):
        """sets: the training rows by source, or all under ""."""
        for name, rows in sets.items():
            if not rows.count:  # rows.holds: "conversations" or "pairs"
                raise UserError(f"weights names {name}, but no training {rows.holds} of this source are left")
        self.config, self.sets = config, sets
        # An epoch draws as many rows of examples as there are; its rows of text come on top.
        self.text_share = weights.get(TEXT, 0) / sum(weights.values())
        count = sum(rows.count for name, rows in sets.items() if name != TEXT)
        self.steps, self.epoch = plan_steps(config, round(count / (1 - self.text_share)), self.noun)
        self.mixture = Mixture(sets, [Phase(start=0, weights=weights)], config.batch_size)

    def batch(self, step: int, rank: int, ranks: int) -> tuple[Tensor, ...]:
        return self.mixture.batch(step, rank, ranks)

    def seen(self, step: int) -> dict[str, int]:
        """Tokens drawn from each source before a step; empty if the config has no weights."""
        if "" in self.sets:
            return {}
        return {name: round(rows * self.sets[name].length) for name, rows in self.mixture.seen(step).items()}

    def documents(self, step: int) -> str:
        return "; ".join(self.mixture.documents(step))


def tune(job: Stage, base: Base, task: Tuning, adapter: LoRAConfig | None, force: bool, resume: str) -> None:
    """Trains the base, or an adapter on it, in a stage's directory."""

    def make() -> Transformer:
        with torch.device("meta"):
            machine.must_fit(adapt(Transformer(base.shape), adapter), task.config, parallel.ranks())
        return adapt(base.load(), adapter)

    run(job, make, task, task.config, force, resume)


def step_flops(
    shape: ModelConfig, adapter: LoRAConfig | None, in_blocks: float, in_head: float, keys: float, plain: bool = False
) -> float:
    """FLOPs of a training step, counted from the layers as in PaLM (arXiv:2204.02311)."""
    # in_blocks, in_head: tokens that pass the blocks and the output projection. keys: pairs of a query and a key.
    # plain: with one more forward pass, of the model without its adapter.
    # A weight costs 2 FLOPs forward, 2 for the gradient of its input, and 2 for its own gradient unless it is frozen.
    with torch.device("meta"):  # no memory, no random draws
        model = Transformer(shape)
        blocks = sum(layer.weight.numel() for layer in model.blocks.modules() if isinstance(layer, nn.Linear))
        head = model.head.weight.numel()
        adapt(model, adapter)
    weights = 2 * in_blocks * blocks + 2 * in_head * head
    attention = 4 * keys * shape.n_layers * shape.d_model
    total = (1 + plain) * (weights + attention) + 2 * attention
    if adapter is None:
        return total + 2 * weights
    total += weights + 6 * in_blocks * machine.numbers(model.blocks.parameters())
    if isinstance(model.head, lora.LoRAHead):  # the loss computes the gradient of W + B A as a whole
        total += 2 * in_head * head
    return total
