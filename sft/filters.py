"""Filters: rules that drop poor conversations. Each rule's drops are counted under its name."""

import hashlib
import math
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

from data import words
from data.dedup import Deduplication, MinHash, jaccard
from data.quality import ENGLISH
from sft.conversations import Message
from stage import check_types

SIGNS = re.compile(r"\w+|[^\w\s.,;:!?'\"]")  # a word, or a sign other than those of a sentence
JUDGED = 20  # texts of fewer words are not judged by language or repetition
# Frequent words of French, German, Spanish, Italian, Portuguese and Dutch that are not English words.
FOREIGN = frozenset(
    """de la le les et des un une du que est pour qui dans au sur pas avec ce il sont cette der und das den von zu mit
    ist nicht ein eine auch auf für sich dem es im wie als el los las por con del se como una su lo más esta hay il
    di che della sono gli nel anche più alla um uma não os dos da em mais ao pelo het een ik niet zijn voor
    met maar ook wat deze""".encode().split()
) - {b"as", b"in", b"me", b"do", b"so", b"no"}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The rules for conversations and for pairs. Raises TypeError or ValueError, with the field's name."""

    min_answer_chars: int = 1  # drops an example with a shorter answer ("empty_answer", "short_answer")
    max_chars: int | None = 50_000  # drops a longer example ("too_long")
    # Drops an example in another language ("other_language"). If the data states no language and this is "en", a text
    # of 20 words or more is judged by its letters and frequent words. None keeps all.
    language: str | None = "en"

    def __post_init__(self):
        check_types(self)
        for name in ("min_answer_chars", "max_chars", "max_same_answers"):
            value = getattr(self, name, None)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")


@dataclass(frozen=True, kw_only=True)
class Filters(Limits):
    """The rules for conversations."""

    # Largest share of repeated four-word runs in an answer of 20 words or more ("repeats_itself").
    max_repetition: float = 0.5
    max_same_answers: int | None = 20  # most conversations with the same answer of 20 words or more ("same_answer")
    # Drops a copy ("duplicate"), and a conversation that is similar to an earlier one in every message
    # ("near_duplicate"), not only in a system message, instruction or context. None keeps similar conversations.
    near_duplicates: Deduplication | None = Deduplication()

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.max_repetition <= 1:
            raise ValueError(f"max_repetition is {self.max_repetition}; expected 0 to 1")


class Judge:
    """Applies the rules to one example after another, and remembers those that pass."""

    def __init__(self, filters: Limits):
        self.filters, self.seen, self.answers = filters, set(), Counter()
        self.minhash = getattr(filters, "near_duplicates", None) and MinHash(filters.near_duplicates)
        self.bands: dict[int, int] = {}  # {a band of a signature: the first conversation that has it}
        self.texts: list[list[tuple[str, np.ndarray]]] = []  # for each conversation the hashed words of its texts

    def rule(self, example) -> str | None:
        """The name of the first rule that an example fails. None if it passes all; then it is remembered."""
        texts = [text for message in example.messages for text in (message.content, message.input)]
        shortest = min(len(answer.strip()) for answer in example.answers)
        if shortest < self.filters.min_answer_chars:
            return "short_answer" if shortest else "empty_answer"
        if self.filters.max_chars and sum(map(len, texts)) > self.filters.max_chars:
            return "too_long"
        if other_language("\n".join(texts), example.language, self.filters.language):
            return "other_language"
        return self.own_rule(example)

    def own_rule(self, conversation) -> str | None:
        """The rule that a conversation fails by its repetitions or as a copy."""
        prints = []
        for answer in conversation.answers:
            spelled = words.words(answer)
            prints.append(words.fingerprint(spelled).item())
            if len(spelled) < JUDGED:
                continue
            runs = words.ngrams(words.hashes(spelled), 4)
            if 1 - len(np.unique(runs)) / len(runs) > self.filters.max_repetition:
                return "repeats_itself"
            if self.answers[prints[-1]] >= (self.filters.max_same_answers or math.inf):
                return "same_answer"
        digest = hashlib.sha256(repr(conversation.messages).encode()).digest()
        if digest in self.seen:
            return "duplicate"
        if self.minhash and self.near(conversation.messages):
            return "near_duplicate"
        self.seen.add(digest)
        self.answers.update(prints)
        return None

    def near(self, messages: tuple[Message, ...]) -> bool:
        """True if each text is near the text at the same place in one earlier conversation; else it is remembered."""
        texts = []  # (role, hashes of words)
        for message in messages:
            lines = [message.content]
            if message.role != "assistant":  # line by line: all prompts may begin with the same instruction
                lines = filter(str.strip, f"{message.content}\n{message.input}".split("\n"))
            for line in lines:
                spelled = words.words(line)
                if len(spelled) < JUDGED:  # in a short text signs count too: C is not C++
                    spelled = [word.encode() for word in SIGNS.findall(line.lower()) or [line]]
                texts.append((message.role, words.hashes(spelled)))
        # The texts take turns to give the rows of one signature. So conversations that differ in one text seldom share
        # a band, even if their other texts are long and equal.
        signatures = [self.minhash.signature(self.minhash.shingles(hashes)) for _, hashes in texts]
        rows = np.arange(len(signatures[0]))
        signature = np.stack(signatures)[rows % len(texts), rows].reshape(self.minhash.bands, -1)
        bands = words.mix((signature * self.minhash.powers).sum(axis=1) + self.minhash.numbers).tolist()
        for other in set(map(self.bands.get, bands)) - {None}:
            if len(texts) == len(self.texts[other]) and all(map(self.alike, texts, self.texts[other])):
                return True
        for band in bands:
            self.bands.setdefault(band, len(self.texts))
        self.texts.append(texts)
        return False

    def alike(self, text: tuple[str, np.ndarray], other: tuple[str, np.ndarray]) -> bool:
        """True if two texts are of one role and near each other."""
        (role, a), (other_role, b) = text, other
        if role == "user":  # many prompts begin alike, and a few other words make another question
            left = without_common_ends(a, b)
            if all(map(len, left)):
                a, b = left
        likeness = jaccard(self.minhash.shingles(a), self.minhash.shingles(b))
        return role == other_role and likeness >= self.filters.near_duplicates.threshold


def without_common_ends(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two texts without their common beginning and their common end."""
    for _ in range(2):  # the second time, they are reversed
        length = min(len(a), len(b))
        common = np.argmin(np.append(a[:length] == b[:length], False))
        a, b = a[common:][::-1], b[common:][::-1]
    return a, b


def other_language(text: str, stated: str | None, wanted: str | None) -> bool:
    """True if a text is not in the wanted language. stated: its language, if the data says it."""
    if wanted is None or stated is not None:
        return wanted not in (None, stated)
    spelled = words.words(text)
    if wanted != "en" or len(spelled) < JUDGED:
        return False
    english, foreign = sum(map(ENGLISH.__contains__, spelled)), sum(map(FOREIGN.__contains__, spelled))
    letters = b"".join(spelled)
    ascii_letters = len(letters.decode().encode("ascii", "ignore"))
    return 2 * ascii_letters < len(letters) or foreign > max(english, len(spelled) // 20)
