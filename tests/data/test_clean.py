"""Cleaning: what is removed, and that all other text stays."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.clean import Cleaning, clean

PLAIN = Cleaning(html=False, repeated_line_chars=0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n\n  a\tb \r\nc\x00\x07d\rlast\u00a0  \n\n\n", "  a\tb\ncd\nlast"),
        ("a\n\n\n\n\n\nb\x0cc\u2028d\x85e", "a\n\n\nb\nc\nd\ne"),
        ("zero\u200bwidth\ufeff, half\ud800 a pair, lost\ufffd", "zerowidth, half a pair, lost"),
        ("a\u202eb\u2066c\ue000d", "abcd"),
        ("thin\u2009and\u3000wide", "thin and wide"),
        ("<p>One <b>bold</b><br/>two</p><p>three &amp; four</p>", "One bold\ntwo\n\nthree & four"),
        ('<a href="x">link</a> &lt;b&gt; &#8212; &amp;quot;q&amp;quot;', 'link <b> — "q"'),
        ("a<!-- not\nthis -->b<SCRIPT>var x = '<p>';</script >c<style>p {}</style>d", "abcd"),
        ("<TD nowrap>x</TD>H<sub>2</sub>O<li>y", "x\nH2O\ny"),
    ],
)
def test_by_hand(text, expected):
    assert clean(text) == (expected, "")


@pytest.mark.parametrize(
    "text",
    [
        *("parse(&params)", "?id=1&section=2&copy=1", "x &lt y, AT&T; &notit; R&D", "&#" + "1" * 5_000 + ";x"),
        *("List<A> x", "std::vector<b> v", "Map<K, V>", "Foo<P> y", "a<b and c>d", "i <s or u> v", "<unk> <name>"),
        *("if a < b and c > d: List<int>, x <- 3", "a --> b, never <!-- closed", "def f():\n    return 1\n\n\nx"),
        *("“A IRMÔ", "AMANHÃ…", "DÂ‘N TỘC Â“", "Ã‚ bÃ‡", "İÇİNDEKİLER Ã§Ã", "é Å ÃO Âme 👩\u200d🚀 می\u200cخواهم"),
    ],
)
def test_text_that_looks_like_html_or_mojibake_stays(text):
    assert clean(text) == (text, "")


def test_options():
    broken = "donâ€™t, CafÃ©, naÃ¯ve, Â£5, â‚¬3\nAMANHÃ…"  # the second line is correct and stays correct
    assert clean(broken, Cleaning(mojibake=True))[0] == "don’t, Café, naïve, £5, €3\nAMANHÃ…"
    assert clean("<p>a &amp; b</p>", PLAIN)[0] == "<p>a &amp; b</p>"
    text = "See https://a.b/c?d=(e), www.x.org. And more."
    assert clean(text)[0] == text
    assert clean(text, Cleaning(urls="drop"))[0] == "See ), . And more."
    assert clean(text, Cleaning(urls="replace"))[0] == "See <url>), <url>. And more."
    with pytest.raises(ValueError, match='urls is \'burn\'; expected "keep", "drop" or "replace"'):
        Cleaning(urls="burn")
    line = "This line of forty characters or more is said twice."
    code = "for x in y:\n    return None\nfor x in z:\n    return None"
    assert clean(f"{line}\nbetween\n{line}\n{code}\n{line}") == (f"{line}\nbetween\n{code}", f"{line}\n{line}")
    assert clean(f"{line}\n{line}", PLAIN) == (f"{line}\n{line}", "")


@given(st.text())
def test_no_text_is_too_odd(text):
    for config in (Cleaning(urls="replace"), PLAIN):
        cleaned, _ = clean(text, config)
        cleaned.encode()
        assert not any(unicodedata.category(c) in ("Cc", "Co", "Cs") and c not in "\t\n" for c in cleaned)
        assert cleaned == cleaned.strip("\n")
        assert not any(line.endswith((" ", "\t")) for line in cleaned.split("\n"))


@given(st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cf", "Co", "Cn", "Zs", "Zl", "Zp"))))
def test_plain_text_stays_as_it_was(text):
    text = text.replace("\ufffd", "").replace("\xad", "")
    assert clean(text, PLAIN) == (text, "")


BAD = ["<!-- ", "<script>", "--><!--", "&amp;", "<b ", "http://", " ", "\t", "\n" * 5, "\xa0", "x" * 50]


@pytest.mark.parametrize("bad", BAD)
def test_no_pattern_takes_quadratic_time(bad):
    """It would take hours here."""
    text = "a" + bad * (2_000_000 // len(bad)) + "b"
    assert len(clean(text, Cleaning(urls="replace"))[0]) <= len(text)
