"""Finds training text that shares a run of words with an evaluation set."""

import itertools
from collections.abc import Sequence

import numpy as np

from data.clean import clean
from data.sources import Source
from data.words import hashes, ngrams, words


class Contamination:
    """The n-grams of words of some evaluation sets. Memory: 9 bytes per n-gram."""

    def __init__(self, sources: Sequence[Source], n: int):
        self.n, self.names = n, [source.name for source in sources]
        runs, owners = [np.empty(0, np.uint64)], [np.empty(0, np.uint8)]
        for number, source in enumerate(sources):
            for document in itertools.islice(source.documents(1), source.max_documents):
                # Training text is compared once it is clean; the set may be clean already.
                for version in {document.text, clean(document.text, source.cleaning)}:
                    runs.append(ngrams(hashes(words(version)), n))
                    owners.append(np.full(len(runs[-1]), number, np.uint8))
        self.runs, first = np.unique(np.concatenate(runs), return_index=True)
        self.owners = np.concatenate(owners)[first]

    def find(self, hashes: np.ndarray) -> str | None:
        """The name of an evaluation set that shares an n-gram with a text, or None. hashes: of its words."""
        runs = ngrams(hashes, self.n)
        if not len(self.runs) or not len(runs):
            return None
        at = np.minimum(np.searchsorted(self.runs, runs), len(self.runs) - 1)
        shared = at[self.runs[at] == runs]
        return self.names[self.owners[shared].min()] if len(shared) else None
