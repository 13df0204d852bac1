"""The rules by name: each on a text made to fail it alone, the shares against plain Python."""

from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.quality import C4, PROSE, Gopher, Quality, _duplicate_share, _top_share, judge, select_lines
from data.words import hashes, ngrams, words

GOOD = """The harbour lay quiet under a low sky, and nobody had yet come down to open the sheds. Two gulls walked along
the wall as if they were paid to count its stones. When the first lorry arrived, its driver got out, looked at the water
for a long while, and decided that the crates could wait until somebody had made tea.

There is a kind of morning that belongs to such places. You can hear the ropes, and the bell on the far buoy, and what
people say to their dogs. Nothing is urgent; even the clock over the customs house has been five minutes late for years,
and the men who could mend it prefer to have the five minutes."""
FOREIGN = [
    "Il a son chapeau sur la table, un livre dans la poche, et la conviction que personne ne viendra le déranger.",
    "Meine Schwester hat im Garten einen Apfelbaum gepflanzt, der so langsam wächst, dass wir nie ernten können.",
    "Cuando se fue la luz, encendimos unas velas y me di cuenta de que hacía meses que no hablábamos sin mirar.",
    "Has de saber, amigo, que no hay camino tan llano que no tenga algún tropiezo, ni plazo que no se cumpla.",
]


def rule(text: str, quality: Quality = PROSE) -> str | None:
    return judge(text, words(text), hashes(words(text)), quality)


OFF = Gopher(**{f.name: () if "ngrams" in f.name else 10**9 * (f.name[:3] == "max") for f in fields(Gopher)})
LINES = GOOD.split("\n")


@pytest.mark.parametrize(
    ("name", "field", "text"),
    [
        ("words", "min_words", "Too short to be judged by the rules that follow, and that is that."),
        ("words", "max_words", "word " * 100_001),
        ("word_length", "max_word_length", "incomprehensibilities notwithstanding " * 30),
        ("word_length", "min_word_length", "to be or is it as we go " * 9),
        ("symbols", "max_symbols", GOOD.replace(".", "...").replace(",", "...").replace(" a ", "... ")),
        ("symbols", "max_symbols", GOOD.replace(" the", " #the") + " # # # # #"),
        ("bullet_lines", "max_bullet_lines", "\n".join(f"- {line}" for line in LINES if line)),
        ("ellipsis_lines", "max_ellipsis_lines", "\n".join(f"{line}…" for line in LINES)),
        ("alphabetic", "min_alphabetic", GOOD + " 1 2 3 4 5 6 7 8 9" * 5),
        ("stop_words", "min_stop_words", "Tea, biscuits; no ropes. " * 20),
        ("duplicate_lines", "max_duplicate_lines", "\n".join([*LINES, *["And so on."] * 5])),
        ("duplicate_line_chars", "max_duplicate_line_chars", "\n".join([GOOD, *LINES[:2]])),
        ("duplicate_paragraphs", "max_duplicate_paragraphs", GOOD + "\n\nSo it is." * 3),
        ("duplicate_paragraph_chars", "max_duplicate_paragraph_chars", f"{GOOD}\n\n{GOOD}"),
        ("top_2gram", "max_top_ngrams", GOOD + " every boat" * 20),
        ("top_3gram", "max_top_ngrams", GOOD + "".join(f" every boat goes {i}" for i in range(11, 22))),
        ("duplicate_5grams", "max_duplicate_ngrams", f"{GOOD} {GOOD[60:260]}"),
    ],
)
def test_gopher(name, field, text):
    """Each text fails one rule at its published value; good text passes."""
    gopher = replace(OFF, **{field: getattr(Gopher(), field)})
    assert rule(text, Quality(c4=None, gopher=gopher, min_english=None)) == f"gopher_{name}"
    assert rule(text, Quality(c4=None, gopher=OFF, min_english=None)) is None
    assert rule(GOOD, Quality(c4=None, gopher=gopher)) is None


def test_c4_rejects_texts_and_selects_lines():
    c4 = Quality(gopher=None)
    assert rule("One sentence of more than five words, and a second. Which it is.", c4) == "c4_sentences"
    assert rule(GOOD + "\nLorem Ipsum dolor sit amet.", c4) == "c4_banned: lorem ipsum"
    assert rule(GOOD + "\nvar harbour = {quiet: yes, with: gulls};", c4) == "c4_banned: {"
    kept = ["A line that ends as a sentence should.[1]", "", 'She said that it was "done and over."']
    dropped = [
        *("a heading without an end", "Too short.", "Please enable JavaScript to see this page."),
        *("By going on you agree to our use of cookies.", "This one ends in an ellipsis and goes..."),
    ]
    text = "\n".join([kept[0], *dropped, *kept[1:]])
    assert select_lines(text, C4()) == ("\n".join(kept).replace("[1]", ""), "\n".join(dropped))
    assert "a heading without an end" in select_lines(text, C4(terminal_punctuation=False))[0]
    assert select_lines(GOOD, C4(terminal_punctuation=False, min_line_words=1)) == (GOOD, "")


@given(st.lists(st.sampled_from([b"a", b"bb", b"ccc", b"dddd"]), max_size=60), st.integers(2, 10))
def test_shares_of_repeated_runs_are_those_of_plain_python(words, n):
    runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    counts, total = Counter(runs), sum(map(len, words))
    covered = {i + k for i, run in enumerate(runs) if counts[run] > 1 for k in range(n)}
    ends, numbers = np.cumsum([0, *map(len, words)]), ngrams(hashes(words), n)
    assert len(set(numbers.tolist())) == len(counts)
    assert _duplicate_share(numbers, ends, n) == pytest.approx(sum(len(words[i]) for i in covered) / max(1, total))
    most = max(counts.values(), default=0)
    tops = {most * sum(map(len, run)) / total for run, count in counts.items() if count == most} if most > 1 else {0.0}
    assert any(_top_share(numbers, ends, n) == pytest.approx(top) for top in tops)


def test_other_languages_are_rejected_and_english_is_not():
    english = Quality(c4=None, gopher=None)
    assert [rule(text, english) for text in [*FOREIGN, "港は静かだった。" * 20]] == ["not_english"] * 5
    assert not any(rule(sentence, english) for sentence in GOOD.replace("\n", " ").split(". "))
    assert rule(FOREIGN[0], replace(english, min_english=None)) is None
