"""Shows training data as text: rows of packed conversations, or pairs. In a file, brackets replace the colours.

python -m sft.inspect configs/tiny.py                   # the first rows: trained text is green, or in ⟦ ⟧
python -m sft.inspect configs/tiny.py --first 100       # from that row on
python -m sft.inspect configs/tiny.py --pairs           # pairs: chosen is green or in ⟦ ⟧, rejected red or in ⟪ ⟫
Next: python pipeline.py configs/tiny.py sft
"""

import argparse
import itertools
import os
import sys
from collections.abc import Iterator

import numpy as np

import cli
import configs
import sft.data
from cli import UserError
from data.pack import SPLITS
from dpo.data import PairRows
from sft.data import Rows
from sft.templates import shown


def parts(rows: Rows | PairRows, number: int) -> Iterator[tuple[np.ndarray, int]]:
    """The ids of a conversation or pair, part by part. Each with 0, or 1 if it is trained or chosen, 2 if rejected."""
    if isinstance(rows, PairRows):
        for kind, (start, end) in enumerate(itertools.pairwise(rows.bounds[number])):
            yield rows.tokens[start:end], kind
        return
    ids, trained = rows.conversation(number)
    starts = [0, *np.flatnonzero(np.diff(trained)) + 1, len(ids)]
    for start, end in itertools.pairwise(starts):
        yield ids[start:end], int(trained[start])


def main(arguments: argparse.Namespace) -> None:
    experiment = configs.load(arguments.config)
    directory = experiment.directory("dpo_data" if arguments.pairs else "sft_data")
    spm, split, context = experiment.load_tokenizer(), arguments.split, experiment.model.context_length
    counts = sft.data.load(directory, spm.sha256)
    rows = PairRows(directory, split, counts) if arguments.pairs else Rows(directory, split, counts, context)
    if arguments.first >= rows.count:
        raise UserError(f"{rows.file} has rows 0 to {rows.count - 1:,}; found --first {arguments.first:,}")
    print(rows.file)
    for name, value in counts[split].items():
        print(f"{name}: {value}")
    before, after = ("", "⟦", "⟪"), ("", "⟧", "⟫")
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        before, after = ("", "\033[32m", "\033[31m"), ("", "\033[0m", "\033[0m")
    origins = (directory / f"{split}.txt").read_text(encoding="utf-8").splitlines()
    for row in range(arguments.first, min(arguments.first + arguments.rows, rows.count)):
        print(f"\nrow {row:,}")
        for number in rows.documents(row):
            print(f"── {number:,} {origins[number]}")
            for ids, kind in parts(rows, number):
                print(before[kind] + shown(ids.tolist(), spm) + after[kind], end="")
            print()


if __name__ == "__main__":
    p = cli.parser(__doc__)
    p.add_argument("--pairs", action="store_true", help="show the pairs of dpo_data")
    p.add_argument("--split", choices=SPLITS, default="train", help="default: train")
    p.add_argument("--first", type=int, default=0, metavar="N", help="the first row shown; default: 0")
    p.add_argument("--rows", type=cli.positive, default=2, metavar="N", help="how many; default: 2")
    cli.run(main, p.parse_args())
