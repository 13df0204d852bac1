"""Shows packed tokens as text: documents with their boundaries, and any batch as training sees it.

python -m data.inspect configs/tiny.py                    # sizes, the first documents, the first batch
python -m data.inspect configs/tiny.py --step 1000        # the batch of that step
Next: python train.py configs/tiny.py
"""

import argparse
import itertools

import numpy as np

import cli
import configs
import data.pack
from cli import UserError
from data.batches import mixture
from tokenizer import Tokenizer

DOCUMENTS, CHARS = 3, 500  # how many documents are shown; the most characters of a text
SIZES = "documents {documents:,}, tokens {tokens:,}, bytes {bytes:,}"


def show(ids: np.ndarray, spm: Tokenizer) -> str:
    """The text of ids on one line, cut to CHARS; ⟨end⟩ where a document ends."""
    text = ""
    for part in np.split(ids, np.flatnonzero(ids == spm.eos) + 1):
        text += spm.decode(part.tolist()).replace("\n", "⏎")
        text += "⟨end⟩" if spm.eos in part else ""
    return text if len(text) <= CHARS else f"{text[:CHARS]}… ({len(text):,} characters)"


def main(arguments: argparse.Namespace) -> None:
    experiment = configs.load(arguments.config)
    spm, first = experiment.load_tokenizer(), arguments.first
    splits = data.pack.load(experiment.directory("pack"), spm.sha256)
    for split in splits.values():
        print(f"{split.name}:", SIZES.format_map(split.counts))
        for name, counts in split.counts["sources"].items():
            print(f"  {name}, from token {counts['start']:,}:", SIZES.format_map(counts))

    packed = splits[arguments.split]
    if first >= len(packed.starts):
        raise UserError(f"{packed.name} has documents 0 to {len(packed.starts) - 1:,}; found --first {first:,}")
    print(f"\ndocuments of {packed.name}")
    for number, ids in itertools.islice(enumerate(packed.documents()), first, first + DOCUMENTS):
        start = packed.starts[number]
        print(f"{number:,} [{start:,} to {start + len(ids):,}) {show(ids, spm)}")

    others = {}
    for other in experiment.beside:
        others[other.name] = data.pack.load(other.directory("pack"), spm.sha256)["train"]
    config, length, phases = experiment.pretrain, experiment.model.context_length, experiment.mixture
    batches = mixture(experiment.name, phases, splits["train"], others, length, config.batch_size, config.seed)
    print(f"\nbatch of step {arguments.step:,} (counted from 0), rows: {batches.size}")
    for row in range(min(arguments.rows, batches.size)):
        name, window = batches.drawn(arguments.step * batches.size + row)
        inputs, targets = batches.sets[name].read([window])
        ids = inputs[0].numpy()
        print(f"row {row}: {name}, window {window:,}, documents whole or in part: {1 + ids.tolist().count(spm.eos)}")
        print(" ", show(ids, spm))
        print("  the last target:", repr(show(targets[0, -1:].numpy(), spm)))


if __name__ == "__main__":
    p = cli.parser(__doc__)
    p.add_argument("--split", choices=data.pack.SPLITS, default="train", help="default: train")
    p.add_argument("--first", type=int, default=0, metavar="N", help="the first document shown; default: 0")
    p.add_argument("--step", type=int, default=0, metavar="N", help="the step whose batch is shown; default: 0")
    p.add_argument("--rows", type=int, default=2, metavar="N", help="how many rows of the batch; default: 2")
    cli.run(main, p.parse_args())
