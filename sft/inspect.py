"""Rows of packed conversations as training sees them.

python -m sft.inspect configs/tiny.py                   # the first rows: trained text is green, or in ⟦ ⟧
python -m sft.inspect configs/tiny.py --first 100       # from that row on
"""

import argparse
import itertools
import os
import sys

import cli
import configs
import sft.data
from cli import UserError
from data.inspect import count
from data.pack import SPLITS
from sft.templates import shown


def main(arguments: argparse.Namespace) -> None:
    experiment = configs.load(arguments.config)
    spm, directory = experiment.load_tokenizer(), experiment.directory("sft_data")
    counts, context = sft.data.load(directory, spm.sha256), experiment.model.context_length
    rows = sft.data.Rows(directory, arguments.split, counts, context)
    origins = (directory / f"{arguments.split}.txt").read_text(encoding="utf-8").splitlines()
    if arguments.first >= rows.count:
        raise UserError(f"{rows.file} has rows 0 to {rows.count - 1:,}; found --first {arguments.first:,}")
    green, plain = ("\033[32m", "\033[0m") if sys.stdout.isatty() and "NO_COLOR" not in os.environ else ("⟦", "⟧")

    total = counts[arguments.split]
    print(f"{rows.file}: {total['conversations']:,} conversations in {rows.count:,} rows of {context:,}, ", end="")
    print(f"{total['packing_efficiency']:.2%} of them used, {total['trained']:,} tokens trained")
    for name, source in total["sources"].items():
        print(f"  {name}: rows {source['row']:,} to {source['row'] + source['rows'] - 1:,}")
    for row in range(arguments.first, min(arguments.first + arguments.rows, rows.count)):
        numbers, at = rows.documents(row), 0
        used = rows.starts[numbers.stop] - rows.starts[numbers.start] - len(numbers)
        print(f"\nrow {row:,}: {len(numbers)} conversations, {used:,} of {context:,} tokens ({used / context:.1%})")
        for number in numbers:
            ids, trained = rows.conversation(number)
            print(f"── {number:,} [{at:,} to {at + len(ids) - 1:,}) {origins[number]}")
            for learnt, part in itertools.groupby(zip(ids.tolist(), trained, strict=True), key=lambda pair: pair[1]):
                text = shown([token for token, _ in part], spm)
                text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
                print(f"{green}{text}{plain}" if learnt else text, end="")
            print()
            at += len(ids) - 1


if __name__ == "__main__":
    p = cli.parser(__doc__)
    p.add_argument("--split", choices=SPLITS, default="train")
    p.add_argument("--first", type=count, default=0, metavar="N", help="the first row shown; default: 0")
    p.add_argument("--rows", type=cli.positive, default=2, metavar="N", help="how many; default: 2")
    cli.run(main, p.parse_args())
