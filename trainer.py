"""The one training loop."""

# A stage gives the loop a model and a `Task`: batches, a loss and an evaluation. The loop does the rest. A run that is
# killed and started again ends with the same bytes as an uninterrupted run: on a CPU in float32, on a GPU with
# deterministic=True. To read this file, start with `TrainConfig` and `Task`, then go to `train`.

import math
import signal
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import checkpoint
import cli
import machine
import parallel
import stage
from cli import log, plural
from metrics import Report
from model import Transformer
from optim import SCHEDULES, decay_start, learning_rate, make_optimizers
from stage import Stage, check_types

CHOICES = {
    "schedule": SCHEDULES,
    "optimizer": ("adamw", "muon"),
    "precision": ("auto", "bfloat16", "float16", "float32"),
    "parallel": ("ddp", "fsdp"),
}


def free(default):
    """A field that may change when a run resumes. A change of another field needs a new run."""
    return field(default=default, metadata={"free": True})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained. Raises TypeError or ValueError, naming the field, for an impossible value."""

    steps: int | None = free(None)  # optimizer steps; or give epochs
    epochs: float | None = free(None)  # passes over the training data; or give steps
    batch_size: int  # rows of context_length tokens per step, over all processes and micro-batches
    # Rows in a process's memory at once; None: all of its share. One GPU alone ignores it: it begins with all rows and
    # halves them while they do not fit. A resumed run begins with the number in the checkpoint.
    micro_batch_size: int | None = free(None)
    learning_rate: float  # the peak
    min_lr: float = 0.0  # the schedule's end value
    schedule: str = "cosine"  # from peak to end: "cosine", "linear", or "wsd", which stays at the peak before it falls
    decay_fraction: float = 0.2  # share of all steps in which "wsd" falls
    warmup_steps: int = 0  # steps in which the learning rate rises to the peak
    warmup_fraction: float | None = None  # or this share of all steps
    optimizer: str = "adamw"  # or "muon" for the matrices of the blocks: see optim.py
    momentum: float = 0.95  # Muon: weight of the old average gradient in the new average
    beta1: float = 0.9  # AdamW: weight of the old average gradient in the new average
    beta2: float = 0.95  # AdamW: the same for the average squared gradient
    weight_decay: float = 0.1  # of matrices; multiplied by the learning rate
    grad_clip: float = 1.0  # a gradient with a larger norm is scaled down to this norm
    max_skipped: int = free(5)  # stop after this many steps in a row whose gradient is not finite
    seed: int = 0  # of the initial weights and of the order of the data
    compile: bool = free(True)  # torch.compile: takes half a minute the first time, then seconds
    precision: str = free("auto")  # of matrix products; "auto": the fastest on this machine; the rest is float32
    gradient_checkpointing: bool = free(False)  # less memory: recompute activations in backward (arXiv:1604.06174)
    parallel: str = free("ddp")  # over processes: "ddp" copies the model to each, "fsdp" splits it
    deterministic: bool = free(False)  # slower; two runs give the same bytes; precision "auto" is float32 on a CPU
    timeout: float = free(600.0)  # seconds until a process that does not answer counts as dead
    log_every: int = free(10)  # steps between lines of metrics.jsonl
    eval_every: int = free(250)  # steps between evaluations
    eval_rows: int = free(128)  # rows of the held-out set that an evaluation reads, evenly spaced
    save_every: int = free(250)  # steps between checkpoints
    keep_checkpoints: int = free(2)  # newest step_… checkpoints to keep; final/ and best/ always stay

    def __post_init__(self):
        check_types(self)

        def expect(what: str, allowed: Callable[[float], bool], names: str) -> None:
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not allowed(value):
                    raise ValueError(f"{name} is {value!r}; expected {what}")

        positive = "steps epochs batch_size micro_batch_size learning_rate grad_clip log_every timeout"
        expect("a positive number", lambda x: 0 < x < math.inf, positive)
        expect("at least 1", lambda x: x >= 1, "eval_every eval_rows save_every keep_checkpoints max_skipped")
        expect("0 or more", lambda x: 0 <= x < math.inf, "warmup_steps weight_decay seed")
        expect("less than 2^63", lambda x: x < 2**63, "seed")
        expect("at least 0, less than 1", lambda x: 0 <= x < 1, "beta1 beta2 momentum")
        expect("more than 0, at most 1", lambda x: 0 < x <= 1, "decay_fraction")
        expect("0 to 1", lambda x: 0 <= x <= 1, "warmup_fraction")
        expect(f"0 to learning_rate, {self.learning_rate}", lambda x: 0 <= x <= self.learning_rate, "min_lr")
        expect(f"a divisor of {self.batch_size}", lambda x: self.batch_size % x == 0, "micro_batch_size")
        for name, known in CHOICES.items():
            expect(f"one of {', '.join(known)}", known.__contains__, name)
        if self.warmup_fraction is not None:
            expect("0, because warmup_fraction is set", lambda x: x == 0, "warmup_steps")
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"steps is {self.steps} and epochs is {self.epochs}; expected one of them, the other None")


FREE = {f.name for f in fields(TrainConfig) if "free" in f.metadata} | {"tensorboard"}  # a field of older runs


@dataclass
class Task:
    """The parts that a stage gives the loop. A batch is a tuple of CPU tensors with rows along the first axis."""

    # batch(step, rank, ranks): this process's rows of a step, counted from 0. Pure: a resumed run reads the same rows.
    batch: Callable[[int, int, int], tuple[Tensor, ...]]
    # loss(model, *batch): by name, averages over the batch's targets; `loss` is trained, all are logged. It must
    # call model(…), not one of its methods, or FSDP does not gather the weights.
    loss: Callable[..., dict[str, Tensor]]
    targets: Callable[..., int]  # targets(*batch): the number of targets in a batch
    # evaluate(model, rows): held-out metrics, with `val_loss`, the same in every process; reads `rows` rows at once.
    evaluate: Callable[[nn.Module, int], dict[str, float]]
    steps: int  # to train
    epoch: float  # steps per pass over the data
    flops: float  # floating-point operations per step, of all processes together
    tokens: Callable[..., int] | None = None  # tokens(*batch): tokens trained; None: as many as targets
    row: tuple[str, float] | None = None  # name of a row, its average tokens; None: ("row", context_length)
    seen: Callable[[int], dict[str, int]] = lambda step: {}  # tokens drawn from each set of a mixture before a step
    documents: Callable[[int], str] = lambda step: ""  # names the documents in a step's batch, for error messages


def plan_steps(config: TrainConfig, count: int, row: str) -> tuple[int, float]:
    """The steps to train, and the steps per epoch. count: rows of training data, each called `row` in messages."""
    size, rows = config.batch_size, plural(count, row)
    epoch = count / size
    steps = config.steps or max(1, round(config.epochs * epoch))
    # A proposal for little data: at least eight batches per epoch, and about 300 steps, but no more than ten epochs.
    batch = 2 ** int(math.log2(max(1, count / 8)))
    epochs = min(10, math.ceil(300 * batch / count))
    proposed = round(epochs * count / batch)
    micro = f"micro_batch_size={batch}, " if config.micro_batch_size and batch % config.micro_batch_size else ""
    advice = f"try batch_size={batch}, {micro}epochs={epochs}, which make {plural(proposed, 'step')}"
    if count < size:
        parallel.refuse(f"batch_size is {size}, but there are only {rows} to train on; {advice}")
    if config.epochs and steps < min(50, proposed):
        made = f"{config.epochs:g} epochs of {rows} in batches of {size}"
        log.warning(f"{made} make only {plural(steps, 'step')}; {advice}")
    if steps > 100 * epoch:
        log.warning(f"training reads {rows} {steps / epoch:,.0f} times and learns them by heart; more data is better")
    return steps, epoch


def train(model: Transformer, task: Task, config: TrainConfig, job: Stage, resume: str) -> None:
    """Trains the model to the end. Writes checkpoints, metrics.jsonl, the manifest. resume: "auto", or a checkpoint."""
    # UserError: a checkpoint of another config, or too many skipped steps. Stopped: by Ctrl-C or SIGTERM, after saving.
    trainer = Trainer(model, task, config, job, resume)
    trainer.begin()
    config, progress, scale, report = trainer.config, trainer.progress, trainer.scale, trainer.report
    steps, first, stopping = task.steps, progress.step, 0
    batch = trainer.read_batch(first) if first < steps else ()
    with parallel.Signals() as signals, report.start(progress) as bar:
        while progress.step < steps and not stopping:
            lr = learning_rate(config, progress.step, steps)
            for group in trainer.groups:
                group["lr"] = lr

            # Add up the gradient of the global batch's mean loss. A step that runs out of memory is repeated.
            targets = parallel.total(task.targets(*batch))
            tokens = parallel.total(task.tokens(*batch)) if task.tokens else targets
            try:
                means = trainer.add_gradients(batch, targets)
            except torch.OutOfMemoryError as error:
                trainer.hold_fewer_rows(error)
                continue
            if progress.step + 1 < steps:
                batch = trainer.read_batch(progress.step + 1)  # while the GPU computes

            # One bad batch must not ruin the weights: clip its gradient, or skip it. All processes see the same norm.
            norm = clip_gradient(trainer.parameters, config.grad_clip, scale.value)
            finite = math.isfinite(norm)
            for optimizer in trainer.optimizers:
                if finite:
                    optimizer.step()
                optimizer.zero_grad()
            progress.step += 1
            progress.tokens += tokens
            bar.update()
            if finite:
                progress.skipped_in_a_row = 0
            else:
                log.info(f"step {progress.step} is skipped: the norm of its gradient is {norm}")
                progress.skipped += 1
                progress.skipped_in_a_row += scale.value <= 1  # not counted while halving the scale may help
            scale.update(finite)
            if progress.skipped_in_a_row >= config.max_skipped:
                trainer.give_up()

            # Ctrl-C sets `caught` at any moment: read it once per step, and let all processes agree on it.
            stopping, last = parallel.largest(signals.caught), progress.step == steps
            # No regular checkpoint after a bad gradient: it may be better to resume from the checkpoint before it.
            saving = trainer.due(config.save_every) or progress.step == trainer.stable
            saving = stopping or last or (saving and not progress.skipped_in_a_row)
            due = trainer.due(config.eval_every) or trainer.due(config.log_every)
            if saving or due or progress.step == first + 1:
                means = {name: float(parallel.add_up(mean)) for name, mean in means.items()}
                trainer.record = report.measure(progress, means, lr, norm)
                if saving:  # saved first: a run killed while it evaluates resumes here and evaluates
                    trainer.save("final" if last else f"step_{progress.step:07d}")
                trainer.evaluate_and_log()
                if "val_loss" not in trainer.record:
                    report.show(trainer.record)
                report.restart_clock(progress)
            if progress.step == first + 1:
                log.info(f"memory: {machine.peak_memory(trainer.device)}")
    if progress.step < steps:
        name, command = signal.Signals(stopping).name, parallel.command(job.command)
        raise cli.Stopped(128 + stopping, f"{name}: saved at step {progress.step} of {steps}; resume with: {command}")
    trainer.finish()


class Trainer:
    """A run: the model, its optimizers, and how far it has come."""

    def __init__(self, model: Transformer, task: Task, config: TrainConfig, job: Stage, resume: str):
        if config.warmup_fraction is not None:
            warmup_steps = round(config.warmup_fraction * task.steps)
            config = replace(config, warmup_steps=warmup_steps, warmup_fraction=None)
        self.model, self.task, self.config, self.job = model, task, config, job
        self.progress, self.record, self.planned = Progress(), None, task.steps
        self.device, size, ranks = machine.pick_device(), config.batch_size, parallel.ranks()
        if size % ranks:
            parallel.refuse(f"batch_size is {size}, which {ranks} processes cannot share evenly; change one of them")
        machine.prepare(self.device, config)
        self.dtype = parallel.lead(lambda: machine.training_dtype(self.device, config))
        start = parallel.lead(lambda: checkpoint.find(job, resume))
        state = self.load(start) if start else None

        compiled = config.compile and machine.compile_blocks(model, self.device)
        actual = replace(config, compile=compiled)
        self.used = {"machine": machine.used(actual, self.dtype, ranks), "command": parallel.command(job.command)}

        model.gradient_checkpointing = config.gradient_checkpointing
        self.exchange = parallel.distribute(model.train(), config.parallel, self.device, self.dtype)
        wide = self.dtype == torch.float32
        self.autocast = nullcontext() if wide else torch.autocast(self.device.type, self.dtype)
        self.scale = LossScale(self.dtype)
        # After `distribute`: FSDP replaces the parameters, and an optimizer needs the new ones.
        self.optimizers = make_optimizers(model, config)
        self.rows = machine.rows_held(config, ranks)
        peak = machine.peak_flops(self.device, self.dtype)
        self.report = Report(job.directory, task, model.num_parameters(), peak and peak * ranks)
        # A "wsd" run can be extended from the step where its rate starts to fall: never remove that checkpoint.
        self.stable = decay_start(config, task.steps) if config.schedule == "wsd" else 0
        if start:
            self.restore(start, state)
        for line in machine.page(model, actual, self.dtype, task, ranks, self.rows):
            log.info(line)
        # After `restore`: loading a state replaces an optimizer's groups.
        self.groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        self.parameters = [p for group in self.groups for p in group["params"]]

    def load(self, start: Path) -> dict:
        """Loads the weights of a checkpoint. Returns the rest of its state, for `restore`."""
        counts = checkpoint.read_manifest(start)["counts"]
        if counts["step"] > self.planned:
            at = f"{start} is at step {counts['step']} already"
            parallel.refuse(f"{at}; set steps to that or more, not {self.planned}")
        self.record, self.planned, self.job.earlier = counts["record"], counts["steps"], counts["seconds"]
        checkpoint.load_weights(start, self.model)
        state = checkpoint.read(start, "state.pt")
        # On a CPU "auto" is timed, and a new timing must not change a run that has begun.
        measured = self.config.precision == "auto" and not self.config.deterministic
        if measured and self.device.type == state["device"] == "cpu":
            self.dtype = getattr(torch, state["dtype"])
        return state

    def restore(self, start: Path, state: dict) -> None:
        """Restores optimizers, loss scale, random generators and progress."""
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for number, values in saved["state"].items():
                for name, value in values.items():
                    values[name] = parallel.part(value, parameters[number])
            optimizer.load_state_dict(saved)
        if self.scale.moves and state["loss_scale"]["moves"]:
            vars(self.scale).update(state["loss_scale"])
        machine.set_random_state(state)
        self.progress = Progress(**state["progress"])
        self.rows = min(self.rows, self.progress.rows or self.rows)
        log.info(f"resumed from step {self.progress.step} ({start})")
        if changed := stage.changed_code(start, self.job.code):
            log.warning(f"{changed} changed since {start} was saved; the rest of the run uses the new code")

    def begin(self) -> None:
        """Prepares the directory. After a resume, evaluates and logs the checkpoint's step if that is due."""
        manifest, report = self.job.directory / "manifest.json", self.report
        parallel.lead(lambda: manifest.unlink(missing_ok=True))  # exists if this extends a finished run
        parallel.lead(lambda: report.open(self.progress.step))
        if self.record is None:
            return
        step, steps = self.progress.step, self.task.steps
        if step == steps:
            self.save("final")  # `steps` was lowered, or the run was killed before its manifest
        self.evaluate_and_log()
        if self.planned != steps:
            change = f"{self.record['lr']:.1e} to {learning_rate(self.config, step, steps):.1e}"
            log.info(f"the schedule now has {steps} steps: the learning rate changes from {change}")

    def read_batch(self, step: int) -> tuple[Tensor, ...]:
        batch = self.task.batch(step, parallel.rank(), parallel.ranks())
        # Pinned memory is copied to the GPU while the GPU computes.
        return tuple(tensor.pin_memory() for tensor in batch) if self.device.type == "cuda" else batch

    def add_gradients(self, batch: tuple[Tensor, ...], targets: int) -> dict[str, Tensor]:
        """Adds up the gradient over micro-batches. Returns this process's share of the averages to log."""
        # A micro-batch counts by its targets, not its rows: in SFT rows have different numbers of targets, and a mean
        # of means would depend on how the batch is cut. targets: in the global batch.
        self.generators = machine.random_state()
        means = {}
        micro_batches = list(zip(*(tensor.split(self.rows) for tensor in batch), strict=True))
        for micro_batch in micro_batches:
            weight = self.task.targets(*micro_batch) / max(1, targets)
            with self.autocast:
                parts = {name: mean * weight for name, mean in self.task.loss(self.model, *micro_batch).items()}
            # "ddp" sums gradients over processes once per step, in the last backward pass; "fsdp" does it in each.
            with self.exchange.exchanging() if micro_batch is micro_batches[-1] else nullcontext():
                (parts["loss"] * self.scale.value).backward()
            for name, part in parts.items():
                means[name] = means.get(name, 0.0) + part.detach()
        return means

    def hold_fewer_rows(self, error: torch.OutOfMemoryError) -> None:
        """Lowers the rows per micro-batch and undoes the failed attempt. Raises the error if that cannot help."""
        smaller = machine.fewer(self.rows)
        if parallel.ranks() > 1 or smaller == self.rows:
            raise error
        log.info(f"{self.rows} rows do not fit into memory: from now on {smaller} at a time")
        self.rows = self.progress.rows = smaller
        machine.set_random_state(self.generators)  # the failed attempt has drawn dropout masks
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        torch.compiler.reset()  # otherwise torch.compile makes one slower version for any number of rows

    def give_up(self) -> None:
        step, in_a_row = self.progress.step, plural(self.progress.skipped_in_a_row, "step")
        documents = self.task.documents(step - 1) or "documents unknown"
        parallel.refuse(
            f"the gradient was not finite in {in_a_row} in a row, the last in step {step} ({documents}). "
            "Lower learning_rate, lengthen warmup_steps, or look for the fault in the data, and start again: "
            f"{self.job.command} --force"
        )

    def due(self, every: int) -> bool:
        return self.progress.step % every == 0 or self.progress.step == self.task.steps

    def evaluate_and_log(self) -> None:
        """Evaluates and logs this step if it is due."""
        progress, record = self.progress, self.record
        if self.due(self.config.eval_every):
            self.model.eval()
            # Not compiled: evaluation batches have other shapes, and each shape would be compiled.
            with torch.no_grad(), torch.compiler.set_stance("force_eager"), self.autocast:
                record.update(self.task.evaluate(self.model, self.rows))
            self.model.train()
            self.report.show(record)
            best, late = progress.best_step, progress.best_step + 2 * self.config.eval_every
            if record["val_loss"] < progress.best_loss:
                progress.best_loss, progress.best_step = record["val_loss"], progress.step
                self.save("best")
            # The data repeats, and two evaluations gave no better loss: warn, once for each best step.
            elif progress.step >= late and progress.step > self.task.epoch and progress.warned_of != best:
                progress.warned_of = best
                log.warning(
                    f"validation loss was lowest at step {best}, {progress.best_loss:.4f}, and no better since: the "
                    "model seems to overfit. best/ keeps that step; more text or fewer epochs may help"
                )
        if self.due(self.config.log_every) or progress.step == 1 or "val_loss" in record:
            self.report.write(record)

    def save(self, name: str) -> None:
        """Saves a checkpoint. All processes must call it, because FSDP gathers their shares; only the first writes."""
        # State and weights are all that a resumed run needs: batches and learning rates are functions of the step.
        state = {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}
        state |= {"progress": vars(self.progress), "loss_scale": vars(self.scale)} | machine.random_state()
        state |= {"device": self.device.type, "dtype": str(self.dtype).removeprefix("torch.")}
        file, weights = checkpoint.weights(self.model)
        files = parallel.whole({file: weights, "state.pt": state})

        def write() -> None:
            counts = {"step": self.progress.step, "steps": self.task.steps, "seconds": round(self.job.seconds(), 1)}
            about = self.job.about({}, counts | {"record": self.record} | self.used)
            if self.report.path.exists():
                stage.sync(self.report.path)  # the log must be on the disk before its checkpoint
            checkpoint.save(self.job.directory / name, files, about)
            steps = checkpoint.steps(self.job.directory)
            numbered = [path for step, path in steps if path.name != "final" and step != self.stable]
            for path in numbered[self.config.keep_checkpoints :]:
                checkpoint.remove(path)

        parallel.lead(write)

    def finish(self) -> None:
        steps, skipped = self.progress.step, self.progress.skipped
        if skipped:
            log.warning(f"{skipped} of {steps} steps were skipped: their gradient was not finite")
        counts = {"step": steps, "parameters": self.model.num_parameters(), "record": self.record}
        final = self.job.directory / "final"
        parallel.lead(lambda: self.job.finish(counts | self.used, final.iterdir()))


@dataclass
class Progress:
    """How far a run has come; saved in every checkpoint."""

    step: int = 0  # steps made, skipped ones included
    tokens: int = 0  # tokens trained in these steps
    best_loss: float = math.inf  # lowest validation loss so far
    best_step: int = 0  # the step with that loss
    warned_of: int = -1  # best step in the last overfitting warning
    skipped: int = 0  # steps that changed nothing, because their gradient was not finite
    skipped_in_a_row: int = 0  # skipped steps since the last good one, not counting float16 overflows
    rows: int | None = None  # per micro-batch, if the GPU ran out of memory; None: as configured


FIRST_SCALE, GOOD_STEPS = 65_536.0, 2_000


class LossScale:
    """Keeps gradients in float16's range (arXiv:1710.03740): small ones would become 0, large ones infinite."""

    # An overflow halves `value`, GOOD_STEPS steps without one double it. bfloat16 has float32's range: no scale.

    def __init__(self, dtype: torch.dtype):
        self.moves = dtype == torch.float16
        self.value, self.good = FIRST_SCALE if self.moves else 1.0, 0

    def update(self, finite: bool) -> None:
        self.good = self.good + 1 if self.moves and finite else 0
        if self.moves and not finite:
            self.value /= 2
        elif self.good == GOOD_STEPS:
            self.value, self.good = 2 * self.value, 0


def clip_gradient(parameters: list[nn.Parameter], limit: float, scale: float) -> float:
    """Divides the gradient by the loss scale and clips its norm to `limit`. Returns the norm before clipping."""
    if scale != 1:
        for p in parameters:
            if p.grad is not None:
                p.grad.div_(scale)
    norm = nn.utils.clip_grad_norm_(parameters, limit)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def is_done(job: Stage, steps: int) -> bool:
    """True if the stage is trained to exactly these steps and undamaged."""
    if not (manifest := stage.read_manifest(job.directory)):
        return False
    job.must_match(job.directory)
    return manifest["counts"]["step"] == steps and not stage.damage(job.directory, manifest["wrote"])


def run(job: Stage, make: Callable[[], Transformer], task: Task, config: TrainConfig, force: bool, resume: str) -> None:
    """Trains in the stage's locked directory, unless that is done. make: returns the model to train."""
    if force and resume != "auto":
        parallel.refuse("--force discards what --resume would continue; use one of them")
    if not force and resume == "auto" and parallel.lead(lambda: is_done(job, task.steps)):
        log.info(f"{job.directory} is up to date")
        return
    with ExitStack() as held:
        parallel.lead(lambda: held.enter_context(job.making(keep=not force)))
        parallel.lead(lambda: checkpoint.recover(job.directory))
        torch.manual_seed(config.seed)  # before `make` draws the initial weights
        model = make()
        with machine.fitting(model.config, config, parallel.ranks()):
            train(model, task, config, job, resume)
        log.info(f"trained: {job.directory / 'final'}")
