"""Direct preference optimisation: a fine-tuned model learns which of two answers is preferred.

    python pipeline.py configs/tiny.py dpo   ->  runs/tiny/dpo

The loop is that of train.py. Trained is an adapter (LoRA) over the fine-tuned model, or, with lora=None, the model
itself. The reference, from which it is not to stray, is that model as it was: with the adapter off, or by what it
thought of every pair, noted before.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import checkpoint
import dpo.data
import dpo.reference
import finetune
import lora
import machine
import parallel
import stage
from cli import UserError, log
from data.batches import Mixture, Phase
from dpo.data import PairConfig, PairRows
from dpo.loss import LossConfig, log_probs, preference_loss, rewards
from finetune import Base, adapt
from lora import LoRAConfig
from model import ModelConfig, Transformer
from stage import Stage, check_types
from tokenizer import Tokenizer
from trainer import Task, TrainConfig

MEASURED = 16  # held-out pairs on whose chosen answers the divergence from the reference is measured


@dataclass(frozen=True, kw_only=True)
class DPOConfig:
    """How preferences are learnt. Raises TypeError or ValueError, naming the field, for what cannot be."""

    data: PairConfig = PairConfig()
    loss: LossConfig = LossConfig()
    lora: LoRAConfig | None = LoRAConfig(dropout=0.0)
    """The adapter that is trained; None trains every weight of the model."""
    reference: str = "stored"
    """* Its log-probabilities: "stored", computed once before training, or of the model with its "adapter_off" at each
    step. They are the same, but for rounding: with "adapter_off" rewards are 0 before the first step, exactly if blocks
    are not compiled, and nothing is stored; "stored" takes a pass over all pairs, and is faster after it."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Of the sources of `data` that pairs are drawn from, in any unit; empty: every pair once an epoch."""
    train: TrainConfig = TrainConfig(
        epochs=1,
        batch_size=32,
        micro_batch_size=8,
        learning_rate=1e-4,
        warmup_fraction=0.1,
        schedule="linear",
        weight_decay=0.0,
        eval_every=50,
        eval_rows=256,
        save_every=50,
    )
    """A row of a batch is a pair."""

    def __post_init__(self):
        check_types(self)
        if self.reference not in ("stored", "adapter_off"):
            raise ValueError(f'reference is {self.reference!r}; expected "stored" or "adapter_off"')
        if self.lora is None and self.reference == "adapter_off":
            raise ValueError('reference is "adapter_off" and lora None; expected "stored" where there is no adapter')
        if self.lora and self.lora.dropout:
            raise ValueError(f"dropout of lora is {self.lora.dropout}; expected 0: the reference is read without any")
        if self.weights:
            Phase(start=0, weights=self.weights)
            if unknown := set(self.weights) - {source.name for source in self.data.sources}:
                raise ValueError(f"weights names {', '.join(sorted(unknown))}; expected names of the data's sources")


def preference_learning(
    dpo_config: DPOConfig, base: Base, directory: Path, counts: dict, stored: dict[str, Tensor] | None
) -> Task:
    """The task of learning the pairs in a finished directory of dpo.data, whose manifest has these counts. stored: the
    reference's log-probabilities, where the reference is `base`; None: its adapter is switched off for them."""
    config, shape = dpo_config.train, base.shape
    weights = dict(dpo_config.weights) or {"": 1}  # "": all sources together
    sets = {name: PairRows(directory, "train", counts, config.seed, name) for name in weights}
    if empty := [name for name, pairs in sets.items() if not pairs.count]:
        raise UserError(f"weights names {', '.join(empty)}, of which no training pair is left")
    mixture = Mixture(sets, [Phase(start=0, weights=weights)], config.batch_size)
    held_out = PairRows(directory, "val", counts)
    count = min(config.eval_rows, held_out.count)
    # Not evenly spaced: sources may have their kinds of pairs in turn.
    chosen = sorted(np.random.default_rng(0).permutation(held_out.count)[:count].tolist())
    rank, ranks = parallel.rank(), parallel.ranks()
    rows = machine.rows_held(config, ranks)

    def compared(model: nn.Module, split: str, ids: Tensor, bounds: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        """Of each pair the loss, and what is logged beside it."""
        if stored is None:
            with torch.no_grad(), lora.without(model):
                reference = log_probs(model, ids, bounds)
        policy = log_probs(model, ids, bounds)
        if stored is not None:
            reference = stored[split][numbers].to(policy.device, non_blocking=True)
        answers = bounds.diff(dim=1).to(policy.device, non_blocking=True)
        loss = preference_loss(policy, reference, answers, dpo_config.loss)
        return {"loss": loss} | rewards(policy, reference, dpo_config.loss)

    def loss(model: nn.Module, ids: Tensor, bounds: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        return {name: each.mean() for name, each in compared(model, "train", ids, bounds, numbers).items()}

    def evaluate(model: nn.Module) -> dict[str, float]:
        sums: dict[str, Tensor] = {}
        for i in range(0, count, rows * ranks):
            own = chosen[i + rank * rows : min(count, i + (rank + 1) * rows)]
            # Sharded models are called by all processes together, those with no pair left among them.
            found = compared(model, "val", *held_out.read(own or chosen[:1]))
            sums = {name: sums.get(name, 0.0) + each.sum() * bool(own) for name, each in found.items()}
        means = {f"val_{name}": float(parallel.add_up(each)) / count for name, each in sums.items()}
        measured = min(MEASURED, count)
        some = held_out.read([chosen[i * count // measured] for i in range(measured)])
        device = next(model.parameters()).device
        return means | {"val_kl": divergence(model, *some[:2], lambda: base.load().to(device))}

    epoch = sum(pairs.count for pairs in sets.values()) / config.batch_size
    if epoch < 1:
        log.warning(
            f"a batch of {config.batch_size} pairs is more than there are ({epoch * config.batch_size:.0f}): each step "
            "sees all of them, some twice; lower batch_size"
        )
    length = sum(weight * sets[name].length for name, weight in weights.items()) / sum(weights.values())
    return Task(
        batch=mixture.batch,
        loss=loss,
        targets=lambda ids, bounds, numbers: len(ids),
        evaluate=evaluate,
        steps=config.steps or max(1, round(config.epochs * epoch)),
        epoch=epoch,
        flops=config.batch_size * flops_per_pair(shape, dpo_config, next(iter(sets.values()))),
        tokens=lambda ids, bounds, numbers: int((bounds[:, 2] - bounds[:, 0]).sum()),
        row=("pair", length),
        seen=lambda step: (
            {name: round(n * sets[name].length) for name, n in mixture.seen(step).items()} if dpo_config.weights else {}
        ),
        documents=lambda step: "; ".join(mixture.documents(step)),
    )


def divergence(model: nn.Module, ids: Tensor, bounds: Tensor, load: Callable[[], nn.Module]) -> float:
    """KL(π ‖ reference) in nats a token, of the distributions of the next token at each of the chosen answers'.

    Of the whole distributions, not estimated from the tokens that stand there. load: gives the reference, a second
    model, if this one has no adapter to be switched off.
    """
    device, adapted, total, tokens = next(model.parameters()).device, bool(lora.layers(model)), 0.0, 0
    reference = model if adapted else load()
    for row, (p, c, _) in zip(ids, bounds.tolist(), strict=True):
        text = row[None, : c - 1].to(device)
        own = model(text)[0, p - 1 :].double().log_softmax(-1)  # (c − p, V)
        with lora.without(model) if adapted else nullcontext():
            theirs = reference(text)[0, p - 1 :].double().log_softmax(-1)
        total += float((own.exp() * (own - theirs)).sum())
        tokens += c - p
    return total / tokens


def flops_per_pair(model: ModelConfig, config: DPOConfig, pairs: PairRows) -> float:
    """Of a training step, counted as in sft.train.flops_per_token, and the reference's where it is read each time.
    An answer attends to its prompt and to itself."""
    p, c, r = (pairs.bounds[:, 1:] - pairs.bounds[:, :-1]).T.astype(float)
    head = model.vocab_size * model.d_model
    blocks = model.flops_per_token(0) / 6 - head
    once = (p + c + r - 1).mean() * blocks + (c + r).mean() * head  # numbers multiplied, forward
    with torch.device("meta"):
        adapted = adapt(Transformer(model), config.lora)
    extra = machine.numbers(x for x in adapted.parameters() if x.requires_grad) if config.lora else 0
    keys = ((p + c) ** 2 + (p + r) ** 2).mean() * model.n_layers * model.d_model
    trained = (4 if config.lora else 6) * once + 6 * extra * (p + c + r - 1).mean() + 12 * keys
    return trained + (2 * once + 4 * keys if config.reference == "adapter_off" else 0)


def job(
    config: DPOConfig, template: str, base: Base, pairs: Path, spm: Tokenizer, directory: Path, command: str
) -> Stage:
    """The stage that teaches the base the pairs in a directory, spelt by `template`. command: what the user types."""
    settings = {"weights": dict(config.weights), "template": template}
    settings |= {"loss": config.loss, "reference": config.reference}
    settings |= base.settings("dpo", config.train, config.lora, directory)
    read = stage.outputs(pairs) | {"tokenizer/spm.model": spm.sha256} | stage.outputs(base.checkpoint)
    return Stage(directory, settings, read, command, __file__, free=finetune.FREE)


def train(
    job: Stage,
    config: DPOConfig,
    template: str,
    base: Base,
    pairs: Path,
    reference: Path,
    spm: Tokenizer,
    force: bool = False,
    resume: str = "auto",
) -> None:
    """Teaches the base, unless that is done. reference: the directory of dpo.reference, if the config wants it."""
    checkpoint.must_match(base.checkpoint, spm.sha256)
    must_be_taught(base.checkpoint, template)
    stored = dpo.reference.load(reference) if config.reference == "stored" else None
    task = preference_learning(config, base, pairs, dpo.data.load(pairs, spm.sha256), stored)
    finetune.tune(job, base, task, config.train, config.lora, force, resume)


def must_be_taught(base: Path, template: str) -> None:
    """UserError if a model was taught to answer by another template than the one that spells the pairs."""
    taught = checkpoint.template(base)
    if taught not in (None, template):
        raise UserError(
            f"{base} was taught to answer by the template {taught!r}, but the pairs are spelt by {template!r}; set "
            f"template of sft.data to {taught!r}"
        )
