"""Several processes do what one does, and none of them is left behind."""

import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import checkpoint
import stage
from tests.conftest import ROOT, Place
from tests.test_train import assert_same_run

# Trains with a fault in one of the processes: a signal when it reads a step's batch, a loss that is not a number, or
# two seconds from its end to its last words.
FAULT = """
import os, signal, sys, time, torch
sys.path.insert(0, os.getcwd())
import cli, pipeline
from data.batches import Mixture
from model import Transformer
rank, fault, at = int(sys.argv.pop(1)), sys.argv.pop(1), int(sys.argv.pop(1))
first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
if int(os.environ.get("RANK", 0)) == rank and first:
    batch, forward, leave, now = Mixture.batch, Transformer.forward, cli._leave, [0]
    def reading(self, step, *rest):
        now[0] = step
        if step == at and fault == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if step == at and fault.startswith("SIG"):
            os.kill(os.getpid(), signal.Signals[fault])
        return batch(self, step, *rest)
    def computing(self, *rest):
        bad = self.training and now[0] == at and fault == "nan"
        return forward(self, *rest) * (float("nan") if bad else 1)
    Mixture.batch, Transformer.forward = reading, computing
    cli._leave = lambda *rest: (time.sleep(2 * (fault == "late")), leave(*rest))
cli.run(pipeline.main, pipeline.parser().parse_args([*sys.argv[1:], "pretrain"]))
"""


NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}  # a machine with one GPU could not run two processes


def faulty(place: Place) -> Path:
    """The script that trains with a fault."""
    script = place.path / "fault.py"
    script.write_text(FAULT)
    return script


def start(place: Place, count: int, *fault, restarts: int = 0) -> subprocess.Popen:
    """Starts training in several processes. fault: its rank, its kind and its step."""
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", f"--max-restarts={restarts}"]
    command += [*([faulty(place), *fault] if fault else ["train.py"]), place.config]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    words, env = [sys.executable, *map(str, command)], place.env | NO_GPU
    return subprocess.Popen(words, cwd=ROOT, env=env, text=True, start_new_session=True, **pipes)


def train(place: Place, count: int, *fault, works: bool = True, restarts: int = 0) -> str:
    """Trains to the end and returns the output. No process may be left, however it ended."""
    process = start(place, count, *fault, restarts=restarts)
    out, _ = process.communicate(timeout=240)
    assert (process.returncode == 0) is works, out
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    return out


def started(place: Place) -> subprocess.Popen:
    """A long training run in two processes that has made its first step."""
    place.edit(("steps=24", "steps=100_000"))
    process = start(place, 2)
    while "step 1 of" not in (line := process.stdout.readline()):
        assert line
    return process


def another(place: Place, path: Path) -> Place:
    return Place(shutil.copytree(place.path, path, dirs_exist_ok=True))


def assert_near(place: Place, made: Place) -> None:
    """The same losses, gradients and weights, except for the order of float32 sums."""
    names = ("step", "loss", "grad_norm", "lr", "tokens", "epoch", "val_loss", "val_bits_per_byte")
    for ours, theirs in zip(place.metrics(), made.metrics(), strict=True):
        for name in names:
            assert ours.get(name, 0) == pytest.approx(theirs.get(name, 0), rel=2e-5), name
    ours, theirs = (checkpoint.load_model(p.runs / "mini/pretrain/final").state_dict() for p in (place, made))
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-3, atol=2e-5)


@pytest.fixture(scope="session")
def made(made: Place, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Trained without a GPU by one process, as the others here are."""
    if not torch.cuda.is_available():
        return made
    place = another(made, tmp_path_factory.mktemp("alone"))
    shutil.rmtree(place.runs / "mini/pretrain")
    place.env |= NO_GPU
    place.run("train.py", place.config)
    return place


@pytest.fixture(scope="session")
def two(made: Place, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Trained by two processes without a disturbance."""
    place = another(made, tmp_path_factory.mktemp("two"))
    shutil.rmtree(place.runs / "mini/pretrain")
    place.output = train(place, 2)
    return place


def test_two_processes_train_as_one(two: Place, made: Place):
    assert_near(two, made)
    assert two.output.count("step 1 of 24") == 1  # only the first one prints
    assert "2 processes" in two.output


@pytest.mark.parametrize(
    ("count", "changes"),
    [
        pytest.param(2, 'parallel="fsdp"', id="fsdp"),
        pytest.param(3, 'parallel="ddp"', id="three", marks=pytest.mark.slow),
        pytest.param(3, 'parallel="fsdp"', id="fsdp of three, shares of unequal size", marks=pytest.mark.slow),
        pytest.param(2, 'parallel="fsdp", gradient_checkpointing=True', id="recomputed", marks=pytest.mark.slow),
    ],
)
def test_any_way_of_sharing_the_work_gives_the_same(packed: Place, made: Place, count, changes):
    packed.edit(("compile=False", f"compile=False, {changes}"))
    train(packed, count)
    assert_near(packed, made)


@pytest.mark.slow
def test_compiled_blocks_can_be_shared_too(packed: Place, made: Place):
    packed.edit(("compile=False", 'compile=True, parallel="fsdp"'))
    train(packed, 2)
    assert_near(packed, made)
    counts = stage.read_manifest(packed.runs / "mini/pretrain")["counts"]
    assert counts["machine"].endswith("2 processes by fsdp; float32, compiled")


@pytest.mark.slow
def test_processes_that_run_out_of_memory_say_what_to_change(packed: Place):
    out = train(packed, 2, 0, "memory", 3, works=False)
    assert "error: out of memory; set micro_batch_size=2 (now 4), then" in out


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_muon_too(packed: Place, tmp_path_factory: pytest.TempPathFactory, way):
    packed.edit(("compile=False", 'compile=False, optimizer="muon"'))
    alone = another(packed, tmp_path_factory.mktemp("alone"))
    alone.run("train.py", alone.config)
    packed.edit(("compile=False", f'compile=False, parallel="{way}"'))
    train(packed, 2)
    assert_near(packed, alone)


def test_a_killed_process_ends_all_and_the_run_resumes_exactly(packed: Place, two: Place):
    began = time.monotonic()
    out = train(packed, 2, 1, "SIGKILL", 12, works=False)
    assert time.monotonic() - began < 200  # far less than the 600 s that processes wait for each other
    assert 'fault.py", line' not in out  # torchrun has a traceback of its own, we have none
    assert "resumed from step 10 " in train(packed, 2)
    assert_same_run(packed, two)


@pytest.mark.slow
def test_torchrun_restarts_killed_processes(packed: Place, two: Place):
    assert "resumed from step 10 " in train(packed, 2, 1, "SIGKILL", 12, restarts=1)
    assert_same_run(packed, two)


@pytest.mark.slow
def test_from_one_to_two_to_one(packed: Place, made: Place):
    """Each run is killed; the next has another number of processes, the second is sharded."""
    killed = packed.start(faulty(packed), 0, "SIGKILL", 8, packed.config)
    killed.communicate(timeout=60)
    assert killed.returncode == 128 + signal.SIGKILL
    packed.edit(("compile=False", 'compile=False, parallel="fsdp"'))
    assert "resumed from step 5 " in train(packed, 2, 1, "SIGKILL", 18, works=False)
    assert "resumed from step 15 " in packed.run("train.py", packed.config).stdout
    assert_near(packed, made)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_three_resume_exactly_too(packed: Place, tmp_path_factory: pytest.TempPathFactory, way):
    """With two, the order of a sum does not matter. It resumes after an evaluation that is not the best."""
    packed.edit(("compile=False", f'compile=False, parallel="{way}"'), ("learning_rate=3e-3", "learning_rate=0.1"))
    packed.edit(("eval_every=8", "eval_every=1"), ("save_every=5", "save_every=1"))
    undisturbed = another(packed, tmp_path_factory.mktemp("undisturbed"))
    train(undisturbed, 3)
    pairs = itertools.pairwise(m for m in undisturbed.metrics() if "val_loss" in m)
    step = next(b["step"] for a, b in pairs if b["val_loss"] > a["val_loss"])
    assert step < 20
    train(packed, 3, 1, "SIGKILL", step + 1, works=False)
    assert f"resumed from step {step} " in train(packed, 3)
    assert_same_run(packed, undisturbed)


@pytest.mark.slow
def test_without_torchrun_its_processes_save_and_end(packed: Place):
    process = started(packed)
    process.kill()
    process.communicate(timeout=60)  # which ends when they have, because they hold the other end of its pipe
    packed.edit(("steps=100_000", "steps=100_001"))
    again = packed.start("train.py", packed.config)
    again.wait_for("resumed from step")
    again.kill()
    again.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_all_after_the_same_step(packed: Place, signum):
    process = started(packed)
    os.kill(process.pid, signum)
    out, _ = process.communicate(timeout=60)
    step = int(re.search(r"saved at step (\d+) of 100000; resume with: torchrun --nproc_per_node=2 train.py", out)[1])
    packed.edit(("steps=100_000", f"steps={step + 3}"))
    assert f"resumed from step {step} " in train(packed, 2)


@pytest.mark.slow
def test_a_process_that_hangs_is_not_waited_for_for_ever(packed: Place):
    """Without torchrun, which would notice nothing either."""
    packed.edit(("compile=False", "compile=False, timeout=3.0"))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        packed.env |= {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    processes = []
    for rank in range(2):
        packed.env |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(packed.start(faulty(packed), 1, "SIGSTOP", 7, packed.config))
    _, err = processes[0].communicate(timeout=60)
    assert processes[0].returncode == 1
    assert "has not answered for 3 s" in err
    assert "Traceback" not in err
    processes[1].kill()
    processes[1].communicate()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_a_gradient_that_is_not_finite_in_one_process_is_skipped_by_all(packed: Place, way):
    packed.edit(("compile=False", f'compile=False, parallel="{way}"'))
    assert "step 12 is skipped" in train(packed, 2, 1, "nan", 11)
    log = packed.metrics()
    assert [m["skipped"] for m in log] == [0] * 11 + [1] * 13
    assert [m["step"] for m in log if m["loss"] is None] == [12]
    assert all(m["grad_norm"] > 0 for m in log if m["step"] != 12)
    weights = checkpoint.read(packed.runs / "mini/pretrain/final", "weights.pt")
    assert all(weight.isfinite().all() for weight in weights.values())
    assert log[-1]["val_loss"] < log[7]["val_loss"]


@pytest.mark.slow
def test_a_mistake_is_named_once(packed: Place):
    packed.edit(("batch_size=12", "batch_size=9"), ("micro_batch_size=4", "micro_batch_size=3"))
    [error] = [line for line in train(packed, 2, 0, "late", 0, works=False).splitlines() if "error: " in line]
    assert "batch_size is 9, which 2 processes cannot share" in error
