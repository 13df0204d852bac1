"""Near-duplicates: MinHash with locality-sensitive hashing finds candidates, and their Jaccard similarity decides."""

# Broder 1997; Leskovec et al., "Mining of Massive Datasets", chapter 3. Two texts are as similar as their sets of word
# n-grams ("shingles"): J = |A ∩ B| / |A ∪ B|. A random permutation of all shingles has the same minimum over A and over
# B with probability J. The minima under `permutations` permutations are the signature of a text, cut into bands of
# `rows`. Texts that agree in a whole band are compared: that happens with probability 1 - (1 - J^rows)^bands.

import array
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.words import GOLDEN, mix, ngrams
from stage import check_types, sync


@dataclass(frozen=True, kw_only=True)
class Deduplication:
    """When a text counts as a near-duplicate. Raises TypeError or ValueError, naming the field."""

    threshold: float = 0.85  # drops texts that are at least this similar to an earlier text
    ngram: int = 3  # words per shingle
    permutations: int = 128

    def __post_init__(self):
        check_types(self)
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}; expected more than 0, at most 1")
        if min(self.ngram, self.permutations) < 1:
            raise ValueError(f"ngram is {self.ngram}, permutations {self.permutations}; expected at least 1")

    @property
    def rows(self) -> int:
        """Rows per band: the most that still find 99 of 100 pairs with a similarity of exactly `threshold`, or 1."""
        for rows in range(self.permutations, 1, -1):
            if (1 - self.threshold**rows) ** (self.permutations // rows) <= 0.01:
                return rows
        return 1

    @property
    def bands(self) -> int:
        return self.permutations // self.rows


class MinHash:
    """Signatures as band keys. The permutations are x -> a·x + b mod 2³² with odd a, the same in every run."""

    BLOCK = 1024  # shingles at a time: permutations × BLOCK uint32 fit in the cache

    def __init__(self, config: Deduplication):
        self.ngram, self.rows, self.bands = config.ngram, config.rows, config.bands
        rng = np.random.default_rng(0)
        a, self.b = rng.integers(0, 1 << 32, (2, self.bands * self.rows, 1), dtype=np.uint32)
        self.a = a | np.uint32(1)
        self.buffer = np.empty(len(a) * self.BLOCK, np.uint32)
        powers = [pow(int(GOLDEN), i, 1 << 64) for i in range(1, self.rows + 1)]
        self.powers, self.numbers = np.array(powers, np.uint64), np.arange(self.bands, dtype=np.uint64)

    def shingles(self, hashes: np.ndarray) -> np.ndarray:
        """(s,) uint32, sorted: the distinct shingles of a text. A shorter text is one shingle."""
        runs = ngrams(hashes, min(self.ngram, max(1, len(hashes))))
        return np.unique((runs >> np.uint64(32)).astype(np.uint32))

    def signature(self, shingles: np.ndarray) -> np.ndarray:
        """(bands * rows,) uint32: the minimum of the shingles under each permutation."""
        minima = np.full(len(self.a), 0xFFFFFFFF, np.uint32)
        for start in range(0, len(shingles), self.BLOCK):
            block = shingles[start : start + self.BLOCK]
            permuted = self.buffer[: len(self.a) * len(block)].reshape(len(self.a), len(block))
            np.multiply(self.a, block, out=permuted)
            permuted += self.b
            np.minimum(minima, permuted.min(axis=1), out=minima)
        return minima

    def keys(self, shingles: np.ndarray) -> np.ndarray:
        """(bands,) uint64: a number for each band, equal where the whole band is."""
        bands = self.signature(shingles).reshape(self.bands, self.rows)
        return mix((bands * self.powers).sum(axis=1) + self.numbers)


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """The similarity of two sorted arrays without repeats."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / max(1, len(a) + len(b) - both)


class Index:
    """The texts kept so far; finds the text that a new one repeats."""

    # In memory: 12 bytes per key and 8 per text, and at most RECENT keys in a dict. In `directory`: texts.bin with the
    # keys of each text and the end of its shingles, (1 + bands + 1) uint64, and shingles.bin with the shingles, uint32.
    RECENT = 1 << 20

    def __init__(self, config: Deduplication | None, directory: Path, texts: int = 0):
        """texts: how many texts of an earlier index in the directory to keep."""
        self.config, self.width = config, 1 + (config.bands if config else 0)
        self.table = open(directory / "texts.bin", "a+b")  # noqa: SIM115 - closed by __exit__
        self.shingles = open(directory / "shingles.bin", "a+b")  # noqa: SIM115
        self.table.truncate(texts * (self.width + 1) * 8)
        rows = np.fromfile(directory / "texts.bin", np.uint64).reshape(-1, self.width + 1)
        self.ends = array.array("q", [0, *rows[:, -1].tolist()])
        self.shingles.truncate(self.ends[-1] * 4)
        self.recent: dict[int, int] = {}
        self.keys, self.texts = np.empty(0, np.uint64), np.empty(0, np.uint32)
        self._merge(rows[:, :-1].ravel(), np.repeat(np.arange(len(rows), dtype=np.uint32), self.width))

    def __enter__(self) -> "Index":
        return self

    def __exit__(self, *exception) -> None:
        self.table.close()
        self.shingles.close()

    def sync(self) -> int:
        """Writes everything to disk. Returns the number of texts."""
        for file in (self.table, self.shingles):
            file.flush()
            sync(Path(file.name))
        return len(self.ends) - 1

    def duplicate(self, keys: np.ndarray, shingles: np.ndarray) -> str | None:
        """ "duplicate" or "near_duplicate" if a text repeats an earlier one; None if it does not, and adds it."""
        # keys: (1 + bands,) uint64, first the fingerprint of the text. shingles: (s,) uint32, sorted.
        numbers = keys.tolist()
        texts = [self.recent.get(key, -1) for key in numbers]
        if len(self.keys):
            at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
            for i in np.flatnonzero(self.keys[at] == keys):
                texts[i] = int(self.texts[at[i]])
        if texts[0] >= 0:
            return "duplicate"
        for text in sorted(set(texts[1:]) - {-1}):
            if jaccard(shingles, self._shingles(text)) >= self.config.threshold:
                return "near_duplicate"
        number = len(self.ends) - 1
        for key, text in zip(numbers, texts, strict=True):
            if text < 0:
                self.recent[key] = number
        self.ends.append(self.ends[-1] + len(shingles))
        self.table.write(np.append(keys, np.uint64(self.ends[-1])).tobytes())
        self.shingles.write(shingles.tobytes())
        if len(self.recent) > self.RECENT:
            recent = np.fromiter(self.recent.keys(), np.uint64), np.fromiter(self.recent.values(), np.uint32)
            self._merge(*recent)
            self.recent.clear()
        return None

    def _shingles(self, text: int) -> np.ndarray:
        start, end = self.ends[text], self.ends[text + 1]
        self.shingles.flush()
        return np.frombuffer(os.pread(self.shingles.fileno(), (end - start) * 4, start * 4), np.uint32)

    def _merge(self, keys: np.ndarray, texts: np.ndarray) -> None:
        """Adds keys to the sorted keys. Of equal keys the first stays."""
        keys, texts = np.concatenate([self.keys, keys]), np.concatenate([self.texts, texts])
        self.keys, first = np.unique(keys, return_index=True)
        self.texts = texts[first]
