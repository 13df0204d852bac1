"""Batches of packed tokens. A batch is a pure function of (seed, step): no loader has a state that could be lost."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from cli import UserError
from data.pack import Packed
from stage import check_types


class Shuffled:
    """Numbered things, of which each epoch sees every one once, in an order of its own."""

    holds = "documents"  # what they are made of

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed
        self._order = lru_cache(maxsize=2)(self._order)  # the epoch's permutation, and at its edge the next one's

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.count)

    def drawn(self, sample: int) -> int:
        """Which one the sample of that number is, counted from 0 over all epochs."""
        return int(self._order(sample // self.count)[sample % self.count])


class Windows(Shuffled):
    """Packed tokens cut into windows of `length` inputs; each epoch sees every window once, in an order of its own.

    Window w is tokens w·length … w·length + length: one more than the inputs, because the targets are the inputs moved
    on by one. That shift happens here, and nowhere else.
    """

    def __init__(self, packed: Packed, length: int, seed: int = 0):
        self.packed, self.tokens, self.length = packed, packed.tokens, length
        super().__init__((len(self.tokens) - 1) // length, seed)
        if self.count < 1:
            raise UserError(
                f"{packed.name} holds {len(self.tokens):,} tokens; one window of context_length {length:,} takes "
                f"{length + 1:,}. Add text, or shorten the context"
            )

    @property
    def file(self) -> str:
        """The packed file that they are in."""
        return self.packed.file

    def read(self, windows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the windows named, (windows, length) int64."""
        starts = [w * self.length for w in windows]
        rows = np.stack([self.tokens[s : s + self.length + 1] for s in starts]).astype(np.int64)
        rows = torch.from_numpy(rows)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def documents(self, window: int) -> range:
        """The documents that a window holds, or parts of them, by their numbers in the packed file."""
        ends = window * self.length, (window + 1) * self.length
        first, last = np.searchsorted(self.packed.starts, ends, side="right") - 1
        return range(self.packed.first + int(first), self.packed.first + int(last) + 1)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What is drawn from a step on. Raises TypeError or ValueError, naming the field, for what cannot be."""

    start: int
    """The first step of it, counted from 0; it lasts until the next phase starts."""
    weights: Mapping[str, float]
    """Of the sets that batches are drawn from, in any unit: sources of the corpus, and experiments beside it."""

    def __post_init__(self):
        check_types(self)
        if self.start < 0:
            raise ValueError(f"start is {self.start}; expected at least 0")
        if not self.weights or not all(isinstance(w, (int, float)) and 0 < w < math.inf for w in self.weights.values()):
            raise ValueError(f"weights are {self.weights}; expected a positive number for each set that is drawn from")
        if sum(self.units) > 1_000_000:
            raise ValueError(f"weights are {self.weights}; expected rounder numbers, whose ratio is one of integers")

    @property
    def units(self) -> list[int]:
        """The weights as the smallest integers of the same ratio."""
        exact = [Fraction(str(weight)) for weight in self.weights.values()]
        scaled = [int(each * math.lcm(*(e.denominator for e in exact))) for each in exact]
        return [each // math.gcd(*scaled) for each in scaled]


class Turns:
    """An endless sequence of sets in which every beginning has each set within one of its share.

    The quota method of Balinski and Young (1975): of the sets that would not get more than their share, rounded up, the
    next turn goes to the one that has most weight for each turn it would then have had. After sum(units) turns every
    set has had exactly its share, and the sequence begins again.
    """

    def __init__(self, units: Sequence[int]):
        self.units, self.period = units, sum(units)
        had = [0] * len(units)
        self.order = np.empty(self.period, dtype=np.int64)
        for turn in range(self.period):
            allowed = [i for i, unit in enumerate(units) if had[i] * self.period < unit * (turn + 1)]
            chosen = max(allowed, key=lambda i: units[i] / (had[i] + 1))
            self.order[turn] = chosen
            had[chosen] += 1
        self.places = [np.flatnonzero(self.order == i) for i in range(len(units))]

    def whose(self, turn: int) -> int:
        """The set whose turn it is."""
        return int(self.order[turn % self.period])

    def before(self, index: int, turn: int) -> int:
        """How many turns a set has had before one."""
        rounds, rest = divmod(turn, self.period)
        return rounds * self.units[index] + int(np.searchsorted(self.places[index], rest))


class Mixture:
    """Batches from several sets of windows by weight, the weights changing at given steps.

    sets: by name. phases: in order, the first from step 0. size: rows of a global batch.
    """

    def __init__(self, sets: Mapping[str, Windows], phases: Sequence[Phase], size: int):
        self.sets, self.size = sets, size
        self.phases = []  # (first sample, names, turns, samples that each set has given before)
        for phase in phases:
            given = self.seen(phase.start) if self.phases else dict.fromkeys(sets, 0)
            self.phases.append((phase.start * size, list(phase.weights), Turns(phase.units), given))

    def seen(self, step: int) -> dict[str, int]:
        """How many rows each set gives in the first so many steps."""
        sample = step * self.size
        first, names, turns, given = self._phase(sample)
        return given | {name: given[name] + turns.before(i, sample - first) for i, name in enumerate(names)}

    def _phase(self, sample: int) -> tuple[int, list[str], Turns, dict[str, int]]:
        return next(phase for phase in reversed(self.phases) if phase[0] <= sample)

    def drawn(self, sample: int) -> tuple[str, int]:
        """The set and the window that a sample is, counted from 0 over all batches."""
        first, names, turns, given = self._phase(sample)
        index = turns.whose(sample - first)
        name = names[index]
        return name, self.sets[name].drawn(given[name] + turns.before(index, sample - first))

    def batch(self, step: int, rank: int = 0, ranks: int = 1) -> tuple[Tensor, Tensor]:
        """A rank's part of the step's global batch, steps counted from 0: inputs and targets, (rows, length) int64.

        The parts of all ranks, one after another, are the same global batch for any number of ranks.
        """
        rows = range(step * self.size + self.size * rank // ranks, step * self.size + self.size * (rank + 1) // ranks)
        if not rows:  # more ranks than rows
            return tuple(part[:0] for part in next(iter(self.sets.values())).read([0]))
        read = [self.sets[name].read([window]) for name, window in map(self.drawn, rows)]
        return tuple(torch.cat(part) for part in zip(*read, strict=True))

    def documents(self, step: int) -> list[str]:
        """What the step's global batch holds, a line for each packed file, for a message: of documents the numbers are
        those that `python -m data.inspect CONFIG --first NUMBER` shows."""
        found: dict[tuple[str, str], set[int]] = {}
        for name, window in map(self.drawn, range(step * self.size, (step + 1) * self.size)):
            windows = self.sets[name]
            found.setdefault((windows.file, windows.holds), set()).update(windows.documents(window))
        return [f"{file}: {holds} {ranges(numbers)}" for (file, holds), numbers in found.items()]


def ranges(numbers: Iterable[int], most: int = 20) -> str:
    """Numbers to read, neighbours as one: "3, 5-9"; of more than `most` such parts, the first ones."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts[:most])
    rest = sum(last - first + 1 for first, last in parts[most:])
    return f"{text} and {rest:,} more" if rest else text


def mixture(
    name: str,
    phases: Sequence[Phase],
    packed: Packed,
    others: Mapping[str, Packed],
    length: int,
    batch_size: int,
    seed: int,
) -> Mixture:
    """The training batches of an experiment called `name`: rows of `length` tokens from its own packed tokens and, by
    name, those of other experiments. No phases: all of its own."""
    if not phases:
        return Mixture({name: Windows(packed, length, seed)}, [Phase(start=0, weights={name: 1})], batch_size)
    sets = {}
    for phase in phases:
        for used in phase.weights:
            sets[used] = Windows(others.get(used) or packed.of(used), length, seed)
    return Mixture(sets, phases, batch_size)
