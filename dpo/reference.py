"""What the reference thinks of every pair: its log-probabilities, computed once and kept.

    python -m dpo.reference configs/tiny.py   ->  runs/tiny/dpo_reference

`train.logp` and `val.logp` hold two little-endian float64 numbers a pair, in the order of dpo_data: the log-probability
of the chosen and of the rejected answer, in nats. They are bound to the digests of the model and of the pairs: made
anew if asked to, never used for others.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import checkpoint
import dpo.data
import machine
import stage
from data.pack import SPLITS
from dpo.data import PairRows
from dpo.loss import log_probs
from model import Transformer
from sft import lora
from sft.train import load_base, unseen
from stage import Stage, UserError, log, progress

PAIRS = {"cpu": 8, "cuda": 64}  # read at once


def of_pairs(model: Transformer, pairs: PairRows, name: str) -> Tensor:
    """log-probabilities of the answers of all pairs, (pairs, 2) float64 on the CPU. UserError if one is not finite."""
    size = PAIRS[model.embed.weight.device.type]
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
    settings = {"model": experiment.model, "begin": unseen(experiment, base)}
    job = Stage(directory, settings, stage.outputs(pairs) | stage.outputs(base), make)
    if job.up_to_date(force):
        return directory
    spm, config = experiment.load_tokenizer(base), experiment.dpo.train
    counts = dpo.data.load(pairs, spm.sha256, f"python -m dpo.data {experiment.path}")
    with job.making():
        device = machine.pick_device()
        dtype = machine.pick_dtype(device, config.precision)
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


@contextmanager
def standing_in(model: nn.Module, load: Callable[[], nn.Module]) -> Iterator[nn.Module]:
    """The reference for the length of a block: the model without its adapter or, if it has none, what `load` gives."""
    if lora.layers(model):
        with lora.without(model):
            yield model
    else:
        yield load()


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
