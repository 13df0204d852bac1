"""The machine: precision, speed, memory, and the page before training."""

import dataclasses
import itertools
import platform
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import machine
import stage
from cli import UserError
from model import ModelConfig, Transformer
from tests.conftest import ROOT, Place
from trainer import Task, TrainConfig

CPU = torch.device("cpu")
SHAPE = ModelConfig(vocab_size=96, context_length=32, n_layers=3, d_model=64, n_heads=4, kernels="torch")
GROUPED = dataclasses.replace(SHAPE, context_length=48, n_layers=2, n_kv_heads=1, d_ff=80, tie_embeddings=True)
CONFIG = TrainConfig(steps=10, batch_size=4, learning_rate=1e-2, compile=False)


def task(steps: int, epoch: float) -> Task:
    """Of pretraining, as far as the page reads it."""
    flops = CONFIG.batch_size * SHAPE.context_length * SHAPE.flops_per_token(SHAPE.context_length)
    return Task(None, None, None, None, steps=steps, epoch=epoch, flops=flops)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    """What is warned of."""
    found = []
    monkeypatch.setattr(machine.log, "warning", found.append)
    return found


def meta(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


# ----------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize(("half", "dtype"), [(0.02, torch.float32), (0.0051, torch.float32), (0.005, torch.bfloat16)])
def test_a_cpu_gets_bfloat16_only_where_it_is_measured_to_be_fast(no_gpu, warnings, monkeypatch, half, dtype):
    monkeypatch.setattr(machine, "_seconds", lambda where, dtype: (0.01, half))
    assert machine.pick_device() == CPU
    assert machine.pick_dtype(CPU) == dtype
    assert warnings == []


def test_a_forced_precision_that_is_slow_is_warned_of(no_gpu, warnings, monkeypatch):
    monkeypatch.setattr(machine, "_seconds", lambda where, dtype: (0.01, 2.04))
    assert machine.pick_dtype(CPU, "bfloat16") == torch.bfloat16
    [message] = warnings
    assert "'bfloat16'" in message
    assert "204.0 times" in message
    assert message.endswith('set precision="auto"')
    assert machine.pick_dtype(CPU, "float16") == torch.float16
    assert len(warnings) == 2
    assert machine.pick_dtype(CPU, "float32") == torch.float32
    assert len(warnings) == 2


@pytest.mark.parametrize(
    ("capability", "dtype"), [((9, 0), torch.bfloat16), ((7, 5), torch.float16), ((6, 1), torch.float32)]
)
def test_a_gpu_gets_what_its_generation_has(warnings, monkeypatch, capability, dtype):
    matmul = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda where: capability)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", matmul.append)
    assert machine.pick_device() == torch.device("cuda", 3)
    assert machine.pick_dtype(torch.device("cuda", 3)) == dtype
    assert matmul == ["high"]
    assert warnings == []


@pytest.mark.parametrize(("patience", "rounds"), [(0.5, 2), (100, 8)])
def test_measuring_is_cut_short_where_it_is_slow(monkeypatch, patience, rounds):
    clock = itertools.count()  # every product takes one second
    monkeypatch.setattr(machine.time, "perf_counter", clock.__next__)
    assert machine._seconds.__wrapped__(CPU, torch.bfloat16, patience) == (1, 1)
    assert next(clock) == rounds * 4


def test_peaks_are_known_by_exact_name(monkeypatch):
    gpu = torch.device("cuda", 0)
    names = {"NVIDIA H100 80GB HBM3": (989.4e12, 494.7e12), "Tesla T4": (None, 8.1e12), "NVIDIA H100": (None, None)}
    for name, expected in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda where, name=name: name)
        assert (machine.peak_flops(gpu, torch.bfloat16), machine.peak_flops(gpu, torch.float32)) == expected
    assert machine.peak_flops(CPU, torch.float32) is None


@pytest.mark.parametrize("config", [SHAPE, GROUPED])
def test_flops_are_those_that_pytorch_counts(config):
    torch.manual_seed(0)
    model, T = Transformer(config), 16
    tokens = torch.randint(config.vocab_size, (2, T))
    # The counter knows matrix products, but neither flash attention on a CPU nor our loss.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    assert config.flops_per_token(T) * tokens.numel() == counter.get_total_flops()


# -------------------------------------------------------------------------------------------------------------- memory


def needed(config: TrainConfig, processes: int, monkeypatch, model: Transformer) -> int:
    """Bytes with which `must_fit` is content, and below which it refuses: found from its refusal."""
    monkeypatch.setattr(machine, "_bytes", str)
    monkeypatch.setattr(machine, "memory_available", lambda where: 0)
    with pytest.raises(UserError) as refusal:
        machine.must_fit(model, config, processes)
    found = int(re.search(r"parameters take (\d+) for", str(refusal.value))[1])
    monkeypatch.setattr(machine, "memory_available", lambda where: found)
    machine.must_fit(model, config, processes)
    return found


def test_memory_of_parameters_by_hand(no_gpu, monkeypatch):
    """Weights, gradients, and two averages of AdamW, or one of Muon for the matrices of the blocks; all in float32."""
    model = meta(SHAPE)
    n, hidden = model.num_parameters(), 3 * 4 * 64 * (64 + 3 * 64)
    assert needed(CONFIG, 1, monkeypatch, model) == needed(CONFIG, 2, monkeypatch, model) == 16 * n
    shared = dataclasses.replace(CONFIG, optimizer="muon", parallel="fsdp")
    assert needed(shared, 2, monkeypatch, model) == (16 * n - 4 * hidden) // 2
    model.embed.requires_grad_(False)
    assert needed(CONFIG, 1, monkeypatch, model) == 4 * n + 12 * (n - 96 * 64)


def test_the_peak_of_memory_is_measured(monkeypatch):
    held = torch.ones(2**24)  # 64 MiB
    monkeypatch.setattr(machine, "memory_available", lambda where: 10 * 2**30)
    peak, total = re.match(r"(.*) at the peak of the first step, of (.*)", machine.peak_memory(CPU)).groups()
    mebibytes = float(peak.split()[0]) * (1024 if peak.endswith("GiB") else 1)
    assert held.nbytes / 2**20 < mebibytes < 16_384
    assert float(total.removesuffix(" GiB")) == pytest.approx(10 + mebibytes / 1024, abs=0.1)


@pytest.mark.parametrize("version", [1, 2])
def test_memory_available_is_the_least_that_machine_and_groups_leave(tmp_path, version):
    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    write("proc/meminfo", "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable:   5000 kB\n")
    write("proc/self/cgroup", "0::/a/b\n" if version == 2 else "9:name=systemd:/\n4:cpu,memory:/a/b\n0::/a/b\n")
    assert machine.memory_available(CPU, tmp_path) == 5_000 * 1024
    tree = "sys/fs/cgroup" if version == 2 else "sys/fs/cgroup/memory"
    limit, used, cached = [
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ("memory.max", "memory.current", "inactive_file"),
    ][version - 1]
    for group, numbers in {"a": (4_000_000, 1_500_000, 300_000), "a/b": (3_900_000, 1_000, 0)}.items():
        for name, number in zip((limit, used), numbers, strict=False):
            write(f"{tree}/{group}/{name}", f"{number}\n")
        write(f"{tree}/{group}/memory.stat", f"anon 7\n{cached} {numbers[2]}\n")
    assert machine.memory_available(CPU, tmp_path) == 4_000_000 - 1_500_000 + 300_000
    write(f"{tree}/a/{limit}", "max\n" if version == 2 else "9223372036854771712\n")
    assert machine.memory_available(CPU, tmp_path) == 3_899_000
    write(f"{tree}/a/b/{used}", "3900001\n")
    assert machine.memory_available(CPU, tmp_path) == 0


def test_memory_available_here():
    assert 0 < machine.memory_available(CPU) < 2**50


def test_out_of_memory_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60)
    assert machine.out_of_memory(error.value)
    assert machine.out_of_memory(MemoryError())
    assert machine.out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    windows = (
        "[enforce fail at alloc_cpu.cpp:80] . DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."
    )
    assert machine.out_of_memory(RuntimeError(windows))
    assert not machine.out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not machine.out_of_memory(ValueError("DefaultCPUAllocator: can't allocate memory"))


def test_out_of_memory_under_a_limit():
    code = """
import resource, torch, machine
resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))
try:
    torch.zeros(2**32)
except RuntimeError as error:
    print(machine.out_of_memory(error))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize(
    ("changes", "processes", "fields"),
    [
        (
            {},
            1,
            ["micro_batch_size=2 (now 4)", "gradient_checkpointing=True (now False)", "context_length=16 (now 32)"],
        ),
        ({"batch_size": 12, "micro_batch_size": 6}, 4, ["micro_batch_size=1 (now 3)", "gradient", "context_length=16"]),
        ({"gradient_checkpointing": True}, 2, ["micro_batch_size=1", "parallel='fsdp' (now 'ddp')", "context_length"]),
        ({"gradient_checkpointing": True}, 1, ["micro_batch_size=2", "context_length", "n_layers=1 (now 3)"]),
        ({"gradient_checkpointing": True, "batch_size": 1}, 1, ["context_length=16", "n_layers", "d_ff=128 (now 256)"]),
    ],
)
def test_advice_is_three_changes_that_can_be_made(changes, processes, fields):
    config = dataclasses.replace(CONFIG, **changes)
    advice = machine.smaller(SHAPE, config, processes)
    parts = advice.removeprefix("set ").split(", then ")
    assert len(parts) == 3
    for part, field in zip(parts, fields, strict=True):
        assert part.startswith(field)
        name, value = part.split(" (now ")[0].split("=")
        where = config if hasattr(config, name) else SHAPE
        assert getattr(where, name) != eval(value)
        dataclasses.replace(where, **{name: eval(value)})


# ---------------------------------------------------------------------------------------------------------------- page


def test_the_page(no_gpu, warnings):
    config = dataclasses.replace(CONFIG, micro_batch_size=2, gradient_checkpointing=True, warmup_steps=1)
    model = Transformer(SHAPE)
    lines = machine.page(model, config, torch.float32, task(1_000, 400), 1)
    text, n = "\n".join(lines), model.num_parameters()
    each, flops = 128_000 / n, SHAPE.flops_per_token(32)
    assert max(map(len, lines)) <= 80
    for expected in (
        f"parameters  {n:,}\n",
        "steps       1,000 of 4 rows × 32 tokens, 2 rows at a time\n",
        f"tokens      128,000 in 2.50 epochs; {each:.2f} per parameter, {each / 20:.2g} of Chinchilla's 20\n",
        f"FLOPs       {flops:.1e} per token, {128_000 * flops:.1e} in all\n",
        "precision   float32; weights and optimizer in float32\n",
        "1 step of warm-up",
    ):
        assert expected in text
    assert warnings == []


def test_the_page_of_a_stage_that_trains_a_part(no_gpu):
    model = Transformer(SHAPE)
    model.embed.requires_grad_(False)
    lines = machine.page(model, CONFIG, torch.float32, task(1, 1), 1)
    assert lines[0].endswith(f" {model.num_parameters():,}, {model.num_parameters() - 96 * 64:,} of them trained")


def test_the_page_names_several_processes_and_warns_of_a_warm_up_without_end(no_gpu, warnings):
    lines = machine.page(meta(SHAPE), dataclasses.replace(CONFIG, warmup_steps=5), torch.float32, task(5, 1), 2)
    assert "2 processes by ddp" in "\n".join(lines)
    assert warnings == ["warmup_steps is 5 of 5 steps: the learning rate never peaks"]


def test_the_manifest_says_what_a_run_ran_on(made: Place, tmp_path):
    for name in ("pretrain", "pretrain/final", "pretrain/best"):
        counts = stage.read_manifest(made.runs / "mini" / name)["counts"]
        assert machine.processor() in counts["machine"] or torch.cuda.is_available()
        assert counts["machine"].endswith("; float32, not compiled")
        assert counts["command"] == f"python train.py {made.config}"
    several = dataclasses.replace(CONFIG, compile=True)
    assert machine.used(several, torch.bfloat16, 8).endswith(", 8 processes by ddp; bfloat16, compiled")
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: One: of a kind\n\nmodel name\t: Another\n")
    assert machine.processor(tmp_path / "cpuinfo") == "One: of a kind"
    for silent in (tmp_path / "nowhere", tmp_path):
        assert machine.processor(silent) == platform.machine()
