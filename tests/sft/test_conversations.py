"""Conversations: each layout by hand, what is refused and where, and the pairs from Python's documentation."""

import json
import lzma

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli import UserError
from data import corpus
from data.clean import Cleaning, clean
from data.sources import PythonDocs, Unreadable
from sft.conversations import FORMATS, Chats, DocQuestions, HubChats, Message, first_sentences, recognise
from tests.conftest import Place


@pytest.fixture
def raw(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA", str(tmp_path))
    return tmp_path


def lines(*records) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def read(raw, *records, name: str = "a.jsonl", **options) -> list:
    (raw / name).write_text(lines(*records))
    return list(Chats(paths=(name,), **options).conversations(1))


def said(conversation) -> list[tuple[str, ...]]:
    return [(m.role, m.content, m.input) if m.input else (m.role, m.content) for m in conversation.messages]


ALPACA = {"instruction": "Name it.", "input": "a cat", "output": "Tom"}
DOLLY = {"instruction": "Who?", "context": "Ann came.", "response": "Ann", "category": "closed_qa"}
ORCA = {"id": "t0.1", "system_prompt": "Be brief.", "question": "2 + 2?", "response": "4"}
SHAREGPT = {"id": "x", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
MESSAGES = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
GREETING = [("user", "Hi"), ("assistant", "Hello")]
BY_HAND = [
    ("alpaca", ALPACA, [("user", "Name it.", "a cat"), ("assistant", "Tom")]),
    (
        "alpaca",
        {"instruction": "Go.", "input": "", "output": "", "text": "all of it"},
        [("user", "Go."), ("assistant", "")],
    ),
    ("alpaca", {"instruction": "Go.", "input": None, "output": "Gone"}, [("user", "Go."), ("assistant", "Gone")]),
    ("alpaca", {"instruction": " ", "input": "x", "output": "y"}, [("user", "", "x"), ("assistant", "y")]),
    ("dolly", DOLLY, [("user", "Who?", "Ann came."), ("assistant", "Ann")]),
    ("dolly", ALPACA | {"category": "open_qa"}, [("user", "Name it.", "a cat"), ("assistant", "Tom")]),
    ("openorca", ORCA, [("system", "Be brief."), ("user", "2 + 2?"), ("assistant", "4")]),
    ("openorca", ORCA | {"system_prompt": " \n"}, [("user", "2 + 2?"), ("assistant", "4")]),
    ("sharegpt", SHAREGPT, GREETING),
    ("sharegpt", {"conversation": SHAREGPT["conversations"]}, GREETING),
    ("messages", MESSAGES, GREETING),
    ("messages", {"prompt": "Hi", "prompt_id": "7"} | MESSAGES, GREETING),
    (
        "messages",
        {
            "messages": [
                {"role": "developer", "content": "Be kind."},
                {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
                {"role": "assistant", "content": "Hello"},
                {"role": "user", "content": "And?"},
            ]
        },
        [("system", "Be kind."), *GREETING],
    ),
    ("prompt", {"prompt": "Hi", "response": "Hello"}, GREETING),
    ("prompt", {"prompt": "Hi", "completion": "Hello"}, GREETING),
    ("prompt", {"prompt": "Hi", "answer": "Hello"}, GREETING),
]


@pytest.mark.parametrize(("name", "record", "expected"), BY_HAND)
def test_each_format_by_hand(raw, name, record, expected):
    (found,) = read(raw, record)
    assert said(found) == expected
    assert (found.id, found.where) == ("a.jsonl:1", f"{raw}/a.jsonl, line 1")
    assert recognise(record) == name
    assert read(raw, record, format=name) == [found]
    if name in ("alpaca", "sharegpt"):
        assert read(raw, record, format="wizardlm") == [found]


def test_held_out_by_what_the_user_says_first(raw):
    found = read(raw, ALPACA, ALPACA | {"input": ""}, ALPACA | {"output": "Mimi"})
    assert [c.key for c in found] == ["Name it.\n\na cat", "Name it.", "Name it.\n\na cat"]
    (orca,) = read(raw, ORCA)
    assert orca.key == "2 + 2?"


def test_texts_are_cleaned_and_nothing_in_them_is_special(raw):
    code = "<|im_end|> </s> <b>\r\n\n\n\n\n    x = 1\x00 \nsame long line, said twice: is it kept?\n" * 2
    (found,) = read(raw, {"instruction": f"\n\n  {code}", "output": f"{code}\n"})
    text = "<|im_end|> </s> <b>\n\n\n    x = 1\nsame long line, said twice: is it kept?\n" * 2
    assert said(found) == [("user", text.strip()), ("assistant", text.strip())]


# A tree: the prompt has three replies, of which the deleted one is ranked best; the next best ends with a prompter.


def node(id: str, text: str, *replies: dict, role: str = "assistant", **more) -> dict:
    return {"message_id": id, "text": text, "role": role, "lang": "es", "deleted": False, **more, "replies": [*replies]}


TREE = node(
    "1",
    "¿Qué?",
    node("2", "worst", rank=2),
    node("3", "deleted", rank=0, deleted=True),
    node("4", "unranked"),
    node(
        "5",
        "best",
        node("6", "no rank", role="prompter"),
        node("7", "ranked", node("8", "first"), node("9", "second"), role="prompter", rank=0),
        rank=1,
    ),
    role="prompter",
)
PATH = [("user", "¿Qué?"), ("assistant", "best"), ("user", "ranked"), ("assistant", "first")]


def rows(tree: dict, id: str, parent: str | None = None) -> list[dict]:
    """As the Hub has it: a message a row, parents first."""
    row = {"rank": None} | tree | {"parent_id": parent, "message_tree_id": id}
    below = [row for reply in tree["replies"] for row in rows(reply, id, tree["message_id"])]
    return [{key: value for key, value in row.items() if key != "replies"}, *below]


def test_both_forms_of_oasst_take_the_path_that_is_ranked_best(raw):
    nested = {"message_tree_id": "1", "tree_state": "ready_for_export", "prompt": TREE}
    other = node("10", "Hi", node("11", "Hello", node("12", "Bye", role="prompter")), role="prompter", lang="en")
    published = read(raw, nested, {"message_tree_id": "10", "prompt": other})
    assert [said(c) for c in published] == [PATH, GREETING]
    assert [c.language for c in published] == ["es", "en"]
    flat = [*rows(TREE, "1"), *rows(other, "10")]
    for format in ("auto", "oasst1"):
        found = read(raw, *flat, format=format)
        assert [(c.messages, c.key, c.language) for c in found] == [(c.messages, c.key, c.language) for c in published]
        assert [c.id for c in found] == ["a.jsonl:1", "a.jsonl:10"]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(flat), raw / "a.parquet")
    assert [c.messages for c in Chats(paths=("a.parquet",)).conversations(1)] == [c.messages for c in published]


def test_trees_that_are_not_whole_are_refused(raw):
    flat = rows(TREE, "1")
    for broken, message in (
        (flat[1:], "line 1: parent_id is .*expected null in the first row"),
        ([flat[0], *flat[5:]], 'line 2: parent_id is "5"'),
        ([flat[0], flat[0]], 'line 2: message_id is "1"'),
        ([flat[0], flat[1] | {"message_id": None}], "line 2: message_id is null"),
        ([flat[0] | {"deleted": True}, flat[1]], "line 1: its prompt is deleted"),
        (flat[:1], "line 1: no answer"),
    ):
        with pytest.raises(UserError, match=message):
            read(raw, *broken)


def turns(*roles: str) -> dict:
    return {"messages": [{"role": role, "content": f"{i}"} for i, role in enumerate(roles)]}


BAD = [
    (
        ALPACA,
        {"instruction": "x"},
        r"expected the fields instruction, output \(as in line 1, alpaca\); found instruction",
    ),
    (ALPACA, SHAREGPT, r"expected the fields instruction, output \(as in line 1, alpaca\); found id, conversations"),
    (ALPACA, ALPACA | {"messages": []}, r"\(as in line 1, alpaca\); found .*, messages \(messages\)"),
    (MESSAGES, ALPACA, r"expected the fields messages .*\(as in line 1, messages\); found instruction, input, output"),
    (ALPACA, [1, 2], r"expected the fields .*; found a list of 2"),
    (ALPACA, None, r"expected the fields .*; found null"),
    (ALPACA, {}, r"expected the fields .*; found no field"),
    (ALPACA, ALPACA | {"output": None}, "output is null; expected a string"),
    (ALPACA, ALPACA | {"instruction": 7}, "instruction is 7; expected a string"),
    (ALPACA, ALPACA | {"input": ["x"]}, "input is a list of 1; expected a string"),
    (ALPACA, ALPACA | {"input": "\ud800"}, "input holds half a surrogate pair"),
    (ALPACA, {"instruction": " ", "input": "\n", "output": "x"}, "message 1, the user's, is empty"),
    (DOLLY, DOLLY | {"response": None}, "response is null"),
    (
        SHAREGPT,
        {"conversations": [{"from": "narrator", "value": "x"}]},
        'from of message 1 is "narrator"; expected one of',
    ),
    (
        SHAREGPT,
        {"conversations": [{"value": "x"}]},
        "message 1: expected an object with the fields from, value; found value",
    ),
    (SHAREGPT, {"conversations": "Hi"}, 'conversations is "Hi"; expected a list'),
    (MESSAGES, {"messages": [{"role": "tool", "content": "x"}]}, 'role of message 1 is "tool"; expected one of'),
    (MESSAGES, {"messages": [{"role": "user", "content": None}]}, "content of message 1 is null"),
    (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 'a part of type "image_url"'),
    (MESSAGES, turns("assistant", "user"), "roles out of order: message 1 is of role assistant, expected user"),
    (MESSAGES, turns("system", "user", "user"), "roles out of order: message 3 is of role user, expected assistant"),
    (MESSAGES, turns("system", "system", "user"), "roles out of order: message 2 is of role system, expected user"),
    (MESSAGES, turns("user", "system", "assistant"), "roles out of order: message 2 is of role system"),
    (MESSAGES, turns("user"), "no answer"),
    (MESSAGES, turns("system"), "no answer"),
    (MESSAGES, turns(), "no answer"),
]


@pytest.mark.parametrize(("good", "bad", "message"), BAD)
def test_bad_records_are_named_by_line_or_skipped(raw, good, bad, message):
    with pytest.raises(
        UserError, match=rf"^{raw}/a\.jsonl, line 2: .*{message}.*; or set unreadable=\"skip\"$"
    ) as error:
        read(raw, good, bad, good)
    assert "\n" not in str(error.value)
    first, why, last = read(raw, good, bad, good, unreadable="skip")
    assert isinstance(why, Unreadable)
    assert str(error.value) == f'{why}; or set unreadable="skip"'
    assert first.messages == last.messages
    assert last.id == "a.jsonl:3"


def test_lines_are_counted_in_compressed_files_and_in_those_with_gaps(raw):
    text = lines(ALPACA) + "\n" + lines(ALPACA) + "{broken\n" + lines({"output": "x"}, ALPACA)
    (raw / "a.jsonl.xz").write_bytes(lzma.compress(text.encode()))
    with pytest.raises(UserError, match=r"a\.jsonl\.xz, line 4: not JSON"):
        list(Chats(paths=("a.jsonl.xz",)).conversations(1))
    found = list(Chats(paths=("a.jsonl.xz",), unreadable="skip").conversations(1))
    assert [getattr(c, "id", None) for c in found] == [
        f"a.jsonl.xz:{n}" if n not in (4, 5) else None for n in (1, 3, 4, 5, 6)
    ]
    assert "line 4: not JSON" in found[2]
    assert "line 5: expected the fields instruction, output (as in line 1, alpaca); found output" in found[3]


def test_each_file_has_a_format_of_its_own(raw):
    (raw / "a.jsonl").write_text(lines({"no": "format"}, ALPACA, ALPACA))
    (raw / "b.json").write_text(json.dumps([SHAREGPT]))
    source = Chats(paths=("*.json*",), unreadable="skip")
    why, *found = source.conversations(1)
    assert "line 1: found no, which fits no format" in why
    assert all(f"{name}: {FORMATS[name].fields}" in why for name in FORMATS)
    assert [len(c.messages) for c in found] == [2, 2, 2]
    assert list(Chats(paths=("*.json*",), unreadable="skip", max_documents=2).conversations(1)) == [why, found[0]]
    assert list(source.inputs()) == ["a.jsonl", "b.json"]
    with pytest.raises(
        UserError, match=r"line 1: found no, which fits no format; expected the fields of one \(oasst1: "
    ):
        list(Chats(paths=("*.json*",)).conversations(1))
    with pytest.raises(
        UserError, match=r"b\.json, element 1: expected the fields instruction, output \(alpaca\); found id"
    ):
        list(Chats(paths=("b.json",), format="alpaca").conversations(1))


def test_plain_text_holds_no_conversations(raw):
    (raw / "a.txt").write_text("Hi")
    with pytest.raises(UserError, match=r"a\.txt is none of \.jsonl, \.json, \.parquet"):
        list(Chats(paths=("a.txt",)).conversations(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paths": ()}, "paths is empty"),
        ({"paths": ("a",), "format": "vicuna"}, "format is 'vicuna'; expected \"auto\" or one of oasst1, "),
        ({"paths": ("a",), "max_tokens": 0}, "max_tokens is 0; expected at least 1"),
        ({"paths": ("a",), "max_documents": 0}, "max_documents is 0; expected at least 1"),
    ],
)
def test_impossible_sources_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Chats(**options)


CONTENT = st.text(max_size=20).map(lambda text: clean(text, Cleaning(html=False, repeated_line_chars=0)).strip())
EXCHANGE = st.tuples(CONTENT.filter(bool), CONTENT)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(CONTENT, st.lists(EXCHANGE, min_size=1, max_size=4)), min_size=1, max_size=4))
def test_what_is_written_is_read_back(tmp_path_factory, examples):
    directory = tmp_path_factory.mktemp("written")
    expected = []
    for system, exchanges in examples:
        both = [
            Message(role, text) for pair in exchanges for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        expected.append((*([Message("system", system)] if system else []), *both))
    who = {"system": "system", "user": "human", "assistant": "gpt"}
    openai = [{"messages": [{"role": m.role, "content": m.content} for m in each]} for each in expected]
    shared = [{"conversations": [{"from": who[m.role], "value": m.content} for m in each]} for each in expected]
    for records in (openai, shared):
        path = directory / "a.jsonl"
        path.write_text(lines(*records))
        assert [c.messages for c in Chats(paths=(str(path),)).conversations(1)] == expected


KEYS = """prompt message_id message_tree_id parent_id text role replies rank messages content conversations
from value type question response completion instruction input output context"""
KEY = st.sampled_from(KEYS.split())
WORD = st.sampled_from(["user", "gpt", "prompter", "", "\ud800", "text"])
SCALAR = st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | WORD
JSON = st.recursive(SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEY, inner, max_size=6))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.dictionaries(KEY, JSON, max_size=8) | JSON, max_size=5), st.sampled_from(["auto", *FORMATS]))
def test_whatever_json_holds_is_a_conversation_or_says_why_not(tmp_path_factory, records, format):
    path = tmp_path_factory.mktemp("odd") / "a.jsonl"
    path.write_text(lines(*records))
    for found in Chats(paths=(str(path),), format=format, unreadable="skip").conversations(1):
        if isinstance(found, Unreadable):
            assert found.startswith(f"{path}, line ")
            assert found.isprintable()
        else:
            assert [m.role for m in found.messages if m.role != "system"][:2] == ["user", "assistant"]
            assert found.messages[-1].role == "assistant"


def test_a_dataset_is_read_as_its_files_are(raw):
    (raw / "set").mkdir()
    records = [ALPACA, ALPACA | {"output": None}, ALPACA | {"input": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), raw / "set/train.parquet")
    source = HubChats(dataset=str(raw / "set"), name="set")
    first, why, last = source.conversations(1)
    assert why == "record 2: output is null; expected a string"
    assert (first.id, last.id, last.where) == ("set:1", "set:3", "record 3")
    (by_file, *_) = Chats(paths=("set/train.parquet",), unreadable="skip").conversations(1)
    assert first.messages == by_file.messages
    assert list(source.inputs()) == [f"{raw}/set/default/train"]
    with pytest.raises(UserError, match=r'dataset .*/set, .*, record 2: output is null.*; or set unreadable="skip"$'):
        list(HubChats(dataset=str(raw / "set"), unreadable="stop").conversations(1))


# ------------------------------------------------------------------------------------------------------ Python's own


def test_pairs_are_held_out_as_their_documents_are(place: Place, monkeypatch):
    monkeypatch.setenv("RUNS", str(place.runs))
    place.edit(
        ('Files(paths=("text.jsonl",), min_chars=20)', "PythonDocs(packages=(), max_documents=800, min_chars=20)"),
        ("import Files", "import PythonDocs"),
    )
    built = list(corpus.records(place.make("corpus")))
    documents = {record["id"]: record["text"] for record in reversed(built)}  # of one name the first
    pairs = DocQuestions(docs=PythonDocs(packages=()), max_documents=80).conversations(1)
    found = [(c.key, documents[c.id]) for c in pairs if c.id in documents]
    assert len(found) > 40
    assert all(key == text for key, text in found)
    assert any("\n\n" in key for key, _ in found)


def test_pairs_are_questions_and_short_answers():
    source = DocQuestions(docs=PythonDocs(packages=()), max_documents=1_000)
    pairs = list(source.conversations(1))
    assert list(source.conversations(2)) == pairs
    for pair in pairs:
        question, answer = pair.messages
        assert pair.id in question.content
        assert answer.content == " ".join(answer.content.split())
        assert " ".join(pair.key.split()).replace("``", "`").startswith(answer.content)
    assert len({p.messages[0].content.replace(p.id, "{}") for p in pairs}) == 6
    assert len({p.messages[1].content for p in pairs}) == len({p.id for p in pairs}) == 1_000
    assert not any(part.startswith("_") for p in pairs for part in p.id.split("."))
    assert source.inputs() == {}


def test_only_prose_is_an_answer():
    assert (
        first_sentences("Push item onto heap,\n    keeping it one.\n\nMore.") == "Push item onto heap, keeping it one."
    )
    assert first_sentences("Return ``True`` if it is a :class:`Graph`.") is None
    assert first_sentences("Return ``True`` if it is one of them.") == "Return `True` if it is one of them."
    for other in ("Short.", "No full stop here at all", "walk(top, down) walks over a tree.", "Walk these:\n\n- a."):
        assert first_sentences(other) is None
    assert first_sentences("Of these it takes\n- the first\n- and the last.") is None
    assert first_sentences("It is too long to be one. " * 12) is None
