"""What the reference thinks of pairs: that both ways to it agree, and that what is stored is never used for others."""

import copy
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import configs
import dpo.data
import dpo.reference
import dpo.train
import lora
import stage
from cli import UserError
from data.pack import SPLITS
from dpo.data import PairRows
from dpo.loss import log_probs
from dpo.reference import of_pairs
from finetune import Base
from model import Transformer
from tests.conftest import PREFERENCES, Place, write_lines
from tests.dpo.test_train import adapted, held_out, prefer, task_of, thought
from tests.test_train import digest, tree


def refer(place: Place, **options) -> Path:
    """Computes the log-probabilities as the command does. Returns their directory."""
    return place.make("dpo_reference", **options)


@pytest.fixture
def ready(preferring: Place, tmp_path: Path) -> Place:
    """A copy of it, not trained yet."""
    shutil.copytree(preferring.path, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "runs/mini/dpo")
    return Place(tmp_path)


def stored(place: Place) -> dict[str, torch.Tensor]:
    return dpo.reference.load(place.runs / "mini/dpo_reference")


def rows(place: Place, split: str) -> PairRows:
    directory = place.runs / "mini/dpo_data"
    return PairRows(directory, split, stage.read_manifest(directory)["counts"])


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# ---------------------------------------------------------------------------------------------------------- two ways


def test_what_is_stored_is_what_the_fine_tuned_model_thinks_of_every_pair(preferring: Place):
    """In the order of dpo_data; computed text by text in float64."""
    model, found = checkpoint.load_model(preferring.runs / "mini/sft/final"), stored(preferring)
    assert set(found) == set(SPLITS)
    for split, each in found.items():
        ids, bounds = held_out(preferring, split)
        assert each.dtype == torch.float64
        assert each.shape == (len(ids), 2)
        assert relative(each, thought(model, ids, bounds)) < 1e-6
        assert len(set(each[:, 0].tolist())) > len(ids) // 2


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-6), (torch.float64, 1e-9)], ids=["float32", "float64"])
def test_stored_and_adapter_off_agree(preferring: Place, dtype, near):
    """Whatever the adapter has learnt, and whatever pairs are read together."""
    base = checkpoint.load_model(preferring.runs / "mini/sft/final").to(dtype)
    model = adapted(preferring, fill=True).to(dtype).train()
    for split in SPLITS:
        pairs = rows(preferring, split)
        expected = of_pairs(base, pairs, split)
        parts = []
        for ids, bounds, numbers in pairs.batches(5):
            with torch.no_grad(), lora.without(model):
                parts.append(log_probs(model, ids, bounds))
            assert relative(log_probs(model, ids, bounds).detach(), expected[numbers]) > 1e-3
        assert relative(torch.cat(parts), expected) < near
        assert relative(expected, stored(preferring)[split]) < 1e-6


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-6), (torch.float64, 1e-9)], ids=["float32", "float64"])
def test_they_agree_in_a_run_of_some_steps(preferring: Place, dtype, near):
    """Loss, rewards and gradients, step by step; the reference does not move with the model."""
    base = checkpoint.load_model(preferring.runs / "mini/sft/final").to(dtype)
    of_base = {split: of_pairs(base, rows(preferring, split), split) for split in SPLITS}
    tasks = [task_of(preferring, of_base), task_of(preferring, reference="adapter_off")]
    model = adapted(preferring).to(dtype).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    for step in range(5):
        batch = tasks[0].batch(step, 0, 1)
        found = []
        for task in tasks:
            optimizer.zero_grad()
            means = task.loss(model, *batch)
            means["loss"].backward()
            found.append((means, torch.cat([p.grad.flatten() for p in parameters])))
        (one, gradient), (other, other_gradient) = found
        scale = abs(one["logp_chosen"].item())  # of what rewards are differences of
        for name in one:
            assert one[name].item() == pytest.approx(other[name].item(), abs=near * scale) or name == "accuracy"
        assert relative(gradient, other_gradient) < 10 * near
        optimizer.step()
    assert one["margin"] > 1e-3
    with torch.no_grad():
        ours, theirs = (task.evaluate(model) for task in tasks)
    assert ours["val_kl"] == theirs["val_kl"] > 0
    assert ours["val_margin"] == pytest.approx(theirs["val_margin"], abs=1e-6 * scale)


def test_a_batch_takes_the_numbers_of_its_own_pairs(preferring: Place):
    """Stored numbers that say which pair and split they are of."""
    given = {split: torch.arange(2.0 * rows(preferring, split).count).view(-1, 2).double() for split in SPLITS}
    given["val"] += 1000
    task, model = task_of(preferring, given), adapted(preferring)
    ids, bounds, numbers = task.batch(0, 0, 1)
    means = task.loss(model, ids, bounds, numbers)
    policy = log_probs(model, ids, bounds)
    expected = 0.1 * (policy - given["train"][numbers])
    assert means["reward_chosen"].item() == pytest.approx(expected[:, 0].mean().item())
    assert means["reward_rejected"].item() == pytest.approx(expected[:, 1].mean().item())
    with torch.no_grad():
        expected = 0.1 * (log_probs(model, *held_out(preferring)) - given["val"])
        assert task.evaluate(model)["val_reward_chosen"] == pytest.approx(expected[:, 0].mean().item())


def test_the_model_itself_stands_in_only_while_its_adapter_is_off(preferring: Place):
    """In the divergence: of an adapted model from itself without it, of another from a second model."""
    model, base = adapted(preferring, fill=True), checkpoint.load_model(preferring.runs / "mini/sft/final")
    tokens, pairs = torch.arange(1, 9)[None], held_out(preferring)
    with torch.no_grad():
        before = model(tokens)
        found = dpo.train.divergence(model, *pairs, lambda: pytest.fail("loaded in vain"))
        assert torch.equal(model(tokens), before)
        assert found == pytest.approx(dpo.train.divergence(checkpoint_of(model), *pairs, lambda: base), rel=1e-4)
        assert found > 0
        assert dpo.train.divergence(base, *pairs, lambda: base) == 0


def checkpoint_of(model: Transformer) -> Transformer:
    """The same model without an adapter beside it."""
    plain = copy.deepcopy(model)
    lora.fold(plain)
    return plain


def test_without_an_adapter_training_takes_what_is_stored(ready: Place):
    ready.edit(("lora=LoRAConfig(rank=3, alpha=6.0, dropout=0.0)", "lora=None"))
    before = tree(ready.runs / "mini/dpo_reference")
    prefer(ready)
    assert tree(ready.runs / "mini/dpo_reference") == before
    log = ready.metrics("dpo")
    assert log[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert log[-1]["val_margin"] > 0.01


# ------------------------------------------------------------------------------------------- bound to what it is of


def test_made_again_it_is_the_same_and_nothing_else_is(ready: Place):
    directory = ready.runs / "mini/dpo_reference"
    before = {p.name: digest(p) for p in directory.glob("*.logp")}
    assert set(before) == {"train.logp", "val.logp"}
    shutil.rmtree(directory)
    refer(ready)
    assert {p.name: digest(p) for p in directory.glob("*.logp")} == before
    manifest = stage.read_manifest(directory)
    for read in (ready.runs / "mini/sft/final/adapter.pt", ready.runs / "mini/dpo_data/train.bin"):
        assert digest(read) in manifest["read"].values()
    whole = tree(directory)
    refer(ready)
    assert tree(directory) == whole


def test_another_model_is_named_and_the_command(ready: Place):
    start = ready.runs / "mini/sft/step_0000009"
    before = tree(ready.runs / "mini/dpo_reference")
    command = f"pipeline.py {ready.config} dpo_reference --checkpoint {start} --force"
    error = rf"dpo_reference was made from something else: .*sft/.*was .*{command}"
    for call in (refer, prefer):
        with pytest.raises(UserError, match=error) as refused:
            call(ready, checkpoint=str(start))
        assert "\n" not in str(refused.value)
    assert tree(ready.runs / "mini/dpo_reference") == before
    old = stored(ready)["val"]
    refer(ready, checkpoint=str(start), force=True)
    model = checkpoint.load_model(start)
    assert relative(stored(ready)["val"], thought(model, *held_out(ready))) < 1e-6
    assert not torch.equal(stored(ready)["val"], old)


def test_other_pairs_are_named_and_the_command(ready: Place):
    write_lines(ready.raw / "pairs.jsonl", PREFERENCES[1:])
    shutil.rmtree(ready.runs / "mini/dpo_data")
    for call in (refer, prefer):
        with pytest.raises(
            UserError,
            match=rf"dpo_reference was made from something else: .*dpo_data/.*{ready.config} --force-from",
        ):
            call(ready)
    refer(ready, force=True)
    prefer(ready)


@pytest.mark.parametrize("harm", ["changed", "cut short", "gone"])
@pytest.mark.parametrize("file", ["train.logp", "val.logp"])
def test_a_damaged_file_is_named_and_the_command(ready: Place, file, harm):
    path = ready.runs / "mini/dpo_reference" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(content if harm == "changed" else content[:-8])
    with pytest.raises(
        UserError, match=rf"^{path} .*python pipeline.py (CONFIG|{ready.config}) dpo_reference --force"
    ) as refused:
        prefer(ready)
    assert "\n" not in str(refused.value)
    assert not (ready.runs / "mini/dpo").exists()
    refer(ready, force=True)
    prefer(ready)


def test_weights_that_are_not_finite_are_one_error(ready: Place):
    """As an adapter of which one number is; and nothing is left that would count as finished."""
    model = checkpoint.load_model(ready.runs / "mini/sft/final")
    with torch.no_grad():
        model.blocks[1].mlp.down.weight[0, 0] = math.nan
    pairs = rows(ready, "val")
    with pytest.raises(UserError, match=rf"pair 0 of {pairs.file} is not finite; the weights are damaged, or their"):
        of_pairs(model, pairs, "val")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Base, "load", lambda _: model)
        with pytest.raises(UserError, match="is not finite; the weights are damaged"):
            refer(ready, force=True)
    assert stage.read_manifest(ready.runs / "mini/dpo_reference") is None
    refer(ready)


def test_the_first_pair_that_is_not_finite_is_named(ready: Place):
    """A token that one pair alone has."""
    model, pairs = checkpoint.load_model(ready.runs / "mini/sft/final"), rows(ready, "train")
    ids = [set(np.asarray(pairs.tokens[b[0] : b[3]]).tolist()) for b in pairs.bounds]
    for number, own in enumerate(ids):
        if number and (alone := own - set().union(*(other for i, other in enumerate(ids) if i != number))):
            break
    else:
        number, alone = next((n, own - ids[0]) for n, own in enumerate(ids) if own - ids[0])
        number = next(n for n, own in enumerate(ids) if min(alone) in own)
    with torch.no_grad():
        model.embed.weight[min(alone)] = math.inf
    with pytest.raises(UserError, match=rf"log-probability of pair {number} of .*train\.bin is not finite"):
        of_pairs(model, pairs, "train")


def test_a_missing_base_is_one_error_and_a_missing_reference_is_made(ready: Place):
    shutil.rmtree(ready.runs / "mini/dpo_reference")
    with pytest.raises(
        UserError,
        match=r"dpo_reference is missing or unfinished; make it with: .* dpo_reference",
    ):
        stored(ready)
    prefer(ready)
    assert set(stored(ready)) == set(SPLITS)
    shutil.rmtree(ready.runs / "mini/sft")
    with pytest.raises(UserError, match=rf"train it with: python pipeline.py {ready.config} sft"):
        refer(ready)


def test_another_base_behind_the_same_path_is_refused(ready: Place):
    """The fine-tuned model made anew, with another seed."""
    ready.edit(("learning_rate=1e-2", "learning_rate=2e-2"))
    prefer(ready, name="sft", force=True)
    for call in (refer, prefer):
        with pytest.raises(UserError, match=r"dpo_reference was made from something else: .*sft/final/adapter\.pt was"):
            call(ready)


def test_a_config_of_another_model_is_refused(ready: Place):
    experiment = configs.load(ready.config)
    base = Base(ready.runs / "mini/sft/final", replace(experiment.model, d_ff=96), None)
    with pytest.raises(UserError, match=r"holds a model of another shape than the config describes"):
        base.load()
