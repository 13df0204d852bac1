"""Fine-tuning: what is trained and saved, what the base keeps, and that a run cannot be harmed by killing it."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import configs
import finetune
import generate
import lora
import sft.data
import stage
import tokenizer
import trainer
from cli import UserError
from lora import LoRAConfig
from model import ModelConfig, Transformer
from optim import learning_rate
from sft import templates
from sft.data import Rows
from sft.train import FineTuning
from stage import Stage
from tests.conftest import MINI, ROOT, Place, build, write_lines
from tests.sft.test_data import HELD
from tests.test_train import digest, tree
from trainer import TrainConfig

# Fine-tunes in a process that sends itself a signal at the n-th forward pass of training.
KILL = """
import os, signal, sys
import cli, model, pipeline
forward, calls = model.Transformer.forward, [0]
def killing(*a, **k):
    calls[0] += a[0].training
    if calls[0] == {at} and a[0].training:
        os.kill(os.getpid(), signal.{signal})
    return forward(*a, **k)
model.Transformer.forward = killing
cli.apart = lambda function: function()
cli.run(pipeline.main, pipeline.parser().parse_args())
"""


class Crash(Exception):
    """Ends a run in this process as a kill would: nothing is saved any more."""


def tuned(place: Place, crash: int | None = None, name: str = "sft", **options) -> Path:
    """Fine-tunes as the command does, in this process; crashes in the n-th forward pass. Returns the directory."""
    calls, forward = itertools.count(1), Transformer.forward

    def crashing(*inputs, **named):
        if next(calls) == crash:
            raise Crash
        return forward(*inputs, **named)

    with pytest.MonkeyPatch.context() as patch:
        if crash:
            patch.setattr(Transformer, "forward", crashing)
        return place.make(name, **options)


@pytest.fixture
def ready(fine_tuned: Place, tmp_path: Path) -> Place:
    """A copy of it that has its rows of conversations, and is not fine-tuned."""
    shutil.copytree(fine_tuned.path, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "runs/mini/sft")
    return Place(tmp_path)


def assert_same_run(place: Place, other: Place) -> None:
    """The same bytes of the adapter and of everything that resuming needs, and the same log."""
    for name in ("final", "best", "step_0000009"):
        for file in ("adapter.pt", "state.pt"):
            ours, theirs = (p.runs / "mini/sft" / name / file for p in (place, other))
            assert digest(ours) == digest(theirs), (name, file)
    assert place.metrics("sft") == other.metrics("sft")


# ------------------------------------------------------------------------------------------------- what is left behind


def test_only_the_adapter_is_trained_and_saved(fine_tuned: Place, made: Place):
    directory, base = fine_tuned.runs / "mini/sft", fine_tuned.runs / "mini/pretrain"
    assert {p.name for p in directory.iterdir() if p.is_dir()} == {"final", "best", "step_0000006", "step_0000009"}
    for name in ("final", "best", "step_0000006", "step_0000009"):
        assert {p.name for p in (directory / name).iterdir()} == {"adapter.pt", "state.pt", "manifest.json"}
        adapter = checkpoint.read(directory / name, "adapter.pt")
        assert len(adapter) == 2 * 7 * 2  # A and B of seven projections in two blocks
        assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
        assert all(tensor.abs().sum() > 0 for tensor in adapter.values())
    assert tree(base) == tree(made.runs / "mini/pretrain")


def test_the_run_logs_what_it_should(fine_tuned: Place):
    log = fine_tuned.metrics("sft")
    assert [m["step"] for m in log] == list(range(1, 11))
    assert [m["step"] for m in log if "val_loss" in m] == [4, 8, 10]
    assert log[-1]["val_loss"] < log[3]["val_loss"] < log[0]["loss"]
    config = configs.load(fine_tuned.config).sft.train
    by_hand = replace(config, warmup_fraction=None, warmup_steps=2)
    assert [m["lr"] for m in log] == pytest.approx([learning_rate(by_hand, step, 10) for step in range(10)])
    for text in (fine_tuned.output, (fine_tuned.runs / "mini/sft/log.txt").read_text()):
        assert text.count("asked: ") == text.count("said:  ") == 3 * 2  # the same two questions at each evaluation
        assert len(set(re.findall("asked: .*", text))) == 2


def test_the_validation_loss_is_that_of_every_held_out_token(fine_tuned: Place):
    """Conversation by conversation, without packing, by the model that is loaded."""
    directory = fine_tuned.runs / "mini/sft_data"
    counts = stage.read_manifest(directory)["counts"]
    assert 2 <= counts["val"]["rows"] <= 8  # all of them are read
    assert counts["val"]["conversations"] > counts["val"]["rows"]
    rows, nats = Rows(directory, "val", counts, 64), 0.0
    model = checkpoint.load_model(fine_tuned.runs / "mini/sft/final")
    for number in range(counts["val"]["conversations"]):
        ids, trained = map(torch.from_numpy, rows.conversation(number))
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="none")
        nats += float(losses[trained[1:]].sum())
    assert fine_tuned.metrics("sft")[-1]["val_loss"] == pytest.approx(nats / counts["val"]["trained"], rel=1e-5)


def test_the_final_model_answers(fine_tuned: Place):
    final = fine_tuned.runs / "mini/sft/final"
    model, base = checkpoint.load_model(final), checkpoint.load_model(fine_tuned.runs / "mini/pretrain/final")
    assert not lora.layers(model)
    assert model.num_parameters() == base.num_parameters()
    assert not torch.equal(model.blocks[0].attn.q.weight, base.blocks[0].attn.q.weight)
    changed = (model.head.weight != base.head.weight).any(1).nonzero().flatten().tolist()
    end, start, eos = (stage.read_manifest(final)["config"]["begin"][name] for name in ("end", "start", "eos"))
    assert changed == [end]  # which pretraining has never shown: it begins as the end of a text
    rows = base.head.weight
    assert torch.equal(model.head.weight[end], rows[eos] + (rows[end] - rows[start]))
    assert torch.equal(model.embed.weight, base.embed.weight)
    assert len(generate.generate(model, [1, 2, 3], 5, temperature=0)) == 5
    assert checkpoint.template(final) == "chatml"
    assert checkpoint.template(fine_tuned.runs / "mini/pretrain/final") is None


def test_the_same_command_again_finds_it_done(fine_tuned: Place):
    before = tree(fine_tuned.runs / "mini/sft")
    tuned(fine_tuned)
    assert tree(fine_tuned.runs / "mini/sft") == before


# ------------------------------------------------------------------------------------------------- killed and resumed


# A step takes two forward passes, one a micro-batch; an evaluation one for two rows, and then those of its samples.
@pytest.mark.parametrize("crash", [1, 2 * 3 + 2, 2 * 4 + 1, 2 * 4 + 5, -3])
def test_killed_and_restarted_equals_fine_tuned(ready: Place, fine_tuned: Place, crash):
    """With dropout, which draws the same in a run that is gone on with."""
    assert configs.load(ready.config).sft.lora.dropout == 0.1
    if crash < 0:  # counted from the end: the last evaluation
        whole, forward = itertools.count(1), Transformer.forward
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Transformer, "forward", lambda *a, **k: (next(whole), forward(*a, **k))[1])
            tuned(ready)
        shutil.rmtree(ready.runs / "mini/sft")
        crash += next(whole)
    with pytest.raises(Crash):
        tuned(ready, crash)
    tuned(ready)
    assert_same_run(ready, fine_tuned)


@pytest.mark.parametrize(("name", "status"), [pytest.param("SIGKILL", -9, marks=pytest.mark.slow), ("SIGTERM", 143)])
def test_a_signal_in_the_middle_of_a_step(ready: Place, fine_tuned: Place, name, status):
    """SIGTERM has the step finished and saved; the line says how to go on."""
    killed = ready.start("-c", KILL.format(at=2 * 5 + 2, signal=name), ready.config, "sft")
    _, err = killed.communicate(timeout=120)
    assert killed.returncode == status, err
    steps = [step for step, _ in checkpoint.steps(ready.runs / "mini/sft")]
    assert steps == ([3] if name == "SIGKILL" else [6, 3])
    if name == "SIGTERM":
        assert f"saved at step 6 of 10; resume with: python pipeline.py {ready.config} sft" in err
    tuned(ready)
    for file in ("adapter.pt", "state.pt"):
        ours, theirs = (p.runs / "mini/sft/final" / file for p in (ready, fine_tuned))
        assert digest(ours) == digest(theirs)
    assert ready.metrics("sft") == fine_tuned.metrics("sft")


def test_dropout_depends_on_what_is_trained_on_not_on_what_was_drawn_before(ready: Place, fine_tuned: Place):
    experiment = configs.load(ready.config)
    spm = tokenizer.load(fine_tuned.runs / "mini/tokenizer")
    rows = fine_tuned.runs / "mini/sft_data"
    task = FineTuning(experiment.sft, experiment.model, rows, sft.data.load(rows, spm.sha256), spm).task()
    model = checkpoint.load_model(fine_tuned.runs / "mini/pretrain/final")
    lora.attach(model, LoRAConfig(rank=4, dropout=0.5))
    for layer in lora.layers(model).values():
        torch.nn.init.normal_(layer.b["default"])
    tokens, targets, positions, samples = task.batch(0, 0, 1)
    losses = []
    for training, first in ((True, 0), (True, 0), (True, 1), (False, 0)):
        torch.rand(3)
        model.train(training)
        losses.append(task.loss(model, tokens, targets, positions, samples + first)["loss"].item())
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3


# ------------------------------------------------------------------------------------------------------------ variants


def test_full_fine_tuning_writes_the_weights(ready: Place, made: Place):
    ready.edit(("lora=LoRAConfig(rank=4, alpha=8.0, dropout=0.1)", "lora=None"))
    directory = tuned(ready)
    for name in ("final", "best", "step_0000009"):
        assert {p.name for p in (directory / name).iterdir()} == {"weights.pt", "state.pt", "manifest.json"}
    base = checkpoint.read(made.runs / "mini/pretrain/final", "weights.pt")
    final = checkpoint.read(directory / "final", "weights.pt")
    assert final.keys() == base.keys()
    assert not any(torch.equal(final[name], base[name]) for name in base)
    assert tree(ready.runs / "mini/pretrain") == tree(made.runs / "mini/pretrain")
    shutil.rmtree(ready.runs / "mini/pretrain")  # it stands by itself
    assert len(generate.generate(checkpoint.load_model(directory / "final"), [1], 3)) <= 3
    assert ready.metrics("sft")[-1]["val_loss"] < ready.metrics("sft")[0]["loss"]


def test_without_a_pretrained_model_nothing_is_made(place: Place):
    error = place.run("pipeline.py", place.config, "sft", status=2).stderr
    assert f"train it with: python train.py {place.config}" in error
    assert not place.runs.exists()


def test_a_checkpoint_of_a_step_can_be_fine_tuned(ready: Place):
    start = ready.runs / "mini/pretrain/step_0000015"
    directory = tuned(ready, checkpoint=str(start))
    manifest = stage.read_manifest(directory / "final")
    assert checkpoint.base(directory / "final") == start
    assert digest(start / "weights.pt") in manifest["read"].values()
    expected = checkpoint.load_model(start).embed.weight
    assert torch.equal(checkpoint.load_model(directory / "final").embed.weight, expected)
    with pytest.raises(UserError, match=r"was made from something else: pretrain/step_0000015/state\.pt was"):
        tuned(ready)


def test_a_base_from_elsewhere_stays_there_when_runs_move(ready: Place, tmp_path_factory):
    """Without a pretrained model of its own, and with `runs` as a link."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.move(ready.runs / "mini/pretrain/final", elsewhere / "base")
    shutil.rmtree(ready.runs / "mini/pretrain")
    (elsewhere / "deep/er").mkdir(parents=True)
    shutil.move(ready.runs, elsewhere / "deep/er/runs")
    ready.runs.symlink_to(elsewhere / "deep/er/runs")
    directory = tuned(ready, checkpoint=str(elsewhere / "base"))
    assert checkpoint.base(directory / "final") == elsewhere / "base"
    expected = checkpoint.load_model(directory / "final").state_dict()
    ready.runs.unlink()
    shutil.move(elsewhere / "deep/er/runs", ready.runs)
    found = checkpoint.load_model(directory / "final").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    tuned(ready, checkpoint=str(elsewhere / "base"))  # is up to date


def test_a_checkpoint_that_is_not_there_is_named(ready: Place):
    with pytest.raises(UserError, match="nowhere is not a checkpoint"):
        tuned(ready, checkpoint="nowhere")
    assert not (ready.runs / "mini/sft").exists()


def test_a_base_that_was_trained_anew_is_refused(ready: Place):
    """For its adapter, and for going on with it."""
    directory = tuned(ready)
    before = tree(directory)
    ready.edit(("learning_rate=3e-3", "learning_rate=2e-3"))
    tuned(ready, name="pretrain", force=True)
    for call in (lambda: checkpoint.load_model(directory / "final"), lambda: checkpoint.base(directory / "final")):
        with pytest.raises(UserError, match="holds an adapter of another model than the one that is now in") as refused:
            call()
        assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match=r"was made from something else: .*pretrain/final/weights\.pt was .*--force"):
        tuned(ready)
    assert tree(directory) == before
    tuned(ready, force=True)
    checkpoint.load_model(directory / "final")


def test_a_base_that_is_gone_is_named(fine_tuned: Place, tmp_path: Path):
    shutil.copytree(fine_tuned.runs / "mini/sft", tmp_path / "runs/mini/sft")
    with pytest.raises(UserError, match=r"an adapter of the model in .*pretrain/final, which is not there"):
        checkpoint.load_model(tmp_path / "runs/mini/sft/final")
    shutil.copytree(fine_tuned.runs / "mini/pretrain", tmp_path / "runs/mini/pretrain")
    checkpoint.load_model(tmp_path / "runs/mini/sft/final")  # both were moved together


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ("rank=4", "rank=5", "lora.rank was 4, is now 5"),
        ("learning_rate=1e-2", "learning_rate=2e-2", "sft.learning_rate was 0.01, is now 0.02"),
        ("warmup_fraction=0.2", "warmup_fraction=0.3", "sft.warmup_fraction was 0.2, is now 0.3"),
    ],
)
def test_another_config_is_refused(fine_tuned: Place, ready: Place, before, after, named):
    shutil.copytree(fine_tuned.runs / "mini/sft", ready.runs / "mini/sft")
    ready.edit((before, after))
    with pytest.raises(UserError, match=re.escape(named)):
        tuned(ready)


def test_more_steps_go_on_from_the_end(fine_tuned: Place, ready: Place):
    shutil.copytree(fine_tuned.runs / "mini/sft", ready.runs / "mini/sft")
    ready.edit(("steps=10", "steps=12"))
    tuned(ready)
    assert [m["step"] for m in ready.metrics("sft")] == list(range(1, 13))


# ------------------------------------------------------------------------------------------------------------ learning


PAIRS = [(f"What is {a} {b}?", f"{b} {a}") for a, b in itertools.product(("red", "up", "one", "far"), "vwxyz")]


def learning(directory: Path, adapter: LoRAConfig | None, steps: int, monkeypatch, text) -> tuple:
    """Trains on 20 questions until they are known by heart. Returns the model, its tokenizer and what was logged."""
    monkeypatch.setenv("DATA", str(directory / "raw"))
    monkeypatch.setenv("RUNS", str(directory / "runs"))
    (directory / "raw").mkdir()
    write_lines(directory / "raw/text.jsonl", ({"text": part} for part in text))
    write_lines(directory / "raw/chats.jsonl", [HELD, *({"prompt": q, "response": a} for q, a in PAIRS)])
    (directory / "mini.py").write_text(MINI)
    found = configs.load(directory / "mini.py")
    shape = ModelConfig(vocab_size=512, context_length=64, n_layers=2, d_model=64, n_heads=2)
    config = TrainConfig(steps=steps, batch_size=4, learning_rate=1e-2, warmup_fraction=0.1, compile=False,
                         precision="float32", eval_every=steps, log_every=1, save_every=steps)  # fmt: skip
    found = replace(found, model=shape, sft=replace(found.sft, lora=adapter, train=config))
    rows = build("sft_data", found)
    spm = found.load_tokenizer()
    torch.manual_seed(0)
    model = Transformer(shape)
    with torch.no_grad():
        model.head.weight.mul_(20), model.embed.weight.mul_(20)  # as far apart as training makes them
    task = FineTuning(found.sft, shape, rows, sft.data.load(rows, spm.sha256), spm).task()
    job = Stage(directory / "out", {"model": shape, "sft": config}, {}, "", stage.__file__)
    with job.making():
        trainer.train(finetune.adapt(model, adapter), task, config, job, "auto")
    log = [json.loads(line) for line in (directory / "out/metrics.jsonl").read_text().splitlines()]
    return model, spm, Rows(rows, "train", stage.read_manifest(rows)["counts"], 64), log


@pytest.mark.parametrize("adapter", [LoRAConfig(rank=16, alpha=32.0, dropout=0.0), None])
def test_a_few_answers_are_learnt_by_heart(tmp_path, monkeypatch, text, adapter):
    """Greedily, from the question as it is put when answering, and the end of the answer too."""
    model, spm, rows, log = learning(tmp_path, adapter, 150, monkeypatch, text)
    assert log[-1]["loss"] < 0.1 < 3 < log[0]["loss"]
    model.eval()
    right = 0
    for number in range(len(rows.starts) - 1):
        ids, trained = rows.conversation(number)
        first = int(np.flatnonzero(trained)[0])
        found = generate.generate(model, ids[:first].tolist(), 20, temperature=0, stop=templates.ends("chatml", spm))
        right += found == ids[first:-1].tolist()
    assert right == len(PAIRS) == 20


# ------------------------------------------------------------------------------------------------------ learning rate


def test_warmup_as_a_share_of_the_steps_by_hand(tmp_path):
    """0.25 of 8 steps are 2: half of the peak, the peak, and then down, linearly, to 0 after the eighth."""
    from tests.test_train import CONFIG, run_counting

    config = replace(CONFIG, steps=8, learning_rate=1.0e-2, warmup_fraction=0.25, schedule="linear", log_every=1)
    _, log = run_counting(tmp_path / "share", config)
    sixths = [6, 5, 4, 3, 2, 1]
    assert [m["lr"] for m in log] == pytest.approx([0.5e-2, 1e-2, *(n / 6 * 1e-2 for n in sixths)])
    _, other = run_counting(tmp_path / "steps", replace(config, warmup_fraction=None, warmup_steps=2))
    assert [m["loss"] for m in log] == [m["loss"] for m in other]


@pytest.mark.parametrize("changes", [{"warmup_fraction": 0.1, "warmup_steps": 5}, {"warmup_fraction": 1.1},
                                     {"warmup_fraction": -0.1}, {"warmup_fraction": float("nan")}])  # fmt: skip
def test_warmup_that_cannot_be_is_refused(changes):
    with pytest.raises(ValueError, match=r"^warmup_(fraction|steps) is "):
        TrainConfig(steps=10, batch_size=1, learning_rate=1e-3, **changes)


# ------------------------------------------------------------------------------------------------------ two processes


def with_two(place: Place, name: str = "sft") -> str:
    """Trains a stage in two processes; what was printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "pipeline.py"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(
        [*command, str(place.config), name], cwd=ROOT, env=place.env, text=True, start_new_session=True, **pipes
    )
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("changes", ["", 'parallel="fsdp", ', "full"])
def test_two_processes_train_as_one(fine_tuned: Place, ready: Place, changes):
    """With dropout too: each draws for its rows what one process draws for them as a micro-batch."""
    if changes == "full":
        ready.edit(("lora=LoRAConfig(rank=4, alpha=8.0, dropout=0.1)", "lora=None"))
        fine_tuned = Place(shutil.copytree(ready.path, ready.path.parent / "alone"))
        tuned(fine_tuned)
    else:
        ready.edit(("deterministic=True", f"{changes}deterministic=True"))
    with_two(ready)
    ours, theirs = ready.metrics("sft"), fine_tuned.metrics("sft")
    for name in ("loss", "grad_norm", "lr", "tokens"):
        assert [m[name] for m in ours] == pytest.approx([m[name] for m in theirs], rel=1e-4), name
    found = [[m["val_loss"] for m in log if "val_loss" in m] for log in (ours, theirs)]
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    ours, theirs = (checkpoint.load_model(p.runs / "mini/sft/final").state_dict() for p in (ready, fine_tuned))
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-3, atol=1e-4)
