"""A text as words, and runs of words as numbers, for quality, deduplication and decontamination."""

import hashlib
import re
import zlib

import numpy as np

OTHER = re.compile(r"[^\w\x00-\x7f]+")  # characters beyond ASCII that are no letters or digits
SPACED = bytes(c if c >= 0x80 or chr(c).isalnum() or c == ord("_") else ord(" ") for c in range(256))
# Odd 64-bit constants without a pattern in their bits: of the golden ratio, and of a mixing step of splitmix64.
GOLDEN, MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)


def words(text: str) -> list[bytes]:
    """Runs of letters, digits and _, in lower case, as UTF-8."""
    text = text.lower() if text.isascii() else OTHER.sub(" ", text.lower())
    return text.encode(errors="replace").translate(SPACED).split()


def fingerprint(words: list[bytes]) -> np.ndarray:
    """(1,) uint64: equal for equal words."""
    return np.frombuffer(hashlib.sha256(b" ".join(words)).digest()[:8], np.uint64)


def hashes(words: list[bytes]) -> np.ndarray:
    """(n,) uint64: the CRC-32 of each word."""
    return np.fromiter(map(zlib.crc32, words), np.uint64, len(words))


def mix(x: np.ndarray) -> np.ndarray:
    """Spreads every bit of each uint64 over all the others, in place."""
    for shift in (32, 29):
        x ^= x >> np.uint64(shift)
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
