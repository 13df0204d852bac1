"""A text as words, and runs of words as numbers: what quality, deduplication and decontamination compare."""

import re
import zlib

import numpy as np

OTHER = re.compile(r"\W+")
# Odd 64-bit constants with no pattern in their bits: the golden ratio's, and a mixing step's (splitmix64).
GOLDEN, MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)


def words(text: str) -> list[bytes]:
    """Runs of letters, digits and _, in lower case, as UTF-8."""
    return OTHER.sub(" ", text.lower()).encode().split()


def hashes(words: list[bytes]) -> np.ndarray:
    """(n,) uint64: the CRC-32 of each word."""
    return np.fromiter(map(zlib.crc32, words), np.uint64, len(words))


def mix(x: np.ndarray) -> np.ndarray:
    """Spreads every bit of each uint64 over all the others, in place."""
    x ^= x >> np.uint64(32)
    x *= MIX
    x ^= x >> np.uint64(29)
    x *= MIX
    x ^= x >> np.uint64(32)
    return x


def ngrams(hashes: np.ndarray, n: int) -> np.ndarray:
    """(max(0, words - n + 1),) uint64: a number for each run of n words, equal for equal runs."""
    count = max(0, len(hashes) - n + 1)
    runs = hashes[:count].copy()
    for i in range(1, n):
        runs *= GOLDEN
        runs += hashes[i : i + count]
    return mix(runs)
