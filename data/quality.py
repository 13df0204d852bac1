"""Which text is worth learning from: the published rules of C4 and Gopher, and whether it is English.

Every rule has a name, under which the corpus counts what it rejects.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data.words import ngrams
from stage import check_types


@dataclass(frozen=True, kw_only=True)
class C4:
    """The heuristics of C4 (arXiv:1910.10683, section 2.2), the list of bad words left out. Lines first, then text."""

    terminal_punctuation: bool = True
    """Drops lines that do not end in . ! ? or a closing quotation mark. Not for verse or headings."""
    min_line_words: int = 5
    """Drops shorter lines."""
    boilerplate: tuple[str, ...] = (
        "javascript",
        "terms of use",
        "privacy policy",
        "cookie policy",
        "uses cookies",
        "use of cookies",
        "use cookies",
    )
    """Drops lines with one of these in them, whatever the case."""
    min_sentences: int = 3
    """Rejects a text with fewer."""
    banned: tuple[str, ...] = ("lorem ipsum", "{")
    """Rejects a text with one of these in it, whatever the case."""

    def __post_init__(self):
        check_types(self)


@dataclass(frozen=True, kw_only=True)
class Gopher:
    """The quality and repetition rules of MassiveText (arXiv:2112.11446, appendix A.1.1). Shares are of 0 to 1."""

    min_words: int = 50
    max_words: int = 100_000
    min_word_length: float = 3
    """Mean characters a word."""
    max_word_length: float = 10
    max_symbols: float = 0.1
    """Hash signs, and ellipses, to words: each for itself."""
    max_bullet_lines: float = 0.9
    """Share of lines that start with a bullet."""
    max_ellipsis_lines: float = 0.3
    """Share of lines that end in an ellipsis."""
    min_alphabetic: float = 0.8
    """Share of words with a letter in them."""
    min_stop_words: int = 2
    """How many of the, be, to, of, and, that, have, with."""
    max_duplicate_lines: float = 0.3
    """Share of lines that repeat an earlier one."""
    max_duplicate_line_chars: float = 0.2
    """Share of characters in them."""
    max_duplicate_paragraphs: float = 0.3
    max_duplicate_paragraph_chars: float = 0.2
    max_top_ngrams: tuple[float, ...] = (0.20, 0.18, 0.16)
    """Share of characters in all occurrences of the most frequent run of 2, 3, 4 words, if it occurs more than once."""
    max_duplicate_ngrams: tuple[float, ...] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)
    """Share of characters in runs of 5, 6, … 10 words that occur more than once."""

    def __post_init__(self):
        check_types(self)


@dataclass(frozen=True, kw_only=True)
class Quality:
    """The rules that a source's texts have to pass. None switches a set of rules off."""

    c4: C4 | None = C4()
    gopher: Gopher | None = Gopher()
    min_english: float | None = 0.15
    """Share of words that are among some 100 frequent ones of English, those left out that are also words of French,
    German or Spanish."""

    def __post_init__(self):
        check_types(self)


PROSE = Quality(c4=None)
"""For books and other text that people set line by line."""

STOP_WORDS = {b"the", b"be", b"to", b"of", b"and", b"that", b"have", b"with"}
ENGLISH = frozenset(
    b"""the of and to that is it for was with his he they be at this have from or had by but not what all were we when
    your can said there use each which she how their if would up other about out many then them these some her make
    like him into time has look two more write go see could people my than first been call who its now find long down
    day did get come made may part i you are""".split()
)  # no: "a", "an", "in", "on", "me", "no", "do", "so", "as", "will", "son", "one"

BULLETS = ("•", "‣", "◦", "●", "▪", "-", "*", "–", "—")
ELLIPSES = ("...", "…")
CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*(?=\s|$)")
TERMINAL = (".", "!", "?", '"', "”")
LETTER = re.compile(r"[^\W\d_]\S*")  # from the first letter of a word to its end: once a word


def select_lines(text: str, c4: C4) -> tuple[str, str]:
    """The lines of a text that C4 keeps, and those that it drops; empty ones stay, they part paragraphs."""

    def good(line: str) -> bool:
        return not line.strip() or (
            (not c4.terminal_punctuation or (line.endswith(TERMINAL) and not line.endswith(ELLIPSES)))
            and len(line.split()) >= c4.min_line_words
            and not any(phrase.lower() in line.lower() for phrase in c4.boilerplate)
        )

    lines = CITATION.sub("", text).split("\n")
    dropped = [line for line in lines if not good(line)]
    if not dropped:
        return "\n".join(lines), ""
    return re.sub(r"\n{3,}", "\n\n", "\n".join(filter(good, lines))), "\n".join(dropped)


def judge(text: str, words: list[bytes], hashes: np.ndarray, quality: Quality) -> str | None:
    """The name of the first rule that a text fails, or None. words, hashes: the text's, of `data.words`."""
    if sum(map(ENGLISH.__contains__, words)) < (quality.min_english or 0) * len(words):
        return "not_english"
    for rules, failures in ((quality.c4, _c4), (quality.gopher, _gopher)):
        if rules and (rule := next(failures(text, words, hashes, rules), None)):
            return rule
    return None


def _c4(text: str, words: list[bytes], hashes: np.ndarray, c4: C4) -> Iterator[str]:
    lower = text.lower()
    for phrase in c4.banned:
        if phrase.lower() in lower:
            yield f"c4_banned: {phrase}"
    if len(SENTENCE_END.findall(text)) < c4.min_sentences:
        yield "c4_sentences"


def _gopher(text: str, words: list[bytes], hashes: np.ndarray, gopher: Gopher) -> Iterator[str]:
    spaced = text.split()
    count = len(spaced)
    if not gopher.min_words <= count <= gopher.max_words:
        yield "gopher_words"
    if not gopher.min_word_length <= sum(map(len, spaced)) / max(1, count) <= gopher.max_word_length:
        yield "gopher_word_length"
    if max(text.count("#"), sum(map(text.count, ELLIPSES))) > gopher.max_symbols * count:
        yield "gopher_symbols"
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if sum(line.startswith(BULLETS) for line in lines) > gopher.max_bullet_lines * len(lines):
        yield "gopher_bullet_lines"
    if sum(line.endswith(ELLIPSES) for line in lines) > gopher.max_ellipsis_lines * len(lines):
        yield "gopher_ellipsis_lines"
    if len(LETTER.findall(text)) < gopher.min_alphabetic * count:
        yield "gopher_alphabetic"
    if sum(map(STOP_WORDS.__contains__, words)) < gopher.min_stop_words:
        yield "gopher_stop_words"

    paragraphs = [part.strip() for part in text.split("\n\n") if part.strip()]
    for what, parts in (("line", lines), ("paragraph", paragraphs)):
        repeats, characters = _repeats(parts)
        if repeats > getattr(gopher, f"max_duplicate_{what}s") * len(parts):
            yield f"gopher_duplicate_{what}s"
        if characters > getattr(gopher, f"max_duplicate_{what}_chars") * len(text):
            yield f"gopher_duplicate_{what}_chars"

    ends = np.cumsum([0, *map(len, words)])  # characters (bytes, in fact) before each word
    for n, limit in enumerate(gopher.max_top_ngrams, start=2):
        if _top_share(ngrams(hashes, n), ends, n) > limit:
            yield f"gopher_top_{n}gram"
    limits = gopher.max_duplicate_ngrams  # of ever longer runs, which cover ever less
    for n, limit in enumerate(limits, start=5):
        share = _duplicate_share(ngrams(hashes, n), ends, n)
        if share > limit:
            yield f"gopher_duplicate_{n}grams"
        if share <= min(limits):
            return


def _repeats(parts: list[str]) -> tuple[int, int]:
    """How many of some texts repeat an earlier one, and how many characters they have."""
    if len(set(parts)) == len(parts):
        return 0, 0
    seen: set[str] = set()
    repeats = [part for part in parts if part in seen or seen.add(part)]
    return len(repeats), sum(map(len, repeats))


def _top_share(runs: np.ndarray, ends: np.ndarray, n: int) -> float:
    """Characters in the most frequent run of n words, over all; of equally frequent ones, in the first in number."""
    if not len(runs):
        return 0.0
    _, first, counts = np.unique(runs, return_index=True, return_counts=True)
    top = int(counts.argmax())
    if counts[top] == 1:
        return 0.0
    start = first[top]
    return float(counts[top] * (ends[start + n] - ends[start]) / ends[-1])


def _duplicate_share(runs: np.ndarray, ends: np.ndarray, n: int) -> float:
    """Characters in runs of n words that occur more than once, over all; each character counts once."""
    if not len(runs):
        return 0.0
    order = np.argsort(runs, kind="stable")
    equal = runs[order[1:]] == runs[order[:-1]]
    if not equal.any():
        return 0.0
    repeated = np.zeros(len(runs), dtype=np.int64)
    repeated[order[1:][equal]] = repeated[order[:-1][equal]] = 1
    # A word is covered if one of the n runs that it lies in is repeated.
    before = np.concatenate([np.zeros(n, dtype=np.int64), np.cumsum(repeated), np.full(n - 1, repeated.sum())])
    covered = before[n:] > before[:-n]
    return float(np.diff(ends)[covered].sum() / ends[-1])
