"""The machine: precision, speed, memory, and the page before training."""

import dataclasses
import functools
import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import machine
import model as lumi
import stage
from cli import UserError
from model import ModelConfig, Transformer
from tests.conftest import Place
from trainer import Task, TrainConfig

CPU = torch.device("cpu")
SHAPE = ModelConfig(vocab_size=96, context_length=32, n_layers=3, d_model=64, n_heads=4, kernels="torch")
GROUPED = dataclasses.replace(SHAPE, context_length=48, n_layers=2, n_kv_heads=1, d_ff=80, tie_embeddings=True)
CONFIG = TrainConfig(steps=10, batch_size=4, learning_rate=1e-2, compile=False)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def meta(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


# ----------------------------------------------------------------------------------------------------------- precision


def dtype(device: torch.device = CPU, **changes) -> torch.dtype:
    return machine.training_dtype(device, dataclasses.replace(CONFIG, **changes))


@pytest.mark.parametrize(("slowdown", "expected"), [(2, torch.float32), (0.51, torch.float32), (0.5, torch.bfloat16)])
def test_a_cpu_gets_bfloat16_only_if_it_is_measured_to_be_fast(no_gpu, monkeypatch, slowdown, expected):
    monkeypatch.setattr(machine, "slowdown", lambda device, dtype: slowdown)
    assert machine.pick_device() == CPU
    assert dtype() == expected
    assert dtype(deterministic=True) == torch.float32


def test_a_slow_precision_that_is_asked_for_gives_a_warning(no_gpu, caplog, monkeypatch):
    monkeypatch.setattr(machine, "slowdown", lambda device, dtype: 204.0)
    assert dtype(precision="float32") == torch.float32
    assert not caplog.text
    assert dtype(precision="bfloat16") == torch.bfloat16
    assert re.search("'bfloat16' takes 204.0 times as long .* set precision=\"auto\"", caplog.text)


@pytest.mark.parametrize(
    ("capability", "expected"), [((9, 0), torch.bfloat16), ((7, 5), torch.float16), ((6, 1), torch.float32)]
)
def test_a_gpu_gets_the_precision_of_its_generation(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert dtype(torch.device("cuda", 3), deterministic=True) == expected


@pytest.fixture
def gpu(monkeypatch) -> torch.device:
    """This process believes that it has a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    machine.triton_works.cache_clear()
    yield torch.device("cuda", 0)
    torch.set_float32_matmul_precision("highest")


def test_only_training_rounds_float32_to_tf32(gpu):
    torch.set_float32_matmul_precision("highest")
    assert machine.pick_device() == gpu
    assert torch.get_float32_matmul_precision() == "highest"  # evaluation and serving only pick a device
    machine.prepare(CPU, CONFIG)
    assert torch.get_float32_matmul_precision() == "highest"
    machine.prepare(gpu, CONFIG)
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.skipif(torch.cuda.is_available(), reason="here Triton works")
def test_where_triton_does_not_work_plain_operations_do_and_one_warning_says_why(gpu, caplog):
    """Triton's first use fails here as it does without a C compiler."""
    machine.pick_device()
    assert machine.pick_device() == gpu
    assert not machine.compile_blocks(meta(SHAPE), gpu)
    [warning] = caplog.messages
    assert re.search("Triton does not work on this GPU.*not compiled with CUDA.*apt install gcc python3-dev", warning)
    with FakeTensorMode():
        assert not lumi.use_triton("auto", torch.empty(1, device=gpu))
        assert lumi.use_triton("triton", torch.empty(1, device=gpu))  # whoever asks for it gets the error


def test_why_triton_does_not_work(monkeypatch):
    class Missing:
        def __getitem__(self, grid):
            raise RuntimeError("Failed to find C compiler.\nSet CC.")

    assert lumi.triton_error.__wrapped__(CPU if not torch.cuda.is_available() else torch.device("cuda")) == ""
    monkeypatch.setattr(lumi, "swiglu_forward_kernel", Missing())
    assert lumi.triton_error.__wrapped__(CPU) == "Failed to find C compiler."


@pytest.mark.filterwarnings("ignore")  # from torch's compiler
def test_blocks_stay_compiled_for_many_kinds_of_calls(monkeypatch):
    """PyTorch's limit is 8."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model = Transformer(dataclasses.replace(SHAPE, n_layers=1))
    with torch._dynamo.config.patch(recompile_limit=8, automatic_dynamic_shapes=False):
        assert machine.compile_blocks(model, CPU)
        counted = CompileCounter()
        model.blocks[0].compile(backend=counted)
        for length in range(2, 12):
            model(torch.zeros(1, length, dtype=torch.int64))
    assert counted.frame_count == 10


@pytest.mark.parametrize(("seconds", "rounds"), [(1, 2), (0.01, 8)])
def test_measuring_stops_early_if_it_is_slow(monkeypatch, seconds, rounds):
    clock = itertools.count(0, seconds)
    monkeypatch.setattr(machine.time, "perf_counter", clock.__next__)
    assert machine.slowdown.__wrapped__(CPU, torch.bfloat16) == pytest.approx(1)
    assert next(clock) == pytest.approx(rounds * 4 * seconds)


def test_peaks_are_known_by_exact_name(monkeypatch):
    names = {
        **{"NVIDIA H100 80GB HBM3": (989.4e12, 494.7e12), "NVIDIA A100 80GB PCIe": (312e12, 156e12)},
        **{"Tesla T4": (None, 8.1e12), "NVIDIA H100": (None, None), "NVIDIA A100-SXM4-40GB MIG 1g.5gb": (None, None)},
    }
    gpu = torch.device("cuda", 0)
    for name, expected in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
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
    """The bytes with which `must_fit` is content, and below which it refuses."""
    monkeypatch.setattr(machine, "_bytes", str)
    monkeypatch.setattr(machine, "memory_available", lambda device: 0)
    with pytest.raises(UserError) as refusal:
        machine.must_fit(model, config, processes)
    enough = int(re.search(r"parameters take (\d+) for", str(refusal.value))[1])
    monkeypatch.setattr(machine, "memory_available", lambda device: enough)
    machine.must_fit(model, config, processes)
    return enough


def test_memory_of_parameters_by_hand(no_gpu, monkeypatch):
    """Weights, gradients, and two averages of AdamW, or one of Muon for the matrices of the blocks; all in float32."""
    model = meta(SHAPE)
    n, hidden = model.num_parameters(), 3 * 4 * 64 * (64 + 3 * 64)
    assert needed(CONFIG, 1, monkeypatch, model) == needed(CONFIG, 2, monkeypatch, model) == 16 * n
    shared = dataclasses.replace(CONFIG, optimizer="muon", parallel="fsdp")
    assert needed(shared, 2, monkeypatch, model) == (16 * n - 4 * hidden) // 2
    model.embed.requires_grad_(False)
    assert needed(CONFIG, 1, monkeypatch, model) == 4 * n + 12 * (n - 96 * 64)


def test_memory_available_is_the_least_that_machine_and_groups_leave(tmp_path):
    def write(path: str, text: object) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"{text}\n")

    write("proc/meminfo", "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable:   5000 kB")
    write("proc/self/cgroup", "4:memory:/c\n0::/a/b")
    assert machine.memory_available(CPU, tmp_path) == 5_000 * 1024
    for group, numbers in {"a": (4_000_000, 1_500_000, 300_000), "a/b": (3_900_000, 1_000, 0)}.items():
        for name, number in zip(("memory.max", "memory.current"), numbers, strict=False):
            write(f"sys/fs/cgroup/{group}/{name}", number)
        write(f"sys/fs/cgroup/{group}/memory.stat", f"anon 7\ninactive_file {numbers[2]}")
    assert machine.memory_available(CPU, tmp_path) == 4_000_000 - 1_500_000 + 300_000
    write("sys/fs/cgroup/a/memory.max", "max")
    assert machine.memory_available(CPU, tmp_path) == 3_899_000
    write("sys/fs/cgroup/a/b/memory.current", 3_900_001)
    assert machine.memory_available(CPU, tmp_path) == 0


def test_memory_that_pytorch_keeps_for_later_is_available(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1_000, 9_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2_000)
    assert machine.memory_available(torch.device("cuda", 0)) == 4_000


def test_a_gpu_alone_starts_with_all_rows(gpu, monkeypatch):
    config = dataclasses.replace(CONFIG, batch_size=16, micro_batch_size=4)
    assert machine.rows_held(config, 1) == 16
    assert machine.rows_held(config, 2) == 4
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.rows_held(config, 1) == 4


@given(rows=st.integers(1, 60))
def test_fewer_rows_divide_them_down_to_one(rows):
    fewer = machine.fewer(rows)
    assert rows % fewer == 0
    assert fewer <= max(1, rows // 2)
    assert fewer == 1 or 2 * fewer == rows or rows % 2


@given(count=st.integers(0, 40), size=st.integers(1, 40), fits=st.integers(1, 40))
def test_batches_are_halved_until_they_fit(count, size, fits):
    done, failed = [], []

    def work(first: int, size: int) -> int:
        if size > fits:
            failed.append(size)
            raise torch.OutOfMemoryError
        done.extend(range(first, min(first + size, count)))
        return len(done) - first

    machine.in_batches(count, size, work, "items", "test")
    assert done == list(range(count))
    assert len(failed) <= math.log2(size) + 1


def test_one_item_that_does_not_fit_is_an_error():
    def work(first: int, size: int) -> int:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        machine.in_batches(3, 4, work, "items", "test")


def test_memory_is_measured_here():
    held = torch.ones(2**24)  # 64 MiB
    assert 0 < machine.memory_available(CPU) < 2**50
    peak, unit = re.match(r"(\S+) (MiB|GiB) at the peak of the first step, of .*iB$", machine.peak_memory(CPU)).groups()
    assert held.nbytes < float(peak) * (2**30 if unit == "GiB" else 2**20) < 2**34


@pytest.mark.parametrize(
    ("changes", "processes", "rows"),
    [
        ({}, 1, "micro_batch_size=2 (now 4), then "),
        ({"batch_size": 12, "micro_batch_size": 6}, 4, "micro_batch_size=1 (now 3), then "),
        ({"batch_size": 1}, 1, ""),
    ],
)
def test_the_advice_when_memory_runs_out_can_be_followed(no_gpu, changes, processes, rows):
    config = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(UserError) as refusal, machine.fitting(SHAPE, config, processes):
        torch.empty(1 << 60)
    rest = "gradient_checkpointing=True (now False), then context_length=16 (now 32)"
    assert str(refusal.value) == f"out of memory; set {rows}{rest}"
    with pytest.raises(UserError), machine.fitting(SHAPE, config, processes):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="another"), machine.fitting(SHAPE, config, processes):
        raise RuntimeError("another error")


def test_a_gpu_that_cannot_hold_one_row_is_not_advised_to_hold_fewer(gpu):
    with pytest.raises(UserError, match="set gradient_checkpointing"), machine.fitting(SHAPE, CONFIG, 1):
        raise torch.OutOfMemoryError


# ---------------------------------------------------------------------------------------------------------------- page


def test_the_page(no_gpu, caplog):
    config = dataclasses.replace(CONFIG, micro_batch_size=2, warmup_steps=7)
    model, flops = Transformer(SHAPE), SHAPE.flops_per_token(32)
    task = Task(None, None, None, None, steps=1_000, epoch=400, flops=4 * 32 * flops)
    lines, n = machine.page(model, config, torch.float32, task, 1, machine.rows_held(config, 1)), model.num_parameters()
    each = 128_000 / n
    assert max(map(len, lines)) <= 80
    assert lines[:4] == [
        f"parameters  {n:,}",
        "steps       1,000 of 4 rows × 32 tokens, 2 at a time",
        f"tokens      128,000 in 2.50 epochs; {each:.2f} per parameter, {each / 20:.2g} of Chinchilla's 20",
        f"FLOPs       {flops:.1e} per token, {128_000 * flops:.1e} in all",
    ]
    assert lines[5] == "precision   float32; weights and optimizer in float32"
    assert lines[7].endswith("7 steps of warm-up")
    assert not caplog.text
    model.embed.requires_grad_(False)
    task.steps = 7
    lines = machine.page(model, config, torch.float32, task, 2, machine.rows_held(config, 2))
    assert lines[0].endswith(f" {n:,}, {n - 96 * 64:,} of them trained")
    assert lines[1].endswith("32 tokens")  # two processes hold the batch at once
    assert "2 processes by ddp" in lines[4]
    assert "warmup_steps is 7 of 7 steps: the learning rate never peaks" in caplog.text


def test_the_manifest_says_on_what_machine_a_run_ran(made: Place):
    for name in ("pretrain", "pretrain/final", "pretrain/best"):
        counts = stage.read_manifest(made.runs / "mini" / name)["counts"]
        assert re.search(r"\w, 1 thread; float32, not compiled$", counts["machine"]) or torch.cuda.is_available()
        assert counts["command"] == f"python train.py {made.config}"
    several = dataclasses.replace(CONFIG, compile=True)
    assert machine.used(several, torch.bfloat16, 8).endswith(", 8 processes by ddp; bfloat16, compiled")
