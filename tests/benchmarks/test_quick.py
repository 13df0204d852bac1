"""Each benchmark's quick mode runs and prints plausible numbers; errors of worker processes are shown."""

import importlib.util
import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import configs
from benchmarks import ablations, nanogpt, scaling
from benchmarks.common import RESULTS, Worker, in_turn, once
from model import KVCache, ModelConfig, Transformer
from tests.conftest import PRESENT, ROOT, Command

# What the benchmark expects of nanoGPT: the options it takes, the lines it prints, the checkpoint it saves.
TRAIN = """
import sys
from dataclasses import replace

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


def test_ablations():
    found = quick("ablations")
    runs = {name: seeds["0"] for name, seeds in found["runs"].items()}
    table = 2 * 400 * 32 + 4 * 32 * 32 + 3 * 32 * 128 + 3 * 32  # embedding and head, attention, SwiGLU, three norms
    more = {"demo": 0, "learned_positions": 128 * 32, "qk_norm": 2 * 32, "shifted_twice": 0}
    assert {name: result["parameters"] - table for name, result in runs.items()} == more
    for result in runs.values():
        assert 2 < result["bits_per_byte"] < 8
    assert f"(`demo`) | {table:,}" in " ".join(found["table"].split())


def runs_of(*bits: float) -> dict:
    """Results with a seed for each number; NaN: a run that failed."""
    one = {"made_from": "", "parameters": 1_000}
    return {str(i): one | ({"failed": True} if math.isnan(x) else {"bits_per_byte": x}) for i, x in enumerate(bits)}


def test_a_difference_counts_from_three_standard_errors():
    runs = {"demo": runs_of(2.0, 2.2, 2.1), "gelu": runs_of(2.4, 2.2, 2.3), "tied": runs_of(2.6, 2.7, 2.5)}
    runs["post_norm"] = runs_of(math.nan)
    rows = [[cell.strip() for cell in line.split("|")[2:-1]] for line in ablations.table(runs).splitlines()[2:]]
    # The standard deviation is 0.1, the standard error of a difference 0.1 · sqrt(2 / 3) = 0.0816, three of it 0.245.
    assert [row[-2:] for row in rows] == [["", ""], ["+0.2000", "no difference"], ["+0.5000", "worse"], ["", "failed"]]
    assert rows[1][:4] == ["1,000", "2.3000", "3", "2.2000 to 2.4000"]
    single = ablations.table({"demo": runs_of(2.0), "gelu": runs_of(1.5)}).splitlines()[2]
    assert single.split("|")[-3].strip() == "-0.5000"
    assert single.split("|")[-2].strip() == ""  # one seed tells nothing


def test_a_result_names_what_it_was_made_from(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS", str(tmp_path))
    base = configs.load(ROOT / "configs/demo.py")
    digests = set()
    for name, seed, steps in (("demo", 0, 600), ("demo", 1, 600), ("demo", 0, 5), ("gelu", 0, 600), ("tied", 0, 600)):
        one = ablations.experiment(base, name, seed, steps)
        digests.add(ablations.origin(base, one, ablations.EXPERIMENTS[name].architecture))
    assert len(digests) == 5
    text = ablations.source(ablations.QKNorm)
    assert "class QKNormAttention" in text  # it matters too
    assert "class GELU" not in text


def test_the_log_of_experiments_shows_the_results():
    runs = json.loads((RESULTS / "ablations.json").read_text())["runs"]
    assert ablations.table(runs) in (ROOT / "docs/experiments.md").read_text(encoding="utf-8")


def test_scaling():
    found = quick("scaling")
    for size, (n_layers, d_model, _) in scaling.SIZES.items():
        runs = found["runs"][size]
        matrices = n_layers * (4 * d_model**2 + 3 * d_model * 4 * d_model)
        for run in runs.values():
            assert run["parameters"] == matrices + 2 * 400 * d_model + (2 * n_layers + 1) * d_model
            assert 2 < run["bits_per_byte"] < 8
        # A weight of a linear layer costs 6 FLOPs a token; attention over at most 128 keys is added.
        assert 1 < runs["2048"]["flops"] / (2048 * 6 * (matrices + 400 * d_model)) < 1.3
        assert runs["2048"]["flops"] == 2 * runs["1024"]["flops"]
    assert found["lines"]["tiny"]["exponent"] < 0


def test_the_lines_of_scaling_and_the_best_size():
    assert scaling.power_law([1, 4, 16], [8, 4, 2]) == pytest.approx({"a": 8, "exponent": -0.5})
    small = {"tokens": 10, "flops": 100, "parameters": 5}
    runs = {"a": {"10": small | {"bits_per_byte": 4.0}, "40": small | {"flops": 400, "bits_per_byte": 2.0}}}
    runs["b"] = {
        "10": small | {"flops": 200, "bits_per_byte": 3.0},
        "40": small | {"flops": 800, "bits_per_byte": 0.75},
    }
    best = scaling.analyse(runs)["best"]
    # a: 40 / sqrt(x), b: 600 / x. They cross at 225, in the range 200 to 400 that both lines cover.
    assert [(each["flops"], each["size"]) for each in best] == [(200, "a"), (400, "b")]
    assert [each["bits_per_byte"]["a"] for each in best] == pytest.approx([40 / 200**0.5, 2.0])
    assert best[0]["tokens"] == 20
    assert best[0]["tokens_per_parameter"] == 4


SMALL = ModelConfig(vocab_size=50, context_length=16, n_layers=2, d_model=32, n_heads=2)


def variant(name: str, layers: int = 2) -> Transformer:
    torch.manual_seed(1)
    return ablations.EXPERIMENTS[name].architecture(replace(SMALL, n_layers=layers))


@pytest.mark.parametrize(
    "name", [name for name, change in ablations.EXPERIMENTS.items() if change.architecture is not Transformer]
)
def test_cached_and_packed_variants_compute_what_whole_rows_do(name: str):
    model, tokens = variant(name).eval(), torch.arange(12)[None]
    whole = model(tokens)
    cache = KVCache(model, 1, 16)
    cached = torch.cat([model(part, cache=cache) for part in tokens.split(5, dim=1)], 1)
    packed = model(tokens.repeat(1, 2), positions=torch.arange(12).repeat(2)[None])
    torch.testing.assert_close(cached, whole)
    torch.testing.assert_close(packed, whole.repeat(1, 2, 1))


def test_variants_are_what_they_say():
    tokens, swapped = torch.arange(12)[None], torch.tensor([[1, 0, *range(2, 12)]])
    for name in ("demo", "rope_off", "learned_positions"):
        model = variant(name, layers=1)  # a second layer would learn the order from what each token has seen
        same = torch.allclose(model(tokens)[0, -1], model(swapped)[0, -1], atol=1e-6)
        assert same == (name == "rope_off")
    for name in ("gelu", "relu_squared", "post_norm"):
        assert variant(name).num_parameters() == variant("demo").num_parameters()
    stream = variant("post_norm").blocks[0](torch.randn(1, 12, 32), variant("demo").layout(tokens, None, None, None))
    torch.testing.assert_close(stream.square().mean(-1), torch.ones(1, 12))
    model, targets = variant("shifted_twice"), tokens + 1
    logits = model(tokens).flatten(0, 1)
    later, right = cross_entropy(logits[:-1], targets[0, 1:]), cross_entropy(logits, targets[0])
    torch.testing.assert_close(model(tokens, targets), later)
    torch.testing.assert_close(model.eval()(tokens, targets), right)


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


def test_a_run_that_diverges_is_a_failed_row(place, monkeypatch):
    monkeypatch.setenv("DATA", str(place.raw))
    monkeypatch.setenv("RUNS", str(place.runs))
    base = configs.load(place.config)
    ablations.make("pack", base)
    change = ablations.Change("too fast", {"optimizer": "adamw", "learning_rate": 1e30})
    monkeypatch.setitem(ablations.EXPERIMENTS, "bad", change)
    monkeypatch.setattr("train.Transformer", Transformer)  # `measure` sets it
    assert ablations.measure(ablations.experiment(base, "bad", 0, 12), Transformer, "x") == {
        "made_from": "x",
        "failed": True,
    }
