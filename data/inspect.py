"""Packed tokens as text: documents with their boundaries, and any batch as training sees it.

python -m data.inspect configs/tiny.py                    # sizes, the first documents, the first batch
python -m data.inspect configs/tiny.py --step 1000        # the batch of that step
"""

import argparse

import numpy as np

import cli
import configs
import data.pack
from cli import UserError
from data.batches import mixture

END = "⟨end⟩"  # where a document ends


def main(arguments: argparse.Namespace) -> None:
    experiment = configs.load(arguments.config)
    spm = experiment.load_tokenizer()

    def load(other):
        return data.pack.load(other.directory("pack"), spm.sha256)

    def show(ids: np.ndarray) -> str:
        """The text of ids, on one line, cut to --chars."""
        parts = np.split(ids, np.flatnonzero(ids == spm.eos) + 1)
        text = "".join(spm.decode(part.tolist()) + END * bool(len(part) and part[-1] == spm.eos) for part in parts)
        text = text.replace("\n", "⏎")
        return text if len(text) <= arguments.chars else f"{text[: arguments.chars]}… ({len(text):,} characters)"

    splits = load(experiment)
    for packed in splits.values():
        print(f"{packed.name}: {len(packed.tokens):,} tokens, {len(packed.starts):,} documents, {packed.bytes:,} bytes")
        for source, counts in packed.counts["sources"].items():
            print(
                f"  {source}: {counts['tokens']:,} tokens, {counts['documents']:,} documents from {counts['start']:,}"
            )

    packed = splits[arguments.split]
    ends = [*packed.starts[1:], len(packed.tokens)]
    if arguments.first >= len(ends):
        raise UserError(f"{packed.name} has documents 0 to {len(ends) - 1:,}; found --first {arguments.first:,}")
    print(f"\ndocuments of {packed.name}")
    for number in range(arguments.first, min(arguments.first + arguments.documents, len(ends))):
        start, end = packed.starts[number], ends[number]
        print(f"{number:,} [{start:,} to {end:,}) {show(packed.tokens[start:end])}")

    others = {other.name: load(other)["train"] for other in experiment.beside}
    config, length = experiment.pretrain, experiment.model.context_length
    batches = mixture(
        experiment.name, experiment.mixture, splits["train"], others, length, config.batch_size, config.seed
    )
    print(f"\nbatch of step {arguments.step:,} (counted from 0), {batches.size} rows")
    for row in range(min(arguments.rows, batches.size)):
        name, window = batches.drawn(arguments.step * batches.size + row)
        inputs, targets = (t[0].numpy() for t in batches.sets[name].read([window]))
        print(f"row {row}: {name}, window {window:,}, {1 + (inputs == spm.eos).sum()} documents or parts")
        print(f"  {show(inputs)}")
        print(f"  the last target: {show(targets[-1:])!r}")


def count(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


if __name__ == "__main__":
    p = cli.parser(__doc__)
    p.add_argument("--split", choices=data.pack.SPLITS, default="train")
    p.add_argument("--first", type=count, default=0, metavar="N", help="the first document shown; default: 0")
    p.add_argument("--documents", type=count, default=3, metavar="N", help="how many; default: 3")
    p.add_argument("--step", type=count, default=0, metavar="N", help="whose batch is shown; default: 0")
    p.add_argument("--rows", type=count, default=2, metavar="N", help="how many of its rows; default: 2")
    p.add_argument("--chars", type=cli.positive, default=500, metavar="N", help="of each text; default: 500")
    cli.run(main, p.parse_args())
