"""Filters: for each rule a conversation that fails it and one that just passes."""

import pytest

from data.dedup import Deduplication
from sft.conversations import Conversation, Message
from sft.filters import Filters, Judge


def talk(*contents: str, language: str | None = None, about: str = "", system: str = "") -> Conversation:
    """What user and assistant say, in turn."""
    messages = [Message("system", system)] * bool(system)
    for number, content in enumerate(contents):
        role = "assistant" if number % 2 else "user"
        messages.append(Message(role, content, about if number == 0 else ""))
    return Conversation("x", tuple(messages), (contents[0],), language)


def rules(*conversations: Conversation, **options) -> list[str | None]:
    judge = Judge(Filters(**options))
    return [judge.rule(conversation) for conversation in conversations]


def numbered(count: int, first: int = 0) -> str:
    """Words of which no two are alike and none is English."""
    return " ".join(f"w{first + number}" for number in range(count))


def test_answers_that_are_short_and_conversations_that_are_long():
    assert rules(talk("Hi", " \n"), talk("Hi", "a"), talk("Hi", "Hello", "And?", "")) == [
        "empty_answer", None, "empty_answer"]  # fmt: skip
    short = rules(talk("Hi", "four"), talk("Hi", "fives"), talk("Ho", "fives", "And", "four"), min_answer_chars=5)
    assert short == ["short_answer", None, "short_answer"]
    long = talk("1234", "6789", about="56", system="0")
    assert rules(talk("12345", "67890"), talk("12345", "678901"), long, max_chars=10) == [None, "too_long", "too_long"]
    assert rules(talk("a", "b" * 50_000), max_chars=None) == [None]


def test_answers_that_repeat_themselves():
    """a b c d a b c d … of n words has n - 3 runs of four words, four of them new: 23 words have 20 runs."""
    loop = " ".join("abcd"[i % 4] for i in range(23))
    assert rules(talk("q", loop), language=None, max_repetition=16 / 20) == [None]
    assert rules(talk("q", loop), language=None, max_repetition=16 / 20 - 1e-9) == ["repeats_itself"]
    short = " ".join("a" for _ in range(19))  # too short to judge
    assert rules(talk("q", short), talk("q", short + " a"), language=None) == [None, "repeats_itself"]
    assert rules(talk(loop, "Indeed."), language=None) == [None]  # a question may


def test_the_same_answer_to_many_questions():
    """Answers of 20 words, without case and punctuation; only conversations that are kept count."""
    answer, options = numbered(20), {"language": None, "near_duplicates": None, "max_same_answers": 2}
    asked = [talk(numbered(30, 100 * i), answer) for i in range(1, 5)]
    assert rules(*asked, **options) == [None, None, "same_answer", "same_answer"]
    assert rules(asked[0], asked[0], asked[0], asked[1], asked[2], **options) == [
        None, "duplicate", "duplicate", None, "same_answer"]  # fmt: skip
    other = talk("and now?", answer.upper().replace(" ", ", "))
    assert rules(asked[0], asked[1], other, **options)[2] == "same_answer"


def test_the_language_that_the_data_states_counts():
    german, english = "Der Hund und die Katze sind nicht da. " * 4, "The dog and the cat are not in the house. " * 4
    options = {"max_repetition": 1.0}
    both = talk(german, "Ja", language="en"), talk(english, "Yes", language="de")
    assert rules(*both, **options) == [None, "other_language"]
    assert rules(*both, language="de", **options) == ["other_language", None]
    assert rules(talk(german, "Ja", language="de"), language=None, **options) == [None]
    foreign = talk(numbered(30), "w99", language="de")  # a dropped conversation is not remembered
    assert rules(foreign, foreign._replace(language="en")) == ["other_language", None]


TEXTS = {
    "Wo ist der Hund? Er ist nicht in dem Haus, und die Katze ist auch nicht mit ihm auf der Bank.": False,
    "Le chat est sur la table et il ne mange pas avec les autres dans la cuisine, ce n'est pas bon.": False,
    "Где находится библиотека? Она на улице, рядом с парком "
    + "и старой церковью, которую построили давно " * 3: False,
    "Wo ist der Hund? Er ist nicht in dem Haus.": True,  # too short to judge
    "List ten cities. Rome, Lyon, Bonn, Graz, Bari, Nice, Kiel, Linz, Pisa, Metz, Oslo, Bern, Cork.": True,
    " ".join(f"{a} × {b} = {a * b}" for a in range(9) for b in range(9)): True,
}


@pytest.mark.parametrize(("text", "kept"), TEXTS.items())
def test_language_by_letters_and_frequent_words(text, kept):
    assert rules(talk(text, "Yes.")) == [None if kept else "other_language"]
    assert rules(talk(text, "Yes."), language="de") == [None]  # only English is judged by its words


def test_copies_are_dropped():
    text = numbered(60)
    first, loud = talk(text, "So be it."), talk(text.upper(), "So, be it!")
    one_word, long_answer = talk(text + " too", "So be it."), talk(numbered(40), numbered(80, 100))
    assert rules(first, first, loud, one_word, talk(numbered(30), "So be it."), language=None) == [
        None, "duplicate", "near_duplicate", "near_duplicate", None]  # fmt: skip
    changed = talk(numbered(40) + " w", numbered(79, 100))
    assert rules(long_answer, changed, language=None) == [None, "near_duplicate"]
    assert rules(first, first, loud, language=None, near_duplicates=None) == [None, "duplicate", None]
    assert rules(first, talk("So be it.", text), language=None) == [None, None]
    assert rules(talk("?", "!"), talk("?", "!"), talk("¿", "!")) == [None, "duplicate", None]  # no words
    # 62 words have 60 shingles of three words; with another last word, 59 of 61 are shared.
    first, second = talk("Count.", numbered(62)), talk("Count.", numbered(61) + " other")
    for threshold, expected in ((59 / 61, "near_duplicate"), (59 / 61 + 1e-6, None)):
        strict = Deduplication(threshold=threshold)
        assert rules(first, second, language=None, near_duplicates=strict) == [None, expected]


LONG = numbered(158)
WORDS = ("yes", "no", "maybe")
SHARED = {  # conversations that differ in their shorter text
    "instruction": [talk(LONG, WORDS[i % 3], about=f"The film number {i} was long.") for i in range(500)],
    "system": [talk(f"What is the capital of country {i}?", f"City {i}.", system=LONG) for i in range(500)],
    "context": [talk(f"Who is person {i}?", f"Person {i} of 500.", about=LONG) for i in range(500)],
    "one prompt": [talk(f"{LONG}\nReview: film {i}\nAnswer:", WORDS[i % 3]) for i in range(500)],
    "answer": [talk(f"May I do {i}?", f"{numbered(19)} {i}") for i in range(500)],
    "earlier turns": [talk(LONG, "Well.", f"And number {i}?", WORDS[i % 3]) for i in range(500)],
    "one letter": [talk(LONG + f"\n\n{sign}", "yes") for sign in "+-*/"],
    "words": [talk(f"Fix: a{sign}b", "yes") for sign in "+-*/"],
}


def test_questions_that_differ_in_one_place_are_no_copies():
    """After a beginning on the same line, before an end, or in signs only; a word more or a full stop makes a copy."""
    films = [talk(f"{LONG} Review: film {i}", WORDS[i % 3]) for i in range(100)]
    assert rules(*films, language=None) == [None] * 100
    assert rules(*(talk(f"Film {i}: {LONG}", "yes") for i in range(100)), language=None) == [None] * 100
    languages = [talk(f"What is {name}?", f"{name}.") for name in ("C", "C++", "C#")]
    assert rules(*languages, talk("what is c++", "C++!")) == [None, None, None, "near_duplicate"]
    assert rules(talk(LONG, "yes"), talk(f"Now {LONG}.", "Yes!"), language=None) == [None, "near_duplicate"]


@pytest.mark.parametrize("shared", SHARED)
def test_a_text_that_many_conversations_share_makes_no_copy(shared):
    talks, copies = SHARED[shared], []
    for each in talks:
        louder = Message("assistant", each.answers[-1] + "!")
        copies.append(each._replace(messages=(*each.messages[:-1], louder)))
    expected = [None] * len(talks) + ["near_duplicate"] * len(talks)
    assert rules(*talks, *copies, language=None) == expected


def test_changed_copies_are_found():
    """Of copies that share nine tenths of each text nearly all are found, and of those that share half none."""
    near, far = [], []
    for number in range(100):
        question, answer = numbered(60, 1_000 * number), numbered(90, 1_000 * number + 500)
        near += [talk(question, answer), talk(f"x{number} {question}", f"{answer} y{number}")]
        far += [talk(question, answer), talk(question[: len(question) // 2], answer)]
    assert rules(*near, language=None).count("near_duplicate") >= 98
    assert rules(*far, language=None).count("near_duplicate") == 0


def test_impossible_settings_are_refused():
    impossible = {"min_answer_chars": 0, "max_chars": 0, "max_same_answers": 0, "max_repetition": float("nan")}
    for field, value in [*impossible.items(), ("max_repetition", 1.5), ("near_duplicates", 0.8)]:
        with pytest.raises(TypeError if field == "near_duplicates" else ValueError, match=f"^{field} is "):
            Filters(**{field: value})
