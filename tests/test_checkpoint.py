"""A checkpoint is there whole or not at all, and what is loaded is what was saved."""

import contextlib
import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch

import checkpoint
import generate
import stage
from cli import UserError
from model import ModelConfig, Transformer

SHAPE = ModelConfig(vocab_size=11, context_length=8, n_layers=1, d_model=8, n_heads=2)
ABOUT = {"config": {"model": stage.describe(SHAPE)}, "read": {}, "counts": {"step": 3}}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    checkpoint.save(
        tmp_path / "final", {"weights.pt": Transformer(SHAPE).state_dict(), "state.pt": {"x": torch.arange(5)}}, ABOUT
    )
    return tmp_path / "final"


def test_model_comes_back_bit_for_bit(saved):
    torch.manual_seed(0)
    fresh, loaded = Transformer(SHAPE), checkpoint.load_model(saved)
    assert all(
        torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    assert not loaded.training
    assert checkpoint.read(saved, "state.pt")["x"].tolist() == [0, 1, 2, 3, 4]
    assert len(generate.generate(loaded, [1], 20, seed=0)) == 20


def test_the_same_weights_give_the_same_bytes(saved, tmp_path):
    torch.manual_seed(0)
    checkpoint.save(
        tmp_path / "again", {"weights.pt": Transformer(SHAPE).state_dict(), "state.pt": {"x": torch.arange(5)}}, ABOUT
    )
    for name in ("weights.pt", "state.pt"):
        assert (saved / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


PAGE = 4096


def flipped(content: bytes, place: int) -> bytes:
    """One bit of the byte at a place is another."""
    return content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :]


FAULTS = {
    "one byte short": lambda content: content[:-1],
    "half of it": lambda content: content[: len(content) // 2],
    "nothing of it": lambda content: b"",
    "a zeroed page": lambda content: content[: len(content) // 3] + bytes(PAGE) + content[len(content) // 3 + PAGE :],
    "a zeroed tail": lambda content: content[: len(content) // 2] + bytes(len(content) - len(content) // 2),
    "a bit of the beginning": lambda content: flipped(content, 0),
    "a bit of a tensor": lambda content: flipped(content, content.index(TENSOR.numpy().tobytes()) + 100),
    "a bit of the zip directory": lambda content: flipped(content, content.rindex(b"PK\x01\x02") + 20),
    "a bit of the end": lambda content: flipped(content, len(content) - 1),
}
TENSOR = torch.arange(1.0, 2001.0)


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A directory with checkpoints of steps 1 and 2, every file of them longer than a page."""
    for step in (1, 2):
        about = ABOUT | {"read": {"long": "-" * 2 * PAGE}, "counts": {"step": step}}
        checkpoint.save(
            tmp_path / f"step_{step}", {"weights.pt": {"w": TENSOR}, "state.pt": {"x": TENSOR, "step": step}}, about
        )
    return tmp_path


# Of the manifest the last byte is a newline, which says nothing; tensors and a zip directory it has none.
CASES = [(file, fault) for file in ("weights.pt", "state.pt") for fault in FAULTS]
CASES += [("manifest.json", fault) for fault in FAULTS if fault.split()[-1] not in ("short", "tensor", "directory")]


@pytest.mark.parametrize(("file", "fault"), CASES)
def test_damage_is_named_and_never_loaded(two, file, fault, caplog):
    path = two / "step_2" / file
    whole = path.read_bytes()
    damaged = FAULTS[fault](whole)
    assert damaged != whole
    path.write_bytes(damaged)
    for each in ("weights.pt", "state.pt") if file == "manifest.json" else (file,):
        with pytest.raises(UserError, match=f"step_2/{file} .*damaged"):
            checkpoint.read(two / "step_2", each)
    assert [p.name for p in checkpoint.newest(two)] == ["step_1"]
    assert f"step_2/{file} " in caplog.text
    assert f"passing over {two / 'step_2'}" in caplog.text


@pytest.mark.parametrize("file", ["weights.pt", "state.pt", "manifest.json"])
def test_a_lost_file_is_named(two, file):
    (two / "step_2" / file).unlink()
    with pytest.raises(UserError, match=file):
        checkpoint.read(two / "step_2", "state.pt" if file == "manifest.json" else file)
    assert [p.name for p in checkpoint.newest(two)] == ["step_1"]


def test_no_bit_of_a_manifest_goes_unnoticed(saved):
    """One bit, drawn anew for each byte. What may be read is what was written: 1E-05 for 1e-05 says the same."""
    path, chance = saved / "manifest.json", random.Random(0)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << chance.randrange(8)]) + whole[place + 1 :])
        with contextlib.suppress(UserError):
            checkpoint.read(saved, "state.pt")
            assert json.dumps(json.loads(path.read_bytes())) == json.dumps(json.loads(whole))


@pytest.mark.parametrize("what", ["empty", "file", "link", "broken link"])
def test_what_stands_at_a_checkpoints_name_is_passed_over_and_replaced(two, what, tmp_path_factory):
    there, elsewhere = two / "step_3", tmp_path_factory.mktemp("elsewhere") / "kept"
    if what == "empty":
        there.mkdir()
    elif what == "file":
        there.write_text("")
    else:
        if what == "link":
            elsewhere.mkdir()
        there.symlink_to(elsewhere)
    assert [p.name for p in checkpoint.newest(two)] == ["step_2", "step_1"]
    checkpoint.save(there, {"weights.pt": {"w": TENSOR}, "state.pt": {"step": 3}}, ABOUT)
    assert [p.name for p in checkpoint.newest(two)] == ["step_3", "step_2", "step_1"]
    assert not there.is_symlink()
    assert elsewhere.exists() == (what == "link")
    assert sorted(p.name for p in two.iterdir()) == ["step_1", "step_2", "step_3"]


def test_a_checkpoint_kept_elsewhere_is_read_through_its_link(two, tmp_path_factory):
    kept = shutil.move(two / "step_2", tmp_path_factory.mktemp("elsewhere"))
    (two / "step_2").symlink_to(kept)
    (two / "step_2/notes.txt").write_text("and files that it does not know do no harm")
    assert checkpoint.read(next(checkpoint.newest(two)), "state.pt")["step"] == 2


def test_what_a_killed_save_left_is_put_right(two):
    """Also where a file or a link stands in place of a directory."""
    shutil.copytree(two / "step_2", two / ".step_2.old")  # killed when the new one stood already
    (two / "step_1").rename(two / ".step_1.old")  # killed when none stood
    (two / "step_1").symlink_to("nowhere")
    (two / ".best.partial").mkdir()
    (two / ".best.partial/weights.pt").write_text("half")
    for name in (".metrics.jsonl.partial", ".step_2.old.partial"):
        (two / name).write_text("half")
    (two / ".final.partial").symlink_to(two / "step_2")
    (two / "final").write_text("")
    (two / "final").rename(two / ".final.old")
    (two / "final").mkdir()
    checkpoint.recover(two)
    assert sorted(p.name for p in two.iterdir()) == ["final", "step_1", "step_2"]
    assert [p.name for p in checkpoint.newest(two)] == ["step_2", "step_1"]


class Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


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
            checkpoint.save(
                saved,
                {"weights.pt": Transformer(SHAPE).state_dict(), "state.pt": {"x": torch.zeros(5, dtype=torch.long)}},
                ABOUT,
            )
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
