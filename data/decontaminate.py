"""Evaluation sets kept out of training text: what shares a run of words with one is recognised."""

import itertools
from collections.abc import Sequence

import numpy as np

from data.clean import clean
from data.sources import Source
from data.words import hashes, ngrams, words


class Contamination:
    """The word n-grams of some evaluation sets; 9 bytes each in memory. Texts of fewer words have none."""

    def __init__(self, sources: Sequence[Source], n: int):
        self.n, self.names = n, [source.name for source in sources]
        runs = [np.empty(0, dtype=np.uint64)]
        owners = [np.empty(0, dtype=np.uint8)]
        for number, source in enumerate(sources):
            for document in itertools.islice(source.documents(1), source.max_documents):
                # As it is, and as it would be if it were training text.
                for version in {document.text, clean(document.text, source.cleaning)}:
                    found = ngrams(hashes(words(version)), n)
                    runs.append(found)
                    owners.append(np.full(len(found), number, dtype=np.uint8))
        self.runs, first = np.unique(np.concatenate(runs), return_index=True)
        self.owners = np.concatenate(owners)[first]

    def find(self, hashes: np.ndarray) -> str | None:
        """The name of an evaluation set that a text, given by its word hashes, shares an n-gram with, or None."""
        runs = ngrams(hashes, self.n)
        if not len(self.runs) or not len(runs):
            return None
        at = np.minimum(np.searchsorted(self.runs, runs), len(self.runs) - 1)
        shared = at[self.runs[at] == runs]
        return self.names[self.owners[shared].min()] if len(shared) else None
