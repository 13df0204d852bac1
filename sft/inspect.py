"""Rows of packed conversations as training sees them.

python -m sft.inspect configs/tiny.py                   # the first rows: trained text is green, or in ⟦ ⟧
python -m sft.inspect configs/tiny.py --first 100       # from that row on
"""

import argparse
import os
import sys

import numpy as np

import cli
import configs
import sft.data
from cli import UserError
from data.pack import SPLITS
from sft.templates import shown


def main(arguments: argparse.Namespace) -> None:
    experiment = configs.load(arguments.config)
    directory, context = experiment.directory("sft_data"), experiment.model.context_length
    spm = experiment.load_tokenizer()
    counts = sft.data.load(directory, spm.sha256)
    rows = sft.data.Rows(directory, arguments.split, counts, context)
    if arguments.first >= rows.count:
        raise UserError(f"{rows.file} has rows 0 to {rows.count - 1:,}; found --first {arguments.first:,}")
    green, plain = "⟦", "⟧"
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        green, plain = "\033[32m", "\033[0m"

    total = counts[arguments.split]
    used = f"{total['packing_efficiency']:.2%} of them used, {total['trained']:,} tokens trained"
    print(f"{rows.file}: {total['conversations']:,} conversations in {rows.count:,} rows of {context:,}, {used}")
    for name, source in total["sources"].items():
        print(f"  {name}: {source['rows']:,} rows from {source['row']:,}")
    origins = (directory / f"{arguments.split}.txt").read_text(encoding="utf-8").splitlines()
    for row in range(arguments.first, min(arguments.first + arguments.rows, rows.count)):
        numbers = rows.documents(row)
        used = int(np.diff(rows.starts)[numbers].sum()) - len(numbers)
        print(f"\nrow {row:,}: {len(numbers)} conversations, {used:,} of {context:,} tokens ({used / context:.1%})")
        for number in numbers:
            print(f"── {number:,} {origins[number]}")
            ids, trained = rows.conversation(number)
            for part in np.split(np.arange(len(ids)), np.flatnonzero(np.diff(trained)) + 1):
                text = shown(ids[part].tolist(), spm)
                print(f"{green}{text}{plain}" if trained[part[0]] else text, end="")
            print()


if __name__ == "__main__":
    p = cli.parser(__doc__)
    p.add_argument("--split", choices=SPLITS, default="train")
    p.add_argument("--first", type=int, default=0, metavar="N", help="the first row shown; default: 0")
    p.add_argument("--rows", type=cli.positive, default=2, metavar="N", help="how many; default: 2")
    cli.run(main, p.parse_args())
