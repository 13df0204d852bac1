"""What the reference thinks of every pair: its log-probabilities, computed once and kept.

    python -m dpo.reference configs/tiny.py   ->  runs/tiny/dpo_reference

`train.logp` and `val.logp` hold two little-endian float64 numbers a pair, in the order of dpo_data: the log-probability
of the chosen and of the rejected answer, in nats, computed in the precision of training. They are bound to the digests
of the model and of the pairs: made anew if asked to, never used for others.
"""

import argparse
import shlex
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import checkpoint
import dpo.data
import machine
import stage
from data.pack import SPLITS
from dpo.data import PairRows
from dpo.loss import log_probs
from model import Transformer
from sft.train import load_base, unseen
from stage import Stage, UserError, log, progress

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


def build(experiment, base: Path, workers: int = 1, force: bool = False) -> Path:
    """Computes them, unless they are there. Returns their directory. UserError if they are of another model or of other
    pairs."""
    pairs = dpo.data.build(experiment, workers)
    directory, make = experiment.directory("dpo_reference"), f"python -m dpo.reference {experiment.path}"
    if base != experiment.directory("sft") / "final":
        make += f" --checkpoint {shlex.quote(str(base))}"
    device = machine.pick_device()
    dtype = machine.training_dtype(device, experiment.dpo.train)
    settings = {"model": experiment.model, "begin": unseen(experiment, base), "dtype": str(dtype)}
    job = Stage(directory, settings, stage.outputs(pairs) | stage.outputs(base), make)
    if job.up_to_date(force):
        return directory
    spm = experiment.load_tokenizer(base)
    counts = dpo.data.load(pairs, spm.sha256, f"python -m dpo.data {experiment.path}")
    with job.making():
        model = load_base(experiment, base).to(device).eval()
        with torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext():
            found = {split: of_pairs(model, PairRows(pairs, split, counts), f"reference, {split}") for split in SPLITS}
        for split, each in found.items():
            each.numpy().astype("<f8").tofile(directory / f"{split}.logp")
        job.finish({split: len(each) for split, each in found.items()})
        log.info(f"reference: log-probabilities of {sum(map(len, found.values())):,} pairs by {base} -> {directory}")
    return directory


def load(directory: Path, make: str) -> dict[str, Tensor]:
    """Both splits' of a finished directory, (pairs, 2) float64 each. UserError if a file is missing or damaged."""
    stage.finished(directory, make)
    read = {split: np.fromfile(directory / f"{split}.logp", dtype="<f8").reshape(-1, 2) for split in SPLITS}
    return {split: torch.from_numpy(each.astype(np.float64)) for split, each in read.items()}


def main(arguments: argparse.Namespace) -> None:
    import configs

    experiment = configs.load(arguments.config)
    base = Path(arguments.checkpoint) if arguments.checkpoint else experiment.trained("sft")
    checkpoint.must_match(base, experiment.load_tokenizer(base).sha256)
    log.info(f"{build(experiment, base, stage.workers(arguments), arguments.force)} is up to date")


if __name__ == "__main__":
    from dpo.reference import main  # the module that configs import, not this second copy of it

    p = stage.parser(__doc__, makes=True, many=True)
    p.add_argument("--checkpoint", metavar="DIR", help="the reference by path, instead of the fine-tuned model")
    stage.run(main, p.parse_args())
