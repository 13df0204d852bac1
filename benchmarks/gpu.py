"""Speed on one NVIDIA GPU: kernels, training steps and generation, beside PyTorch, torch.compile and transformers.

    python -m benchmarks.gpu [--quick]   ->  benchmarks/results/gpu.json

Rates are set against this card's own, measured first. What is compared is timed in turn, by CUDA events after a
warm-up, with the L2 cache flushed before every kernel; quoted are medians. Measurements that fail, or that there is no
time left for, are named in the results, which are written after each one: run again, the compile caches are warm.
Without a GPU, with TRITON_INTERPRET=1, everything runs once on tiny shapes, to show that it runs.
"""

import argparse
import gc
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import configs
import generate
import machine
import stage
from benchmarks import gpu_kernels
from benchmarks.gpu_kernels import BACKEND, DEVICE, GPU, HALF, interleaved, ratio
from model import ModelConfig, RMSNorm, SwiGLU, Transformer
from optim import make_optimizers

RESULT = Path(__file__).parent / "results/gpu.json"
AIMS = {
    "of_copy_bandwidth": {"rms_norm_forward": 0.85, "swiglu_forward": 0.85, "rms_norm_backward": 0.7},
    "tokens_per_second": {"tiny": 2_000_000, "small": 650_000, "base": 220_000},
}
COUNTED = {
    "bytes": "each input of the operator read once, each output written once; the same for its twins",
    "flops_per_token": "6 × weights of linear layers + 12 · n_layers · d_model · T (arXiv:2204.02311, appendix B); "
    "causal: half of the second term",
    "tokens_per_second": "forward, backward, clipping and fused AdamW on random tokens, bfloat16 autocast, T = 1,024",
    "generation": "greedy, 128 tokens after 16, in float32 (TF32), tiny",
}
ROWS = {"micro": 64, "tiny": 32, "small": 16, "base": 8}  # of 1,024 tokens


class Results:
    """What has been found; on disk after each measurement."""

    def __init__(self, quick: bool):
        self.started, self.limit, self.quick = time.perf_counter(), 170 if quick else 520, quick
        self.found = {"failed": {}, "skipped": []}

    def measure(self, section: str, name: str, function: Callable, *arguments, needs: float = 5) -> dict | None:
        """Keeps what the function returns under [section][name]. needs: seconds; with fewer left it is skipped."""
        if time.perf_counter() - self.started + needs > self.limit:
            self.found["skipped"].append(f"{section}/{name}")
            return None
        try:
            value = function(*arguments)
        except Exception as error:  # of any kind, from a compiler or a driver: the rest is still worth having
            torch.cuda.empty_cache()  # which may have run out
            self.found["failed"][f"{section}/{name}"] = f"{type(error).__name__}: {error}"[:2_000]
            value = {"failed": type(error).__name__}
        if value is not None:
            self.found.setdefault(section, {})[name] = value
            if GPU:
                cells = [f"{k} {v:,}" if isinstance(v, (int, float)) else f"{k} {v}" for k, v in value.items()]
                print(f"{section + '/' + name:<44} {'  '.join(cells)}", flush=True)
        self.write()
        return value

    def write(self) -> None:
        if GPU:
            self.found["seconds"] = round(time.perf_counter() - self.started)
            RESULT.parent.mkdir(exist_ok=True)
            stage.write_json(RESULT, self.found)


def clean() -> None:
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()


def output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


# ------------------------------------------------------------------------------------------------------------ training


def flops_per_token(config: ModelConfig, T: int) -> tuple[int, int]:
    """Of a training step on T tokens a row: as PaLM counts them, and with attention's causal half only."""
    flops = config.flops_per_token(T)
    return flops, flops - 6 * config.n_layers * config.d_model * T


def shape(name: str) -> ModelConfig:
    config = configs.load(f"configs/{name}.py").model
    if GPU:
        return config
    return replace(config, vocab_size=64, context_length=16, n_layers=2, d_model=32, n_heads=2)


def to_transformers(model: Transformer) -> nn.Module:
    from tests import test_model  # imported here: what it needs, training does not

    with DEVICE, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return test_model.to_transformers(model)


class Trainer:
    """A training step of one config in one mode: "eager", "blocks" or "whole" (what is compiled); with the kernels
    "triton" or "torch", or transformers' model; without one of the kernels."""

    def __init__(self, name: str, mode: str, kernels: str, without: str | None = None):
        self.name, self.mode, self.kernels, self.without = name, mode, kernels, without
        self.rows = ROWS[name] if GPU else 2
        while True:
            try:
                self.prepare()
                return
            except torch.OutOfMemoryError:
                if self.rows == 1:
                    raise
            self.step, self.rows = None, self.rows // 2
            clean()

    def prepare(self) -> None:
        before = torch.cuda.memory_allocated() if GPU else 0
        self.step = self.make()
        for i in range(4 if GPU else 1):
            if GPU and i == 1:  # from here on, without what compiling needed
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            if i == 3:
                started = time.perf_counter()
            self.step()
        if GPU:
            torch.cuda.synchronize()
            self.repeat = max(1, min(20, round(0.2 / (time.perf_counter() - started))))
        else:
            self.repeat = 1
        self.mib = ((torch.cuda.max_memory_allocated() - before) >> 20) if GPU else 0

    def make(self) -> Callable[[], None]:
        torch.manual_seed(0)
        config = replace(shape(self.name), kernels="torch" if self.kernels == "transformers" else self.kernels)
        with DEVICE:
            model, self.T = Transformer(config), config.context_length
        for module in model.modules():
            if isinstance(module, {"rms_norm": RMSNorm, "swiglu": SwiGLU}.get(self.without, ())):
                module.kernels = "torch"
        theirs = self.kernels == "transformers"
        if theirs:
            model = to_transformers(model).train()
        if theirs:  # the same kernel; its settings do not change the time
            optimizers = [torch.optim.AdamW(model.parameters(), fused=True)]
        else:
            optimizers = make_optimizers(model, configs.load(f"configs/{self.name}.py").pretrain)
        parameters = list(model.parameters())
        if self.mode == "blocks" and GPU:
            machine.compile_blocks(model, DEVICE)
        elif self.mode == "blocks":
            for block in model.blocks:
                block.compile(backend=BACKEND)
        elif self.mode == "whole":
            model = torch.compile(model, dynamic=False, backend=BACKEND)  # ours breaks the graph before the loss
        tokens = torch.randint(config.vocab_size, (self.rows, self.T + 1), device=DEVICE)
        x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

        def loss() -> Tensor:
            if theirs:
                return F.cross_entropy(model(x, use_cache=False).logits.flatten(0, 1), y.flatten())
            if self.without == "loss":
                return F.cross_entropy(model(x).flatten(0, 1), y.flatten())
            return model(x, y)

        def step() -> None:
            with torch.autocast(DEVICE.type, HALF):
                value = loss()
            value.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        return step


def rates(trainers: dict[str, Trainer], results: Results) -> dict[str, list[float]]:
    """Seconds a token of each, in each round; recorded as tokens/s, MFU and memory."""
    seconds = {name: [] for name in trainers}
    for _ in range((3 if results.quick else 5) if GPU else 1):
        for name, trainer in trainers.items():
            [time] = interleaved({name: trainer.step}, 1, trainer.repeat)[name]
            seconds[name].append(time / (trainer.rows * trainer.T))
    measured = results.found.get("peaks", {}).get("matmul", {}).get("tflops")
    peaks = {"measured": measured and measured * 1e12, "datasheet": machine.peak_flops(DEVICE, HALF)}
    for name, trainer in trainers.items():
        rate = 1 / statistics.median(seconds[name])
        found = {"tokens_per_second": round(rate), "rows": trainer.rows, "peak_mib": trainer.mib}
        for kind, flops in zip(("mfu", "mfu_causal"), flops_per_token(shape(trainer.name), trainer.T), strict=True):
            for of, peak in peaks.items():
                if peak:
                    found[f"{kind}_of_{of}_peak"] = round(rate * flops / peak, 4)
        results.measure(f"train_{trainer.name}", name, lambda found=found: found, needs=0)
    return seconds


def training(name: str, results: Results) -> None:
    torch._dynamo.reset()
    trainers, layers = {}, shape(name).n_layers

    def enter(*specification: str, needs: float) -> None:
        """Adds a trainer, and measures it by itself at once, lest there be no time left for all in turn."""
        label = "_".join(specification[1:])

        def first() -> dict:
            trainers[label] = Trainer(name, *specification[1:])
            return {"rows": trainers[label].rows}

        results.measure(f"train_{name}", label, first, needs=needs)
        if label in trainers:
            rates({label: trainers[label]}, results)

    modes = [(mode, kernels) for mode in ("eager", "blocks") for kernels in ("torch", "triton")]
    modes += [("eager", "transformers"), ("whole", "triton"), ("whole", "torch"), ("whole", "transformers")]
    for mode, kernels in modes:
        if not (results.quick and mode == "whole" and name != "tiny"):
            enter(name, mode, kernels, needs={"eager": 8, "blocks": 25, "whole": 15 + 3 * layers}[mode])
    if not trainers:
        return
    seconds = rates(trainers, results)
    median = {label: statistics.median(times) for label, times in seconds.items()}
    ours = min((label for label in median if "transformers" not in label), key=median.get, default=None)
    theirs = min((label for label in median if "transformers" in label), key=median.get, default=None)
    if ours and theirs:
        found = {"ours": ours, "theirs": theirs, "ratio": ratio(seconds[theirs], seconds[ours])}
        results.measure("ratios", f"train_{name}_vs_transformers", lambda: found, needs=0)
    if ours and GPU:
        rate, aim = round(1 / median[ours]), AIMS["tokens_per_second"].get(name, 0)
        aimed = {"mode": ours, "tokens_per_second": rate, "aim": aim, "reached": rate >= aim}
        results.measure("best", name, lambda: aimed, needs=0)
    fused = [label for label in median if label.endswith("_triton")]
    if name not in ("tiny", "small") or not fused or results.quick:
        return
    best = min(fused, key=median.get)
    mode = best.removesuffix("_triton")
    for label in set(trainers) - {best}:
        del trainers[label]
    clean()  # before the next trainer measures its memory
    for without in ("rms_norm", "swiglu", "loss"):
        needs = {"eager": 8, "blocks": 25, "whole": 15 + 3 * layers}[mode]
        enter(name, mode, "triton", without, needs=needs)
    seconds = rates(trainers, results)
    for label in seconds:
        if label != best:
            found = {"ratio": ratio(seconds[label], seconds[best])}
            results.measure("ratios", f"train_{name}_{best}_vs_without_{label[len(best) + 1 :]}", lambda f=found: f)


# ---------------------------------------------------------------------------------------------------------- generation


def generation(batch: int, results: Results) -> dict:
    """Tokens a second of both, and how many times faster ours is."""
    torch.manual_seed(0)
    model = Transformer(shape("tiny")).to(DEVICE).eval()
    theirs, new = to_transformers(model), 128 if GPU else 4
    prompts = torch.randint(3, model.config.vocab_size, (batch, 4 if not GPU else 16))
    listed, there = prompts.tolist(), prompts.to(DEVICE)
    options = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0}
    functions = {
        "ours": lambda: generate.generate(model, listed, new, temperature=0),
        "theirs": lambda: theirs.generate(there, attention_mask=torch.ones_like(there), **options),
    }
    for function in functions.values():
        function()
    times = interleaved(functions, 2 if results.quick else 3)
    rate = {f"{name}_tokens_per_second": round(batch * new / statistics.median(t)) for name, t in times.items()}
    return rate | {"ratio": ratio(times["theirs"], times["ours"])}


def run(results: Results) -> None:
    machine.pick_device()  # sets the precision that it trains with
    torch._dynamo.config.recompile_limit = 64  # every trainer has the blocks compiled for itself
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._functorch.config.donated_buffer = False  # a backward pass is timed many times over
    results.measure("peaks", "matmul", gpu_kernels.matmul_peak)
    results.measure("peaks", "copy", gpu_kernels.copy_peak)
    for dtype in (torch.float32, HALF):
        results.measure("checks", f"kernels_{str(dtype).removeprefix('torch.')}", gpu_kernels.check_kernels, dtype)
    for where in dict.fromkeys((DEVICE, torch.device("cpu"))):
        results.measure("checks", f"loss_with_targets_on_{where.type}", gpu_kernels.check_loss, where)
    results.measure(
        "checks", "whole_model_compiled", gpu_kernels.check_compiled, replace(shape("tiny"), n_layers=2), needs=20
    )
    gpu_kernels.kernels(results)
    clean()
    for batch in (1, 8) if results.quick or not GPU else (1, 8, 64):
        results.measure("ratios", f"generate_{batch}_vs_transformers", generation, batch, results, needs=10)
    for name in (("tiny", "small") if results.quick else ("tiny", "small", "base", "micro")) if GPU else ("tiny",):
        results.measure("training", name, training, name, results, needs=20)
        clean()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="less of it, in 3 minutes")
    results = Results(parser.parse_args().quick)
    if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
        print("error: benchmarks.gpu needs a GPU; to only run the code, set TRITON_INTERPRET=1", file=sys.stderr)
        return 2
    if GPU:
        results.found |= {
            "device": torch.cuda.get_device_name(),
            "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": torch.version.cuda,
            "commit": output("git", "rev-parse", "--short", "HEAD"),
            "versions": stage.versions(),
            "counted": COUNTED,
            "aims": AIMS,
        }
    run(results)
    if not GPU:
        print("no GPU: everything ran once on tiny shapes; nothing was measured, nothing written")
    for name, error in results.found["failed"].items():
        print(f"failed: {name}: {error}", file=sys.stderr)
    return 1 if results.found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
