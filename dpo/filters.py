"""Filters: rules that drop poor pairs. Dropped pairs are counted by rule."""

import hashlib
from dataclasses import dataclass

from dpo.pairs import Pair
from sft.filters import Judge, Limits


@dataclass(frozen=True, kw_only=True)
class PairFilters(Limits):
    """The rules for pairs. "identical", "duplicate" and "contradiction" (an earlier pair, swapped) always apply."""


class PairJudge(Judge):
    """Applies the rules for pairs."""

    def own_rule(self, pair: Pair) -> str | None:
        if pair.chosen == pair.rejected:
            return "identical"
        for rule, answers in (("contradiction", pair.answers[::-1]), ("duplicate", pair.answers)):
            digest = hashlib.sha256(repr((pair.prompt, answers)).encode()).digest()
            if digest in self.seen:
                return rule
        self.seen.add(digest)
        return None
