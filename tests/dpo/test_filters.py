"""Filters of pairs: for each rule a pair that fails it and one that just passes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.filters import PairFilters, PairJudge
from dpo.pairs import Pair
from sft.conversations import Message


def pair(
    asked: str, chosen: str, rejected: str, language: str | None = None, system: str = "", input: str = ""
) -> Pair:
    prompt = (Message("system", system),) * bool(system) + (Message("user", asked, input),)
    return Pair("x", prompt, chosen, rejected, (asked,), language=language)


def rules(*pairs: Pair, **options) -> list[str | None]:
    judge = PairJudge(PairFilters(**options))
    return [judge.rule(each) for each in pairs]


def test_equal_answers_teach_nothing():
    assert rules(pair("Hi", "a", "a"), pair("Hi", "a", "A"), pair("Ho", "a", "a")) == ["identical", None, "identical"]


def test_answers_that_are_short():
    """Either counts."""
    assert rules(pair("Hi", "", "a"), pair("Hi", "a", ""), pair("Hi", "", ""), pair("Hi", "a", "b")) == [
        "empty_answer", "empty_answer", "empty_answer", None]  # fmt: skip
    four, five = pair("Hi", "fives", "four"), pair("Hi", "fives", "other")
    assert rules(four, five, min_answer_chars=5) == ["short_answer", None]


def test_pairs_that_are_long():
    """All that is said counts once: the prompt, what it is about, and both answers; and nothing else."""
    whole = pair("123", "45", "67", system="8", input="90")
    longer = [whole._replace(chosen="450"), whole._replace(rejected="670")]
    longer += [pair("123", "45", "67", system=s, input=i) for s, i in (("88", "90"), ("8", "900"))]
    assert rules(whole, *longer, max_chars=10) == [None, *["too_long"] * 4]
    assert rules(whole, max_chars=9) == ["too_long"]
    long = pair("1", "2" * 25_000, "3" * 24_999)
    assert rules(long, long._replace(rejected="3" * 25_000)) == [None, "too_long"]
    assert rules(pair("1", "2" * 50_000, "3"), max_chars=None) == [None]


GERMAN, ENGLISH = "Der Hund und die Katze sind nicht da. " * 4, "The dog and the cat are not in the house. " * 4


def test_language_by_the_data():
    assert rules(pair(GERMAN, "Ja", "Nein", "en"), pair(ENGLISH, "Yes", "No", "de")) == [None, "other_language"]
    assert rules(pair(GERMAN, "Ja", "Nein", "de"), pair(ENGLISH, "Yes", "No", "en"), language="de") == [
        None, "other_language"]  # fmt: skip
    assert rules(pair(GERMAN, "Ja", "Nein", "de"), language=None) == [None]


def test_language_by_frequent_words_wherever_they_stand():
    assert rules(pair(GERMAN, "Yes", "No"), pair(ENGLISH, "Yes", "No")) == ["other_language", None]
    assert rules(pair("Hi", GERMAN, "No"), pair("Hi", "Yes", GERMAN)) == ["other_language"] * 2
    assert rules(pair("Hi", "Yes", "No", system=GERMAN)) == ["other_language"]
    assert rules(pair(GERMAN, "Ja", "Nein"), language="de") == [None]  # nothing here knows German


def test_it_takes_twenty_words_to_judge():
    """Words of what is said; who says it is none."""
    words = "der die das und nicht ist ein eine mit auf von zu dem den des sich"  # 16
    nineteen, twenty = pair(words, "ja", "nein doch"), pair(words, "ja doch", "nein doch")
    assert rules(nineteen, twenty) == [None, "other_language"]
    assert rules(pair(words, "ja", "nein", system="oh")) == [None]


def test_copies():
    first = pair("Hi", "a", "b")
    assert rules(first, first, first._replace(id="y", keys=("z",)), pair("Hi", "a", "c")) == [
        None, "duplicate", "duplicate", None]  # fmt: skip
    assert rules(first, pair("Ho", "a", "b"), pair("Hi", "a", "b", system="S"), pair("Hi", "a", "b", input="i")) == [
        None] * 4  # fmt: skip


def test_of_two_opinions_the_first_stays():
    first, turned = pair("Hi", "a", "b"), pair("Hi", "b", "a")
    assert rules(first, turned, turned, first) == [None, "contradiction", "contradiction", "duplicate"]
    assert rules(turned, first) == [None, "contradiction"]
    assert rules(first, pair("Ho", "b", "a"), pair("Hi", "b", "c"), pair("Hi", "c", "a")) == [None] * 4


def test_what_stands_where_is_told_apart():
    """No joining of the texts makes two pairs one."""
    pairs = [pair("q", "a', 'b", "c"), pair("q", "a", "b', 'c"), pair("q\na", "b", "c"), pair("q", "a\nb", "c")]
    assert rules(*pairs) == [None] * 4
    swapped = pair("q", "a", "b")._replace(prompt=(Message("user", "q", "a"),))
    assert rules(pair("q", "a", "b"), swapped) == [None] * 2


def test_what_is_dropped_is_not_remembered():
    foreign = pair("Hi", "a", "b", language="de")
    assert rules(foreign, foreign._replace(language="en"), pair("Hi", "b", "a", language="en")) == [
        "other_language", None, "contradiction"]  # fmt: skip


WORD = st.sampled_from(["", "a", "b", "c"])


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from("pq"), WORD, WORD), max_size=20))
def test_what_is_kept_says_each_thing_once(triples):
    pairs = [pair(*triple) for triple in triples]
    found = rules(*pairs)
    kept = [triple for triple, rule in zip(triples, found, strict=True) if rule is None]
    said = [(asked, frozenset(answers)) for asked, *answers in kept]
    assert len(set(said)) == len(said)
    assert all(len(answers) == 2 and "" not in answers for _, answers in said)
    assert {(q, frozenset(a)) for q, *a in triples if len(set(a)) == 2 and all(a)} == set(said)
    assert found.count("empty_answer") == sum(not (a and b) for _, a, b in triples)
    assert found.count("identical") == sum(a == b != "" for _, a, b in triples)
    assert rules(*[pair(*triple) for triple in kept]) == [None] * len(kept)


@pytest.mark.parametrize(("field", "value"), [("min_answer_chars", 0), ("max_chars", 0), ("max_chars", -1)])
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=f"^{field} is {value}; expected at least 1"):
        PairFilters(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_answer_chars", None),
        ("min_answer_chars", 1.5),
        ("max_chars", "many"),
        ("max_chars", True),
        ("language", 3),
    ],
)
def test_wrong_types_are_refused(field, value):
    with pytest.raises(TypeError, match=f"^{field} is "):
        PairFilters(**{field: value})
