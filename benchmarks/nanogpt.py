"""Beside nanoGPT: both train on one text file for the same time; bits per byte of the file's last tenth.

    python -m benchmarks.nanogpt --nanogpt DIR TEXT   ->  benchmarks/results/nanogpt.json

DIR is a checkout of nanoGPT: see nanogpt.md. Both learn from the first nine tenths of the characters only. Both predict
the same bytes, the last tenth, after the end of the first part; windows overlap by half. Neither predicts an end of the
text. nanoGPT predicts characters, ours predicts pieces. The time is that of training alone, in ours also that of
training the tokenizer. A short run before finds the number of steps that fit, because schedules need it.
"""

import argparse
import hashlib
import importlib.util
import json
import math
import os
import pickle
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import checkpoint
import cli
import pipeline
import stage
from benchmarks.common import once, output, sentence, write
from cli import UserError
from configs import Experiment
from configs.demo import experiment as demo
from data.corpus import CorpusConfig
from data.pack import PackConfig
from data.sources import Files
from tokenizer.train import TokenizerConfig

# nanoGPT's README has this command for a CPU; max_iters and lr_decay_iters follow from the time.
README = {"device": "cpu", "compile": False, "block_size": 64, "batch_size": 12, "dropout": 0.0}
README |= {"n_layer": 4, "n_head": 4, "n_embd": 128, "gradient_accumulation_steps": 1}
README |= {"learning_rate": 1e-3, "min_lr": 1e-4, "beta2": 0.99, "warmup_iters": 100}
# Its process keeps freed memory, as ours does: that is faster.
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
# Changes of it that may help. On a CPU train.py computes in float32; bfloat16 and compiling make it no faster there.
RECIPES = {
    "readme": {},
    "higher_rate": {"learning_rate": 4e-3, "min_lr": 4e-4},
    "longer_context": {"block_size": 128, "learning_rate": 3e-3, "min_lr": 3e-4},
    "larger": {"block_size": 128, "n_head": 6, "n_embd": 192, "learning_rate": 3e-3, "min_lr": 3e-4},
}
MINUTES = {1: ("readme", "higher_rate", "longer_context"), 3: ("higher_rate", "larger")}
PACE = 60  # steps of the short run, of which the first third does not count


def split(text: str) -> tuple[str, str]:
    """The first nine tenths of the characters, to train on, and the last tenth, as nanoGPT's prepare.py splits."""
    return text[: int(0.9 * len(text))], text[int(0.9 * len(text)) :]


@torch.inference_mode()
def bits(logits: Callable[[Tensor], Tensor], ids: np.ndarray, count: int, length: int) -> float:
    """−log2 p of the last `count` ids. Each id is predicted from at least half a window of `length` ids before it."""
    stream, total, n = torch.from_numpy(ids.astype(np.int64)), 0.0, len(ids)
    spans = [(start, min(start + length // 2, n)) for start in range(n - count, n, length // 2)]
    for i in range(0, len(spans), 64):
        part = spans[i : i + 64]
        windows = torch.stack([stream[end - 1 - length : end] for _, end in part])  # (B, length + 1)
        log_p = torch.log_softmax(logits(windows[:, :-1].contiguous()).float(), -1)  # (B, length, V)
        log_p = log_p.gather(2, windows[:, 1:, None])[:, :, 0]
        for row, (start, end) in zip(log_p, part, strict=True):
            total -= float(row[length - (end - start) :].double().sum())
    return total / math.log(2)


# ---------------------------------------------------------------------------------------------------------------- ours


def experiment(steps: int, quick: bool = False, **changes) -> Experiment:
    """The demo, in shorter rows and at a higher rate, for a megabyte of text. changes: of its model or training."""
    shape = {"context_length": 128} | {k: v for k, v in changes.items() if hasattr(demo.model, k)}
    how = {"batch_size": 8, "learning_rate": 1e-2, "warmup_steps": 50}
    how |= {"eval_every": 10**6, "save_every": 10**6, "log_every": 1, "steps": steps}
    how |= {k: v for k, v in changes.items() if hasattr(demo.pretrain, k)}
    if quick:
        shape |= {"vocab_size": 320, "context_length": 32, "n_layers": 1, "d_model": 32, "n_heads": 1}
    return replace(
        demo,
        name=f"steps{steps}",
        model=replace(demo.model, **shape),
        corpus=CorpusConfig(sources=(Files(paths=("text.txt",)),)),
        tokenizer=TokenizerConfig(vocab_size=320 if quick else changes.get("vocab_size", 4_096)),
        pack=PackConfig(val_fraction=0.01),
        pretrain=replace(demo.pretrain, **how),
        expected={},
    )


def make(made: Experiment, *stages: str) -> None:
    """Makes stages in this process: in another one the time to start it would count."""
    switches = {"workers": 2, "resume": "auto", "checkpoint": None, "again": []}
    pipeline.make(list(stages), made, argparse.Namespace(**switches), apart=False)


def ours(text: str, seconds: float, quick: bool = False, **changes) -> dict:
    """Trains the tokenizer and the model for so many seconds. Must run in a process of its own."""
    train, held_out = split(text)
    with tempfile.TemporaryDirectory() as place:
        os.environ |= {"DATA": place, "RUNS": place}
        (Path(place) / "text.txt").write_text(train, encoding="utf-8", newline="")
        short = experiment(9 if quick else PACE, quick, **changes)
        make(short, "pretrain")
        took = stage.read_seconds(short.directory("pack").parent)["tokenizer"]
        pace = steps_per_second(short.directory("pretrain") / "metrics.jsonl", short)
        full = experiment(max(10, round((seconds - took) * pace)), quick, **changes)
        full = replace(full, shared=dict.fromkeys(("corpus", "tokenizer", "pack"), short))
        started = time.perf_counter()
        make(full, "pretrain")
        took += time.perf_counter() - started
        spm, model = full.load_tokenizer(), checkpoint.load_model(full.trained("pretrain"))
    before, after = (spm.encode_array(part.encode()) for part in (train, held_out))
    assert spm.decode(after.tolist()) == held_out
    found = bits(model, np.concatenate([before, after]), len(after), model.config.context_length)
    return {
        "bits_per_byte": round(found / len(held_out.encode()), 4),
        "seconds": round(took, 1),
        "steps": full.pretrain.steps,
        "parameters": model.num_parameters(),
        "pieces": spm.vocab_size,
    }


def steps_per_second(log: Path, made: Experiment) -> float:
    """The speed of the later two thirds of a run, from its metrics.jsonl."""
    rates = [json.loads(line)["tokens_per_second"] for line in log.read_text().splitlines()]
    per_step = made.pretrain.batch_size * made.model.context_length
    return float(np.median(rates[len(rates) // 3 :])) / per_step


# -------------------------------------------------------------------------------------------------------------- theirs


def theirs(nanogpt: Path, text: str, seconds: float, recipe: str, quick: bool = False) -> dict:
    """Trains nanoGPT for so many seconds, its first step left out."""
    train, held_out = split(text)
    number = {character: i for i, character in enumerate(sorted(set(text)))}
    before, after = (np.array([number[c] for c in part], np.uint16) for part in (train, held_out))
    options = README | RECIPES[recipe]
    with tempfile.TemporaryDirectory() as place:
        before.tofile(f"{place}/train.bin")
        after.tofile(f"{place}/val.bin")
        (Path(place) / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(number)}))
        pace = np.median(iterations(nanogpt, place, options, 9 if quick else PACE)[PACE // 3 * (not quick) :])
        steps = max(10, round(seconds / pace))
        took = sum(iterations(nanogpt, place, options, steps)[1:])
        saved = torch.load(f"{place}/ckpt.pt", weights_only=True)
    spec = importlib.util.spec_from_file_location("nanogpt_model", nanogpt / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a dataclass looks for its module there
    spec.loader.exec_module(module)
    model = module.GPT(module.GPTConfig(**saved["model_args"])).eval()
    model.load_state_dict({name.removeprefix("_orig_mod."): weight for name, weight in saved["model"].items()})
    # Without targets it gives the last position's logits only.
    ids, length = np.concatenate([before, after]), options["block_size"]
    found = bits(lambda tokens: model(tokens, tokens)[0], ids, len(after), length)
    return {
        "bits_per_byte": round(found / len(held_out.encode()), 4),
        "seconds": round(took, 1),
        "steps": steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        "characters": len(number),
        "options": options,
    }


def iterations(nanogpt: Path, place: str, options: dict, steps: int) -> list[float]:
    """Seconds of each iteration of nanoGPT's train.py."""
    settings = options | {"max_iters": steps, "lr_decay_iters": steps, "log_interval": 1}
    # It evaluates, on one batch, and saves at its first step and at its last.
    settings |= {"out_dir": place, "dataset": place, "eval_interval": steps, "eval_iters": 1}
    command = [sys.executable, "train.py", *(f"--{name}={value}" for name, value in settings.items())]
    done = subprocess.run(command, cwd=nanogpt, capture_output=True, text=True, env=os.environ | KEEP)
    if done.returncode:
        raise RuntimeError(f"nanoGPT's train.py failed:\n{done.stderr}")
    return [float(ms) / 1000 for ms in re.findall(r"^iter .* time ([\d.]+)ms", done.stdout, re.MULTILINE)]


# ---------------------------------------------------------------------------------------------------------------- both


def compare(text: str, nanogpt: Path | None, minutes: int, quick: bool) -> dict:
    """Ours and each recipe of theirs, one after another, each in a process of its own."""
    found = {"ours": once("ours", ours, text, 60 * minutes, quick)}
    for recipe in MINUTES.get(minutes, ("readme",)):
        if nanogpt:
            found[f"nanogpt_{recipe}"] = once(recipe, theirs, nanogpt, text, 60 * minutes, recipe, quick)
        print({name: result["bits_per_byte"] for name, result in found.items()}, flush=True)
    if nanogpt:
        best = min(result["bits_per_byte"] for name, result in found.items() if name != "ours")
        found["nanogpt_best_bits_per_byte"] = best
        found["below_nanogpt_best"] = round(best - found["ours"]["bits_per_byte"], 4)
    return found


def main(arguments: argparse.Namespace) -> None:
    if arguments.quick:
        rng = random.Random(0)
        text = "\n".join(sentence(rng, 12) for _ in range(400))
    elif not arguments.text or not arguments.nanogpt:
        raise UserError("give a text file and --nanogpt DIR, a checkout of nanoGPT; see benchmarks/nanogpt.md")
    else:
        try:
            text = Path(arguments.text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{arguments.text}: {error}") from None
    nanogpt = arguments.nanogpt and Path(arguments.nanogpt).resolve()
    if nanogpt and not (nanogpt / "train.py").is_file():
        raise UserError(f"no train.py in {nanogpt}; expected a checkout of nanoGPT, see benchmarks/nanogpt.md")
    found = {"text_sha256": hashlib.sha256(text.encode()).hexdigest(), "held_out_bytes": len(split(text)[1].encode())}
    found["nanogpt_commit"] = output("git", "-C", str(nanogpt), "rev-parse", "--short", "HEAD") if nanogpt else ""
    for minutes in [0] if arguments.quick else MINUTES:
        name = {0: "quick", 1: "one_minute", 3: "three_minutes"}[minutes]
        found[name] = compare(text, nanogpt, minutes, arguments.quick)
    write("nanogpt", "python -m benchmarks.nanogpt --nanogpt DIR TEXT", found, arguments.quick)


if __name__ == "__main__":
    p = cli.parser(__doc__, config=False)
    p.add_argument("text", nargs="?", metavar="TEXT", help="a text of about a megabyte, such as tiny Shakespeare")
    p.add_argument("--nanogpt", metavar="DIR", help="a checkout of nanoGPT")
    p.add_argument("--quick", action="store_true", help="a few steps on a text of its own; write nothing")
    cli.run(main, p.parse_args())
