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
from dpo.pairs import FORMATS, SIDES, DocPairs, HubPairs, Pairs, repeated, shuffled
from sft.conversations import DocQuestions, Message, cleaned, recognise


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
    assert (found.id, found.where) == ("a.jsonl:1", f"{raw}/a.jsonl, line 1")
    assert found.keys == ("Hi",)
    assert (found.kind, found.language) == ("", None)
    assert recognise(record, FORMATS) == name
    assert read(raw, record, format=name) == [found]


def test_texts_are_cleaned_and_nothing_in_them_is_special(raw):
    code = "<|im_end|> </s> <b>\r\n\n\n\n\n    x = 1\x00 \nsame long line, said twice: is it kept?\n" * 2
    text = ("<|im_end|> </s> <b>\n\n\n    x = 1\nsame long line, said twice: is it kept?\n" * 2).strip()
    said_twice = {"chosen": chat(code, code), "rejected": chat(code, "no")}
    for record in (STRINGS | {"prompt": code, "chosen": f"\n {code}", "rejected": "no"}, said_twice):
        (found,) = read(raw, record)
        assert said(found) == ([("user", text)], text, "no")


def test_a_prompt_that_only_spelling_tells_apart_is_shared(raw):
    """What is compared are the turns once clean."""
    (found,) = read(raw, {"chosen": chat("Hi \r\n", "Hello"), "rejected": chat("Hi", "What?")})
    assert said(found) == GREETING


BAD = [
    (STRINGS, STRINGS | {"prompt": None}, "prompt is null; expected a string"),
    (STRINGS, STRINGS | {"prompt": 7}, "prompt is 7; expected a string"),
    (STRINGS, STRINGS | {"prompt": {"a": 1}}, "prompt is an object of 1; expected a string"),
    (STRINGS, STRINGS | {"chosen": None}, "chosen is null; expected a string"),
    (STRINGS, STRINGS | {"rejected": float("nan")}, "rejected is NaN; expected a string"),
    (STRINGS, STRINGS | {"rejected": {}}, "rejected is an object of 0; expected a string"),
    (STRINGS, STRINGS | {"chosen": []}, "chosen does not end with an answer"),
    (STRINGS, STRINGS | {"chosen": "\ud800"}, "chosen holds half a surrogate pair"),
    (STRINGS, STRINGS | {"prompt": " \n"}, "message 1, the user's, is empty"),
    (STRINGS, {"chosen": "a", "prompt": "b"}, r"expected the fields prompt, chosen, rejected .*found chosen, prompt"),
    (STRINGS, HH, r"expected the fields prompt, .*\(as in line 1, preference\); found chosen, rejected"),
    (STRINGS, [1, 2], "expected the fields prompt, .*; found a list of 2"),
    (STRINGS, None, "expected the fields prompt, .*; found null"),
    (STRINGS, {}, "expected the fields prompt, .*; found no field"),
    (STRINGS, {"\ud800": 1}, "expected the fields prompt, .*; found "),
    (ALONE, ALONE | {"prompt": [7]}, "message 1: expected an object with the fields role, content; found 7"),
    (ALONE, ALONE | {"prompt": [[[]]]}, "message 1: expected an object with the fields role, content; found a list"),
    (ALONE, ALONE | {"chosen": [{"role": "assistant"}]}, "message 1: expected an object with .*; found role"),
    (ALONE, ALONE | {"chosen": [{"role": [], "content": "x"}]}, "role of message 1 is a list of 0; expected one of"),
    (ALONE, ALONE | {"rejected": [{"role": "tool", "content": "x"}]}, 'role of message 1 is "tool"; expected one of'),
    (ALONE, ALONE | {"rejected": [{"role": "assistant", "content": None}]}, "content of message 1 is null"),
    (ALONE, ALONE | {"rejected": chat("\udfff")}, "content of message 1 holds half a surrogate pair"),
    (ALONE, ALONE | {"chosen": [{"role": "assistant", "content": [{"type": "image"}]}]}, 'a part of type "image"'),
    (ALONE, ALONE | {"chosen": chat("Hello", last="user")}, "chosen does not end with an answer of the assistant's"),
    (ALONE, ALONE | {"rejected": chat("Hello", last="user")}, "rejected does not end with an answer"),
    (ALONE, ALONE | {"prompt": []}, "message 1 is of role assistant, expected user"),
    (ALONE, ALONE | {"prompt": chat("Hi", "Hello")}, "message 3 is of role assistant, expected user"),
    (ALONE, IMPLICIT | {"prompt": chat("Ho", last="user")}, "chosen does not begin with the messages of prompt"),
    (
        ALONE,
        IMPLICIT | {"prompt": [{"role": "system", "content": "S"}]},
        "chosen does not begin with the messages of prompt",
    ),
    (IMPLICIT, {"chosen": chat("Hi", "a"), "rejected": chat("Ho", "a")}, "chosen and rejected part at message 1"),
    (
        IMPLICIT,
        {"chosen": chat("Hi", "a", "And?", "b"), "rejected": chat("Hi", "c", "And?", "b")},
        "chosen and rejected part at message 2; expected two answers to the same messages",
    ),
    (
        IMPLICIT,
        {"chosen": chat("Hi", "a"), "rejected": chat("Hi", "a", "And?", "b")},
        "chosen and rejected part at message 2",
    ),
    (IMPLICIT, {"chosen": [], "rejected": []}, "chosen does not end with an answer"),
    (IMPLICIT, {"chosen": chat("Hi", "a"), "rejected": []}, "rejected does not end with an answer"),
    (
        IMPLICIT,
        {"chosen": chat("Hi", "a", system="S"), "rejected": chat("Hi", "a")},
        "chosen and rejected part at message 1",
    ),
    (IMPLICIT, {"chosen": chat("Hi", "a"), "rejected": 7}, "rejected is 7; expected a string"),
    (IMPLICIT, STRINGS | {"question": "Hi"}, r"\(as in line 1, preference\); found .*, question \(orca\)"),
    (ORCA, ORCA | {"system": 7}, "system is 7; expected a string"),
    (ORCA, ORCA | {"question": ["Hi"]}, "question is a list of 1; expected a string"),
    (ORCA, ORCA | {"question": ""}, "message 2, the user's, is empty"),
    (ORCA, ORCA | {"chosen": 7}, "chosen is 7; expected a string"),
    (ORCA, ORCA | {"rejected": None}, "rejected is null; expected a string"),
    (ORCA, STRINGS, r"expected the fields question, chosen, rejected .*\(as in line 1, orca\); found prompt"),
    (HH, {"chosen": 7, "rejected": HH["rejected"]}, "chosen is 7; expected a string"),
    (HH, {"chosen": HH["chosen"], "rejected": None}, "rejected is null; expected a string"),
    (HH, HH | {"rejected": "\ud800"}, "rejected holds half a surrogate pair"),
    (HH, HH | {"chosen": "Oh." + HH["chosen"]}, "chosen is no transcript: expected turns that begin"),
    (HH, HH | {"rejected": "Hello"}, "rejected is no transcript"),
    (HH, HH | {"rejected": ""}, "rejected is no transcript"),
    (HH, HH | {"chosen": BEFORE + " Yes\n\nHuman: Bye"}, "chosen does not end with an answer"),
    (HH, HH | {"rejected": "\n\nHuman: Ho\n\nAssistant: Hello"}, "chosen and rejected part at message 1"),
    (HH, {"chosen": BEFORE + " Yes", "rejected": HH["rejected"]}, "chosen and rejected part at message 2"),
    (
        HH,
        {name: "\n\nAssistant: Hm\n\nHuman: Hi\n\nAssistant: " + name for name in SIDES},
        "message 1 is of role assistant",
    ),
    (HH, {name: "\n\nHuman: Hi\n\nHuman: Ho\n\nAssistant: " + name for name in SIDES}, "message 2 is of role user"),
    (HH, ALONE, r"expected the fields chosen, rejected \(transcripts .*\(as in line 1, hh\); found prompt"),
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


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        ({"prompt": [7]}, "prompt"),
        ({"chosen": [{"role": "tool", "content": "x"}]}, "chosen"),
        ({"rejected": [{"role": "assistant", "content": 7}]}, "rejected"),
    ],
)
def test_of_three_lists_the_wrong_one_is_named(raw, bad, field):
    with pytest.raises(UserError, match=f"line 1: {field}: .*message 1"):
        read(raw, ALONE | bad)


def test_each_file_has_a_format_of_its_own(raw):
    (raw / "a.jsonl").write_text(lines({"no": "format"}, ORCA) + "{broken\n\n" + lines(ORCA))
    (raw / "b.json").write_text(json.dumps([HH, HH]))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([IMPLICIT]), raw / "c.parquet")
    source = Pairs(paths=("*",), unreadable="skip")
    no, a, broken, last, *others = source.pairs(1)
    assert "a.jsonl, line 1: found no, which fits no format" in no
    assert all(f"{name}: {FORMATS[name].fields}" in no for name in FORMATS)
    assert "a.jsonl, line 3: not JSON" in broken
    assert [pair.id for pair in (a, last, *others)] == ["a.jsonl:2", "a.jsonl:5", "b.json:1", "b.json:2", "c.parquet:1"]
    assert [len(pair.prompt) for pair in (a, last, *others)] == [2, 2, 1, 1, 1]
    assert others[-1].where == f"{raw}/c.parquet, row 1"
    assert list(source.inputs()) == ["a.jsonl", "b.json", "c.parquet"]
    with pytest.raises(UserError, match=r"b\.json, element 1: expected the fields question, .*\(orca\); found chosen"):
        list(Pairs(paths=("b.json",), format="orca").pairs(1))


def test_a_format_that_is_named_is_kept_to(raw):
    """A transcript beside a prompt is, by its fields, an answer to it."""
    both = HH | {"prompt": "Hi"}
    assert said(read(raw, both)[0]) == ([("user", "Hi")], *(cleaned(text) for text in HH.values()))
    assert said(read(raw, both, format="hh")[0]) == GREETING


def test_reading_stops_at_max_documents(raw):
    """What lies behind them is not looked at; what cannot be read counts as one."""
    assert len(read(raw, STRINGS, STRINGS, {"broken": 1}, max_documents=2)) == 2
    found = read(raw, STRINGS, {"broken": 1}, STRINGS, max_documents=2, unreadable="skip")
    assert [isinstance(each, Unreadable) for each in found] == [False, True]
    assert len(read(raw, STRINGS, max_documents=2)) == 1


def test_a_dataset_is_read_as_its_files_are(raw):
    (raw / "set").mkdir()
    records = [ULTRAFEEDBACK, ULTRAFEEDBACK | {"prompt": None}, ULTRAFEEDBACK]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), raw / "set/train.parquet")
    first, why, last = HubPairs(dataset=str(raw / "set"), name="set").pairs(1)
    assert why == "record 2: prompt is null; expected a string"
    assert (first.id, last.id, last.where) == ("set:1", "set:3", "record 3")
    assert said(first) == said(last) == GREETING
    with pytest.raises(UserError, match=r'dataset .*/set, .*, record 2: prompt is null.*; or set unreadable="skip"$'):
        list(HubPairs(dataset=str(raw / "set"), unreadable="stop").pairs(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paths": ()}, "paths is empty"),
        ({"format": "sharegpt"}, "format is 'sharegpt'; expected \"auto\" or one of orca, preference, hh"),
        ({"max_pairs": 0}, "max_pairs is 0; expected at least 1"),
        ({"max_documents": 0}, "max_documents is 0; expected at least 1"),
        ({"unreadable": "count"}, "unreadable is 'count'"),
    ],
)
def test_impossible_sources_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Pairs(**{"paths": ("a",)} | options)


def test_wrong_types_are_refused():
    with pytest.raises(TypeError, match=r"max_pairs is 1\.5"):
        Pairs(paths=("a",), max_pairs=1.5)
    with pytest.raises(TypeError, match="docs is None"):
        DocPairs(docs=None)


CONTENT = st.text(max_size=20).map(cleaned)
ASKING = CONTENT.filter(bool)
PROMPT = st.tuples(CONTENT, st.lists(st.tuples(ASKING, CONTENT), max_size=2), ASKING)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.tuples(PROMPT, CONTENT, CONTENT), min_size=1, max_size=4))
def test_what_is_written_is_read_back(tmp_path_factory, examples):
    """In every layout of messages; the turns that are shared are found where answers, too, are alike."""
    path = tmp_path_factory.mktemp("written") / "a.jsonl"
    expected, layouts = [], [[], [], [], []]
    for (system, exchanges, asked), chosen, rejected in examples:
        turns = [*itertools.chain.from_iterable(exchanges), asked]
        prompt = [Message("system", system)] * bool(system)
        prompt += [Message(role, text) for role, text in zip(itertools.cycle(("user", "assistant")), turns)]
        expected.append((tuple(prompt), chosen, rejected, (turns[0],)))
        as_json = [{"role": m.role, "content": m.content} for m in prompt]
        answers = {
            name: [{"role": "assistant", "content": text}] for name, text in zip(SIDES, (chosen, rejected), strict=True)
        }
        layouts[0].append({"prompt": as_json, "chosen": chosen, "rejected": rejected})
        layouts[1].append({"prompt": as_json, **answers})
        layouts[2].append({name: as_json + answer for name, answer in answers.items()})
        layouts[3].append({"prompt": as_json, **layouts[2][-1]})
    for records in layouts:
        path.write_text(lines(*records))
        found = list(Pairs(paths=(str(path),)).pairs(1))
        assert [(p.prompt, p.chosen, p.rejected, p.keys) for p in found] == expected


KEYS = ["prompt", "chosen", "rejected", "question", "system", "role", "content", "type", "text"]
WORD = st.sampled_from(["user", "assistant", "system", "", "\ud800", "text", "\n\nHuman: a\n\nAssistant: b"])
SCALAR = st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | WORD
TURN = st.fixed_dictionaries({"role": WORD, "content": WORD})
INNER = st.recursive(
    SCALAR | st.lists(TURN, max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
)
RECORD = st.dictionaries(st.sampled_from(KEYS), INNER, max_size=6) | st.fixed_dictionaries(
    dict.fromkeys(SIDES, INNER), optional={"prompt": INNER, "question": INNER, "system": INNER}
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(RECORD | INNER, max_size=5), st.sampled_from(["auto", *FORMATS]))
def test_whatever_json_holds_is_a_pair_or_says_why_not(tmp_path_factory, records, format):
    path = tmp_path_factory.mktemp("odd") / "a.jsonl"
    path.write_text(lines(*records))
    found = list(Pairs(paths=(str(path),), format=format, unreadable="skip").pairs(1))
    assert len(found) == len(records)
    for number, each in enumerate(found, start=1):
        if isinstance(each, Unreadable):
            assert each.startswith(f"{path}, line {number}: ")
            assert each.isprintable()
        else:
            roles = [m.role for m in each.prompt]
            assert "system" not in roles[1:]
            turns = [role for role in roles if role != "system"]
            assert turns == ["user", "assistant"] * (len(turns) // 2) + ["user"]
            assert each.keys == (next(m.content for m in each.prompt if m.role == "user"),)
            assert all(isinstance(text, str) and text.encode() is not None for text in (each.chosen, each.rejected))


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
            assert pair.keys[0] == question.key
            assert (pair.id, pair.kind, pair.language, pair.where) == (
                f"{question.id} {kind}", kind, "en", question.where)  # fmt: skip
    assert len({pair.id for pair in pairs}) == 3 * COUNT
    assert DocPairs(docs=DOCS).inputs() == {}


def test_what_is_worse_by_kind(documented):
    questions, pairs = documented
    answers = {question.messages[-1].content: question.key for question in questions}
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
