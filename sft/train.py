"""Supervised fine-tuning: a pretrained model learns to answer.

    python pipeline.py configs/tiny.py sft   ->  runs/tiny/sft

The loop is that of trainer.py. Trained is an adapter (LoRA) over the frozen model, or, with lora=None, the model itself;
the loss is of what the assistant says. Rows hold many conversations, none of which sees another.
"""

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
from cli import UserError, log
from data.batches import Mixture, Phase
from finetune import Base, adapt
from lora import LoRAConfig
from model import ModelConfig, Transformer
from sft.data import IGNORED, ConversationConfig, Rows
from sft.templates import shown
from stage import Stage, check_types
from tokenizer import Tokenizer
from trainer import Task, TrainConfig

SAMPLES, SAMPLE_TOKENS = 2, 48  # answers shown at each evaluation, and their length


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """How a model is fine-tuned. Raises TypeError or ValueError, naming the field, for what cannot be."""

    data: ConversationConfig = ConversationConfig()
    lora: LoRAConfig | None = LoRAConfig()
    """The adapter that is trained; None trains every weight of the model."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Of the sources of `data` that rows are drawn from, in any unit; empty: every row once an epoch."""
    train: TrainConfig = TrainConfig(
        epochs=3,
        batch_size=32,
        micro_batch_size=4,
        learning_rate=1e-3,
        warmup_fraction=0.1,
        weight_decay=0.0,
        eval_every=50,
        save_every=50,
    )
    """A row of a batch is a row of packed conversations."""

    def __post_init__(self):
        check_types(self)
        if self.weights:
            Phase(start=0, weights=self.weights)
            if unknown := set(self.weights) - {source.name for source in self.data.sources}:
                raise ValueError(f"weights names {', '.join(sorted(unknown))}; expected names of the data's sources")


def fine_tuning(sft_config: SFTConfig, shape: ModelConfig, directory: Path, counts: dict, spm: Tokenizer) -> Task:
    """The task of learning the conversations in a finished directory of sft.data, whose manifest has these counts."""
    config, length = sft_config.train, shape.context_length
    weights = dict(sft_config.weights) or {"": 1}  # "": all sources together
    sets = {name: Rows(directory, "train", counts, length, config.seed, name) for name in weights}
    if empty := [name for name, rows in sets.items() if not rows.count]:
        raise UserError(f"weights names {', '.join(empty)}, of which no training conversation is left")
    mixture = Mixture(sets, [Phase(start=0, weights=weights)], config.batch_size)
    held_out = Rows(directory, "val", counts, length)
    count = min(config.eval_rows, held_out.count)
    chosen = [i * held_out.count // count for i in range(count)]
    total = int((held_out.read(chosen)[1] != IGNORED).sum())
    rank, ranks = parallel.rank(), parallel.ranks()
    rows = machine.rows_held(config, ranks)

    def batch(step: int, rank: int, ranks: int) -> tuple[Tensor, ...]:
        size = config.batch_size // ranks
        samples = torch.arange(size) + step * config.batch_size + rank * size
        return *mixture.batch(step, rank, ranks), samples

    def loss(
        model: nn.Module, tokens: Tensor, targets: Tensor, positions: Tensor, samples: Tensor
    ) -> dict[str, Tensor]:
        # What dropout draws depends on the first row of a micro-batch, not on what was drawn before: a resumed run, and
        # one of several processes, draws the same wherever its micro-batches are the same.
        torch.manual_seed(((config.seed << 32) + int(samples[0])) % 2**63)
        device = next(model.parameters()).device
        return {"loss": model(tokens.to(device, non_blocking=True), targets, positions=positions)}

    def evaluate(model: nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        nats = torch.zeros((), dtype=torch.float64, device=device)
        for i in range(0, count, rows * ranks):
            own = chosen[i + rank * rows : min(count, i + (rank + 1) * rows)]
            # Sharded models are called by all processes together, those with no row left among them.
            tokens, targets, positions = held_out.read(own or chosen[:1])
            mean = model(tokens.to(device), targets, positions=positions)
            nats += mean.double() * int((targets != IGNORED).sum()) * bool(own)
        mean = float(parallel.add_up(nats)) / total
        if rank == 0 and (ranks == 1 or config.parallel == "ddp"):
            show_samples(model, held_out, spm)
        return {"val_loss": mean, "val_perplexity": math.exp(mean) if mean < 700 else math.inf}

    if sum(rows.count for rows in sets.values()) < config.batch_size:
        log.warning(
            f"a batch of {config.batch_size} rows is more than there are ({counts['train']['rows']}): each step sees "
            "all of them, some twice; lower batch_size"
        )
    epoch, first = sum(rows.count for rows in sets.values()) / config.batch_size, next(iter(sets.values()))
    return Task(
        batch=batch,
        loss=loss,
        targets=lambda tokens, targets, positions, samples: int((targets != IGNORED).sum()),
        evaluate=evaluate,
        steps=config.steps or max(1, round(config.epochs * epoch)),
        epoch=epoch,
        flops=config.batch_size * length * flops_per_token(shape, sft_config.lora, first),
        seen=lambda step: (
            {name: n * length for name, n in mixture.seen(step).items()} if weights.get("") is None else {}
        ),
        documents=lambda step: "; ".join(mixture.documents(step)),
    )


def flops_per_token(model: ModelConfig, adapter: LoRAConfig | None, rows: Rows) -> float:
    """Of a training step, as `ModelConfig.flops_per_token` counts them, but: logits are made where a token is trained,
    attention reaches as far as a conversation does, and a frozen matrix has no gradient of its own (4, not 6)."""
    lengths, trained = np.diff(rows.starts) - 1.0, rows.trained.mean()
    head = model.vocab_size * model.d_model
    blocks = model.flops_per_token(0) / 6 - head
    attention = 12 * model.n_layers * model.d_model * np.square(lengths).sum() / lengths.sum()
    with torch.device("meta"):
        adapted = adapt(Transformer(model), adapter)
    extra = machine.numbers(p for p in adapted.parameters() if p.requires_grad) if adapter else 0
    return (4 if adapter else 6) * (blocks + trained * head) + attention + 6 * extra


def show_samples(model: Transformer, held_out: Rows, spm: Tokenizer) -> None:
    """Logs how the model answers the same few held-out questions."""
    count, stop = len(held_out.starts) - 1, (spm.eos, *spm.control.values())
    with torch.autocast(model.embed.weight.device.type, enabled=False):
        for number in range(0, count, max(1, count // SAMPLES))[:SAMPLES]:
            ids, trained = held_out.conversation(number)
            first = int(trained.argmax())
            new = generate.generate(model, ids[:first].tolist(), SAMPLE_TOKENS, temperature=0, stop=stop)
            question, answer = (" ".join(shown(part, spm).split()) for part in (ids[1:first].tolist(), new))
            log.info(f"asked: {question[-200:]}\nsaid:  {answer}")


def job(config: SFTConfig, base: Base, rows: Path, spm: Tokenizer, directory: Path, command: str) -> Stage:
    """The stage that fine-tunes the base on the rows in a directory. command: what the user types."""
    settings = {"weights": dict(config.weights), "template": config.data.template}
    settings |= base.settings("sft", config.train, config.lora, directory)
    read = stage.outputs(rows) | {"tokenizer/spm.model": spm.sha256} | stage.outputs(base.checkpoint)
    return Stage(directory, settings, read, command, __file__, free=finetune.FREE)


def train(
    job: Stage, config: SFTConfig, base: Base, rows: Path, spm: Tokenizer, force: bool = False, resume: str = "auto"
) -> None:
    """Fine-tunes the base, unless that is done."""
    checkpoint.must_match(base.checkpoint, spm.sha256)
    task = fine_tuning(config, base.shape, rows, sft.data.load(rows, spm.sha256), spm)
    finetune.tune(job, base, task, config.train, config.lora, force, resume)
