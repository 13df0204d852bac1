"""The reference model's log-probabilities of every pair, computed once and stored."""

#     python pipeline.py configs/tiny.py dpo_reference   ->  runs/tiny/dpo_reference
# `train.logp` and `val.logp` hold two little-endian float64 numbers per pair, in the order of dpo_data: the
# log-probabilities of the chosen and of the rejected answer, in nats, computed in the precision of training.

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import checkpoint
import dpo.data
import machine
import stage
from cli import UserError, log
from data.pack import SPLITS
from dpo.data import PairRows
from dpo.loss import log_probs
from finetune import Base
from model import Transformer
from stage import Stage
from tokenizer import Tokenizer

TOKENS = {"cpu": 8_192, "cuda": 131_072}  # the most tokens per batch


def of_pairs(model: Transformer, pairs: PairRows, name: str) -> Tensor:
    """Log-probabilities of the answers of all pairs, (pairs, 2) float64 on the CPU. UserError if one is not finite."""
    pairs_at_once = max(1, TOKENS.get(model.embed.weight.device.type, TOKENS["cpu"]) // pairs.width)
    values = []

    def read(first: int, size: int) -> int:
        ids, bounds, _ = pairs.read(range(first, min(first + size, pairs.count)))
        values.append(log_probs(model, ids, bounds).cpu())
        return len(ids)

    with torch.inference_mode():
        machine.in_batches(pairs.count, pairs_at_once, read, "pairs", name)
    values = torch.cat(values)
    if not values.isfinite().all():
        what = f"a log-probability of the pairs in {pairs.file} is not finite"
        raise UserError(f"{what}; the weights are damaged, or their training diverged")
    return values


def job(base: Base, pairs: Path, dtype: torch.dtype, directory: Path, command: str) -> Stage:
    """The stage that computes the log-probabilities of the pairs in a directory, with `base` as the reference."""
    # dtype: of matrix products, as in training. The digests bind the numbers to this model and these pairs.
    settings = {"model": base.shape, "begin": base.unseen, "dtype": str(dtype)}
    return Stage(directory, settings, stage.outputs(pairs) | stage.outputs(base.checkpoint), command, __file__)


def build(job: Stage, base: Base, pairs: Path, dtype: torch.dtype, spm: Tokenizer, force: bool = False) -> None:
    """Computes the log-probabilities, unless that is done."""
    checkpoint.must_match(base.checkpoint, spm.sha256)
    if job.up_to_date(force):
        return
    counts = dpo.data.load(pairs, spm.sha256)
    device = machine.pick_device()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as training does
    with job.making():
        model = base.load().to(device).eval()
        with torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext():
            for split in SPLITS:
                values = of_pairs(model, PairRows(pairs, split, counts), f"reference, {split}")
                values.numpy().astype("<f8").tofile(job.directory / f"{split}.logp")
        job.finish({split: counts[split]["pairs"] for split in SPLITS})
        log.info(f"reference: log-probabilities of all pairs by {base.checkpoint} -> {job.directory}")


def load(directory: Path) -> dict[str, Tensor]:
    """The log-probabilities by split, (pairs, 2) float64 each. UserError if a file is missing or damaged."""
    stage.finished(directory)
    stored = {}
    for split in SPLITS:
        stored[split] = torch.from_numpy(np.fromfile(directory / f"{split}.logp", dtype="<f8")).view(-1, 2)
    return stored
