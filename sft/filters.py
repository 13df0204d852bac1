"""Which conversations are worth learning from. Every rule has a name, under which what it drops is counted."""

import hashlib
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from data import words
from data.dedup import Deduplication, Index, MinHash
from data.quality import ENGLISH
from sft.conversations import Conversation
from stage import check_types

JUDGED = 20  # words that it takes to say something of a text's language or of its loops
# Frequent words of French, German, Spanish, Italian, Portuguese and Dutch that are no English words.
FOREIGN = frozenset(
    """de la le les et des un une du que est pour qui dans au sur pas avec ce il sont cette der und das den von zu mit
    ist nicht ein eine auch auf für sich dem es im wie als el los las por con del se como una su lo más esta hay il
    di che della sono gli nel anche più alla um uma não os dos da em mais ao pelo het een ik niet zijn voor
    met maar ook wat deze""".encode().split()
) - {b"as", b"in", b"me", b"do", b"so", b"no"}


@dataclass(frozen=True, kw_only=True)
class Filters:
    """The rules. Raises TypeError or ValueError, naming the field, for what cannot be."""

    min_answer_chars: int = 1
    """A conversation with a shorter answer is dropped ("empty_answer", "short_answer")."""
    max_chars: int | None = 50_000
    """A conversation that is longer in all is dropped ("too_long")."""
    language: str | None = "en"
    """Where the data says which language a conversation is in, only this is kept. Elsewhere, for "en", one of 20 words
    or more is dropped if most of its letters are not ASCII, or if it has more frequent words of other European
    languages than of English ("other_language"). None keeps all."""
    max_repetition: float = 0.5
    """An answer of 20 words or more is dropped if a greater share of its four-word runs has stood in it before
    ("repeats_itself")."""
    max_same_answers: int | None = 20
    """So many conversations may give the same answer of 20 words or more; later ones are dropped ("same_answer")."""
    near_duplicates: Deduplication | None = Deduplication()
    """What counts as a copy of an earlier conversation ("duplicate" where it is exact, "near_duplicate")."""

    def __post_init__(self):
        check_types(self)
        for name in ("min_answer_chars", "max_chars", "max_same_answers"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        if not 0 <= self.max_repetition <= 1:
            raise ValueError(f"max_repetition is {self.max_repetition}; expected 0 to 1")


class Judge:
    """Applies the rules to one conversation after another, of which it remembers what later ones may repeat."""

    def __init__(self, filters: Filters, directory: Path):
        """directory: where its index may be while it is in use."""
        self.directory = directory
        self.filters, self.exact, self.answers = filters, set(), Counter()
        self.minhash = MinHash(filters.near_duplicates) if filters.near_duplicates else None

    def __enter__(self) -> "Judge":
        with ExitStack() as held:
            directory = held.enter_context(TemporaryDirectory(dir=self.directory))
            self.index = held.enter_context(Index(self.filters.near_duplicates, Path(directory)))
            self.held = held.pop_all()
        return self

    def __exit__(self, *exception) -> None:
        self.held.close()

    def rule(self, conversation: Conversation) -> str | None:
        """The name of the first rule that a conversation fails; None, and it is remembered, if it passes all."""
        rules: tuple[Callable[[Conversation], str | None], ...] = (self._answers, self._language, self._copies)
        return next(filter(None, (rule(conversation) for rule in rules)), None)

    def _answers(self, conversation: Conversation) -> str | None:
        f = self.filters
        answers = [m.content for m in conversation.messages if m.role == "assistant"]
        if not all(answers):
            return "empty_answer"
        if min(map(len, answers)) < f.min_answer_chars:
            return "short_answer"
        if f.max_chars and sum(len(m.content) + len(m.input) for m in conversation.messages) > f.max_chars:
            return "too_long"
        for answer in answers:
            found = words.words(answer)
            if len(found) >= JUDGED:
                runs = words.ngrams(words.hashes(found), 4)
                if 1 - len(np.unique(runs)) / len(runs) > f.max_repetition:
                    return "repeats_itself"
                if f.max_same_answers and self.answers[words.fingerprint(found).item()] >= f.max_same_answers:
                    return "same_answer"
        return None

    def _language(self, conversation: Conversation) -> str | None:
        found = words.words(_text(conversation))
        return "other_language" if other_language(found, conversation.language, self.filters.language) else None

    def _copies(self, conversation: Conversation) -> str | None:
        digest = hashlib.sha256(repr(conversation.messages).encode(errors="surrogatepass")).digest()
        if digest in self.exact:
            return "duplicate"
        found = words.words(_text(conversation))
        if self.minhash and found:
            shingles = self.minhash.shingles(words.hashes(found))
            keys = np.concatenate([words.fingerprint(found), self.minhash.keys(shingles)])
            if self.index.duplicate(keys, shingles):
                return "near_duplicate"
        self.exact.add(digest)
        for message in conversation.messages:
            if message.role == "assistant" and len(found := words.words(message.content)) >= JUDGED:
                self.answers[words.fingerprint(found).item()] += 1
        return None


def other_language(found: list[bytes], stated: str | None, wanted: str | None) -> bool:
    """Whether a text, of whose words the language may be stated, is in another than is wanted; None: none is."""
    if wanted is None or stated is not None:
        return wanted not in (None, stated)
    if wanted != "en" or len(found) < JUDGED:
        return False
    english, foreign = (sum(map(known.__contains__, found)) for known in (ENGLISH, FOREIGN))
    letters = b"".join(found)
    return sum(byte > 127 for byte in letters) > len(letters) / 2 or foreign > max(english, len(found) // 20)


def _text(conversation: Conversation) -> str:
    return "\n".join(f"{message.content}\n{message.input}" for message in conversation.messages)
