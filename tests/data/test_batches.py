"""The sampler: every window once an epoch, targets shifted once, weights met, the same batches for any ranks."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cli import UserError
from data.batches import Mixture, Phase, Turns, Windows, ranges
from data.pack import Packed


def windows(n: int, length: int, seed: int = 0, offset: int = 0) -> Windows:
    tokens = np.arange(offset, offset + n, dtype="<u4")
    return Windows(type("Packed", (), {"tokens": tokens, "name": "train.bin", "file": "x/train.bin"}), length, seed)


def plain(n: int, length: int, size: int, seed: int = 0) -> Mixture:
    return Mixture({"x": windows(n, length, seed)}, [Phase(start=0, weights={"x": 1})], size)


@given(n=st.integers(10, 400), length=st.integers(1, 9), size=st.integers(1, 7), seed=st.integers(0, 5))
def test_each_epoch_sees_each_window_once_in_its_own_order(n, length, size, seed):
    mixture = plain(n, length, size, seed)
    count = mixture.sets["x"].count
    batches = [mixture.batch(step) for step in range(-(-3 * count // size))]
    drawn = torch.cat([tokens[:, 0] for tokens, _ in batches]) // length
    epochs = [drawn[epoch * count : (epoch + 1) * count].tolist() for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(count))
    assert count < 9 or epochs[0] != epochs[1]
    for tokens, targets in batches:
        assert tokens.shape == targets.shape == (size, length)
        assert (targets == tokens + 1).all()


def test_a_batch_depends_on_seed_and_step_alone():
    used = plain(300, 7, 5, 3)
    used.batch(90), used.batch(0)
    assert used.batch(20)[0].equal(plain(300, 7, 5, 3).batch(20)[0])
    assert not used.batch(20)[0].equal(plain(300, 7, 5, 4).batch(20)[0])


def test_too_few_tokens_are_named():
    assert windows(8, 7).count == 1
    with pytest.raises(UserError, match=r"train.bin holds 7 tokens; one window of context_length 7 takes 8"):
        windows(7, 7)


def test_the_order_of_the_weights_in_a_config_changes_nothing():
    sets = {name: windows(99, 4) for name in "abc"}
    orders = ({"a": 2, "b": 1, "c": 1}, {"c": 1, "b": 1, "a": 2})
    one, other = (Mixture(sets, [Phase(start=0, weights=weights)], 4) for weights in orders)
    assert [one.drawn(i) for i in range(40)] == [other.drawn(i) for i in range(40)]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_every_beginning_meets_the_weights_within_one_turn(units):
    turns, had = Turns(units), Counter()
    for turn in range(2 * turns.period + 3):
        index = turns.order[turn % turns.period]
        assert turns.before(index, turn) == had[index]
        had[index] += 1
        for i, unit in enumerate(units):
            assert abs(had[i] - Fraction(unit * (turn + 1), turns.period)) < 1


WEIGHTS = st.dictionaries(st.sampled_from("abcde"), st.sampled_from([1, 2, 0.5, 0.3, 7, 0.25]), min_size=1)


@st.composite
def mixtures(draw) -> Mixture:
    sets = {name: windows(draw(st.integers(20, 90)), 5, 1, 1000 * i) for i, name in enumerate("abcde")}
    starts = sorted({0, *draw(st.lists(st.integers(1, 12), max_size=3))})
    phases = [Phase(start=start, weights=draw(WEIGHTS)) for start in starts]
    return Mixture(sets, phases, draw(st.integers(1, 9)))


@given(mixtures())
def test_phases_meet_their_weights_and_sets_continue_where_they_were(mixture):
    drawn = {name: [] for name in mixture.sets}
    starts = [first for first, *_ in mixture.phases]
    for sample in range(20 * mixture.size):
        if sample % mixture.size == 0:
            assert mixture.seen(sample // mixture.size) == {name: len(numbers) for name, numbers in drawn.items()}
        name, window = mixture.drawn(sample)
        drawn[name].append(window)
        first, names, turns, before = mixture.phases[sum(start <= sample for start in starts) - 1]
        share = Fraction(turns.units[names.index(name)] * (sample + 1 - first), turns.period)
        assert abs(len(drawn[name]) - before[name] - share) < 1
    for name, numbers in drawn.items():
        count = mixture.sets[name].count
        for start in range(0, len(numbers), count):
            epoch = numbers[start : start + count]
            assert len(set(epoch)) == len(epoch)


@given(mixtures(), st.integers(0, 30))
def test_any_number_of_ranks_sees_the_same_global_batch(mixture, step):
    whole = mixture.batch(step)
    for ranks in {1, 2, 3, 8} & set(range(mixture.size + 1)):
        parts = [mixture.batch(step, rank, ranks) for rank in range(ranks)]
        for k in (0, 1):
            assert torch.cat([part[k] for part in parts]).equal(whole[k])
        assert max(len(p[0]) for p in parts) - min(len(p[0]) for p in parts) <= 1


def test_documents_of_a_batch():
    """Sources a and b in one file of documents 0 to 3, and y in a file beside it. Windows of two tokens."""
    starts = np.array([0, 3, 4, 9])  # documents of 3, 1, 5 and 4 tokens
    parts = {"a": {"start": 0, "tokens": 4, "bytes": 1}, "b": {"start": 4, "tokens": 9, "bytes": 1}}
    packed = Packed("x/train.bin", np.arange(13), starts, {"bytes": 1, "sources": parts})
    beside = Packed("y/train.bin", np.arange(13), starts, {"bytes": 1, "sources": {}})
    sets = {"a": Windows(packed.of("a"), 2), "b": Windows(packed.of("b"), 2), "y": Windows(beside, 2)}
    assert [sets["a"].documents(i) for i in range(1)] == [range(0, 1)]
    assert [sets["b"].documents(i) for i in range(4)] == [range(2, 3), range(2, 3), range(2, 4), range(3, 4)]
    assert [sets["y"].documents(i) for i in range(3)] == [range(0, 1), range(0, 3), range(2, 3)]
    used = Mixture(sets, [Phase(start=0, weights={"a": 1}), Phase(start=1, weights={"y": 1, "b": 1})], 12)
    assert used.documents(0) == ["x/train.bin: documents 0"]
    assert sorted(used.documents(1)) == ["x/train.bin: documents 2-3", "y/train.bin: documents 0-3"]


def test_ranges():
    assert ranges([7]) == "7"
    assert ranges({988, 121, 120, 123, 122}) == "120-123, 988"
    assert ranges(range(0, 2_002, 2), 3) == "0, 2, 4 and 998 more"
    assert ranges([*range(90), 91, 95, 96], 2) == "0-89, 91 and 2 more"


@pytest.mark.parametrize("weights", [{}, {"a": 0}, {"a": "1"}, {"a": float("nan")}, {"a": 1 / 3, "b": 1}])
def test_impossible_phases_are_refused(weights):
    with pytest.raises(ValueError, match="expected"):
        Phase(start=0, weights=weights)
    with pytest.raises(ValueError, match="start is -1"):
        Phase(start=-1, weights={"a": 1})


def test_units_are_the_smallest_integers():
    assert Phase(start=0, weights={"a": 0.5, "b": 0.25, "c": 0.25}).units == [2, 1, 1]
    assert Phase(start=0, weights={"a": 600, "b": 150}).units == [4, 1]
    assert Phase(start=0, weights={"a": 1e-7}).units == [1]
