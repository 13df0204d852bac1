"""Batches of packed tokens. A batch is a pure function of (seed, step): the loader keeps no state."""

import bisect
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
    """Numbers 0 … count - 1 in random order, each once per epoch. Each epoch has its own order."""

    holds = "documents"  # what a sample consists of, for messages

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed
        self._order = lru_cache(maxsize=2)(self._order)  # keeps two orders: a batch can span two epochs

    def _order(self, epoch: int) -> np.ndarray:
        # The order does not depend on earlier epochs, so a run can resume in any epoch.
        return np.random.default_rng([self.seed, epoch]).permutation(self.count)

    def drawn(self, sample: int) -> int:
        """The number drawn for a sample. Samples are counted from 0 over all epochs."""
        epoch, place = divmod(sample, self.count)
        return int(self._order(epoch)[place])


class Windows(Shuffled):
    """Packed tokens cut into windows of `length` inputs."""

    # Window w: tokens w·length … (w + 1)·length. Its last token is a target here and the first input of window w + 1.

    def __init__(self, packed: Packed, length: int, seed: int = 0):
        self.packed, self.file, self.tokens, self.length = packed, packed.file, packed.tokens, length
        super().__init__((len(self.tokens) - 1) // length, seed)
        if self.count < 1:
            raise UserError(
                f"{packed.name} holds {len(self.tokens):,} tokens; one window of context_length {length:,} takes "
                f"{length + 1:,}. Add text, or shorten the context"
            )

    def read(self, windows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the windows with these numbers, both (B, T) int64."""
        starts = np.array(windows)[:, None] * self.length  # (B, 1)
        rows = self.tokens[starts + np.arange(self.length + 1)]  # (B, T + 1), uint16 or uint32; the rest stays on disk
        rows = torch.from_numpy(rows.astype(np.int64))  # PyTorch indexes embeddings with int64
        # Pretraining targets are shifted only here. After a second shift the loss would still fall, but the model would
        # learn to skip every other token.
        inputs = rows[:, :-1]
        targets = rows[:, 1:]
        return inputs.contiguous(), targets.contiguous()  # (B, T), (B, T)

    def documents(self, window: int) -> range:
        """Numbers of the documents in the packed file that a window touches."""
        ends = window * self.length, (window + 1) * self.length  # its first and its last token
        first, last = np.searchsorted(self.packed.starts, ends, side="right") - 1 + self.packed.first
        return range(int(first), int(last) + 1)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """The sets that batches are drawn from, starting at a step. Raises TypeError or ValueError, naming the field."""

    start: int  # first step of the phase, counted from 0; it lasts until the next phase starts
    # Share of each set, in any unit. A set is a source of the corpus, or an experiment named in `beside`.
    weights: Mapping[str, float]  # sorted here: `Turns` breaks ties by order, and the config's must not matter

    def __post_init__(self):
        check_types(self)
        if self.start < 0:
            raise ValueError(f"start is {self.start}; expected at least 0")
        positive = [isinstance(w, (int, float)) and 0 < w < math.inf for w in self.weights.values()]
        if not positive or not all(positive):
            raise ValueError(f"weights are {self.weights}; expected a positive number for each set")
        object.__setattr__(self, "weights", dict(sorted(self.weights.items(), key=lambda item: (-item[1], item[0]))))
        if sum(self.units) > 1_000_000:
            raise ValueError(f"weights are {self.weights}; expected rounder numbers, in a ratio of small integers")

    @property
    def units(self) -> list[int]:
        """The smallest integers in the ratio of the weights: 0.5, 0.25, 0.25 becomes 2, 1, 1."""
        exact = [Fraction(str(weight)) for weight in self.weights.values()]  # 0.1 becomes exactly 1/10
        divisor = exact[0]
        for weight in exact:  # Euclid's algorithm, which works for fractions too
            while weight:
                divisor, weight = weight, divisor % weight
        return [int(weight / divisor) for weight in exact]


class Turns:
    """An endless sequence of sets. At any point each set is less than one turn off its share."""

    # Random draws would meet the weights only on average. This is the quota method (Balinski and Young 1975): among the
    # sets below their share, counting this turn, the set with the most weight per turn is next.

    def __init__(self, units: Sequence[int]):
        self.units, self.period = units, sum(units)  # after `period` turns the sequence repeats
        self.order: list[int] = []  # the set that has each turn of a period
        self.places: list[list[int]] = [[] for _ in units]  # the turns of each set
        for turn in range(self.period):
            best, most = 0, 0.0
            for i, unit in enumerate(units):
                had = len(self.places[i])
                weight = unit / (had + 1)
                if weight > most and had * self.period < unit * (turn + 1):  # below its share, this turn included
                    best, most = i, weight
            self.order.append(best)
            self.places[best].append(turn)

    def before(self, index: int, turn: int) -> int:
        """How many turns a set has before this turn."""
        rounds, rest = divmod(turn, self.period)  # whole periods, and turns of the current one
        return rounds * self.units[index] + bisect.bisect_left(self.places[index], rest)


class Mixture:
    """Batches from several sets of windows by weight. The weights may change at given steps."""

    def __init__(self, sets: Mapping[str, Windows], phases: Sequence[Phase], size: int):
        """sets: by name. phases: in order, the first from step 0. size: rows of a global batch."""
        self.sets, self.size = sets, size
        self.phases = []  # (first sample, names, turns, samples that each set gave before)
        for phase in phases:
            # Each set continues where the last phase stopped: no window repeats before all are read once.
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
        return next(phase for phase in reversed(self.phases) if phase[0] <= sample)

    def drawn(self, sample: int) -> tuple[str, int]:
        """The set and the window of a sample, counted from 0 over all batches."""
        first, names, turns, given = self._phase(sample)
        turn = sample - first
        index = turns.order[turn % turns.period]
        name = names[index]
        number = given[name] + turns.before(index, turn)  # how many samples of this set came before
        return name, self.sets[name].drawn(number)

    def batch(self, step: int, rank: int = 0, ranks: int = 1) -> tuple[Tensor, Tensor]:
        """A process's part of a step's global batch, as `read` returns it: inputs and targets, (B, T) int64."""
        # The global batch is the same for any number of processes, so a run on one GPU can resume on eight.
        rows = []
        for row in range(self.size * rank // ranks, self.size * (rank + 1) // ranks):
            name, window = self.drawn(step * self.size + row)
            rows.append(self.sets[name].read([window]))
        return tuple(map(torch.cat, zip(*rows, strict=True)))

    def documents(self, step: int) -> list[str]:
        """The documents in a step's global batch, one line per packed file. `python -m data.inspect` shows them."""
        numbers = {}  # (file, kind): the documents of that file
        for sample in range(step * self.size, (step + 1) * self.size):
            name, window = self.drawn(sample)
            windows = self.sets[name]
            numbers.setdefault((windows.file, windows.holds), set()).update(windows.documents(window))
        return [f"{file}: {holds} {ranges(documents)}" for (file, holds), documents in numbers.items()]


def ranges(numbers: Iterable[int], most: int = 20) -> str:
    """Numbers as text, neighbours together: "3, 5-9". After `most` parts: "and 12 more"."""
    array = np.array(sorted(numbers))
    parts = np.split(array, np.flatnonzero(np.diff(array) > 1) + 1)
    text = [str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts[:most]]
    rest = sum(map(len, parts[most:]))
    return ", ".join(text) + (f" and {rest:,} more" if rest else "")


def mixture(
    name: str, phases: Sequence[Phase], packed: Packed, others: Mapping[str, Packed], length: int, size: int, seed: int
) -> Mixture:
    """The training batches of the experiment `name`: rows of `length` tokens, its own or from `others`."""
    if not phases:  # all of its own tokens
        return Mixture({name: Windows(packed, length, seed)}, [Phase(start=0, weights={name: 1})], size)
    sets = {}
    for phase in phases:
        for used in phase.weights:
            sets[used] = Windows(others.get(used) or packed.of(used), length, seed)
    return Mixture(sets, phases, size)
