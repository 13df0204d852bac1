"""The kernels compiled for GPUs on a machine without one, and what the rehearsal says about them."""

import argparse
import json
import os
import subprocess
import sys

import pytest
import torch

import model as lumi
from benchmarks import common, gpu_rehearsal
from cli import UserError
from tests.conftest import ROOT

pytest.importorskip("triton", reason="compiles with Triton")
KERNELS = {name.removesuffix("_kernel") for name in vars(lumi) if name.endswith("_kernel")} - {"sdpa"}  # PyTorch's


# The command's quick mode; then kernels that are known to be bad: rows that start at multiples of 4 bytes, and tiles of
# 64 numbers for each thread.
SCRIPT = """
import argparse, json, torch
import model
from benchmarks import gpu_rehearsal as rehearsal
rehearsal.main(argparse.Namespace(markdown=False, trace=False, quick=True))
card = rehearsal.CARDS["sm_80"]
with rehearsal.compile_only(card) as listed:
    rehearsal.rms_norm(100, 258, torch.bfloat16, torch.bfloat16)
    model.tile = lambda columns, numbers, per_thread: (32, 256, 4)
    rehearsal.rms_norm(100, 256, torch.float32, torch.float32)
print(json.dumps([rehearsal.measure(launch, card, None) for launch in listed]))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> tuple[dict, list[dict]]:
    """What SCRIPT prints, in a process in which Triton compiles kernels and does not interpret them."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    quick, _, bad = done.stdout.strip().rpartition("\n")
    return json.loads(quick), json.loads(bad)


def test_each_kernel_compiles_without_spills_and_with_wide_loads(compiled):
    found, _ = compiled
    assert found["kernels"].keys() == {"sm_80", "sm_90"}
    for table in found["kernels"].values():
        assert table.keys() == KERNELS
        for kernel, _, _, columns in gpu_rehearsal.rows_of(table):
            assert columns["spills"] == 0, kernel
            assert columns["loads"] >= 16, kernel
            assert columns["stores"] >= 16, kernel
        (columns,) = table["rms_norm_backward"]["bfloat16"].values()
        assert columns["registers"] <= 128
        rows, width = found["rows"], 256
        partial = 4 * columns["programs"] * width  # the gradient of the gains, one float32 row from each program
        assert columns["bytes"] == 3 * 2 * rows * width + 4 * rows + 2 * width + partial  # x, dy, dx; 1/rms; gains
    assert found["compiled_again"] == dict.fromkeys(KERNELS, 0)


def test_narrow_loads_and_spills_are_seen(compiled):
    _, (narrow_forward, narrow_backward, _, spilling) = compiled
    for columns in (narrow_forward, narrow_backward):
        assert (columns["loads"], columns["stores"]) == (4, 4)
    assert spilling["spills"] > 0
    assert spilling["registers"] > 200


def test_occupancy_by_hand():
    """As NVIDIA's occupancy calculator gives it."""
    a100, t4 = gpu_rehearsal.CARDS["sm_80"], gpu_rehearsal.CARDS["sm_75"]
    assert a100.occupancy(registers=32, warps=4, shared=0) == 1
    assert a100.occupancy(registers=33, warps=4, shared=0) == 48 / 64  # 40 × 128 registers a program: 12 programs
    assert a100.occupancy(registers=230, warps=4, shared=0) == 8 / 64  # 232 × 128: 2 programs
    assert a100.occupancy(registers=32, warps=1, shared=0) == 32 / 64  # at most 32 programs
    assert a100.occupancy(registers=32, warps=8, shared=40 * 1024) == 4 * 8 / 64  # 41 of 164 KiB each
    assert t4.occupancy(registers=64, warps=8, shared=0) == 1  # 32 warps take all registers


def test_without_triton_or_interpreted_it_says_what_to_do(monkeypatch):
    arguments = argparse.Namespace(markdown=False, trace=False, quick=True)
    monkeypatch.setattr(lumi, "triton", None)
    with pytest.raises(UserError, match="install it with: pip install triton"):
        gpu_rehearsal.main(arguments)


@pytest.mark.skipif(torch.version.cuda is not None, reason="would trace")
def test_tracing_without_a_cuda_build_says_what_to_install():
    with pytest.raises(UserError, match="pip install torch=="):
        gpu_rehearsal.main(argparse.Namespace(markdown=False, trace=True, quick=False))


@pytest.mark.skipif(torch.version.cuda is None, reason="needs a PyTorch built for CUDA")
def test_tensors_on_the_wrong_device_are_found(capsys):
    from benchmarks import gpu_trace

    gpu_trace.main()
    assert "wrong device: none" in capsys.readouterr().out
    host = torch.arange(4)
    with gpu_trace.FakeTensorMode(allow_non_fake_inputs=True), gpu_trace.Watch() as watch:
        x = host.to("cuda", non_blocking=True)
        assert (x + torch.tensor(1)).device == x[torch.tensor([0, 2])].device == (x * host).device == x.device
        host.pin_memory().to("cuda", non_blocking=True)
        host.to("cuda")
        assert x.sum().item() == 0
        assert torch.equal(x.cpu(), torch.zeros(4, dtype=torch.int64))
    kinds = [kind for kind, _ in watch.noted.elements()]
    assert sorted(kinds) == ["unpinned", "waits", "waits", "waits", "wrong device", "wrong device"]
    assert "test_rehearsal.py" in next(what for kind, what in watch.noted if kind == "waits")


def test_the_documentation_has_the_results():
    found = json.loads((common.RESULTS / "gpu_rehearsal.json").read_text())
    assert gpu_rehearsal.markdown(found) in (ROOT / "docs/measured.md").read_text("utf-8")
