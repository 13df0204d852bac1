"""Near-duplicates: against exact Jaccard similarities of all pairs."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.dedup import Deduplication, Index, MinHash
from data.words import fingerprint, hashes, words


def prepared(text: list[str], minhash: MinHash) -> tuple[np.ndarray, np.ndarray]:
    """Keys and shingles of a text, its own fingerprint first, as the corpus makes them."""
    spelled = words(" ".join(text))
    shingles = minhash.shingles(hashes(spelled))
    return np.concatenate([fingerprint(spelled), minhash.keys(shingles)]), shingles


def true_similarity(a: list[str], b: list[str]) -> float:
    sets = [set(zip(text, text[1:], text[2:], strict=False)) for text in (a, b)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def changed(text: list[str], share: float, rng: random.Random) -> list[str]:
    """A copy with a share of its words replaced, dropped or moved."""
    text = list(text)
    for _ in range(int(share * len(text))):
        i, kind = rng.randrange(len(text)), rng.randrange(3)
        if kind == 0:
            text[i] = f"w{rng.randrange(10**9)}"
        elif kind == 1:
            del text[i]
        else:
            text[i], text[i - 1] = text[i - 1], text[i]
    return text


def test_bands_are_chosen_by_the_threshold():
    assert (Deduplication().rows, Deduplication().bands) == (8, 16)
    assert Deduplication(threshold=0.5).rows < Deduplication(threshold=0.7).rows < Deduplication().rows
    assert Deduplication(threshold=0.01, permutations=2).rows == 1
    for field, value in {"threshold": 1.1, "ngram": 0, "permutations": 0}.items():
        with pytest.raises(ValueError, match=f"{field}.* {value}"):
            Deduplication(**{field: value})


@given(st.lists(st.sampled_from(["a", "b", "c"]), max_size=12))
def test_shingles_are_the_distinct_runs_of_three(text):
    shingles = MinHash(Deduplication()).shingles(hashes(words(" ".join(text))))
    expected = {tuple(text[i : i + 3]) for i in range(len(text) - 2)} if len(text) > 2 else {tuple(text)} - {()}
    assert len(shingles) == len(expected)
    assert (np.diff(shingles.astype(np.int64)) > 0).all()


def test_signatures_estimate_similarity_without_bias():
    """The share of equal minima has the true similarity as its mean, and the spread of independent permutations."""
    minhash, rng, errors = MinHash(Deduplication()), np.random.default_rng(1), []
    for _ in range(400):
        both, rest = int(rng.integers(50, 350)), rng.integers(0, 1 << 32, 400, dtype=np.uint32)
        half = both + (400 - both) // 2
        a, b = rest[:half], np.concatenate([rest[:both], rest[half:]])
        true = both / 400
        equal = (minhash.signature(a) == minhash.signature(b)).mean()
        errors.append((equal - true) / (true * (1 - true) / 128) ** 0.5)
    assert abs(np.mean(errors)) < 0.2
    assert 0.85 < np.std(errors) < 1.15


def test_against_all_pairs(tmp_path):
    rng, texts = random.Random(0), []
    for _ in range(70):
        original = [f"w{rng.randrange(400)}" for _ in range(rng.randrange(60, 300))]
        texts += [original, *(changed(original, rng.choice([0, 0.01, 0.05, 0.2]), rng) for _ in "ab")]
    minhash, kept, near = MinHash(Deduplication()), [], 0
    with Index(Deduplication(), tmp_path) as index:
        for text in texts:
            similarity = max((true_similarity(text, other) for other in kept), default=0)
            expected = "duplicate" if text in kept else "near_duplicate" if similarity >= 0.85 else None
            assert index.duplicate(*prepared(text, minhash)) == expected
            near += expected == "near_duplicate"
            if expected is None:
                kept.append(text)
    assert near > 15


def test_an_index_continues_after_a_crash(tmp_path):
    rng = random.Random(1)
    texts = [[str(rng.randrange(99)) for _ in range(50)] for _ in range(60)]
    texts += [changed(text, 0.02, rng) for text in texts]
    minhash, verdicts = MinHash(Deduplication()), {}
    for name, stops in {"whole": (0,), "broken": (0, 1, 30, 31, 90)}.items():
        (tmp_path / name).mkdir()
        verdicts[name] = []
        for start, stop in itertools.pairwise([*stops, len(texts)]):
            with Index(Deduplication(), tmp_path / name) as index:
                assert index.state() == ({"next": start} if start else None)
                verdicts[name] += [index.duplicate(*prepared(text, minhash)) for text in texts[start:stop]]
                index.commit({"next": stop})
                assert index.duplicate(*prepared(texts[0] + texts[1], minhash)) is None  # lost in the crash
    assert verdicts["whole"] == verdicts["broken"]
    assert {"near_duplicate", None} <= set(verdicts["whole"])
