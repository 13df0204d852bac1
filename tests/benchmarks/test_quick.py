"""Each benchmark's quick mode runs and prints plausible numbers; errors of worker processes are shown."""

import importlib.util
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from benchmarks import nanogpt
from benchmarks.common import RESULTS, Worker, in_turn, once
from tests.conftest import PRESENT, ROOT, Command

# What the benchmark expects of nanoGPT: the options it takes, the lines it prints, the checkpoint it saves.
TRAIN = """
import sys

import numpy as np

options = dict(word.removeprefix("--").split("=") for word in sys.argv[1:])
assert np.fromfile(options["dataset"] + "/train.bin", np.uint16).max() < 65
size, steps = int(options["block_size"]), int(options["max_iters"])
for i in range(steps + 1):
    print(f"iter {i}: loss 1.0000, time 1.00ms, mfu 0.10%")
if steps == 20:  # importing torch takes seconds: not in the short run
    import torch

    from model import GPT, GPTConfig

    saved = {"model": GPT(GPTConfig(size)).state_dict(), "model_args": {"block_size": size}}
    torch.save(saved, options["out_dir"] + "/ckpt.pt")
"""
MODEL = """
from dataclasses import dataclass

import torch


@dataclass
class GPTConfig:
    block_size: int


class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(65))

    def forward(self, tokens, targets):
        return self.table.expand(*tokens.shape, 65), None
"""


def quick(name: str, *needed: str) -> dict:
    """What a benchmark prints in its quick mode; it writes no results."""
    for package in needed:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    before = {path.name: path.read_bytes() for path in RESULTS.iterdir()}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    run = Command([sys.executable, "-m", f"benchmarks.{name}", "--quick"], cwd=ROOT, env=PRESENT, text=True, **pipes)
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0, f"{out}\n{err}"
    assert {path.name: path.read_bytes() for path in RESULTS.iterdir()} == before
    found = json.loads(out[f"\n{out}".index("\n{\n") :])
    assert {"command", "commit", "machine", "versions"} < found.keys()
    return found


def test_data():
    found = quick("data", "datasketch")
    for name in ("corpus", "tokenizer", "pack"):
        assert found["stages"][name]["seconds"] > 0
        assert 0.01 < found["stages"][name]["peak_gb"] < 8
    assert found["planted"]["copies_at_0.9_or_more"] > 50
    assert found["planted"]["recall"] > 0.98
    assert found["planted"]["lost"] == 0
    assert found["reviews_kept_as_english"] == 1
    assert found["dedup_vs_datasketch"]["ratio"] > 0
    assert found["pack_vs_sentencepiece"]["tokens_per_second"] > 1_000


def test_cpu():
    found = quick("cpu", "transformers")
    training = found["train_demo_float32"]
    assert training["ratio_vs_transformers_best"] == training["ratio_vs_transformers_default"] > 0
    assert 0.1 < training["memory_ratio"] < 2
    assert found["loss_1024_float32"]["ratio_vs_plain"] > 0


def test_sft():
    found = quick("sft")
    preparation, training = found["preparation"], found["training"]
    assert preparation["conversations"] == 200
    assert 0.6 < preparation["greedy_packing_efficiency"] <= preparation["packing_efficiency"] <= 1
    assert training["seconds_per_step"].keys() == {"packed", "masked", "padded", "full"}
    assert min(training["useful_tokens_per_second"].values()) > 100
    assert min(training["peak_mib"].values()) > 100
    assert training["packed_vs_padded_all_logits"] > 0


def test_dpo():
    found = quick("dpo")  # ends with an error unless all ways compute the same losses
    assert found["mean_tokens"]["chosen"] > found["mean_tokens"]["rejected"] > 5
    training = found["training"]
    assert training["pairs_per_second"].keys() == {"stored", "adapter_off", "usual", "usual_together"}
    assert min(training["pairs_per_second"].values()) > 1
    assert training["stored_vs_usual"] > 0
    assert 0.5 < training["stored_memory_vs_usual"] < 2


def test_evaluation():
    found = quick("evaluation")
    for task in ("blimp", "piqa"):
        assert found[task]["largest_difference_in_nats"] < 1e-4
        assert found[task]["questions_per_second"] > 1


def test_serving():
    found = quick("serving", "uvicorn", "starlette")
    for way in ("greedy", "sampled", "sampled_streams"):
        assert found[way]["requests"] == found[way]["same_text"] == 8
        assert found[way]["shorter"] == 0
        assert 0 < found[way]["seconds"]["p50"] <= found[way]["seconds"]["p99"]
    assert found["sampled_streams"]["first_token_seconds"]["p50"] > 0
    assert found["soak"]["errors"] == found["soak"]["greedy_other_than_alone"] == 0


def test_harness():
    found = quick("harness", "lm_eval")  # ends with an error unless both give the same numbers
    assert found["alike"].keys() == {"wikitext2", "blimp", "piqa"}
    assert found["alike"]["piqa"]["other_answers"] == 0
    assert found["alike"]["blimp"]["accuracy"]["ours"] == found["alike"]["blimp"]["accuracy"]["harness"]
    assert found["as_it_is"]["piqa"]["items"] == 21


def test_nanogpt():
    found = quick("nanogpt")["quick"]["ours"]
    assert 1 < found["bits_per_byte"] < 8
    assert found["steps"] == 10


def test_nanogpt_is_trained_by_its_own_command(tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "model.py").write_text(MODEL)
    characters = "".join(map(chr, range(33, 98)))  # 65 of them
    found = nanogpt.theirs(tmp_path, characters * 40, 0.02, "readme")
    assert found["bits_per_byte"] == pytest.approx(math.log2(65), abs=1e-4)  # it predicts nothing
    assert found["steps"] == 20  # of 1 ms
    (tmp_path / "train.py").write_text("raise ValueError('what went wrong')")
    with pytest.raises(RuntimeError, match="what went wrong"):
        nanogpt.theirs(tmp_path, characters * 40, 0.02, "readme")


def test_bits_count_each_held_out_id_once_with_half_a_window_before_it():
    torch.manual_seed(0)
    ids, context = np.random.default_rng(0).integers(0, 7, 60), []

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        context.append(tokens)
        seen = torch.nn.functional.one_hot(tokens, 7).float().cumsum(1)  # depends on all ids before
        return seen.log1p()

    for count in (1, 7, 8, 23):
        got = nanogpt.bits(logits, ids, count, 8)
        least = most = 0.0
        for i in range(60 - count, 60):
            by_length = []
            for length in range(4, 9):
                counts = np.bincount(ids[i - length : i], minlength=7) + 1.0
                by_length.append(-math.log2(counts[ids[i]] / counts.sum()))
            least, most = least + min(by_length), most + max(by_length)
        assert least - 1e-4 <= got <= most + 1e-4
    assert all(tokens.shape[1] == 8 for tokens in context)
    ones = nanogpt.bits(lambda tokens: torch.zeros(*tokens.shape, 8), ids, 23, 8)
    assert ones == pytest.approx(23 * 3)


def test_text_that_is_held_out_is_not_trained_on():
    train, held_out = nanogpt.split("0123456789" * 3)
    assert train + held_out == "0123456789" * 3
    assert held_out == "789"


def broken():
    raise ValueError("this is why")


def test_an_error_in_a_process_ends_the_benchmark_and_is_shown(capfd):
    with pytest.raises(RuntimeError, match="the process of one ended with status 1"):
        once("one", broken)
    assert "ValueError: this is why" in capfd.readouterr().err
    with pytest.raises(RuntimeError, match="the process of two"):
        in_turn(1, {"one": lambda: int, "two": broken})
    assert "ValueError: this is why" in capfd.readouterr().err


def test_processes_are_asked_in_turn_and_end(tmp_path):
    log = tmp_path / "log"

    def maker(name: str):
        def answer() -> str:
            with open(log, "a") as file:
                file.write(name)
            return name

        return lambda: answer

    assert in_turn(2, {"a": maker("a"), "b": maker("b")}) == {"a": ["a", "a"], "b": ["b", "b"]}
    assert log.read_text() == "ababab"
    worker = Worker("c", lambda: lambda x: 2 * x)
    assert worker.ask(3) == 6
    worker.end()
    assert not worker.process.is_alive()
