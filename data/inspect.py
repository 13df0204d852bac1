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
        inputs, targets = batches.sets[name].read([window])
        ids = inputs[0].numpy()
        print(f"row {row}: {name}, window {window:,}, documents whole or in part: {1 + ids.tolist().count(spm.eos)}")
        print(" ", show(ids, spm, chars))
        print("  the last target:", repr(show(targets[0, -1:].numpy(), spm, chars)))


if __name__ == "__main__":
    p = cli.parser(__doc__)
    p.add_argument("--split", choices=data.pack.SPLITS, default="train", help="default: train")
    for name, default, about in (
        ("first", 0, "the first document shown"),
        ("documents", 3, "how many documents"),
        ("step", 0, "the step whose batch is shown"),
        ("rows", 2, "how many rows of the batch"),
        ("chars", 500, "how many characters of each text"),
    ):
        p.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{about}; default: {default}")
    cli.run(main, p.parse_args())
