"""Supervised fine-tuning: a pretrained model learns to answer.

    python -m sft.train configs/tiny.py   ->  runs/tiny/sft

The loop is that of train.py. Trained is an adapter (LoRA) over the frozen model, or, with lora=None, the model itself;
the loss is of what the assistant says. Rows hold many conversations, none of which sees another.
"""

import argparse
import math
import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import checkpoint
import machine
import parallel
import sft.data
import stage
from data.batches import Mixture, Phase
from model import ModelConfig, Transformer
from sft import lora
from sft.data import IGNORED, ConversationConfig, Rows
from sft.lora import LoRAConfig
from sft.templates import END, START, TEMPLATES, begin, shown
from stage import Stage, UserError, check_types, log
from tokenizer import Tokenizer
from train import FREE, Task, TrainConfig, run

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


def fine_tuning(experiment, directory: Path, spm: Tokenizer) -> Task:
    """The task of learning the conversations in a finished directory of sft.data."""
    config, length = experiment.sft.train, experiment.model.context_length
    counts = sft.data.load(directory, spm.sha256, f"python -m sft.data {experiment.path}")
    weights = dict(experiment.sft.weights) or {"": 1}  # "": all sources together
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
        flops=config.batch_size * length * flops_per_token(experiment.model, experiment.sft.lora, first),
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


def adapt(model: Transformer, adapter: LoRAConfig | None) -> Transformer:
    """The model with a new adapter, if there is to be one."""
    if adapter:
        lora.attach(model, adapter)
    return model


def show_samples(model: Transformer, held_out: Rows, spm: Tokenizer) -> None:
    """Logs how the model answers the same few held-out questions."""
    count, stop = len(held_out.starts) - 1, (spm.eos, *spm.control.values())
    with torch.autocast(model.embed.weight.device.type, enabled=False):
        for number in range(0, count, max(1, count // SAMPLES))[:SAMPLES]:
            ids, trained = held_out.conversation(number)
            first = int(trained.argmax())
            new = model.generate(ids[:first].tolist(), SAMPLE_TOKENS, temperature=0, stop=stop)
            question, answer = (" ".join(shown(part, spm).split()) for part in (ids[1:first].tolist(), new))
            log.info(f"asked: {question[-200:]}\nsaid:  {answer}")


def place(base: Path, checkpoint: Path) -> str:
    """Where a checkpoint's base is: from there, where both are in runs/ and move together, else from the root."""
    base, checkpoint = base.resolve(), checkpoint.resolve()
    return os.path.relpath(base, checkpoint) if base.is_relative_to(stage.runs().resolve()) else str(base)


def unseen(experiment, base: Path) -> dict[str, int] | None:
    """The pieces that `begin` needs, if the template has control pieces and the model has not seen them. Pretraining
    here shows a model none, fine-tuning those of its template; what an imported model was shown is not known."""
    spm, needs = experiment.load_tokenizer(base), TEMPLATES[experiment.sft.data.template].needs
    while (template := checkpoint.template(base)) is not None and END not in TEMPLATES[template].needs:
        if not checkpoint.adapts(base):
            break
        base = checkpoint.base(base)
    config = checkpoint.read_manifest(base)["config"]
    known = not experiment.imported and ("pretrain" in config or "sft" in config)
    if END not in needs or not known or (template is not None and END in TEMPLATES[template].needs):
        return None
    return {"end": spm.control[END], "start": spm.control[START], "eos": spm.eos}


def prepare(experiment, base: Path, workers: int) -> tuple[Task, dict[str, str]]:
    """The task and the digests of what it reads. Makes the rows of conversations it needs."""
    directory = sft.data.build(experiment, workers)
    spm = experiment.load_tokenizer(base)
    read = stage.outputs(directory) | {"tokenizer/spm.model": spm.sha256}
    return fine_tuning(experiment, directory, spm), read


def tune(name: str, after: str, prepare: Callable, own: dict, experiment, arguments: argparse.Namespace) -> None:
    """A stage that trains a trained model further, or an adapter on it, as a command.

    after: the stage whose model it takes, unless `arguments.checkpoint` names one. prepare(experiment, base, workers):
    the task, and the digests of what it reads but for the base. own: settings to be recorded beside those that every
    such stage has.
    """
    config, remake = getattr(experiment, name), f"python -m {name}.train {experiment.path}"
    if arguments.checkpoint is not None:
        base, remake = Path(arguments.checkpoint), f"{remake} --checkpoint {shlex.quote(arguments.checkpoint)}"
        checkpoint.digest(base)
    else:
        base = experiment.trained(after)

    def make() -> Transformer:
        with torch.device("meta"):
            machine.must_fit(adapt(Transformer(experiment.model), config.lora), config.train, parallel.ranks())
        return adapt(load_base(experiment, base), config.lora)

    def prepared() -> tuple[Task, dict[str, str]]:
        checkpoint.must_match(base, experiment.load_tokenizer(base).sha256)
        return prepare(experiment, base, stage.workers(arguments))

    with parallel.joined(config.train.timeout):
        parallel.lead(lambda: prepared() and None, timeout=parallel.DAY)
        task, read = prepared()
        directory = experiment.directory(name)
        settings = {"model": experiment.model, name: config.train, "weights": dict(config.weights)} | own
        settings |= {"template": experiment.sft.data.template, "lora": config.lora}
        settings["base"] = place(base, directory / "final")  # as every checkpoint beside it
        settings["begin"] = unseen(experiment, base)
        job = Stage(directory, settings, read | stage.outputs(base), remake, free=FREE | {"base", "reference"})
        run(job, make, task, config.train, arguments)


def load_base(experiment, base: Path) -> Transformer:
    """The model in a checkpoint, as training begins with it. UserError if it is not of the shape in the config."""
    model = checkpoint.load_model(base)
    if replace(model.config, kernels=experiment.model.kernels) != experiment.model:
        raise UserError(f"{base} holds another model than {experiment.path} describes")
    if pieces := unseen(experiment, base):
        begin(model, **pieces)
    return model


def main(arguments: argparse.Namespace) -> None:
    import configs

    tune("sft", "pretrain", prepare, {}, configs.load(arguments.config).owner("sft"), arguments)


if __name__ == "__main__":
    from sft.train import main  # the module that configs import, not this second copy of it

    p = stage.parser(__doc__, makes=True, many=True)
    p.add_argument("--checkpoint", metavar="DIR", help="the model to fine-tune by path, instead of the pretrained one")
    p.add_argument("--resume", default="auto", metavar="auto|DIR", help="the checkpoint to go on from; default: newest")
    stage.run(main, p.parse_args())
