"""Batches of packed tokens. A batch is a pure function of (seed, step): the loader has no state that could be lost."""

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
    """Numbers 0 … count - 1 in random order, each once per epoch. Every epoch has another order."""

    holds = "documents"  # what a sample consists of, for messages

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed
        # Two orders stay in memory: a batch at the edge of an epoch needs this one and the next.
        self._order = lru_cache(maxsize=2)(self._order)

    def _order(self, epoch: int) -> np.ndarray:
        # Not from the order of the epoch before: so a resumed run can start in the middle of any epoch.
        return np.random.default_rng([self.seed, epoch]).permutation(self.count)

    def drawn(self, sample: int) -> int:
        """The number that is drawn for a sample, counted from 0 over all epochs."""
        epoch, place = divmod(sample, self.count)
        return int(self._order(epoch)[place])


class Windows(Shuffled):
    """Packed tokens cut into windows of `length` inputs."""

    # Window w is the tokens w·length … w·length + length: one more than the inputs, because the targets are the inputs
    # shifted by one. The last token of a window is also the first of the next, so every token is a target once.

    def __init__(self, packed: Packed, length: int, seed: int = 0):
        self.packed, self.file = packed, packed.file
        self.tokens, self.length = packed.tokens, length
        super().__init__((len(self.tokens) - 1) // length, seed)
        if self.count < 1:
            raise UserError(
                f"{packed.name} holds {len(self.tokens):,} tokens; one window of context_length {length:,} takes "
                f"{length + 1:,}. Add text, or shorten the context"
            )

    def read(self, windows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the windows with these numbers, both (B, T) int64."""
        starts = np.array(windows)[:, None] * self.length  # (B, 1)
        # The file is memory-mapped: this reads the rows of the batch and leaves the rest on the disk.
        rows = self.tokens[starts + np.arange(self.length + 1)]  # (B, T + 1), uint16 or uint32
        rows = torch.from_numpy(rows.astype(np.int64))  # PyTorch indexes embeddings with int64
        # The only place where targets are shifted. With a second shift elsewhere the model would learn to skip every
        # other token: the loss still falls, but the model writes nonsense.
        inputs, targets = rows[:, :-1], rows[:, 1:]
        return inputs.contiguous(), targets.contiguous()  # (B, T), (B, T)

    def documents(self, window: int) -> range:
        """Numbers, in the packed file, of the documents that a window holds or holds a part of."""
        ends = window * self.length, (window + 1) * self.length
        first, last = np.searchsorted(self.packed.starts, ends, side="right") - 1
        return range(self.packed.first + int(first), self.packed.first + int(last) + 1)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """The sets that batches are drawn from, from a step on. Raises TypeError or ValueError, naming the field."""

    start: int  # first step of the phase, counted from 0; it lasts until the next phase starts
    # How much of each set, in any unit. The sets are sources of the corpus, and experiments beside this one.
    weights: Mapping[str, float]

    def __post_init__(self):
        check_types(self)
        if self.start < 0:
            raise ValueError(f"start is {self.start}; expected at least 0")
        positive = [isinstance(w, (int, float)) and 0 < w < math.inf for w in self.weights.values()]
        if not positive or not all(positive):
            raise ValueError(f"weights are {self.weights}; expected a positive number for each set")
        if sum(self.units) > 1_000_000:
            raise ValueError(f"weights are {self.weights}; expected rounder numbers, whose ratio is one of integers")

    @property
    def units(self) -> list[int]:
        """The smallest integers in the ratio of the weights: 0.5, 0.25, 0.25 becomes 2, 1, 1."""
        exact = [Fraction(str(weight)) for weight in self.weights.values()]
        divisor = exact[0]
        for weight in exact:  # Euclid's algorithm, which works for fractions too
            while weight:
                divisor, weight = weight, divisor % weight
        return [int(weight / divisor) for weight in exact]


class Turns:
    """An endless sequence of sets: after any number of turns, each set is less than one turn from its share."""

    # Sets drawn at random would meet the weights only on average. This is the quota method (Balinski and Young 1975):
    # among the sets that another turn does not lift above their share, rounded up, the next turn goes to the set with
    # the most weight per turn. After sum(units) turns every set has exactly its share, and the sequence repeats.

    def __init__(self, units: Sequence[int]):
        self.units, self.period = units, sum(units)
        had = [0] * len(units)  # turns of each set so far
        self.order = np.empty(self.period, dtype=np.int64)
        for turn in range(self.period):
            best, most = 0, 0.0
            for i, unit in enumerate(units):
                weight = unit / (had[i] + 1)
                if weight > most and had[i] * self.period < unit * (turn + 1):
                    best, most = i, weight
            self.order[turn] = best
            had[best] += 1
        self.places = [np.flatnonzero(self.order == i) for i in range(len(units))]

    def whose(self, turn: int) -> int:
        """The set whose turn it is."""
        return int(self.order[turn % self.period])

    def before(self, index: int, turn: int) -> int:
        """How many turns a set has before this turn."""
        rounds, rest = divmod(turn, self.period)  # whole periods, and turns of the current one
        return rounds * self.units[index] + int(np.searchsorted(self.places[index], rest))


class Mixture:
    """Batches from several sets of windows by weight. The weights may change at given steps."""

    def __init__(self, sets: Mapping[str, Windows], phases: Sequence[Phase], size: int):
        """sets: by name. phases: in order, the first from step 0. size: rows of a global batch."""
        self.sets, self.size = sets, size
        self.phases = []  # (first sample, names, turns, samples that each set gave before)
        for phase in phases:
            # A set continues where the phase before left it: no window is read twice before all are read once.
            given = self.seen(phase.start) if self.phases else dict.fromkeys(sets, 0)
            self.phases.append((phase.start * size, list(phase.weights), Turns(phase.units), given))

    def seen(self, step: int) -> dict[str, int]:
        """How many rows each set gives before a step."""
        sample = step * self.size
        first, names, turns, given = self._phase(sample)
        rows = dict(given)
        for i, name in enumerate(names):
            rows[name] += turns.before(i, sample - first)
        return rows

    def _phase(self, sample: int) -> tuple:
        for phase in reversed(self.phases):
            if phase[0] <= sample:
                return phase

    def drawn(self, sample: int) -> tuple[str, int]:
        """The set and the window of a sample, counted from 0 over all batches."""
        first, names, turns, given = self._phase(sample)
        turn = sample - first
        index = turns.whose(turn)
        name = names[index]
        number = given[name] + turns.before(index, turn)  # how many samples of this set came before
        return name, self.sets[name].drawn(number)

    def batch(self, step: int, rank: int = 0, ranks: int = 1) -> tuple[Tensor, Tensor]:
        """A process's part of the global batch of a step, counted from 0: inputs and targets, (B, T) int64."""
        # The parts of all processes are the global batch: the same rows in the same order for any number of them.
        # That makes a run on eight GPUs comparable with a run on one, and lets it resume on another number.
        start, rows = step * self.size, []
        for sample in range(start + self.size * rank // ranks, start + self.size * (rank + 1) // ranks):
            name, window = self.drawn(sample)
            rows.append(self.sets[name].read([window]))
        return tuple(map(torch.cat, zip(*rows, strict=True)))

    def documents(self, step: int) -> list[str]:
        """What the global batch of a step holds, a line per packed file. `python -m data.inspect` shows documents."""
        numbers = {}  # (file, kind): the documents of that file
        for sample in range(step * self.size, (step + 1) * self.size):
            name, window = self.drawn(sample)
            windows = self.sets[name]
            numbers.setdefault((windows.file, windows.holds), set()).update(windows.documents(window))
        lines = []
        for (file, holds), found in numbers.items():
            lines.append(f"{file}: {holds} {ranges(found)}")
        return lines


def ranges(numbers: Iterable[int], most: int = 20) -> str:
    """Numbers as text, neighbours together: "3, 5-9". After `most` parts: "and 12 more"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    text, rest = [], 0  # the parts in words, and how many numbers are in the others
    for first, last in parts:
        if len(text) == most:
            rest += last - first + 1
        else:
            text.append(str(first) if first == last else f"{first}-{last}")
    return ", ".join(text) + (f" and {rest:,} more" if rest else "")


def mixture(
    name: str, phases: Sequence[Phase], packed: Packed, others: Mapping[str, Packed], length: int, size: int, seed: int
) -> Mixture:
    """The training batches of the experiment `name`: rows of `length` tokens of its own, and of `others` by name."""
    if not phases:  # all of its own tokens
        return Mixture({name: Windows(packed, length, seed)}, [Phase(start=0, weights={name: 1})], size)
    sets = {}
    for phase in phases:
        for used in phase.weights:
            sets[used] = Windows(others.get(used) or packed.of(used), length, seed)
    return Mixture(sets, phases, size)
