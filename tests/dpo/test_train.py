"""Preferences: that they are learnt, what is logged and saved, and that a run cannot be harmed by killing it."""

import itertools
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import configs
import dpo.data
import dpo.train
import generate
import lora
import stage
import tokenizer
import trainer
from cli import UserError
from dpo.data import PairConfig, PairRows
from dpo.pairs import Pairs
from dpo.train import DPOConfig
from finetune import Base
from lora import LoRAConfig
from model import Transformer
from optim import learning_rate
from tests.conftest import CHATS, Place, write_lines
from tests.sft.test_train import with_two
from tests.test_train import digest, tree

LOGGED = ("loss", "reward_chosen", "reward_rejected", "margin", "accuracy", "logp_chosen", "logp_rejected")


class Crash(Exception):
    """Ends a run in this process as a kill would: nothing is saved any more."""


def prefer(place: Place, crash: int | None = None, name: str = "dpo", **options) -> Path:
    """Trains as the command does, in this process; crashes in the n-th forward pass. Returns the directory."""
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
def ready(preferring: Place, tmp_path: Path) -> Place:
    """A copy of it that has its pairs and what the reference thinks of them, and has not learnt from them."""
    shutil.copytree(preferring.path, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "runs/mini/dpo")
    return Place(tmp_path)


@pytest.fixture
def done(preferring: Place, tmp_path: Path) -> Place:
    """A copy of the whole."""
    return Place(shutil.copytree(preferring.path, tmp_path, dirs_exist_ok=True))


ADAPTER_OFF = ("    dpo=DPOConfig(", '    dpo=DPOConfig(reference="adapter_off",')
FULL = ("lora=LoRAConfig(rank=3, alpha=6.0, dropout=0.0)", "lora=None")


def held_out(place: Place, split: str = "val") -> tuple[torch.Tensor, torch.Tensor]:
    """ids and bounds of every pair of a split."""
    directory = place.runs / "mini/dpo_data"
    rows = PairRows(directory, split, stage.read_manifest(directory)["counts"])
    return rows.read(range(rows.count))[:2]


def thought(model: Transformer, ids: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """log π of the answers, (pairs, 2): answer by answer, of full logits, in float64."""
    model, found = model.double(), []
    with torch.no_grad():
        for row, (p, c, r) in zip(ids, bounds.tolist(), strict=True):
            for text in (row[:c], torch.cat([row[:p], row[c:r]])):
                logits = model(text[None, :-1])[0].log_softmax(-1)
                found.append(logits[p - 1 :].gather(1, text[p:, None]).sum())
    return torch.stack(found).view(-1, 2)


# ------------------------------------------------------------------------------------------------- what is left behind


def test_only_the_adapter_is_trained_and_saved(preferring: Place, fine_tuned: Place):
    directory = preferring.runs / "mini/dpo"
    assert {p.name for p in directory.iterdir() if p.is_dir()} == {"final", "best", "step_0000003", "step_0000006"}
    for name in ("final", "best", "step_0000006"):
        assert {p.name for p in (directory / name).iterdir()} == {"adapter.pt", "state.pt", "manifest.json"}
        adapter = checkpoint.read(directory / name, "adapter.pt")
        assert len(adapter) == 2 * 7 * 2  # A and B of seven projections in two blocks
        assert all(tensor.abs().sum() > 0 for tensor in adapter.values())
    for other in ("pretrain", "sft"):
        assert tree(preferring.runs / "mini" / other) == tree(fine_tuned.runs / "mini" / other)
    assert checkpoint.base(directory / "final") == preferring.runs / "mini/sft/final"
    assert checkpoint.template(directory / "final") == "chatml"


def test_the_run_logs_what_it_should_and_learns(preferring: Place):
    log = preferring.metrics("dpo")
    assert [m["step"] for m in log] == list(range(1, 10))
    assert all(name in m for m in log for name in LOGGED)
    measured = [m for m in log if "val_loss" in m]
    assert [m["step"] for m in measured] == [4, 8, 9]
    assert all(f"val_{name}" in m for m in measured for name in (*LOGGED, "kl"))
    assert log[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert log[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert log[-1]["val_loss"] < log[3]["val_loss"] < math.log(2)
    assert log[-1]["val_accuracy"] > 0.75
    assert log[-1]["val_margin"] > log[3]["val_margin"] > 0
    assert log[-1]["val_kl"] > log[3]["val_kl"] > 0
    for m in log:
        assert m["margin"] == pytest.approx(m["reward_chosen"] - m["reward_rejected"], abs=1e-9)
    config = configs.load(preferring.config).dpo.train
    by_hand = replace(config, warmup_fraction=None, warmup_steps=2)
    assert [m["lr"] for m in log] == pytest.approx([learning_rate(by_hand, step, 9) for step in range(9)])


def test_what_is_measured_is_that_of_every_held_out_pair(preferring: Place):
    """By the models that are loaded, text by text, in float64: rewards, their margin, the loss and the divergence."""
    final, base = (checkpoint.load_model(preferring.runs / f"mini/{name}/final") for name in ("dpo", "sft"))
    ids, bounds = held_out(preferring)
    assert len(ids) == 12
    policy, reference = thought(final, ids, bounds), thought(base, ids, bounds)
    reward = 0.1 * (policy - reference)
    margin = reward[:, 0] - reward[:, 1]
    found = preferring.metrics("dpo")[-1]
    assert found["val_reward_chosen"] == pytest.approx(reward[:, 0].mean().item(), rel=1e-4)
    assert found["val_reward_rejected"] == pytest.approx(reward[:, 1].mean().item(), rel=1e-4)
    assert found["val_margin"] == pytest.approx(margin.mean().item(), rel=1e-4)
    assert found["val_accuracy"] == pytest.approx((margin > 0).double().mean().item())
    assert found["val_loss"] == pytest.approx(torch.log1p(torch.exp(-margin)).mean().item(), rel=1e-6)
    assert found["val_logp_chosen"] == pytest.approx(policy[:, 0].mean().item(), rel=1e-5)
    assert found["val_logp_rejected"] == pytest.approx(policy[:, 1].mean().item(), rel=1e-5)
    assert found["val_kl"] == pytest.approx(kl(final, base, ids, bounds), rel=1e-4)


def kl(model: Transformer, reference: Transformer, ids: torch.Tensor, bounds: torch.Tensor) -> float:
    """Σ p log (p / q) over the vocabulary, at each token of the chosen answers, on average."""
    found = []
    with torch.no_grad():
        for row, (p, c, _) in zip(ids, bounds.tolist(), strict=True):
            ours, theirs = (each.double()(row[None, : c - 1])[0, p - 1 :].softmax(-1) for each in (model, reference))
            found.append((ours * (ours / theirs).log()).sum(-1))
    found = torch.cat(found)
    assert len(found) == int((bounds[:, 1] - bounds[:, 0]).sum())
    return found.mean().item()


def task_of(place: Place, stored: dict | None = None, **changes) -> trainer.Task:
    """What dpo.train hands the loop."""
    experiment = configs.load(place.config)
    experiment = replace(experiment, dpo=replace(experiment.dpo, **changes))
    spm = tokenizer.load(place.runs / "mini/tokenizer")
    base, pairs = Base(place.runs / "mini/sft/final", experiment.model, None), place.runs / "mini/dpo_data"
    counts = dpo.data.load(pairs, spm.sha256)
    return dpo.train.PreferenceLearning(experiment.dpo, base, pairs, counts, stored).task()


def adapted(place: Place, fill: bool = False) -> Transformer:
    """The fine-tuned model with a new adapter."""
    torch.manual_seed(0)
    model = checkpoint.load_model(place.runs / "mini/sft/final")
    lora.attach(model, LoRAConfig(rank=3, alpha=6.0, dropout=0.0))
    for layer in lora.layers(model).values() if fill else ():
        torch.nn.init.normal_(layer.b["default"], std=0.3)
    return model


def test_before_training_nothing_diverges_and_nothing_is_preferred(preferring: Place):
    model = adapted(preferring)
    with torch.no_grad():
        found = task_of(preferring, reference="adapter_off").evaluate(model)
    for name in ("val_reward_chosen", "val_reward_rejected", "val_margin", "val_kl"):
        assert found[name] == 0, name
    assert found["val_accuracy"] == 0.5
    assert found["val_loss"] == pytest.approx(math.log(2), rel=1e-12)


def test_the_divergence_of_a_model_far_from_its_reference(preferring: Place):
    """Measured on MEASURED held-out pairs at most, spread over all of them."""
    model, base = adapted(preferring, fill=True), checkpoint.load_model(preferring.runs / "mini/sft/final")
    ids, bounds = held_out(preferring)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        found = [task_of(preferring, reference="adapter_off").evaluate(model)["val_kl"]]
        patch.setattr(dpo.train, "MEASURED", 4)
        found.append(task_of(preferring, reference="adapter_off").evaluate(model)["val_kl"])
    assert found[0] > 0.01
    assert found[0] == pytest.approx(kl(model, base, ids, bounds), rel=1e-4)
    assert found[1] == pytest.approx(kl(model, base, ids[::3], bounds[::3]), rel=1e-4)


def test_the_model_that_is_loaded_is_the_one_that_was_trained(ready: Place):
    """Its adapter merged into the fine-tuned model, whose own adapter is merged into the pretrained one."""
    kept = {}

    def keeping(model, *rest, original=trainer.train):
        original(model, *rest)
        kept["model"] = model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train", keeping)
        directory = prefer(ready)
    loaded, model = checkpoint.load_model(directory / "final"), kept["model"].eval()
    assert not lora.layers(loaded)
    tokens = torch.randint(512, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = loaded(tokens), model(tokens)
        base = checkpoint.load_model(ready.runs / "mini/sft/final")(tokens)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
    assert float((ours - base).norm() / base.norm()) > 1e-3
    assert len(generate.generate(loaded, [1, 2, 3], 5, temperature=0)) == 5


def test_the_same_command_again_finds_it_done(preferring: Place):
    before = tree(preferring.runs / "mini")
    prefer(preferring)
    assert tree(preferring.runs / "mini") == before


# ------------------------------------------------------------------------------------------------- killed and resumed


def assert_same_run(place: Place, other: Place) -> None:
    """The same bytes of the adapter and of everything that resuming needs, and the same log."""
    for name in ("final", "best", "step_0000006"):
        for file in ("adapter.pt", "state.pt"):
            ours, theirs = (p.runs / "mini/dpo" / name / file for p in (place, other))
            assert digest(ours) == digest(theirs), (name, file)
    assert place.metrics("dpo") == other.metrics("dpo")


# A step takes two forward passes, one a micro-batch; an evaluation more, for the loss and then for the divergence.
@pytest.mark.parametrize("crash", [1, 2 * 3 + 2, 2 * 4 + 1, 2 * 4 + 12, -3])
def test_killed_and_restarted_equals_trained(ready: Place, preferring: Place, crash):
    if crash < 0:  # counted from the end: the last evaluation
        whole, forward = itertools.count(1), Transformer.forward
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Transformer, "forward", lambda *a, **k: (next(whole), forward(*a, **k))[1])
            prefer(ready)
        shutil.rmtree(ready.runs / "mini/dpo")
        crash += next(whole)
    with pytest.raises(Crash):
        prefer(ready, crash)
    prefer(ready)
    assert_same_run(ready, preferring)


@pytest.mark.slow
def test_killed_with_its_adapter_off_it_goes_on_too(ready: Place, tmp_path_factory):
    """With the reference computed at each step: the crash comes while the adapter is off."""
    ready.edit(ADAPTER_OFF)
    whole = Place(shutil.copytree(ready.path, tmp_path_factory.mktemp("whole"), dirs_exist_ok=True))
    prefer(whole)
    with pytest.raises(Crash):
        prefer(ready, 4 * 4 + 3)
    prefer(ready)
    assert_same_run(ready, whole)


@pytest.mark.slow
def test_sigterm_saves_and_says_how_to_go_on(ready: Place, preferring: Place):
    kill = """
import os, signal
import cli, model, pipeline
forward, calls = model.Transformer.forward, [0]
def killing(*a, **k):
    calls[0] += a[0].training
    if calls[0] == 10 and a[0].training:
        os.kill(os.getpid(), signal.SIGTERM)
    return forward(*a, **k)
model.Transformer.forward = killing
cli.apart = lambda function: function()
cli.run(pipeline.main, pipeline.parser().parse_args())
"""
    killed = ready.start("-c", kill, ready.config, "dpo")
    _, err = killed.communicate(timeout=120)
    assert killed.returncode == 143, err
    assert f"saved at step 5 of 9; resume with: python pipeline.py {ready.config} dpo" in err
    prefer(ready)
    assert digest(ready.runs / "mini/dpo/final/adapter.pt") == digest(preferring.runs / "mini/dpo/final/adapter.pt")
    assert ready.metrics("dpo") == preferring.metrics("dpo")


# ------------------------------------------------------------------------------------------------------------ variants


def assert_alike(ours: list[dict], theirs: list[dict]) -> None:
    """The same numbers, but for rounding."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=2e-4, abs=2e-5), name


@pytest.mark.parametrize("size", [1, 6])
def test_the_size_of_micro_batches_changes_nothing(ready: Place, preferring: Place, size):
    ready.edit(("micro_batch_size=3", f"micro_batch_size={size}"))
    prefer(ready)
    assert_alike(ready.metrics("dpo"), preferring.metrics("dpo"))


def test_either_reference_gives_the_same_run(ready: Place, preferring: Place):
    shutil.rmtree(ready.runs / "mini/dpo_reference")
    ready.edit(ADAPTER_OFF)
    prefer(ready)
    assert not (ready.runs / "mini/dpo_reference").exists()
    assert_alike(ready.metrics("dpo"), preferring.metrics("dpo"))
    first = ready.metrics("dpo")[0]
    assert first["reward_chosen"] == first["reward_rejected"] == first["margin"] == 0
    assert first["accuracy"] == 0.5


def test_training_every_weight_writes_the_weights(ready: Place, fine_tuned: Place):
    ready.edit(FULL, ("learning_rate=5e-3", "learning_rate=1e-3"))
    directory = prefer(ready)
    for name in ("final", "best", "step_0000006"):
        assert {p.name for p in (directory / name).iterdir()} == {"weights.pt", "state.pt", "manifest.json"}
    log = ready.metrics("dpo")
    assert log[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert log[-1]["val_accuracy"] > 0.75
    assert log[-1]["val_loss"] < log[0]["loss"]
    final, base = checkpoint.load_model(directory / "final"), checkpoint.load_model(ready.runs / "mini/sft/final")
    ids, bounds = held_out(ready)
    margin = (0.1 * (thought(final, ids, bounds) - thought(base, ids, bounds))) @ torch.tensor([1.0, -1.0]).double()
    assert log[-1]["val_margin"] == pytest.approx(margin.mean().item(), rel=1e-4)
    assert log[-1]["val_kl"] == pytest.approx(kl(final, base, ids, bounds), rel=1e-3)
    shutil.rmtree(ready.runs / "mini/sft")  # it stands by itself
    checkpoint.load_model(directory / "final")


@pytest.mark.slow
@pytest.mark.parametrize("loss", ['loss="ipo"', 'loss="hinge"', "label_smoothing=0.1, chosen_weight=0.5"])
def test_every_loss_learns(ready: Place, loss):
    ready.edit(("    dpo=DPOConfig(", f"    dpo=DPOConfig(loss=LossConfig({loss}),"),
               ("from dpo.pairs", "from dpo.loss import LossConfig\nfrom dpo.pairs"))  # fmt: skip
    prefer(ready)
    log = ready.metrics("dpo")
    assert log[-1]["val_loss"] < log[3]["val_loss"]
    assert log[-1]["val_accuracy"] > 0.75


def test_weights_over_two_sources(ready: Place):
    """Three in four pairs are of the first, however many there are of each; and the log counts them."""
    others = [{"prompt": f"Spell {i}.", "chosen": "no " * 3 + str(i), "rejected": str(i)} for i in range(200)]
    write_lines(ready.raw / "others.jsonl", others)
    ready.edit(
        ("sources=(Pairs(", 'sources=(Pairs(paths=("others.jsonl",), name="others"), Pairs('),
        ("    dpo=DPOConfig(", '    dpo=DPOConfig(weights={"pairs": 3, "others": 1}, reference="adapter_off",'),
        ("batch_size=6, micro_batch_size=3", "batch_size=16, micro_batch_size=8"),
    )  # fmt: skip
    shutil.rmtree(ready.runs / "mini/dpo_data")
    prefer(ready)
    log = ready.metrics("dpo")
    counts = stage.read_manifest(ready.runs / "mini/dpo_data")["counts"]["train"]
    assert 25 < counts["sources"]["pairs"]["pairs"] < 40 < 100 < counts["sources"]["others"]["pairs"]
    directory, counts = ready.runs / "mini/dpo_data", stage.read_manifest(ready.runs / "mini/dpo_data")["counts"]
    bounds = {name: PairRows(directory, "train", counts, source=name) for name in ("pairs", "others")}
    tokens = {name: np.mean(np.ptp(of.bounds[of.first : of.first + of.count], 1)) for name, of in bounds.items()}
    assert log[-1]["seen"] == {"pairs": round(9 * 12 * tokens["pairs"]), "others": round(9 * 4 * tokens["others"])}
    assert log[-1]["val_accuracy"] > 0.75
    ready.edit(('{"pairs": 3, "others": 1}', '{"pairs": 3, "other": 1}'))
    with pytest.raises(UserError, match="weights names other; expected names of the data's sources"):
        prefer(ready)


# ------------------------------------------------------------------------------------------------- what does not fit


@pytest.mark.slow
def test_without_a_fine_tuned_model_nothing_is_made(place: Place):
    error = place.run("pipeline.py", place.config, "dpo", status=2).stderr
    assert f"train it with: python pipeline.py {place.config} sft" in error
    assert not place.runs.exists()


@pytest.mark.slow
def test_a_base_that_was_trained_anew_is_refused(done: Place):
    """By the checkpoint, by the stored reference, and by a run that is to go on."""
    directory = done.runs / "mini/dpo"
    before = tree(directory)
    done.edit(("learning_rate=1e-2", "learning_rate=2e-2"))
    prefer(done, name="sft", force=True)
    with pytest.raises(UserError, match="holds an adapter of another model than the one that is now in"):
        checkpoint.load_model(directory / "final")
    with pytest.raises(UserError, match=r"dpo_reference was made from something else: .*sft/final/adapter\.pt was"):
        prefer(done)
    done.edit(ADAPTER_OFF)
    with pytest.raises(UserError, match=r"dpo was made from something else: .*sft/final/adapter\.pt was .*--force"):
        prefer(done)
    assert tree(directory) == before
    prefer(done, force=True)
    checkpoint.load_model(directory / "final")


def test_another_template_is_refused(ready: Place):
    ready.edit(("data=ConversationConfig(", 'data=ConversationConfig(template="alpaca", '))
    with pytest.raises(UserError, match=r"learnt to answer in the template 'chatml', .* in 'alpaca'; set template"):
        prefer(ready)
    assert not (ready.runs / "mini/dpo").exists()


def test_a_base_can_be_named(ready: Place):
    """A checkpoint of a step; and one that is not there."""
    ready.edit(ADAPTER_OFF)
    start = ready.runs / "mini/sft/step_0000009"
    directory = prefer(ready, checkpoint=str(start))
    assert checkpoint.base(directory / "final") == start
    checkpoint.load_model(directory / "final")
    with pytest.raises(UserError, match=r"was made from something else: .*sft/step_0000009/"):
        prefer(ready)
    with pytest.raises(UserError, match="nowhere is not a checkpoint"):
        prefer(ready, checkpoint="nowhere")


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ("rank=3", "rank=2", "lora.rank was 3, is now 2"),
        ("learning_rate=5e-3", "learning_rate=6e-3", "dpo.learning_rate was 0.005, is now 0.006"),
        (
            "    dpo=DPOConfig(",
            "    dpo=DPOConfig(loss=dpo.loss.LossConfig(beta=0.2),",
            "loss.beta was 0.1, is now 0.2",
        ),
    ],
)
def test_another_config_is_refused(done: Place, before, after, named):
    done.edit((before, after), ("from dpo.data", "import dpo.loss\nfrom dpo.data"))
    with pytest.raises(UserError, match=re.escape(named)):
        prefer(done)


def test_more_steps_and_the_other_reference_go_on_from_the_end(done: Place):
    done.edit(("steps=9", "steps=11"), ADAPTER_OFF)
    prefer(done)
    log = done.metrics("dpo")
    assert [m["step"] for m in log] == list(range(1, 12))
    assert log[-1]["val_loss"] < log[7]["val_loss"]


def test_other_pairs_are_refused(done: Place):
    write_lines(done.raw / "pairs.jsonl", [{"prompt": c["prompt"], "chosen": "x", "rejected": "y"} for c in CHATS])
    with pytest.raises(UserError, match=r"dpo_data was made from something else: .*pairs\.jsonl was"):
        prefer(done)
    done.make("dpo_data", force=True)
    with pytest.raises(UserError, match=r"dpo_reference was made from something else: .*dpo_data/train\.bin was"):
        prefer(done)


def test_a_loss_that_is_not_finite_is_skipped_and_then_stops_the_run(ready: Place):
    ready.edit(ADAPTER_OFF, ("steps=9", "steps=9, max_skipped=3"))
    wrong, original = {4, 5}, dpo.train.preference_loss  # evaluations come between, which keep no gradient
    calls = itertools.count()

    def not_a_number(policy, *rest):
        found = original(policy, *rest)
        return found * (math.nan if policy.requires_grad and next(calls) // 2 in wrong else 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpo.train, "preference_loss", not_a_number)
        prefer(ready)
        assert [m["skipped"] for m in ready.metrics("dpo")] == [0, 0, 0, 0, 1, 2, 2, 2, 2]
        assert ready.metrics("dpo")[-1]["val_accuracy"] > 0.75
        wrong.add(6)
        calls = itertools.count()
        with pytest.raises(UserError, match=r"in 3 steps in a row, the last in step 7 \(.*train\.bin") as e:
            prefer(ready, force=True)
    assert f"pipeline.py {ready.config} dpo --force" in str(e.value)
    assert "\n" not in str(e.value)


# ---------------------------------------------------------------------------------------------------------- the config


def test_a_wrong_config_is_refused():
    with pytest.raises(ValueError, match=r'^reference is .offline.; expected "stored" or "adapter_off"'):
        DPOConfig(reference="offline")
    with pytest.raises(ValueError, match=r'^reference is "adapter_off" and lora None; expected "stored"'):
        DPOConfig(reference="adapter_off", lora=None)
    with pytest.raises(ValueError, match=r"^dropout of lora is 0.1; expected 0"):
        DPOConfig(lora=LoRAConfig(dropout=0.1))
    with pytest.raises(ValueError, match=r"^weights names chats; expected names"):
        DPOConfig(weights={"chats": 1})
    with pytest.raises(ValueError, match=r"^weights "):
        DPOConfig(weights={"python_pairs": -1})
    with pytest.raises(TypeError, match=r"^loss is "):
        DPOConfig(loss="sigmoid")
    with pytest.raises(TypeError, match=r"^lora is "):
        DPOConfig(lora=3)
    with pytest.raises(TypeError, match=r"^train is "):
        DPOConfig(train=None)
    assert DPOConfig(lora=None).reference == "stored"
    own = PairConfig(sources=(Pairs(paths=("a.jsonl",)), Pairs(paths=("b.jsonl",), name="b")))
    assert DPOConfig(data=own, weights={"b": 1}).weights == {"b": 1}


def test_metrics_are_json_that_any_reader_takes(preferring: Place):
    for line in (preferring.runs / "mini/dpo/metrics.jsonl").read_text().splitlines():
        assert all(isinstance(value, (int, float)) for value in json.loads(line).values())


@pytest.mark.slow
@pytest.mark.parametrize("changes", ["", 'parallel="fsdp", ', "adapter_off"])
def test_two_processes_train_as_one(ready: Place, preferring: Place, changes):
    """Four held-out pairs each, or none: what is measured is of all of them too."""
    if changes == "adapter_off":
        ready.edit(("dpo=DPOConfig(", 'dpo=DPOConfig(reference="adapter_off", '))
    else:
        head, tail = ready.config.read_text().split("dpo=DPOConfig(")
        ready.config.write_text(f"{head}dpo=DPOConfig({tail.replace('deterministic', changes + 'deterministic', 1)}")
    with_two(ready, "dpo")
    ours, theirs = ready.metrics("dpo"), preferring.metrics("dpo")
    for name in (*LOGGED, "grad_norm", "lr", "tokens"):
        assert [m[name] for m in ours] == pytest.approx([m[name] for m in theirs], rel=1e-4, abs=1e-4), name
    for name in [name for name in theirs[-1] if name.startswith("val_")]:
        found = [[m[name] for m in log if name in m] for log in (ours, theirs)]
        assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-4), name
