"""Benchmarks follow the code: each module imports, and quick cases run."""

import importlib
import subprocess
import sys

import pytest
import torch

from model import ModelConfig
from tests.conftest import ROOT


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_each_module_imports(path):
    importlib.import_module(f"benchmarks.{path.stem}")


def test_quick_cases_of_the_cpu_benchmark(monkeypatch):
    from benchmarks import cpu

    monkeypatch.setattr(cpu.machine, "compile_blocks", lambda *_: True)
    monkeypatch.setattr(cpu.machine, "keep_freed_memory", lambda: None)
    cpu.trainer("ours", "demo", 2, 16)()
    assert cpu.loss_vs_plain(8, 50, 20, 1)["ratio"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure, for minutes")
def test_the_gpu_benchmark_without_a_gpu_says_what_it_needs(monkeypatch, capsys):
    from benchmarks import gpu

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(sys, "argv", ["gpu", "--quick"])
    assert gpu.main() == 2
    error = "error: benchmarks.gpu needs a GPU; to only run the code, set TRITON_INTERPRET=1\n"
    assert capsys.readouterr() == ("", error)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure, for minutes")
def test_the_gpu_benchmark_interpreted_runs_once_and_writes_nothing():
    results = ROOT / "benchmarks/results"
    before = {path.name: path.read_bytes() for path in results.iterdir()}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("no GPU")
    assert {path.name: path.read_bytes() for path in results.iterdir()} == before


def test_flops_of_a_token_by_hand():
    from benchmarks.gpu import flops_per_token

    config = ModelConfig(vocab_size=10, context_length=6, n_layers=3, d_model=4, n_heads=2, n_kv_heads=1, d_ff=5)
    # q 4 × 4, k and v 2 × 4 each, o 4 × 4, gate, up and down 4 × 5 each: 108 a layer; the head 10 × 4.
    weights = 3 * 108 + 40
    # A query of 4 numbers against 6 keys, and their mean of values: 2 · 2 · 4 · 6 a layer, and twice that backward.
    attention = 3 * (3 * 96)
    assert flops_per_token(config, 6) == (6 * weights + attention, 6 * weights + attention // 2)


@pytest.mark.filterwarnings("ignore")  # from transformers
def test_the_quick_decoding_benchmark_has_all_its_keys():
    from benchmarks import decoding

    found = decoding.results(quick=True)
    assert list(found) == ["decode_demo_1", "decode_demo_8"]
    for numbers in found.values():
        ways = ("", "bare_", "transformers_", "bfloat16_", "int8_", "prompt_")
        assert all(numbers[f"{way}tokens_per_second"] > 0 for way in ways)
        assert numbers["of_bare_rate"] > 0 < numbers["ratio_vs_transformers"]
