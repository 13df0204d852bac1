"""The kernels of model.py on one NVIDIA GPU: checked, then timed beside their twins and the bandwidth of a copy.

Parts of `python -m benchmarks.gpu`, and what the other parts share.
"""

import importlib.util
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
import torch._dynamo
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor

import configs
import model as lumi
import stage
from benchmarks.common import ratio
from model import ModelConfig, Transformer

GPU = torch.cuda.is_available()
DEVICE, HALF = torch.device("cuda" if GPU else "cpu"), torch.bfloat16
BACKEND = "inductor" if GPU else "aot_eager"


def shape(name: str) -> ModelConfig:
    """The model of a config; without a GPU a miniature of it."""
    config = configs.load(stage.ROOT / f"configs/{name}.py").model
    return config if GPU else replace(config, vocab_size=64, context_length=16, n_layers=2, d_model=32, n_heads=2)


def autocast() -> torch.autocast:
    return torch.autocast(DEVICE.type, HALF)


def normal(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def near(found: Tensor, exact: Tensor, tolerance: float) -> float:
    """The error's norm as a share of the exact tensor's. AssertionError if it is more than the tolerance."""
    error = float((found.detach().double() - exact.detach()).norm() / exact.detach().norm())
    assert error <= tolerance, f"relative error {error:.2g}; expected at most {tolerance:.2g}"
    return error


# -------------------------------------------------------------------------------------------------------------- timing


def wait() -> None:
    """Waits until the GPU has done its work."""
    if GPU:
        torch.cuda.synchronize()


def mark() -> "torch.cuda.Event | float":
    if not GPU:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def timed(functions: dict[str, Callable], rounds: int, repeat: int = 1, flush: bool = False) -> dict[str, list[float]]:
    """Seconds of one call of each function in each round, in turn, by CUDA events. The functions are warm.

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
    wait()
    seconds = {name: [] for name in functions}
    for name, pairs in marks.items():
        for start, end in pairs:
            seconds[name].append((start.elapsed_time(end) / 1e3 if GPU else end - start) / repeat)
    return seconds


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
    wait()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return (torch.cuda.max_memory_allocated() - before) >> 20


def without_waiting(function: Callable):
    """What the function returns. AssertionError, naming the places, if the host waits for the GPU in it."""
    if not GPU:
        return function()
    wait()
    try:
        torch.cuda.set_sync_debug_mode("error")
        return function()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        torch.cuda.set_sync_debug_mode("warn")  # again, for all of the places
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
        places = [f"{w.filename}:{w.lineno}" for w in caught if "synchronizing" in str(w.message)]
        raise AssertionError(f"the host waits for the GPU at {', '.join(dict.fromkeys(places))}") from error
    finally:
        torch.cuda.set_sync_debug_mode("default")


# -------------------------------------------------------------------------------------------------------------- checks


def kernel_tests() -> dict:
    """The suite's tests of kernels and loss against float64: on a GPU they run what is compiled for it."""
    which = "kernel or cross_entropy or loss or compiled" if GPU else "masks_ignored"
    command = [sys.executable, "-m", "pytest", "tests/test_model.py", "-k", which, "-W", "ignore"]
    command += ["-p", "no:cacheprovider"] + (["-n", "8"] if GPU and importlib.util.find_spec("xdist") else [])
    done = subprocess.run(command, cwd=stage.ROOT, capture_output=True, text=True, timeout=60)
    output = (done.stdout + done.stderr).strip()
    assert done.returncode == 0, output[-1_500:]
    return {"passed": True, "pytest": output.splitlines()[-1]}


def check_model(config: ModelConfig) -> dict:
    """The kernels under autocast, and compiled blocks, against float32 without kernels."""
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
        with autocast():
            loss = other(tokens, tokens)
        loss.backward()
        near(loss, exact.double(), 1e-2)
        near(other.embed.weight.grad, model.embed.weight.grad.double(), 5e-2)
    return {"passed": True}


def checks(results) -> None:
    results.measure("checks/model", check_model, replace(shape("tiny"), n_layers=2), needs=15)
    results.measure("checks/tests", kernel_tests, needs=15)


# ------------------------------------------------------------------------------------------------------------- kernels


def peaks() -> dict:
    """The rate of a matrix product, and the bandwidth of a copy."""
    n = 8192 if GPU else 64
    a, b = normal(n, n), normal(n, n)
    source = torch.zeros(2**31 if GPU else 64, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    times = timed(warm({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}), 10, repeat=10)
    seconds = {name: statistics.median(each) for name, each in times.items()}
    found = {"tflops": round(2 * n**3 / seconds["product"] / 1e12, 1)}
    return found | {"gb_per_second": round(2 * source.numel() / seconds["copy"] / 1e9)}


def elementwise(name: str, d: int, backward: bool) -> tuple[dict[str, Callable], int]:
    """Ways to compute RMSNorm or SwiGLU, or its gradients, on 256 MiB or more an operand; and the bytes it must move.

    Bytes: each input of the operator read once, each output written once; the same for its twins.
    """
    rows = max(2**16, 2**27 // d) if GPU else 5
    x, dy, moved = normal(rows, d), normal(rows, d), 0
    if name == "rms_norm":
        inputs, moved = [x, torch.rand(d, device=DEVICE) + 0.5], 4 * rows  # 1/rms, which is kept
        operators = {kernels: lambda x, w, k=kernels: lumi.rms_norm(x, w, 1e-5, k) for kernels in ("triton", "torch")}
    else:
        inputs = [x, normal(rows, d)]
        operators = {kernels: lambda a, b, k=kernels: lumi.swiglu(a, b, k) for kernels in ("triton", "torch")}
    operators["compiled"] = torch.compile(operators["torch"], dynamic=False, backend=BACKEND)

    def way(operator: Callable, dtype: torch.dtype | None = None) -> Callable:
        given = [i.detach().to(dtype or i.dtype).requires_grad_(backward) for i in inputs]
        y = operator(*given)
        if backward:
            return lambda: torch.autograd.grad(y, given, dy.to(y.dtype), retain_graph=True)
        return lambda: [operator(*given)]

    ways = {kernels: way(operator) for kernels, operator in operators.items()}
    for found, exact in zip(ways["triton"](), way(operators["torch"], torch.float64)(), strict=True):
        near(found, exact.double(), 8e-3)
    # Forward the inputs are read and y is written; backward dy is read too, and a gradient of each input written.
    inputs_bytes = sum(i.nbytes for i in inputs)
    return ways, moved + inputs_bytes + dy.nbytes + (inputs_bytes if backward else 0)


def cross_entropy() -> tuple[dict[str, Callable], int]:
    """Loss and gradient of logits: the kernel that overwrites them, beside F.cross_entropy of their float32 copy."""
    n, v = (8_192, 32_768) if GPU else (3, 50)
    logits, targets = normal(n, v), torch.randint(v, (n,), device=DEVICE)
    given = logits.clone().requires_grad_()
    plain = lambda x: F.cross_entropy(x.float(), targets, reduction="sum")  # noqa: E731
    ways = {"triton": lambda: lumi.cross_entropy(logits, targets, "triton")}
    for name, loss in (("torch", plain), ("compiled", torch.compile(plain, dynamic=False, backend=BACKEND))):
        ways[name] = lambda loss=loss: torch.autograd.grad(loss(given), given)
    return ways, 2 * logits.nbytes + 4 * n + targets.nbytes


def projection_and_loss(d: int) -> tuple[dict[str, Callable], int]:
    """Forward and backward under autocast: chunked and without a wait, beside all logits at once."""
    n, v = (16_384, 32_768) if GPU else (5, 50)
    x, w = normal(n, d).requires_grad_(), (0.02 * normal(v, d, dtype=torch.float32)).requires_grad_()
    targets = torch.randint(v, (n,), device=DEVICE)
    plain = lambda: F.cross_entropy(F.linear(x, w), targets)  # noqa: E731
    losses = {"triton": lambda: lumi.linear_cross_entropy(x, w, targets, kernels="triton"), "torch": plain}
    losses["compiled"] = torch.compile(plain, dynamic=False, backend=BACKEND)

    def step(loss: Callable) -> tuple[Tensor, ...]:
        with autocast():
            value = loss()
        return value, *torch.autograd.grad(value, (x, w))

    ways = {name: lambda loss=loss: step(loss) for name, loss in losses.items()}
    ways["triton"]()  # compiles
    exact = F.cross_entropy(x.double() @ w.T.double(), targets)
    exact = exact, *torch.autograd.grad(exact, (x, w))
    for found, expected in zip(without_waiting(ways["triton"]), exact, strict=True):
        near(found, expected.double(), 2e-2)
    return ways, 0


def time_kernel(make: Callable, *arguments) -> dict:
    """A kernel beside its twins, eager and compiled. make: returns the ways, and the bytes moved or 0."""
    torch._dynamo.reset()
    ways, moved = make(*arguments)
    times = timed(warm(ways), 20, flush=True)
    seconds = statistics.median(times["triton"])
    found = {"microseconds": round(1e6 * seconds, 1)}
    if moved:
        found |= {"bytes": moved, "gb_per_second": round(moved / seconds / 1e9)}
    for name, function in ways.items():
        found[f"{name}_mib"] = peak_mib(function)
        if name != "triton":
            found[f"vs_{name}"] = ratio(times[name], times["triton"])
    return found


def kernels(results) -> None:
    """The card's own rates, then each kernel's time."""
    results.measure("peaks/measured", peaks)
    with torch._functorch.config.patch(donated_buffer=False):  # a backward pass is timed many times over
        for name, widths in (("rms_norm", (256, 768)), ("swiglu", (1024, 3072))):
            for d in widths if GPU else (24,):
                for way in ("forward", "backward"):
                    results.measure(f"kernels/{name}_{way}_{d}", time_kernel, elementwise, name, d, way == "backward")
        results.measure("kernels/cross_entropy_32768", time_kernel, cross_entropy)
        for d in (256, 768) if GPU else (24,):
            results.measure(f"kernels/projection_and_loss_{d}", time_kernel, projection_and_loss, d)
