"""Cuts a long text at gaps between its paragraphs; where there are none, between lines, sentences, words."""

import itertools
import re
import zlib
from collections.abc import Iterator, Sequence

SECTION_CHARS = 6_000  # documents over twice this length are judged in sections of about this to twice this length
GAPS = [re.compile(gap) for gap in (r"\n{2,}", r"\n", r"(?<=[.!?]) +", " +")]


def sections(text: str) -> list[str]:
    """Cuts a text that is longer than two sections. The sections joined give the text."""
    # The text before a gap decides if it is a cut: so copies of a text are cut alike, even if one has a preface.
    if len(text) <= 2 * SECTION_CHARS:
        return [text]
    cuts, last = [0], 0  # last: the latest gap at which the section can end
    for gap in _gaps(text, 0, len(text), GAPS):
        if gap - cuts[-1] > 2 * SECTION_CHARS and last > cuts[-1]:
            cuts.append(last)
        before = text[max(last, gap - 200) : gap].strip()
        if gap - cuts[-1] >= SECTION_CHARS and zlib.crc32(before.encode()) % 4 == 0:
            cuts.append(gap)
        last = gap
    if len(cuts) > 1 and len(text) - cuts[-1] < SECTION_CHARS // 2:
        del cuts[-1]
    return [text[start:end] for start, end in itertools.pairwise([*cuts, len(text)])]


def _gaps(text: str, start: int, end: int, kinds: Sequence[re.Pattern]) -> Iterator[int]:
    """The ends of the paragraphs from start to end; of the lines of a paragraph that is longer than a section; …"""
    if end - start <= SECTION_CHARS or not kinds:
        yield from range(start + SECTION_CHARS, end, SECTION_CHARS)
        yield end
        return
    for match in kinds[0].finditer(text, start, end):
        yield from _gaps(text, start, match.end(), kinds[1:])
        start = match.end()
    if start < end:
        yield from _gaps(text, start, end, kinds[1:])


def cut(text: str, fraction: float) -> tuple[str, str]:
    """Cuts off about the last `fraction` of a text, at the best gap: a paragraph, else a line, a sentence, a word."""
    size, ends = len(text), []
    goal = size * (1 - fraction)
    first, last = max(1, round(size * (1 - 2 * fraction))), min(size - 1, round(size * (1 - fraction / 2)))
    for kind in GAPS:
        ends = ends or [match.end() for match in kind.finditer(text, first, last)]
    place = min(ends or [round(goal)], key=lambda end: abs(end - goal))
    place = min(max(1, place), size - 1)
    return text[:place].rstrip("\n"), text[place:]
