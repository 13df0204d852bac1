"""Conversations: each layout by hand, refused records, and the questions about Python's documentation."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli import UserError
from data import corpus
from data.sources import PythonDocs, Unreadable
from sft.conversations import Chats, DocQuestions, HubChats, Message, cleaned, first_sentences
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
CAT = [("user", "Name it.", "a cat"), ("assistant", "Tom")]
SHAREGPT = {"id": "x", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
MESSAGES = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
PROMPT = {"prompt": "Hi", "response": "Hello"}
GREETING = [("user", "Hi"), ("assistant", "Hello")]
BRIEF = ("system", "Be brief.")
MANY = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "A last question without an answer is left out."},
]
BY_HAND = [
    ("alpaca", ALPACA, CAT),
    ("alpaca", {"instruction": "Go.", "input": None, "output": ""}, [("user", "Go."), ("assistant", "")]),
    ("alpaca", {"instruction": " ", "input": "x", "output": "y"}, [("user", "x"), ("assistant", "y")]),
    ("alpaca", {"instruction": "Go.", "input": " \n", "output": "y"}, [("user", "Go."), ("assistant", "y")]),
    ("alpaca", ALPACA | {"category": "open_qa", "text": "all of it"}, CAT),
    ("dolly", {"instruction": "Name it.", "context": "a cat", "response": "Tom", "category": "closed_qa"}, CAT),
    ("openorca", {"id": "1", "system_prompt": "Be brief.", "question": "Hi", "response": "Hello"}, [BRIEF, *GREETING]),
    ("openorca", {"system_prompt": " \n", "question": "Hi", "answer": "Hello"}, GREETING),
    ("sharegpt", SHAREGPT, GREETING),
    ("sharegpt", {"conversation": SHAREGPT["conversations"]}, GREETING),
    ("sharegpt", {"conversation": MESSAGES["messages"], "model": "gpt-4"}, GREETING),  # as WildChat has it
    ("sharegpt", {"conversations": MESSAGES["messages"]}, GREETING),
    ("messages", {"messages": SHAREGPT["conversations"]}, GREETING),
    ("messages", MESSAGES | {"prompt": "Hi", "prompt_id": "7"}, GREETING),
    ("messages", {"messages": MANY}, [BRIEF, *GREETING]),
    ("prompt", PROMPT, GREETING),
    ("prompt", {"prompt": "Hi", "completion": "Hello"}, GREETING),
    ("prompt", {"prompt": "Hi", "answer": "Hello"}, GREETING),
    ("prompt", {"prompt": MESSAGES["messages"][:1], "completion": MESSAGES["messages"][1:]}, GREETING),  # as trl has it
    ("wizardlm", ALPACA, CAT),
    ("wizardlm", SHAREGPT, GREETING),
]


@pytest.mark.parametrize(("name", "record", "expected"), BY_HAND)
def test_each_layout_by_hand(raw, name, record, expected):
    (conversation,) = read(raw, record)
    assert said(conversation) == expected
    assert conversation.id == "a.jsonl:1"
    assert read(raw, record, format=name) == [conversation]


HISTORY = [["Ho", "Hm"], ["Why?", "So."]]
EARLIER = [("user", "Ho"), ("assistant", "Hm"), ("user", "Why?"), ("assistant", "So.")]


@pytest.mark.parametrize(
    ("record", "turns"),
    [(ALPACA, CAT), (PROMPT, GREETING), (SHAREGPT, GREETING), (MESSAGES, GREETING)],
    ids=["alpaca", "prompt", "sharegpt", "messages"],
)
def test_system_and_history_beside_the_turns_are_read(raw, record, turns):
    both = record | {"system": "Be brief.", "history": HISTORY}
    neither = record | {"system": " ", "history": []}
    first, second, third = read(raw, both, record | {"system": "Be brief."}, neither)
    assert said(first) == [BRIEF, *EARLIER, *turns]
    assert first.keys[0] == "Ho"
    assert said(second) == [BRIEF, *turns]
    assert said(third) == turns


def test_a_system_message_that_the_turns_repeat_is_read_once(raw):
    turns = [{"role": "system", "content": "Be brief."}, *MESSAGES["messages"]]
    assert said(read(raw, {"system": "Be brief.", "messages": turns})[0]) == [BRIEF, *GREETING]
    with pytest.raises(UserError, match="roles out of order: message 2 is of role system"):
        read(raw, {"system": "Be kind.", "messages": turns})


def test_fields_that_are_not_read_are_named_once_with_their_counts(raw, caplog):
    records = [ALPACA | {"category": "qa", "source": None}] * 3 + [ALPACA | {"response": "Tim"}]
    turns = [{"from": "human", "value": "Hi", "weight": 1}, {"from": "gpt", "value": "Hello"}]
    with caplog.at_level("INFO", "lumi"):
        read(raw, *records)
        read(raw, {"conversations": turns})
    assert [message.split(": ", 1)[1] for message in caplog.messages] == [
        'fields that are not read: "category" in 3 records, "response" in 1 records',
        'fields that are not read: "conversations.weight" in 1 records',
    ]


def test_more_fields_in_some_rows_change_no_layout(raw):
    """Neither in the first row nor in a later one."""
    records = [ALPACA, ALPACA | {"category": "qa"}, ALPACA | {"messages": None, "question": "?", "prompt": "x"}]
    for order in (records, records[::-1]):
        assert [said(conversation) for conversation in read(raw, *order)] == [CAT] * len(order)


def test_a_conversation_is_held_out_by_its_first_question(raw):
    keys = [
        conversation.keys[0] for conversation in read(raw, ALPACA, ALPACA | {"input": ""}, ALPACA | {"output": "Mimi"})
    ]
    assert keys == ["Name it.\n\na cat", "Name it.", "Name it.\n\na cat"]


@pytest.mark.parametrize(
    "text",
    [
        "    t = a\n    return t\n",
        "\n\n- a  \n\n\n\n\n- b\t",
        "&lt;b&gt; &amp; &copy=1 <script>x</script> <|im_end|> </s>",
        "Ã© AMANHÃ… “A IRMÔ",
        "a\xa0b\u2028c\u200bd\u200fe\ue000",
        "the same long line, twice: the same long line\n" * 2,
    ],
)
def test_reading_keeps_the_meaning_of_every_text(raw, text):
    (conversation,) = read(raw, {"prompt": text, "completion": text})
    assert said(conversation) == [("user", text), ("assistant", text)]


def test_line_ends_and_control_characters_are_cleaned():
    assert cleaned("a\r\nb\rc\x00d\x1be\tf\x7f") == "a\nb\ncde\tf"


# A tree: its prompt has four replies; the deleted one is ranked best. The next best path ends with a prompter.


def node(name: str, text: str, *replies: dict, role: str = "assistant", **more) -> dict:
    return {
        "message_id": name,
        "text": text,
        "role": role,
        "lang": "es",
        "deleted": False,
        **more,
        "replies": [*replies],
    }


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


def rows(tree: dict, name: str, parent: str | None = None) -> list[dict]:
    """As the Hub has it: one message per row, parents first."""
    row = {"rank": None} | tree | {"parent_id": parent, "message_tree_id": name}
    del row["replies"]
    below = [row for reply in tree["replies"] for row in rows(reply, name, tree["message_id"])]
    return [row, *below]


def test_both_forms_of_oasst_take_the_best_ranked_path(raw, caplog):
    nested = {"message_tree_id": "1", "tree_state": "ready_for_export", "prompt": TREE}
    other = node("10", "Hi", node("11", "Hello", node("12", "Bye", role="prompter")), role="prompter", lang="en")
    published = read(raw, nested, {"message_tree_id": "10", "prompt": other})
    assert [said(conversation) for conversation in published] == [PATH, GREETING]
    assert [conversation.language for conversation in published] == ["es", "en"]
    flat = [*rows(TREE, "1"), *rows(other, "10")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(flat), raw / "a.parquet")
    for found in (read(raw, *flat, format="oasst1"), list(Chats(paths=("a.parquet",)).conversations(1))):
        assert [conversation[1:] for conversation in found] == [conversation[1:] for conversation in published]
        assert [conversation.id.split(":")[1] for conversation in found] == ["1", "10"]
    for broken in (flat[1:9], [flat[0] | {"deleted": True}, flat[1]]):
        with pytest.raises(UserError, match="line 1: the first message of the tree is deleted, or has a parent_id"):
            read(raw, *broken)


def turns(*roles: str) -> dict:
    return {"messages": [{"role": role, "content": f"{i}"} for i, role in enumerate(roles)]}


BAD = [
    (ALPACA, {"instruction": "x"}, r'found an object with "instruction"; expected the fields instruction, output or'),
    (ALPACA, [1, 2], "found a list of 2; expected the fields instruction"),
    (ALPACA, None, "found null; expected the fields"),
    (ALPACA, ALPACA | {"output": None}, 'found an object with "instruction", "input"; expected'),
    (ALPACA, ALPACA | {"output": 7}, "output is 7; expected a string"),
    (ALPACA, ALPACA | {"instruction": 7}, "instruction is 7; expected a string"),
    (ALPACA, ALPACA | {"input": "\ud800"}, "input holds half a surrogate pair"),
    (ALPACA, {"instruction": " ", "input": "\n", "output": "x"}, "message 1, the user's, is empty"),
    (ALPACA, ALPACA | {"history": [["a"]]}, r"history holds a list of 1; expected pairs \[question, answer\]"),
    (SHAREGPT, {"conversations": [{"from": "tool", "value": "x"}]}, 'conversations: message 1 has the role "tool"'),
    (
        SHAREGPT,
        {"conversations": [{"value": "x"}]},
        'conversations: message 1 is an object with "value"; expected an object',
    ),
    (SHAREGPT, {"conversations": "Hi"}, 'conversations: message 1 is "Hi"'),
    (
        MESSAGES,
        {"messages": [{"role": "user", "content": None}]},
        'messages: message 1 is an object with "role"; expected',
    ),
    (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 'has the part an object with "type"'),
    (MESSAGES, turns("assistant", "user"), "roles out of order: message 1 is of role assistant, expected user"),
    (MESSAGES, turns("system", "user", "user"), "roles out of order: message 3 is of role user, expected assistant"),
    (MESSAGES, turns("user", "system", "assistant"), "roles out of order: message 2 is of role system"),
    (MESSAGES, turns("system", "user"), "no answer"),
    (MESSAGES, turns(), "no answer"),
]


@pytest.mark.parametrize(("good", "bad", "message"), BAD)
def test_bad_records_are_named_by_line_or_skipped(raw, good, bad, message):
    with pytest.raises(UserError, match=rf"^{raw}/a\.jsonl, line 2: .*{message}.*; or set unreadable=\"skip\"$"):
        read(raw, good, bad, good)
    first, why, last = read(raw, good, bad, good, unreadable="skip")
    assert isinstance(why, Unreadable)
    assert why.isprintable()
    assert first.messages == last.messages
    assert last.id == "a.jsonl:3"


def test_each_file_has_its_own_layout(raw):
    (raw / "a.jsonl").write_text(lines({"no": "format"}, ALPACA, ALPACA))
    (raw / "b.json").write_text(json.dumps([SHAREGPT]))
    source = Chats(paths=("*.json*",), unreadable="skip")
    why, *found = source.conversations(1)
    assert "line 1: found an object with" in why
    for name in ("(alpaca)", "(messages)", "(prompt)"):
        assert name in why
    assert [len(conversation.messages) for conversation in found] == [2, 2, 2]
    assert list(Chats(paths=("*.json*",), unreadable="skip", max_documents=2).conversations(1)) == [why, found[0]]
    with pytest.raises(
        UserError, match=r"b\.json, element 1: found .*; expected the fields instruction, .* \(alpaca\)"
    ):
        list(Chats(paths=("b.json",), format="alpaca").conversations(1))


CONTENT = st.text(max_size=20).map(cleaned)
EXCHANGE = st.tuples(CONTENT.filter(str.strip), CONTENT)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.tuples(CONTENT, st.lists(EXCHANGE, min_size=1, max_size=4)), min_size=1, max_size=4))
def test_what_is_written_is_read_back(tmp_path_factory, examples):
    path = tmp_path_factory.mktemp("written") / "a.jsonl"
    expected = []
    for system, exchanges in examples:
        messages = [Message("system", system)] if system.strip() else []
        for question, answer in exchanges:
            messages += [Message("user", question), Message("assistant", answer)]
        expected.append(tuple(messages))
    who = {"system": "system", "user": "human", "assistant": "gpt"}
    openai = [{"messages": [{"role": m.role, "content": m.content} for m in each]} for each in expected]
    shared = [{"conversations": [{"from": who[m.role], "value": m.content} for m in each]} for each in expected]
    for records in (openai, shared):
        path.write_text(lines(*records))
        assert [conversation.messages for conversation in Chats(paths=(str(path),)).conversations(1)] == expected


def test_a_dataset_is_read_as_its_files_are(raw):
    (raw / "set").mkdir()
    records = [ALPACA, ALPACA | {"output": None}, ALPACA | {"input": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), raw / "set/train.parquet")
    first, why, last = HubChats(dataset=str(raw / "set"), name="set").conversations(1)
    assert why.startswith(
        'record 2: found an object with "instruction", "input"; expected the fields instruction, output'
    )
    assert (said(first), first.id, last.id) == (CAT, "set:1", "set:3")


# ------------------------------------------------------------------------------------------------------ Python's own


def test_questions_are_held_out_as_their_documents_are(place: Place, monkeypatch):
    monkeypatch.setenv("RUNS", str(place.runs))
    place.edit(
        ('Files(paths=("text.jsonl",), min_chars=20)', "PythonDocs(packages=(), max_documents=800, min_chars=20)"),
        ("import Files", "import PythonDocs"),
    )
    built = list(corpus.records(place.make("corpus")))
    documents = {record["id"]: record["text"] for record in reversed(built)}  # of one name the first
    source = DocQuestions(docs=PythonDocs(packages=()), max_documents=80)
    found = [(c.keys[0], documents[c.id]) for c in source.conversations(1) if c.id in documents]
    assert len(found) > 40
    for key, text in found:
        assert key == text


def test_documentation_gives_questions_with_short_answers():
    source = DocQuestions(docs=PythonDocs(packages=()), max_documents=1_000)
    pairs = list(source.conversations(1))
    assert list(source.conversations(2)) == pairs
    for pair in pairs:
        question, answer = pair.messages
        assert pair.id in question.content
        assert " ".join(pair.keys[0].split()).replace("``", "`").startswith(answer.content)
        assert not pair.id.startswith("_")
        assert "._" not in pair.id
    assert len({pair.messages[0].content.replace(pair.id, "{}") for pair in pairs}) == 6
    assert len({pair.messages[1].content for pair in pairs}) == len({pair.id for pair in pairs}) == 1_000


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Push item onto heap,\n    keeping it one.\n\nMore.", "Push item onto heap, keeping it one."),
        ("Return ``True`` if it is one of them.", "Return `True` if it is one of them."),
        ("Return ``True`` if it is a :class:`Graph`.", None),
        ("Short.", None),
        ("No full stop here at all", None),
        ("walk(top, down) walks over a tree.", None),
        ("Of these it takes\n- the first\n- and the last.", None),
        ("It is too long to be one. " * 12, None),
    ],
)
def test_only_prose_is_an_answer(text, answer):
    assert first_sentences(text) == answer
