"""The loop: what is optimised, and that a run cannot be harmed by killing it."""

import hashlib
import itertools
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import generate
import parallel
import stage
import train
import trainer
from cli import UserError
from data.batches import mixture
from model import ModelConfig, Transformer
from optim import learning_rate, make_optimizers
from stage import Stage
from tests.conftest import Place
from trainer import TrainConfig

CONFIG = TrainConfig(steps=10, batch_size=8, learning_rate=1e-2, compile=False, precision="float32")

# Runs train.py in a process that sends itself SIGKILL at the n-th call of a function: a real signal, a known moment.
KILL = """
import os, signal, sys
import {module}
def killing(original, calls=[0]):
    def wrapped(*a, **k):
        calls[0] += 1
        if calls[0] == {at}:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*a, **k)
    return wrapped
{module}.{function} = killing({module}.{function})
import cli, train
p = cli.parser("")
cli.add_training_switches(p)
cli.run(train.main, p.parse_args())
"""


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def assert_same_run(place: Place, made: Place) -> None:
    """The same bytes of weights and of everything that resuming needs, and the same log."""
    for file in ("weights.pt", "state.pt"):
        for name in ("final", "best"):
            ours, theirs = (p.runs / "mini/pretrain" / name / file for p in (place, made))
            assert digest(ours) == digest(theirs)
    assert place.metrics() == made.metrics()


# --------------------------------------------------------------------------------------------------------- in process


def test_learning_rate_by_hand():
    config = TrainConfig(steps=12, batch_size=1, learning_rate=1.0, min_lr=0.2, warmup_steps=4)
    found = [learning_rate(config, step, 12) for step in range(13)]
    assert found[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert found[8] == pytest.approx(0.6)  # half-way down the cosine
    assert found[12] == pytest.approx(0.2)
    assert all(a > b for a, b in itertools.pairwise(found[4:]))
    config = replace(config, schedule="linear")
    found = [learning_rate(config, step, 12) for step in range(13)]
    assert found == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])


def test_norms_are_not_decayed():
    model = Transformer(ModelConfig(vocab_size=9, n_layers=1, d_model=4, n_heads=1))
    matrices, vectors = make_optimizers(model, CONFIG)[0].param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert sum(p.numel() for p in vectors["params"]) == 3 * 4  # two norms of the block and the last one
    assert sum(p.numel() for p in matrices["params"]) + 12 == model.num_parameters()


class Numbers:
    """0 1 2 3 … modulo 61, in the place of packed tokens."""

    name = file = "numbers"
    tokens = np.arange(20_000) % 61
    starts, first = np.arange(0, 20_000, 61), 0
    bytes = 20_000


def counting(config: TrainConfig, length: int = 16) -> tuple[Transformer, trainer.Task]:
    torch.manual_seed(0)
    shape = ModelConfig(vocab_size=61, context_length=length, n_layers=1, d_model=32, n_heads=2)
    return Transformer(shape), predicting(shape, config, Numbers, Numbers)


def predicting(shape: ModelConfig, config: TrainConfig, training: type, validation: type) -> trainer.Task:
    """The task of pretraining."""
    batches = mixture("x", (), training, {}, shape.context_length, config.batch_size, config.seed)
    return train.pretraining(config, shape, batches, validation, mixed=False)


def run_counting(directory: Path, config: TrainConfig) -> tuple[Transformer, list[dict]]:
    """Trains on counting; returns the model and what was logged."""
    model, task = counting(config)
    job = Stage(directory, {"model": model.config, "pretrain": config}, {}, "", stage.__file__)
    with job.making():
        trainer.train(model, task, config, job, "auto")
    return model, [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_model_trained_on_counting_predicts_the_next_number(tmp_path):
    model, _ = run_counting(tmp_path, replace(CONFIG, steps=150, warmup_steps=10))
    assert generate.generate(model, [7], 12, temperature=0) == list(range(8, 20))  # not 9, 11, …: shifted once
    assert generate.generate(model, [59], 4, temperature=0) == [60, 0, 1, 2]


def test_micro_batches_give_the_gradient_of_the_whole_batch(tmp_path):
    logs = []
    for rows in (8, 4, 1):
        config = replace(CONFIG, steps=2, micro_batch_size=rows, log_every=1)
        logs.append(run_counting(tmp_path / str(rows), config)[1])
    for name in ("loss", "grad_norm"):
        assert [m[name] for m in logs[1]] == pytest.approx([m[name] for m in logs[0]], rel=1e-4)
        assert [m[name] for m in logs[2]] == pytest.approx([m[name] for m in logs[0]], rel=1e-4)


def test_gradient_norm_is_logged_as_it_was_before_clipping(tmp_path):
    config = replace(CONFIG, steps=1, grad_clip=1e-3)
    model, task = counting(config)
    task.loss(model, *task.batch(0))["loss"].backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    assert run_counting(tmp_path, config)[1][0]["grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_a_long_gradient_is_clipped_after_the_loss_scale_is_taken_out():
    parameters = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([4.0, 0.0]), torch.tensor([-8.0])
    norm = trainer.clip_gradient(parameters, 0.5, scale=2.0)
    assert norm == pytest.approx(math.sqrt(20))  # of (2, 0) and (-4), before clipping
    assert torch.cat([p.grad for p in parameters]).norm() == pytest.approx(0.5, rel=1e-5)
    assert parameters[0].grad[0] / parameters[1].grad[0] == pytest.approx(-0.5)


def test_micro_batches_count_by_their_targets(tmp_path):
    """Rows with few targets and rows with many: the gradient is that of the mean over all targets of the batch."""
    norms = []
    for rows in (4, 1):
        config = replace(CONFIG, steps=1, batch_size=4, micro_batch_size=rows, log_every=1)
        model, task = counting(config)

        def ragged(step: int, rank: int, ranks: int, batch=task.batch) -> tuple[torch.Tensor, torch.Tensor]:
            tokens, targets = batch(step, rank, ranks)
            targets = targets.clone()
            for row, kept in enumerate((16, 9, 2, 1)):
                targets[row, kept:] = -100
            return tokens, targets

        task = replace(task, batch=ragged, targets=lambda tokens, targets: int((targets != -100).sum()))
        job = Stage(tmp_path / str(rows), {"rows": rows}, {}, "", stage.__file__)
        with job.making():
            trainer.train(model, task, config, job, "auto")
        log = json.loads((tmp_path / str(rows) / "metrics.jsonl").read_text().splitlines()[0])
        norms.append((log["loss"], log["grad_norm"]))
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


class Crash(Exception):
    """Ends a run in this process as a kill would: nothing is saved any more."""


def train_counting(directory: Path, config: TrainConfig, crash: int = -1, **changes) -> tuple[dict, dict]:
    """Trains on counting, the task changed, from where it was left; crashes before a step. What the end is saved as."""
    model, task = counting(config)
    task = replace(task, **changes)

    def batch(step: int, *part):
        if step == crash:
            raise Crash
        return counting(config)[1].batch(step, *part)

    job = Stage(directory, {"model": model.config, "pretrain": config}, {}, "python train.py x.py", stage.__file__)
    with job.making(keep=True):
        checkpoint.recover(directory)
        trainer.train(model, replace(task, batch=batch), config, job, "auto")
    return tuple(checkpoint.read(directory / "final", file) for file in ("weights.pt", "state.pt"))


def assert_equal(ours, theirs) -> None:
    """Bit for bit, in nested containers."""
    assert type(ours) is type(theirs)
    if isinstance(ours, (dict, list, tuple)):
        assert len(ours) == len(theirs)
        for key in ours if isinstance(ours, dict) else range(len(ours)):
            assert_equal(ours[key], theirs[key])
    else:
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


def not_a_number(*steps: int) -> Callable:
    """A loss that is NaN at the calls with these numbers, one call a step."""
    calls = itertools.count()

    def loss(model, tokens, targets):
        return {"loss": model(tokens, targets) * (math.nan if next(calls) in steps else 1)}

    return loss


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_whatever_is_trained_resumes_exactly(tmp_path, monkeypatch, precision, optimizer, schedule):
    """Optimizers, schedule, and float16's scale, which overflows at first and moves while training."""
    monkeypatch.setattr(trainer, "FIRST_SCALE", 2.0**30)
    changes = {"precision": precision, "optimizer": optimizer, "schedule": schedule, "warmup_steps": 3}
    config = replace(CONFIG, steps=16, save_every=4, eval_every=8, log_every=1, **changes)
    undisturbed = train_counting(tmp_path / "undisturbed", config)
    for crash in (6, 13):
        with pytest.raises(Crash):
            train_counting(tmp_path / "disturbed", config, crash=crash)
    assert_equal(train_counting(tmp_path / "disturbed", config), undisturbed)
    scale = undisturbed[1]["loss_scale"]["value"]
    assert scale < 2.0**30 if precision == "float16" else scale == 1


def test_the_loss_is_scaled_as_pytorch_scales_it(monkeypatch):
    monkeypatch.setattr(trainer, "GOOD_STEPS", 5)
    ours, theirs = trainer.LossScale(torch.float16), torch.amp.GradScaler("cpu", growth_interval=5)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer, chance = torch.optim.SGD([weight]), random.Random(0)
    for _ in range(200):
        finite = chance.random() < 0.8
        theirs.scale(weight.sum() * (1.0 if finite else math.inf)).backward()
        assert ours.value == theirs.get_scale()
        theirs.step(optimizer)
        theirs.update()
        ours.update(finite)
        optimizer.zero_grad()


def test_float16_learns_what_float32_learns(tmp_path):
    logs = []
    for precision in ("float32", "float16"):
        config = replace(CONFIG, steps=30, precision=precision, log_every=1)
        logs.append([m["loss"] for m in run_counting(tmp_path / precision, config)[1]])
    assert logs[1] == pytest.approx(logs[0], rel=0.02)


def test_a_step_that_is_skipped_changes_nothing(tmp_path):
    """Neither weights nor optimizer; it is counted, and so it is after a crash."""
    config = replace(CONFIG, steps=6, min_lr=CONFIG.learning_rate, save_every=1, log_every=1)
    shorter = train_counting(tmp_path / "shorter", replace(config, steps=5))
    skipped = train_counting(tmp_path / "skipped", config, loss=not_a_number(5))
    assert_equal(skipped[0], shorter[0])
    assert_equal(skipped[1]["optimizers"], shorter[1]["optimizers"])
    assert skipped[1]["progress"]["skipped"] == skipped[1]["progress"]["skipped_in_a_row"] == 1
    with pytest.raises(Crash):
        train_counting(tmp_path / "crashed", config, crash=5, loss=not_a_number(2))
    assert_equal(
        train_counting(tmp_path / "crashed", config), train_counting(tmp_path / "whole", config, loss=not_a_number(2))
    )


def test_steps_that_are_not_finite_stop_the_run_only_in_a_row(tmp_path):
    config = replace(CONFIG, steps=12, max_skipped=3, log_every=1)
    train_counting(tmp_path / "apart", config, loss=not_a_number(1, 2, 4, 5, 7, 8))
    with pytest.raises(UserError, match=r"3 steps in a row, the last in step 8 \(.*documents"):
        train_counting(tmp_path / "in a row", config, loss=not_a_number(5, 6, 7))


def test_a_model_that_overfits_is_warned_of_with_its_best_step(tmp_path, caplog):
    """Validation is of other noise than training: what is learnt by heart can only harm."""
    noise = np.random.default_rng(0).integers(61, size=2_000)
    config = replace(CONFIG, steps=80, eval_every=10, log_every=10)

    class Noise(Numbers):
        tokens = noise[:150]

    class Other(Numbers):
        tokens = noise[1_000:]

    model, _ = counting(config)
    task = predicting(model.config, config, Noise, Other)
    job = Stage(tmp_path, {"model": model.config, "pretrain": config}, {}, "", stage.__file__)
    with job.making():
        trainer.train(model, task, config, job, "auto")
    log = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    losses = {m["step"]: m["val_loss"] for m in log if "val_loss" in m}
    best = min(losses, key=losses.get)
    [warning] = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert f"lowest at step {best}, {losses[best]:.4f}" in warning
    assert stage.read_manifest(tmp_path / "best")["counts"]["step"] == best < 60


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_gradient_checkpointing_gives_the_same_gradients(kernels):
    torch.manual_seed(0)
    shape = ModelConfig(vocab_size=61, context_length=16, n_layers=3, d_model=32, n_heads=2, kernels=kernels)
    model, tokens = Transformer(shape), torch.randint(61, (2, 17))
    gradients, kept = [], []
    for model.gradient_checkpointing in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=sizes: to.append(t.numel()) or t, lambda t: t):
            loss = model(tokens[:, :-1], tokens[:, 1:])
        kept.append(sum(sizes))
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        model.zero_grad()
    assert_equal(*gradients)
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": None},
        {"epochs": 1},
        {"batch_size": 0},
        {"micro_batch_size": 3},
        {"learning_rate": math.nan},
        {"min_lr": 1.0},
        {"beta2": 1.0},
        {"weight_decay": -1.0},
        {"eval_every": 0},
        {"schedule": "sawtooth"},
        {"seed": 2**63},
        {"decay_fraction": 0.0},
        {"warmup_steps": 1, "warmup_fraction": 0.1},
        {"keep_checkpoints": 0},
    ],
)
def test_impossible_settings_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        TrainConfig(**{"steps": 10, "batch_size": 4, "learning_rate": 1e-2} | changes)


# ------------------------------------------------------------------------------------------------- killed and resumed


def test_run_logs_what_it_should(made: Place):
    assert [m["step"] for m in made.metrics()] == list(range(1, 25))
    assert [m["step"] for m in made.metrics() if "val_loss" in m] == [8, 16, 24]
    first, last = made.metrics()[0], made.metrics()[-1]
    assert first["loss"] == pytest.approx(math.log(512), rel=0.02)
    assert re.search(r"^memory: [\d.]+ [MG]iB at the peak of the first step, of [\d.]+ [MG]iB$", made.output, re.M)
    assert f"trained: {made.runs / 'mini/pretrain/final'}\nnext: python pipeline.py {made.config} sft\n" in made.output
    assert last["val_loss"] < 0.9 * first["loss"]
    assert last["val_perplexity"] == pytest.approx(math.exp(last["val_loss"]))
    assert sorted(p.name for p in (made.runs / "mini/pretrain").glob("*_*")) == ["step_0000015", "step_0000020"]


def kill_points() -> list:
    """(module, function, which call). A step takes three forward passes, one a micro-batch; the evaluations after steps
    8, 16 and 24 take two each."""
    forward, edge = ("model", "Transformer.forward"), ("data.batches", "Mixture.batch")
    return [
        pytest.param(*forward, 2, id="first step, second micro-batch"),
        pytest.param(*forward, 3 * 11 + 2 + 2, id="step 12, in the middle of accumulation"),
        pytest.param(*forward, 3 * 8 + 1, id="evaluation after step 8"),
        pytest.param(*edge, None, id="epoch's edge"),
        pytest.param("os", "rename", 1, id="first checkpoint written, not yet renamed"),
        pytest.param("torch", "save", 4, id="second checkpoint, between its files"),
        pytest.param("checkpoint", "stage.write_json", 6, id="a later checkpoint, before its manifest"),
        pytest.param("trainer", "Report.write", 10, id="step 10 saved, not yet logged"),
    ]


@pytest.mark.parametrize(("module", "function", "at"), kill_points())
def test_killed_and_restarted_equals_undisturbed(packed: Place, made: Place, module, function, at):
    if at is None:  # the first batch that holds windows of two epochs
        windows = (len(np.fromfile(made.runs / "mini/packed/train.bin", "<u2")) - 1) // 64
        at = windows // 12 + 1
        assert windows % 12
        assert at < 20
    killed = packed.start("-c", KILL.format(module=module, function=function, at=at), packed.config)
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    there = [p for p in (packed.runs / "mini/pretrain").glob("step_*") if (p / "manifest.json").exists()]
    again = packed.run("train.py", packed.config)
    if there:
        assert re.search(r"resumed from step \d+", again.stdout)
    assert_same_run(packed, made)
    assert not list((packed.runs / "mini/pretrain").glob(".*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_killed_at_random_moments(packed: Place, made: Place, seed):
    """While it trains, evaluates and, after every step, saves; whatever is found then is whole."""
    packed.edit(("save_every=5", "save_every=1"))
    chance = random.Random(seed)
    for _ in range(3):
        run = packed.start("train.py", packed.config)
        run.wait_for("schedule")  # the last line of the page: the first step comes next
        time.sleep(chance.uniform(0.0, 0.2))  # a step that is saved takes some 0.04 s: not all 24 in three times that
        run.kill()
        run.communicate()
        assert run.returncode == -signal.SIGKILL, "trained to the end: the moments are badly chosen"
        for _, directory in checkpoint.steps(packed.runs / "mini/pretrain"):
            assert stage.damage(directory, stage.read_manifest(directory)["wrote"]) is None
    packed.run("train.py", packed.config)
    assert_same_run(packed, made)


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_say_how_to_go_on(packed: Place, made: Place, signum, status):
    packed.edit(("steps=24", "steps=100_000"))
    run = packed.start("train.py", packed.config)
    run.wait_for("step 1 of")
    time.sleep(0.5)
    run.send_signal(signum)
    _, err = run.communicate(timeout=60)
    assert run.returncode == status
    step = int(re.search(r"saved at step (\d+) of 100000; resume with: python train.py", err)[1])
    packed.edit(("steps=100_000", f"steps={step + 3}"))
    again = packed.run("train.py", packed.config)
    assert f"resumed from step {step} " in again.stdout
    assert packed.metrics()[-1]["step"] == step + 3


def test_a_signal_that_arrives_twice_is_one(monkeypatch):
    """A terminal's Ctrl-C reaches the child of pipeline.py directly and through its parent."""
    now, exits = [100.0], []
    monkeypatch.setattr(parallel.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(parallel.os, "_exit", exits.append)
    monkeypatch.setattr(parallel.os, "write", lambda *_: None)
    before = signal.getsignal(signal.SIGTERM)
    with parallel.Signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        now[0] += 0.9
        os.kill(os.getpid(), signal.SIGINT)
        assert (signals.caught, exits) == (signal.SIGINT, [])
        now[0] += 0.2
        os.kill(os.getpid(), signal.SIGTERM)
        assert exits == [128 + signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("count", "rows", "ranks"), [(7, 2, 1), (7, 2, 2), (8, 3, 3), (1, 4, 3), (12, 2, 2)])
def test_rows_of_an_evaluation_are_shared_once_each(monkeypatch, count, rows, ranks):
    """Every process is called equally often, so that sharded models can be put together; each row counts once."""
    monkeypatch.setattr(parallel, "ranks", lambda: ranks)
    shares = []
    for rank in range(ranks):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        shares.append(list(trainer.shared_rows(list(range(10, 10 + count)), rows)))
    assert len({len(share) for share in shares}) == 1
    assert all(1 <= len(numbers) <= rows for share in shares for numbers, _ in share)
    counted = [number for share in shares for numbers, counts in share if counts for number in numbers]
    assert sorted(counted) == list(range(10, 10 + count))


def test_without_a_compiler_training_goes_on_uncompiled(packed: Place, made: Place, tmp_path: Path):
    packed.edit(("compile=False", "compile=True"))
    packed.env |= {"CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "empty")}
    assert "training goes on uncompiled" in packed.run("train.py", packed.config).stderr
    assert_same_run(packed, made)


@pytest.mark.slow
def test_compiled_training_is_exact_too(packed: Place, tmp_path_factory: pytest.TempPathFactory):
    """Stopped at a checkpoint, killed and gone on with; and near to what it is uncompiled."""
    packed.edit(("compile=False", "compile=True"))
    disturbed = Place(shutil.copytree(packed.path, tmp_path_factory.mktemp("disturbed"), dirs_exist_ok=True))
    packed.run("train.py", packed.config)
    disturbed.edit(("steps=24", "steps=5"))
    disturbed.run("train.py", disturbed.config)
    disturbed.edit(("steps=5", "steps=24"))
    code = KILL.format(module="checkpoint", function="save", at=3)
    killed = disturbed.start("-c", code, disturbed.config)
    killed.communicate(timeout=240)
    assert killed.returncode == -signal.SIGKILL
    disturbed.run("train.py", disturbed.config)
    for file in ("weights.pt", "state.pt"):
        ours, theirs = (place.runs / "mini/pretrain/final" / file for place in (disturbed, packed))
        assert digest(ours) == digest(theirs)


def test_the_same_command_again_finds_it_done(trained: Place, made: Place):
    assert "is up to date" in trained.run("train.py", trained.config).stdout
    assert_same_run(trained, made)


def test_more_steps_go_on_from_the_end(trained: Place):
    trained.edit(("steps=24", "steps=30"), ("save_every=5", "save_every=100"))
    out = trained.run("train.py", trained.config).stdout
    assert "resumed from step 24" in out
    assert "the schedule now has 30 steps: the learning rate changes from 1.8e-05 to" in out
    assert [m["step"] for m in trained.metrics()] == list(range(1, 31))


def test_resumes_from_a_path(packed: Place, made: Place):
    kept = packed.path / "kept"
    shutil.copytree(made.runs / "mini/pretrain/step_0000015", kept)
    run = packed.run("train.py", packed.config, "--resume", kept)
    assert "resumed from step 15" in run.stdout
    for file in ("weights.pt", "state.pt"):
        assert digest(packed.runs / "mini/pretrain/final" / file) == digest(made.runs / "mini/pretrain/final" / file)


def test_resuming_earlier_than_what_is_there_is_refused(trained: Place):
    trained.edit(("steps=24", "steps=30"))
    start = trained.runs / "mini/pretrain/step_0000015"
    assert "final" in trained.run("train.py", trained.config, "--resume", start, status=2).stderr
    for wrong in ("nowhere", trained.runs / "mini/pretrain"):
        error = trained.run("train.py", trained.config, "--resume", wrong, status=2).stderr
        assert f"{wrong} is not a checkpoint; of this run there are: " in error
        assert str(start) in error


def test_fewer_steps_than_a_finished_run_has_are_refused(trained: Place, made: Place):
    trained.edit(("steps=24", "steps=20"))
    assert "trained to step 24 already" in trained.run("train.py", trained.config, status=2).stderr
    assert_same_run(trained, made)


def test_a_model_that_cannot_fit_is_refused_before_it_is_made(packed: Place):
    packed.edit(("d_model=32", "d_model=32_768"), ("n_layers=2", "n_layers=96"))
    error = packed.run("train.py", packed.config, status=2).stderr
    assert re.search(r"parameters take [\d,.]+ GiB for weights, gradients and optimizer", error)


def test_wsd_keeps_the_last_checkpoint_before_the_fall(tmp_path):
    config = replace(CONFIG, steps=30, schedule="wsd", save_every=3, keep_checkpoints=1, log_every=1)
    train_counting(tmp_path, config)
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_0000024", "step_0000027"]
    lr = {m["step"]: m["lr"] for m in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())}
    assert lr[24] == config.learning_rate == lr[25] > lr[26]


def test_fewer_steps_than_were_trained_are_refused(packed: Place, made: Place):
    shutil.copytree(made.runs / "mini/pretrain/step_0000015", packed.runs / "mini/pretrain/step_0000015")
    packed.edit(("steps=24", "steps=10"))
    assert "is at step 15 already" in packed.run("train.py", packed.config, status=2).stderr
    packed.edit(("steps=10", "steps=15"))
    packed.run("train.py", packed.config)
    ours, theirs = packed.runs / "mini/pretrain/final", made.runs / "mini/pretrain/step_0000015"
    assert digest(ours / "weights.pt") == digest(theirs / "weights.pt")


@pytest.mark.parametrize("fault", ["deleted", "truncated"])
def test_a_final_checkpoint_that_is_lost_is_made_again(trained: Place, made: Place, fault):
    final = trained.runs / "mini/pretrain/final"
    shutil.rmtree(final) if fault == "deleted" else os.truncate(final / "weights.pt", 99)
    assert "resumed from step 20" in trained.run("train.py", trained.config).stdout
    assert_same_run(trained, made)


def test_force_and_resume_contradict_each_other(trained: Place, made: Place):
    start = trained.runs / "mini/pretrain/step_0000020"
    assert "use one of them" in trained.run("train.py", trained.config, "--force", "--resume", start, status=2).stderr
    assert_same_run(trained, made)


def test_force_begins_anew(trained: Place, made: Place):
    assert "resumed" not in trained.run("train.py", trained.config, "--force").stdout
    assert_same_run(trained, made)


def test_another_config_is_refused(trained: Place):
    trained.edit(("learning_rate=3e-3", "learning_rate=2e-3"))
    error = trained.run("train.py", trained.config, status=2).stderr
    assert "pretrain.learning_rate was 0.003, is now 0.002" in error
    assert "--force" in error


def test_another_config_is_refused_on_resume(packed: Place, made: Place):
    shutil.copytree(made.runs / "mini/pretrain/step_0000015", packed.runs / "mini/pretrain/step_0000015")
    packed.edit(("n_layers=2", "n_layers=3"))
    assert "model.n_layers was 2, is now 3" in packed.run("train.py", packed.config, status=2).stderr


def flip(path: Path, place: int, bit: int = 0) -> None:
    """Turns over one bit of a byte."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def tree(directory: Path) -> dict[str, str]:
    """The digest of every file, but for the log and the lock."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file() and path.name not in (".lock", "log.txt"))
    return {str(path.relative_to(directory)): digest(path) for path in files}


@pytest.fixture
def interrupted(trained: Place) -> Place:
    """One whose training was interrupted past step 20, with the checkpoints of steps 15 and 20."""
    shutil.rmtree(trained.runs / "mini/pretrain/final")
    (trained.runs / "mini/pretrain/manifest.json").unlink()
    return trained


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("weights.pt", "step_0000020/weights.pt has SHA-256"),
        ("state.pt", r"step_0000020/state.pt has [\d,]+ bytes; its manifest says"),
        ("manifest.json", "step_0000020/manifest.json is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(interrupted: Place, made: Place, file, message):
    path = interrupted.runs / "mini/pretrain/step_0000020" / file
    if file == "weights.pt":
        flip(path, path.stat().st_size // 2)
    elif file == "state.pt":
        os.truncate(path, path.stat().st_size - 1)
    else:
        flip(path, path.read_bytes().index(b'"step": 20') + 8, bit=2)  # a 6 for a 2: step 60
    run = interrupted.run("train.py", interrupted.config)
    assert re.search(message + ".*: passing over .*step_0000020", run.stderr)
    assert "resumed from step 15" in run.stdout
    assert_same_run(interrupted, made)


@pytest.mark.parametrize("name", ["final", pytest.param("best", marks=pytest.mark.slow)])
@pytest.mark.parametrize("file", ["weights.pt", "manifest.json"])
def test_a_damaged_model_is_not_put_to_use(trained: Place, name, file):
    directory = trained.runs / "mini/pretrain" / name
    flip(directory / file, (directory / file).stat().st_size // 2)
    chosen = ("--checkpoint", directory) if name == "best" else ()
    for command in (
        ["pipeline.py", trained.config, "eval", *chosen],
        ["serve.py", *chosen, trained.config, "generate", "x"],
    ):
        process = trained.run(*command, status=2)
        assert f"{name}/{file}" in process.stderr
        assert "damaged" in process.stderr
        assert process.stdout == ""
    assert not list(trained.runs.glob("mini/**/results.json"))


# --------------------------------------------------------------------------------------------- what a machine can do


@pytest.fixture
def disk(packed: Place) -> Path:
    """A disk of its own for the runs, of 8 MB: a file system in memory."""
    path = packed.path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", path], capture_output=True).returncode:
        pytest.skip("mounting a file system needs to be root")
    shutil.copytree(packed.runs, path, dirs_exist_ok=True)
    packed.runs, packed.env["RUNS"] = path, str(path)
    yield path
    subprocess.run(["umount", "-l", path], check=True)


@pytest.mark.parametrize(
    ("room", "whole"),
    [
        pytest.param(0, set(), id="log", marks=pytest.mark.slow),
        pytest.param(500_000, set(), id="first"),
        pytest.param(2_000_000, {"step_0000005", "best"}, id="10", marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_loses_nothing(packed: Place, made: Place, disk: Path, room, whole):
    """A checkpoint takes 830 kB. With room made, the same command goes on to the same end."""
    filler = disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - room))
    assert "No space left on device" in packed.run("train.py", packed.config, status=2).stderr
    found = [path for path in (disk / "mini/pretrain").iterdir() if path.is_dir()]
    assert {path.name for path in found} == whole
    for path in found:
        assert stage.damage(path, stage.read_manifest(path)["wrote"]) is None
    filler.unlink()
    again = packed.run("train.py", packed.config)
    assert ("resumed from step 5 " in again.stdout) == bool(whole)
    assert_same_run(packed, made)


@pytest.mark.slow
def test_a_disk_that_cannot_be_written_is_named(packed: Place, made: Place, disk: Path):
    """As a system remounts a failing one. Read it can be all the while."""
    remount = ["mount", "-o", "remount,ro", disk]
    subprocess.run(remount, check=True)
    assert "Read-only file system" in packed.run("train.py", packed.config, status=2).stderr
    subprocess.run([*remount[:2], "remount,rw", disk], check=True)
    assert not (disk / "mini/pretrain").exists()
    packed.run("train.py", packed.config)
    assert_same_run(packed, made)
    subprocess.run(remount, check=True)
    assert "is up to date" in packed.run("train.py", packed.config).stdout
    assert packed.run("serve.py", packed.config, "generate", "x", "--max-tokens", 3).stdout.startswith("x")


def test_what_a_killed_run_left_is_cleared_away(interrupted: Place, made: Place):
    directory = interrupted.runs / "mini/pretrain"
    for name in (".step_0000005.partial", ".final.partial"):
        (directory / name).mkdir()
        (directory / name / "weights.pt").write_bytes(b"half")
    (directory / ".metrics.jsonl.partial").write_text("half")
    (directory / "best").rename(directory / ".best.old")  # between the two renames of a second best/
    shutil.copytree(directory / "step_0000020", directory / ".step_0000020.old")  # after them
    shutil.rmtree(directory / "step_0000015")
    (directory / "step_0000015").write_text("a file in its place")
    (directory / "step_0000010").mkdir()
    assert "resumed from step 20" in interrupted.run("train.py", interrupted.config).stdout
    assert_same_run(interrupted, made)
    assert [p.name for p in directory.glob(".*")] == [".lock"]


def test_an_old_checkpoint_that_is_a_link_is_let_go_of(interrupted: Place, made: Place):
    """And what it leads to, perhaps another run's, stays."""
    directory, kept = interrupted.runs / "mini/pretrain", interrupted.path / "kept"
    shutil.move(directory / "step_0000015", kept)
    (directory / "step_0000015").symlink_to(kept)
    interrupted.edit(("save_every=5", "save_every=5, keep_checkpoints=1"))
    interrupted.run("train.py", interrupted.config)
    assert_same_run(interrupted, made)
    assert not (directory / "step_0000015").is_symlink()
    assert (kept / "weights.pt").exists()


# ------------------------------------------------------------------------------------------- what others make of it


class Code:
    """Pickled, it makes a directory where it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def sign(directory: Path, **changes) -> None:
    """Makes the manifest right for the files that are there now: as an attacker would, or another run."""
    wrote = stage.digests(directory, directory.glob("*.pt"))
    stage.write_manifest(directory, stage.read_manifest(directory) | {"wrote": wrote} | changes)


def refused(place: Place) -> str:
    """Trains, expects to be refused in one line and that nothing has changed; returns the line."""
    before = tree(place.path)
    error = place.run("train.py", place.config, status=2).stderr
    assert tree(place.path) == before
    return error


@pytest.mark.parametrize("file", ["weights.pt", "state.pt"])
@pytest.mark.parametrize("kind", ["pickle", "torch.save"])
def test_code_in_a_checkpoint_is_not_run(interrupted: Place, file, kind):
    newest, mark = interrupted.runs / "mini/pretrain/step_0000020", interrupted.path / "executed"
    if kind == "pickle":
        (newest / file).write_bytes(pickle.dumps(Code(mark)))
    else:
        torch.save(checkpoint.read(newest, file) | {"x": Code(mark)}, newest / file)
    sign(newest)
    error = refused(interrupted)
    assert f"{newest / file} holds something other than tensors and numbers" in error
    assert "weights_only" not in error  # what torch advises would run it
    assert not mark.exists()


def test_a_checkpoint_of_another_tokenizer_is_refused(interrupted: Place):
    newest = interrupted.runs / "mini/pretrain/step_0000020"
    sign(newest, read=stage.read_manifest(newest)["read"] | {"mini/tokenizer/spm.model": "0" * 64})
    assert 'mini/tokenizer/spm.model was "00000' in refused(interrupted)


def other_weights(newest: Path) -> None:
    weights = checkpoint.read(newest, "weights.pt")
    torch.save(weights | {"norm.weight": torch.ones(48)}, newest / "weights.pt")


def other_optimizer(newest: Path) -> None:
    state = checkpoint.read(newest, "state.pt")
    for of_parameter in state["optimizers"][0]["state"].values():  # larger ones: smaller ones are read past their end
        of_parameter["exp_avg"] = torch.cat([of_parameter["exp_avg"]] * 2)
    torch.save(state, newest / "state.pt")


def fewer_groups(newest: Path) -> None:
    state = checkpoint.read(newest, "state.pt")
    del state["optimizers"][0]["param_groups"][1]
    torch.save(state, newest / "state.pt")


def no_state(newest: Path) -> None:
    torch.save({}, newest / "state.pt")


@pytest.mark.parametrize("change", [other_weights, other_optimizer, fewer_groups, no_state])
def test_a_checkpoint_of_another_shape_is_refused(interrupted: Place, change):
    """Its digests and its config are right: only what it holds is another model's."""
    newest = interrupted.runs / "mini/pretrain/step_0000020"
    change(newest)
    sign(newest)
    assert str(newest) in refused(interrupted)


def test_two_runs_cannot_write_to_one_directory(packed: Place):
    packed.edit(("steps=24", "steps=100_000"))
    first = packed.start("train.py", packed.config)
    first.wait_for("step 1 of")
    assert "another process" in packed.run("train.py", packed.config, status=2).stderr
    first.kill()
    first.communicate()


def test_a_loss_that_is_not_finite_stops_the_run(packed: Place):
    packed.edit(("learning_rate=3e-3", "learning_rate=1e30"))
    error = packed.run("train.py", packed.config, status=2).stderr
    assert "Lower learning_rate" in error


@pytest.mark.parametrize("threads", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_two_runs_give_the_same_bytes(packed: Place, threads, tmp_path_factory: pytest.TempPathFactory):
    """Of a model wide enough that threads share its sums."""
    packed.edit(("d_model=32", "d_model=192"), ("steps=24", "steps=4"), ("micro_batch_size=4", "micro_batch_size=12"))
    packed.edit(('precision="float32", deterministic=True', "deterministic=True"))
    packed.env["OMP_NUM_THREADS"] = threads
    again = Place(shutil.copytree(packed.path, tmp_path_factory.mktemp("again"), dirs_exist_ok=True))
    again.env["OMP_NUM_THREADS"] = threads
    for place in (packed, again):
        out = place.run("train.py", place.config).stdout
        assert f", {threads} thread" in out
        assert "precision   float32" in out
    assert_same_run(packed, again)


def test_too_little_memory_is_answered_with_what_to_change(packed: Place):
    packed.edit(
        ("d_model=32", "d_model=512"), ("n_layers=2", "n_layers=12"), ("micro_batch_size=4", "micro_batch_size=12")
    )
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (2_000_000_000, 2_000_000_000))  # noqa: E731
    run = packed.start("train.py", packed.config, preexec_fn=limit)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 2
    assert err == (
        "error: out of memory; set micro_batch_size=6 (now 12), then gradient_checkpointing=True (now False), "
        "then context_length=32 (now 64)\n"
    )


@pytest.mark.slow
def test_tensorboard_shows_what_metrics_hold(packed: Place, made: Place):
    """And forgets, as they do, what a killed run had logged past its checkpoint."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    packed.edit(("compile=False", "compile=False, tensorboard=True"))
    code = KILL.format(module="trainer", function="Report.write", at=13)
    packed.start("-c", code, packed.config).communicate(timeout=60)
    packed.run("train.py", packed.config)
    events = EventAccumulator(str(packed.runs / "mini/pretrain/tensorboard")).Reload()
    for name in ("loss", "val_loss", "lr", "grad_norm"):
        found = {event.step: event.value for event in events.Scalars(name)}
        assert found == pytest.approx({m["step"]: m[name] for m in made.metrics() if name in m})


def test_tensorboard_that_is_missing_is_named(packed: Place):
    packed.edit(("compile=False", "compile=False, tensorboard=True"))
    (packed.path / "absent/tensorboard").mkdir(parents=True)
    (packed.path / "absent/tensorboard/__init__.py").write_text("raise ImportError")
    packed.env["PYTHONPATH"] = f"{packed.path / 'absent'}:{packed.env['PYTHONPATH']}"
    assert "pip install tensorboard" in packed.run("train.py", packed.config, status=2).stderr


def test_a_disk_that_fills_up_loses_nothing(packed: Place, made: Place):
    """A limit on the size of files, which the system enforces as it does a full disk."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))  # noqa: E731
    full = packed.start("train.py", packed.config, preexec_fn=limit)
    _, err = full.communicate(timeout=60)
    assert full.returncode == 2
    assert err.startswith("error: File too large")
    assert not list((packed.runs / "mini/pretrain").glob("*_*"))
    packed.run("train.py", packed.config)
    assert_same_run(packed, made)


@pytest.mark.parametrize("file", ["train.bin", "val.bin", "train.idx"])
def test_truncated_packed_data_is_named(packed: Place, file):
    path = packed.runs / "mini/packed" / file
    os.truncate(path, path.stat().st_size - 3)
    error = packed.run("train.py", packed.config, status=2).stderr
    assert file in error
    assert "python pipeline.py" in error
    assert not (packed.runs / "mini/pretrain").exists()


def test_a_tokenizer_that_does_not_match_is_named(packed: Place):
    shutil.rmtree(packed.runs / "mini/corpus")  # so that nothing can be made again
    other = packed.path / "other"
    shutil.copytree(packed.runs / "mini/tokenizer", other)
    spm = packed.runs / "mini/tokenizer/spm.model"
    spm.write_bytes(spm.read_bytes()[:-1] + b"?")
    assert "spm.model has SHA-256" in packed.run("train.py", packed.config, status=2).stderr


def test_context_longer_than_the_text_is_named(place: Place):
    place.edit(("context_length=64", "context_length=100_000"))
    assert "one window of context_length 100,000" in place.run("train.py", place.config, status=2).stderr
