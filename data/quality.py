"""Rules that reject poor text: the published rules of C4 and Gopher, and a test for English."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data.words import ngrams
from stage import check_types


@dataclass(frozen=True, kw_only=True)
class C4:
    """The heuristics of C4 (arXiv:1910.10683, section 2.2) without its list of bad words."""

    # Drops lines that do not end in . ! ? or a closing quotation mark. Not for verse or headings.
    terminal_punctuation: bool = True
    min_line_words: int = 5  # drops shorter lines
    # Drops lines that contain one of these phrases in any case.
    boilerplate: tuple[str, ...] = (
        *("javascript", "terms of use", "privacy policy", "cookie policy"),
        *("uses cookies", "use of cookies", "use cookies"),
    )
    min_sentences: int = 3  # rejects a text with fewer sentences
    banned: tuple[str, ...] = ("lorem ipsum", "{")  # rejects a text that contains one of these in any case

    __post_init__ = check_types


@dataclass(frozen=True, kw_only=True)
class Gopher:
    """The quality and repetition rules of MassiveText (arXiv:2112.11446, appendix A.1.1). Shares are from 0 to 1."""

    min_words: int = 50
    max_words: int = 100_000
    min_word_length: float = 3  # mean characters per word
    max_word_length: float = 10
    max_symbols: float = 0.1  # hash signs per word, and ellipses per word
    max_bullet_lines: float = 0.9  # share of lines that start with a bullet
    max_ellipsis_lines: float = 0.3  # share of lines that end in an ellipsis
    min_alphabetic: float = 0.8  # share of words that contain a letter
    min_stop_words: int = 2  # how many of the, be, to, of, and, that, have, with
    max_duplicate_lines: float = 0.3  # share of lines that repeat an earlier line
    max_duplicate_line_chars: float = 0.2  # share of characters in such lines
    max_duplicate_paragraphs: float = 0.3
    max_duplicate_paragraph_chars: float = 0.2
    # Share of characters in all occurrences of the most frequent run of 2, 3, 4 words, if it occurs more than once.
    max_top_ngrams: tuple[float, ...] = (0.20, 0.18, 0.16)
    # Share of characters in runs of 5, 6, … 10 words that occur more than once.
    max_duplicate_ngrams: tuple[float, ...] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)

    __post_init__ = check_types


@dataclass(frozen=True, kw_only=True)
class Quality:
    """The rules that the texts of a source must pass. None switches a set of rules off."""

    c4: C4 | None = C4()
    gopher: Gopher | None = Gopher()
    # Least share of words that are in ENGLISH, 85 frequent words that are not also French, German or Spanish.
    min_english: float | None = 0.15

    __post_init__ = check_types


PROSE = Quality(c4=None)  # for books and other text with line breaks inside paragraphs

STOP_WORDS = set(b"the be to of and that have with".split())
ENGLISH = frozenset(
    b"""the of and to that is it for was with his he they be at this have from or had by but not what all were we when
    your can said there use each which she how their if would up other about out many then them these some her make
    like him into time has look two more write go see could people my than first been call who its now find long down
    day did get come made may part i you are""".split()
)  # other languages have these too: "a", "an", "in", "on", "me", "no", "do", "so", "as", "will", "son", "one"

BULLETS = ("•", "‣", "◦", "●", "▪", "-", "*", "–", "—")
ELLIPSES = ("...", "…")
CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*(?=\s|$)")
TERMINAL = (".", "!", "?", '"', "”")
LETTER = re.compile(r"[^\W\d_]\S*")  # from the first letter of a word to its end: matches once per word


def select_lines(text: str, c4: C4) -> tuple[str, str]:
    """Splits a text into the lines that C4 keeps and the lines that it drops. Keeps empty lines."""
    kept, dropped = [], []
    for line in CITATION.sub("", text).split("\n"):
        ends = not c4.terminal_punctuation or (line.endswith(TERMINAL) and not line.endswith(ELLIPSES))
        good = ends and len(line.split()) >= c4.min_line_words and not _phrase(line, c4.boilerplate)
        (kept if good or not line.strip() else dropped).append(line)
    text = "\n".join(kept)
    return re.sub(r"\n{3,}", "\n\n", text) if dropped else text, "\n".join(dropped)


def _phrase(text: str, phrases: tuple[str, ...]) -> str | None:
    """The first phrase that a text contains in any case, or None."""
    lower = text.lower()
    return next((phrase for phrase in phrases if phrase.lower() in lower), None)


def judge(text: str, words: list[bytes], hashes: np.ndarray, quality: Quality) -> str | None:
    """The name of the first rule that a text fails, or None. words, hashes: of the text, from `data.words`."""
    if sum(map(ENGLISH.__contains__, words)) < (quality.min_english or 0) * len(words):
        return "not_english"
    if c4 := quality.c4:
        if banned := _phrase(text, c4.banned):
            return f"c4_banned: {banned}"
        if len(SENTENCE_END.findall(text)) < c4.min_sentences:
            return "c4_sentences"
    if quality.gopher:
        return next(_gopher(text, words, hashes, quality.gopher), None)
    return None


def _gopher(text: str, words: list[bytes], hashes: np.ndarray, gopher: Gopher) -> Iterator[str]:
    """Yields the names of the rules of Gopher that a text fails."""
    spaced = text.split()
    count, chars = len(spaced), sum(map(len, spaced))
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    paragraphs = [part.strip() for part in text.split("\n\n") if part.strip()]
    symbols = max(text.count("#"), sum(map(text.count, ELLIPSES)))
    bullets = sum(line.startswith(BULLETS) for line in lines)
    ellipses = sum(line.endswith(ELLIPSES) for line in lines)
    failed = {
        "words": not gopher.min_words <= count <= gopher.max_words,
        "word_length": not gopher.min_word_length <= chars / max(1, count) <= gopher.max_word_length,
        "symbols": symbols > gopher.max_symbols * count,
        "bullet_lines": bullets > gopher.max_bullet_lines * len(lines),
        "ellipsis_lines": ellipses > gopher.max_ellipsis_lines * len(lines),
        "alphabetic": len(LETTER.findall(text)) < gopher.min_alphabetic * count,
        "stop_words": sum(map(STOP_WORDS.__contains__, words)) < gopher.min_stop_words,
    }
    for kind, parts in (("line", lines), ("paragraph", paragraphs)):
        once = set(parts)
        repeated = sum(map(len, parts)) - sum(map(len, once))
        most = getattr(gopher, f"max_duplicate_{kind}s") * len(parts)
        failed[f"duplicate_{kind}s"] = len(parts) - len(once) > most
        failed[f"duplicate_{kind}_chars"] = repeated > getattr(gopher, f"max_duplicate_{kind}_chars") * len(text)
    for name, fails in failed.items():
        if fails:
            yield f"gopher_{name}"
    ends = np.cumsum([0, *map(len, words)])  # bytes before each word
    for n, limit in enumerate(gopher.max_top_ngrams, start=2):
        if _top_share(ngrams(hashes, n), ends, n) > limit:
            yield f"gopher_top_{n}gram"
    for n, limit in enumerate(gopher.max_duplicate_ngrams, start=5):
        share = _duplicate_share(ngrams(hashes, n), ends, n)
        if share > limit:
            yield f"gopher_duplicate_{n}grams"
        if share <= min(gopher.max_duplicate_ngrams):  # longer runs cover less
            break


def _top_share(runs: np.ndarray, ends: np.ndarray, n: int) -> float:
    """Share of characters in the most frequent run of n words; 0 if no run occurs twice."""
    _, first, counts = np.unique(runs, return_index=True, return_counts=True)
    if counts.max(initial=1) == 1:
        return 0.0
    start = first[counts.argmax()]
    return float(counts.max() * (ends[start + n] - ends[start]) / ends[-1])


def _duplicate_share(runs: np.ndarray, ends: np.ndarray, n: int) -> float:
    """Share of characters in runs of n words that occur more than once. Each character counts once."""
    _, kinds, counts = np.unique(runs, return_inverse=True, return_counts=True)
    if counts.max(initial=1) == 1:
        return 0.0
    covered = np.convolve(counts[kinds] > 1, np.ones(n)) > 0.5  # words in a run that is repeated
    return float(np.diff(ends)[covered].sum() / ends[-1])
