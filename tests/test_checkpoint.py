"""A checkpoint is there whole or not at all, and what is loaded is what was saved."""

import contextlib
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

import checkpoint
import stage
from model import ModelConfig, Transformer
from stage import UserError

SHAPE = ModelConfig(vocab_size=11, context_length=8, n_layers=1, d_model=8, n_heads=2)
ABOUT = {"config": {"model": stage.describe(SHAPE)}, "read": {}, "counts": {"step": 3}}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    checkpoint.save(tmp_path / "final", Transformer(SHAPE).state_dict(), {"x": torch.arange(5)}, ABOUT)
    return tmp_path / "final"


def test_model_comes_back_bit_for_bit(saved):
    torch.manual_seed(0)
    fresh, loaded = Transformer(SHAPE), checkpoint.load_model(saved)
    assert all(
        torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    assert not loaded.training
    assert checkpoint.read(saved, "state.pt")["x"].tolist() == [0, 1, 2, 3, 4]
    assert len(loaded.generate([1], 20, seed=0)) == 20


def test_the_same_weights_give_the_same_bytes(saved, tmp_path):
    torch.manual_seed(0)
    checkpoint.save(tmp_path / "again", Transformer(SHAPE).state_dict(), {"x": torch.arange(5)}, ABOUT)
    for name in ("weights.pt", "state.pt"):
        assert (saved / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("file", ["weights.pt", "state.pt"])
@pytest.mark.parametrize("fault", ["flipped bit", "zeroed page", "truncated", "missing"])
def test_damage_is_named_and_never_loaded(saved, file, fault):
    path = saved / file
    content = bytearray(path.read_bytes())
    if fault == "flipped bit":
        content[len(content) // 2] ^= 1
    elif fault == "zeroed page":
        content[:512] = bytes(512)
    elif fault == "truncated":
        del content[-1:]
    path.write_bytes(content)
    if fault == "missing":
        path.unlink()
    with pytest.raises(UserError, match=file):
        checkpoint.read(saved, file)
    assert list(checkpoint.newest(saved.parent)) == []


class Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_place_of_weights_is_not_run(saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    for content in (pickle.dumps(Code()), b"", b"not a checkpoint"):
        (saved / "weights.pt").write_bytes(content)
        manifest = stage.read_manifest(saved)
        manifest["wrote"] = stage.digests(saved, saved.glob("*.pt"))  # the attacker mends the digests too
        stage.write_manifest(saved, manifest)
        with pytest.raises(UserError, match=r"weights\.pt holds something other"):
            checkpoint.load_model(saved)
    torch.save({"embed.weight": Code()}, saved / "weights.pt")
    stage.write_manifest(saved, manifest | {"wrote": stage.digests(saved, saved.glob("*.pt"))})
    with pytest.raises(UserError, match=r"weights\.pt holds something other"):
        checkpoint.load_model(saved)
    assert not Path("executed").exists()


def test_weights_of_another_shape_are_refused(saved):
    manifest = stage.read_manifest(saved)
    manifest["config"]["model"]["d_model"] = 16
    stage.write_manifest(saved, manifest)
    with pytest.raises(UserError, match="does not hold the model"):
        checkpoint.load_model(saved)


@pytest.mark.parametrize("failing", ["torch.save", "os.rename", "stage.digests", "shutil.rmtree"])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_save_that_fails_anywhere_leaves_the_old_or_the_new(saved, monkeypatch, failing, call):
    before, calls = checkpoint.read(saved, "state.pt"), [0]
    module, name = failing.split(".")
    original = getattr({"torch": torch, "os": os, "stage": stage, "shutil": shutil}[module], name)

    def fail(*arguments, **options):
        calls[0] += 1
        if calls[0] == call:
            raise OSError(28, "No space left on device")
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(failing, fail)
        with contextlib.suppress(OSError):  # not every function is called three times
            checkpoint.save(saved, Transformer(SHAPE).state_dict(), {"x": torch.zeros(5, dtype=torch.long)}, ABOUT)
    checkpoint.recover(saved.parent)
    state = checkpoint.read(saved, "state.pt")["x"].tolist()
    assert state in (before["x"].tolist(), [0, 0, 0, 0, 0])
    assert [p.name for p in saved.parent.iterdir()] == ["final"]


def test_what_is_not_a_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no manifest\.json"):
        checkpoint.load_model(tmp_path / "nowhere")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load_model(tmp_path)
