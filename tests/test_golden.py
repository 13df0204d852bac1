"""The demo, every stage of it, gives the numbers that it gave when golden/demo.json was written.

    python -m tests.test_golden runs/demo    compares a run

The numbers hold for the versions in requirements.txt, two threads, and a CPU that multiplies in bfloat16 (AMX).
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import machine
from tests.conftest import ROOT
from tests.test_pipeline import makefile_commands

GOLDEN = json.loads((ROOT / "tests/golden/demo.json").read_text())
CONFIG = "configs/demo.py"
TOLERANCE = 1e-6  # relative, and absolute: what float32 holds


def read(path: Path) -> str:
    """A file of a run; an empty object if it is missing."""
    return path.read_text() if path.is_file() else "{}"


def compared(run: Path) -> Iterator[tuple[str, object, object]]:
    """Yields each number's name, its golden value, and its value in a run; None if it is missing."""
    for directory in ("packed", "tokenizer"):
        wrote = json.loads(read(run / directory / "manifest.json")).get("wrote", {})
        for name, digest in GOLDEN[directory].items():
            yield f"{directory}/{name}", digest, wrote.get(name, {}).get("sha256")
    for stage, rows in GOLDEN["training"].items():
        lines = map(json.loads, read(run / stage / "metrics.jsonl").splitlines())
        logged = {line.get("step"): line for line in lines}
        for row in rows:
            for key in row.keys() - {"step"}:
                yield f"{stage} step {row['step']} {key}", row[key], logged.get(row["step"], {}).get(key)
    results = json.loads(read(run / "eval/results.json"))
    for stage, tasks in GOLDEN["eval"].items():
        for task, metrics in tasks.items():
            for key, value in metrics.items():
                yield f"{stage} {task} {key}", value, results.get(stage, {}).get(task, {}).get(key)


def differences(run: Path) -> list[str]:
    """A line for each value of a run that is not the golden one."""
    lines = []
    for name, was, now in compared(run):
        near = isinstance(was, float) and now == pytest.approx(was, rel=TOLERANCE, abs=TOLERANCE)
        if was != now and not near:
            lines.append(f"{name}: {was} -> {now}")
    return lines


@pytest.mark.slow
def test_the_demo_gives_the_golden_numbers(tmp_path: Path):
    device = machine.pick_device()
    if device.type != "cpu" or not machine.native(device, torch.bfloat16):
        pytest.skip(f"the golden numbers are a CPU's in bfloat16; here {machine.name(device)} would not compute in it")
    (tmp_path / "raw").mkdir()  # empty: tasks whose data happens to be here are not measured
    env = os.environ | {"DATA": str(tmp_path / "raw"), "RUNS": str(tmp_path / "runs"), "OMP_NUM_THREADS": "2"}
    env.pop("TRITON_INTERPRET", None)  # conftest's
    [command] = makefile_commands(CONFIG)
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = differences(tmp_path / "runs/demo")
    assert not lines, "\n".join([f"golden: {GOLDEN['machine']}", *lines])


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: python -m tests.test_golden RUN_DIRECTORY")
    lines = differences(Path(sys.argv[1]))
    print("\n".join(lines) or "no difference")
    sys.exit(bool(lines))
