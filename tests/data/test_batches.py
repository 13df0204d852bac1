"""The sampler: every window once an epoch, targets shifted once, nothing but (seed, step) to decide a batch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.batches import Windows
from stage import UserError


def windows(n: int, length: int, seed: int = 0) -> Windows:
    return Windows(type("Packed", (), {"tokens": np.arange(n, dtype="<u2"), "name": "train.bin"}), length, seed)


@given(n=st.integers(10, 400), length=st.integers(1, 9), size=st.integers(1, 7), seed=st.integers(0, 5))
def test_each_epoch_sees_each_window_once(n, length, size, seed):
    source = windows(n, length, seed)
    steps = -(-3 * source.count // size)
    drawn = np.concatenate([source.batch(step, size)[0][:, 0].numpy() for step in range(steps)]) // length
    for epoch in range(3):
        assert sorted(drawn[epoch * source.count : (epoch + 1) * source.count]) == list(range(source.count))


@given(step=st.integers(0, 1000), size=st.integers(1, 9))
def test_a_batch_depends_on_seed_and_step_alone(step, size):
    used = windows(300, 7, 3)
    used.batch(step + 5, size), used.batch(0, size)
    assert used.batch(step, size)[0].equal(windows(300, 7, 3).batch(step, size)[0])


def test_targets_are_the_next_tokens():
    tokens, targets = windows(300, 7).batch(4, 6)
    assert tokens.shape == targets.shape == (6, 7)
    assert (targets == tokens + 1).all()


def test_epochs_and_seeds_differ_in_order():
    order = lambda seed, step: windows(701, 7, seed).batch(step, 100)[0][:, 0].tolist()  # noqa: E731
    assert order(0, 0) != order(0, 1) != order(1, 1)


def test_too_few_tokens_are_named():
    assert windows(8, 7).count == 1
    with pytest.raises(UserError, match=r"train.bin holds 7 tokens; one window of context_length 7 takes 8"):
        windows(7, 7)
