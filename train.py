"""The one training loop; as a script, pretraining.

    python train.py configs/tiny.py   ->  runs/tiny/pretrain

A stage hands the loop a model and a `Task`: batches, a loss and an evaluation. The loop does the rest: optimizer,
schedule, precision, accumulation, clipping, evaluation, checkpoints, resume, signals, logging. Training is exact: a run
that is killed at any moment and started again ends with the same bytes as one never disturbed.
"""

import argparse
import ctypes
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
import stage
from model import Transformer
from stage import Stage, UserError, check_types, log

CHOICES = {
    "schedule": ("cosine", "linear", "wsd"),
    "optimizer": ("adamw", "muon"),
    "precision": ("auto", "bfloat16", "float16", "float32"),
    "parallel": ("ddp", "fsdp"),
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained. Raises TypeError or ValueError, naming the field, for what cannot be.

    Fields marked * may change when a run is resumed; with the others another run begins.
    """

    steps: int | None = None
    """* Optimizer steps; or say `epochs`."""
    epochs: float | None = None
    """* Passes over the training data; or say `steps`."""
    batch_size: int
    """Rows of context_length tokens a step, over all micro-batches."""
    micro_batch_size: int | None = None
    """* Rows that a process has in memory at once; divides batch_size. None: all of its share."""
    learning_rate: float
    """At the peak."""
    min_lr: float = 0.0
    """The learning rate at the end."""
    schedule: str = "cosine"
    """How it goes from the peak to the end: "cosine" (arXiv:1608.03983), "linear" (arXiv:2310.07831), or "wsd", which
    stays at the peak and falls linearly in the last `decay_fraction` (warmup-stable-decay, arXiv:2404.06395)."""
    decay_fraction: float = 0.2
    """Share of the steps that "wsd" falls in."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    optimizer: str = "adamw"
    """"adamw" (arXiv:1711.05101), or "muon" (arXiv:2502.16982) for the matrices of the blocks, AdamW for the rest."""
    momentum: float = 0.95
    """Muon's decay of the sum of gradients, a step."""
    beta1: float = 0.9
    """Decay of AdamW's mean gradient, a step."""
    beta2: float = 0.95
    """Decay of AdamW's mean squared gradient, a step."""
    weight_decay: float = 0.1
    """Of matrices, times the learning rate; vectors, which here are the gains of norms, are not decayed."""
    grad_clip: float = 1.0
    """The gradient's norm is clipped to this."""
    max_skipped: int = 5
    """* A step whose gradient is not finite is skipped; so many in a row stop the run."""
    seed: int = 0
    """Of the initial weights and of the order of the data."""
    compile: bool = True
    """* Compile the model's blocks with torch.compile: half a minute the first time, seconds then from its cache."""
    precision: str = "auto"
    """* What matrix products run in: "bfloat16", "float16" (with a scaled loss) or "float32"; "auto" is the fastest of
    them that the device has in hardware. Weights, optimizer and checkpoints are float32 in any case."""
    gradient_checkpointing: bool = False
    """* Keep of each block only its input, and compute the rest again when its gradient is due (arXiv:1604.06174)."""
    parallel: str = "ddp"
    """* Of several processes (torchrun), each holds the whole model, "ddp", or a share of it, "fsdp"."""
    deterministic: bool = False
    """* On a GPU, refuse operations whose result depends on timing: two runs give the same bytes, more slowly. A CPU
    always does."""
    timeout: float = 600.0
    """* Seconds that a process waits for the others before it takes them for dead."""
    tensorboard: bool = False
    """* Write what goes to metrics.jsonl to tensorboard/ too (pip install tensorboard)."""
    log_every: int = 10
    """* Steps from one line of metrics.jsonl to the next."""
    eval_every: int = 250
    """* Steps from one evaluation to the next."""
    eval_rows: int = 128
    """* Rows of the validation data an evaluation reads, evenly spaced."""
    save_every: int = 250
    """* Steps from one checkpoint to the next."""
    keep_checkpoints: int = 2
    """* How many step_… checkpoints to keep; older ones are removed. final/ and best/ stay."""

    def __post_init__(self):
        check_types(self)
        positive = ("steps", "epochs", "batch_size", "micro_batch_size", "learning_rate", "grad_clip", "log_every")
        for name in (*positive, "timeout"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; expected a positive number")
        for name in ("eval_every", "eval_rows", "save_every", "keep_checkpoints", "max_skipped"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name in ("warmup_steps", "weight_decay", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 or more")
        if self.seed >= 2**63:
            raise ValueError(f"seed is {self.seed}; expected less than 2^63")
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 0, less than 1")
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction is {self.decay_fraction}; expected more than 0, at most 1")
        for name, known in CHOICES.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}")
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("set either steps or epochs, and leave the other None")
        if not 0 <= self.min_lr <= self.learning_rate:
            raise ValueError(f"min_lr is {self.min_lr}; expected 0 to learning_rate, {self.learning_rate}")
        if self.batch_size % (self.micro_batch_size or self.batch_size):
            raise ValueError(f"micro_batch_size is {self.micro_batch_size}; expected a divisor of {self.batch_size}")


FREE = {"steps", "epochs", "micro_batch_size", "max_skipped"}
FREE |= {"compile", "precision", "gradient_checkpointing", "parallel", "deterministic", "timeout", "tensorboard"}
FREE |= {"log_every", "eval_every", "eval_rows", "save_every", "keep_checkpoints"}


@dataclass
class Task:
    """What a stage hands the loop. A batch is a tuple of CPU tensors with rows along the first axis."""

    batch: Callable[[int], tuple[Tensor, ...]]
    """The global batch of a step, counted from 0: a pure function of it."""
    loss: Callable[..., Tensor]
    """loss(model, *batch): the mean over the batch's targets."""
    targets: Callable[..., int]
    """targets(*batch): how many that mean is over, so that micro-batches can be weighed."""
    evaluate: Callable[[nn.Module], dict[str, float]]
    """Metrics of held-out data by name, `val_loss` among them; the model is in eval mode and no gradient is kept."""
    steps: int
    """Steps to train."""
    epoch: float
    """Steps that one pass over the data takes."""


# -------------------------------------------------------------------------------------------------- the loop's parts


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Of a step counted from 0: a linear rise over the warm-up, then a fall from learning_rate to min_lr."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    left = (1 + math.cos(math.pi * done)) / 2 if config.schedule == "cosine" else 1 - done
    return config.min_lr + (config.learning_rate - config.min_lr) * left


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def accumulate_gradient(
    model: nn.Module, task: Task, batch: tuple, rows: int, autocast: AbstractContextManager
) -> Tensor:
    """Adds the gradient of the mean loss over a batch to the parameters', `rows` rows at a time; returns that loss.

    A micro-batch counts by its targets, so that the sum does not depend on how the batch was cut.
    """
    device, targets = next(model.parameters()).device, task.targets(*batch)
    total = torch.zeros((), device=device)
    for micro in zip(*(tensor.split(rows) for tensor in batch), strict=True):
        share = task.targets(*micro) / targets
        with autocast:
            loss = task.loss(model, *(tensor.to(device, non_blocking=True) for tensor in micro)) * share
        loss.backward()
        total += loss.detach()
    return total


def pick_device() -> tuple[torch.device, torch.dtype]:
    """The device, and the dtype its matrix products run in. Weights and optimizer are float32 everywhere.

    A GPU from Ampere on multiplies bfloat16 natively. Other devices get float32: bfloat16 on a processor that emulates
    it is some hundred times slower.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu"), torch.float32
    torch.set_float32_matmul_precision("high")
    native = torch.cuda.get_device_capability() >= (8, 0)
    return torch.device("cuda"), torch.bfloat16 if native else torch.float32


def compile_blocks(model: Transformer) -> None:
    """Has torch.compile fuse what stands between a block's matrix products; a warning where it cannot.

    One block is compiled, and its code serves all of them: 11 s for tiny, where the whole model takes 29.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=next(model.parameters()).device))
    except Exception as error:  # no C++ compiler, no Python headers, …: its messages come in many types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        log.warning(f"training goes on uncompiled, and slower; set compile=False, or mend this: {reason}")
        return
    for block in model.blocks:
        block.compile()


def keep_freed_memory() -> None:
    """Has the C library keep the memory that a step frees for the next one.

    By default it returns large blocks to the system, and getting them anew costs a step of tiny on a CPU 37,000 page
    faults, a twelfth of its time.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):  # glibc has it
        M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


class Signals:
    """Remembers Ctrl-C and SIGTERM until the step is finished and saved; a second one exits at once."""

    def __init__(self):
        self.caught: int | None = None

    def __enter__(self) -> "Signals":
        self.before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _handle(self, signum, frame):
        if self.caught is not None:
            os._exit(128 + signum)
        self.caught = signum
        os.write(2, b"\nfinishing the step and saving; once more to exit at once\n")


class Metrics:
    """metrics.jsonl: one object a logged step. On resume, what an interrupted run wrote past its checkpoint goes."""

    def __init__(self, path: Path, step: int):
        kept = []
        for line in path.read_bytes().splitlines() if path.exists() else []:
            try:
                if json.loads(line)["step"] < step:
                    kept.append(line + b"\n")
            except (ValueError, TypeError, KeyError):
                break  # the line that was being written when the run was killed
        temporary = path.with_name(f".{path.name}.partial")
        temporary.write_bytes(b"".join(kept))
        temporary.replace(path)
        self.path = path

    def write(self, record: dict) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({k: v if math.isfinite(v) else None for k, v in record.items()}) + "\n")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients; not compiled, which would be done anew for every shape."""
    model.eval()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield
    model.train()


# ---------------------------------------------------------------------------------------------------------- the loop


def train(model: nn.Module, task: Task, config: TrainConfig, job: Stage, resume: str, remake: str) -> None:
    """Trains the model to the end, from where an earlier run left it. Writes checkpoints, metrics.jsonl, the manifest.

    resume: "auto", or the checkpoint to go on from. remake: the command, for messages. Raises UserError if that
    checkpoint is of another config or the loss is not finite, and Stopped, everything saved, on Ctrl-C or SIGTERM.
    """
    directory, steps = job.directory, task.steps
    device, dtype = pick_device()
    autocast = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
    model.to(device).train()
    keep_freed_memory()
    if config.compile:
        compile_blocks(model)
    optimizer = make_optimizer(model, config)
    parameters = sum(p.numel() for p in model.parameters())
    step, best, record = 0, math.inf, None

    if (start := find_checkpoint(job, resume)) is not None:
        best = restore(start, model, optimizer)
        counts = stage.read_manifest(start)["counts"]
        step, record, job.earlier = counts["step"], counts["record"], counts["seconds"]
        if step > steps:
            raise UserError(f"{start} is at step {step} already; set steps to at least that, not {steps}")
        log.info(f"resumed from step {step} ({start})")
    (directory / "manifest.json").unlink(missing_ok=True)  # there if a finished run is made longer
    metrics = Metrics(directory / "metrics.jsonl", step)

    def save(name: str) -> None:
        state = {"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state(), "best": best}
        if device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state()
        counts = {"step": step, "seconds": round(job.seconds(), 1), "record": record}
        if metrics.path.exists():
            stage.sync(metrics.path)  # a checkpoint never reaches the disk before the log of its steps
        about = {"config": job.config, "read": job.read, "counts": counts}
        checkpoint.save(directory / name, model.state_dict(), state, about)
        numbered = [path for _, path in checkpoint.steps(directory) if path.name != "final"]
        for path in numbered[config.keep_checkpoints :]:
            shutil.rmtree(path)

    def finish_step() -> None:
        """Evaluates and logs, if this step should.

        A checkpoint is saved before its step is evaluated and logged, and carries the step's record. So a resumed run
        begins here, and does again what the interrupted one may not have come to.
        """
        nonlocal best
        if step % config.eval_every == 0 or step == steps:
            with evaluating(model), autocast:
                record.update(task.evaluate(model))
            log.info(line(record, steps))
            if record["val_loss"] < best:
                best = record["val_loss"]
                save("best")
        if step % config.log_every == 0 or step == 1 or "val_loss" in record:
            metrics.write(record)

    if record is not None:
        if step == steps:
            save("final")  # the checkpoint may be a numbered one, where `steps` was lowered to it
        finish_step()
    bar = tqdm(total=steps, initial=step, unit=" steps", disable=not sys.stderr.isatty(), dynamic_ncols=True)
    shown = tick = time.perf_counter()
    first = counted = step
    with Signals() as signals, bar:
        stopping = None
        while step < steps and stopping is None:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step, steps)
            batch = task.batch(step)
            targets = task.targets(*batch)
            loss = accumulate_gradient(model, task, batch, config.micro_batch_size or config.batch_size, autocast)
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            bar.update()

            stopping = signals.caught  # read once: what is saved below is what the message after the loop speaks of
            saving = step % config.save_every == 0 or step == steps or stopping is not None
            evaluated = step % config.eval_every == 0 or step == steps
            if not (saving or evaluated or step % config.log_every == 0 or step == first + 1):
                continue
            if not math.isfinite(loss := float(loss)) or not math.isfinite(norm := float(norm)):
                raise UserError(
                    f"step {step}: the loss is {loss}, the gradient's norm {norm}. Lower learning_rate or lengthen "
                    f"warmup_steps, and start anew: {remake} --force"
                )
            now = time.perf_counter()
            rate = (step - counted) * targets / (now - tick)
            record = {
                "step": step,
                "loss": loss,
                "lr": optimizer.param_groups[0]["lr"],
                "grad_norm": norm,
                "tokens": step * targets,
                "tokens_per_parameter": step * targets / parameters,
                "epoch": step / task.epoch,
                "tokens_per_second": rate,
            }
            bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s")
            if not sys.stderr.isatty() and (now - shown > 20 or step == first + 1):
                left = (steps - step) * targets / rate
                log.info(f"{line(record, steps)}, {rate:,.0f} tokens/s, {left // 60:.0f} min {left % 60:.0f} s left")
                shown = now
            if saving:  # before the evaluation, which may fail
                save("final" if step == steps else f"step_{step:07d}")
            finish_step()
            tick, counted = time.perf_counter(), step  # neither saving, evaluation nor the first step counts
    if step < steps:
        name = signal.Signals(stopping).name
        raise stage.Stopped(128 + stopping, f"{name}: saved at step {step} of {steps}; go on with: {remake}")
    counts = {"step": step, "parameters": parameters, "record": record}
    job.finish(counts, files=[directory / "final" / name for name in ("weights.pt", "state.pt", "manifest.json")])


def line(record: dict, steps: int) -> str:
    """A step as one line to read."""
    text = f"step {record['step']} of {steps}, epoch {record['epoch']:.2f}: loss {record['loss']:.4f}"
    for name in ("val_loss", "val_perplexity", "val_bits_per_byte"):
        if name in record:
            text += f", {name.replace('_', ' ')} {record[name]:.4f}"
    return text


def restore(start: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Puts weights, optimizer and random generators back as saved; returns the best validation loss so far."""
    model.load_state_dict(checkpoint.read(start, "weights.pt"))
    state = checkpoint.read(start, "state.pt")
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    if torch.cuda.is_available() and "cuda_rng" in state:
        torch.cuda.set_rng_state(state["cuda_rng"])
    return state["best"]


def find_checkpoint(job: Stage, resume: str) -> Path | None:
    """The checkpoint to go on from: the one named, or the run's newest whole one; None to begin. UserError if it is of
    another config, or if going on from it would leave later ones behind."""
    if resume == "auto":
        start = next(checkpoint.newest(job.directory), None)
    else:
        start = Path(resume)
        checkpoint.read(start, "state.pt")
        step = stage.read_manifest(start)["counts"]["step"]
        if later := [path.name for s, path in checkpoint.steps(job.directory) if s > step]:
            raise UserError(
                f"going on from {start} would leave {', '.join(later)} in {job.directory} behind; move them away, "
                "or give the experiment another name"
            )
    if start is not None:
        job.must_match(start)
    return start


# ------------------------------------------------------------------------------------------------------- pretraining


def pretraining(experiment, packed: dict, others: dict | None = None) -> Task:
    """Next-token prediction on packed tokens: the experiment's splits, and by name those of experiments beside it."""
    from data.batches import Windows, mixture

    config, length = experiment.pretrain, experiment.model.context_length
    batches, held_out = mixture(experiment, packed["train"], others or {}), Windows(packed["val"], length)
    count = min(config.eval_rows, held_out.count)
    chosen = [i * held_out.count // count for i in range(count)]
    rows = config.micro_batch_size or config.batch_size
    bits = len(packed["val"].tokens) / packed["val"].bytes / math.log(2)  # a nat a token, in bits a byte

    def evaluate(model: nn.Module) -> dict[str, float]:
        device, total = next(model.parameters()).device, 0.0
        for i in range(0, count, rows):
            tokens, targets = (t.to(device) for t in held_out.read(chosen[i : i + rows]))
            total += float(model(tokens, targets)) * len(tokens)
        loss = total / count
        return {
            "val_loss": loss,
            "val_perplexity": math.exp(loss) if loss < 700 else math.inf,
            "val_bits_per_byte": loss * bits,
        }

    epoch = sum(windows.count for windows in batches.sets.values()) / config.batch_size
    return Task(
        batch=batches.batch,
        loss=lambda model, tokens, targets: model(tokens, targets),
        targets=lambda tokens, targets: targets.numel(),
        evaluate=evaluate,
        steps=config.steps or max(1, round(config.epochs * epoch)),
        epoch=epoch,
    )


def main(arguments: argparse.Namespace) -> None:
    import configs
    import data.pack

    experiment = configs.load(arguments.config)
    config, directory = experiment.pretrain, experiment.directory("pretrain")
    remake = f"python train.py {experiment.path}"
    packed = data.pack.build(experiment, stage.workers(arguments))
    spm = experiment.load_tokenizer()
    splits = data.pack.load(packed, spm.sha256, f"python -m data.pack {experiment.path}")
    read, others = stage.outputs(packed), {}
    for other in experiment.beside:
        where = data.pack.build(other, stage.workers(arguments))
        others[other.name] = data.pack.load(where, spm.sha256, f"python -m data.pack {other.path}")["train"]
        read |= stage.outputs(where)
    task = pretraining(experiment, splits, others)

    read |= {f"{experiment.owner('tokenizer').name}/tokenizer/spm.model": spm.sha256}
    if experiment.imported:
        read |= stage.outputs(experiment.imported)
    settings = {"model": experiment.model, "pretrain": config}
    if experiment.mixture:
        settings["mixture"] = experiment.mixture
    job = Stage(directory, settings, read, remake, free=FREE)
    if arguments.force and arguments.resume != "auto":
        raise UserError("--force discards what --resume would go on from; use one of them")
    if not arguments.force and arguments.resume == "auto" and (manifest := stage.read_manifest(directory)):
        job.must_match(directory)
        if manifest["counts"]["step"] >= task.steps and not stage.damage(directory, manifest["wrote"]):
            log.info(f"{directory} is up to date")
            return
    with job.making(keep=not arguments.force):
        checkpoint.recover(directory)
        torch.manual_seed(config.seed)
        model = Transformer(experiment.model)
        if experiment.imported:
            model.load_state_dict(checkpoint.read(experiment.imported, "weights.pt"))
            log.info(f"going on from the weights in {experiment.imported}")
        describe(model, task, config, len(splits["train"].tokens))
        train(model, task, config, job, arguments.resume, remake)
        log.info(f"trained: {directory / 'final'}")


def describe(model: Transformer, task: Task, config: TrainConfig, tokens: int) -> None:
    """What is about to happen, in a few lines."""
    device, dtype = pick_device()
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    seen, n = task.steps * config.batch_size * model.config.context_length, model.num_parameters()
    log.info(
        f"pretraining {n:,} parameters on {hardware} in {str(dtype).removeprefix('torch.')}: {task.steps:,} steps of "
        f"{config.batch_size} × {model.config.context_length} tokens"
    )
    log.info(
        f"{seen:,} tokens, {task.steps / task.epoch:.2f} epochs of {tokens:,}; {seen / n:.2f} tokens a parameter "
        "(about 20 is compute-optimal, arXiv:2203.15556)"
    )


if __name__ == "__main__":
    from train import main  # the module that configs import, not this second copy of it

    p = stage.parser(__doc__, makes=True, many=True)
    p.add_argument("--resume", default="auto", metavar="auto|DIR", help="the checkpoint to go on from; default: newest")
    stage.run(main, p.parse_args())
