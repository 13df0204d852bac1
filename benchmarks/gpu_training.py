"""Training steps on one NVIDIA GPU, beside transformers: rows at a time, tokens/s, MFU, memory.

Parts of `python -m benchmarks.gpu`.
"""

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import configs
import machine
import stage
from benchmarks.common import ratio
from benchmarks.gpu_kernels import BACKEND, DEVICE, GPU, HALF, autocast, normal, shape, timed, wait, warm
from model import Transformer
from optim import make_optimizers

ROWS = {"tiny": 32, "small": 16, "base": 8}  # of 1,024 tokens, beside transformers
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION if GPU else SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION}


def to_transformers(model: Transformer) -> nn.Module:
    from tests import test_model  # imported here: what it needs, training does not

    with DEVICE, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return test_model.to_transformers(model)


@contextmanager
def liger() -> Iterator[None]:
    """transformers' LLaMA with Liger's kernels."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from transformers.models.llama import modeling_llama as llama

    forward = mock.patch.object(llama.LlamaForCausalLM, "forward", llama.LlamaForCausalLM.forward)
    with mock.patch.dict(vars(llama)), forward:
        apply_liger_kernel_to_llama()
        yield


class Step:
    """A training step of one config on random tokens, to be called."""

    # way: "ours" or "transformers", then "eager" or "compiled" (ours by blocks; theirs as a whole, base by layers);
    # or "transformers_liger".

    def __init__(self, name: str, rows: int, way: str):
        self.name, self.way, self.config, self.repeat, self.mib = name, way, shape(name), 1, 0
        self.around = liger if way == "transformers_liger" else nullcontext
        self.tokens = rows * self.config.context_length
        before = torch.cuda.memory_allocated() if GPU else 0
        started = time.perf_counter()
        with self.around():
            self.step = self.make(rows)
        self()
        wait()
        self.start = time.perf_counter() - started  # seconds until the first step is done
        if GPU:  # from here on without what compiling needs
            torch.cuda.reset_peak_memory_stats()
            self(), self(), wait()
            started = time.perf_counter()
            self(), wait()
            self.repeat = max(1, min(20, round(0.2 / (time.perf_counter() - started))))
            self.mib = (torch.cuda.max_memory_allocated() - before) >> 20

    def __call__(self) -> None:
        with self.around():
            self.step()

    def make(self, rows: int) -> Callable[[], None]:
        torch.manual_seed(0)
        with DEVICE:
            model = Transformer(self.config)
            tokens = torch.randint(self.config.vocab_size, (rows, self.config.context_length + 1))
        x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        if self.way.startswith("ours"):
            optimizers = make_optimizers(model, configs.load(stage.ROOT / f"configs/{self.name}.py").pretrain)
        else:
            model = to_transformers(model).train()
            optimizers = [torch.optim.AdamW(model.parameters(), fused=True)]
        parameters, call = list(model.parameters()), self.compiled(model)

        def loss() -> Tensor:
            if self.way.startswith("ours"):
                return call(x, y)
            if self.way == "transformers_liger":  # makes no logits
                return call(x, labels=x, use_cache=False).loss
            return F.cross_entropy(call(x, use_cache=False).logits.flatten(0, 1), y.flatten())

        def step() -> None:
            with autocast():
                value = loss()
            value.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        return step

    def compiled(self, model: nn.Module) -> nn.Module:
        """The model as its way says. RuntimeError if it cannot be compiled."""
        ours = self.way.startswith("ours")
        if not self.way.endswith("_compiled"):
            return model
        if not ours and self.name != "base":
            return torch.compile(model, dynamic=False, backend=BACKEND)
        if ours and GPU:
            if not machine.compile_blocks(model, DEVICE):
                raise RuntimeError("compile_blocks could not compile; the log says why")
            return model
        for block in model.blocks if ours else model.model.layers:
            block.compile(backend=BACKEND)
        return model

    def rate(self, seconds: list[float], results) -> dict:
        """What is recorded of the seconds that steps took."""
        rate = self.tokens / statistics.median(seconds)
        found = {"tokens_per_second": round(rate), "start_seconds": round(self.start, 1), "peak_mib": self.mib}
        measured = results.found.get("peaks", {}).get("measured", {}).get("tflops")
        peaks = {"measured": measured and measured * 1e12, "datasheet": machine.peak_flops(DEVICE, HALF)}
        for of, peak in peaks.items():
            if peak:
                found[f"mfu_of_{of}_peak"] = round(
                    rate * self.config.flops_per_token(self.config.context_length) / peak, 4
                )
        return found


def each_compiled():
    """Settings of torch.compile for many models in one process: each has the blocks compiled for itself."""
    torch._dynamo.reset()
    return torch._dynamo.config.patch(recompile_limit=64, automatic_dynamic_shapes=False)


def micro_batches(results) -> None:
    """Rows at a time, then cuDNN's attention beside flash attention where the shape is fixed."""

    def step(name: str, rows: int) -> dict:
        with each_compiled():
            step = Step(name, rows, "ours_compiled")
            return step.rate(timed({"step": step}, 5, step.repeat)["step"], results)

    def attentions(name: str, rows: int) -> dict:
        c = shape(name)
        q, k, v, dy = (normal(rows, c.n_heads, c.context_length, c.head_dim).requires_grad_() for _ in range(4))

        def both_passes(way: str) -> None:
            with sdpa_kernel(BACKENDS[way]):
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            torch.autograd.grad(y, (q, k, v), dy)

        ways = {"cudnn": lambda: both_passes("cudnn"), "flash": lambda: both_passes("flash")}
        times = timed(warm(ways), 10, 5)
        found = {f"{way}_ms": round(1e3 * statistics.median(seconds), 3) for way, seconds in times.items()}
        return found | {"cudnn_vs_flash": ratio(times["flash"], times["cudnn"])}

    for name in ("tiny", "base") if GPU else ("tiny",):
        for rows in (16, 4, 64) if GPU else (2, 1):
            results.measure(f"rows_{name}/{rows}", step, name, rows, needs=12)
        results.measure(f"attention_{name}/16_rows", attentions, name, 16 if GPU else 2)


def training(results) -> None:
    """Our steps and transformers' in turn, and the ratio of the fastest of each."""
    for name in ROWS if GPU else ("tiny",):
        with each_compiled():
            compare(name, results)


def compare(name: str, results) -> None:
    steps: dict[str, Step] = {}

    def enter(way: str) -> dict:
        step = Step(name, ROWS[name] if GPU else 2, way)
        steps[way] = step
        return step.rate(timed({way: step}, 2, step.repeat)[way], results)  # now: later rounds may lack time

    ways = ["ours_compiled", "transformers_compiled", "ours_eager", "transformers_eager"]
    for way in ways + ["transformers_liger"] * GPU:  # Triton's interpreter cannot run Liger's kernels
        whole = way == "transformers_compiled" and name != "base"
        needs = 10 + 2 * shape(name).n_layers if whole else 12 if way.endswith("_compiled") else 5
        results.measure(f"train_{name}/{way}", enter, way, needs=needs if GPU else 0)
    seconds = {way: [] for way in steps}
    for _ in range(5):
        for way, step in steps.items():
            seconds[way] += timed({way: step}, 1, step.repeat)[way]
    for way, step in steps.items():
        results.measure(f"train_{name}/{way}", step.rate, seconds[way], results, needs=0)
    times = {}
    for way in sorted(seconds, key=lambda way: statistics.median(seconds[way])):
        times.setdefault(way.partition("_")[0], seconds[way])  # the fastest of each
    if len(times) == 2:
        value = {"ratio_vs_transformers_best": ratio(times["transformers"], times["ours"])}
        results.measure(f"train_{name}/fastest", lambda: value, needs=0)
