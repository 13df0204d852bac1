"""The training loop: what it optimises, and that no kill, full disk or damaged file harms a run."""

import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import checkpoint
import generate
import machine
import parallel
import stage
import tokenizer
import train
import trainer
from cli import UserError
from data.batches import mixture
from model import ModelConfig, Transformer
from stage import Stage
from tests.conftest import Place, copied
from trainer import TrainConfig

CONFIG = TrainConfig(steps=10, batch_size=8, learning_rate=1e-2, compile=False, precision="float32")

RUN = '\nimport runpy; runpy.run_path("train.py", run_name="__main__")'

# Runs train.py in a process that sends itself SIGKILL at the n-th call of a function.
KILL = (
    """
import itertools, os, signal
import {module}
calls = itertools.count(1)
def killing(*a, original={module}.{function}, **k):
    if next(calls) == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*a, **k)
{module}.{function} = killing
"""
    + RUN
)


KILLED = 128 + signal.SIGKILL


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tree(directory: Path) -> dict[str, str]:
    """The digest of every file but the log and the lock."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file() and path.name not in (".lock", "log.txt"))
    return {str(path.relative_to(directory)): digest(path) for path in files}


def assert_same_run(place: Place, made: Place) -> None:
    """The same bytes of weights and of all that resuming needs, and the same log."""
    for file in ("final/weights.pt", "final/state.pt", "best/weights.pt", "best/state.pt"):
        ours, theirs = (p.runs / "mini/pretrain" / file for p in (place, made))
        assert digest(ours) == digest(theirs), file
    assert place.metrics() == made.metrics()


# --------------------------------------------------------------------------------------------------------- in process


class Numbers:
    """0 1 2 3 … modulo 61, in place of packed tokens."""

    name = file = "numbers"
    tokens = np.arange(20_000) % 61
    starts, first = np.arange(0, 20_000, 61), 0
    bytes = 20_000


SPELLING = SimpleNamespace(opening=[0], eos=60, decode=str)  # a tokenizer for the numbers


class Crash(Exception):
    """Ends a run in this process as a kill would: nothing more is saved."""


def counting(config: TrainConfig, training: type = Numbers, validation: type = Numbers):
    """A model and the task of predicting the next number."""
    torch.manual_seed(0)
    shape = ModelConfig(vocab_size=61, context_length=16, n_layers=1, d_model=32, n_heads=2)
    batches = mixture("x", (), training, {}, shape.context_length, config.batch_size, config.seed)
    return Transformer(shape), train.pretraining(config, shape, batches, validation, mixed=False, spm=SPELLING)


def run_counting(directory: Path, config: TrainConfig, crash: int = -1, task=None, **changes):
    """Trains from where the directory was left. Returns the model and what was logged. crash: before which step."""
    model, counts = counting(config)
    task = replace(task or counts, **changes)

    def batch(step: int, *part, original=task.batch):
        if step == crash:
            raise Crash
        return original(step, *part)

    job = Stage(directory, {"model": model.config, "pretrain": config}, {}, "python train.py x.py", stage.__file__)
    with job.making(keep=True):
        trainer.train(model, replace(task, batch=batch), config, job, "auto")
    return model, [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def saved(directory: Path) -> tuple[dict, dict]:
    """The weights and the state at the end of a run."""
    weights, state = (checkpoint.read(directory / "final", file) for file in ("weights.pt", "state.pt"))
    return weights, {name: value for name, value in state.items() if not isinstance(value, str)}


def assert_equal(ours: dict, theirs: dict) -> None:
    """Bit for bit, in nested containers."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def not_a_number(*steps: int) -> Callable:
    """A loss that is NaN in the calls with these numbers; there is one call for each step."""
    calls = itertools.count()
    return lambda model, tokens, targets: {"loss": model(tokens, targets) * (math.nan if next(calls) in steps else 1)}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_model_trained_on_counting_predicts_the_next_number(tmp_path, optimizer):
    model, _ = run_counting(tmp_path, replace(CONFIG, steps=150, warmup_steps=10, optimizer=optimizer))
    assert generate.generate(model, [59], 12, temperature=0) == [60, *range(11)]  # not 61, 63, …: shifted once


def test_micro_batches_count_by_their_targets(tmp_path):
    """Rows have 16, 9, 2 and 1 targets: the gradient is that of the mean over all targets of the batch."""
    results = []
    for rows in (4, 2, 1):
        config = replace(CONFIG, steps=2, batch_size=4, micro_batch_size=rows, log_every=1)

        def ragged(step: int, rank: int, ranks: int, batch=counting(config)[1].batch):  # noqa: B008
            tokens, targets = batch(step, rank, ranks)
            for row, kept in enumerate((16, 9, 2, 1)):
                targets[row, kept:] = -100
            return tokens, targets

        count = lambda tokens, targets: int((targets != -100).sum())  # noqa: E731
        log = run_counting(tmp_path / str(rows), config, batch=ragged, targets=count)[1]
        results.append([(m["loss"], m["grad_norm"], m["tokens"]) for m in log])
    assert results[0][1][2] == 2 * 28
    for result in results[1:]:
        assert np.array(result) == pytest.approx(np.array(results[0]), rel=1e-4)


def too_many(rows: int, sizes: list[int]) -> Callable:
    """A loss that more rows than these do not fit into memory for. sizes: gets the rows of each call."""

    def loss(model, tokens, targets):
        sizes.append(len(tokens))
        loss = model(tokens, targets)
        if len(tokens) > rows:
            loss.backward()  # the gradient of a step that is begun again must not stay
            torch.rand(1)  # nor what it has drawn, as dropout does
            raise torch.OutOfMemoryError
        return {"loss": loss}

    return loss


def test_rows_that_do_not_fit_into_memory_are_halved(tmp_path, caplog):
    """The same bytes as with that many from the beginning, also after a crash: checkpoints hold the number."""
    config = replace(CONFIG, steps=6, save_every=2, log_every=1, eval_every=3)
    run_counting(tmp_path / "two", replace(config, micro_batch_size=2))
    whole, crashed, resumed = [], [], []
    with caplog.at_level("INFO", "lumi"):
        run_counting(tmp_path / "whole", config, loss=too_many(2, whole))
    assert whole == [8, 4, *[2] * 24]
    assert [line for line in caplog.messages if "rows do not fit" in line] == [
        "8 rows do not fit into memory: from now on 4 at a time",
        "4 rows do not fit into memory: from now on 2 at a time",
    ]
    with pytest.raises(Crash):
        run_counting(tmp_path / "crashed", config, 4, loss=too_many(2, crashed))
    run_counting(tmp_path / "crashed", config, loss=too_many(2, resumed))
    assert set(resumed) == {2}  # nothing is tried again
    results = [saved(tmp_path / name) for name in ("whole", "crashed", "two")]
    assert results[0][1]["progress"].pop("rows") == results[1][1]["progress"].pop("rows") == 2
    assert results[2][1]["progress"].pop("rows") is None
    assert_equal(results[0], results[1])
    assert_equal(results[0], results[2])


def test_one_row_that_does_not_fit_is_an_error(tmp_path):
    sizes = []
    with pytest.raises(torch.OutOfMemoryError):
        run_counting(tmp_path, CONFIG, loss=too_many(0, sizes))
    assert sizes == [8, 4, 2, 1]


def test_evaluation_reads_as_many_rows_as_training(tmp_path):
    seen, sizes = [], []

    def evaluate(model, rows):
        seen.append(rows)
        return {"val_loss": 1.0}

    run_counting(tmp_path, replace(CONFIG, steps=2, eval_every=1), loss=too_many(4, sizes), evaluate=evaluate)
    assert seen == [4, 4]


def test_the_gradient_norm_is_logged_before_clipping_and_a_long_gradient_is_clipped(tmp_path):
    config = replace(CONFIG, steps=1, grad_clip=1e-3)
    model, task = counting(config)
    task.loss(model, *task.batch(0))["loss"].backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    assert run_counting(tmp_path, config)[1][0]["grad_norm"] == pytest.approx(norm, rel=1e-5)

    parameters = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([4.0, 0.0]), torch.tensor([-8.0])
    assert trainer.clip_gradient(parameters, 0.5, scale=2.0) == pytest.approx(math.sqrt(20))  # of (2, 0) and (-4)
    assert torch.cat([p.grad for p in parameters]).norm() == pytest.approx(0.5, rel=1e-5)
    assert parameters[0].grad[0] / parameters[1].grad[0] == pytest.approx(-0.5)


@pytest.mark.parametrize(
    ("precision", "optimizer", "schedule"),
    [("float32", "adamw", "cosine"), ("float16", "muon", "wsd"), ("bfloat16", "adamw", "linear")],
)
def test_a_crashed_run_resumes_exactly(tmp_path, monkeypatch, precision, optimizer, schedule):
    """Optimizers, schedule, and float16's scale, which overflows at first and moves while training."""
    monkeypatch.setattr(trainer, "FIRST_SCALE", 2.0**30)
    changes = {"precision": precision, "optimizer": optimizer, "schedule": schedule, "warmup_steps": 3}
    config = replace(CONFIG, steps=16, save_every=4, eval_every=8, log_every=1, **changes)
    run_counting(tmp_path / "undisturbed", config)
    for crash in (6, 13):
        with pytest.raises(Crash):
            run_counting(tmp_path / "crashed", config, crash)
    run_counting(tmp_path / "crashed", config)
    assert_equal(saved(tmp_path / "crashed"), saved(tmp_path / "undisturbed"))
    scale = saved(tmp_path / "crashed")[1]["loss_scale"]["value"]
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


def test_a_skipped_step_changes_nothing(tmp_path):
    """Neither weights nor optimizer. It is counted, also after a crash."""
    config = replace(CONFIG, steps=6, min_lr=CONFIG.learning_rate, save_every=1, log_every=1)
    run_counting(tmp_path / "shorter", replace(config, steps=5))
    run_counting(tmp_path / "skipped", config, loss=not_a_number(5))
    shorter, skipped = saved(tmp_path / "shorter"), saved(tmp_path / "skipped")
    assert_equal(skipped[0], shorter[0])
    assert_equal(skipped[1]["optimizers"], shorter[1]["optimizers"])
    assert skipped[1]["progress"]["skipped"] == skipped[1]["progress"]["skipped_in_a_row"] == 1
    with pytest.raises(Crash):
        run_counting(tmp_path / "crashed", config, 5, loss=not_a_number(2))
    run_counting(tmp_path / "crashed", config)
    run_counting(tmp_path / "whole", config, loss=not_a_number(2))
    assert_equal(saved(tmp_path / "crashed"), saved(tmp_path / "whole"))


def test_skipped_steps_stop_the_run_only_in_a_row(tmp_path):
    config = replace(CONFIG, steps=12, max_skipped=3, log_every=1)
    run_counting(tmp_path / "apart", config, loss=not_a_number(1, 2, 4, 5, 7, 8))
    with pytest.raises(UserError, match=r"3 steps in a row, the last in step 8 \(.*documents.*Lower learning_rate"):
        run_counting(tmp_path / "in a row", config, loss=not_a_number(5, 6, 7))


def test_overfitting_is_warned_of_and_the_best_step_is_kept(tmp_path, caplog):
    """The held-out numbers are other noise than the training numbers."""
    noise, config = np.random.default_rng(0).integers(61, size=2_000), replace(CONFIG, steps=80, eval_every=10)
    training = type("Training", (Numbers,), {"tokens": noise[:150]})
    held_out = type("HeldOut", (Numbers,), {"tokens": noise[1_000:]})
    _, log = run_counting(tmp_path, config, task=counting(config, training, held_out)[1])
    losses = {m["step"]: m["val_loss"] for m in log if "val_loss" in m}
    best = min(losses, key=losses.get)
    [warning] = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert f"lowest at step {best}, {losses[best]:.4f}" in warning
    assert stage.read_manifest(tmp_path / "best")["counts"]["step"] == best < 60


def test_wsd_keeps_the_last_checkpoint_before_the_fall(tmp_path):
    config = replace(CONFIG, steps=30, schedule="wsd", save_every=3, keep_checkpoints=1, log_every=1)
    lr = {m["step"]: m["lr"] for m in run_counting(tmp_path, config)[1]}
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_0000024", "step_0000027"]
    assert lr[24] == config.learning_rate == lr[25] > lr[26]


IMPOSSIBLE = [("steps", None), ("epochs", 1), ("batch_size", 0), ("micro_batch_size", 3), ("learning_rate", math.nan)]
IMPOSSIBLE += [("min_lr", 1.0), ("beta2", 1.0), ("weight_decay", -1.0), ("eval_every", 0), ("schedule", "sawtooth")]
IMPOSSIBLE += [("seed", 2**63), ("decay_fraction", 0.0), ("warmup_fraction", 1.1)]


@pytest.mark.parametrize(("field", "value"), IMPOSSIBLE)
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        TrainConfig(**{"steps": 10, "batch_size": 4, "learning_rate": 1e-2, field: value})
    with pytest.raises(ValueError, match="warmup_steps"):
        replace(CONFIG, warmup_steps=1, warmup_fraction=0.1)


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (
            5,
            {"epochs": 3},
            "32, but there are only 5 rows to train on; try batch_size=1, epochs=10, .* 50 steps$",
        ),
        (31, {"steps": 1000}, "batch_size is 32, but there are only 31 rows to train on"),
        (1, {"epochs": 1, "batch_size": 2}, "only 1 row to train on; try batch_size=1, epochs=10"),
        (40, {"epochs": 3}, "3 epochs of 40 rows in batches of 32 make only 4 steps; try batch_size=4, epochs=10"),
        (40, {"epochs": 200}, "training reads 40 rows 200 times and learns them by heart"),
        (40, {"steps": 40, "batch_size": 4}, "^$"),  # steps are as many as the user says
        (1600, {"epochs": 1}, "^$"),
    ],
)
def test_too_few_steps_or_too_many_epochs_are_named_before_training(caplog, rows, changes, message):
    config = TrainConfig(**{"batch_size": 32, "learning_rate": 1e-3} | changes)
    if config.batch_size > rows:
        with pytest.raises(UserError, match=message):
            trainer.plan_steps(config, rows, "row")
    else:
        trainer.plan_steps(config, rows, "row")
        assert re.search(message, "".join(caplog.messages))


@pytest.mark.parametrize(("count", "rows", "ranks"), [(7, 2, 1), (7, 2, 2), (8, 3, 3), (1, 4, 3)])
def test_rows_of_an_evaluation_are_shared_once_each(monkeypatch, count, rows, ranks):
    """Every process is called equally often, so that sharded models can be gathered; each row counts once."""
    monkeypatch.setattr(parallel, "ranks", lambda: ranks)
    shares = []
    for rank in range(ranks):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        shares.append(list(parallel.shared_rows(list(range(10, 10 + count)), rows)))
    assert len({len(share) for share in shares}) == 1
    assert all(1 <= len(numbers) <= rows for share in shares for numbers, _ in share)
    counted = [number for share in shares for numbers, counts in share if counts for number in numbers]
    assert sorted(counted) == list(range(10, 10 + count))


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


def test_a_signal_that_interrupts_the_handler_is_one_with_the_first(monkeypatch, capfd):
    """Ctrl-C comes from the terminal and from the parent, at almost the same time."""
    real, inside = time.monotonic, []

    def interrupted() -> float:
        if not inside:
            inside.append(True)
            signal.raise_signal(signal.SIGINT)
        return real()

    with parallel.Signals() as signals:
        monkeypatch.setattr(parallel.time, "monotonic", interrupted)
        signal.raise_signal(signal.SIGINT)
    assert signals.caught == signal.SIGINT
    assert capfd.readouterr().err.count("finishing the step") == 1


def test_what_is_missing_for_compiling_is_named(monkeypatch, caplog):
    def no_compiler(function):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", no_compiler)
    model = counting(CONFIG)[0]
    assert not machine.compile_blocks(model, torch.device("cpu"))
    assert "training continues uncompiled, which is slower; set compile=False, or fix this: no C++" in caplog.text


# ------------------------------------------------------------------------------------------------- killed and resumed


def test_a_run_logs_and_saves_what_it_should(made: Place):
    assert [m["step"] for m in made.metrics()] == list(range(1, 25))
    assert [m["step"] for m in made.metrics() if "val_loss" in m] == [8, 16, 24]
    assert made.metrics()[8]["epoch"] < 1 < made.metrics()[9]["epoch"]  # for KILLS
    first, last = made.metrics()[0], made.metrics()[-1]
    assert first["loss"] == pytest.approx(math.log(512), rel=0.02)
    assert last["val_loss"] < 0.9 * first["loss"]
    assert last["val_perplexity"] == pytest.approx(math.exp(last["val_loss"]))
    assert re.search(r"^memory: [\d.]+ [MG]iB at the peak of the first step, of [\d.]+ [MG]iB$", made.output, re.M)
    assert f"trained: {made.runs / 'mini/pretrain/final'}" in made.output
    assert f"next: python pipeline.py {made.config} sft, or python serve.py" in made.output
    assert sorted(p.name for p in (made.runs / "mini/pretrain").glob("*_*")) == ["step_0000015", "step_0000020"]


# A step takes three forward passes, one for each micro-batch; the evaluations after steps 8, 16, 24 take two each.
FORWARD = ("model", "Transformer.forward")
KILLS = [
    pytest.param(*FORWARD, 3 * 11 + 2 + 2, id="step 12, second micro-batch"),
    pytest.param(*FORWARD, 3 * 8 + 1, id="evaluation after step 8"),
    pytest.param("data.batches", "Mixture.batch", 10, id="the batch with rows of two epochs"),
    pytest.param("os", "rename", 1, id="first checkpoint written, not yet renamed"),
    pytest.param("torch", "save", 4, id="second checkpoint, between its files"),
    pytest.param("checkpoint", "stage.write_json", 6, id="a later checkpoint, before its manifest"),
    pytest.param("trainer", "Report.write", 10, id="step 10 saved, not yet logged"),
]


@pytest.mark.parametrize(("module", "function", "at"), KILLS)
def test_killed_and_restarted_equals_undisturbed(packed: Place, made: Place, module, function, at):
    packed.run("-c", KILL.format(module=module, function=function, at=at), packed.config, status=KILLED)
    complete = [p for p in (packed.runs / "mini/pretrain").glob("step_*") if (p / "manifest.json").exists()]
    again = packed.run("train.py", packed.config)
    assert ("resumed from step" in again.stdout) == bool(complete)
    assert_same_run(packed, made)
    assert not list((packed.runs / "mini/pretrain").glob(".*.partial"))


@pytest.mark.slow
def test_compiled_training_is_exact_too(packed: Place, tmp_path_factory: pytest.TempPathFactory):
    """Stopped at a checkpoint, killed, and resumed."""
    packed.edit(("compile=False", "compile=True"))
    disturbed = copied(packed, tmp_path_factory.mktemp("disturbed"))
    packed.run("train.py", packed.config)
    disturbed.edit(("steps=24", "steps=5"))
    disturbed.run("train.py", disturbed.config)
    disturbed.edit(("steps=5", "steps=24"))
    code = KILL.format(module="checkpoint", function="save", at=3)
    disturbed.run("-c", code, disturbed.config, status=KILLED)
    disturbed.run("train.py", disturbed.config)
    for file in ("weights.pt", "state.pt"):
        ours, theirs = (p.runs / "mini/pretrain/final" / file for p in (disturbed, packed))
        assert digest(ours) == digest(theirs)


def test_force_trains_again_and_a_finished_run_is_up_to_date(trained: Place, made: Place):
    assert "resumed" not in trained.run("train.py", trained.config, "--force").stdout
    assert_same_run(trained, made)
    assert "is up to date" in trained.run("train.py", trained.config).stdout
    start = trained.runs / "mini/pretrain/step_0000020"
    assert "use one of them" in trained.run("train.py", trained.config, "--force", "--resume", start, status=2).stderr
    assert_same_run(trained, made)


def test_more_steps_continue_from_the_end(trained: Place):
    trained.edit(("steps=24", "steps=30"), ("save_every=5", "save_every=100"))
    start = trained.runs / "mini/pretrain/step_0000015"
    assert "is older than" in trained.run("train.py", trained.config, "--resume", start, status=2).stderr
    for wrong in ("nowhere", trained.runs / "mini/pretrain"):
        error = trained.run("train.py", trained.config, "--resume", wrong, status=2).stderr
        assert f"{wrong} is not a checkpoint; this run has: " in error
        assert str(start) in error
    out = trained.run("train.py", trained.config).stdout
    assert "resumed from step 24" in out
    assert "the schedule now has 30 steps: the learning rate changes from 1.8e-05 to" in out
    assert [m["step"] for m in trained.metrics()] == list(range(1, 31))


def test_resuming_from_a_path(packed: Place, made: Place):
    kept = packed.path / "kept"
    shutil.copytree(made.runs / "mini/pretrain/step_0000015", kept)
    assert "resumed from step 15" in packed.run("train.py", packed.config, "--resume", kept).stdout
    for file in ("weights.pt", "state.pt"):
        assert digest(packed.runs / "mini/pretrain/final" / file) == digest(made.runs / "mini/pretrain/final" / file)


def test_fewer_steps_than_were_trained_are_refused(trained: Place, made: Place):
    trained.edit(("steps=24", "steps=20"))
    assert "is at step 24 already" in trained.run("train.py", trained.config, status=2).stderr
    shutil.rmtree(trained.runs / "mini/pretrain")
    shutil.copytree(made.runs / "mini/pretrain/step_0000015", trained.runs / "mini/pretrain/step_0000015")
    trained.edit(("steps=20", "steps=10"))
    assert "is at step 15 already" in trained.run("train.py", trained.config, status=2).stderr
    trained.edit(("steps=10", "steps=15"))
    trained.run("train.py", trained.config)  # nothing is left to train
    ours, theirs = trained.runs / "mini/pretrain/final", made.runs / "mini/pretrain/step_0000015"
    assert digest(ours / "weights.pt") == digest(theirs / "weights.pt")


@pytest.mark.parametrize(
    ("stage_of_run", "change", "message"),
    [
        ("trained", ("learning_rate=3e-3", "learning_rate=2e-3"), "pretrain.learning_rate was 0.003, is now 0.002"),
        ("interrupted", ("n_layers=2", "n_layers=3"), "model.n_layers was 2, is now 3"),
        ("packed", ("learning_rate=3e-3", "learning_rate=1e30"), "Lower learning_rate"),
        ("packed", ("d_model=32, n_heads=2", "d_model=65_536, n_heads=2"), "parameters take .* GiB for weights"),
        ("packed", ("batch_size=12, micro_batch_size=4", "batch_size=1000"), "batch_size is 1000, but there are only"),
        ("packed", ("context_length=64", "context_length=100_000"), "one window of context_length 100,000"),
    ],
)
def test_configs_that_cannot_be_trained(request, stage_of_run, change, message):
    place = request.getfixturevalue(stage_of_run)
    place.edit(change)
    assert re.search(message, place.run("train.py", place.config, status=2).stderr)


# -------------------------------------------------------------------------------------------------------- damaged files


@pytest.fixture
def interrupted(trained: Place) -> Place:
    """A run that was interrupted past step 20, with the checkpoints of steps 15 and 20."""
    shutil.rmtree(trained.runs / "mini/pretrain/final")
    (trained.runs / "mini/pretrain/manifest.json").unlink()
    return trained


def damage(path: Path) -> None:
    """Changes a bit."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_passed_over(interrupted: Place, made: Place):
    damage(interrupted.runs / "mini/pretrain/step_0000020/weights.pt")
    run = interrupted.run("train.py", interrupted.config)
    assert re.search("step_0000020/weights.pt has SHA-256.*: passing over .*step_0000020", run.stderr)
    assert "resumed from step 15" in run.stdout
    assert_same_run(interrupted, made)


def test_a_damaged_final_checkpoint_is_not_used_and_is_made_again(trained: Place, made: Place):
    damage(trained.runs / "mini/pretrain/final/weights.pt")
    for command in (("pipeline.py", trained.config, "eval"), ("serve.py", trained.config, "generate", "x")):
        process = trained.run(*command, status=2)
        assert "final/weights.pt" in process.stderr
        assert "damaged" in process.stderr
    assert not list(trained.runs.glob("mini/**/results.json"))
    assert "resumed from step 20" in trained.run("train.py", trained.config).stdout
    assert_same_run(trained, made)


@pytest.mark.parametrize("file", ["packed/train.bin", "packed/train.idx", "tokenizer/spm.model"])
def test_damaged_inputs_are_named(packed: Place, file):
    shutil.rmtree(packed.runs / "mini/corpus")  # so that nothing can be made again
    path = packed.runs / "mini" / file
    os.truncate(path, path.stat().st_size - 3)
    error = packed.run("train.py", packed.config, status=2).stderr
    assert str(path) in error
    assert not (packed.runs / "mini/pretrain").exists()


# ----------------------------------------------------------------------------------------------- the machine's limits

LIMITED = """
import resource
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_{0}, ({1}, {1}))
"""


def test_too_little_memory_is_answered_with_what_to_change(packed: Place):
    packed.edit(
        ("d_model=32", "d_model=512"), ("n_layers=2", "n_layers=12"), ("micro_batch_size=4", "micro_batch_size=12")
    )
    error = packed.run("-c", LIMITED.format("AS", "used + 400_000_000") + RUN, packed.config, status=2).stderr
    assert error == (
        "error: out of memory; set micro_batch_size=6 (now 12), then gradient_checkpointing=True (now False), "
        "then context_length=32 (now 64)\n"
    )


def test_a_disk_that_fills_up_loses_nothing(packed: Place, made: Place):
    """A limit on the size of files, which the system enforces as it does a full disk."""
    error = packed.run("-c", LIMITED.format("FSIZE", 150_000) + RUN, packed.config, status=2).stderr
    assert error.startswith("error: File too large")
    assert not list((packed.runs / "mini/pretrain").glob("*_*"))
    packed.run("train.py", packed.config)
    assert_same_run(packed, made)


@pytest.mark.parametrize("threads", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_two_runs_give_the_same_bytes(packed: Place, threads, tmp_path_factory: pytest.TempPathFactory):
    """A model wide enough that threads share its sums."""
    packed.edit(("d_model=32", "d_model=192"), ("steps=24", "steps=4"), ("micro_batch_size=4", "micro_batch_size=12"))
    packed.edit(('precision="float32", deterministic=True', "deterministic=True"))
    again = copied(packed, tmp_path_factory.mktemp("again"))
    for place in (packed, again):
        place.env["OMP_NUM_THREADS"] = threads
        out = place.run("train.py", place.config).stdout
        assert f", {threads} thread" in out
        assert "precision   float32" in out
    assert_same_run(packed, again)


def test_each_evaluation_shows_how_two_held_out_documents_go_on(made: Place):
    for text in (made.output, (made.runs / "mini/pretrain/log.txt").read_text()):
        assert text.count("text:  ") == text.count("model: ") == 3 * 2
        assert len(set(re.findall("text: .*", text))) == 2
    directory = made.runs / "mini/packed"
    start = np.fromfile(directory / "val.idx", "<i8")[0]
    ids = np.fromfile(directory / "val.bin", "<u2")[start : start + 12]
    begins = tokenizer.load(made.runs / "mini/tokenizer").decode(ids.tolist())
    assert f"text:  {' '.join(begins.split())}\n" in made.output


class Unequal(Numbers):
    """One held-out document, shorter than what is shown of a document."""

    tokens, starts, bytes = np.array([*range(17)]), np.array([0]), 17


@pytest.mark.parametrize("validation", [Numbers, Unequal])
def test_samples_leave_the_random_numbers_alone_and_survive_weights_that_are_not_finite(validation, caplog):
    caplog.set_level("INFO", "lumi")
    model, task = counting(CONFIG, validation=validation)
    state = torch.get_rng_state()
    with torch.no_grad():
        task.evaluate(model, 4)
        assert torch.equal(torch.get_rng_state(), state)
        first = caplog.messages.copy()
        task.evaluate(model, 4)
        assert caplog.messages == 2 * first  # the same model writes the same
        assert len(first) == (2 if validation is Numbers else 1)
        model.norm.weight.fill_(math.nan)
        assert math.isnan(task.evaluate(model, 4)["val_loss"])
    assert caplog.messages == 2 * first
