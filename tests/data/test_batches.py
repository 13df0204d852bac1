"""The sampler: every window once an epoch, targets shifted once, weights met, the same batches for any ranks."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given
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
def test_each_epoch_sees_each_window_once(n, length, size, seed):
    source = plain(n, length, size, seed)
    count = source.sets["x"].count
    steps = -(-3 * count // size)
    drawn = np.concatenate([source.batch(step)[0][:, 0].numpy() for step in range(steps)]) // length
    for epoch in range(3):
        assert sorted(drawn[epoch * count : (epoch + 1) * count]) == list(range(count))


@given(step=st.integers(0, 1000), size=st.integers(1, 9))
def test_a_batch_depends_on_seed_and_step_alone(step, size):
    used = plain(300, 7, size, 3)
    used.batch(step + 5), used.batch(0)
    assert used.batch(step)[0].equal(plain(300, 7, size, 3).batch(step)[0])


def test_targets_are_the_next_tokens():
    tokens, targets = plain(300, 7, 6).batch(4)
    assert tokens.shape == targets.shape == (6, 7)
    assert (targets == tokens + 1).all()


def test_epochs_and_seeds_differ_in_order():
    order = lambda seed, step: plain(701, 7, 100, seed).batch(step)[0][:, 0].tolist()  # noqa: E731
    assert order(0, 0) != order(0, 1) != order(1, 1)


def test_too_few_tokens_are_named():
    assert windows(8, 7).count == 1
    with pytest.raises(UserError, match=r"train.bin holds 7 tokens; one window of context_length 7 takes 8"):
        windows(7, 7)


UNITS = st.lists(st.integers(1, 30), min_size=1, max_size=8)


@given(UNITS)
def test_every_beginning_meets_the_weights_within_one(units):
    turns = Turns(units)
    had = Counter()
    for turn in range(2 * turns.period + 3):
        index = turns.whose(turn)
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
def test_phases_meet_their_weights_and_sets_go_on_where_they_were(mixture):
    seen = {name: [] for name in mixture.sets}
    starts = [first for first, *_ in mixture.phases]
    for sample in range(20 * mixture.size):
        name, window = mixture.drawn(sample)
        seen[name].append(window)
        phase = sum(start <= sample for start in starts) - 1
        first, names, turns, given_before = mixture.phases[phase]
        share = Fraction(turns.units[names.index(name)] * (sample + 1 - first), turns.period)
        assert abs(len(seen[name]) - given_before[name] - share) < 1
    for name, drawn in seen.items():
        count = mixture.sets[name].count
        for start in range(0, len(drawn), count):
            epoch = drawn[start : start + count]
            assert len(set(epoch)) == len(epoch)


@given(mixtures(), st.integers(0, 30))
def test_any_number_of_ranks_sees_the_same_global_batch(mixture, step):
    whole = mixture.batch(step)
    assert whole[0].shape == (mixture.size, 5)
    for ranks in {1, 2, 3, 8} & set(range(mixture.size + 1)):
        parts = [mixture.batch(step, rank, ranks) for rank in range(ranks)]
        for k in (0, 1):
            assert torch.cat([part[k] for part in parts]).equal(whole[k])
        assert max(len(p[0]) for p in parts) - min(len(p[0]) for p in parts) <= 1


@given(mixtures(), st.integers(0, 30))
def test_rows_seen_are_those_drawn(mixture, step):
    drawn = Counter(mixture.drawn(sample)[0] for sample in range(step * mixture.size))
    assert mixture.seen(step) == {name: drawn[name] for name in mixture.sets}


@given(st.lists(st.integers(1, 30), min_size=4, max_size=40), st.integers(1, 9), st.integers(0, 20), st.integers(1, 9))
def test_documents_of_a_batch_are_those_its_tokens_are_of(lengths, length, step, size):
    """Two sources in one file and a file beside it; every token is its own place in its file."""
    ends = np.cumsum(lengths)
    owner, half = np.repeat(np.arange(len(lengths)), lengths), len(lengths) // 2
    tokens, starts, edge = np.arange(ends[-1]), ends - lengths, int(ends[half - 1])
    parts = {"a": {"start": 0, "tokens": edge, "bytes": 1}, "b": {"start": edge, "tokens": int(ends[-1]) - edge}}
    parts["b"]["bytes"] = 1
    packed = Packed("x/train.bin", tokens, starts, {"bytes": 1, "sources": parts})
    beside = Packed("y/train.bin", tokens, starts, {"bytes": 1, "sources": {}})
    assume(all(part["tokens"] > length for part in parts.values()))
    sets = {name: Windows(p, length, 3) for name, p in (("a", packed.of("a")), ("b", packed.of("b")), ("y", beside))}
    used = Mixture(sets, [Phase(start=0, weights={"a": 1, "b": 2}), Phase(start=9, weights={"y": 1, "b": 1})], size)
    expected = {}
    for sample in range(step * size, (step + 1) * size):
        name, window = used.drawn(sample)
        inputs, targets = sets[name].read([window])
        held = owner[[*inputs[0], targets[0, -1]]].tolist()
        expected.setdefault("y/train.bin" if name == "y" else "x/train.bin", set()).update(held)
    assert used.documents(step) == [f"{file}: documents {ranges(found)}" for file, found in expected.items()]


def test_ranges():
    assert ranges([7]) == "7"
    assert ranges({988, 121, 120, 123, 122}) == "120-123, 988"
    assert ranges(range(0, 2_002, 2), 3) == "0, 2, 4 and 998 more"
    assert ranges([*range(90), 91, 95, 96], 2) == "0-89, 91 and 2 more"


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        ({"start": -1, "weights": {"a": 1}}, "start is -1"),
        ({"start": 0, "weights": {}}, "expected a positive number"),
        ({"start": 0, "weights": {"a": 0}}, "expected a positive number"),
        ({"start": 0, "weights": {"a": "1"}}, "expected a positive number"),
        ({"start": 0, "weights": {"a": float("nan")}}, "expected a positive number"),
        ({"start": 0, "weights": {"a": 1 / 3, "b": 1}}, "expected rounder numbers"),
    ],
)
def test_impossible_phases_are_refused(phase, message):
    with pytest.raises(ValueError, match=message):
        Phase(**phase)


def test_units_are_the_smallest_integers():
    assert Phase(start=0, weights={"a": 0.5, "b": 0.25, "c": 0.25}).units == [2, 1, 1]
    assert Phase(start=0, weights={"a": 600, "b": 150}).units == [4, 1]
    assert Phase(start=0, weights={"a": 1e-7}).units == [1]
