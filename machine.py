"""The machine: device, precision, memory, and the page before training. `config` is always a trainer.TrainConfig."""

import ctypes
import functools
import itertools
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from cli import UserError, log, progress
from model import ModelConfig, Transformer, triton_error

CHINCHILLA = 20  # tokens per parameter that give the best model for its training FLOPs (arXiv:2203.15556)
# The card's name in CUDA; TFLOP/s in 16-bit floats; TFLOP/s in float32 (TF32 where the card has it). From the vendors'
# data sheets: tensor cores without sparsity, accumulating in float32. Cards called Tesla have no bfloat16. The RTX 3060
# is computed from its cores and clock; the B200 is an eighth of an HGX B200, without sparsity.
DATASHEET = (
    ("NVIDIA B200", 2250.0, 1125.0),
    ("NVIDIA (H200|H100 80GB HBM3)", 989.4, 494.7),
    ("NVIDIA H[12]00 NVL", 835.5, 417.5),
    ("NVIDIA H100 PCIe", 756.0, 378.0),
    ("NVIDIA A100(-SXM4-[48]0GB|-PCIE-40GB| 80GB PCIe)", 312.0, 156.0),
    ("NVIDIA A30", 165.0, 82.0),
    ("NVIDIA A40", 149.7, 74.8),
    ("NVIDIA A10", 125.0, 62.5),
    ("NVIDIA A10G", 70.0, 35.0),
    ("NVIDIA L40S", 362.05, 183.0),
    ("NVIDIA L40", 181.05, 90.5),
    ("NVIDIA L4", 121.0, 60.0),
    ("NVIDIA RTX A6000", 154.8, 77.4),
    ("NVIDIA RTX 6000 Ada Generation", 364.2, 182.1),
    ("NVIDIA GeForce RTX 5090", 209.5, 104.8),
    ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
    ("NVIDIA GeForce RTX 4080", 97.5, 48.7),
    ("NVIDIA GeForce RTX 3090", 71.0, 35.6),
    ("NVIDIA GeForce RTX 3060", 25.5, 12.7),
    ("Tesla V100-SXM2-(16|32)GB", 125.0, 15.7),
    ("Tesla V100-PCIE-(16|32)GB", 112.0, 14.0),
    ("Tesla T4", 65.0, 8.1),
)


def pick_device() -> torch.device:
    """This process's GPU, or a Mac's GPU ("mps"), or the CPU. On a GPU it also tries Triton."""
    if not torch.cuda.is_available():
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")  # nobody has tested "mps" yet
    device = torch.device("cuda", torch.cuda.current_device())
    triton_works(device)
    return device


@functools.cache
def triton_works(device: torch.device) -> bool:
    """True if Triton kernels run on this GPU. If not, warns once; the model then uses plain PyTorch operations."""
    if reason := triton_error(device):
        slower = "the model runs without compiled kernels, which is slower"
        remedy = "if a compiler or Python.h is missing: apt install gcc python3-dev"
        log.warning(f"Triton does not work on this GPU ({reason}); {slower}; {remedy}")
    return not reason


def prepare(device: torch.device, config) -> None:
    """Sets up this process for training."""
    # config.deterministic: a GPU raises an error for operations whose result depends on timing.
    if device.type == "cuda":  # products of float32 matrices in TF32; the stage eval and serve.py do not set this
        torch.set_float32_matmul_precision("high")
    if config.deterministic and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
        torch.use_deterministic_algorithms(True)
    keep_freed_memory()


def training_dtype(device: torch.device, config) -> torch.dtype:
    """The dtype of matrix products. "auto" is the fastest in hardware: bfloat16, or float16 on a GPU, or float32."""
    if config.precision != "auto":
        dtype = getattr(torch, config.precision)
        if dtype != torch.float32 and not native(device, dtype):
            slower = f"takes {slowdown(device, dtype):.1f} times as long as float32 on this {device.type.upper()}"
            log.warning(f'precision {config.precision!r} {slower}, which lacks it in hardware; set precision="auto"')
        return dtype
    if device.type == "cuda":
        halves = [torch.bfloat16, torch.float16]
    else:  # bfloat16 gives other results on another CPU
        halves = [] if config.deterministic else [torch.bfloat16]
    return next((half for half in halves if native(device, half)), torch.float32)


def native(device: torch.device, dtype: torch.dtype) -> bool:
    """True if the hardware itself multiplies matrices of this 16-bit dtype."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= ((8, 0) if dtype == torch.bfloat16 else (7, 0))
    # Measure a CPU, because its flags mislead: one with amx_bf16 and avx512_bf16 took 200 times as long as in float32.
    return slowdown(device, dtype) <= 0.5  # native is at least twice as fast; noise does not cross that margin


@functools.cache
def slowdown(device: torch.device, dtype: torch.dtype) -> float:
    """The time of a matrix product in dtype, divided by its time in float32. Each is the fastest of up to 8 runs."""
    # Stop early after half a second, but never after one run: something may have disturbed it.
    size = 512 if device.type == "cpu" else 4096
    seconds = {torch.float32: [], dtype: []}
    while len(seconds[dtype]) < 2 or (len(seconds[dtype]) < 8 and sum(seconds[dtype]) < 0.5):
        for tried, times in seconds.items():
            matrix = torch.ones(size, size, dtype=tried, device=device)
            started = time.perf_counter()
            matrix @ matrix
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            times.append(time.perf_counter() - started)
    return min(seconds[dtype]) / min(seconds[torch.float32])


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of matrix products from the vendor's data sheet; None for a device that is not in the table."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for pattern, half, single in DATASHEET:
        if re.fullmatch(pattern, card) and not (dtype == torch.bfloat16 and "Tesla" in card):
            return 1e12 * (single if dtype == torch.float32 else half)
    return None


def compile_blocks(model: Transformer, device: torch.device) -> bool:
    """Fuses the operations between matrix products with torch.compile. False, with a warning, if it cannot compile."""
    if device.type == "cuda" and not triton_works(device):
        return False
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # no C++ compiler, no Python headers, …: many types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        log.warning(f"training continues uncompiled, which is slower; set compile=False, or fix this: {reason}")
        return False
    # A block is compiled again when shapes or settings change, and past a limit it runs uncompiled. PyTorch's limit is
    # 8 variants; DPO with the adapter off makes 6 on a CPU.
    torch._dynamo.config.recompile_limit = 32
    for block in model.blocks:  # all blocks use the code of the first: 11 s for tiny; the whole model would take 29 s
        block.compile()
    return True


def keep_freed_memory() -> None:
    """Makes the C library keep freed memory for the next step."""
    # Otherwise each step of tiny on a CPU has 37,000 page faults, which take a twelfth of its time.
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # glibc has it
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def random_state() -> dict[str, Tensor]:
    """The state of torch's global random generators."""
    state = {"rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda_rng"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict) -> None:
    torch.set_rng_state(state["rng"])
    if torch.cuda.is_available() and "cuda_rng" in state:
        torch.cuda.set_rng_state(state["cuda_rng"])


def rows_held(config, processes: int) -> int:
    """Rows of a batch that one process has in memory at once. One GPU starts with all of them: see TrainConfig."""
    rows = config.micro_batch_size or config.batch_size
    if halves_rows(processes):
        rows = config.batch_size
    return max(1, min(rows, config.batch_size // processes))


def halves_rows(processes: int) -> bool:
    """True if training lowers the rows when memory runs out: one process on a GPU."""
    # If one of several processes repeated a step, the others would wait for it.
    return processes == 1 and torch.cuda.is_available()


def fewer(rows: int) -> int:
    """The largest divisor of `rows` up to its half, or 1: all micro-batches have one shape and compile once."""
    return next(number for number in range(rows // 2 or 1, 0, -1) if rows % number == 0)


def in_batches(count: int, size: int, work: Callable[[int, int], int], unit: str, what: str) -> None:
    """Processes `count` items under a progress bar. unit, what: for the bar."""
    # work(first, size) processes some items from `first` on and returns how many. size limits the memory that it takes,
    # in items or tokens. When a GPU runs out of memory, it is halved for good.
    done = 0
    bar = progress(itertools.repeat(None), lambda: (done, count), unit, what)
    while done < count:
        next(bar)
        try:
            done += work(done, size)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size //= 2


def numbers(parameters: Iterable[Tensor]) -> int:
    """How many numbers are in those parameters that are trained."""
    return sum(p.numel() for p in parameters if p.requires_grad)


def memory_available(device: torch.device, root: Path = Path("/")) -> int:
    """Bytes that this process can still allocate: on the GPU, or on the machine within its container's limits."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by PyTorch, for later use
        return torch.cuda.mem_get_info(device)[0] + held
    if not (root / "proc/meminfo").is_file():  # not Linux: the whole memory
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = int((root / "proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    inner = root / "sys/fs/cgroup" / (root / "proc/self/cgroup").read_text().partition("0::/")[2].strip()
    for group in (inner, *inner.parents):  # the limits of the enclosing groups hold too
        if (group / "memory.max").is_file() and (limit := (group / "memory.max").read_text().strip()) != "max":
            files = re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
            free = min(free, int(limit) - int((group / "memory.current").read_text()) + int(files[1]))
    return max(0, free)


def must_fit(model: Transformer, config, processes: int) -> None:
    """UserError if weights, gradients and optimizer do not fit into memory. model: on "meta", without weights."""
    total = model.num_parameters()
    needed = 4 * total + 12 * numbers(model.parameters())  # gradients, and AdamW's two averages
    if config.optimizer == "muon":  # keeps only one average for each matrix of the blocks
        needed -= 4 * numbers(p for p in model.blocks.parameters() if p.dim() == 2)
    if config.parallel == "fsdp":
        needed //= processes
    if needed > (available := memory_available(pick_device())):
        raise UserError(
            f"{total:,} parameters take {_bytes(needed)} for weights, gradients and optimizer, and {_bytes(available)} "
            'are available; choose a smaller model (d_model, n_layers, vocab_size), or parallel="fsdp" on several GPUs'
        )


def peak_memory(device: torch.device) -> str:
    """The most memory that this process has held so far, and the memory it can have."""
    if device.type == "cuda":
        peak, total = torch.cuda.max_memory_allocated(device), torch.cuda.mem_get_info(device)[1]
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        total = peak + memory_available(device)
    return f"{_bytes(peak)} at the peak of the first step, of {_bytes(total)}"


@contextmanager
def fitting(model: ModelConfig, config, processes: int) -> Iterator[None]:
    """Turns an out-of-memory error in the block into a UserError that says what to change, the mildest change first."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # PyTorch has no exception type for the machine's memory
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not known and "DefaultCPUAllocator: can't allocate memory" not in str(error):
            raise
        held, length = rows_held(config, processes), model.context_length
        advice = [] if held == 1 or halves_rows(processes) else [f"micro_batch_size={fewer(held)} (now {held})"]
        advice.append(f"gradient_checkpointing=True (now {config.gradient_checkpointing})")
        advice.append(f"context_length={max(1, length // 2)} (now {length})")
        raise UserError(f"out of memory; set {', then '.join(advice)}") from None


def page(model: Transformer, config, dtype: torch.dtype, task, processes: int, held: int) -> list[str]:
    """The plan of a training run, a line for each label and value. task: trainer.Task. held: rows in memory at once."""
    steps, total, batch = task.steps, model.num_parameters(), config.batch_size
    trained = numbers(model.parameters())
    row, length = task.row or ("row", model.config.context_length)
    tokens = round(steps * batch * length)
    if config.warmup_steps >= steps:
        log.warning(f"warmup_steps is {config.warmup_steps:,} of {steps:,} steps: the learning rate never peaks")
    at_a_time = f", {held:,} at a time" if held * processes < batch else ""
    partly = f", {trained:,} of them trained" if trained < total else ""
    ratio = "" if partly else f", {tokens / total / CHINCHILLA:.2g} of Chinchilla's {CHINCHILLA}"
    rates = f"{config.schedule} from {config.learning_rate:g} to {config.min_lr:g}"
    return [
        f"parameters  {total:,}{partly}",
        f"steps       {steps:,} of {batch:,} {row}s × {length:,.0f} tokens{at_a_time}",
        f"tokens      {tokens:,} in {steps / task.epoch:.2f} epochs; {tokens / total:.2f} per parameter{ratio}",
        f"FLOPs       {task.flops * steps / tokens:.1e} per token, {task.flops * steps:.1e} in all",
        f"device      {devices(config, processes)}",
        f"precision   {str(dtype)[6:]}; weights and optimizer in float32",
        f"optimizer   {config.optimizer}, weight decay {config.weight_decay:g}",
        f"schedule    {rates}, {config.warmup_steps:,} steps of warm-up",
    ]


def used(config, dtype: torch.dtype, processes: int) -> str:
    """The machine of a run, in one line for its manifest. config.compile: True if compiling worked."""
    return f"{devices(config, processes)}; {str(dtype)[6:]}, {'compiled' if config.compile else 'not compiled'}"


def devices(config, processes: int) -> str:
    return name(pick_device()) + (f", {processes} processes by {config.parallel}" if processes > 1 else "")


def name(device: torch.device) -> str:
    """The name of a device. A CPU's name includes the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo").read_text(errors="replace") if sys.platform == "linux" else ""
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    threads = torch.get_num_threads()
    return f"{model[1] if model else platform.machine()}, {threads} thread" + ("s" if threads > 1 else "")


def _bytes(n: float) -> str:
    return f"{n / 2**30:.1f} GiB" if n >= 2**30 else f"{n / 2**20:.0f} MiB"
