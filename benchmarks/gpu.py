"""One run on one NVIDIA GPU, in at most 8 minutes: what can only be learnt there, in order of worth.

    python -m benchmarks.gpu                                        ->  benchmarks/results/gpu.json
    python -m benchmarks.gpu --all OUT --packed runs/prose_tiny     ->  OUT/gpu.json, OUT/run/pretrain/metrics.jsonl
    python -m benchmarks.gpu --all OUT --only packed decoding       parts by name, say after a correction

Each part has its share of the time. The results name what has failed and what there was no time for, and they are on
disk after each measurement. What is compared is timed in turn after a warm-up; results are medians. The real run at the
end reads `tokenizer/` and `packed/` in the directory that --packed names. These may hold a part of the corpus of
configs/prose_tiny.py. Without a GPU and with TRITON_INTERPRET=1 a miniature of every part runs, to show that it runs.
"""

import argparse
import gc
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import torch

import machine
import stage
from benchmarks import common, gpu_decoding, gpu_kernels, gpu_life, gpu_training
from benchmarks.gpu_kernels import DEVICE, GPU

LIMIT = 455  # seconds: 8 minutes, minus the start of Python and a reserve
# Seconds that a part may take, and what runs it. The real run gets the time that earlier parts did not use.
PARTS = {
    "checks": (40, gpu_kernels.checks),  # the kernels against float64, and the suite's tests of them
    "stages": (40, gpu_life.stages),  # a small experiment from pretraining to evaluation; waits of the host
    "packed": (40, gpu_life.packed),  # fine-tuning's packed rows with each kind of attention
    "kernels": (45, gpu_kernels.kernels),  # beside eager and compiled PyTorch, and the bandwidth of a copy
    "micro_batches": (65, gpu_training.micro_batches),  # 4, 16 and 64 rows; cuDNN and flash attention
    "training": (130, gpu_training.training),  # tokens/s, MFU and memory beside transformers
    "decoding": (40, gpu_decoding.decoding),  # beside transformers, and texts that come and go
    "run": (LIMIT, gpu_life.real_run),  # prose_tiny
}
COUNTED = {
    "bytes": "each input of the operator read once, each output written once; the same for its twins",
    "mfu": "6 × weights of linear layers + 12 · n_layers · d_model · T a token (arXiv:2204.02311, appendix B)",
    "train": "forward, backward, clipping and fused AdamW on random tokens, bfloat16 autocast, T = 1,024",
    "packed": "forward and backward of tiny on 4 × 1,024 tokens: when the shapes of its texts are new, and again",
    "decoding": "greedy, 128 tokens after 16, tiny in float32",
}


class Results:
    """What has been found; on disk after each measurement."""

    # out: the directory to write to. packed: a run with tokenizer/ and packed/, for the part "run".

    def __init__(self, out: Path, packed: Path | None = None):
        self.out, self.packed, self.started, self.ends = out, packed, time.perf_counter(), LIMIT
        self.found, self.place = {"failed": {}, "skipped": {}, "seconds": {}}, None  # place: see gpu_life.prepare

    def now(self) -> float:
        return time.perf_counter() - self.started

    def left(self) -> float:
        """Seconds that the part still has."""
        return self.ends - self.now()

    def part(self, name: str) -> None:
        """Runs a part; an error in it ends only this part."""
        (share, function), started = PARTS[name], self.now()
        self.ends = min(LIMIT, started + share)
        torch.set_float32_matmul_precision("high")  # as in training; an earlier part may have changed it
        try:
            function(self)
        except Exception as error:
            self.fail(name, error)
        self.found["seconds"][name] = round(self.now() - started, 1)
        self.write()
        clean()

    def measure(self, name: str, function: Callable, *arguments, needs: float = 5) -> dict | None:
        """Keeps what the function returns under "section/key". needs: seconds; with fewer left it is skipped."""
        if self.left() < needs:
            self.skip(name, f"{self.left():.0f} s were left of the part's time; it needs about {needs} s")
            return None
        section, _, key = name.partition("/")
        started = time.perf_counter()
        try:
            value = function(*arguments)
        except ModuleNotFoundError as error:
            self.skip(name, f"{error.name} is not installed")
            return None
        except Exception as error:  # of any kind, from a compiler or a driver: the rest is still worth having
            self.fail(name, error)
            value = {"failed": type(error).__name__}
        self.found.setdefault(section, {})[key] = value
        cells = "  ".join(f"{k} {v:,}" if isinstance(v, (int, float)) else f"{k} {v}" for k, v in value.items())
        print(f"{self.now():5.0f} s {time.perf_counter() - started:5.1f} s  {name:<40} {cells}", flush=True)
        self.write()
        clean()
        return value

    def skip(self, name: str, reason: str) -> None:
        self.found["skipped"][name] = reason
        print(f"skipped: {name}: {reason}", flush=True)
        self.write()

    def fail(self, name: str, error: Exception) -> None:
        """Records an error and the project's lines that led to it."""
        lines = []
        for frame in traceback.extract_tb(error.__traceback__):
            if Path(frame.filename).is_relative_to(stage.ROOT):
                lines.append(f"{Path(frame.filename).relative_to(stage.ROOT)}:{frame.lineno}")
        self.found["failed"][name] = f"{type(error).__name__}: {error}"[:2_000] + f" ({', '.join(lines[-4:])})"
        print(f"failed: {name}: {self.found['failed'][name]}", file=sys.stderr, flush=True)

    def write(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        stage.write_json(self.out / "gpu.json", self.found)


def clean() -> None:
    """Returns what is no longer used to the card."""
    if GPU:
        gc.collect()
        torch.cuda.empty_cache()


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--all", type=Path, metavar="OUT", help="write here; default: benchmarks/results")
    p.add_argument("--packed", type=Path, metavar="DIR", help="has tokenizer/ and packed/, such as runs/prose_tiny")
    p.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}; needs --all")
    return p


def main() -> int:
    arguments = parser().parse_args()
    if arguments.only and not arguments.all:
        parser().error("--only needs --all: some parts must not replace the results of all parts")
    packed = arguments.packed
    if packed and not ((packed / "packed").is_dir() and (packed / "tokenizer").is_dir()):
        parser().error(f"{packed} has no packed/ and tokenizer/")
    if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
        print("error: benchmarks.gpu needs a GPU; to only run the code, set TRITON_INTERPRET=1", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as directory:
        results = Results(arguments.all or (common.RESULTS if GPU else Path(directory)), packed)
        results.measure("stages/data", gpu_life.prepare, results, Path(directory) / "small")
        return run(results, arguments.only or PARTS)


def run(results: Results, only: Iterable[str]) -> int:
    """Runs the parts. Returns the exit status: 1 if something failed."""
    command = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit", "--format=csv,noheader")
    versions = stage.versions()
    for package in ("transformers", "liger-kernel"):
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    results.found |= {
        "device": machine.name(DEVICE),
        "driver": common.output(*command),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "commit": common.output("git", "-C", str(stage.ROOT), "describe", "--always", "--dirty", "--exclude=*"),
        "versions": versions,
        "counted": COUNTED,
    }
    for name in PARTS:
        if name in only:
            results.part(name)
    return 1 if results.found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
