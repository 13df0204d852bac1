"""Pairs: each layout by hand, what is refused and where, and the pairs made from Python's documentation."""

import itertools
import json
import random
import re
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli import UserError
from data.corpus import held_out
from data.sources import PythonDocs, Unreadable
from dpo.pairs import DocPairs, HubPairs, Pairs, repeated, shuffled
from sft.conversations import DocQuestions, Message, cleaned


@pytest.fixture
def raw(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA", str(tmp_path))
    return tmp_path


def lines(*records) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def read(raw, *records, name: str = "a.jsonl", **options) -> list:
    (raw / name).write_text(lines(*records))
    return list(Pairs(paths=(name,), **options).pairs(1))


def said(pair) -> tuple[list[tuple[str, str]], str, str]:
    return [(m.role, m.content) for m in pair.prompt], pair.chosen, pair.rejected


def chat(*contents: str, system: str | None = None, last: str = "assistant") -> list[dict]:
    """Messages in turn, of which the last is of a role."""
    roles = ("assistant", "user") if last == "assistant" else ("user", "assistant")
    found = [{"role": r, "content": c} for r, c in zip(itertools.cycle(roles), reversed(contents), strict=False)]
    return [{"role": "system", "content": system}] * (system is not None) + found[::-1]


STRINGS = {"prompt": "Hi", "chosen": "Hello", "rejected": "What?"}
ASKED = chat("Hi", last="user")
ALONE = {"prompt": ASKED, "chosen": chat("Hello"), "rejected": chat("What?")}
IMPLICIT = {"chosen": chat("Hi", "Hello"), "rejected": chat("Hi", "What?")}
ULTRAFEEDBACK = {"prompt": "Hi", "prompt_id": "7", "messages": chat("Hi", "Hello"), **IMPLICIT, "score_chosen": 8.0}
ORCA = {"system": "Be brief.", "question": "Hi", "chosen": "Hello", "rejected": "What?"}
HH = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: What?"}
GREETING = ([("user", "Hi")], "Hello", "What?")
TURNS = [("user", "Hi"), ("assistant", "Hello"), ("user", "And?")]
BEFORE = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: And?\n\nAssistant:"
BY_HAND = {
    "strings": ("preference", STRINGS, GREETING),
    "answers alone": ("preference", ALONE, GREETING),
    "answers alone, the prompt a string": ("preference", ALONE | {"prompt": "Hi"}, GREETING),
    "whole, and the prompt": ("preference", IMPLICIT | {"prompt": ASKED}, GREETING),
    "one whole, one alone": ("preference", IMPLICIT | {"prompt": ASKED, "rejected": chat("What?")}, GREETING),
    "one a list, one a string": ("preference", STRINGS | {"chosen": chat("Hello")}, GREETING),
    "no prompt": ("preference", IMPLICIT, GREETING),
    "an empty prompt": ("preference", IMPLICIT | {"prompt": []}, GREETING),
    "ultrafeedback": ("preference", ULTRAFEEDBACK, GREETING),
    "several turns": (
        "preference",
        {name: chat("Hi", "Hello", "And?", text, system="S") for name, text in (("chosen", "Yes"), ("rejected", ""))},
        ([("system", "S"), *TURNS], "Yes", ""),
    ),
    "several turns in the prompt": (
        "preference",
        {"prompt": chat("Hi", "Hello", "And?", last="user", system=" \n"), "chosen": "Yes", "rejected": "No"},
        (TURNS, "Yes", "No"),
    ),
    "a developer, and parts": (
        "preference",
        ALONE
        | {
            "prompt": [{"role": "developer", "content": "S"}, *ASKED],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": t} for t in ("Hel", "lo")]}],
        },
        ([("system", "S"), ("user", "Hi")], "Hello", "What?"),
    ),
    "orca": ("orca", ORCA, ([("system", "Be brief."), ("user", "Hi")], "Hello", "What?")),
    "orca, a blank system": ("orca", ORCA | {"system": " "}, GREETING),
    "orca, no system": ("orca", ORCA | {"system": None}, GREETING),
    "question beside lists": ("preference", IMPLICIT | {"question": "Hi"}, GREETING),
    "hh": ("hh", HH, GREETING),
    "hh, several turns": (
        "hh",
        {"chosen": BEFORE + " Yes.\n\nOr no.", "rejected": BEFORE + " No"},
        (TURNS, "Yes.\n\nOr no.", "No"),
    ),
    "hh, an empty answer": ("hh", {"chosen": BEFORE + " Yes", "rejected": BEFORE}, (TURNS, "Yes", "")),
    "hh, without the first empty lines": ("hh", {name: text.strip() for name, text in HH.items()}, GREETING),
    "hh, a speaker's name within a line": (
        "hh",
        {"chosen": HH["chosen"] + "\nHuman: no. Assistant: no.", "rejected": HH["rejected"]},
        ([("user", "Hi")], "Hello\nHuman: no. Assistant: no.", "What?"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BY_HAND)
def test_each_format_by_hand(raw, case):
    name, record, expected = BY_HAND[case]
    (found,) = read(raw, record)
    assert said(found) == expected
    assert (found.id, found.keys, found.kind) == ("a.jsonl:1", (expected[0][expected[0][0][0] == "system"][1],), "")
    assert read(raw, record, format=name) == [found]


def test_system_and_history_beside_the_pair_are_read(raw):
    (found,) = read(raw, STRINGS | {"system": "S", "history": [["Ho", "Hm"]]})
    assert said(found) == ([("system", "S"), ("user", "Ho"), ("assistant", "Hm"), ("user", "Hi")], "Hello", "What?")
    (found,) = read(raw, IMPLICIT | {"system": "S"})
    assert said(found) == ([("system", "S"), ("user", "Hi")], "Hello", "What?")


def test_more_fields_in_some_rows_change_no_layout(raw, caplog):
    more = STRINGS | {"question": "Hi", "score": 1}
    for records in ([STRINGS, more], [more, STRINGS]):
        with caplog.at_level("INFO", "lumi"):
            assert [said(pair) for pair in read(raw, *records)] == [GREETING] * 2
    assert caplog.messages == ['pairs: fields that are not read: "question" in 1 records, "score" in 1 records'] * 2


@pytest.mark.parametrize("text", ["    t = a\n    return t\n", "&lt;b&gt; <b> Ã© <|im_end|>", "\n- a  \n\n\n\n\n- b"])
def test_reading_keeps_the_meaning_of_every_text(raw, text):
    messages = {"chosen": chat(text, text), "rejected": chat(text, "no")}
    for record in (STRINGS | {"prompt": text, "chosen": text, "rejected": "no"}, messages):
        assert said(read(raw, record)[0]) == ([("user", text)], text, "no")


BAD = [
    (STRINGS, STRINGS | {"prompt": 7}, "prompt is 7; expected a string"),
    (STRINGS, STRINGS | {"chosen": None}, r'found an object with "prompt", "rejected"; expected the fields chosen'),
    (STRINGS, STRINGS | {"rejected": {}}, "rejected is an object with no field; expected a string"),
    (STRINGS, STRINGS | {"chosen": "\ud800"}, "chosen holds half a surrogate pair"),
    (STRINGS, STRINGS | {"prompt": " \n"}, "message 1, the user's, is empty"),
    (STRINGS, {"chosen": "a", "prompt": "b"}, r"found an object with .*; expected the fields chosen, rejected"),
    (STRINGS, [1, 2], "found a list of 2; expected the fields chosen, rejected"),
    (ALONE, ALONE | {"prompt": [7]}, "prompt: message 1 is 7; expected an object with role and content"),
    (ALONE, ALONE | {"rejected": [{"role": "tool", "content": "x"}]}, 'rejected: message 1 has the role "tool"'),
    (ALONE, ALONE | {"chosen": chat("Hello", last="user")}, "chosen does not end with an answer of the assistant"),
    (ALONE, ALONE | {"rejected": []}, "rejected does not end with an answer"),
    (ALONE, ALONE | {"prompt": chat("Hi", "Hello")}, "message 3 is of role assistant, expected user"),
    (ALONE, IMPLICIT | {"prompt": chat("Ho", last="user")}, "chosen does not begin with the messages of prompt"),
    (IMPLICIT, {"chosen": chat("Hi", "a"), "rejected": chat("Ho", "a")}, "chosen and rejected part before the last"),
    (
        IMPLICIT,
        {"chosen": chat("Hi", "a"), "rejected": chat("Hi", "a", "And?", "b")},
        "chosen and rejected part before the last message; expected two answers to the same messages",
    ),
    (IMPLICIT, {"chosen": chat("Hi", "a", system="S"), "rejected": chat("Hi", "a")}, "chosen and rejected part before"),
    (ORCA, ORCA | {"system": 7}, "system is 7; expected a string"),
    (ORCA, ORCA | {"question": ""}, "message 2, the user's, is empty"),
    (HH, HH | {"chosen": "Oh." + HH["chosen"]}, "chosen is no transcript: expected turns that begin"),
    (HH, HH | {"rejected": ""}, "rejected is no transcript"),
    (HH, HH | {"chosen": BEFORE + " Yes\n\nHuman: Bye"}, "chosen does not end with an answer"),
    (HH, HH | {"rejected": "\n\nHuman: Ho\n\nAssistant: Hello"}, "chosen and rejected part before the last message"),
]


@pytest.mark.parametrize(("good", "bad", "message"), BAD)
def test_bad_records_are_named_by_line_or_skipped(raw, good, bad, message):
    expected = rf"^{re.escape(str(raw))}/a\.jsonl, line 2: .*({message}).*; or set unreadable=\"skip\"$"
    with pytest.raises(UserError, match=expected) as error:
        read(raw, good, bad, good)
    assert str(error.value).isprintable()
    first, why, last = read(raw, good, bad, good, unreadable="skip")
    assert isinstance(why, Unreadable)
    assert str(error.value) == f'{why}; or set unreadable="skip"'
    assert said(first) == said(last)
    assert last.id == "a.jsonl:3"


def test_each_file_has_its_own_layout(raw):
    (raw / "a.jsonl").write_text(lines({"no": "format"}, ORCA) + "{broken\n\n" + lines(ORCA))
    (raw / "b.json").write_text(json.dumps([HH, HH]))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([IMPLICIT]), raw / "c.parquet")
    no, first, broken, *others = Pairs(paths=("*",), unreadable="skip").pairs(1)
    assert 'a.jsonl, line 1: found an object with "no"; expected the fields chosen, rejected (preference)' in no
    assert "a.jsonl, line 3: not JSON" in broken
    assert [pair.id for pair in (first, *others)] == ["a.jsonl:2", "a.jsonl:5", "b.json:1", "b.json:2", "c.parquet:1"]
    assert [len(pair.prompt) for pair in (first, *others)] == [2, 2, 1, 1, 1]
    with pytest.raises(UserError, match=r"b\.json, element 1: found .*; expected the fields question, .* \(orca\)"):
        list(Pairs(paths=("b.json",), format="orca").pairs(1))


def test_a_format_that_is_named_is_kept_to(raw):
    """A transcript beside a prompt is, by its fields, an answer to it."""
    both = HH | {"prompt": "Hi"}
    assert said(read(raw, both)[0]) == ([("user", "Hi")], *(cleaned(text) for text in HH.values()))
    assert said(read(raw, both, format="hh")[0]) == GREETING


def test_a_dataset_is_read_as_its_files_are(raw):
    (raw / "set").mkdir()
    records = [ULTRAFEEDBACK, ULTRAFEEDBACK | {"rejected": None}, ULTRAFEEDBACK]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), raw / "set/train.parquet")
    first, why, last = HubPairs(dataset=str(raw / "set"), name="set").pairs(1)
    assert why.startswith("record 2: found an object with ")
    assert (first.id, last.id, said(first), said(last)) == ("set:1", "set:3", GREETING, GREETING)
    assert len(list(HubPairs(dataset=str(raw / "set"), name="set", max_documents=2).pairs(1))) == 2


CONTENT = st.text(max_size=20).map(cleaned)
ASKING = CONTENT.filter(str.strip)
PROMPT = st.tuples(CONTENT, st.lists(st.tuples(ASKING, CONTENT), max_size=2), ASKING)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.tuples(PROMPT, CONTENT, CONTENT), min_size=1, max_size=4))
def test_what_is_written_is_read_back(tmp_path_factory, examples):
    """In every layout of messages; the turns that are shared are found where answers, too, are alike."""
    path = tmp_path_factory.mktemp("written") / "a.jsonl"
    expected, layouts = [], [[], [], [], []]
    for (system, exchanges, asked), chosen, rejected in examples:
        turns = [*itertools.chain.from_iterable(exchanges), asked]
        prompt = [Message("system", system)] * bool(system.strip())
        prompt += [Message(role, text) for role, text in zip(itertools.cycle(("user", "assistant")), turns)]
        expected.append((tuple(prompt), chosen, rejected, (turns[0],)))
        as_json = [{"role": m.role, "content": m.content} for m in prompt]
        answers = {
            name: [{"role": "assistant", "content": text}]
            for name, text in zip(("chosen", "rejected"), (chosen, rejected), strict=True)
        }
        layouts[0].append({"prompt": as_json, "chosen": chosen, "rejected": rejected})
        layouts[1].append({"prompt": as_json, **answers})
        layouts[2].append({name: as_json + answer for name, answer in answers.items()})
        layouts[3].append({"prompt": as_json, **layouts[2][-1]})
    for records in layouts:
        path.write_text(lines(*records))
        found = list(Pairs(paths=(str(path),)).pairs(1))
        assert [(p.prompt, p.chosen, p.rejected, p.keys) for p in found] == expected


# ------------------------------------------------------------------------------------------------------ Python's own

DOCS = PythonDocs(packages=())
COUNT = 200


@pytest.fixture(scope="module")
def documented() -> tuple[list, list]:
    """Questions, and the pairs made of them."""
    questions = list(DocQuestions(docs=DOCS, max_documents=COUNT).conversations(1))
    return questions, list(DocPairs(docs=DOCS, max_documents=COUNT).pairs(1))


def test_each_question_comes_once_with_each_kind(documented):
    questions, pairs = documented
    assert len(questions) == COUNT
    assert Counter(pair.kind for pair in pairs) == dict.fromkeys(("another", "shuffled", "repeated"), COUNT)
    for question, three in zip(questions, zip(*[iter(pairs)] * 3, strict=True), strict=True):
        for pair, kind in zip(three, ("another", "shuffled", "repeated"), strict=True):
            assert (*pair.prompt, Message("assistant", pair.chosen)) == question.messages
            assert pair.keys[0] == question.keys[0]
            assert (pair.id, pair.kind, pair.language) == (f"{question.id} {kind}", kind, "en")
    assert len({pair.id for pair in pairs}) == 3 * COUNT
    assert DocPairs(docs=DOCS).inputs() == {}


def test_what_is_worse_by_kind(documented):
    questions, pairs = documented
    answers = {question.messages[-1].content: question.keys[0] for question in questions}
    for pair in pairs:
        if pair.kind == "another":
            assert pair.rejected != pair.chosen
            assert pair.keys == (answers[pair.chosen], answers[pair.rejected])
            continue
        assert len(pair.keys) == 1
        words, worse = pair.chosen.split(), pair.rejected.split()
        if pair.kind == "shuffled":
            assert Counter(words) == Counter(worse)
            assert words != worse
        else:
            sentences = re.split(r"(?<=[.!?]) ", pair.chosen)
            twice = [" ".join(sentences[: i + 1] + sentences[i:]) for i in range(len(sentences))]
            assert pair.rejected in twice
    others = Counter(pair.rejected for pair in pairs if pair.kind == "another")
    assert set(others.values()) == {1}  # each answer is another's once


@pytest.mark.parametrize("fraction", [0.05, 0.5])
def test_both_answers_are_on_one_side_but_where_the_sides_meet(documented, fraction):
    """The sides meet twice in a ring."""
    _, pairs = documented
    sides = [{held_out(key.encode(), fraction) for key in pair.keys} for pair in pairs]
    assert sum(len(each) > 1 for each in sides) == 2
    assert {True} in sides
    assert {False} in sides


def test_the_same_for_any_number_of_workers(documented):
    _, pairs = documented
    assert list(DocPairs(docs=DOCS, max_documents=COUNT).pairs(2)) == pairs


TEXT = st.lists(st.sampled_from(["a", "b", "c.", "d!"]), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(TEXT, st.integers(0, 99))
def test_the_order_is_another_where_there_is_one(words, seed):
    drawn = shuffled(" ".join(words), random.Random(seed)).split()
    assert Counter(drawn) == Counter(words)
    assert (drawn == words) == (len(set(words)) == 1)


def test_a_sentence_is_said_twice():
    text = "One is here. Is it? It is 1.5!"
    found = {repeated(text, random.Random(seed)) for seed in range(30)}
    assert found == {
        "One is here. One is here. Is it? It is 1.5!",
        "One is here. Is it? Is it? It is 1.5!",
        "One is here. Is it? It is 1.5! It is 1.5!",
    }
    assert repeated("Alone", random.Random(0)) == "Alone Alone"
