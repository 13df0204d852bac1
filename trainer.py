"""The one training loop; as a script, pretraining.

    python train.py configs/tiny.py   ->  runs/tiny/pretrain

A stage hands the loop a model and a `Task`: batches, a loss and an evaluation. The loop does the rest: optimizer,
schedule, precision, accumulation, clipping, distribution, evaluation, checkpoints, resume, signals, logging. Training
is exact: a run that is killed at any moment and started again, with as many processes, ends with the same bytes as one
never disturbed: on a CPU in float32, on a GPU if it is `deterministic`.
"""

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
import cli
import machine
import parallel
import stage
from cli import UserError, log
from model import Transformer
from optim import fall_begins, learning_rate, make_optimizers
from stage import Stage, check_types

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
    """Steps over which the learning rate rises from 0;"""
    warmup_fraction: float | None = None
    """or, instead, what share of all steps."""
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
    """* Two runs give the same bytes, more slowly: on a GPU by refusing operations whose result depends on timing, on a
    CPU by float32 where precision is "auto" (in bfloat16 two processes of some hundred rounded unlike the rest)."""
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
        if self.warmup_fraction is not None and not (0 <= self.warmup_fraction <= 1 and self.warmup_steps == 0):
            raise ValueError(
                f"warmup_fraction is {self.warmup_fraction}, warmup_steps {self.warmup_steps}; expected 0 to 1, and 0"
            )
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"steps is {self.steps} and epochs is {self.epochs}; expected one of them, the other None")
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

    batch: Callable[[int, int, int], tuple[Tensor, ...]]
    """batch(step, rank, ranks): a process's part of the global batch of a step, both counted from 0; a pure function.
    The parts are of one size, and one after another they are the same global batch for any number of processes."""
    loss: Callable[..., dict[str, Tensor]]
    """loss(model, *batch): means over the batch's targets by name: `loss`, which is trained, and what is to be logged
    beside it. The batch is still on the CPU: what the model reads has to be moved. It calls the model as a function,
    and none of its methods: so one that is shared out comes together."""
    targets: Callable[..., int]
    """targets(*batch): how many those means are over, so that micro-batches can be weighed."""
    evaluate: Callable[[nn.Module], dict[str, float]]
    """Metrics of held-out data by name, `val_loss` among them, the same on every process; the model is in eval mode and
    no gradient is kept."""
    steps: int
    """Steps to train."""
    epoch: float
    """Steps that one pass over the data takes."""
    flops: float
    """Floating-point operations that a step takes, of all processes together."""
    tokens: Callable[..., int] | None = None
    """tokens(*batch): how many are trained, if those are not its targets."""
    row: tuple[str, float] | None = None
    """What a row is called, and how many tokens one has on average; None: a row of context_length."""
    seen: Callable[[int], dict[str, int]] = lambda step: {}
    """seen(step): how many tokens the steps before it have drawn from each set of a mixture."""
    documents: Callable[[int], str] = lambda step: ""
    """documents(step): what the global batch of a step holds, for the message about a step that fails."""


# -------------------------------------------------------------------------------------------------- the loop's parts


def accumulate_gradient(
    model: nn.Module,
    task: Task,
    batch: tuple[Tensor, ...],
    rows: int,
    targets: int,
    scale: float,
    autocast: AbstractContextManager,
    exchange: parallel.Exchange | None,
) -> dict[str, Tensor]:
    """Adds the gradient of scale × the mean loss over a global batch to the parameters', `rows` rows at a time.

    batch: this process's part of it. targets: of all parts. Returns the part's share of the means that the task's loss
    gives, not scaled. A micro-batch counts by its targets, so that the sum does not depend on how the batch was cut.
    """
    total: dict[str, Tensor] = {}
    micro_batches = list(zip(*(tensor.split(rows) for tensor in batch), strict=True))
    for i, micro in enumerate(micro_batches, start=1):
        share = task.targets(*micro) / max(1, targets)
        with autocast:
            means = {name: mean * share for name, mean in task.loss(model, *micro).items()}
        with exchange.exchanging() if exchange and i == len(micro_batches) else nullcontext():
            (means["loss"] * scale).backward()
        total = {name: total.get(name, 0.0) + mean.detach() for name, mean in means.items()}
    return total


FIRST_SCALE, GOOD_STEPS = 65_536.0, 2_000


class LossScale:
    """Keeps gradients within what float16 can hold (arXiv:1710.03740): the loss is multiplied by a number that is
    halved whenever a gradient overflows, and doubled after GOOD_STEPS without. For other dtypes it is 1."""

    def __init__(self, dtype: torch.dtype):
        self.moves = dtype == torch.float16
        self.value, self.good = FIRST_SCALE if self.moves else 1.0, 0

    def update(self, finite: bool) -> None:
        if self.moves:
            self.good = self.good + 1 if finite else 0
            if not finite:
                self.value /= 2
            elif self.good == GOOD_STEPS:
                self.value, self.good = 2 * self.value, 0


def clip_gradient(parameters: list[nn.Parameter], limit: float, scale: float) -> float:
    """Divides the gradient by `scale`, then clips its norm to `limit`; returns the norm before clipping."""
    if scale != 1:
        for p in parameters:
            if p.grad is not None:
                p.grad.div_(scale)
    norm = nn.utils.clip_grad_norm_(parameters, limit)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


class Signals:
    """Remembers Ctrl-C and SIGTERM until the step is finished and saved; a second one exits at once."""

    def __init__(self):
        self.caught, self.when = 0, 0.0

    def __enter__(self) -> "Signals":
        self.before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _handle(self, signum, frame):
        if not self.caught:
            self.caught, self.when = signum, time.monotonic()
            if parallel.rank() == 0:
                os.write(2, b"\nfinishing the step and saving; once more to exit at once\n")
        # A cluster signals every process, and torchrun, which has got it too, passes it on.
        elif parallel.ranks() == 1 or time.monotonic() - self.when > 5:
            os._exit(128 + signum)


@dataclass
class Progress:
    """Where a run is. With weights, optimizers and random generators it is all that resuming needs."""

    step: int = 0
    """Steps made, those skipped among them."""
    tokens: int = 0
    """Trained in those steps."""
    best_loss: float = math.inf
    """The lowest validation loss so far,"""
    best_step: int = 0
    """the step it is of,"""
    warned_of: int = -1
    """and the one that a warning of overfitting has named last."""
    skipped: int = 0
    """Steps whose gradient was not finite, and which changed nothing;"""
    skipped_in_a_row: int = 0
    """as many of them as came last, overflows of float16 left out."""


SHOWN = ("val_loss", "val_perplexity", "val_bits_per_byte", "val_margin", "val_accuracy", "val_kl")  # of an evaluation


class Report:
    """What is seen of a run: metrics.jsonl, an object a logged step; a bar on a terminal, lines elsewhere."""

    def __init__(self, directory: Path, task: Task, size: int, peak: float | None, tensorboard: bool):
        """size: parameters. peak: FLOP/s that all processes could make at most. tensorboard: write tensorboard/ too."""
        self.path, self.tensorboard, self.board = directory / "metrics.jsonl", tensorboard, None
        self.task, self.size, self.peak = task, size, peak

    def trim(self, step: int) -> None:
        """Drops what an interrupted run wrote past the checkpoint of that step. UserError without tensorboard."""
        kept = []
        for line in self.path.read_bytes().splitlines() if self.path.exists() else []:
            try:
                if json.loads(line)["step"] < step:
                    kept.append(line + b"\n")
            except (ValueError, TypeError, KeyError):
                continue  # the line that was being written when the run was killed
        temporary = self.path.with_name(f".{self.path.name}.partial")
        temporary.write_bytes(b"".join(kept))
        temporary.replace(self.path)
        if self.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("tensorboard=True, but it is not installed; pip install tensorboard") from None
            self.board = SummaryWriter(self.path.with_name("tensorboard"), purge_step=step)

    def start(self, progress: Progress) -> tqdm:
        """The bar; `begin` has to be called too."""
        self.hidden = parallel.rank() > 0 or not sys.stderr.isatty()
        self.first, self.shown = progress.step, 0.0
        shape = "{n_fmt}/{total_fmt} |{bar:10}| {remaining} left{postfix}"
        total, done = self.task.steps, progress.step
        self.bar = tqdm(total=total, initial=done, bar_format=shape, disable=self.hidden, dynamic_ncols=True)
        return self.bar

    def begin(self, progress: Progress) -> None:
        """Starts the clock of speed: neither saving nor evaluation counts, nor does the first step."""
        self.tick, self.step, self.tokens = time.perf_counter(), progress.step, progress.tokens
        if progress.step <= self.first + 1:
            self.began, self.since = self.tick, progress.step

    def measure(self, progress: Progress, means: dict[str, float], lr: float, norm: float) -> dict:
        """What is to be known of a step just made, shown now and logged later. means: what the task's loss gave."""
        now = time.perf_counter()
        record = {
            "step": progress.step,
            **means,
            "lr": lr,
            "grad_norm": norm,
            "tokens": progress.tokens,
            "tokens_per_parameter": progress.tokens / self.size,
            "epoch": progress.step / self.task.epoch,
            "tokens_per_second": (progress.tokens - self.tokens) / (now - self.tick),
            "skipped": progress.skipped,
        }
        if self.peak:
            record["mfu"] = (progress.step - self.step) * self.task.flops / (now - self.tick) / self.peak
        if seen := self.task.seen(progress.step):
            record["seen"] = seen
        self.bar.set_postfix_str(self.numbers(record))
        return record

    def show(self, record: dict) -> None:
        """Off a terminal, a line now and then; a step that is evaluated has one already."""
        now = time.perf_counter()
        if self.hidden and "val_loss" not in record and (now - self.shown > 20 or record["step"] == self.first + 1):
            left = (now - self.began) / (record["step"] - self.since) * (self.task.steps - record["step"])
            log.info(f"{self.line(record)}, {left // 60:.0f} min {left % 60:.0f} s left")
            self.shown = now

    def numbers(self, record: dict) -> str:
        """First what a narrow terminal must still show."""
        text = f"loss {record['loss']:.4f}, {record['tokens_per_second']:,.0f} tokens/s"
        if "mfu" in record:
            text += f", {record['mfu']:.1%} MFU"
        return f"{text}, epoch {record['epoch']:.2f}, lr {record['lr']:.1e}, gradient {record['grad_norm']:.2f}"

    def line(self, record: dict) -> str:
        text = f"step {record['step']} of {self.task.steps}: {self.numbers(record)}"
        known = [name for name in SHOWN if name in record]
        return text + "".join(f", {name.replace('_', ' ')} {record[name]:.4f}" for name in known)

    def evaluated(self, record: dict) -> None:
        """A line for every evaluation, and one about a mixture as it was drawn."""
        log.info(self.line(record))
        if seen := record.get("seen"):
            every = sum(seen.values())
            log.info("drawn so far: " + ", ".join(f"{k} {n:,} tokens ({n / every:.1%})" for k, n in seen.items()))

    def write(self, record: dict) -> None:
        """Appends to metrics.jsonl, where JSON has null for what is not finite."""
        if parallel.rank():
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")
        if self.board:
            seen = {f"seen/{name}": tokens for name, tokens in record.get("seen", {}).items()}
            for name, value in ({k: v for k, v in record.items() if k != "seen"} | seen).items():
                self.board.add_scalar(name, value, record["step"])
            self.board.flush()


def shared_rows(chosen: Sequence[int], rows: int) -> Iterator[tuple[list[int], bool]]:
    """Yields this process's share of the chosen rows, at most `rows` at a time, and whether the share counts.

    Every process gets as many shares as the others, because a sharded model must be called by all of them together.
    A process with no row left gets the first row again; that share does not count.
    """
    rank, ranks = parallel.rank(), parallel.ranks()
    for start in range(0, len(chosen), rows * ranks):
        share = chosen[start + rank * rows : start + (rank + 1) * rows]
        yield share or chosen[:1], bool(share)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients; not compiled, which would be done anew for every shape."""
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train()


@contextmanager
def fitting(model: Transformer, config: TrainConfig) -> Iterator[None]:
    """Makes of running out of memory a UserError that says what to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not machine.out_of_memory(error):
            raise
        raise UserError(f"out of memory; {machine.smaller(model.config, config, parallel.ranks())}") from None


# ---------------------------------------------------------------------------------------------------------- the loop


def train(model: Transformer, task: Task, config: TrainConfig, job: Stage, resume: str) -> None:
    """Trains the model to the end, from where an earlier run left it. Writes checkpoints, metrics.jsonl, the manifest.

    resume: "auto", or the checkpoint to go on from. Raises UserError if that checkpoint is of another config, if memory
    does not suffice, or if the gradient stays not finite; Stopped, everything saved, on Ctrl-C or SIGTERM.
    """
    directory, steps, ranks = job.directory, task.steps, parallel.ranks()
    if config.warmup_fraction is not None:
        config = replace(config, warmup_steps=round(config.warmup_fraction * steps), warmup_fraction=None)
    if config.batch_size % ranks:
        parallel.refuse(
            f"batch_size is {config.batch_size}, which {ranks} processes cannot share evenly; change either"
        )
    device = machine.pick_device()
    if config.deterministic:
        machine.make_deterministic(device)
    dtype = parallel.lead(lambda: machine.training_dtype(device, config))
    machine.keep_freed_memory()

    progress, record, state = Progress(), None, None
    if (start := parallel.lead(lambda: find_checkpoint(job, resume))) is not None:
        counts = checkpoint.read_manifest(start)["counts"]
        record, job.earlier = counts["record"], counts["seconds"]
        if counts["step"] > steps:
            parallel.refuse(f"{start} is at step {counts['step']} already; set steps to at least that, not {steps}")
        checkpoint.load_weights(start, model)
        state = checkpoint.read(start, "state.pt")
        if config.precision == "auto" and not config.deterministic and device.type == state.get("device") == "cpu":
            dtype = getattr(torch, state.get("dtype", ""), dtype)  # as it was measured when the run began

    real = replace(config, compile=config.compile and machine.compile_blocks(model, device))
    for text in machine.page(model, real, dtype, task, ranks):
        log.info(text)
    used = {"machine": machine.used(real, dtype, ranks), "command": parallel.command(job.command)}
    model.gradient_checkpointing = config.gradient_checkpointing
    exchange = parallel.distribute(model.train(), config.parallel, device, dtype)
    optimizers = make_optimizers(model, config)
    autocast = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
    scale = LossScale(dtype)
    if state is not None:
        progress = restore(start, state, optimizers, scale)
        state = None  # as large as the optimizers' own
        log.info(f"resumed from step {progress.step} ({start})")
        if changed := job.changed_code(start):
            log.warning(f"{changed} changed since {start} was saved; the rest of the run uses the new code")
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    parameters = [p for group in groups for p in group["params"]]

    peak = machine.peak_flops(device, dtype)
    report = Report(directory, task, model.num_parameters(), peak and peak * ranks, config.tensorboard)

    def begin() -> None:
        (directory / "manifest.json").unlink(missing_ok=True)  # there if a finished run is made longer
        report.trim(progress.step)

    def read(step: int) -> tuple[Tensor, ...]:
        batch = task.batch(step, parallel.rank(), ranks)
        return tuple(tensor.pin_memory() for tensor in batch) if device.type == "cuda" else batch

    def save(name: str) -> None:
        """Every process takes part in putting together what is shared out; the first writes it."""
        state = {"optimizers": [optimizer.state_dict() for optimizer in optimizers]}
        state |= {"progress": vars(progress), "loss_scale": vars(scale), "rng": torch.get_rng_state()}
        state |= {"device": device.type, "dtype": str(dtype).removeprefix("torch.")}
        if device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state()
        file, weights = checkpoint.weights(model)
        files = parallel.whole({file: weights, "state.pt": state})

        def write() -> None:
            seconds = round(job.seconds(), 1)
            counts = {"step": progress.step, "steps": steps, "seconds": seconds, "record": record} | used
            if report.path.exists():
                stage.sync(report.path)  # a checkpoint never reaches the disk before the log of its steps
            about = job.about({}, counts)
            checkpoint.save(directory / name, files, about)
            numbered = [path for at, path in checkpoint.steps(directory) if path.name != "final" and at != stable]
            for path in numbered[config.keep_checkpoints :]:
                checkpoint.remove(path)

        parallel.lead(write)

    # From the last checkpoint before the fall of "wsd" another run can go on at the peak: it is kept.
    stable = fall_begins(config, steps) if config.schedule == "wsd" else 0

    def due(every: int) -> bool:
        return progress.step % every == 0 or progress.step == steps

    def finish_step() -> None:
        """Evaluates and logs, if this step should.

        A checkpoint is saved before its step is evaluated and logged, and carries the step's record. So a resumed run
        begins here, and does again what the interrupted one may not have come to.
        """
        if due(config.eval_every):
            with evaluating(model), autocast:
                record.update(task.evaluate(model))
            report.evaluated(record)
            if record["val_loss"] < progress.best_loss:
                progress.best_loss, progress.best_step = record["val_loss"], progress.step
                save("best")
            elif (
                record["val_loss"] > progress.best_loss
                and progress.step >= progress.best_step + 2 * config.eval_every
                and progress.step > task.epoch  # before, nothing has been read twice
                and progress.best_step != progress.warned_of
            ):
                progress.warned_of = progress.best_step
                log.warning(
                    f"validation loss was lowest at step {progress.best_step}, {progress.best_loss:.4f}, and has not "
                    "been since: the model seems to overfit. best/ keeps that step; more text or fewer epochs may help"
                )
        if due(config.log_every) or progress.step == 1 or "val_loss" in record:
            report.write(record)

    parallel.lead(begin)
    if record is not None:
        if progress.step == steps:
            save("final")  # the checkpoint may be a numbered one, where `steps` was lowered to it
        finish_step()
        if counts.get("steps", steps) != steps:
            before, after = record["lr"], learning_rate(config, progress.step, steps)
            log.info(
                f"the schedule is now that of {steps} steps: the learning rate goes from {before:.1e} to {after:.1e}"
            )
    rows, first, stopping = machine.rows_held(config, ranks), progress.step, 0
    batch = read(first) if first < steps else ()
    with Signals() as signals, report.start(progress) as bar:
        report.begin(progress)
        while progress.step < steps and not stopping:
            lr = learning_rate(config, progress.step, steps)
            for group in groups:
                group["lr"] = lr
            targets = parallel.total(task.targets(*batch))
            tokens = parallel.total(task.tokens(*batch)) if task.tokens else targets
            means = accumulate_gradient(model, task, batch, rows, targets, scale.value, autocast, exchange)
            if progress.step + 1 < steps:
                batch = read(progress.step + 1)  # while a GPU is still busy with this one
            norm = clip_gradient(parameters, config.grad_clip, scale.value)
            finite = math.isfinite(norm)  # of the sum over all processes: all of them make or skip the step
            for optimizer in optimizers:
                if finite:
                    optimizer.step()
                optimizer.zero_grad(set_to_none=exchange is None)  # else they are parts of what is exchanged
            progress.step += 1
            progress.tokens += tokens
            progress.skipped += not finite
            progress.skipped_in_a_row = 0 if finite else progress.skipped_in_a_row + (scale.value <= 1)
            scale.update(finite)
            bar.update()
            if not finite:
                log.info(f"step {progress.step} is skipped: the norm of its gradient is {norm}")
            if progress.skipped_in_a_row >= config.max_skipped:
                parallel.refuse(
                    f"the gradient was not finite in {progress.skipped_in_a_row} steps in a row, the last of them step "
                    f"{progress.step}, on {task.documents(progress.step - 1) or 'its batch'}. Lower learning_rate, "
                    f"lengthen warmup_steps or look for what is wrong in the data, and start anew: {job.command} --force"
                )

            # Read once: what is saved below is what the message after the loop speaks of.
            stopping, last = parallel.largest(signals.caught), progress.step == steps
            saving = due(config.save_every) or progress.step == stable
            saving = stopping or last or (saving and not progress.skipped_in_a_row)
            if saving or due(config.eval_every) or due(config.log_every) or progress.step == first + 1:
                means = {name: float(parallel.add_up(mean)) for name, mean in means.items()}
                record = report.measure(progress, means, lr, norm)
                if saving:  # before the evaluation, which may fail
                    save("final" if last else f"step_{progress.step:07d}")
                finish_step()
                report.show(record)
                report.begin(progress)
    if progress.step < steps:
        text = f"{signal.Signals(stopping).name}: saved at step {progress.step} of {steps}; go on with: "
        raise cli.Stopped(128 + stopping, text + parallel.command(job.command))
    if progress.skipped:
        log.warning(f"{progress.skipped} of {steps} steps were skipped: their gradient was not finite")
    counts = {"step": progress.step, "parameters": model.num_parameters(), "record": record} | used
    files = [directory / "final" / name for name in (checkpoint.weights(model)[0], "state.pt", "manifest.json")]
    parallel.lead(lambda: job.finish(counts, files))


def restore(start: Path, state: dict, optimizers: list[torch.optim.Optimizer], scale: LossScale) -> Progress:
    """Puts optimizers and random generators back as saved. UserError if `state` is not of such a run."""
    try:
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for i, own in saved["state"].items():
                if wrong := [k for k, v in own.items() if v.dim() and v.shape != parameters[i].shape]:
                    raise ValueError(f"{wrong[0]} of parameter {i} is {tuple(own[wrong[0]].shape)}")
                saved["state"][i] = {key: parallel.part(value, parameters[i]) for key, value in own.items()}
            optimizer.load_state_dict(saved)
        if scale.moves and state["loss_scale"]["moves"]:
            vars(scale).update(state["loss_scale"])
        torch.set_rng_state(state["rng"])
        if torch.cuda.is_available() and "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"])
        return Progress(**state["progress"])
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{start / 'state.pt'} does not hold the state of this run: {error}") from None


def find_checkpoint(job: Stage, resume: str) -> Path | None:
    """The checkpoint to go on from: the one named, or the run's newest whole one; None to begin. UserError if it is of
    another config, or if going on from it would leave later ones behind."""
    if resume == "auto":
        start = next(checkpoint.newest(job.directory), None)
    else:
        start = Path(resume)
        if not start.is_dir() or (start / "final").is_dir():
            there = ", ".join(str(path) for _, path in checkpoint.steps(job.directory)) or "none"
            raise UserError(f"{start} is not a checkpoint; of this run there are: {there}")
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


def run(job: Stage, make: Callable[[], Transformer], task: Task, config: TrainConfig, force: bool, resume: str) -> None:
    """A training stage as a command: nothing if it is done, else the model is made and trained, in a locked directory.

    make: the model, its random numbers drawn after seeding. resume: "auto", or the checkpoint to resume.
    """
    if force and resume != "auto":
        parallel.refuse("--force discards what --resume would go on from; use one of them")

    def done() -> bool:
        if force or resume != "auto" or not (manifest := stage.read_manifest(job.directory)):
            return False
        job.must_match(job.directory)
        if (step := manifest["counts"]["step"]) > task.steps:
            raise UserError(
                f"{job.directory} is trained to step {step} already; set steps to at least that, not {task.steps}, or "
                f"make it anew: {job.command} --force"
            )
        return step == task.steps and not stage.damage(job.directory, manifest["wrote"])

    if parallel.lead(done):
        job.log_up_to_date()
        return
    with ExitStack() as held:
        parallel.lead(lambda: held.enter_context(job.making(keep=not force)))
        parallel.lead(lambda: checkpoint.recover(job.directory))
        torch.manual_seed(config.seed)
        model = make()
        with fitting(model, config):
            train(model, task, config, job, resume)
        log.info(f"trained: {job.directory / 'final'}")
