"""What training is on one NVIDIA GPU with the project's own data and loop: every stage, packed rows, a real run.

Parts of `python -m benchmarks.gpu`.
"""

import inspect
import json
import os
import shutil
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import checkpoint
import cli
import configs
import data.pack
import generate
import stage
import train
import trainer
from benchmarks.gpu_kernels import DEVICE, GPU, autocast, near, normal, shape, wait, without_waiting
from benchmarks.gpu_training import BACKENDS
from eval.language import Subject, validation
from model import Layout, Transformer, linear_cross_entropy
from optim import make_optimizers

# --------------------------------------------------------------------------------------------------- every stage, waits


def prepare(results, directory: Path) -> dict:
    """Makes the data of the tests' small experiment. Before the GPU is used, because it forks."""
    from tests import conftest

    text = [part for part in (stage.ROOT / "tests/text.txt").read_text("utf-8").split("\n\n") if len(part) > 20]
    directory.mkdir()
    place = conftest.furnish(directory, text)
    place.edit(('precision="float32", deterministic=True', f'precision="{"auto" if GPU else "float32"}"'))
    for name in ("pack", "sft_data", "dpo_data"):
        place.make(name)
    results.place = place
    return {"made": True}


def stages(results) -> None:
    """Every stage of a small experiment; after each training, one micro-batch of its task while waits are errors."""
    real = trainer.train

    def watched(model, task, config, job, *rest) -> None:
        try:
            real(model, task, config, job, *rest)
        finally:
            name = job.directory.name
            results.measure(f"waits/{name}", check_waits, model.to(DEVICE).train(), task, config)
            if name == "dpo":
                task.stored = None  # then the reference is the model with its adapter switched off
                results.measure("waits/dpo_adapter_off", check_waits, model, task, config)

    def seconds(name: str) -> dict:
        started = time.perf_counter()
        results.place.make(name)
        return {"seconds": round(time.perf_counter() - started, 1)}

    with mock.patch.object(trainer, "train", watched):
        for name in ("pretrain", "sft", "dpo", "eval"):
            results.measure(f"stages/{name}", seconds, name)


def check_waits(model: Transformer, task: trainer.Task, config: trainer.TrainConfig) -> dict:
    """Forward and backward pass, then the optimizers' steps. The norm of the gradient is left out: it must be known."""
    rows = config.micro_batch_size
    batch = [tensor[:rows].pin_memory() if GPU else tensor[:rows] for tensor in task.batch(0, 0, 1)]
    optimizers = make_optimizers(model, config)

    def micro_batch() -> None:
        with autocast():
            loss = task.loss(model, *batch)["loss"]
        loss.backward()

    def update() -> None:
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        for optimizer in optimizers:
            optimizer.step()

    for function in (micro_batch, update):
        function()  # kernels compile, the optimizers allocate
        without_waiting(function)
    return {"passed": True}


# ---------------------------------------------------------------------------------------------------------- packed rows


def packed_batch(seed: int, vocabulary: int, rows: int, T: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets and positions, (rows, T) each on the CPU, of texts that are 2 % to 40 % of a row long."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (rows, T), generator=draw)
    positions = torch.empty_like(tokens)
    for row in positions:
        at = 0
        while at < T:
            length = min(T - at, int(torch.randint(max(1, T // 50), 2 * T // 5, (), generator=draw)))
            row[at : at + length] = torch.arange(length)
            at += length
    targets = tokens.roll(-1, 1)
    targets[torch.rand(rows, T, generator=draw) < 0.4] = -100
    return tokens, targets, positions


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Tensor:
    """Causal attention within texts that lie one after another. q, k, v: (tokens, H, E); bounds: (texts + 1,)."""
    if not GPU:  # PyTorch's function runs on a GPU only
        texts = [x.transpose(0, 1).tensor_split(bounds[1:-1].long(), 1) for x in (q, k, v)]
        outputs = [F.scaled_dot_product_attention(*text, is_causal=True) for text in zip(*texts, strict=True)]
        return torch.cat(outputs, 1).transpose(0, 1)
    from torch.nn.attention.varlen import varlen_attn  # from PyTorch 2.10 on

    new = "window_size" in inspect.signature(varlen_attn).parameters
    causal = {"window_size": (-1, 0)} if new else {"is_causal": True}
    return varlen_attn(q, k, v, bounds, bounds, longest, longest, **causal)


class Varlen(Layout):
    """Packed texts as `varlen_attention` takes them: without a copy."""

    def __init__(self, model: Transformer, positions: Tensor):
        at = positions.to(DEVICE)
        super().__init__(model.cos[at], model.sin[at], None)
        starts = (positions.flatten() == 0).nonzero()[:, 0]
        bounds = torch.cat((starts, torch.tensor([positions.numel()])))
        self.longest, self.bounds = int(bounds.diff().max()), bounds.to(DEVICE, torch.int32)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]  # (B · T, H, E) each
        y = varlen_attention(*flat, self.bounds, self.longest)
        return y.view_as(q.transpose(1, 2)).transpose(1, 2)


def varlen_loss(model: Transformer, tokens: Tensor, targets: Tensor, positions: Tensor) -> Tensor:
    layout, x = Varlen(model, positions), model.embed(tokens)
    for block in model.blocks:
        x = block(x, layout)
    return linear_cross_entropy(model.norm(x).flatten(0, 1), model.head.weight, targets.flatten())


@contextmanager
def attention(backend: SDPBackend | None, shapes: set) -> Iterator[None]:
    """Every scaled_dot_product_attention uses this kernel, whatever the model asks for; None: what it asks for."""
    real = F.scaled_dot_product_attention

    def chosen(*arguments, **options) -> Tensor:
        shapes.add(tuple(arguments[0].shape))
        with sdpa_kernel(backend) if backend else nullcontext():
            return real(*arguments, **options)

    with mock.patch.object(F, "scaled_dot_product_attention", chosen):
        yield


def attention_error(model: Transformer, way: str, sizes: tuple[int, int, int]) -> float:
    """Of a way's attention on packed texts, in bfloat16, beside the model's own in float32: a share of its norm."""
    tokens, _, positions = packed_batch(0, *sizes)
    own = model.layout(tokens.to(DEVICE), None, positions, None)
    q, k, v = (normal(sizes[1], model.config.n_heads, sizes[2], model.config.head_dim) for _ in range(3))
    exact = own.attend(q.float(), k.float(), v.float())
    layout = Varlen(model, positions) if way == "varlen" else own
    with attention(BACKENDS.get(way), set()):
        return near(layout.attend(q, k, v), exact.double(), 0.01)


def time_packed(model: Transformer, way: str, first: int, sizes: tuple[int, int, int], limit: float) -> dict:
    """Seconds of a micro-batch when its shapes are new, and when they are not. limit: seconds for the new ones."""
    # first: seed of the first micro-batch; each way has its own, so that its shapes are new. sizes: see `packed_batch`.
    batches = [packed_batch(seed, *sizes) for seed in range(first, first + (24 if GPU else 2))]
    error, shapes, new, again = attention_error(model, way, sizes), set(), [], []

    def step(tokens: Tensor, targets: Tensor, positions: Tensor) -> float:
        wait()
        started = time.perf_counter()
        with autocast():
            there = tokens.to(DEVICE, non_blocking=True)
            if way == "varlen":
                loss = varlen_loss(model, there, targets, positions)
            else:
                loss = model(there, targets, positions=positions)
        loss.backward()
        wait()
        return time.perf_counter() - started

    with attention(BACKENDS.get(way), shapes):
        step(*packed_batch(0, *sizes))  # other things than shapes are new too
        ended = time.perf_counter() + limit
        while len(new) < len(batches) and (not new or time.perf_counter() < ended):
            new.append(step(*batches[len(new)]))
        for batch in batches[: len(new)]:
            again.append(step(*batch))
    model.zero_grad(set_to_none=True)
    found = {"error": round(error, 5), "micro_batches": len(new), "shapes": len(shapes)}
    for name, seconds in (("new", new), ("again", again)):
        found[f"{name}_ms"] = round(1e3 * statistics.median(seconds), 2)
        found[f"{name}_worst_ms"] = round(1e3 * max(seconds), 2)
    return found | {"tokens_per_second": round(batches[0][0].numel() / statistics.median(again))}


def packed(results) -> None:
    """Fine-tuning tiny on 4 rows of packed texts: as the model does it, and with each kind of attention."""
    torch.manual_seed(0)
    model = Transformer(shape("tiny")).to(DEVICE)
    sizes = (model.config.vocab_size, 4, model.config.context_length) if GPU else (64, 2, 16)
    for number, way in enumerate(("model", "flash", "varlen", "cudnn")):
        arguments = (way, 1 + 100 * number, sizes, min(10.0, results.left() / 2))
        results.measure(f"packed/{way}", time_packed, model, *arguments)


# ----------------------------------------------------------------------------------------------------------- a real run


def real_run(results) -> None:
    """Pretraining on packed tokens for the time that is left, then bits per byte of held-out text."""
    directory, config = results.packed, stage.ROOT / "configs/prose_tiny.py"
    if not GPU:
        directory, config = results.place.runs / "mini", results.place.config
    if directory is None:
        results.skip("run/prose_tiny", "no packed tokens; name their run with --packed")
        return
    with mock.patch.dict(os.environ, RUNS=str(directory.parent)):
        results.measure("run/prose_tiny", pretrain, results, directory, config, needs=80 if GPU else 0)


def pretrain(results, directory: Path, path: Path) -> dict:
    base = replace(configs.load(path), mixture=())  # shares would read the smallest source dozens of times
    config, length = replace(base.pretrain, batch_size=16), base.model.context_length
    measured = results.found.get("rows_tiny", {}).get(str(config.batch_size), {})
    rate = 0.65 * measured.get("tokens_per_second", 800_000)  # reading batches and waiting for the norm take time too
    seconds = results.left() - 55  # without compiling, saving and the evaluation
    spm = replace(base, name=directory.name).load_tokenizer()
    packed = data.pack.load(directory / "packed", spm.sha256)
    epoch = len(packed["train"].tokens) // (config.batch_size * length)
    steps = min(int(rate * seconds / (config.batch_size * length)), 4 * epoch) if GPU else 4
    every, warmup = max(1, steps // 5), min(config.warmup_steps, steps // 10)
    config = replace(config, steps=steps, epochs=None, warmup_steps=warmup, micro_batch_size=None)
    config = replace(config, eval_every=every, save_every=steps, compile=GPU)
    experiment = replace(base, name=directory.name, pretrain=config)
    job = train.job(experiment, results.out / "run/pretrain", "python -m benchmarks.gpu")
    with stopped_after(seconds + 25):
        train.train(job, experiment, True, "auto")
    model = checkpoint.load_model(next(checkpoint.newest(job.directory)), str(DEVICE))
    for path in job.directory.iterdir():
        if path.is_dir():  # checkpoints: too large to take home
            shutil.rmtree(path)
    records = [json.loads(line) for line in (job.directory / "metrics.jsonl").read_text().splitlines()]
    torch.set_float32_matmul_precision("highest")
    found = {"planned_steps": steps, "epochs": round(records[-1]["step"] / epoch, 2)} | records[-1]
    found["median_tokens_per_second"] = round(statistics.median(record["tokens_per_second"] for record in records))
    found["validation"] = validation(Subject(model, spm), packed["val"])
    prompt = [spm.bos, *spm.encode("The old man")]
    found["sample"] = spm.decode(generate.generate(model, prompt, 48 if GPU else 4, temperature=0.7, seed=0))
    return found


@contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """SIGTERM after these seconds, upon which training saves and stops; the block ends as if it were done."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # one that comes late must not end the benchmark
    timer = threading.Timer(max(1.0, seconds), os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    try:
        yield
    except cli.Stopped:
        pass
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)
