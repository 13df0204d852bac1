"""Packed tokens as text: documents with their boundaries, and any batch as training sees it.

python -m data.inspect configs/tiny.py                    # sizes, the first documents, the first batch
python -m data.inspect configs/tiny.py --step 1000        # the batch of that step
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

SIZES = "documents {documents:,}, tokens {tokens:,}, bytes {bytes:,}"


def show(ids: np.ndarray, spm: Tokenizer, chars: int) -> str:
    """The text of ids on one line, cut to `chars`; ⟨end⟩ where a document ends."""
    text = ""
    for part in np.split(ids, np.flatnonzero(ids == spm.eos) + 1):
        text += spm.decode(part.tolist()).replace("\n", "⏎")
        text += "⟨end⟩" if spm.eos in part else ""
    return text if len(text) <= chars else f"{text[:chars]}… ({len(text):,} characters)"


def main(arguments: argparse.Namespace) -> None:
    experiment = configs.load(arguments.config)
    spm, first, chars = experiment.load_tokenizer(), arguments.first, arguments.chars
    splits = data.pack.load(experiment.directory("pack"), spm.sha256)
    for split in splits.values():
        print(f"{split.name}:", SIZES.format_map(split.counts))
        for name, counts in split.counts["sources"].items():
            print(f"  {name}, from token {counts['start']:,}:", SIZES.format_map(counts))

    packed = splits[arguments.split]
    if first >= len(packed.starts):
        raise UserError(f"{packed.name} has documents 0 to {len(packed.starts) - 1:,}; found --first {first:,}")
    print(f"\ndocuments of {packed.name}")
    for number, ids in itertools.islice(enumerate(packed.documents()), first, first + arguments.documents):
        start = packed.starts[number]
        print(f"{number:,} [{start:,} to {start + len(ids):,}) {show(ids, spm, chars)}")

    others = {}
    for other in experiment.beside:
        others[other.name] = data.pack.load(other.directory("pack"), spm.sha256)["train"]
    config, length, phases = experiment.pretrain, experiment.model.context_length, experiment.mixture
    batches = mixture(experiment.name, phases, splits["train"], others, length, config.batch_size, config.seed)
    print(f"\nbatch of step {arguments.step:,} (counted from 0), rows: {batches.size}")
    for row in range(min(arguments.rows, batches.size)):
        name, window = batches.drawn(arguments.step * batches.size + row)
        inputs, targets = (tensor[0].numpy() for tensor in batches.sets[name].read([window]))
        print(f"row {row}: {name}, window {window:,}, documents whole or in part: {1 + (inputs == spm.eos).sum()}")
        print(f"  {show(inputs, spm, chars)}")
        print(f"  the last target: {show(targets[-1:], spm, chars)!r}")


if __name__ == "__main__":
    p = cli.parser(__doc__)
    p.add_argument("--split", choices=data.pack.SPLITS, default="train")
    p.add_argument("--first", type=int, default=0, metavar="N", help="the first document shown; default: 0")
    p.add_argument("--documents", type=int, default=3, metavar="N", help="how many; default: 3")
    p.add_argument("--step", type=int, default=0, metavar="N", help="the batch shown; default: 0")
    p.add_argument("--rows", type=int, default=2, metavar="N", help="how many of its rows; default: 2")
    p.add_argument("--chars", type=cli.positive, default=500, metavar="N", help="of each text; default: 500")
    cli.run(main, p.parse_args())
