"""Near-duplicates: against exact Jaccard similarities of all pairs."""

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
    """16 bands of 8 rows at 0.85: as docs/data.md says. The lower the threshold, the more bands."""
    assert [MinHash(Deduplication(threshold=t)).bands for t in (0.85, 0.7, 0.5, 0.01)] == [16, 32, 42, 128]
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
    for both in rng.integers(50, 350, 300):
        union, half, true = rng.integers(0, 1 << 32, 400, dtype=np.uint32), 200 + both // 2, both / 400
        a, b = union[:half], np.append(union[:both], union[half:])
        equal = (minhash.signature(a) == minhash.signature(b)).mean()
        errors.append((equal - true) / (true * (1 - true) / 128) ** 0.5)
    assert abs(np.mean(errors)) < 0.2
    assert 0.85 < np.std(errors) < 1.15


def test_against_all_pairs(tmp_path, monkeypatch):
    """The index sorts its keys and is closed now and then, and forgets what it has not committed."""
    monkeypatch.setattr("data.dedup.RECENT", 100)
    rng, texts = random.Random(0), []
    for _ in range(70):
        original = [f"w{rng.randrange(400)}" for _ in range(rng.randrange(60, 300))]
        texts += [original, *(changed(original, rng.choice([0, 0.01, 0.05, 0.2]), rng) for _ in "ab")]
    minhash, kept, near = MinHash(Deduplication()), [], 0
    index = Index(Deduplication(), tmp_path)
    assert index.state() == {}
    for number, text in enumerate(texts):
        similarity = max((true_similarity(text, other) for other in kept), default=0)
        expected = "duplicate" if text in kept else "near_duplicate" if similarity >= 0.85 else None
        assert index.duplicate(*prepared(text, minhash)) == expected
        near += expected == "near_duplicate"
        if expected is None:
            kept.append(text)
        if number % 50 < 2:
            index.commit({"number": number})
            assert index.duplicate(*prepared(texts[0] + texts[3], minhash)) is None
            index.close()
            index = Index(Deduplication(), tmp_path)
            assert index.state() == {"number": number}
    assert near > 15
