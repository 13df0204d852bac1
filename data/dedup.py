"""Near-duplicates: MinHash with locality-sensitive hashing finds candidates, and their Jaccard similarity decides."""

# Leskovec et al., "Mining of Massive Datasets", chapter 3. Two texts are as similar as their sets of word n-grams
# ("shingles"): J = |A ∩ B| / |A ∪ B|. A random permutation of all shingles has the same minimum over A and over B with
# probability J. The minima under `permutations` permutations are the signature of a text, cut into bands of `rows`.
# Texts that agree in a whole band are compared: that happens with probability 1 - (1 - J^rows)^bands.

import json
import sqlite3
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.words import GOLDEN, mix, ngrams
from stage import check_types

RECENT = 1 << 19  # keys in a dictionary, about 60 MB, before they join the sorted keys


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


class MinHash:
    """Signatures as band keys. The permutations are x -> a·x + b mod 2³² with odd a, the same in every run."""

    def __init__(self, config: Deduplication):
        # The most rows per band that still find 99 of 100 pairs whose similarity is exactly `threshold`.
        self.ngram, rows = config.ngram, config.permutations
        while rows > 1 and (1 - config.threshold**rows) ** (config.permutations // rows) > 0.01:
            rows -= 1
        self.bands = config.permutations // rows
        a, self.b = np.random.default_rng(0).integers(0, 1 << 32, (2, self.bands * rows, 1), dtype=np.uint32)
        self.a = a | np.uint32(1)
        self.powers = np.cumprod(np.full(rows, GOLDEN))  # mod 2⁶⁴
        self.numbers = np.arange(self.bands, dtype=np.uint64)

    def shingles(self, hashes: np.ndarray) -> np.ndarray:
        """(s,) uint32, sorted: the distinct shingles of a text. A text of fewer words is one shingle."""
        runs = ngrams(hashes, min(self.ngram, max(1, len(hashes))))
        return np.unique((runs >> np.uint64(32)).astype(np.uint32))

    def signature(self, shingles: np.ndarray) -> np.ndarray:
        """(bands * rows,) uint32: the minimum of the shingles under each permutation."""
        permuted = self.a * shingles  # (bands * rows, s)
        permuted += self.b
        return permuted.min(axis=1, initial=0xFFFFFFFF)

    def keys(self, shingles: np.ndarray) -> np.ndarray:
        """(bands,) uint64: a number for each band. Equal bands have equal numbers."""
        bands = self.signature(shingles).reshape(self.bands, -1)
        return mix((bands * self.powers).sum(axis=1) + self.numbers)


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """The similarity of two sorted arrays without repeats."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / max(1, len(a) + len(b) - both)


class Index:
    """Finds repeated texts among those kept so far: their keys are in memory, the rest in an SQLite database."""

    def __init__(self, config: Deduplication | None, directory: Path):
        """config: None finds exact duplicates only. Continues after the last `commit` in the directory."""
        directory.mkdir(exist_ok=True)
        self.config, self.database = config, sqlite3.connect(directory / "index.db")
        self.close = self.database.close
        self.database.execute("CREATE TABLE IF NOT EXISTS texts (text INTEGER PRIMARY KEY, keys BLOB, shingles BLOB)")
        self.database.execute("CREATE TABLE IF NOT EXISTS state (name TEXT PRIMARY KEY, value TEXT)")
        self.keys, self.texts = np.zeros(1, np.uint64), np.zeros(1, np.uint32)  # sorted keys, and the text of each
        self.recent: dict[int, int] = {}  # {key: text}, not yet among the sorted keys
        for text, keys in self.database.execute("SELECT text, keys FROM texts ORDER BY text"):
            self._add(text, np.frombuffer(keys, np.uint64).tolist())

    def _add(self, text: int, keys: list[int]) -> None:
        for key in keys:
            self.recent.setdefault(key, text)
        if len(self.recent) > RECENT:
            keys = np.append(self.keys, np.array(list(self.recent), np.uint64))
            texts = np.append(self.texts, np.array(list(self.recent.values()), np.uint32))
            self.keys, first = np.unique(keys, return_index=True)
            self.texts = texts[first]
            self.recent.clear()

    def commit(self, state: dict) -> None:
        """Saves the texts and a state in JSON together, or neither if the process is killed."""
        self.database.execute("REPLACE INTO state VALUES ('state', ?)", [json.dumps(state)])
        self.database.commit()

    def state(self) -> dict:
        """The state of the last `commit`; {} before the first."""
        row = self.database.execute("SELECT value FROM state").fetchone()
        return json.loads(row[0]) if row else {}

    def duplicate(self, keys: np.ndarray, shingles: np.ndarray) -> str | None:
        """ "duplicate" or "near_duplicate" if a text repeats an earlier one; None if it does not, and adds it."""
        # keys: (1 + bands,) uint64, first the fingerprint of the text. shingles: (s,) uint32, sorted.
        numbers = keys.tolist()
        earlier = {number: self.recent[number] for number in numbers if number in self.recent}
        at = np.searchsorted(self.keys[1:], keys, side="right")  # the last key that is not greater
        same = self.keys[at] == keys
        earlier |= zip(keys[same].tolist(), self.texts[at[same]].tolist(), strict=True)
        if numbers[0] in earlier:
            return "duplicate"
        listed = ", ".join(map(str, set(earlier.values())))
        for (candidate,) in self.database.execute(f"SELECT shingles FROM texts WHERE text IN ({listed})"):
            if jaccard(shingles, np.frombuffer(candidate, np.uint32)) >= self.config.threshold:
                return "near_duplicate"
        values = [keys.tobytes(), shingles.tobytes()]
        self._add(self.database.execute("INSERT INTO texts (keys, shingles) VALUES (?, ?)", values).lastrowid, numbers)
        return None
