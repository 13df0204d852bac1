"""The kernels of model.py on one NVIDIA GPU: checked, then timed beside their twins and the bandwidth of a copy.

A part of `python -m benchmarks.gpu`. What is compared is timed in turn, by CUDA events, with the L2 cache flushed
before every kernel; quoted are medians. Bytes: each input of the operator read once, each output written once.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

import model as lumi
from model import ModelConfig, Transformer

GPU = torch.cuda.is_available()
DEVICE, HALF = torch.device("cuda" if GPU else "cpu"), torch.bfloat16
BACKEND = "inductor" if GPU else "aot_eager"


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return lumi.swiglu(gate, up, "torch")


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
    x, w, dy = normal(rows, d, dtype=dtype), torch.rand(d, device=DEVICE), normal(rows, d)
    for kernel, twin, inputs in (
        (lambda x, w: lumi.rms_norm(x, w, 1e-5, "triton"), lambda x, w: lumi.rms_norm(x, w, 1e-5, "torch"), [x, w]),
        (lambda a, b: lumi.swiglu(a, b, "triton"), plain_swiglu, [x, dy.to(dtype)]),
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
    """Compiled blocks under autocast, and the eager kernels, against float32 without kernels."""
    torch.manual_seed(0)
    model = Transformer(replace(config, kernels="torch")).to(DEVICE)
    tokens = torch.randint(config.vocab_size, (2, config.context_length), device=DEVICE)
    exact = model(tokens, tokens)
    exact.backward()
    for compiled in (False, True):
        other = Transformer(replace(config, kernels="triton")).to(DEVICE)
        other.load_state_dict(model.state_dict())
        for block in other.blocks if compiled else ():
            block.compile(fullgraph=True, dynamic=False, backend=BACKEND)
        with torch.autocast(DEVICE.type, HALF):
            loss = other(tokens, tokens)
        loss.backward()
        near(loss, exact.double(), 1e-2)
        near(other.embed.weight.grad, model.embed.weight.grad.double(), 5e-2)
    return {"passed": True}


# ------------------------------------------------------------------------------------------------------------ kernels


def nbytes(*tensors: Tensor | None) -> int:
    return sum(t.nbytes for t in tensors if t is not None)


def norm_case(rows: int, d: int) -> tuple:
    """Inputs, the gradient given, the kernel, its twin, and bytes of the 1/rms that the kernel keeps."""
    x, w, dy = normal(rows, d), torch.rand(d, device=DEVICE) + 0.5, normal(rows, d)
    kernel = lambda x, w: lumi.rms_norm(x, w, 1e-5, "triton")  # noqa: E731
    return [x, w], dy, kernel, lambda x, w: lumi.rms_norm(x, w, 1e-5, "torch"), 4 * rows


def swiglu_case(rows: int, d: int) -> tuple:
    """As norm_case."""
    inputs = [normal(rows, d), normal(rows, d)]
    return inputs, normal(rows, d), lambda a, b: lumi.swiglu(a, b, "triton"), plain_swiglu, 0


def time_kernel(make: Callable, d: int, backward: bool, bandwidth: float | None) -> dict:
    """A kernel beside its twins, eager and compiled, on 256 MiB or more an operand. bandwidth: of a copy, GB/s."""
    torch._dynamo.reset()
    rows = max(2**16, 2**27 // d) if GPU else 5
    inputs, dy, kernel, twin, kept = make(rows, d)
    ways = {"triton": kernel, "eager": twin, "compiled": torch.compile(twin, dynamic=False, backend=BACKEND)}
    functions = {}
    for name, function in ways.items():
        if backward:
            given = [x.detach().requires_grad_() for x in inputs]
            y = function(*given)
            functions[name] = lambda y=y, given=given: torch.autograd.grad(y, given, dy, retain_graph=True)
        else:
            functions[name] = lambda function=function: function(*inputs)
    # Forward the inputs are read and y is written; backward dy is read too, and a gradient of each input written.
    moved = kept + nbytes(*inputs, dy) + (nbytes(*inputs) if backward else 0)
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
    logits, targets = normal(n, v), torch.randint(v, (n,), device=DEVICE)
    kernel = lambda: lumi.cross_entropy(logits, targets, "triton")  # noqa: E731
    plain = lambda x: F.cross_entropy(x.float(), targets, reduction="sum")  # noqa: E731
    compiled, given = torch.compile(plain, dynamic=False, backend=BACKEND), logits.clone().requires_grad_()
    functions = {"triton": kernel}
    for name, f in {"eager": plain, "compiled": compiled}.items():
        functions[name] = lambda f=f: torch.autograd.grad(f(given), given)
    times = interleaved(warm(functions), 10, flush=True)
    moved = 2 * logits.nbytes + 4 * n + targets.nbytes
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


def kernels(results) -> None:
    """Adds the times of all of them to the `Results`."""
    bandwidth = results.found.get("peaks", {}).get("copy", {}).get("gb_per_second")
    cases = [("rms_norm", norm_case, (128, 256, 512, 768, 4096)), ("swiglu", swiglu_case, (512, 1024, 3072, 4096))]
    for name, make, widths in cases:
        for d in (widths[-2:-1] if results.quick else widths) if GPU else (24,):
            for way in ("forward", "backward"):
                arguments = (make, d, way == "backward", bandwidth)
                results.measure("kernels", f"{name}_{way}_{d}", time_kernel, *arguments)
    results.measure("kernels", "cross_entropy_32768", time_cross_entropy, bandwidth)
    for d in (256, 768) if GPU else (24,):
        results.measure("kernels", f"linear_cross_entropy_{d}", time_loss, d)
