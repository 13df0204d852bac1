"""Preferences: that they are learnt, what is logged and saved, and that a run survives being killed."""

import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import checkpoint
import configs
import dpo.data
import dpo.train
import lora
import stage
import tests.dpo.test_loss
import tokenizer
from cli import UserError
from dpo.data import PairRows
from dpo.train import DPOConfig
from finetune import Base
from lora import LoRAConfig
from model import Transformer
from tests.conftest import Place, copied
from tests.sft.test_train import Crash, assert_same_run, with_two
from tests.sft.test_train import tuned as train
from tests.test_train import tree

LOGGED = ("loss", "reward_chosen", "reward_rejected", "margin", "accuracy", "logp_chosen", "logp_rejected")
ADAPTER_OFF = ("    dpo=DPOConfig(", '    dpo=DPOConfig(reference="adapter_off",')
FULL = ("lora=LoRAConfig(rank=3, alpha=6.0, dropout=0.0)", "lora=None")


@pytest.fixture
def done(preferring: Place, tmp_path: Path) -> Place:
    """A copy of `preferring`."""
    return copied(preferring, tmp_path)


@pytest.fixture
def ready(done: Place) -> Place:
    """A copy of it that has its pairs and the reference's log-probabilities, and has not learnt from them."""
    shutil.rmtree(done.runs / "mini/dpo")
    return done


def prefer(place: Place, crash: int | None = None, **options) -> None:
    train(place, crash, "dpo", **options)


def held_out(place: Place, split: str = "val") -> tuple[torch.Tensor, torch.Tensor]:
    """ids and bounds of every pair of a split."""
    directory = place.runs / "mini/dpo_data"
    rows = PairRows(directory, split, stage.read_manifest(directory)["counts"])
    return rows.read(range(rows.count))[:2]


by_hand = torch.no_grad()(tests.dpo.test_loss.by_hand)


def kl(model: Transformer, reference: Transformer, ids: torch.Tensor, bounds: torch.Tensor) -> float:
    """Σ p log (p / q) over the vocabulary, at each token of the chosen answers, on average."""
    terms = []
    with torch.no_grad():
        for row, (p, c, _) in zip(ids, bounds.tolist(), strict=True):
            ours, theirs = (m.double()(row[None, : c - 1])[0, p - 1 :].softmax(-1) for m in (model, reference))
            terms.append((ours * (ours / theirs).log()).sum(-1))
    return torch.cat(terms).mean().item()


def task_of(place: Place, stored: dict | None = None, **changes) -> dpo.train.PreferenceLearning:
    """The task that dpo.train hands the loop."""
    experiment = configs.load(place.config)
    config, spm = replace(experiment.dpo, **changes), tokenizer.load(place.runs / "mini/tokenizer")
    base, pairs = Base(place.runs / "mini/sft/final", experiment.model, None), place.runs / "mini/dpo_data"
    return dpo.train.PreferenceLearning(config, base, pairs, dpo.data.load(pairs, spm.sha256), stored)


def adapted(place: Place) -> Transformer:
    """The fine-tuned model with a new adapter."""
    torch.manual_seed(0)
    model = checkpoint.load_model(place.runs / "mini/sft/final")
    lora.attach(model, LoRAConfig(rank=3, alpha=6.0, dropout=0.0))
    return model


def test_only_the_adapter_is_trained_and_saved(preferring: Place, fine_tuned: Place):
    directory = preferring.runs / "mini/dpo"
    assert {p.name for p in directory.iterdir() if p.is_dir()} == {"final", "best", "step_0000003", "step_0000006"}
    adapter = checkpoint.read(directory / "final", "adapter.pt")
    assert len(adapter) == 2 * (2 * 7 + 1)  # A and B of seven projections in two blocks, and of the head
    assert all(tensor.abs().sum() > 0 for tensor in adapter.values())
    for other in ("pretrain", "sft"):
        assert tree(preferring.runs / "mini" / other) == tree(fine_tuned.runs / "mini" / other)
    assert checkpoint.base(directory / "final") == preferring.runs / "mini/sft/final"
    assert checkpoint.template(directory / "final") == "chatml"
    before = tree(preferring.runs / "mini")
    prefer(preferring)  # is up to date
    assert tree(preferring.runs / "mini") == before


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
    assert log[-1]["val_kl"] > log[3]["val_kl"] > 0


def test_the_held_out_numbers_are_those_of_every_pair_by_hand(preferring: Place):
    """By the models that are loaded, text by text, in float64."""
    final, base = (checkpoint.load_model(preferring.runs / f"mini/{name}/final") for name in ("dpo", "sft"))
    ids, bounds = held_out(preferring)
    policy, reference = by_hand(final, ids, bounds), by_hand(base, ids, bounds)
    reward = 0.1 * (policy - reference)
    margin = reward[:, 0] - reward[:, 1]
    expected = {
        "reward_chosen": reward[:, 0],
        "reward_rejected": reward[:, 1],
        "margin": margin,
        "accuracy": (margin > 0).double(),
        "loss": torch.log1p(torch.exp(-margin)),
        "logp_chosen": policy[:, 0],
        "logp_rejected": policy[:, 1],
        "kl": torch.tensor(kl(final, base, ids, bounds)),
    }
    logged = preferring.metrics("dpo")[-1]
    for name, value in expected.items():
        assert logged[f"val_{name}"] == pytest.approx(value.mean().item(), rel=1e-4), name


def test_before_training_nothing_diverges_and_nothing_is_preferred(preferring: Place):
    """With the adapter off, the model is the SFT model exactly, its head included."""
    with torch.no_grad():
        metrics = task_of(preferring, reference="adapter_off").evaluate(adapted(preferring), 3)
    for name in ("val_reward_chosen", "val_reward_rejected", "val_margin", "val_kl"):
        assert metrics[name] == 0, name
    assert metrics["val_accuracy"] == 0.5
    assert metrics["val_loss"] == pytest.approx(math.log(2), rel=1e-12)


# A step takes two forward passes, one per micro-batch; an evaluation more, for the loss and then for the divergence.
@pytest.mark.parametrize(("reference", "crash"), [("stored", 2 * 3 + 2), ("stored", 2 * 4 + 12), ("adapter_off", 19)])
def test_killed_and_restarted_equals_uninterrupted(ready: Place, preferring: Place, tmp_path_factory, reference, crash):
    """Also when the crash comes while the adapter is off."""
    if reference == "adapter_off":
        ready.edit(ADAPTER_OFF)
        preferring = copied(ready, tmp_path_factory.mktemp("whole"))
        prefer(preferring)
    with pytest.raises(Crash):
        prefer(ready, crash)
    prefer(ready)
    assert_same_run(ready, preferring, "dpo", ("final", "best", "step_0000006"))


def test_neither_reference_nor_micro_batches_change_the_run(ready: Place, preferring: Place):
    shutil.rmtree(ready.runs / "mini/dpo_reference")
    ready.edit(ADAPTER_OFF, ("micro_batch_size=3", "micro_batch_size=6"))
    prefer(ready)
    assert not (ready.runs / "mini/dpo_reference").exists()
    for ours, theirs in zip(ready.metrics("dpo"), preferring.metrics("dpo"), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4, abs=2e-5)  # up to rounding


def test_training_every_weight_writes_the_weights(ready: Place):
    before = tree(ready.runs / "mini/dpo_reference")
    ready.edit(FULL, ("learning_rate=5e-3", "learning_rate=1e-3"))
    prefer(ready)
    assert tree(ready.runs / "mini/dpo_reference") == before
    final = ready.runs / "mini/dpo/final"
    assert {p.name for p in final.iterdir()} == {"weights.pt", "state.pt", "manifest.json"}
    log, (ids, bounds) = ready.metrics("dpo"), held_out(ready)
    assert log[-1]["val_accuracy"] > 0.75
    model, base = checkpoint.load_model(final), checkpoint.load_model(ready.runs / "mini/sft/final")
    margin = (0.1 * (by_hand(model, ids, bounds) - by_hand(base, ids, bounds))) @ torch.tensor([1.0, -1.0]).double()
    assert log[-1]["val_margin"] == pytest.approx(margin.mean().item(), rel=1e-4)
    assert log[-1]["val_kl"] == pytest.approx(kl(model, base, ids, bounds), rel=1e-3)


def test_another_template_is_refused(ready: Place):
    ready.edit(("data=ConversationConfig(", 'data=ConversationConfig(template="alpaca", '))
    with pytest.raises(UserError, match=r"learnt to answer in the template 'chatml', .* in 'alpaca'; set template"):
        prefer(ready)
    assert not (ready.runs / "mini/dpo").exists()


def test_another_base_or_config_is_refused_and_more_steps_continue(done: Place):
    done.edit(("steps=9", "steps=11"), ADAPTER_OFF)
    prefer(done)
    assert [m["step"] for m in done.metrics("dpo")] == list(range(1, 12))
    with pytest.raises(UserError, match=r"was made from something else: .*sft/step_0000009/"):
        prefer(done, checkpoint=str(done.runs / "mini/sft/step_0000009"))
    done.edit(("rank=3", "rank=2"))
    with pytest.raises(UserError, match=re.escape("lora.rank was 3, is now 2")):
        prefer(done)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"reference": "offline"}, ValueError, r'reference is .offline.; expected "stored" or "adapter_off"'),
        ({"reference": "adapter_off", "lora": None}, ValueError, 'reference is "adapter_off" and lora None'),
        ({"lora": LoRAConfig(dropout=0.1)}, ValueError, "dropout of lora is 0.1; expected 0"),
        ({"weights": {"chats": 1}}, ValueError, "weights names chats; there are python_pairs"),
        ({"weights": {"python_pairs": -1}}, ValueError, "weights "),
        ({"loss": "sigmoid"}, TypeError, "loss is "),
    ],
)
def test_a_wrong_config_is_refused(wrong, error, message):
    with pytest.raises(error, match=f"^{message}"):
        DPOConfig(**wrong)


@pytest.mark.slow
@pytest.mark.parametrize("changes", ["", 'parallel="fsdp", ', "adapter_off"])
def test_two_processes_train_as_one(ready: Place, preferring: Place, changes):
    """Each has four held-out pairs at a time, or none: the metrics are of all pairs too."""
    if changes == "adapter_off":
        ready.edit(ADAPTER_OFF)
    else:
        head, tail = ready.config.read_text().split("dpo=DPOConfig(")
        ready.config.write_text(f"{head}dpo=DPOConfig({tail.replace('deterministic', changes + 'deterministic', 1)}")
    with_two(ready, "dpo")
    ours, theirs = ready.metrics("dpo"), preferring.metrics("dpo")
    for name in (*LOGGED, "grad_norm", "lr", "tokens", *(name for name in theirs[-1] if name.startswith("val_"))):
        values = [[m[name] for m in log if name in m] for log in (ours, theirs)]
        assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-4), name
    ours, theirs = (checkpoint.load_model(p.runs / "mini/dpo/final").head.weight for p in (ready, preferring))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
