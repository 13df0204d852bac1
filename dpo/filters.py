"""Filters: which pairs are worth learning from. Each rule has a name, under which the dropped pairs are counted."""

import hashlib
from dataclasses import dataclass

from dpo.pairs import Pair
from sft.filters import Judge, check_limits
from stage import check_types


@dataclass(frozen=True, kw_only=True)
class PairFilters:
    """The rules for pairs. Raises TypeError or ValueError, with the field's name, for an impossible value."""

    min_answer_chars: int = 1  # pairs with a shorter answer are dropped ("empty_answer", "short_answer")
    max_chars: int | None = 50_000  # longer pairs are dropped ("too_long")
    language: str | None = "en"  # pairs in another language are dropped ("other_language"), as in sft.filters.Filters

    def __post_init__(self):
        check_types(self)
        check_limits(self, "min_answer_chars", "max_chars")


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
