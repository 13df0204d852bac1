"""Speed on one NVIDIA GPU: kernels, training steps and generation, beside PyTorch, torch.compile and transformers.

    python -m benchmarks.gpu [--quick]   ->  benchmarks/results/gpu.json

Rates are set against this card's own, measured first. What is compared is timed in turn, by CUDA events after a
warm-up, with the L2 cache flushed before every kernel; quoted are medians. Measurements that fail, or that there is no
time left for, are named in the results, which are written after each one: run again, the compile caches are warm.
Without a GPU, everything runs once on tiny shapes, to show that it runs.
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

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton

# ruff: noqa: E402
import configs
import model as lumi
import stage
import train
from model import ModelConfig, RMSNorm, SwiGLU, Transformer

RESULT = Path(__file__).parent / "results/gpu.json"
DEVICE, HALF = torch.device("cuda" if GPU else "cpu"), torch.bfloat16
BACKEND = "inductor" if GPU else "aot_eager"
DATASHEET = {"NVIDIA H100 80GB HBM3": 989.4, "NVIDIA H200": 989.4}  # TFLOP/s in bfloat16, dense
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


# ---------------------------------------------------------------------------------------------------------- measuring


def mark() -> "torch.cuda.Event | float":
    if not GPU:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def interleaved(functions: dict[str, Callable], rounds: int, repeat: int = 1, flush: bool = False) -> dict[str, list]:
    """Seconds of one call of each function, in each round. The functions are warm.

    Flushing writes 512 MiB, ten times an H100's L2. It also takes longer than a launch, which so is not measured.
    """
    scratch = torch.empty(2**29 if GPU else 8, dtype=torch.uint8, device=DEVICE) if flush else None
    marks = {name: [] for name in functions}
    for _ in range(rounds if GPU else 1):
        for name, function in functions.items():
            if flush:
                scratch.zero_()
            start = mark()
            for _ in range(repeat):
                function()
            marks[name].append((start, mark()))
    if GPU:
        torch.cuda.synchronize()
        return {name: [a.elapsed_time(b) / 1e3 / repeat for a, b in pairs] for name, pairs in marks.items()}
    return {name: [(b - a) / repeat for a, b in pairs] for name, pairs in marks.items()}


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """The median over the rounds."""
    return round(statistics.median(a / b for a, b in zip(numerator, denominator, strict=True)), 3)


def warm(functions: dict[str, Callable]) -> dict[str, Callable]:
    for function in functions.values():
        for _ in range(3 if GPU else 1):
            function()
    return functions


def peak_mib(function: Callable) -> int:
    """MiB that a call needs beside what is there."""
    if not GPU:
        function()
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return (torch.cuda.max_memory_allocated() - before) >> 20


def normal(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def matmul_peak() -> dict:
    n = 8192 if GPU else 64
    a, b = normal(n, n), normal(n, n)
    times = interleaved(warm({"matmul": lambda: a @ b}), 10, repeat=10)["matmul"]
    return {"tflops": round(2 * n**3 / statistics.median(times) / 1e12, 1)}


def copy_peak() -> dict:
    source = torch.zeros(2**31 if GPU else 64, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    times = interleaved(warm({"copy": lambda: target.copy_(source)}), 20)["copy"]
    return {"gb_per_second": round(2 * source.numel() / statistics.median(times) / 1e9)}


# ------------------------------------------------------------------------------------------------------------- checks


def near(found: Tensor, exact: Tensor, tolerance: float) -> None:
    error = float((found.detach().double() - exact.detach()).norm() / exact.detach().norm())
    assert error <= tolerance, f"relative error {error:.2g}; expected at most {tolerance:.2g}"


def check_kernels(dtype: torch.dtype) -> dict:
    """Forward and backward against the twins in float64."""
    rows, d, tolerance = (4_099, 768, 4e-3 if dtype == HALF else 1e-5) if GPU else (5, 24, 8e-3)
    x, delta, w, dy = normal(rows, d, dtype=dtype), normal(rows, d), torch.rand(d, device=DEVICE), normal(rows, d)
    for kernel, twin, inputs in (
        (lambda x, w: lumi.rms_norm(x, w, 1e-5, "triton"), lambda x, w: lumi.rms_norm_torch(x, w, 1e-5), [x, w]),
        (
            lambda x, delta, w: sum(lumi.add_rms_norm(x, delta, w, 1e-5, "triton")),
            lambda x, delta, w: x + delta + lumi.rms_norm_torch(x + delta, w, 1e-5),
            [x, delta, w],
        ),
        (lambda a, b: lumi.swiglu(a, b, "triton"), lumi.swiglu_torch, [x, dy.to(dtype)]),
    ):
        given, exact = [i.clone().requires_grad_() for i in inputs], [i.double().requires_grad_() for i in inputs]
        found, expected = kernel(*given), twin(*exact)
        near(found, expected, tolerance)
        found.backward(dy.to(found.dtype)), expected.backward(dy.double())
        for a, b in zip(given, exact, strict=True):
            near(a.grad, b.grad, max(tolerance, 4e-3 if a.dtype == HALF else 0))
    return {"passed": True}


def check_loss(targets_on: torch.device) -> dict:
    """Against float64 with a fifth of the targets ignored; on a GPU without once waiting for it."""
    n, d, v = (9_001, 256, 32_768) if GPU else (5, 8, 33)
    x, w = normal(n, d).requires_grad_(), normal(v, d, dtype=torch.float32).requires_grad_()
    targets = torch.randint(v, (n,)).where(torch.rand(n) > 0.2, -100).to(targets_on)
    try:
        if GPU:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        loss = lumi.linear_cross_entropy(x, w / 16, targets, kernels="triton")
        loss.backward()
    finally:
        if GPU:
            torch.cuda.set_sync_debug_mode("default")
    wide, weight = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    exact = F.cross_entropy(wide @ (weight.T / 16), targets.to(DEVICE))
    exact.backward()
    for a, b in ((loss, exact), (x.grad, wide.grad), (w.grad, weight.grad)):
        near(a, b, 2e-2)
    return {"passed": True}


def check_compiled(config: ModelConfig) -> dict:
    """The whole model in one graph, with kernels and autocast, against float32."""
    torch.manual_seed(0)
    model = Transformer(replace(config, kernels="triton")).to(DEVICE)
    tokens = torch.randint(config.vocab_size, (2, config.context_length), device=DEVICE)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=BACKEND)
    with torch.autocast(DEVICE.type, HALF):
        loss = compiled(tokens, tokens)
    loss.backward()
    found = model.embed.weight.grad.clone()
    model.zero_grad()
    exact = model(tokens, tokens)
    exact.backward()
    near(loss, exact.double(), 1e-2)
    near(found, model.embed.weight.grad.double(), 5e-2)
    return {"passed": True}


# ------------------------------------------------------------------------------------------------------------ kernels


def nbytes(*tensors: Tensor | None) -> int:
    return sum(t.nbytes for t in tensors if t is not None)


def norm_operators(rows: int, d: int, stream: torch.dtype, add: bool) -> tuple:
    """Inputs, gradients given, the operator, what its backward operator reads, that operator, the twin."""
    w, dy = torch.rand(d, device=DEVICE) + 0.5, normal(rows, d)
    x, delta = normal(rows, d, dtype=stream), normal(rows, d) if add else None
    dtotal = normal(rows, d, dtype=stream) if add else None
    total, _, scale = torch.ops.lumi.rms_norm(x, delta, w, 1e-5, HALF)
    saved = [total if add else x, w, scale, dy, dtotal]

    def twin(x: Tensor, w: Tensor, *delta: Tensor) -> tuple[Tensor, ...]:
        if not add:
            return (lumi.rms_norm_torch(x, w, 1e-5, HALF),)
        total = x + delta[0]
        return total, lumi.rms_norm_torch(total, w, 1e-5, HALF)

    def backward() -> tuple[Tensor, ...]:
        return torch.ops.lumi.rms_norm_backward(*saved, HALF if add and stream != HALF else None)

    inputs, grads = ([x, w, delta], [dtotal, dy]) if add else ([x, w], [dy])
    return inputs, grads, lambda: torch.ops.lumi.rms_norm(x, delta, w, 1e-5, HALF), saved, backward, twin


def swiglu_operators(rows: int, d: int) -> tuple:
    """As norm_operators."""
    gate, up, dy = normal(rows, d), normal(rows, d), normal(rows, d)
    forward, backward = torch.ops.lumi.swiglu, torch.ops.lumi.swiglu_backward
    saved = [gate, up, dy]
    twin = lambda a, b: (lumi.swiglu_torch(a, b),)  # noqa: E731
    return [gate, up], [dy], lambda: (forward(gate, up),), saved, lambda: backward(*saved), twin


def time_kernel(make: Callable, d: int, backward: bool, bandwidth: float | None) -> dict:
    """A kernel beside its twins, eager and compiled, on 256 MiB or more an operand. bandwidth: of a copy, GB/s."""
    torch._dynamo.reset()
    rows = max(2**16, 2**27 // d) if GPU else 5
    inputs, grads, operator, saved, backward_operator, twin = make(rows, d)
    twins = {"eager": twin, "compiled": torch.compile(twin, dynamic=False, backend=BACKEND)}
    if not backward:
        moved = nbytes(*inputs, *operator())
        functions = {"triton": operator} | {name: lambda f=f: f(*inputs) for name, f in twins.items()}
    else:
        moved = nbytes(*saved, *backward_operator())
        functions = {"triton": backward_operator}
        for name, f in twins.items():
            given = [x.detach().requires_grad_() for x in inputs]
            outputs = f(*given)
            functions[name] = lambda y=outputs, x=given: torch.autograd.grad(y, x, grads, retain_graph=True)
    times = interleaved(warm(functions), 20, flush=True)
    return {"rows": rows, "bytes": moved} | summary(times, moved, bandwidth)


def summary(times: dict[str, list], moved: int, bandwidth: float | None) -> dict:
    seconds = statistics.median(times["triton"])
    found = {"microseconds": round(1e6 * seconds, 1), "gb_per_second": round(moved / seconds / 1e9)}
    if bandwidth:
        found["of_copy_bandwidth"] = round(moved / seconds / 1e9 / bandwidth, 3)
    return found | {f"vs_{name}": ratio(times[name], times["triton"]) for name in times if name != "triton"}


def time_cross_entropy(bandwidth: float | None) -> dict:
    """Loss and gradient of logits: the kernel that overwrites them, beside F.cross_entropy of their float32 copy."""
    torch._dynamo.reset()
    n, v = (8_192, 32_768) if GPU else (3, 50)
    logits, targets, losses = normal(n, v), torch.randint(v, (n,), device=DEVICE), torch.empty(n, device=DEVICE)
    columns = min(4096, lumi.triton.next_power_of_2(v))  # as in linear_cross_entropy
    kernel = lambda: lumi._cross_entropy[(n,)](logits, targets, losses, v, -100, C=columns, num_warps=8)  # noqa: E731
    plain = lambda x: F.cross_entropy(x.float(), targets, reduction="sum")  # noqa: E731
    compiled, given = torch.compile(plain, dynamic=False, backend=BACKEND), logits.clone().requires_grad_()
    functions = {"triton": kernel}
    for name, f in {"eager": plain, "compiled": compiled}.items():
        functions[name] = lambda f=f: torch.autograd.grad(f(given), given)
    times = interleaved(warm(functions), 10, flush=True)
    moved = 2 * logits.nbytes + losses.nbytes + targets.nbytes
    memory = {f"{name}_mib": peak_mib(function) for name, function in functions.items()}
    return {"rows": n, "bytes": moved} | summary(times, moved, bandwidth) | memory


def time_loss(d: int) -> dict:
    """Projection and loss, forward and backward under autocast: chunked, beside all logits at once."""
    torch._dynamo.reset()
    n, v = (16_384, 32_768) if GPU else (5, 50)
    x, w = normal(n, d).requires_grad_(), (0.02 * normal(v, d, dtype=torch.float32)).requires_grad_()
    targets = torch.randint(v, (n,), device=DEVICE)
    plain = lambda: F.cross_entropy(F.linear(x, w), targets)  # noqa: E731
    losses = {"triton": lambda: lumi.linear_cross_entropy(x, w, targets, kernels="triton"), "eager": plain}
    losses["compiled"] = torch.compile(plain, dynamic=False, backend=BACKEND)

    def step(loss: Callable) -> None:
        with torch.autocast(DEVICE.type, HALF):
            value = loss()
        torch.autograd.grad(value, (x, w))

    functions = warm({name: lambda f=f: step(f) for name, f in losses.items()})
    times, memory = interleaved(functions, 10), {f"{name}_mib": peak_mib(f) for name, f in functions.items()}
    found = {"milliseconds": round(1e3 * statistics.median(times["triton"]), 3)}
    return found | {f"vs_{name}": ratio(times[name], times["triton"]) for name in ("eager", "compiled")} | memory


def kernels(results: Results) -> None:
    bandwidth = results.found.get("peaks", {}).get("copy", {}).get("gb_per_second")
    plain = lambda rows, d: norm_operators(rows, d, HALF, add=False)  # noqa: E731
    mixed = lambda rows, d: norm_operators(rows, d, torch.float32, add=True)  # noqa: E731
    half = lambda rows, d: norm_operators(rows, d, HALF, add=True)  # noqa: E731
    cases = [
        ("rms_norm", plain, (128, 256, 512, 768, 4096)),
        ("add_rms_norm_float32", mixed, (256, 768, 4096)),
        ("add_rms_norm_bfloat16", half, (768, 4096)),
        ("swiglu", swiglu_operators, (512, 1024, 3072, 4096)),
    ]
    for name, make, widths in cases:
        for d in (widths[-2:-1] if results.quick else widths) if GPU else (24,):
            for way in ("forward", "backward"):
                arguments = (make, d, way == "backward", bandwidth)
                results.measure("kernels", f"{name}_{way}_{d}", time_kernel, *arguments)
    results.measure("kernels", "cross_entropy_32768", time_cross_entropy, bandwidth)
    for d in (256, 768) if GPU else (24,):
        results.measure("kernels", f"linear_cross_entropy_{d}", time_loss, d)


# ------------------------------------------------------------------------------------------------------------ training


def flops_per_token(config: ModelConfig, T: int) -> tuple[int, int]:
    """Of a training step on T tokens a row: as PaLM counts them, and with attention's causal half only."""
    with torch.device("meta"):
        weights = sum(m.weight.numel() for m in Transformer(config).modules() if isinstance(m, nn.Linear))
    attention = 12 * config.n_layers * config.d_model * T
    return 6 * weights + attention, 6 * weights + attention // 2


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
        optimizer = train.make_optimizer(model, configs.load(f"configs/{self.name}.py").pretrain)
        parameters = list(model.parameters())
        if self.mode == "blocks" and GPU:
            train.compile_blocks(model)
        elif self.mode == "blocks":
            for block in model.blocks:
                block.compile(backend=BACKEND)
        elif self.mode == "whole":
            model = torch.compile(model, fullgraph=not theirs, dynamic=False, backend=BACKEND)
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
    peak = results.found.get("peaks", {}).get("matmul", {}).get("tflops")
    for name, trainer in trainers.items():
        rate = 1 / statistics.median(seconds[name])
        found = {"tokens_per_second": round(rate), "rows": trainer.rows, "peak_mib": trainer.mib}
        for kind, flops in zip(("mfu", "mfu_causal"), flops_per_token(shape(trainer.name), trainer.T), strict=True):
            for of, tflops in (("measured", peak), ("datasheet", DATASHEET.get(results.found.get("device")))):
                if tflops:
                    found[f"{kind}_of_{of}_peak"] = round(rate * flops / tflops / 1e12, 4)
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
        "ours": lambda: model.generate(listed, new, temperature=0),
        "theirs": lambda: theirs.generate(there, attention_mask=torch.ones_like(there), **options),
    }
    for function in functions.values():
        function()
    times = interleaved(functions, 2 if results.quick else 3)
    rate = {f"{name}_tokens_per_second": round(batch * new / statistics.median(t)) for name, t in times.items()}
    return rate | {"ratio": ratio(times["theirs"], times["ours"])}


def run(results: Results) -> None:
    train.pick_device()  # sets the precision that it trains with
    torch._dynamo.config.recompile_limit = 64  # every trainer has the blocks compiled for itself
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._functorch.config.donated_buffer = False  # a backward pass is timed many times over
    results.measure("peaks", "matmul", matmul_peak)
    results.measure("peaks", "copy", copy_peak)
    for dtype in (torch.float32, HALF):
        results.measure("checks", f"kernels_{str(dtype).removeprefix('torch.')}", check_kernels, dtype)
    for where in dict.fromkeys((DEVICE, torch.device("cpu"))):
        results.measure("checks", f"loss_with_targets_on_{where.type}", check_loss, where)
    results.measure("checks", "whole_model_compiled", check_compiled, replace(shape("tiny"), n_layers=2), needs=20)
    kernels(results)
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
