"""The changes that docs/changing.md prints, made in a copy of the project and run there."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, Place

TEXT = (ROOT / "docs/changing.md").read_text()


class Copy:
    """A copy of the project, and commands run in it."""

    def __init__(self, path: Path, place: Place):
        leave = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", "results", ".*_cache", ".hypothesis")
        self.path, self.place = shutil.copytree(ROOT, path, ignore=leave), place
        self.env = place.env | {"PYTHONPATH": str(path), "CONFIG": str(place.config)}

    def change(self, heading: str) -> None:
        """Makes the change in the diff under a heading of docs/changing.md."""
        section = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
        name, diff = re.search(r"```diff\n(\S+)\n(.*?)```", section, re.DOTALL).groups()
        for removed, added in re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)+)", diff, re.MULTILINE):
            self.replace(name, *(re.sub(r"^[-+]", "", lines, flags=re.MULTILINE) for lines in (removed, added)))

    def replace(self, name: str, old: str, new: str) -> None:
        text = (self.path / name).read_text()
        assert text.count(old) == 1, old
        (self.path / name).write_text(text.replace(old, new))

    def run(self, *arguments: object, status: int = 0) -> str:
        """Runs a command and returns its output; the error for status 2."""
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, cwd=self.path, env=self.env, capture_output=True, text=True, timeout=300)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stderr if status == 2 else done.stdout + done.stderr


@pytest.fixture
def copy(tmp_path: Path, packed: Place) -> Copy:
    return Copy(tmp_path / "lumi", packed)


@pytest.mark.slow
def test_another_feed_forward_network(copy: Copy):
    copy.change("Another feed-forward network")
    config = copy.place.config
    copy.run("pipeline.py", config, "pretrain")
    assert "q, k, v, o, up, down" in copy.run("pipeline.py", config, "sft", status=2)
    for rank in ("rank=4", "rank=3"):
        targets = 'targets=("q", "k", "v", "o", "up", "down")'
        copy.place.edit((f"LoRAConfig({rank}", f"LoRAConfig({targets}, {rank}"))
    copy.run("pipeline.py", config, "sft", "dpo")
    copy.run("convert.py", "to-hf", config, "out", status=2)
    assert not (copy.path / "out").exists()
    load = f"import configs, model; m = model.Transformer(configs.load({str(config)!r}).model)"
    parameters, flops = map(int, copy.run("-c", f"{load}; print(m.num_parameters(), m.flops_per_token(64))").split())
    matrices = 2 * (4 * 32 * 32 + 2 * 32 * 128) + 512 * 32  # two blocks of q, k, v, o, up and down; the head
    assert parameters == matrices + 512 * 32 + 5 * 32  # the embedding and five norms
    assert flops == 6 * matrices + 12 * 2 * 32 * 64


@pytest.mark.slow
def test_a_sliding_window(copy: Copy):
    copy.change("A sliding window")
    copy.replace("model.py", "query - key < 64", "query - key < 7")  # the test's context is 64
    config = copy.place.config
    copy.run("-m", "pytest", "-q", "tests/test_layouts.py")
    copy.run("pipeline.py", config, "pretrain", "sft")
    copy.run("serve.py", config, "generate", "def ", "--max-tokens", "30")
    assert "other logits" in copy.run("convert.py", "to-hf", config, "out", status=2)


@pytest.mark.slow
def test_a_learning_rate_schedule(copy: Copy):
    config = copy.place.config
    copy.run("train.py", config)
    copy.change("A learning-rate schedule")
    out = copy.run("train.py", config)
    assert "optim.py changed since it was made" in out
    assert f"python pipeline.py {config} pretrain --force-from pretrain" in out
    copy.place.edit(("warmup_steps=4", 'warmup_steps=4, schedule="exponential"'))
    copy.run("train.py", config, "--force")
    rates = {row["step"]: row["lr"] for row in copy.place.metrics()}
    assert rates[15] == pytest.approx(3e-3 * 2.718281828 ** (-5 * 10 / 20))  # step 14, counted from 0


def test_every_named_place_exists():
    for line in re.findall(r"^\| .*`.*\|$", TEXT, re.MULTILINE):
        names = re.findall(r"`([\w./]+)`", line)
        files = [ROOT / name for name in names if name.endswith(".py")]
        source = "".join(file.read_text() for file in files)
        for name in names:
            for part in name.split(".") if not name.endswith(".py") else ():
                assert re.search(rf"\b{part}\b", source), name
