"""Batches of packed tokens. A batch is a pure function of (seed, step): no loader has a state that could be lost."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from data.pack import Packed
from stage import UserError


class Windows:
    """Packed tokens cut into windows of `length` inputs; each epoch sees every window once, in an order of its own.

    Window w is tokens w·length … w·length + length: one more than the inputs, because the targets are the inputs moved
    on by one. That shift happens here, and nowhere else.
    """

    def __init__(self, packed: Packed, length: int, seed: int = 0):
        self.tokens, self.length, self.seed = packed.tokens, length, seed
        self.count = (len(self.tokens) - 1) // length
        if self.count < 1:
            raise UserError(
                f"{packed.name} holds {len(self.tokens):,} tokens; one window of context_length {length:,} takes "
                f"{length + 1:,}. Add text, or shorten the context"
            )
        self._order = lru_cache(maxsize=2)(self._order)  # the epoch's permutation, and at its edge the next one's

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.count)

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        """The step's global batch, steps counted from 0: inputs and targets, (size, length) int64."""
        drawn = range(step * size, (step + 1) * size)
        return self.read([int(self._order(i // self.count)[i % self.count]) for i in drawn])

    def read(self, windows: list[int]) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the windows named."""
        starts = [w * self.length for w in windows]
        rows = np.stack([self.tokens[s : s + self.length + 1] for s in starts]).astype(np.int64)
        rows = torch.from_numpy(rows)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
