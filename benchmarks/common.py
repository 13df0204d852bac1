"""What all benchmarks share: timing in turn, processes of their own, results, and the tiny experiment of quick runs."""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import runpy
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch._dynamo  # optimizers import it: once here, not in every process

import cli
import machine
import stage

RESULTS = Path(__file__).parent / "results"
FORK = multiprocessing.get_context("fork")  # fast; only before this process computes with torch


def interleaved(rounds: int, functions: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of each function in each round, timed in turn after an uncounted round: a slow minute slows all."""
    seconds = {name: [] for name in functions}
    for i in range(rounds + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if i:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """The median over the rounds of the quotient."""
    return round(statistics.median(a / b for a, b in zip(numerator, denominator, strict=True)), 3)


def output(*command: str) -> str:
    """What a command prints; empty if it is not installed."""
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def about(command: str) -> dict:
    """How results were made: the command, the commit, the machine, versions of packages."""
    commit = output("git", "-C", str(RESULTS), "describe", "--always", "--dirty", "--exclude=*")
    found = {"command": command, "commit": commit, "machine": machine.name(machine.pick_device())}
    return found | {"versions": stage.versions()}


def write(name: str, command: str, found: dict, quick: bool = False) -> None:
    """Prints the results, and writes them to results/NAME.json unless this was a quick run."""
    found = about(command) | found
    print(json.dumps(found, indent=2))
    if not quick:
        RESULTS.mkdir(exist_ok=True)
        stage.write_json(RESULTS / f"{name}.json", found)


# ----------------------------------------------------------------------------------------------- processes of their own


class Worker:
    """A process that holds a function and calls it when asked; its errors are shown."""

    def __init__(self, name: str, make: Callable[[], Callable]):
        """make: called in the process; returns the function."""
        self.name, (self.pipe, theirs) = name, FORK.Pipe()
        self.process = FORK.Process(target=_answer, args=(make, theirs))
        self.process.start()
        theirs.close()

    def ask(self, *arguments):
        """What the function returns. RuntimeError if the process has died."""
        try:
            self.pipe.send(arguments)
            return self.pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join()
            status = self.process.exitcode
            raise RuntimeError(f"the process of {self.name} ended with status {status}; see above") from None

    def end(self) -> None:
        self.process.kill()  # it is idle or has failed: nothing is lost
        self.process.join()


def _answer(make: Callable[[], Callable], pipe) -> None:
    cli.end_with_parent(9)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, and the parent its workers
    function = make()
    while True:
        pipe.send(function(*pipe.recv()))


def in_turn(rounds: int, makers: dict[str, Callable[[], Callable]]) -> dict[str, list]:
    """What each maker's function returns in each round: each in a process of its own, asked in turn."""
    workers = {name: Worker(name, make) for name, make in makers.items()}
    found = {name: [] for name in makers}
    try:
        for i in range(rounds + 1):  # the first round does not count
            for name, worker in workers.items():
                answer = worker.ask()
                time.sleep(0.05)  # until its threads sleep
                if i:
                    found[name].append(answer)
    finally:
        for worker in workers.values():
            worker.end()
    return found


def once(name: str, function: Callable, *arguments):
    """What a function returns that runs in a process of its own."""
    worker = Worker(name, lambda: function)
    try:
        return worker.ask(*arguments)
    finally:
        worker.end()


def command(*arguments: str, stdout: int | None = None) -> multiprocessing.Process:
    """Starts a command of the project, such as pipeline.py CONFIG, in a forked process."""

    def run() -> None:
        cli.end_with_parent(15)
        if stdout is not None:
            os.dup2(stdout, 1)
            kept, sys.stdout = sys.stdout, open(1, "w")  # noqa: F841, SIM115  # the old object would close 1
        sys.argv = list(arguments)
        runpy.run_path(arguments[0], run_name="__main__")

    process = FORK.Process(target=run)
    process.start()
    return process


def training_step(model: torch.nn.Module, optimizers: list, loss: Callable[..., torch.Tensor]) -> Callable[..., None]:
    """A function that makes an optimizer step. loss: returns the loss of its arguments."""
    trained = [p for p in model.parameters() if p.requires_grad]

    def step(*batch) -> None:
        loss(*batch).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def several(step: Callable[[], int], steps: int) -> Callable[[], tuple[float, int, float]]:
    """A function that makes several steps. It returns seconds, the sum of what the steps return, and peak MiB."""

    def run() -> tuple[float, int, float]:
        started = time.perf_counter()
        total = sum(step() for _ in range(steps))
        return time.perf_counter() - started, total, peak_mib()

    return run


def peak_mib() -> float:
    """The most memory that this process has had until now, in MiB."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


# --------------------------------------------------------------------------------------------------------- quick runs

CONFIG = """
from dataclasses import replace

from configs.demo import experiment as demo
from data.corpus import CorpusConfig
from data.sources import Files
from dpo.data import PairConfig
from dpo.pairs import Pairs
from dpo.train import DPOConfig
from model import ModelConfig
from sft.conversations import Chats
from sft.data import ConversationConfig
from sft.train import SFTConfig
from tokenizer.train import TokenizerConfig

experiment = replace(
    demo,
    name="quick",
    model=ModelConfig(vocab_size=400, context_length=128, n_layers=1, d_model=32, n_heads=1),
    corpus=CorpusConfig(sources=(Files(paths=("text.jsonl",)),)),
    tokenizer=TokenizerConfig(vocab_size=400),
    pretrain=replace(demo.pretrain, steps=2, warmup_steps=1),
    sft=SFTConfig(data=ConversationConfig(sources=(Chats(paths=("chats.jsonl",)),), val_fraction=0.2)),
    dpo=DPOConfig(data=PairConfig(sources=(Pairs(paths=("pairs.jsonl",)),), val_fraction=0.2)),
)
"""
WORDS = """the of and to in a is that it was for on are as with his they at be this from have or by one had not but what
all were when we there can an your which their said if do will each about how up out them then she many some so these
would other into has more her two like him see time could no make than first been its who now people my made over did
down only way find use may water long little very after words called just where most know get through back much before
go good new write our used me man too any day same right look think also around another came come work"""


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS.split(), k=words)).capitalize() + "."


def parser(description: str, config: str) -> argparse.ArgumentParser:
    """A parser with CONFIG, which has a default, and --quick."""
    p = cli.parser(description, config=False)
    p.add_argument("config", nargs="?", default=config, metavar="CONFIG", help=f"the experiment ({config})")
    p.add_argument("--quick", action="store_true", help="run everything once, on tiny data of its own; write nothing")
    return p


def run(main: Callable[[argparse.Namespace], None], p: argparse.ArgumentParser) -> None:
    """Runs a benchmark; with --quick, on the tiny experiment."""

    def with_experiment(arguments: argparse.Namespace) -> None:
        if not arguments.quick:
            main(arguments)
            return
        with tiny_experiment() as arguments.config:
            main(arguments)

    cli.run(with_experiment, p.parse_args())


@contextlib.contextmanager
def tiny_experiment() -> Iterator[str]:
    """A temporary directory as DATA and RUNS, with a config, text, chats and pairs. Gives the config's path."""
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as place:
        texts, chats, pairs = [], [], []
        for i in range(200):
            texts.append({"text": " ".join(sentence(rng, 12) for _ in range(10))})
            prompt = f"What is {i}? {sentence(rng, 5)}"
            chats.append({"prompt": prompt, "response": sentence(rng, 8)})
            pairs.append({"prompt": prompt, "chosen": sentence(rng, 8), "rejected": sentence(rng, 5)})
        for name, records in {"text": texts, "chats": chats, "pairs": pairs}.items():
            lines = [json.dumps(record) for record in records]
            (Path(place) / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        config = Path(place) / "quick.py"
        config.write_text(CONFIG)
        os.environ |= {"DATA": place, "RUNS": place}
        yield str(config)
