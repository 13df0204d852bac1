"""The changes that docs/changing.md prints, made in a copy of the project and run there."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, Place

pytestmark = pytest.mark.slow


class Copy:
    """A copy of the project, and commands run in it."""

    def __init__(self, path: Path, place: Place):
        leave = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", "results", ".*_cache", ".hypothesis")
        self.path, self.place = shutil.copytree(ROOT, path, ignore=leave), place
        self.env = place.env | {"PYTHONPATH": str(path), "CONFIG": str(place.config)}

    def change(self, heading: str) -> None:
        """Makes the change in the diff under a heading of docs/changing.md."""
        section = (ROOT / "docs/changing.md").read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
        name, diff = re.search(r"```diff\n(\S+)\n(.*?)```", section, re.DOTALL).groups()
        text = (self.path / name).read_text()
        for removed, added in re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)+)", diff, re.MULTILINE):
            old, new = (re.sub(r"^[-+]", "", lines, flags=re.MULTILINE) for lines in (removed, added))
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (self.path / name).write_text(text)

    def run(self, *arguments: object, status: int = 0) -> str:
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, cwd=self.path, env=self.env, capture_output=True, text=True, timeout=300)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stderr if status == 2 else done.stdout


@pytest.fixture
def copy(tmp_path: Path, packed: Place) -> Copy:
    return Copy(tmp_path / "lumi", packed)


def test_another_feed_forward_network(copy: Copy):
    copy.change("Another feed-forward network")
    config = copy.place.config
    copy.run("pipeline.py", config, "pretrain")
    refused = copy.run("pipeline.py", config, "sft", status=2)
    assert "gate" in refused
    assert "q, k, v, o, up, down" in refused
    targets = 'targets=("q", "k", "v", "o", "up", "down"), '
    copy.place.edit(
        ("LoRAConfig(rank=4", f"LoRAConfig({targets}rank=4"), ("LoRAConfig(rank=3", f"LoRAConfig({targets}rank=3")
    )
    copy.run("pipeline.py", config, "sft", "dpo")
    assert "has no model.layers.0.mlp.gate_proj.weight" in copy.run("convert.py", "to-hf", config, "out", status=2)
    assert not (copy.path / "out").exists()
    count = (
        "import configs, model; c = configs.load(r'{}').model; m = model.Transformer(c); "
        "print(m.num_parameters(), m.flops_per_token(64))"
    )
    parameters, flops = map(int, copy.run("-c", count.format(config)).split())
    matrices = 2 * (4 * 32 * 32 + 2 * 32 * 128) + 512 * 32  # two blocks of q, k, v, o, up and down; the head
    assert parameters == matrices + 512 * 32 + 5 * 32  # the embedding and five norms
    assert flops == 6 * matrices + 12 * 2 * 32 * 64


def test_a_sliding_window(copy: Copy):
    copy.change("A sliding window")
    model = copy.path / "model.py"
    model.write_text(model.read_text().replace("query - key < 64", "query - key < 7"))  # the test's context is 64
    config = copy.place.config
    copy.run("-m", "pytest", "-q", "tests/test_layouts.py")
    copy.run("pipeline.py", config, "pretrain", "sft")
    copy.run("serve.py", config, "generate", "def ", "--max-tokens", "30")
    assert "a plain LLaMA with these weights gives other logits" in copy.run(
        "convert.py", "to-hf", config, "out", status=2
    )


def test_a_learning_rate_schedule(copy: Copy):
    copy.change("A learning-rate schedule")
    copy.place.edit(("warmup_steps=4", 'warmup_steps=4, schedule="exponential"'))
    copy.run("train.py", copy.place.config)
    rates = {row["step"]: row["lr"] for row in copy.place.metrics()}
    assert rates[4] == pytest.approx(3e-3)
    assert rates[15] == pytest.approx(3e-3 * 2.718281828 ** (-5 * 10 / 20))  # step 14, counted from 0
    copy.place.edit(("exponential", "exponentially"))
    assert "schedule is 'exponentially'; expected one of" in copy.run("train.py", copy.place.config, status=2)


def test_a_change_is_noticed(copy: Copy):
    copy.run("train.py", copy.place.config)
    copy.change("A learning-rate schedule")
    out = subprocess.run(
        [sys.executable, "train.py", str(copy.place.config)],
        cwd=copy.path, env=copy.env, capture_output=True, text=True,
    )  # fmt: skip
    assert out.returncode == 0
    assert "optim.py changed since it was made" in out.stderr
    assert "--force" in out.stderr


def test_every_named_place_exists():
    text = (ROOT / "docs/changing.md").read_text()
    for line in re.findall(r"^\| .*`.*\|$", text, re.MULTILINE):
        names = re.findall(r"`([\w./]+)`", line)
        source = ""
        for name in names:
            if name.endswith(".py"):
                assert (ROOT / name).is_file(), name
                source += (ROOT / name).read_text()
        for name in names:
            if not name.endswith(".py"):
                for part in name.split("."):
                    assert re.search(rf"\b{part}\b", source), name
