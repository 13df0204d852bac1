"""The report of a training run: metrics.jsonl, a progress bar on a terminal, plain lines elsewhere."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

import generate
import parallel
import stage
from cli import log, visible

SHOWN = ("val_loss", "val_perplexity", "val_bits_per_byte", "val_margin", "val_accuracy", "val_kl")


class Report:
    """Shows and saves the numbers of a run. task: trainer.Task. progress: trainer.Progress."""

    def __init__(self, directory: Path, task, parameters: int, peak: float | None):
        """parameters: their number. peak: FLOP/s of all processes together, for the MFU; None if unknown."""
        self.path = directory / "metrics.jsonl"
        self.task, self.parameters, self.peak = task, parameters, peak

    def open(self, step: int) -> None:
        """Removes the lines of this and later steps: an interrupted run wrote them after its last checkpoint."""
        kept = b""
        for line in self.path.read_bytes().splitlines() if self.path.exists() else []:
            with contextlib.suppress(ValueError):  # the run was killed while it wrote this line
                kept += line + b"\n" if json.loads(line)["step"] < step else b""
        stage.write(self.path, kept)

    def start(self, progress) -> tqdm:
        """Starts the clock and returns the bar."""
        self.first, self.shown, self.hidden = progress.step, 0.0, parallel.rank() > 0 or not sys.stderr.isatty()
        self.restart_clock(progress)
        shape = "{n_fmt}/{total_fmt} |{bar:10}| {remaining} left{postfix}"
        steps, hidden = self.task.steps, self.hidden
        self.bar = tqdm(total=steps, initial=self.first, bar_format=shape, disable=hidden, dynamic_ncols=True)
        return self.bar

    def restart_clock(self, progress) -> None:
        """Leaves saving and evaluation out of the speed, and the first step, which compiles, out of the time left."""
        self.time, self.step, self.tokens = time.perf_counter(), progress.step, progress.tokens
        if progress.step <= self.first + 1:
            self.began, self.since = self.time, progress.step

    def measure(self, progress, means: dict[str, float], lr: float, norm: float) -> dict:
        """The record of a step. means: the averages that the task's loss returned."""
        seconds = time.perf_counter() - self.time
        record = {
            "step": progress.step,
            **means,
            "lr": lr,
            "grad_norm": norm,
            "tokens": progress.tokens,
            "tokens_per_parameter": progress.tokens / self.parameters,
            "epoch": progress.step / self.task.epoch,
            "tokens_per_second": (progress.tokens - self.tokens) / seconds,
            "skipped": progress.skipped,
        }
        if self.peak:  # model FLOPs utilisation (arXiv:2204.02311): share of the hardware's peak
            record["mfu"] = (progress.step - self.step) * self.task.flops / seconds / self.peak
        if seen := self.task.seen(progress.step):
            record["seen"] = seen
        self.bar.set_postfix_str(self.numbers(record))
        return record

    def numbers(self, record: dict) -> str:
        """The numbers in one line, the main ones first: a narrow terminal cuts off the end."""
        mfu = f", {record['mfu']:.1%} MFU" if "mfu" in record else ""
        text = f"loss {record['loss']:.4f}, {record['tokens_per_second']:,.0f} tokens/s{mfu}"
        return f"{text}, epoch {record['epoch']:.2f}, lr {record['lr']:.1e}, gradient {record['grad_norm']:.2f}"

    def show(self, record: dict) -> None:
        """Logs a line for an evaluation and, without a terminal, for the first step and every ten seconds."""
        line, now = f"step {record['step']} of {self.task.steps}: {self.numbers(record)}", time.perf_counter()
        for name in filter(record.__contains__, SHOWN):
            line += f", {name.replace('_', ' ')} {record[name]:.4f}"
        if "val_loss" in record:
            log.info(line)
        elif self.hidden and (now - self.shown > 10 or record["step"] == self.first + 1):
            left = (now - self.began) / (record["step"] - self.since) * (self.task.steps - record["step"])
            log.info(f"{line}, {left // 60:.0f} min {left % 60:.0f} s left")
            self.shown = now

    def write(self, record: dict) -> None:
        """Appends a record to metrics.jsonl. JSON has no NaN: a number that is not finite becomes null."""
        if parallel.rank():
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")


def show_samples(model, mode: str, prompts: list[tuple], text: Callable, labels: tuple[str, str], **options) -> None:
    """Logs how the model continues each prompt: a loss does not reveal nonsense. Changes no random state."""
    # mode: TrainConfig.parallel. prompts: (text, ids). text(ids): the text of new ids. options: of `generate`.
    # With FSDP one process cannot generate alone, because it holds a share of the weights.
    if parallel.rank() or (parallel.ranks() > 1 and mode == "fsdp"):
        return
    no_logits = contextlib.suppress(ValueError)  # they are not finite: the held-out loss tells that
    with torch.autocast(model.embed.weight.device.type, enabled=False), no_logits:
        written = generate.generate(model, [ids for _, ids in prompts], **options)
        for (prompt, _), ids in zip(prompts, written, strict=True):
            asked, said = (visible(" ".join(part.split())) for part in (prompt, text(ids)))
            log.info(f"{labels[0]}{asked[-200:]}\n{labels[1]}{said}")
