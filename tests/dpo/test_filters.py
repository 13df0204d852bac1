"""Filters of pairs: for each rule a pair that fails it and one that just passes."""

from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.filters import PairFilters, PairJudge
from dpo.pairs import Pair
from sft.conversations import Message


def pair(
    asked: str, chosen: str, rejected: str, language: str | None = None, system: str = "", about: str = ""
) -> Pair:
    prompt = (Message("system", system),) * bool(system) + (Message("user", asked, about),)
    return Pair("x", prompt, chosen, rejected, (asked,), language=language)


def rules(*pairs: Pair, **options) -> list[str | None]:
    judge = PairJudge(PairFilters(**options))
    return [judge.rule(each) for each in pairs]


def test_either_answer_may_be_short_and_all_texts_count_for_the_length():
    assert rules(pair("Hi", "", "a"), pair("Hi", "a", " "), pair("Hi", "a", "b")) == [*["empty_answer"] * 2, None]
    short = rules(pair("Hi", "fives", "four"), pair("Hi", "fives", "other"), min_answer_chars=5)
    assert short == ["short_answer", None]
    longest = pair("123", "45", "67", system="8", about="90")
    longer = [longest._replace(chosen="450"), longest._replace(rejected="670")]
    longer += [pair("123", "45", "67", system=s, about=i) for s, i in (("88", "90"), ("8", "900"))]
    assert rules(longest, *longer, max_chars=10) == [None, *["too_long"] * 4]


def test_copies_and_contradictions():
    first, turned = pair("Hi", "a", "b"), pair("Hi", "b", "a")
    assert rules(first, first._replace(id="y", keys=("z",)), turned, turned, pair("Hi", "b", "c")) == [
        None, "duplicate", "contradiction", "contradiction", None]  # fmt: skip
    others = pair("Ho", "b", "a"), pair("Hi", "a", "b", system="S"), pair("Hi", "a", "b", about="i")
    assert rules(first, *others) == [None] * 4
    assert rules(pair("q", "a', 'b", "c"), pair("q", "a", "b', 'c"), pair("q\na", "b", "c")) == [None] * 3
    foreign = pair("Hi", "a", "b", language="de")
    assert rules(foreign, turned) == ["other_language", None]


WORD = st.sampled_from(["", "a", "b", "c"])


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from("pq"), WORD, WORD), max_size=20))
def test_each_choice_is_kept_once(triples):
    found = rules(*[pair(*triple) for triple in triples])
    kept = [(asked, frozenset(answers)) for (asked, *answers), rule in zip(triples, found, strict=True) if rule is None]
    assert len(set(kept)) == len(kept)
    assert set(kept) == {(asked, frozenset(answers)) for asked, *answers in triples if len({*answers} - {""}) == 2}
    assert found.count("empty_answer") == sum(not (a and b) for _, a, b in triples)
    assert found.count("identical") == sum(a == b != "" for _, a, b in triples)
