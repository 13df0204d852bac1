"""Benchmarks follow the code: each module imports, and quick cases run."""

import importlib
import json
import subprocess
import sys

import pytest
import torch

from model import ModelConfig
from tests.conftest import ROOT


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_each_module_imports(path):
    importlib.import_module(f"benchmarks.{path.stem}")


NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="would measure, for minutes")


@NO_GPU
def test_the_gpu_benchmark_without_a_gpu_says_what_it_needs(monkeypatch, capsys):
    from benchmarks import gpu

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert gpu.main() == 2
    error = "error: benchmarks.gpu needs a GPU; to only run the code, set TRITON_INTERPRET=1\n"
    assert capsys.readouterr() == ("", error)


@NO_GPU
@pytest.mark.filterwarnings("ignore")  # from torch's compiler
def test_parts_of_the_gpu_benchmark_in_miniature(monkeypatch, tmp_path):
    """Among them the run, which trains and evaluates on packed tokens."""
    from benchmarks import gpu

    monkeypatch.setattr(sys, "argv", ["gpu", "--all", str(tmp_path), "--only", "packed", "run"])
    assert gpu.main() == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert (found["failed"], found["skipped"]) == ({}, {})
    assert list(found["seconds"]) == ["packed", "run"]
    assert list(found["packed"]) == ["model", "flash", "varlen", "cudnn"]
    run = found["run"]["prose_tiny"]
    assert run["step"] == run["planned_steps"] == 4
    assert run["validation"]["bits_per_byte"] > 0
    assert len((tmp_path / "run/pretrain/metrics.jsonl").read_text().splitlines()) == 4


def test_a_result_of_the_gpu_benchmark_is_kept_at_once_and_what_is_missing_is_named(monkeypatch, tmp_path):
    from benchmarks import gpu

    results = gpu.Results(tmp_path)

    def on_disk() -> dict:
        return json.loads((tmp_path / "gpu.json").read_text())

    assert results.measure("speed/new", lambda: {"rate": 3}) == {"rate": 3}
    assert on_disk()["speed"] == {"new": {"rate": 3}}
    assert results.measure("speed/old", lambda: {"rate": 1 // 0}) == {"failed": "ZeroDivisionError"}
    assert "ZeroDivisionError" in on_disk()["failed"]["speed/old"]
    assert "test_benchmarks.py:" in on_disk()["failed"]["speed/old"]
    results.measure("speed/other", lambda: importlib.import_module("no_such_package"))
    assert on_disk()["skipped"] == {"speed/other": "no_such_package is not installed"}
    monkeypatch.setitem(gpu.PARTS, "decoding", (3, lambda results: results.measure("speed/late", dict, needs=4)))
    monkeypatch.setitem(gpu.PARTS, "run", (3, lambda results: 1 // 0))
    results.part("decoding")
    results.part("run")
    assert "it needs about 4 s" in on_disk()["skipped"]["speed/late"]
    assert on_disk()["failed"]["run"].startswith("ZeroDivisionError")


def test_a_model_that_cannot_be_compiled_is_not_timed_as_compiled(monkeypatch):
    from benchmarks import gpu_training

    monkeypatch.setattr(gpu_training, "GPU", True)
    monkeypatch.setattr(gpu_training, "shape", lambda name: ModelConfig(vocab_size=8, d_model=8, n_heads=2, n_layers=1))
    monkeypatch.setattr(gpu_training.machine, "compile_blocks", lambda *_: False)
    with pytest.raises(RuntimeError, match="could not compile"):
        gpu_training.Step("tiny", 1, "ours_compiled").make(1)


@NO_GPU
@pytest.mark.slow
def test_the_gpu_benchmark_in_miniature_runs_every_part(tmp_path):
    results = ROOT / "benchmarks/results"
    before = {path.name: path.read_bytes() for path in results.iterdir()}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", "--all", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["skipped"] == {}
    parts = "checks stages packed kernels micro_batches training decoding run"
    assert list(found["seconds"]) == parts.split()
    assert {"rms_norm_forward_24", "swiglu_backward_24", "projection_and_loss_24"} <= found["kernels"].keys()
    assert set(found["waits"]) == {"pretrain", "sft", "dpo", "dpo_adapter_off"}
    assert found["train_tiny"]["fastest"]["ratio_vs_transformers_best"] > 0
    assert found["serving"]["tiny"]["tokens_per_second"] > 0
    assert {path.name: path.read_bytes() for path in results.iterdir()} == before


@pytest.mark.filterwarnings("ignore")  # from transformers
def test_the_quick_decoding_benchmark_has_all_its_keys():
    from benchmarks import decoding

    found = decoding.results(quick=True)
    assert list(found) == ["decode_demo_1", "decode_demo_8"]
    for numbers in found.values():
        ways = ("", "bare_", "transformers_", "bfloat16_", "int8_", "prompt_")
        assert all(numbers[f"{way}tokens_per_second"] > 0 for way in ways)
        assert numbers["of_bare_rate"] > 0 < numbers["ratio_vs_transformers"]
