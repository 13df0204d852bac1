"""What the reference thinks of every pair: its log-probabilities, computed once and kept.

    python pipeline.py configs/tiny.py dpo_reference   ->  runs/tiny/dpo_reference

`train.logp` and `val.logp` hold two little-endian float64 numbers a pair, in the order of dpo_data: the log-probability
of the chosen and of the rejected answer, in nats, computed in the precision of training. They are bound to the digests
of the model and of the pairs: made anew if asked to, never used for others.
"""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import checkpoint
import dpo.data
import machine
import stage
from cli import UserError, log, progress
from data.pack import SPLITS
from dpo.data import PairRows
from dpo.loss import log_probs
from finetune import Base
from model import Transformer
from stage import Stage
from tokenizer import Tokenizer

TOKENS = {"cpu": 8_192, "cuda": 131_072}  # read at once, if the pairs were as long as the longest


def of_pairs(model: Transformer, pairs: PairRows, name: str) -> Tensor:
    """log-probabilities of the answers of all pairs, (pairs, 2) float64 on the CPU. UserError if one is not finite."""
    size = max(1, TOKENS[model.embed.weight.device.type] // pairs.width)
    batches = progress(pairs.batches(size), -(-pairs.count // size), "batches", name)
    with torch.inference_mode():
        found = torch.cat([log_probs(model, ids, bounds).cpu() for ids, bounds, _ in batches])
    if not found.isfinite().all():
        wrong = int((~found.isfinite()).any(1).nonzero()[0])
        raise UserError(
            f"the log-probability of pair {wrong:,} of {pairs.file} is not finite; the weights are damaged, or their "
            "training diverged"
        )
    return found


def job(base: Base, pairs: Path, dtype: torch.dtype, directory: Path, command: str) -> Stage:
    """The stage that computes the log-probabilities by `base` of the pairs in a directory.

    dtype: of matrix products, as in training. command: what the user types to make them."""
    settings = {"model": base.shape, "begin": base.unseen, "dtype": str(dtype)}
    read = stage.outputs(pairs) | stage.outputs(base.checkpoint)
    return Stage(directory, settings, read, command, __file__)


def build(job: Stage, base: Base, pairs: Path, dtype: torch.dtype, spm: Tokenizer, force: bool = False) -> None:
    """Computes them, unless they are there."""
    directory = job.directory
    checkpoint.must_match(base.checkpoint, spm.sha256)
    if job.up_to_date(force):
        return
    counts = dpo.data.load(pairs, spm.sha256)
    device = machine.pick_device()
    with job.making():
        model = base.load().to(device).eval()
        total = 0
        with torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext():
            for split in SPLITS:
                log_probabilities = of_pairs(model, PairRows(pairs, split, counts), f"reference, {split}")
                log_probabilities.numpy().astype("<f8").tofile(directory / f"{split}.logp")
                total += len(log_probabilities)
        job.finish({split: counts[split]["pairs"] for split in SPLITS})
        log.info(f"reference: log-probabilities of {total:,} pairs by {base.checkpoint} -> {directory}")


def load(directory: Path) -> dict[str, Tensor]:
    """Both splits' of a finished directory, (pairs, 2) float64 each. UserError if a file is missing or damaged."""
    stage.finished(directory)
    read = {split: np.fromfile(directory / f"{split}.logp", dtype="<f8").reshape(-1, 2) for split in SPLITS}
    return {split: torch.from_numpy(each.astype(np.float64)) for split, each in read.items()}
