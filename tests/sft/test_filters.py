"""Filters: for each rule a conversation that fails it and one that just passes."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.dedup import Deduplication
from sft.conversations import Conversation, Message
from sft.filters import Filters, Judge


def talk(*contents: str, language: str | None = None, id: str = "x", input: str = "") -> Conversation:
    """What user and assistant say, in turn."""
    roles = ("user", "assistant") * len(contents)
    messages = [Message(role, content) for role, content in zip(roles, contents, strict=False)]
    messages[0] = messages[0]._replace(input=input)
    return Conversation(id, tuple(messages), contents[0], language)


def rules(*conversations: Conversation, **options) -> list[str | None]:
    with TemporaryDirectory() as directory, Judge(Filters(**options), Path(directory)) as judge:
        return [judge.rule(each) for each in conversations]


def numbered(count: int, first: int = 0) -> str:
    """So many words, no two alike, none of them English."""
    return " ".join(f"w{first + i}" for i in range(count))


def test_answers_that_say_nothing():
    assert rules(talk("Hi", ""), talk("Hi", "a"), talk("Hi", "Hello", "And?", "")) == [
        "empty_answer", None, "empty_answer"]  # fmt: skip


def test_answers_that_are_short():
    """Each answer counts."""
    found = rules(talk("Hi", "four"), talk("Hi", "fives"), talk("Ho", "fives", "And", "four"), min_answer_chars=5)
    assert found == ["short_answer", None, "short_answer"]


def test_conversations_that_are_long():
    """All messages count, and what a user's message is about."""
    assert rules(talk("12345", "67890"), talk("12345", "678901"), max_chars=10) == [None, "too_long"]
    assert rules(talk("1234", "67890", input="5"), talk("1234", "67890", input="56"), max_chars=10) == [
        None, "too_long"]  # fmt: skip
    assert rules(talk("a", "b" * 50_000)) == ["too_long"]
    assert rules(talk("a", "b" * 50_000), max_chars=None) == [None]


def test_answers_that_repeat_themselves():
    """a b c d a b c d … of n words has n - 3 runs of four words, four of them new: 23 words have 20 runs."""
    loop = " ".join("abcd"[i % 4] for i in range(23))
    assert rules(talk("q", loop), language=None) == ["repeats_itself"]
    assert rules(talk("q", loop), language=None, max_repetition=16 / 20) == [None]
    assert rules(talk("q", loop), language=None, max_repetition=16 / 20 - 1e-9) == ["repeats_itself"]
    short = " ".join("a" for _ in range(19))  # too short to judge
    assert rules(talk("q", short), language=None) == [None]
    assert rules(talk("q", short + " a"), language=None) == ["repeats_itself"]
    assert rules(talk(loop, "Indeed."), language=None) == [None]  # a question may


def test_the_same_answer_to_many_questions():
    """Of 20 words or more, whatever their case and commas; counted where it is kept."""
    answer = numbered(20)
    asked = [talk(numbered(30, 100 * i), answer) for i in range(1, 5)]
    options = {"language": None, "near_duplicates": None, "max_same_answers": 2}
    assert rules(*asked, **options) == [None, None, "same_answer", "same_answer"]
    assert rules(*asked, **(options | {"max_same_answers": None})) == [None] * 4
    other = talk("and now?", answer.upper().replace(" ", ", "))
    assert rules(asked[0], asked[1], other, **options)[2] == "same_answer"
    short = [talk(numbered(30, 100 * i), numbered(19)) for i in range(1, 5)]
    assert rules(*short, **options) == [None] * 4
    assert rules(asked[0], asked[0], asked[0], asked[1], asked[2], **options) == [
        None, "duplicate", "duplicate", None, "same_answer"]  # fmt: skip


def test_language_by_the_data():
    """Its word counts, whatever the text looks like."""
    german, english = "Der Hund und die Katze sind nicht da. " * 4, "The dog and the cat are not in the house. " * 4
    options = {"max_repetition": 1.0}
    assert rules(talk(german, "Ja", language="en"), talk(english, "Yes", language="de"), **options) == [
        None, "other_language"]  # fmt: skip
    assert rules(talk(german, "Ja", language="de"), talk(english, "Yes", language="en"), language="de", **options) == [
        None, "other_language"]  # fmt: skip
    assert rules(talk(german, "Ja", language="de"), language=None, **options) == [None]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Wo ist der Hund? Er ist nicht in dem Haus, und die Katze ist auch nicht mit ihm auf der Bank.", False),
        ("Le chat est sur la table et il ne mange pas avec les autres dans la cuisine, ce n'est pas bon.", False),
        ("Где находится библиотека? Она находится на главной улице города, рядом с большим парком и старой церковью, "
         "которую построили давно, когда мой дед был ещё молод.", False),
        ("Wo ist der Hund? Er ist nicht in dem Haus.", True),  # too short to judge
        ("List ten cities. Rome, Lyon, Bonn, Graz, Bari, Nice, Kiel, Linz, Pisa, Metz, Oslo, Bern, Cork.", True),
        (" ".join(f"{a} × {b} = {a * b}" for a in range(9) for b in range(9)), True),
    ],
)  # fmt: skip
def test_language_by_frequent_words(text, kept):
    assert rules(talk(text, "Yes.")) == [None if kept else "other_language"]
    assert rules(talk(text, "Yes."), language="de") == [None]  # nothing here knows German


def test_copies():
    text = numbered(60)
    first, again = talk(text, "So be it."), talk(text, "So be it.", id="y")
    loud, near = talk(text.upper(), "So, be it!"), talk(text, "So be it now.")
    far = talk(numbered(30) + " " + numbered(30, 500), "So be it.")
    assert rules(first, again, loud, near, far, language=None) == [
        None, "duplicate", "near_duplicate", "near_duplicate", None]  # fmt: skip
    assert rules(first, again, loud, near, language=None, near_duplicates=None) == [None, "duplicate", *[None] * 2]
    swapped = talk("So be it.", text)
    assert rules(first, swapped, language=None, near_duplicates=None) == [None, None]


def test_nearness_is_that_of_the_threshold():
    """62 words have 60 shingles of three; with the last word another they share 59 of 61."""
    first, second = talk(numbered(60), "so indeed"), talk(numbered(60), "so not")
    for threshold, expected in ((59 / 61, "near_duplicate"), (59 / 61 + 1e-6, None)):
        strict = Deduplication(threshold=threshold)
        assert rules(first, second, language=None, near_duplicates=strict) == [None, expected]


def test_what_is_dropped_is_not_remembered():
    """A copy of a conversation that was dropped is judged by itself."""
    foreign = talk(numbered(30), "w99", language="de")
    assert rules(foreign, foreign._replace(language="en")) == ["other_language", None]


def test_words_may_be_none():
    assert rules(talk("?", "!"), talk("?", "!"), talk("¿", "!")) == [None, "duplicate", None]


WORDS = st.lists(st.sampled_from(["the", "is", "x", "y", "w1", "w2", "É"]), max_size=30).map(" ".join)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(WORDS, WORDS), max_size=12))
def test_no_two_that_are_kept_are_copies(pairs):
    talks = [talk(asked or "?", answer) for asked, answer in pairs]
    found = rules(*talks)
    kept = [each for each, rule in zip(talks, found, strict=True) if rule is None]
    assert len({each.messages for each in kept}) == len(kept)
    assert rules(*kept) == [None] * len(kept)
    assert found.count("empty_answer") == sum(not answer for _, answer in pairs)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_answer_chars", 0),
        ("max_chars", 0),
        ("max_same_answers", 0),
        ("max_repetition", 1.5),
        ("max_repetition", float("nan")),
    ],
)
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=f"^{field} is "):
        Filters(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_answer_chars", None),
        ("min_answer_chars", 1.5),
        ("max_chars", "many"),
        ("language", 3),
        ("max_repetition", True),
        ("max_same_answers", 2.0),
        ("near_duplicates", 0.8),
    ],
)
def test_wrong_types_are_refused(field, value):
    with pytest.raises(TypeError, match=f"^{field} is "):
        Filters(**{field: value})
