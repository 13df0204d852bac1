"""The rules by name: each on a text made to fail it alone, the sums against plain Python."""

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


def rule(text: str, quality: Quality = PROSE) -> str | None:
    spelt = words(text)
    return judge(text, spelt, hashes(spelt), quality)


def test_good_text_passes():
    assert rule(GOOD) is None
    assert rule(select_lines(GOOD.replace("\n", " "), C4())[0], Quality()) is None


EXTREME = {"min": 0, "max": 10**9}
OFF = Gopher(
    **{f.name: () if f.name.endswith("ngrams") else EXTREME[f.name[:3]] for f in fields(Gopher)},
)
NUMBERS = " 1 2 3 4 5 6 7 8 9" * 5


@pytest.mark.parametrize(
    ("name", "field", "text"),
    [
        ("gopher_words", "min_words", "Too short to be judged by the rules that follow, and that is that."),
        ("gopher_words", "max_words", "word " * 100_001),
        ("gopher_word_length", "max_word_length", "incomprehensibilities notwithstanding " * 30),
        ("gopher_word_length", "min_word_length", "to be or is it as we go " * 9),
        ("gopher_symbols", "max_symbols", GOOD.replace(".", "...").replace(",", "...").replace(" a ", "... ")),
        ("gopher_symbols", "max_symbols", GOOD.replace(" the", " #the") + " # # # # #"),
        ("gopher_bullet_lines", "max_bullet_lines", "\n".join(f"- {line}" for line in GOOD.split("\n") if line)),
        ("gopher_ellipsis_lines", "max_ellipsis_lines", "\n".join(f"{line}…" for line in GOOD.split("\n"))),
        ("gopher_alphabetic", "min_alphabetic", GOOD + NUMBERS),
        ("gopher_stop_words", "min_stop_words", "Tea, biscuits; no ropes. " * 20),
        ("gopher_duplicate_lines", "max_duplicate_lines", "\n".join([*GOOD.split("\n"), *["And so on."] * 5])),
        ("gopher_duplicate_line_chars", "max_duplicate_line_chars", "\n".join([GOOD, *GOOD.split("\n")[:2]])),
        ("gopher_duplicate_paragraphs", "max_duplicate_paragraphs", GOOD + "\n\nSo it is." * 3),
        ("gopher_duplicate_paragraph_chars", "max_duplicate_paragraph_chars", f"{GOOD}\n\n{GOOD}"),
        ("gopher_top_2gram", "max_top_ngrams", GOOD + " every boat" * 20),
        ("gopher_top_3gram", "max_top_ngrams", GOOD + "".join(f" every boat goes {i}" for i in range(11, 22))),
        ("gopher_duplicate_5grams", "max_duplicate_ngrams", f"{GOOD} {GOOD[60:260]}"),
    ],
)
def test_gopher(name, field, text):
    """Each text fails one rule: the one whose field is on, at its published value, which good text passes."""
    gopher = replace(OFF, **{field: getattr(Gopher(), field)})
    assert rule(text, Quality(c4=None, gopher=gopher, min_english=None)) == name
    assert rule(text, Quality(c4=None, gopher=OFF, min_english=None)) is None
    assert rule(GOOD, Quality(c4=None, gopher=gopher, min_english=None)) is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c4_sentences", "One sentence that has more than five words in it, and a second. Which it is."),
        ("c4_banned: lorem ipsum", GOOD + "\nLorem Ipsum dolor sit amet, consectetur adipiscing."),
        ("c4_banned: {", GOOD + "\nvar harbour = {quiet: yes, with: gulls, and: tea};"),
    ],
)
def test_c4(name, text):
    assert rule(text, Quality(gopher=None)) == name


def test_c4_selects_lines():
    text = "\n".join(
        [
            "A line that ends as a sentence should.[1]",
            "a heading without an end",
            "Too short.",
            "Please enable JavaScript to see this page.",
            "By going on you agree to our use of cookies.",
            "",
            'She said that it was "done and over."',
            "This one ends in an ellipsis and goes...",
        ]
    )
    kept = 'A line that ends as a sentence should.\n\nShe said that it was "done and over."'
    assert select_lines(text, C4())[0] == kept
    assert select_lines(text, C4())[1].count("\n") == 4
    assert "a heading without an end" in select_lines(text, C4(terminal_punctuation=False))[0]
    assert select_lines(GOOD, C4(terminal_punctuation=False, min_line_words=1)) == (GOOD, "")


WORDS = st.lists(st.sampled_from([b"a", b"bb", b"ccc", b"dddd"]), max_size=60)


@given(WORDS, st.integers(2, 10))
def test_shares_of_repeated_runs_are_those_of_plain_python(spelt, n):
    runs = [tuple(spelt[i : i + n]) for i in range(len(spelt) - n + 1)]
    counts, total = Counter(runs), sum(map(len, spelt))
    covered = {i + k for i, run in enumerate(runs) if counts[run] > 1 for k in range(n)}
    ends = np.cumsum([0, *map(len, spelt)])
    found = ngrams(hashes(spelt), n)
    assert len(set(found.tolist())) == len(counts)
    assert _duplicate_share(found, ends, n) == pytest.approx(sum(len(spelt[i]) for i in covered) / max(1, total))
    most = max(counts.values(), default=0)
    tops = {most * sum(map(len, run)) / total for run, count in counts.items() if count == most} if most > 1 else {0.0}
    assert any(_top_share(found, ends, n) == pytest.approx(top) for top in tops)


FOREIGN = """
Le matin, quand la brume se lève sur le port, les pêcheurs réparent leurs filets en parlant du temps qu'il fera demain.
Il a son chapeau sur la table, un livre dans la poche, et la conviction tranquille que personne ne viendra le déranger.
Als der Zug endlich anhielt, standen die Reisenden schon lange an den Türen, und keiner wollte noch ein Wort sagen.
Meine Schwester hat im Garten einen Apfelbaum gepflanzt, der so langsam wächst, dass wir nie werden ernten können.
Por la tarde, los niños bajan a la plaza con una pelota vieja y juegan hasta que las madres los llaman a cenar.
Has de saber, amigo, que no hay camino tan llano que no tenga algún tropiezo, ni plazo tan largo que no se cumpla.
""".strip().split("\n")


def test_other_languages_are_rejected_and_english_is_not():
    assert [rule(text) for text in FOREIGN] == ["not_english"] * 6
    for paragraph in GOOD.split("\n\n"):
        for sentence in paragraph.replace("\n", " ").split(". "):
            assert rule(sentence, Quality(c4=None, gopher=None)) is None
    assert rule("港は静かだった。" * 20) == "not_english"
    assert rule(FOREIGN[0], Quality(c4=None, gopher=None, min_english=None)) is None
