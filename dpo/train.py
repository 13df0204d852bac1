"""Direct preference optimisation (DPO): a fine-tuned model learns which of two answers is preferred."""

#     python pipeline.py configs/tiny.py dpo   ->  runs/tiny/dpo
# The reference is the fine-tuned model before this training. Its log-probabilities come from the trained model with its
# adapter switched off, or dpo.reference computes them before training. The losses are in dpo/loss.py.

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
import parallel
from cli import UserError
from dpo.data import PairConfig, PairRows
from dpo.loss import LossConfig, log_probs, preference_loss, rewards
from finetune import Base, Tuning, check_weights
from lora import LoRAConfig
from model import send
from stage import Stage, check_types
from tokenizer import Tokenizer
from trainer import TrainConfig

MEASURED = 16  # held-out pairs on whose chosen answers the divergence from the reference is measured


@dataclass(frozen=True, kw_only=True)
class DPOConfig:
    """How preferences are learnt. Raises TypeError or ValueError, with the field's name, for an impossible value."""

    data: PairConfig = PairConfig()
    loss: LossConfig = LossConfig()
    # The adapter that is trained; None trains every weight. Not for the head: preferences need no sharper distribution.
    lora: LoRAConfig | None = LoRAConfig(dropout=0.0, targets=lora.BLOCKS)
    # Where the reference's log-probabilities come from. "stored": one pass over all pairs before training; steps are
    # faster. "adapter_off": computed at each step with the adapter switched off; stores nothing, and rewards are
    # exactly 0 before the first step, unless blocks are compiled. Both give the same run up to rounding.
    reference: str = "stored"
    weights: Mapping[str, float] = field(default_factory=dict)  # each source's share, in any unit; empty: all pairs
    train: TrainConfig = TrainConfig(  # a row of a batch is a pair
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

    def __post_init__(self):
        check_types(self)
        if self.reference not in ("stored", "adapter_off"):
            raise ValueError(f'reference is {self.reference!r}; expected "stored" or "adapter_off"')
        if self.lora is None and self.reference == "adapter_off":
            raise ValueError('reference is "adapter_off" and lora None; expected "stored" where there is no adapter')
        if self.lora and self.lora.dropout:
            raise ValueError(f"dropout of lora is {self.lora.dropout}; expected 0: the reference has none")
        check_weights(self.weights, self.data.sources)


class PreferenceLearning(Tuning):
    """Learns the pairs that dpo.data wrote to a directory. counts: from the manifest there."""

    # stored: the reference's log-probabilities by split. None: the adapter is switched off to compute them.
    noun = "pair"

    def __init__(self, config: DPOConfig, base: Base, directory: Path, counts: dict, stored: dict[str, Tensor] | None):
        self.dpo, self.base, self.stored = config, base, stored
        weights = dict(config.weights) or finetune.ALL
        sets = {name: PairRows(directory, "train", counts, config.train.seed, name) for name in weights}
        super().__init__(config.train, sets, weights)
        lengths = [sets[name].length for name in weights]
        self.row = ("pair", np.average(lengths, weights=list(weights.values())))
        self.held_out = PairRows(directory, "val", counts)
        count = min(config.train.eval_rows, self.held_out.count)
        # At random: evenly spaced pairs could all be of one kind, because a source may give its kinds in turn.
        order = np.random.default_rng(0).permutation(self.held_out.count)
        self.chosen = sorted(order[:count].tolist())
        # An answer attends to its prompt and to itself. Logits are made only for answers.
        rows = next(iter(sets.values()))
        prompt, chosen, rejected = np.diff(rows.bounds, axis=1).T.astype(float)
        in_blocks = (prompt + chosen + rejected - 1).mean()
        in_head = (chosen + rejected).mean()
        keys = ((prompt + chosen) ** 2 + (prompt + rejected) ** 2).mean()
        pair = finetune.step_flops(base.shape, config.lora, in_blocks, in_head, keys, plain=stored is None)
        self.flops = config.train.batch_size * pair

    def compared(self, model: nn.Module, split: str, ids: Tensor, bounds: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        """The loss of each pair, (pairs,), and the values that are logged beside it."""
        if self.stored is None:
            with torch.no_grad(), lora.without(model):
                reference = log_probs(model, ids, bounds)
        policy = log_probs(model, ids, bounds)
        if self.stored is not None:
            reference = send(self.stored[split][numbers], policy.device)
        lengths = send(bounds.diff(dim=1), policy.device)
        logged = rewards(policy, reference, self.dpo.loss)
        return {"loss": preference_loss(policy, reference, lengths, self.dpo.loss)} | logged

    def loss(self, model: nn.Module, ids: Tensor, bounds: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        values = self.compared(model, "train", ids, bounds, numbers)
        return {name: value.mean() for name, value in values.items()}

    def targets(self, ids: Tensor, bounds: Tensor, numbers: Tensor) -> int:
        return len(ids)

    def tokens(self, ids: Tensor, bounds: Tensor, numbers: Tensor) -> int:
        return int((bounds[:, 2] - bounds[:, 0]).sum())

    def evaluate(self, model: nn.Module, rows: int) -> dict[str, float]:
        count = len(self.chosen)
        sums: dict[str, Tensor] = {}
        for numbers, counts in parallel.shared_rows(self.chosen, rows):
            values = self.compared(model, "val", *self.held_out.read(numbers))
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value.sum() * counts
        metrics = {f"val_{name}": float(parallel.add_up(total)) / count for name, total in sums.items()}
        measured = min(MEASURED, count)
        ids, bounds, _ = self.held_out.read([self.chosen[i * count // measured] for i in range(measured)])
        metrics["val_kl"] = divergence(model, ids, bounds, lambda: self.base.load().to(model.embed.weight.device))
        return metrics


def divergence(model: nn.Module, ids: Tensor, bounds: Tensor, load: Callable[[], nn.Module]) -> float:
    """KL(π ‖ reference) of the next token over the chosen answers' positions, in nats per token."""
    # Summed over the vocabulary, not estimated from the answers' own tokens. load: returns the reference as a second
    # model; called only if this model has no adapter to switch off.
    device, adapted = model.embed.weight.device, bool(lora.layers(model))
    reference = model if adapted else load()
    total, tokens = 0.0, 0
    for row, (prompt, chosen, _) in zip(ids, bounds.tolist(), strict=True):
        text = row[None, : chosen - 1].to(device)
        positions = torch.arange(chosen - 1)[None]  # as packed rows have: see ANY_SHAPE in model.py
        policy = model(text, positions=positions)[0, prompt - 1 :].cpu().double().log_softmax(-1)  # (answer, V)
        with lora.without(model) if adapted else nullcontext():
            base = reference(text, positions=positions)[0, prompt - 1 :].cpu().double().log_softmax(-1)
        total += float((policy.exp() * (policy - base)).sum())
        tokens += chosen - prompt
    return total / tokens


def job(
    config: DPOConfig, template: str, base: Base, pairs: Path, spm: Tokenizer, directory: Path, command: str
) -> Stage:
    """The stage that trains the base on the pairs in a directory, written in `template`. command: as the user types."""
    settings = {"weights": dict(config.weights), "template": template}
    settings |= {"loss": config.loss, "reference": config.reference}
    return finetune.job("dpo", config, settings, base, pairs, spm, directory, command, __file__)


def train(
    job: Stage, config: DPOConfig, template: str, base: Base, pairs: Path, spm: Tokenizer, reference: Path,
    force: bool = False, resume: str = "auto",
) -> None:  # fmt: skip
    """Trains the base, unless that is done. reference: the directory of dpo.reference, read only for "stored"."""
    checkpoint.must_match(base.checkpoint, spm.sha256)
    must_be_taught(base.checkpoint, template)
    stored = dpo.reference.load(reference) if config.reference == "stored" else None
    task = PreferenceLearning(config, base, pairs, dpo.data.load(pairs, spm.sha256), stored)
    finetune.tune(job, base, task, config.lora, force, resume)


def must_be_taught(base: Path, template: str) -> None:
    """UserError if the base learnt to answer in another template than the pairs are written in."""
    taught = checkpoint.template(base)
    if taught not in (None, template):
        differ = f"learnt to answer in the template {taught!r}, but the pairs are written in {template!r}"
        raise UserError(f"{base} {differ}; set template of sft.data to {taught!r}")
