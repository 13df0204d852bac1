"""Which pairs are worth learning from. Every rule has a name, under which what it drops is counted."""

import hashlib
from dataclasses import dataclass

from data import words
from dpo.pairs import Pair
from sft.filters import other_language
from stage import check_types


@dataclass(frozen=True, kw_only=True)
class PairFilters:
    """The rules. Raises TypeError or ValueError, naming the field, for what cannot be."""

    min_answer_chars: int = 1
    """A pair with a shorter answer is dropped ("short_answer")."""
    max_chars: int | None = 50_000
    """A pair that is longer in all is dropped ("too_long")."""
    language: str | None = "en"
    """Only pairs in it are kept ("other_language"), found as sft.filters.Filters has it. None keeps all."""

    def __post_init__(self):
        check_types(self)
        for name in ("min_answer_chars", "max_chars"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")


class Judge:
    """Applies the rules to one pair after another, of which it remembers what later ones may repeat.

    Two equal answers teach nothing ("identical"), nor does a pair twice ("duplicate"), nor the same two answers in both
    orders ("contradiction": the first stays).
    """

    def __init__(self, filters: PairFilters):
        self.filters, self.seen = filters, set()

    def rule(self, pair: Pair) -> str | None:
        """The name of the first rule that a pair fails; None, and it is remembered, if it passes all."""
        f, answers = self.filters, (pair.chosen, pair.rejected)
        texts = [*(text for m in pair.prompt for text in (m.content, m.input)), *answers]
        if min(map(len, answers)) < f.min_answer_chars:
            return "short_answer"
        if f.max_chars and sum(map(len, texts)) > f.max_chars:
            return "too_long"
        if pair.chosen == pair.rejected:
            return "identical"
        if other_language(words.words("\n".join(texts)), pair.language, f.language):
            return "other_language"
        own, turned = (
            hashlib.sha256(repr((pair.prompt, *order)).encode(errors="surrogatepass")).digest()
            for order in (answers, answers[::-1])
        )
        if own in self.seen:
            return "duplicate"
        if turned in self.seen:
            return "contradiction"
        self.seen.add(own)
        return None
