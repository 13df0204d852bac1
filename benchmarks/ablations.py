"""Changes of the demo, one at a time, on 614,400 tokens with three seeds; bits per byte of all held-out text.

    python -m benchmarks.ablations                  # every run that is not in the results: hours
    python -m benchmarks.ablations rope_off gelu    # these experiments only

    ->  benchmarks/results/ablations.json and the table in docs/experiments.md, after each run

Each run trains in a process of its own, one for each core, in float32: a seed gives the same number each time. A run
that was interrupted is resumed. To try an idea, add a row to EXPERIMENTS. A change of the architecture is a subclass of
`Transformer` in this file.
"""

import argparse
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import shutil
import statistics
from collections.abc import Callable
from concurrent.futures import as_completed
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cli
import configs
import pipeline
import stage
import train
from benchmarks.common import RESULTS, about, run, write
from cli import UserError, log
from configs import Experiment
from model import Attention, Block, Layout, ModelConfig, Transformer, rotate

SEEDS = (0, 1, 2)
PAGE = stage.ROOT / "docs/experiments.md"
MARKS = "<!-- the rows of ablations.json -->\n\n", "\n\n<!-- end of the rows of ablations.json -->"


@dataclass(frozen=True, kw_only=True)
class Variant(ModelConfig):
    """The shape of a changed model. `checkpoint.load_model` stops at the extra field, so it does not misread it."""

    architecture: str


# ------------------------------------------------------------------------------------------ changes of the architecture


class NoPositions(Transformer):
    """Every rotation is by the angle 0."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.cos.fill_(1.0)
        self.sin.fill_(0.0)


class LearnedPositions(NoPositions):
    """A learned vector for each position is added to the embedding, as in GPT-2."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.embed = EmbeddingWithPositions(config)
        self.initialise()

    def layout(self, tokens: Tensor, cache, positions, mask) -> Layout:
        at = torch.arange(tokens.shape[1])
        at = at + cache.used[:, None] if cache is not None else at if positions is None else positions
        self.embed.at = at.to(tokens.device)  # of the tokens that are embedded next
        return super().layout(tokens, cache, positions, mask)


class EmbeddingWithPositions(nn.Embedding):
    def __init__(self, config: ModelConfig):
        super().__init__(config.vocab_size, config.d_model)
        # Flat, because a vector is trained by AdamW without weight decay; a matrix would be trained by Muon.
        self.positions = nn.Parameter(0.02 * torch.randn(config.context_length * config.d_model))

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) + self.positions.view(-1, self.embedding_dim)[self.at]  # (B, T, D)


class PlainMLP(nn.Module):
    """down(activation(up(x))), with SwiGLU's number of parameters: two matrices, each 1.5 times as wide."""

    def __init__(self, config: ModelConfig, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        d_ff = (config.d_ff or 4 * config.d_model) * 3 // 2
        self.up = nn.Linear(config.d_model, d_ff, bias=False)
        self.down = nn.Linear(d_ff, config.d_model, bias=False)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class GELU(Transformer):
    def __init__(self, config: ModelConfig, activation: Callable[[Tensor], Tensor] = F.gelu):
        super().__init__(config)
        for block in self.blocks:
            block.mlp = PlainMLP(config, activation)
        self.initialise()


class SquaredReLU(GELU):  # arXiv:2109.08668
    def __init__(self, config: ModelConfig):
        super().__init__(config, lambda x: F.relu(x).square())


class LayerNorm(Transformer):
    def __init__(self, config: ModelConfig):
        super().__init__(config)
        for block in self.blocks:
            block.attn_norm = nn.LayerNorm(config.d_model)
            block.mlp_norm = nn.LayerNorm(config.d_model)
        self.norm = nn.LayerNorm(config.d_model)


class PostNorm(Transformer):
    """The norm stands after each addition, as in the first Transformer (arXiv:1706.03762)."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.blocks = nn.ModuleList(PostNormBlock(config) for _ in range(config.n_layers))
        self.initialise()


class PostNormBlock(Block):
    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        x = self.attn_norm(x + self.attn(x, layout))
        return self.mlp_norm(x + self.mlp(x))


class QKNorm(Transformer):
    """RMSNorm of every head's queries and keys (arXiv:2010.04245)."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        for block in self.blocks:
            block.attn = QKNormAttention(config)
        self.initialise()


class QKNormAttention(Attention):
    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.q_norm = nn.RMSNorm(config.head_dim)
        self.k_norm = nn.RMSNorm(config.head_dim)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        B, T, _ = x.shape
        q = self.q_norm(self.q(x).view(B, T, self.n_heads, self.head_dim))
        k = self.k_norm(self.k(x).view(B, T, self.n_kv_heads, self.head_dim))
        v = self.v(x).view(B, T, self.n_kv_heads, self.head_dim)
        q, k = rotate(q, layout.cos, layout.sin), rotate(k, layout.cos, layout.sin)
        y = layout.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.o(y.transpose(1, 2).reshape(B, T, -1))


class ShiftedTwice(Transformer):
    """Learns from targets that are shifted once more than they should be."""

    def forward(self, tokens: Tensor, targets=None, *others, **options) -> Tensor:
        if self.training and targets is not None:
            tokens, targets = tokens[:, :-1], targets[:, 1:].contiguous()
        return super().forward(tokens, targets, *others, **options)


# ---------------------------------------------------------------------------------------------------------- experiments


@dataclass(frozen=True)
class Change:
    """One change of the demo."""

    what: str  # in words
    train: dict = field(default_factory=dict)  # fields of TrainConfig
    model: dict = field(default_factory=dict)  # fields of ModelConfig
    architecture: type[Transformer] = Transformer


def batches_of(rows: int) -> Change:
    return Change(f"{rows} rows in a batch, {2_400 // rows:,} steps", {"batch_size": rows, "steps": 2_400 // rows})


def shape(n_layers: int, d_model: int, n_heads: int) -> Change:
    shape = {"n_layers": n_layers, "d_model": d_model, "n_heads": n_heads}
    return Change(f"{cli.plural(n_layers, 'layer')} × {d_model}, not 4 × 128; about equal parameters", model=shape)


EXPERIMENTS = {
    "demo": Change("the demo as it is"),
    "rope_off": Change("no positions: RoPE off", architecture=NoPositions),
    "learned_positions": Change("learned positions, not RoPE", architecture=LearnedPositions),
    "gelu": Change("GELU, not SwiGLU; equal parameters", architecture=GELU),
    "relu_squared": Change("ReLU², not SwiGLU; equal parameters", architecture=SquaredReLU),
    "layer_norm": Change("LayerNorm, not RMSNorm", architecture=LayerNorm),
    "post_norm": Change("norm after each addition", architecture=PostNorm),
    "qk_norm": Change("RMSNorm of queries and keys", architecture=QKNorm),
    "tied": Change("one matrix as embedding and output projection", model={"tie_embeddings": True}),
    "shifted_twice": Change("the target shifted twice", architecture=ShiftedTwice),
    "layers_1": shape(1, 192, 3),
    "layers_2": shape(2, 160, 2),
    "layers_9": shape(9, 96, 2),
    "adamw_1e-3": Change("AdamW, not Muon; rate 1e-3", {"optimizer": "adamw", "learning_rate": 1e-3}),
    "adamw_3e-3": Change("AdamW, not Muon; rate 3e-3", {"optimizer": "adamw"}),
    "cosine": Change("cosine schedule, not linear", {"schedule": "cosine"}),
    "wsd": Change("wsd schedule, not linear", {"schedule": "wsd"}),
    "no_warmup": Change("no warm-up", {"warmup_fraction": None}),
    "weight_decay_0": Change("weight decay 0, not 0.1", {"weight_decay": 0.0}),
    "batch_2": batches_of(2),
    "batch_8": batches_of(8),
    "batch_16": batches_of(16),
    "vocabulary_1k": Change("1,024 pieces, not 4,096", model={"vocab_size": 1_024}),
    "vocabulary_2k": Change("2,048 pieces, not 4,096", model={"vocab_size": 2_048}),
    "vocabulary_8k": Change("8,192 pieces, not 4,096", model={"vocab_size": 8_192}),
    "vocabulary_16k": Change("16,384 pieces, not 4,096", model={"vocab_size": 16_384}),
}


def experiment(base: Experiment, name: str, seed: int, steps: int) -> Experiment:
    """The experiment of one run. It shares the corpus of `base` and, with an equal vocabulary, its packed tokens."""
    change = EXPERIMENTS[name]
    settings = {"steps": steps, "seed": seed, "warmup_steps": 0, "warmup_fraction": 0.1, "deterministic": True}
    settings |= {"eval_every": 10_000, "eval_rows": 10_000, "save_every": 10_000} | change.train
    settings["max_skipped"] = 10_000  # a run that diverges trains to its end, and counts as failed
    model, shared = replace(base.model, **change.model), {"corpus": base}
    if change.architecture is not Transformer:
        model = Variant(**vars(model), architecture=change.architecture.__name__)
    if model.vocab_size == base.model.vocab_size:
        shared |= {"tokenizer": base, "pack": base}
    spm, training = replace(base.tokenizer, vocab_size=model.vocab_size), replace(base.pretrain, **settings)
    called = f"ablation_{name}_{seed}"
    return replace(base, name=called, model=model, tokenizer=spm, pretrain=training, shared=shared, expected={})


def make(name: str, one: Experiment) -> None:
    pipeline.make([name], one, argparse.Namespace(workers=1, again=[], resume="auto", checkpoint=None))


def source(architecture: type) -> str:
    """The source of an architecture in this file, and of the classes that it names."""
    text = inspect.getsource(architecture)
    for name, other in list(globals().items()):
        ours = inspect.isclass(other) and other.__module__ == __name__ and other is not architecture
        if ours and re.search(rf"\b{name}\b", text):
            text += source(other)
    return text


def origin(base: Experiment, one: Experiment, architecture: type[Transformer]) -> str:
    """A digest of what a result depends on: the settings, the architecture and the text. Not the project's code."""
    text = "" if architecture is Transformer else source(architecture)
    depends = [stage.describe([one.model, one.tokenizer, one.pretrain]), text, stage.outputs(base.directory("pack"))]
    return hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:16]


def measure(one: Experiment, architecture: type[Transformer], made_from: str) -> dict:
    """Trains one run, or finds it trained. Returns its parameters, its seconds and its bits per byte."""
    directory = one.directory("pretrain")
    mark = directory.parent / "made_from"
    if not mark.exists() or mark.read_text() != made_from:
        shutil.rmtree(directory.parent, ignore_errors=True)  # an earlier run, before a change
    directory.parent.mkdir(parents=True, exist_ok=True)
    mark.write_text(made_from)
    train.Transformer = architecture  # `train.train` makes this model
    make("pretrain", one)
    counts = stage.finished(directory)["counts"]
    bits = counts["record"]["val_bits_per_byte"]
    if counts["record"]["skipped"] or not math.isfinite(bits):  # its gradient was not finite
        return {"made_from": made_from, "failed": True}
    seconds = stage.read_seconds(directory.parent)["pretrain"]
    return {"made_from": made_from, "bits_per_byte": bits, "parameters": counts["parameters"], "seconds": seconds}


def start() -> None:
    """Prepares a worker: one thread, and no lines of progress."""
    torch.set_num_threads(1)
    log.setLevel("WARNING")


def main(arguments: argparse.Namespace) -> None:
    for name in arguments.names:
        if name not in EXPERIMENTS:
            raise UserError(f"no experiment {name!r}; {cli.meant(name, list(EXPERIMENTS))}")
    base, path = configs.load(arguments.config), RESULTS / "ablations.json"
    names, seeds, steps, runs = arguments.names or list(EXPERIMENTS), SEEDS, 600, {}
    if arguments.quick:
        names, seeds, steps = ["demo", "learned_positions", "qk_norm", "shifted_twice"], SEEDS[:1], 4
    elif path.exists():
        runs = stage.read_json(path)["runs"]
    make("pack", base)
    made = about("python -m benchmarks.ablations")  # before the results are written: they make the commit dirty
    with cli.pool(os.cpu_count(), start) as pool:
        started = {}
        for seed, name in itertools.product(map(str, seeds), names):
            one, architecture = experiment(base, name, int(seed), steps), EXPERIMENTS[name].architecture
            made_from = origin(base, one, architecture)
            if runs.get(name, {}).get(seed, {}).get("made_from") != made_from:
                started[pool.submit(measure, one, architecture, made_from)] = name, seed
        for number, finished in enumerate(as_completed(started), start=1):
            name, seed = started[finished]
            runs.setdefault(name, {})[seed] = result = finished.result() | {"commit": made["commit"]}
            bits = "failed" if "failed" in result else f"{result['bits_per_byte']:.4f} bits per byte"
            log.info(f"{number} of {len(started)}: {name}, seed {seed}: {bits}")
            if not arguments.quick:
                runs = {name: runs[name] for name in EXPERIMENTS if name in runs}
                stage.write_json(path, made | {"runs": runs})
                write_table(runs)
    if arguments.quick:
        write("ablations", "python -m benchmarks.ablations --quick", {"runs": runs, "table": table(runs)}, quick=True)


def table(runs: dict[str, dict]) -> str:
    """The results in Markdown, the best first. runs: by name and seed, what `measure` returns."""
    bits = {}
    for name, seeds in runs.items():
        bits[name] = [run["bits_per_byte"] for run in seeds.values() if "failed" not in run]
    # Three seeds are too few to tell how much a seed matters: the variances of all experiments are averaged.
    variances = [statistics.variance(values) for values in bits.values() if len(values) > 1]
    deviation = statistics.mean(variances) ** 0.5 if variances else math.nan
    reference = bits.get("demo", [])
    rows = [["change", "parameters", "bits per byte", "seeds", "range", "difference", ""]]
    for name in sorted(bits, key=lambda name: statistics.mean(bits[name] or [math.inf])):
        values, change = bits[name], f"{EXPERIMENTS[name].what} (`{name}`)"
        if not values:
            rows.append([change, "", "", "", "", "", "failed"])
            continue
        mean, difference, verdict = statistics.mean(values), "", ""
        if reference and name != "demo":
            beside = mean - statistics.mean(reference)
            error = deviation * (1 / len(values) + 1 / len(reference)) ** 0.5
            difference = f"{beside:+.4f}"
            if variances:
                verdict = "no difference" if abs(beside) < 3 * error else "worse" if beside > 0 else "better"
        parameters = next(run["parameters"] for run in runs[name].values() if "failed" not in run)
        spread = f"{min(values):.4f} to {max(values):.4f}"
        rows.append([change, f"{parameters:,}", f"{mean:.4f}", f"{len(values)}", spread, difference, verdict])
    return cli.table(rows, right=(1, 2, 3, 5), markdown=True)


def write_table(runs: dict[str, dict]) -> None:
    """Puts the table into docs/experiments.md."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    stage.write(PAGE, (before + MARKS[0] + table(runs) + MARKS[1] + rest.partition(MARKS[1])[2]).encode())


if __name__ == "__main__":
    p = cli.parser(__doc__, config=False)
    p.set_defaults(config="configs/demo.py")  # a quick run sets another
    p.add_argument("--quick", action="store_true", help="run a few experiments for 4 steps; write nothing")
    p.add_argument("names", nargs="*", metavar="NAME", help="experiments to run (all)")
    run(main, p)
