"""Filters: which pairs are worth learning from. What a rule drops is counted under its name."""

import hashlib
from dataclasses import dataclass

from dpo.pairs import Pair
from sft.filters import Judge, Limits


@dataclass(frozen=True, kw_only=True)
class PairFilters(Limits):
    """The rules for pairs. "identical", "duplicate" and "contradiction" (the other order) always apply."""


class PairJudge(Judge):
    """The rules for pairs: equal answers teach nothing, nor do two pairs with the same answers."""

    def loop(self, pair: Pair) -> str | None:
        return "identical" if pair.chosen == pair.rejected else None

    def copy(self, pair: Pair) -> str | None:
        for name, answers in (("duplicate", pair.answers), ("contradiction", pair.answers[::-1])):
            if hashlib.sha256(repr((pair.prompt, answers)).encode()).digest() in self.seen:
                return name
        self.seen.add(hashlib.sha256(repr((pair.prompt, pair.answers)).encode()).digest())
        return None
