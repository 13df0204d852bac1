"""Cleaning: what is taken out, and that the rest stays as it was."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.clean import Cleaning, clean

PLAIN = Cleaning(html=False, repeated_line_chars=0)


def test_by_hand():
    assert clean("\n\n  a\tb \r\nc\x00\x07d\rlast\u00a0  \n\n\n") == "  a\tb\ncd\nlast"
    assert clean("def f():\n    return 1\n\n\nx") == "def f():\n    return 1\n\n\nx"
    assert clean("a\n\n\n\n\n\nb\x0cc\u2028d\x85e") == "a\n\n\nb\nc\nd\ne"


@pytest.mark.parametrize(
    ("broken", "whole"),
    [
        ("donâ€™t, CafÃ©, naÃ¯ve, Â£5, Ã\xa0 la, â‚¬3", "don’t, Café, naïve, £5, à la, €3"),
        ("zero\u200bwidth\ufeff, half\ud800 a pair, lost\ufffd", "zerowidth, half a pair, lost"),
        ("a\u202eb\u2066c\ue000d", "abcd"),
        ("thin\u2009and\u3000wide", "thin and wide"),
        ("é Å ÃO Âme 👩\u200d🚀 می\u200cخواهم", "é Å ÃO Âme 👩\u200d🚀 می\u200cخواهم"),
    ],
)
def test_broken_unicode(broken, whole):
    assert clean(broken) == whole


@pytest.mark.parametrize(
    ("marked", "text"),
    [
        ("<p>One <b>bold</b><br/>two</p><p>three &amp; four</p>", "One bold\ntwo\n\nthree & four"),
        ('<a href="x">link</a> &lt;b&gt; &#8212; &amp;quot;q&amp;quot;', 'link <b> — "q"'),
        ("&#" + "1" * 5_000 + ";x", "x"),
        ("a<!-- not\nthis -->b<SCRIPT>var x = '<p>';</script >c<style>p {}</style>d", "abcd"),
        ("if a < b and c > d: List<int>, x <- 3, <unk>", "if a < b and c > d: List<int>, x <- 3, <unk>"),
        ("a --> b, never <!-- closed", "a --> b, never <!-- closed"),
    ],
)
def test_html_left_overs(marked, text):
    assert clean(marked) == text
    assert clean(marked, PLAIN) == marked


def test_urls_are_kept_dropped_or_replaced():
    text = "See https://a.b/c?d=(e), www.x.org. And more."
    assert clean(text) == text
    assert clean(text, Cleaning(urls="drop")) == "See ), . And more."
    assert clean(text, Cleaning(urls="replace")) == "See <url>), <url>. And more."


def test_repeated_long_lines_are_dropped_and_short_ones_are_not():
    line = "This line of forty characters or more is said twice."
    code = "for x in y:\n    return None\nfor x in z:\n    return None"
    assert clean(f"{line}\nbetween\n{line}\n{code}") == f"{line}\nbetween\n{code}"
    assert clean(f"{line}\n{line}", Cleaning(repeated_line_chars=0)) == f"{line}\n{line}"


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match='urls is \'burn\'; expected "keep", "drop" or "replace"'):
        Cleaning(urls="burn")


@given(st.text())
def test_no_text_is_too_odd(text):
    for config in (Cleaning(urls="replace"), PLAIN):
        found = clean(text, config)
        found.encode()
        assert not any(unicodedata.category(c) in ("Cc", "Co", "Cs") and c not in "\t\n" for c in found)
        assert found == found.strip("\n")
        assert not any(line.endswith((" ", "\t")) for line in found.split("\n"))


@given(st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cf", "Co", "Cn", "Zs", "Zl", "Zp"))))
def test_plain_text_stays_as_it_was(text):
    text = text.translate({ord(c): None for c in "ÃÂâ\ufffd\xad"})
    assert clean(text, PLAIN) == text


RUNS = ["<!-- ", "<script>", "-->", "&amp;", "<b ", "http://", "\n" * 5, "Ã", "x" * 50 + "\n", " ", "\t", "\xa0"]


@pytest.mark.parametrize("bad", RUNS)
def test_no_pattern_takes_quadratic_time(bad):
    """It would take hours here."""
    text = "a" + bad * (4_000_000 // len(bad)) + "b"
    assert len(clean(text, Cleaning(urls="replace"))) <= len(text)
