"""What the machine is, and how training will use it: device and precision, speed and memory, and the page about them.

Nothing here changes what is trained, only where and how fast.
"""

import ctypes
import functools
import math
import os
import platform
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from cli import UserError, log
from model import ModelConfig, Transformer, triton

if TYPE_CHECKING:
    from trainer import Task, TrainConfig

CHINCHILLA = 20  # tokens a parameter at which a given number of FLOPs trains the best model (arXiv:2203.15556)

# Dense TFLOP/s by vendor's data sheet, under the name that CUDA gives the card: in bfloat16, float16, and in float32,
# which is TF32 where the card has it. Tensor cores without sparsity, accumulating in float32.
DATASHEET = {
    "NVIDIA H200": (989.4, 989.4, 494.7),
    "NVIDIA H200 NVL": (835.5, 835.5, 417.5),
    "NVIDIA H100 80GB HBM3": (989.4, 989.4, 494.7),
    "NVIDIA H100 NVL": (835.5, 835.5, 417.5),
    "NVIDIA H100 PCIe": (756.0, 756.0, 378.0),
    "NVIDIA A100-SXM4-80GB": (312.0, 312.0, 156.0),
    "NVIDIA A100-SXM4-40GB": (312.0, 312.0, 156.0),
    "NVIDIA A100 80GB PCIe": (312.0, 312.0, 156.0),
    "NVIDIA A100-PCIE-40GB": (312.0, 312.0, 156.0),
    "NVIDIA A30": (165.0, 165.0, 82.0),
    "NVIDIA A40": (149.7, 149.7, 74.8),
    "NVIDIA A10": (125.0, 125.0, 62.5),
    "NVIDIA A10G": (70.0, 70.0, 35.0),
    "NVIDIA L40S": (362.05, 362.05, 183.0),
    "NVIDIA L40": (181.05, 181.05, 90.5),
    "NVIDIA L4": (121.0, 121.0, 60.0),
    "NVIDIA RTX A6000": (154.8, 154.8, 77.4),
    "NVIDIA RTX 6000 Ada Generation": (364.2, 364.2, 182.1),
    "NVIDIA GeForce RTX 4090": (165.2, 165.2, 82.6),
    "NVIDIA GeForce RTX 3090": (71.0, 71.0, 35.6),
    "Tesla V100-SXM2-16GB": (None, 125.0, 15.7),
    "Tesla V100-SXM2-32GB": (None, 125.0, 15.7),
    "Tesla V100-PCIE-16GB": (None, 112.0, 14.0),
    "Tesla V100-PCIE-32GB": (None, 112.0, 14.0),
    "Tesla T4": (None, 65.0, 8.1),
}


# ------------------------------------------------------------------------------------------------ device and precision


def pick_device() -> torch.device:
    """This process's GPU if there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda", torch.cuda.current_device())


def pick_dtype(device: torch.device, precision: str = "auto") -> torch.dtype:
    """What matrix products run in. Weights and optimizer are float32 everywhere.

    precision: TrainConfig's. "auto" is what the hardware multiplies fastest: on a GPU bfloat16 from Ampere on, float16
    from Volta on (tensor cores); on a CPU bfloat16 if it is measured to be native. A precision that is forced, and that
    the device lacks, is warned of.
    """
    if precision == "auto":
        # Not float16 on a CPU: it would need a scaled loss, for nothing.
        known = (torch.bfloat16, torch.float16) if device.type == "cuda" else (torch.bfloat16,)
        return next((dtype for dtype in known if native(device, dtype)), torch.float32)
    dtype = getattr(torch, precision)
    if dtype != torch.float32 and not native(device, dtype):
        log.warning(
            f"precision is {precision!r}, which this {device.type.upper()} is not made for: its matrix products were "
            f'measured to take {slowdown(device, dtype):.1f} times as long as in float32; set precision="auto"'
        )
    return dtype


def training_dtype(device: torch.device, config: "TrainConfig") -> torch.dtype:
    """What matrix products of a training run are in: as `pick_dtype`, but on a CPU float32 where it is to be exact."""
    exact = config.deterministic and device.type == "cpu" and config.precision == "auto"
    return torch.float32 if exact else pick_dtype(device, config.precision)


def make_deterministic(device: torch.device) -> None:
    """Has a GPU refuse what depends on timing."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
        torch.use_deterministic_algorithms(True)


def native(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device multiplies matrices of a half precision in hardware.

    A CPU is asked by measuring, because its flags cannot be trusted: one with amx_bf16 and avx512_bf16 was seen to take
    200 times as long as in float32. Native takes at most half of float32's time: a margin that noise does not cross.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= ((8, 0) if dtype == torch.bfloat16 else (7, 0))
    return slowdown(device, dtype) <= 0.5


def slowdown(device: torch.device, dtype: torch.dtype) -> float:
    """The time of a matrix product in dtype, over its time in float32."""
    wide, half = _seconds(device, dtype)
    return half / wide


@functools.cache
def _seconds(device: torch.device, dtype: torch.dtype, patience: float = 0.5) -> tuple[float, float]:
    """The least time of a matrix product in float32 and in dtype, in turn and warm. Measured once a process.

    It ends early once dtype has taken `patience` seconds, but not by one slow call alone, which may be an accident.
    """
    size = 512 if device.type == "cpu" else 4096
    matrices = [torch.ones(size, size, dtype=d, device=device) for d in (torch.float32, dtype)]
    seconds = [[], []]
    while len(seconds[1]) < 2 or (len(seconds[1]) < 8 and sum(seconds[1]) < patience):
        for matrix, taken in zip(matrices, seconds, strict=True):
            started = time.perf_counter()
            matrix @ matrix
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - started)
    return min(seconds[0]), min(seconds[1])


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of dense matrix products, by the vendor's data sheet; None where that is not known for certain."""
    if device.type != "cuda":
        return None
    columns = (torch.bfloat16, torch.float16, torch.float32)
    found = dict(zip(columns, DATASHEET.get(torch.cuda.get_device_name(device), ()), strict=False)).get(dtype)
    return found and found * 1e12


def attention_backend(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> str:
    """The implementation of scaled_dot_product_attention that training gets: "flash" (arXiv:2205.14135), "cudnn" and
    "memory-efficient" (arXiv:2112.05682) never hold all T × T probabilities, "math" does.

    Found by a small call of the model's head shapes, from what autograd recorded of it.
    """
    T, heads = min(config.context_length, 128), config.n_heads
    shapes = [(1, T, n, config.head_dim) for n in (heads, config.n_kv_heads or heads, config.n_kv_heads or heads)]
    q, k, v = (torch.zeros(s, dtype=dtype, device=device, requires_grad=True).transpose(1, 2) for s in shapes)
    with torch.enable_grad():
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] < heads)
    step = out.grad_fn
    while step is not None:  # behind the last step, where the output was padded and cut
        for mark, name in (("Flash", "flash"), ("Cudnn", "cudnn"), ("Efficient", "memory-efficient")):
            if f"ScaledDotProduct{mark}" in step.name():
                return name
        step = step.next_functions[0][0] if step.next_functions else None
    return "math"


def runs_triton(model: ModelConfig, config: "TrainConfig") -> bool:
    """Whether the blocks' norms and SwiGLU will be Triton kernels rather than PyTorch's operations."""
    if model.kernels != "auto":
        return model.kernels == "triton"
    return torch.cuda.is_available() and triton is not None and not config.compile


def compile_blocks(model: Transformer, device: torch.device) -> bool:
    """Has torch.compile fuse what stands between a block's matrix products. Where it cannot: a warning, and False.

    One block is compiled, and its code serves all of them: 11 s for tiny, where the whole model takes 29.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # no C++ compiler, no Python headers, …: its messages come in many types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        log.warning(f"training goes on uncompiled, and slower; set compile=False, or mend this: {reason}")
        return False
    for block in model.blocks:
        block.compile()
    return True


# -------------------------------------------------------------------------------------------------------------- memory


def keep_freed_memory() -> None:
    """Has the C library keep the memory that a step frees for the next one.

    By default it returns large blocks to the system, and getting them anew costs a step of tiny on a CPU 37,000 page
    faults, a twelfth of its time.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):  # glibc has it
        M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def rows_held(config: "TrainConfig", processes: int) -> int:
    """Rows of a batch that one process has in memory at once."""
    return max(1, min(config.micro_batch_size or config.batch_size, config.batch_size // processes))


def memory_estimate(
    model: Transformer, config: "TrainConfig", dtype: torch.dtype, processes: int = 1, length: float | None = None
) -> dict[str, int]:
    """Bytes that training takes in one process, by kind. dtype: of matrix products. model: on any device, "meta" too.
    length: of a row, in tokens; None: context_length.

    weights, gradients: float32. optimizer: AdamW keeps two numbers a parameter, Muon one for matrices of the blocks.
    activations: what autograd keeps of a micro-batch for the backward pass, counted below. loss: a chunk of logits, and
    the output projection's gradient twice, before and after it is scaled, if it is trained. For full rows; for compiled
    blocks, and for frozen ones, it is an upper bound. Muon's working copies are left out: they come when activations
    are gone. It is of tensors: a process on a CPU was seen to take 400 MiB for Python and its libraries besides, and up
    to half of the estimate for gaps that the C library's allocator cannot use.
    """
    c, half = model.config, dtype.itemsize
    D, KV, V, d_ff = c.d_model, (c.n_kv_heads or c.n_heads) * c.head_dim, c.vocab_size, c.d_ff or 4 * c.d_model
    tokens, kernel = round(rows_held(config, processes) * (length or c.context_length)), runs_triton(c, config)
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    trained = [p for p in model.parameters() if p.requires_grad]
    state = 8 * numbers(trained)
    if config.optimizer == "muon":
        state -= 4 * numbers(p for p in matrices if p.requires_grad)

    # Of a token, in one block. A norm keeps the residual stream and 1/rms in float32, the normalised copy that the next
    # layer reads and, without the kernel, a float32 copy from before the gain.
    norm = 4 * D + 4 + half * D + (0 if kernel else 4 * D)
    attention = half * (2 * D + 2 * KV) + 4 * c.n_heads  # q and output, k and v, each softmax's log-sum-exp
    if attention_backend(c, pick_device(), dtype) == "math":
        attention += 4 * c.n_heads * c.context_length  # the probabilities
    mlp = half * d_ff * (3 if kernel else 4)  # gate, up, their product and, without the kernel, silu(gate)
    block = 2 * norm + attention + mlp
    # Of an adapter: its input with zeros in it, which elements those are, and what is between its two matrices.
    adapters = [p for name, p in model.blocks.named_parameters() if ".a." in name]
    block += sum((half + 1) * p.shape[1] + half * p.shape[0] for p in adapters) // c.n_layers
    blocks = c.n_layers * block
    if config.gradient_checkpointing:  # the stream and the delta that go into each (the first has no delta), and one
        blocks = c.n_layers * (4 + half) * D - half * D + block
    ends = 8 + norm  # the token; the last norm, where the place of the copy is taken by the gradient of the loss
    copies = half * numbers(matrices) if half < 4 else 0  # autocast's, of the weights

    logits = min(tokens, 4096 if torch.cuda.is_available() else 512) * V * half
    if half < 4:  # and the same in float32, and the weights' copy
        logits += logits // half * 4 + half * V * D
    shares = processes if config.parallel == "fsdp" else 1
    learnt = 4 * V * D * model.head.weight.requires_grad
    return {
        "weights": 4 * model.num_parameters() // shares,
        "gradients": 4 * numbers(trained) // shares,
        "optimizer": state // shares,
        "activations": tokens * (blocks + ends) + copies,
        "loss": learnt + max(learnt, logits),
    }


def numbers(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def memory_available(device: torch.device, root: Path = Path("/")) -> int:
    """Bytes that this process could still get: of the GPU, or of the machine and the control groups it runs in."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        meminfo = (root / "proc/meminfo").read_text()
    except FileNotFoundError:  # not Linux: all there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = int(meminfo.split("MemAvailable:")[1].split()[0]) * 1024
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            tree, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):  # version 1
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            tree = root / "sys/fs/cgroup/memory"
        else:
            continue
        group = tree / path.strip("/")
        for directory in (group, *group.parents):  # a limit of any group above holds too
            free = min(free, _left(directory, *names))
            if directory == tree:
                break
    return max(0, free)


def _left(group: Path, limit: str, used: str, cached: str) -> float:
    """What a control group may still take. Cached files that nobody reads do not count: they make room when asked."""
    try:
        total = (group / limit).read_text().strip()
        if total == "max":
            return math.inf
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(total) - int((group / used).read_text()) + int(statistics.get(cached, 0))
    except (FileNotFoundError, NotADirectoryError):  # the root has no limit; a container may not see its own path
        return math.inf


def must_fit(model: Transformer, config: "TrainConfig", processes: int) -> None:
    """UserError if not even weights, gradients and optimizer fit: before the weights are made. model: on "meta"."""
    memory, available = memory_estimate(model, config, torch.float32, processes), memory_available(pick_device())
    needed = sum(memory[kind] for kind in ("weights", "gradients", "optimizer"))
    if needed > available:
        raise UserError(
            f"{model.num_parameters():,} parameters take {_bytes(needed)} for weights, gradients and optimizer, and "
            f"{_bytes(available)} are available; choose a smaller model (d_model, n_layers, vocab_size)"
            + (', or parallel="fsdp" on several GPUs' if config.parallel == "ddp" else "")
        )


def out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory ran out, of a GPU or of the machine; for the latter PyTorch has no type."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    words = ("can't allocate memory", "not enough memory")  # on Linux and macOS; on Windows
    return isinstance(error, RuntimeError) and any(f"DefaultCPUAllocator: {w}" in str(error) for w in words)


def smaller(model: ModelConfig, config: "TrainConfig", processes: int) -> str:
    """After running out of memory: three fields to change, to what and from what, the mildest first."""
    held = rows_held(config, processes)
    rows = max(n for n in range(1, held + 1) if n == 1 or (n <= held // 2 and config.batch_size % n == held % n == 0))
    d_ff, heads = model.d_ff or 4 * model.d_model, model.n_kv_heads or model.n_heads
    changes = [("micro_batch_size", rows, held)]
    if not config.gradient_checkpointing:
        changes += [("gradient_checkpointing", True, False)]
    elif processes > 1:
        changes += [("parallel", "fsdp", config.parallel)]
    changes += [("context_length", max(1, model.context_length // 2), model.context_length)]
    changes += [("n_layers", max(1, model.n_layers // 2), model.n_layers), ("d_ff", max(1, d_ff // 2), d_ff)]
    changes += [("n_kv_heads", 1, heads)]
    first = [f"{name}={new!r} (now {old!r})" for name, new, old in changes if new != old][:3]
    return f"set {first[0]}, then {', then '.join(first[1:])}"


# ---------------------------------------------------------------------------------------------------------------- page


def page(model: Transformer, config: "TrainConfig", dtype: torch.dtype, task: "Task", processes: int = 1) -> list[str]:
    """What is about to happen, before step 1: lines of a label and a value, at most 80 columns wide. Warns if memory
    will not suffice."""
    device, steps, epoch = pick_device(), task.steps, task.epoch
    c, total = model.config, model.num_parameters()
    trained = numbers(p for p in model.parameters() if p.requires_grad)
    held, share = rows_held(config, processes), max(1, config.batch_size // processes)
    row, length = task.row or ("row", c.context_length)
    seen = round(steps * config.batch_size * length)
    memory = memory_estimate(model, config, dtype, processes, length)
    here = 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", processes))  # that share the memory
    needed, available = sum(memory.values()), memory_available(device) // here
    if needed > available:
        log.warning(
            f"a process will need about {_bytes(needed)} of memory, and {_bytes(available)} are available to it"
        )
    if config.warmup_steps >= steps:
        log.warning(
            f"all {steps:,} steps are warm-up, {config.warmup_steps:,} of it: the learning rate stays below its peak"
        )
    name, peak = f"CPU, {_count(torch.get_num_threads(), 'thread')}", peak_flops(device, dtype)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device) + (f", {peak / 1e12:,.0f} TFLOP/s at most" if peak else "")
    kinds = [f"{kind} {_bytes(size)}" for kind, size in memory.items()]
    ways = ["triton kernels" if runs_triton(c, config) else "torch kernels"]
    ways += [f"{attention_backend(c, device, dtype)} attention"]
    ways += ["compiled blocks"] * config.compile + ["gradient checkpointing"] * config.gradient_checkpointing
    betas = f"betas {config.beta1:g} and {config.beta2:g}, weight decay {config.weight_decay:g}"
    momentum = f"momentum {config.momentum:g}, " if config.optimizer == "muon" else ""
    fall = f", falling in the last {config.decay_fraction:.0%}" if config.schedule == "wsd" else ""
    lines = [
        ("parameters", f"{total:,}" + (f", {trained:,} of them trained" if trained < total else "")),
        (
            "steps",
            f"{steps:,} of {_count(config.batch_size, row)} × {length:,.0f} tokens"
            + (f", {_count(held, row)} at a time" if held < share else ""),
        ),
        (
            "tokens",
            f"{seen:,} in {steps / epoch:.2f} epochs; {seen / total:.2f} a parameter"
            + (f", {seen / total / CHINCHILLA:.2g} of Chinchilla's {CHINCHILLA}" if trained == total else ""),
        ),
        ("FLOPs", f"{task.flops * steps / seen:.1e} a token, {task.flops * steps:.1e} in all"),
        ("memory", f"about {_bytes(needed)} a process, of {_bytes(available)} available"),
        ("", ", ".join(kinds[:3])),
        ("", ", ".join(kinds[3:])),
        ("device", name + (f", {processes} processes by {config.parallel}" if processes > 1 else "")),
        ("precision", f"{_name(dtype)}; weights and optimizer in float32"),
        ("runs with", ", ".join(ways)),
        ("optimizer", f"{config.optimizer}, {momentum}{betas}"),
        (
            "schedule",
            f"{config.schedule} from {config.learning_rate:g} to {config.min_lr:g}, "
            f"{_count(config.warmup_steps, 'step')} of warm-up{fall}",
        ),
    ]
    return [f"{label:<12}{value}" for label, value in lines]


def used(config: "TrainConfig", dtype: torch.dtype, processes: int) -> str:
    """What a run ran on, in one line for its manifest. config: with `compile` as it came out."""
    several = f", {processes} processes by {config.parallel}" if processes > 1 else ""
    return f"{name(pick_device())}{several}; {_name(dtype)}, {'compiled' if config.compile else 'not compiled'}"


def name(device: torch.device) -> str:
    """What a device is called."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {_count(torch.get_num_threads(), 'thread')}"


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's name, or its architecture where the system does not give one."""
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.machine() or "CPU"


def _count(n: int, thing: str) -> str:
    return f"{n:,} {thing}" + ("" if n == 1 else "s")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bytes(n: float) -> str:
    """1.5 GiB or 12 MiB."""
    return f"{n / 2**30:.1f} GiB" if n >= 2**30 else f"{n / 2**20:.0f} MiB"
