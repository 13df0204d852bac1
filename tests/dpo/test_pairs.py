"""Pairs: each layout by hand, refused records, and the pairs made from Python's documentation.

What pairs share with conversations (files, datasets, cleaning) is tested in tests/sft/test_conversations.py.
"""

import random
from collections import Counter

import pytest

from cli import UserError
from data.holdout import split_hash
from data.sources import PythonDocs, Unreadable
from dpo.pairs import DocPairs, Pairs, repeated, shuffled
from sft.conversations import DocQuestions, Message
from tests.conftest import write_lines
from tests.sft.test_conversations import raw  # noqa: F401 - a fixture


def read(raw, *records, **options) -> list:  # noqa: F811
    write_lines(raw / "a.jsonl", records)
    return list(Pairs(paths=("a.jsonl",), **options).pairs(1))


def said(pair) -> tuple[list[tuple[str, str]], str, str]:
    return [(m.role, m.text()) for m in pair.prompt], pair.chosen, pair.rejected


def chat(*turns: str, answer: str | None = None) -> list[dict]:
    """Messages of user and assistant in turn, then perhaps an answer."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return messages if answer is None else [*messages, {"role": "assistant", "content": answer}]


SYSTEM = {"role": "system", "content": "S"}
ANSWERS = {"chosen": "Hello", "rejected": "What?"}
STRINGS = {"prompt": "Hi"} | ANSWERS
ALONE = {"prompt": chat("Hi"), "chosen": chat(answer="Hello"), "rejected": chat(answer="What?")}
IMPLICIT = {"chosen": chat("Hi", answer="Hello"), "rejected": chat("Hi", answer="What?")}
ULTRAFEEDBACK = {"prompt": "Hi", "messages": chat("Hi", "Hello"), **IMPLICIT, "score_chosen": 8.0}
ORCA = {"system": "S", "question": "Hi", "chosen": "Hello", "rejected": "What?"}
HH = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: What?"}
GREETING = ([("user", "Hi")], "Hello", "What?")
WITH_SYSTEM = ([("system", "S"), ("user", "Hi")], "Hello", "What?")
TURNS = [("user", "Hi"), ("assistant", "Hello"), ("user", "And?")]
BEFORE = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: And?\n\nAssistant:"
LONG = [SYSTEM, *chat("Hi", "Hello", "And?")]
NAMED = HH["chosen"] + "\nHuman: no. Assistant: no."
BY_HAND = [
    ("preference", STRINGS, GREETING),
    ("preference", ALONE, GREETING),
    ("preference", IMPLICIT | {"prompt": chat("Hi")}, GREETING),
    ("preference", IMPLICIT | {"prompt": chat("Hi"), "rejected": "What?"}, GREETING),
    ("preference", IMPLICIT, GREETING),
    ("preference", IMPLICIT | {"prompt": []}, GREETING),
    ("preference", IMPLICIT | {"question": "Hi"}, GREETING),
    ("preference", ULTRAFEEDBACK, GREETING),
    ("preference", ALONE | {"prompt": [SYSTEM, *chat("Hi")]}, WITH_SYSTEM),
    ("preference", IMPLICIT | {"system": "S"}, WITH_SYSTEM),
    ("preference", STRINGS | {"prompt": "And?", "history": [["Hi", "Hello"]]}, (TURNS, "Hello", "What?")),
    ("preference", {"instruction": "Hi", "input": "a", **ANSWERS}, ([("user", "Hi\n\na")], "Hello", "What?")),
    ("preference", {"prompt": BEFORE, "chosen": " Yes.", "rejected": " No."}, (TURNS, "Yes.", "No.")),
    ("orca", ORCA, WITH_SYSTEM),
    ("orca", ORCA | {"system": " "}, GREETING),
    ("hh", HH, GREETING),
    ("hh", {"chosen": BEFORE + " Yes.\n\nOr no.", "rejected": BEFORE}, (TURNS, "Yes.\n\nOr no.", "")),
    ("hh", {name: text.strip() for name, text in HH.items()}, GREETING),
    ("hh", HH | {"chosen": NAMED}, ([("user", "Hi")], "Hello\nHuman: no. Assistant: no.", "What?")),
]


@pytest.mark.parametrize(("name", "record", "expected"), BY_HAND)
def test_each_layout_by_hand(raw, name, record, expected):  # noqa: F811
    (pair,) = read(raw, record)
    assert said(pair) == expected
    question = next(text for role, text in expected[0] if role == "user")
    assert (pair.id, pair.keys, pair.kind, pair.language) == ("a.jsonl:1", (question,), "", None)
    assert read(raw, record, format=name) == [pair]


def test_more_fields_in_some_rows_change_no_layout(raw, caplog):  # noqa: F811
    more = STRINGS | {"question": "Hi", "score": 1}
    for records in ([STRINGS, more], [more, STRINGS]):
        with caplog.at_level("INFO", "lumi"):
            assert [said(pair) for pair in read(raw, *records)] == [GREETING] * 2
    unread = "pairs: fields that are not read, with the number of their records"
    assert caplog.messages == [f'{unread}: "question" 1, "score" 1'] * 2


BAD = [
    (STRINGS, STRINGS | {"prompt": 7}, "prompt is 7; expected a string"),
    (STRINGS, STRINGS | {"chosen": None}, "the fields prompt, rejected; the nearest layout, preference, needs chosen;"),
    (STRINGS, ANSWERS, "chosen is no transcript, .* an answer alone needs the field prompt"),
    (STRINGS, STRINGS | {"rejected": {}}, "rejected is {}; expected a string"),
    (ALONE, ALONE | {"prompt": [7]}, "prompt: message 1 has the role None and is 7; expected content, and the role"),
    (ALONE, ALONE | {"chosen": chat("Hello")}, "chosen does not end with an answer of the assistant"),
    (ALONE, IMPLICIT | {"rejected": []}, "rejected does not end with an answer"),
    (ALONE, ALONE | {"prompt": chat("Hi", "Hello")}, "message 3 is of role assistant, expected user"),
    (ALONE, IMPLICIT | {"prompt": chat("Ho")}, "chosen is a conversation without the messages of prompt"),
    (ALONE, IMPLICIT | {"prompt": "Ho"}, "chosen is a conversation without the messages of prompt"),
    (IMPLICIT, IMPLICIT | {"rejected": chat("Ho", answer="a")}, "chosen and rejected differ before the last message"),
    (IMPLICIT, IMPLICIT | {"rejected": LONG[1:] + chat(answer="b")}, "chosen and rejected differ before the last"),
    (ORCA, ORCA | {"question": ""}, "message 2, the user's, is empty"),
    (HH, HH | {"chosen": "Oh." + HH["chosen"]}, "chosen is no transcript, which begins"),
    (HH, HH | {"rejected": ""}, "rejected is no transcript"),
    (HH, HH | {"chosen": BEFORE + " Yes\n\nHuman: Bye"}, "chosen does not end with an answer"),
]


@pytest.mark.parametrize(("good", "bad", "message"), BAD)
def test_bad_records_are_named_by_line_or_skipped(raw, good, bad, message):  # noqa: F811
    with pytest.raises(UserError, match=rf"^{raw}/a\.jsonl, line 2: .*({message}).*; or set unreadable=\"skip\"$"):
        read(raw, good, bad, good)
    first, why, last = read(raw, good, bad, good, unreadable="skip")
    assert isinstance(why, Unreadable)
    assert (said(first), last.id) == (said(last), "a.jsonl:3")


def test_a_format_that_is_named_is_kept_to(raw):  # noqa: F811
    """A transcript beside a prompt is, by its fields, an answer to it."""
    both = HH | {"prompt": "Hi"}
    assert said(read(raw, both)[0]) == ([("user", "Hi")], HH["chosen"], HH["rejected"])
    assert said(read(raw, both, format="hh")[0]) == GREETING
    with pytest.raises(UserError, match=r"line 1: found .*; the nearest layout, orca, needs question;"):
        read(raw, HH, format="orca")


DOCS = PythonDocs(packages=())
COUNT = 200


@pytest.fixture(scope="module")
def documented() -> tuple[list, list]:
    """Questions, and the pairs made of them."""
    questions = list(DocQuestions(docs=DOCS, max_documents=COUNT).conversations(1))
    return questions, list(DocPairs(docs=DOCS, max_documents=COUNT).pairs(1))


def test_each_question_comes_once_with_each_kind_of_a_worse_answer(documented):
    questions, pairs = documented
    keys = {question.answers[0]: question.keys[0] for question in questions}
    for question, *three in zip(questions, pairs[::3], pairs[1::3], pairs[2::3], strict=True):
        for pair, kind in zip(three, ("another", "shuffled", "repeated"), strict=True):
            assert (*pair.prompt, Message("assistant", pair.chosen)) == question.messages
            assert (pair.id, pair.kind, pair.language) == (f"{question.id} {kind}", kind, "en")
            assert pair.rejected != pair.chosen
        another, mixed, twice = three
        assert another.keys == (question.keys[0], keys[another.rejected])
        assert mixed.keys == twice.keys == question.keys
        assert Counter(mixed.chosen.split()) == Counter(mixed.rejected.split())
    assert len({pair.rejected for pair in pairs[::3]}) == COUNT  # each answer is another's once


@pytest.mark.parametrize("fraction", [0.05, 0.5])
def test_both_answers_are_in_one_split_except_where_the_splits_meet(documented, fraction):
    """In the ring of neighbours they meet twice."""
    sides = [{split_hash(key.encode()) < fraction * 2**64 for key in pair.keys} for pair in documented[1]]
    assert sides.count({True, False}) == 2
    assert {True} in sides
    assert {False} in sides


def test_shuffled_and_repeated_by_hand():
    assert {shuffled("a a b", random.Random(seed)) for seed in range(30)} == {"a b a", "b a a"}
    assert shuffled("a a", random.Random(0)) == "a a"
    text = "One is here. Is it? It is 1.5!"
    assert {repeated(text, random.Random(seed)) for seed in range(30)} == {
        "One is here. One is here. Is it? It is 1.5!",
        "One is here. Is it? Is it? It is 1.5!",
        "One is here. Is it? It is 1.5! It is 1.5!",
    }
