"""A rehearsal for the GPU on a machine without one: compiles every Triton kernel of model.py, or traces the model.

    python -m benchmarks.gpu_rehearsal               a table for each architecture  ->  results/gpu_rehearsal.json
    python -m benchmarks.gpu_rehearsal --markdown    the section of docs/measured.md, from that file
    python -m benchmarks.gpu_rehearsal --quick       one shape for two architectures, as JSON; writes nothing
    python -m benchmarks.gpu_rehearsal --trace       needs a PyTorch built for CUDA: see benchmarks/gpu_trace.py

The project's own functions launch the kernels, on tensors without memory, in the shapes of micro, tiny, small and base;
each launch is compiled but not run. So constants, warps and what Triton knows of the arguments are those of a real run.
Columns of the table, for 8 rows of 1,024 tokens:

    numbers     dtype read → dtype written, if they differ: under autocast RMSNorm reads float32 and writes halves
    registers   of a thread. Above 64, fewer than half of the threads that a processor could hold fit in it
    spills      bytes of registers that a thread has to keep in memory: should be 0
    shared      bytes of shared memory of a program
    loads       NVIDIA: bytes of the narrowest load instruction of activations or logits; 16 is the most on many cards.
                AMD: bytes of the widest load instruction of any tensor
    stores      the same for stores
    programs    how many are launched, each of this many warps
    occupancy   the share of a processor's warps that can be resident: registers, warps and shared memory limit it
    µs          the time that the card needs to move the kernel's bytes at the bandwidth of its data sheet: each input
                read once, each output written once; less only if inputs are still in the cache
"""

import argparse
import contextlib
import functools
import io
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor

import cli
import configs
import model as lumi
from benchmarks import common

ROWS = 8 * 1_024
NAMES = ("micro", "tiny", "small", "base")  # the configs whose shapes are compiled
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU that stands for its architecture. Sources: the vendors' data sheets and the CUDA programming guide."""

    name: str
    backend: str = "cuda"
    arch: int | str
    gb_per_second: int
    processors: int  # streaming multiprocessors, or compute units
    # What a processor holds:
    warps: int = 64
    programs: int = 32
    registers: int = 65_536  # of 32 bits
    shared: int  # KiB
    reserved: int = 1_024  # bytes of shared memory for each program
    warp_size: int = 32

    def occupancy(self, registers: int, warps: int, shared: int) -> float:
        """The share of a processor's warps that can be resident."""
        # Registers are handed out 8 to a thread at a time; each quarter of a processor has a quarter of them.
        of_warp = -(-registers // 8) * 8 * self.warp_size
        warps_that_fit = self.registers // 4 // of_warp * 4
        programs = min(self.programs, min(self.warps, warps_that_fit) // warps)
        if shared:
            programs = min(programs, self.shared * 1_024 // (shared + self.reserved))
        return programs * warps / self.warps


CARDS = {
    "sm_75": Card(
        name="Tesla T4", arch=75, gb_per_second=320, processors=40, warps=32, programs=16, shared=64, reserved=0
    ),
    "sm_80": Card(name="A100 80GB SXM", arch=80, gb_per_second=2_039, processors=108, shared=164),
    "sm_90": Card(name="H100 80GB SXM", arch=90, gb_per_second=3_350, processors=132, shared=228),
    "sm_100": Card(name="B200", arch=100, gb_per_second=8_000, processors=148, shared=228),
    "gfx942": Card(
        name="MI300X", backend="hip", arch="gfx942", gb_per_second=5_300, processors=304, warps=32,
        registers=131_072, shared=64, reserved=0, warp_size=64,
    ),
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- launching


@dataclass(frozen=True)
class Launch:
    """A kernel as a function of model.py launches it."""

    kernel: str
    compiled: object  # triton's CompiledKernel
    programs: int
    tensors: dict[str, Tensor]


@contextlib.contextmanager
def compile_only(card: Card) -> Iterator[list[Launch]]:
    """In the block, launches of Triton kernels are compiled for the card and listed, but not run."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    driver = SimpleNamespace(  # Triton keeps what it compiles by the name of the device
        get_current_device=lambda: card.arch,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget(card.backend, card.arch, card.warp_size),
    )
    triton.runtime.driver.set_active(driver)
    launches, run = [], JITFunction.run

    def compile_and_list(kernel, *args, grid, warmup, **options):
        compiled = run(kernel, *args, grid=grid, warmup=True, **options)
        named = zip(kernel.arg_names, args, strict=False)  # constants may follow by name
        tensors = {name: argument for name, argument in named if isinstance(argument, Tensor)}
        launches.append(Launch(kernel.__name__.removesuffix("_kernel"), compiled, grid[0], tensors))
        return compiled

    with mock.patch.object(JITFunction, "run", compile_and_list):
        yield launches


def rms_norm(rows: int, width: int, read: torch.dtype, written: torch.dtype) -> None:
    x = torch.empty(rows, width, dtype=read, device="meta", requires_grad=True)
    weight = torch.empty(width, dtype=read, device="meta", requires_grad=True)
    y = lumi.TritonRMSNorm.apply(x, weight, 1e-5, written)
    y.backward(torch.empty_like(y))


def swiglu(rows: int, width: int, dtype: torch.dtype) -> None:
    gate, up = (torch.empty(rows, width, dtype=dtype, device="meta", requires_grad=True) for _ in "gu")
    y = lumi.swiglu(gate, up, "triton")
    y.backward(torch.empty_like(y))


def cross_entropy(rows: int, width: int, dtype: torch.dtype) -> None:
    logits = torch.empty(rows, width, dtype=dtype, device="meta")
    lumi.cross_entropy(logits, torch.empty(rows, dtype=torch.int64, device="meta"), "triton")


def launches(quick: bool) -> list[tuple]:
    """(function, width, dtypes) of every call that launches kernels."""
    shapes = [configs.load(f"configs/{name}.py").model for name in (("tiny",) if quick else NAMES)]
    dtypes = [(BF16,)] if quick else [(F32,), (BF16,), (F16,)]
    autocast = [] if quick else [(F32, BF16), (F32, F16)]
    calls = []
    for width in [*dict.fromkeys(shape.d_model for shape in shapes), *([] if quick else [1_024])]:
        calls += [(rms_norm, width, (pair[0], pair[-1])) for pair in dtypes + autocast]
    for width in dict.fromkeys(shape.d_ff or 4 * shape.d_model for shape in shapes):
        calls += [(swiglu, width, dtype) for dtype in dtypes]
    for width in dict.fromkeys(shape.vocab_size for shape in shapes):
        calls += [(cross_entropy, width, dtype) for dtype in dtypes]
    return calls


def compilations(card: Card) -> dict[str, int]:
    """How often each kernel is compiled for batches of 1, 3, 16 and ROWS tokens: once is best."""
    seen: dict[str, set[int]] = {}
    with compile_only(card) as listed:
        for rows in (1, 3, 16, ROWS):
            for function, width, dtypes in launches(quick=True):
                function(rows, width, *dtypes)
    for launch in listed:
        seen.setdefault(launch.kernel, set()).add(id(launch.compiled))
    return {kernel: len(ids) for kernel, ids in seen.items()}


# ----------------------------------------------------------------------------------------------------------- measuring


@functools.cache  # launches of other shapes share compiled kernels
def resources(compiled) -> tuple[int, int]:
    """Registers and bytes of spilled registers of a thread, from the machine code."""
    import triton

    if assembly := compiled.asm.get("amdgcn"):
        count = lambda name: int(re.search(rf"\.{name}:\s*(\d+)", assembly)[1])  # noqa: E731
        return count("vgpr_count"), 4 * count("vgpr_spill_count")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage).groups())
    return registers, stack + local


@functools.cache
def accesses(compiled) -> dict[tuple[str, str], int]:
    """{("ld" or "st", tensor): bytes of its narrowest instruction}, from NVIDIA's assembly, PTX."""
    # An address is computed in 64-bit registers from a pointer, a parameter of the kernel. Follow it back.
    names = [name for name, kind in compiled.src.signature.items() if kind != "constexpr"]
    sources: dict[str, set[str]] = {}  # of each register: registers and parameters that it is computed from
    narrowest: dict[tuple[str, str], int] = {}
    found = []
    for line in compiled.asm["ptx"].splitlines():
        if access := re.search(r"\b(ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\b[^\[]*\[\s*(%rd\d+)", line):
            way, vector, bits, address = access.groups()
            found.append((way, int(vector or 1) * int(bits) // 8, address))
        elif (registers := re.findall(r"%rd\d+", line)) and ".global" not in line and ".shared" not in line:
            parameters = re.findall(r"_param_(\d+)", line)
            sources.setdefault(registers[0], set()).update(registers[1:], parameters)
    for way, width, address in found:
        waiting, reached = [address], set()
        while waiting:
            if (register := waiting.pop()) not in reached:
                reached.add(register)
                waiting += sources.get(register, ())
        (tensor,) = {
            names[int(name)] for name in reached if name.isdecimal() and _is_pointer(compiled, names[int(name)])
        }
        narrowest[way, tensor] = min(width, narrowest.get((way, tensor), width))
    return narrowest


def _is_pointer(compiled, name: str) -> bool:
    return compiled.src.signature[name].startswith("*")


def amd_width(assembly: str, way: str) -> int:
    """Bytes of the widest load or store: AMD's assembly does not tell the tensor."""
    words = {"ubyte": 1, "byte": 1, "ushort": 2, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
    return max(words.get(word, 0) for word in re.findall(rf"(?:global|buffer)_{way}_(\w+)", assembly))


def measure(launch: Launch, card: Card, moved: int | None) -> dict:
    """The columns of the table. moved: the bytes of the kernel; None: see which tensors it reads and writes."""
    compiled, metadata = launch.compiled, launch.compiled.metadata
    registers, spills = resources(compiled)
    if card.backend == "cuda":
        narrowest = accesses(compiled)
        moved = sum(launch.tensors[tensor].nbytes for _, tensor in narrowest)
        # Gains, 1/rms and losses are left out: they are few, and some have one number for each row.
        largest = max(tensor.numel() for tensor in launch.tensors.values())
        wide = {name for name, tensor in launch.tensors.items() if tensor.numel() == largest}
        widths = {
            way: min(n for (w, name), n in narrowest.items() if w == way and name in wide) for way in ("ld", "st")
        }
        loads, stores = widths["ld"], widths["st"]
    else:
        loads, stores = (amd_width(compiled.asm["amdgcn"], way) for way in ("load", "store"))
    return {
        "registers": registers,
        "spills": spills,
        "shared": metadata.shared,
        "loads": loads,
        "stores": stores,
        "programs": launch.programs,
        "warps": metadata.num_warps,
        "occupancy": round(card.occupancy(registers, metadata.num_warps, metadata.shared), 3),
        "bytes": moved,
        "microseconds": round(moved / card.gb_per_second / 1e3, 1),
    }


def rehearse(card: Card, quick: bool, moved: dict) -> dict:
    """{kernel: {numbers: {width: columns}}} of every launch. moved: bytes by launch, filled in for the next card."""
    table: dict = {}
    for function, width, dtypes in launches(quick):
        numbers = " → ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in dtypes))
        with compile_only(card) as listed:
            function(ROWS, width, *dtypes)
        for launch in listed:
            key = (launch.kernel, numbers, width)
            columns = measure(launch, card, moved.get(key))
            moved[key] = columns["bytes"]
            table.setdefault(launch.kernel, {}).setdefault(numbers, {})[str(width)] = columns
    return table


# ------------------------------------------------------------------------------------------------------------ printing


def rows_of(table: dict) -> Iterator[tuple[str, str, str, dict]]:
    """(kernel, numbers, width, columns) of each launch."""
    for kernel, by_numbers in table.items():
        for numbers, by_width in by_numbers.items():
            for width, columns in by_width.items():
                yield kernel, numbers, width, columns


def show(arch: str, table: dict) -> None:
    """Prints the table of an architecture, and a line that sums it up."""
    card = CARDS[arch]
    head = (
        "kernel",
        "numbers",
        "width",
        "registers",
        "spills",
        "shared",
        "loads",
        "stores",
        "programs",
        "occupancy",
        "µs",
    )
    lines = [head]
    for kernel, numbers, width, c in rows_of(table):
        programs = f"{c['programs']:,} × {c['warps']}"
        shown = (c["registers"], c["spills"], c["shared"], c["loads"], c["stores"], programs)
        lines.append((kernel, numbers, width, *map(str, shown), f"{c['occupancy']:.0%}", f"{c['microseconds']:.1f}"))
    print(f"\n{arch}, times of {card.name} ({card.gb_per_second:,} GB/s, {card.processors} processors)")
    print(cli.table(lines, right=range(2, 11)))
    spilling, narrow, most = summary(table)
    print(f"spills: {', '.join(spilling) or 'none'}; narrower than 16 bytes: {', '.join(narrow) or 'none'}")
    print("most registers: " + ", ".join(f"{kernel} {count}" for kernel, count in most.items()), flush=True)


def summary(table: dict) -> tuple[list[str], list[str], dict[str, int]]:
    """The launches that spill, those with narrow loads or stores, and the most registers of each kernel."""
    spilling, narrow, most = [], [], {}
    for kernel, numbers, width, columns in rows_of(table):
        name = f"{kernel} {numbers} {width}"
        if columns["spills"]:
            spilling.append(name)
        if min(columns["loads"], columns["stores"]) < 16:
            narrow.append(name)
        most[kernel] = max(most.get(kernel, 0), columns["registers"])
    return spilling, narrow, most


def markdown(found: dict) -> str:
    """The section of docs/measured.md: bfloat16, on A100 and H100."""
    first, second = found["kernels"]["sm_80"], found["kernels"]["sm_90"]
    lines = [("kernel", "width", "registers", "occupancy", "loads, stores", "µs")]
    for kernel, numbers, width, a in rows_of(first):
        if numbers == "bfloat16":
            b = second[kernel][numbers][width]
            shares = f"{a['occupancy']:.0%}, {b['occupancy']:.0%}"
            times = f"{a['microseconds']:.1f}, {b['microseconds']:.1f}"
            bytes_wide = f"{a['loads']}, {a['stores']}"
            lines.append(
                (f"`{kernel}`", f"{int(width):,}", f"{a['registers']}, {b['registers']}", shares, bytes_wide, times)
            )
    spilling, narrow, backward, count = 0, {}, 0, 0
    for arch, table in found["kernels"].items():
        spill, slow, most = summary(table)
        spilling, narrow[arch], backward = spilling + len(spill), len(slow), max(backward, most["rms_norm_backward"])
        count += len(list(rows_of(table)))
    where = "".join(f" ({number} on {arch})" for arch, number in narrow.items() if number)
    again = "".join(f", except {kernel}" for kernel, times in found["compiled_again"].items() if times)
    return f"""## GPU kernels, compiled without a GPU

`{found["command"]}`, commit {found["commit"]}, Triton {found["versions"]["triton"]}. All numbers:
[`gpu_rehearsal.json`](../benchmarks/results/gpu_rehearsal.json). Nothing ran on a GPU: the kernels were compiled as the
model launches them, for {", ".join(found["kernels"])}, in the shapes of micro to base, in float32,
bfloat16 and float16. {spilling} of the {count} launches spill registers. {sum(narrow.values())} of them load or store
activations in fewer than 16 bytes at a time{where}; for AMD the widest instruction of the kernel counts. RMSNorm
backward takes at most
{backward} registers a thread. Batches of 1, 3, 16 and {found["rows"]:,} tokens use the same compiled kernels{again}.

The table shows bfloat16. Pairs are A100 and H100 (sm_80, sm_90): registers of a thread; occupancy, the share of a
processor's warps that can be resident; bytes of the narrowest load and store of activations; and the microseconds that
the kernel's bytes take for {found["rows"]:,} tokens at the bandwidth of the data sheets, 2,039 and 3,350 GB/s. A kernel
is only faster if it finds its inputs in the cache.

{cli.table(lines, right=range(1, 6), markdown=True)}
"""


def main(arguments: argparse.Namespace) -> None:
    if arguments.markdown:
        print(markdown(json.loads((common.RESULTS / "gpu_rehearsal.json").read_text())), end="")
        return
    if arguments.trace:
        from benchmarks import gpu_trace

        gpu_trace.main()
        return
    if lumi.triton is None:
        raise cli.UserError("benchmarks.gpu_rehearsal needs Triton (Linux only); install it with: pip install triton")
    if lumi.triton.knobs.runtime.interpret:
        raise cli.UserError("TRITON_INTERPRET is set: kernels would be interpreted, not compiled; unset it")
    tables, moved = {}, {}
    for arch in ("sm_80", "sm_90") if arguments.quick else CARDS:
        if CARDS[arch].backend == "hip" and "amd" not in lumi.triton.backends.backends:
            print(f"\n{arch}: this Triton has no backend for AMD")
            continue
        tables[arch] = rehearse(CARDS[arch], arguments.quick, moved)
        if not arguments.quick:
            show(arch, tables[arch])
    again = {kernel: count - 1 for kernel, count in compilations(CARDS["sm_90"]).items()}
    found = {"rows": ROWS, "compiled_again": again, "kernels": tables}
    with contextlib.nullcontext() if arguments.quick else contextlib.redirect_stdout(io.StringIO()):  # shown already
        common.write("gpu_rehearsal", "python -m benchmarks.gpu_rehearsal", found, arguments.quick)


if __name__ == "__main__":
    parser = cli.parser(__doc__, config=False)
    parser.add_argument("--markdown", action="store_true", help="print the section of docs/measured.md")
    parser.add_argument("--quick", action="store_true", help="one shape for two architectures; writes nothing")
    parser.add_argument("--trace", action="store_true", help="trace the model on fake CUDA tensors")
    cli.run(main, parser.parse_args())
