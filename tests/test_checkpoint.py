"""A checkpoint is there whole or not at all, and what is loaded is what was saved."""

import contextlib
import itertools
import os
import pickle
import resource
import shutil
import signal
from dataclasses import replace
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
TENSOR = torch.arange(1.0, 2001.0)
PAGE = 4096


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    files = {"weights.pt": Transformer(SHAPE).state_dict(), "state.pt": {"x": torch.arange(5)}}
    checkpoint.save(tmp_path / "final", files, ABOUT)
    return tmp_path / "final"


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A directory with checkpoints of steps 1 and 2. Every file is longer than a page."""
    for step in (1, 2):
        about = ABOUT | {"read": {"long": "-" * 2 * PAGE}, "counts": {"step": step}}
        files = {"weights.pt": {"w": TENSOR}, "state.pt": {"x": TENSOR, "step": step}}
        checkpoint.save(tmp_path / f"step_{step}", files, about)
    return tmp_path


def test_model_comes_back_bit_for_bit(saved):
    torch.manual_seed(0)
    fresh, loaded = Transformer(SHAPE).state_dict(), checkpoint.load_model(saved)
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in loaded.state_dict().items())
    assert not loaded.training
    assert checkpoint.read(saved, "state.pt")["x"].tolist() == [0, 1, 2, 3, 4]
    assert len(generate.generate(loaded, [1], 20, seed=0)) == 20


def test_the_same_content_gives_the_same_bytes(tmp_path):
    """Also if equal strings are one object, or two."""
    for name, string in {"one": "adam", "two": "".join(["ad", "am"])}.items():
        torch.manual_seed(0)
        files = {"weights.pt": Transformer(SHAPE).state_dict(), "state.pt": {"names": ["adam", string]}}
        checkpoint.save(tmp_path / name, files, ABOUT)
    for name in ("weights.pt", "state.pt", "manifest.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize(
    "changes", [{"rope_theta": 500.0}, {"rms_norm_eps": 1e-6}, {"tie_embeddings": True}, {"context_length": 16}]
)
def test_a_model_of_another_shape_than_the_experiments_is_refused(saved, changes):
    """Also where names and shapes of the tensors are the same. What None stands for may be written out."""
    checkpoint.load_model(saved, shape=replace(SHAPE, n_kv_heads=2, d_ff=32, kernels="torch"))
    with pytest.raises(UserError, match=f"another shape than the config describes: {next(iter(changes))} was"):
        checkpoint.load_model(saved, shape=replace(SHAPE, **changes))


# -------------------------------------------------------------------------------------------------------------- damage


def flipped(content: bytes, place: int) -> bytes:
    """The content with one bit changed."""
    return content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :]


FAULTS = {
    "one byte short": lambda content: content[:-1],
    "a zeroed page": lambda content: content[: len(content) // 3] + bytes(PAGE) + content[len(content) // 3 + PAGE :],
    "a bit of a tensor": lambda content: flipped(content, content.index(TENSOR.numpy().tobytes()) + 100),
    "a bit of the zip directory": lambda content: flipped(content, content.rindex(b"PK\x01\x02") + 20),
    "lost": None,
}
CASES = [(file, fault) for file in ("weights.pt", "state.pt") for fault in FAULTS]
CASES += [("manifest.json", "a zeroed page")]


@pytest.mark.parametrize(("file", "fault"), CASES)
def test_damage_is_named_and_never_loaded(two, file, fault, caplog):
    path = two / "step_2" / file
    damaged = FAULTS[fault] and FAULTS[fault](path.read_bytes())
    path.unlink() if damaged is None else path.write_bytes(damaged)
    with pytest.raises(UserError, match=f"step_2/{file} .*damaged"):
        checkpoint.read(two / "step_2", "state.pt" if file == "manifest.json" else file)
    assert [p.name for p in checkpoint.newest(two)] == ["step_1"]
    assert f"step_2/{file} " in caplog.text
    assert f"passing over {two / 'step_2'}" in caplog.text


class Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_code_in_place_of_weights_is_not_run(saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    torch.save({"embed.weight": Code()}, saved.parent / "code.pt")
    for content in (pickle.dumps(Code()), b"not a checkpoint", (saved.parent / "code.pt").read_bytes()):
        (saved / "weights.pt").write_bytes(content)
        manifest = stage.read_manifest(saved)
        manifest["wrote"] = stage.digests(saved, saved.glob("*.pt"))  # the attacker corrects the digests too
        stage.write_manifest(saved, manifest)
        with pytest.raises(UserError, match=r"weights\.pt holds something other"):
            checkpoint.load_model(saved)
    assert not Path("executed").exists()


def test_what_is_not_a_checkpoint_is_named(saved, tmp_path):
    for place, problem in {"nowhere": "does not exist", "": "holds no weights; did you mean"}.items():
        with pytest.raises(UserError, match=problem):
            checkpoint.load_model(tmp_path / place)
    stage.write_manifest(tmp_path, ABOUT | {"wrote": {}})
    with pytest.raises(UserError, match=f"did you mean {saved}"):
        checkpoint.load_model(tmp_path)


# -------------------------------------------------------------------------------------------------------------- saving


@pytest.mark.parametrize("failing", ["torch.save", "os.rename", "stage.digests", "shutil.rmtree"])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_save_that_fails_anywhere_leaves_the_old_or_the_new(saved, monkeypatch, failing, call):
    calls, (module, name) = itertools.count(1), failing.split(".")
    module = {"torch": torch, "os": os, "stage": stage, "shutil": shutil}[module]
    original = getattr(module, name)

    def fail(*arguments, **options):
        if next(calls) == call:
            raise OSError(28, "No space left on device")
        return original(*arguments, **options)

    with monkeypatch.context() as patch, contextlib.suppress(OSError):  # not every function is called three times
        patch.setattr(module, name, fail)
        files = {"weights.pt": Transformer(SHAPE).state_dict(), "state.pt": {"x": torch.zeros(5, dtype=torch.long)}}
        checkpoint.save(saved, files, ABOUT)
    checkpoint.recover(saved.parent)
    assert checkpoint.read(saved, "state.pt")["x"].tolist() in ([0, 1, 2, 3, 4], [0, 0, 0, 0, 0])
    assert [p.name for p in saved.parent.iterdir()] == ["final"]


def test_a_full_disk_is_named_by_its_own_error(saved):
    """torch.save hides it behind an error of its own."""
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            checkpoint.save(saved, {"weights.pt": {"w": TENSOR}}, ABOUT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in saved.parent.iterdir()] == ["final"]
    checkpoint.load_model(saved)


def test_what_a_killed_save_left_is_cleaned_up(two):
    shutil.copytree(two / "step_2", two / ".step_2.new")  # killed before the old one was removed, and half-way
    shutil.copytree(two / "step_1", two / ".step_1.new")
    (two / "step_1/weights.pt").unlink()
    (two / ".best.partial").mkdir()
    (two / ".best.partial/weights.pt").write_text("half")
    (two / ".metrics.jsonl.partial").write_text("half")
    checkpoint.recover(two)
    assert sorted(p.name for p in two.iterdir()) == ["step_1", "step_2"]
    assert [p.name for p in checkpoint.newest(two)] == ["step_2", "step_1"]


def test_a_link_is_read_through_and_replaced_without_its_target(two, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (two / "step_2").symlink_to(shutil.move(two / "step_2", elsewhere))
    assert checkpoint.read(next(checkpoint.newest(two)), "state.pt")["step"] == 2
    checkpoint.save(two / "step_2", {"weights.pt": {"w": TENSOR}, "state.pt": {"step": 3}}, ABOUT)
    assert checkpoint.read(two / "step_2", "state.pt")["step"] == 3
    assert not (two / "step_2").is_symlink()
    assert checkpoint.read(elsewhere / "step_2", "state.pt")["step"] == 2
    assert sorted(p.name for p in two.iterdir()) == ["step_1", "step_2"]
