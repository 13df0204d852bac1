"""The rule that holds out text for validation, the same for the tokenizer, packed tokens, conversations and pairs."""

# A document is held out if the hash of its beginning is below a threshold. So the decision does not depend on other
# documents. If few documents all fall on one side, the threshold moves until one of them is on the other side. If there
# is only one document, or the one held out has more than half of the text, the last part of every document is held out.

import hashlib
import math
from collections.abc import Iterable
from typing import NamedTuple

from data.sections import cut


def split_hash(text: bytes) -> int:
    """The number that decides whether a document is held out, 0 to 2**64 - 1: a hash of its first 4,096 bytes."""
    return int.from_bytes(hashlib.sha256(text[:4096]).digest()[:8])


def threshold(hashes: Iterable[int], fraction: float) -> int | None:
    """The threshold below which about `fraction` of the documents are held out, at least one and not all."""
    # None if no threshold separates the documents: there is only one, or all begin alike.
    usual, lowest, highest = math.ceil(fraction * 2**64), 2**64, -1
    for number in hashes:
        lowest, highest = min(lowest, number), max(highest, number)
        if lowest < usual <= highest:
            return usual
    if lowest >= highest:
        return None
    return lowest + 1 if lowest >= usual else highest


class Holdout(NamedTuple):
    """The rule for one corpus."""

    fraction: float
    threshold: int | None  # from `threshold`; None cuts every document

    def split(self, text: str) -> tuple[str, str]:
        """The parts of a document for training and for validation; one of them is usually empty."""
        if self.threshold is None:
            return cut(text, self.fraction)
        return ("", text) if split_hash(text.encode()) < self.threshold else (text, "")
