"""Near-duplicates: MinHash with locality-sensitive hashing (Broder 1997; Leskovec et al., "Mining of Massive Datasets",
chapter 3) finds which earlier texts one may be a copy of, and their true Jaccard similarity decides.

Two texts are as similar as their sets of word n-grams ("shingles"): J = |A ∩ B| / |A ∪ B|. A random permutation of all
shingles has the same minimum over A and over B with probability J. The minima under `permutations` permutations are the
signature of a text; it is cut into bands of `rows`, and texts that agree in a whole band, which happens with
probability 1 - (1 - J^rows)^bands, are compared.
"""

import array
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.words import GOLDEN, mix, ngrams
from stage import check_types, sync


@dataclass(frozen=True, kw_only=True)
class Deduplication:
    """What counts as a near-duplicate. Raises TypeError or ValueError, naming the field, for what cannot be."""

    threshold: float = 0.85
    """Texts at least this similar to an earlier one are dropped."""
    ngram: int = 3
    """Words a shingle."""
    permutations: int = 128

    def __post_init__(self):
        check_types(self)
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}; expected more than 0, at most 1")
        if self.ngram < 1:
            raise ValueError(f"ngram is {self.ngram}; expected at least 1")
        if self.permutations < 1:
            raise ValueError(f"permutations is {self.permutations}; expected at least 1")

    @property
    def rows(self) -> int:
        """Rows a band: the most with which a pair just at the threshold is still compared 99 times in 100, or 1."""

        def found(rows: int) -> float:
            return 1 - (1 - self.threshold**rows) ** (self.permutations // rows)

        return max((r for r in range(1, self.permutations + 1) if found(r) >= 0.99), default=1)


class MinHash:
    """Signatures, as band keys. The permutations are x -> a·x + b mod 2³², a odd: fixed, so that runs agree."""

    BLOCK = 1024  # shingles at a time: permutations × BLOCK uint32 stay in the cache

    def __init__(self, config: Deduplication):
        self.config, self.rows = config, config.rows
        self.bands = config.permutations // self.rows
        rng = np.random.default_rng(0)
        a, b = rng.integers(0, 1 << 32, (2, self.bands * self.rows, 1), dtype=np.uint32)
        self.a, self.b = a | np.uint32(1), b
        self.buffer = np.empty(len(a) * self.BLOCK, dtype=np.uint32)
        powers = [pow(int(GOLDEN), i, 1 << 64) for i in range(1, self.rows + 1)]
        self.powers, self.numbers = np.array(powers, dtype=np.uint64), np.arange(self.bands, dtype=np.uint64)

    def shingles(self, hashes: np.ndarray) -> np.ndarray:
        """(s,) uint32, sorted: the distinct shingles of a text; one that is shorter than a shingle is one itself."""
        runs = ngrams(hashes, min(self.config.ngram, max(1, len(hashes))))
        found = (runs >> np.uint64(32)).astype(np.uint32)
        found.sort()
        return found[np.append(True, found[1:] != found[:-1])] if len(found) else found

    def signature(self, shingles: np.ndarray) -> np.ndarray:
        """(bands * rows,) uint32: the minimum of the shingles under each permutation."""
        minima = np.full(len(self.a), 0xFFFFFFFF, dtype=np.uint32)
        for start in range(0, len(shingles), self.BLOCK):
            block = shingles[start : start + self.BLOCK]
            permuted = self.buffer[: len(self.a) * len(block)].reshape(len(self.a), len(block))
            np.multiply(self.a, block, out=permuted)
            permuted += self.b
            np.minimum(minima, permuted.min(axis=1), out=minima)
        return minima

    def keys(self, shingles: np.ndarray) -> np.ndarray:
        """(bands,) uint64: one number a band, equal where the whole band is."""
        bands = self.signature(shingles).reshape(self.bands, self.rows)
        return mix((bands * self.powers).sum(axis=1) + self.numbers)


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Of two sorted arrays without repeats."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / max(1, len(a) + len(b) - both)


class Index:
    """The texts kept so far, and which of them a new one repeats.

    In memory: 12 bytes a key and 8 a text, 212 a text with 16 bands, and at most RECENT keys more in a dict (some 120
    MB). On disk, in `directory`: the keys and 4 bytes a shingle. What is there can be gone on from.
    """

    RECENT = 1 << 20

    def __init__(self, config: Deduplication | None, directory: Path, size: tuple[int, int] = (0, 0)):
        """size: (texts, shingles) of an earlier index in the directory to go on from; later ones are forgotten."""
        self.config, self.width = config, self._width(config)
        texts, _ = size
        sizes = self.sizes(config, size)
        self.files = [open(directory / name, "a+b") for name in sizes]  # noqa: SIM115 - closed by __exit__
        for file, length in zip(self.files, sizes.values(), strict=True):
            file.truncate(length)
        self.ends = array.array("q", os.pread(self.files[1].fileno(), texts * 8, 0))
        self.recent: dict[int, int] = {}
        self.keys, self.texts = np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.uint32)
        keys = np.fromfile(directory / "keys.bin", dtype=np.uint64)
        self._merge(keys, np.repeat(np.arange(texts, dtype=np.uint32), self.width))

    def __enter__(self) -> "Index":
        return self

    def __exit__(self, *exception) -> None:
        for file in self.files:
            file.close()

    @staticmethod
    def _width(config: Deduplication | None) -> int:
        return 1 + (config.permutations // config.rows if config else 0)

    @classmethod
    def sizes(cls, config: Deduplication | None, size: tuple[int, int]) -> dict[str, int]:
        """Its files, and the bytes that an index of a size has in them."""
        texts, shingles = size
        return {"keys.bin": texts * cls._width(config) * 8, "ends.bin": texts * 8, "shingles.bin": shingles * 4}

    def sync(self) -> tuple[int, int]:
        """Puts everything on disk; returns the size to go on from."""
        for file in self.files:
            file.flush()
            sync(Path(file.name))
        return len(self.ends), self.ends[-1] if self.ends else 0

    def duplicate(self, keys: np.ndarray, shingles: np.ndarray) -> str | None:
        """Whether a text is a "duplicate" or "near_duplicate" of an earlier one; if not, None, and it is kept in mind.

        keys: (1 + bands,) uint64, the first the text's own fingerprint. shingles: (s,) uint32, sorted.
        """
        listed = keys.tolist()
        if len(self.keys):
            at = np.searchsorted(self.keys, keys)
            at[at == len(self.keys)] = 0
            merged = np.where(self.keys[at] == keys, self.texts[at].astype(np.int64), -1).tolist()
        else:
            merged = [-1] * len(listed)
        found = [self.recent.get(key, text) if text < 0 else text for key, text in zip(listed, merged, strict=True)]
        if found[0] >= 0:
            return "duplicate"
        for text in sorted({text for text in found[1:] if text >= 0}):
            if jaccard(shingles, self._shingles(text)) >= self.config.threshold:
                return "near_duplicate"
        new = [key for key, text in zip(listed, found, strict=True) if text < 0]
        self.recent.update(dict.fromkeys(new, len(self.ends)))
        for file, values in zip(self.files, (keys, self._end(shingles), shingles), strict=True):
            file.write(values.tobytes())
        if len(self.recent) > self.RECENT:
            self._merge(
                np.fromiter(self.recent.keys(), np.uint64, len(self.recent)),
                np.fromiter(self.recent.values(), np.uint32, len(self.recent)),
            )
            self.recent.clear()
        return None

    def _end(self, shingles: np.ndarray) -> np.ndarray:
        self.ends.append((self.ends[-1] if self.ends else 0) + len(shingles))
        return np.array(self.ends[-1], dtype=np.int64)

    def _shingles(self, text: int) -> np.ndarray:
        start = self.ends[text - 1] if text else 0
        self.files[2].flush()
        return np.frombuffer(os.pread(self.files[2].fileno(), (self.ends[text] - start) * 4, start * 4), np.uint32)

    def _merge(self, keys: np.ndarray, texts: np.ndarray) -> None:
        """Takes keys into the sorted ones; of equal keys the first stays."""
        keys, texts = np.concatenate([self.keys, keys]), np.concatenate([self.texts, texts])
        self.keys, first = np.unique(keys, return_index=True)
        self.texts = texts[first]
