"""The reference's log-probabilities: computed by hand, and bound to their model and pairs."""

import math
import shutil
from pathlib import Path

import pytest
import torch

import checkpoint
import dpo.reference
import stage
from cli import UserError
from data.pack import SPLITS
from dpo.data import PairRows
from dpo.loss import log_probs
from tests.conftest import PREFERENCES, Place, write_lines
from tests.dpo.test_train import adapted, by_hand, done, held_out, prefer, ready, task_of  # noqa: F401
from tests.test_model import relative
from tests.test_train import tree


def stored(place: Place) -> dict[str, torch.Tensor]:
    return dpo.reference.load(place.runs / "mini/dpo_reference")


def rows(place: Place, split: str) -> PairRows:
    directory = place.runs / "mini/dpo_data"
    return PairRows(directory, split, stage.read_manifest(directory)["counts"])


def test_stored_numbers_are_those_of_the_fine_tuned_model_by_hand(preferring: Place):
    """In the order of dpo_data; computed text by text in float64."""
    model = checkpoint.load_model(preferring.runs / "mini/sft/final")
    for split, values in stored(preferring).items():
        assert values.dtype == torch.float64
        assert relative(values, by_hand(model, *held_out(preferring, split))) < 1e-6


def test_batches_that_do_not_fit_into_memory_are_halved(preferring: Place, monkeypatch):
    monkeypatch.setattr(dpo.reference, "log_probs", limited := Limited())
    model, pairs = checkpoint.load_model(preferring.runs / "mini/sft/final"), rows(preferring, "train")
    assert relative(dpo.reference.of_pairs(model, pairs, "test"), stored(preferring)["train"]) < 1e-6
    assert max(limited.sizes) > 3 >= limited.sizes[-1]


class Limited:
    """log_probs on a GPU that holds three pairs."""

    def __init__(self):
        self.sizes = []

    def __call__(self, model, ids, bounds) -> torch.Tensor:
        self.sizes.append(len(ids))
        if len(ids) > 3:
            raise torch.OutOfMemoryError
        return log_probs(model, ids, bounds)


def test_a_batch_takes_the_numbers_of_its_own_pairs(preferring: Place):
    """Stored numbers that say which pair and split they belong to."""
    given = {split: torch.arange(2.0 * rows(preferring, split).count).view(-1, 2).double() for split in SPLITS}
    given["val"] += 1000
    task, model = task_of(preferring, given), adapted(preferring)
    ids, bounds, numbers = task.batch(0, 0, 1)
    expected = 0.1 * (log_probs(model, ids, bounds) - given["train"][numbers])
    assert task.loss(model, ids, bounds, numbers)["reward_chosen"].item() == pytest.approx(expected[:, 0].mean().item())
    with torch.no_grad():
        expected = 0.1 * (log_probs(model, *held_out(preferring)) - given["val"])
        assert task.evaluate(model, 3)["val_reward_chosen"] == pytest.approx(expected[:, 0].mean().item())


def test_another_model_or_other_pairs_are_named_with_the_command(ready: Place):  # noqa: F811
    start = ready.runs / "mini/sft/step_0000009"
    before = tree(ready.runs / "mini/dpo_reference")
    command = f"pipeline.py {ready.config} dpo_reference --checkpoint {start} --force"
    for name in ("dpo_reference", "dpo"):
        with pytest.raises(UserError, match=f"dpo_reference was made from something else: .*sft/.*was .*{command}"):
            ready.make(name, checkpoint=str(start))
    assert tree(ready.runs / "mini/dpo_reference") == before
    ready.make("dpo_reference", checkpoint=str(start), force=True)
    assert relative(stored(ready)["val"], by_hand(checkpoint.load_model(start), *held_out(ready))) < 1e-6
    write_lines(ready.raw / "pairs.jsonl", PREFERENCES[1:])
    shutil.rmtree(ready.runs / "mini/dpo_data")
    with pytest.raises(UserError, match=r"dpo_reference was made from something else: .*dpo_data/.*--force"):
        prefer(ready)


def test_a_damaged_file_is_named_with_the_command(ready: Place):  # noqa: F811
    path = ready.runs / "mini/dpo_reference/val.logp"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=rf"^{path} .*python pipeline.py (CONFIG|{ready.config}) dpo_reference --force"):
        prefer(ready)
    assert not (ready.runs / "mini/dpo").exists()


def test_weights_that_are_not_finite_are_an_error_and_leave_nothing_finished(ready: Place, monkeypatch):  # noqa: F811
    model = checkpoint.load_model(ready.runs / "mini/sft/final")
    with torch.no_grad():
        model.blocks[1].mlp.down.weight[0, 0] = math.nan
    monkeypatch.setattr(dpo.reference.Base, "load", lambda _: model)
    with pytest.raises(UserError, match=r"pairs in .*train\.bin is not finite; the weights are damaged, or"):
        ready.make("dpo_reference", force=True)
    assert stage.read_manifest(Path(ready.runs / "mini/dpo_reference")) is None
