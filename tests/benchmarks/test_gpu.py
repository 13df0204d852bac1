"""The benchmark of a GPU: that it runs where there is none, and counts the arithmetic of a step right."""

import os
import subprocess
import sys

import pytest
import torch

from model import ModelConfig
from tests.conftest import ROOT


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure, for minutes")
def test_runs_without_a_gpu_and_writes_nothing():
    results = ROOT / "benchmarks/results"
    before = {path.name: path.read_bytes() for path in results.iterdir()}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stderr
    assert done.stdout.startswith("no GPU")
    assert done.stdout.count("\n") == 1
    assert {path.name: path.read_bytes() for path in results.iterdir()} == before


def test_flops_of_a_token_are_those_counted_by_hand():
    from benchmarks.gpu import flops_per_token

    config = ModelConfig(vocab_size=10, context_length=6, n_layers=3, d_model=4, n_heads=2, n_kv_heads=1, d_ff=5)
    # q 4 × 4, k and v 2 × 4 each, o 4 × 4, gate, up and down 4 × 5 each: 108 a layer; the head 10 × 4.
    weights = 3 * 108 + 40
    # A query of 4 numbers against 6 keys, and their mean of values: 2 · 2 · 4 · 6 a layer, and twice that backward.
    attention = 3 * (3 * 96)
    assert flops_per_token(config, 6) == (6 * weights + attention, 6 * weights + attention // 2)
