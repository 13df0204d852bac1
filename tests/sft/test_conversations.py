"""Conversations: each layout by hand, refused records, and the questions about Python's documentation."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from cli import UserError
from data import corpus
from data.sources import PythonDocs, Unreadable
from sft.conversations import Chats, DocQuestions, HubChats, cleaned, first_sentences
from tests.conftest import Place, write_lines


@pytest.fixture
def raw(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA", str(tmp_path))
    return tmp_path


def read(raw, *records, **options) -> list:
    write_lines(raw / "a.jsonl", records)
    return list(Chats(paths=("a.jsonl",), **options).conversations(1))


def said(conversation) -> list[tuple[str, ...]]:
    return [(m.role, m.content, m.input) if m.input else (m.role, m.content) for m in conversation.messages]


ALPACA = {"instruction": "Name it.", "input": "a cat", "output": "Tom"}
CAT = [("user", "Name it.", "a cat"), ("assistant", "Tom")]
SHAREGPT = {"id": "x", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
QUESTION_IN_PARTS = {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}
MESSAGES = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
PROMPT = {"prompt": "Hi", "response": "Hello"}
GREETING = [("user", "Hi"), ("assistant", "Hello")]
BRIEF = ("system", "Be brief.")
SYSTEM = {"role": "developer", "content": "Be brief."}
UNANSWERED = {"role": "user", "content": "A last question without an answer is left out."}
BY_HAND = [
    ("alpaca", ALPACA, CAT),
    ("alpaca", {"instruction": "Go.", "input": None, "output": ""}, [("user", "Go."), ("assistant", "")]),
    ("alpaca", {"instruction": " ", "input": "x", "output": "y"}, [("user", "x"), ("assistant", "y")]),
    ("alpaca", {"instruction": "Go.", "input": " \n", "output": "y"}, [("user", "Go."), ("assistant", "y")]),
    ("dolly", {"instruction": "Name it.", "context": "a cat", "response": "Tom", "category": "closed_qa"}, CAT),
    ("openorca", {"id": "1", "system_prompt": "Be brief.", "question": "Hi", "response": "Hello"}, [BRIEF, *GREETING]),
    ("openorca", {"system_prompt": " \n", "question": "Hi", "answer": "Hello"}, GREETING),
    ("sharegpt", SHAREGPT, GREETING),
    ("sharegpt", {"conversation": MESSAGES["messages"], "model": "gpt-4"}, GREETING),  # as WildChat has it
    ("messages", {"messages": SHAREGPT["conversations"]}, GREETING),
    ("messages", MESSAGES | {"prompt": "Hi", "prompt_id": "7"}, GREETING),
    ("messages", {"messages": [SYSTEM, *MESSAGES["messages"], UNANSWERED]}, [BRIEF, *GREETING]),
    ("prompt", {"prompt": "Hi", "completion": "Hello"}, GREETING),
    ("messages", {"messages": [QUESTION_IN_PARTS, *MESSAGES["messages"][1:]]}, GREETING),
    ("messages", MESSAGES["messages"], GREETING),  # a list alone
    ("prompt", {"prompt": MESSAGES["messages"][:1], "completion": MESSAGES["messages"][1:]}, GREETING),  # as trl has it
    ("wizardlm", ALPACA, CAT),
    ("wizardlm", SHAREGPT, GREETING),
]


@pytest.mark.parametrize(("name", "record", "expected"), BY_HAND)
def test_each_layout_by_hand(raw, name, record, expected):
    (conversation,) = read(raw, record)
    assert said(conversation) == expected
    question = next(turn for turn in expected if turn[0] == "user")
    assert conversation[2:] == (("\n\n".join(question[1:]),), None, "")
    assert conversation.id == "a.jsonl:1"
    assert read(raw, record, format=name) == [conversation]


@pytest.mark.parametrize(("record", "turns"), [(ALPACA, CAT), (PROMPT, GREETING), (MESSAGES, GREETING)])
def test_system_and_history_beside_the_turns_are_read(raw, record, turns):
    history = {"history": [["Ho", "Hey"]]}
    first, second, third = read(raw, record | history | {"system": "Be brief."}, record, record | {"system": " "})
    assert said(first) == [BRIEF, ("user", "Ho"), ("assistant", "Hey"), *turns]
    assert first.keys[0] == "Ho"
    assert said(second) == said(third) == turns
    if record is MESSAGES:  # a system message that the turns repeat is read once
        twice = {"system": "Be brief.", "messages": [SYSTEM, *MESSAGES["messages"]]}
        assert said(read(raw, twice)[0]) == [BRIEF, *GREETING]
        with pytest.raises(UserError, match="roles out of order: message 2 is of role system"):
            read(raw, twice | {"system": "Be kind."})


def test_fields_that_are_not_read_are_named_once_with_their_counts_and_change_no_layout(raw, caplog):
    more = [ALPACA | {"category": "qa", "source": None}] * 3 + [ALPACA | {"response": "Tim", "question": None}]
    turns = [{"from": "human", "value": "Hi", "weight": 1}, {"from": "gpt", "value": "Hello"}]
    with caplog.at_level("INFO", "lumi"):
        for order in ([ALPACA, *more], [*more, ALPACA]):
            assert [said(conversation) for conversation in read(raw, *order)] == [CAT] * 5
        read(raw, {"conversations": [*turns, turns[0]]})
    assert [message.split(": ", 1)[1] for message in caplog.messages[1:]] == [
        'fields that are not read, with the number of their records: "category" 3, "response" 1',
        'fields that are not read, with the number of their records: "conversations.weight" 1, '
        '"a last question without an answer" 1',
    ]


def test_reading_keeps_white_space_and_entities_but_no_control_characters(raw):
    text = "    t = a\n\n\n\n- b  \t\n&lt;b&gt; &copy=1 <script> <|im_end|> </s> Ã© “IRMÔ a\xa0b\u2028c\u200bd\ue000\n"
    (conversation,) = read(raw, {"prompt": text, "completion": text})
    assert said(conversation) == [("user", text), ("assistant", text)]
    assert cleaned("a\r\nb\rc\x00d\x1be\tf\x7f") == "a\nb\ncde\tf"


def node(name: str, text: str, *replies: dict, role: str = "assistant", **more) -> dict:
    own = {"message_id": name, "text": text, "role": role, "lang": "es", "deleted": False}
    return own | more | {"replies": [*replies]}


ASKED = node("7", "ranked", node("8", "first"), node("9", "second"), role="prompter", rank=0)
BEST = node("5", "best", node("6", "no rank", role="prompter"), ASKED, rank=1)
WORSE = node("2", "worst", rank=2), node("3", "deleted", rank=0, deleted=True), node("4", "unranked")
TREE = node("1", "¿Qué?", *WORSE, BEST, role="prompter")
PATH = [("user", "¿Qué?"), ("assistant", "best"), ("user", "ranked"), ("assistant", "first")]


def rows(tree: dict, name: str, parent: str | None = None) -> list[dict]:
    """As the Hub has it: one message per row, parents first."""
    row = {"rank": None} | tree | {"parent_id": parent, "message_tree_id": name}
    del row["replies"]
    return [row, *(row for reply in tree["replies"] for row in rows(reply, name, tree["message_id"]))]


def test_both_forms_of_oasst_take_the_best_ranked_path(raw):
    nested = {"message_tree_id": "1", "tree_state": "ready_for_export", "prompt": TREE}
    other = node("10", "Hi", node("11", "Hello", node("12", "Bye", role="prompter")), role="prompter", lang="en")
    published = read(raw, nested, {"message_tree_id": "10", "prompt": other})
    assert [(said(talk), talk.language) for talk in published] == [(PATH, "es"), (GREETING, "en")]
    flat = [*rows(TREE, "1"), *rows(other, "10")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(flat), raw / "a.parquet")
    for talks in (read(raw, *flat, format="oasst1"), list(Chats(paths=("a.parquet",)).conversations(1))):
        assert [talk[1:] for talk in talks] == [talk[1:] for talk in published]
        assert [talk.id.split(":")[1] for talk in talks] == ["1", "10"]
    for broken in (flat[1:9], [flat[0] | {"deleted": True}, flat[1]]):
        with pytest.raises(UserError, match="line 1: the first message of the tree is deleted, or has a parent_id"):
            read(raw, *broken)


def turns(*roles: str) -> dict:
    return {"messages": [{"role": role, "content": f"{i}"} for i, role in enumerate(roles)]}


BAD = [
    (
        ALPACA,
        ALPACA | {"output": None},
        "found the fields instruction, input; .*, alpaca, needs output",
    ),
    (ALPACA, 7, "found 7; expected an object"),
    (ALPACA, ALPACA | {"output": 7}, "output is 7; expected a string"),
    (ALPACA, ALPACA | {"input": "\ud800"}, "input holds half a surrogate pair"),
    (ALPACA, {"instruction": " ", "input": "\n", "output": "x"}, "message 1, the user's, is empty"),
    (ALPACA, ALPACA | {"history": [["a"]]}, r"history holds \[.a.\]; expected pairs \[question, answer\]"),
    (ALPACA, ALPACA | {"history": 7}, "history holds 7; expected pairs"),
    (SHAREGPT, {"conversations": [{"from": "tool", "value": "x"}]}, "conversations: message 1 has the role tool and"),
    (SHAREGPT, {"conversations": "Hi"}, 'conversations: message 1 has the role None and is "Hi"'),
    (MESSAGES, {"messages": [{"role": "user", "content": None}]}, "message 1 has the role user and is .*null"),
    (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, r"1 is \[.*\]; expected a string"),
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
    assert (first.messages, last.id) == (last.messages, "a.jsonl:3")


def test_each_file_has_its_own_layout(raw):
    write_lines(raw / "a.jsonl", [{"no": "format"}, ALPACA, ALPACA])
    (raw / "b.json").write_text(json.dumps([SHAREGPT]))
    options = {"paths": ("*.json*",), "unreadable": "skip"}
    why, *talks = Chats(**options).conversations(1)
    assert "line 1: found the fields no; the nearest layout, messages" in why
    assert [said(talk) for talk in talks] == [CAT, CAT, GREETING]
    assert list(Chats(**options, max_documents=2).conversations(1)) == [why, talks[0]]
    with pytest.raises(UserError, match=r"b\.json, element 1: .* layout, alpaca, needs instruction and output or"):
        list(Chats(paths=("b.json",), format="alpaca").conversations(1))


NEAREST = {"text": "messages, needs messages;", "prompt": "prompt, needs output or", "answers": "messages, needs"}
NEAREST |= {"question": "openorca, needs output or", "response": "alpaca, needs instruction;"}


@pytest.mark.parametrize("field", NEAREST)
def test_a_record_without_a_layout_is_answered_by_the_nearest_one(raw, field):
    with pytest.raises(UserError, match=f"found the fields {field}; the nearest layout, {NEAREST[field]}"):
        read(raw, {field: "x"})


def test_a_dataset_is_read_as_its_files_are(raw):
    (raw / "set").mkdir()
    records = [ALPACA, ALPACA | {"output": None}, ALPACA | {"input": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), raw / "set/train.parquet")
    first, why, last = HubChats(dataset=str(raw / "set"), name="set").conversations(1)
    assert "record 2: found the fields instruction, input; the nearest layout" in why
    assert (said(first), first.id, last.id) == (CAT, "set:1", "set:3")


def test_questions_are_held_out_as_their_documents_are(place: Place, monkeypatch):
    monkeypatch.setenv("RUNS", str(place.runs))
    docs = "PythonDocs(packages=(), max_documents=800, min_chars=20)"
    place.edit(('Files(paths=("text.jsonl",), min_chars=20)', docs), ("import Files", "import PythonDocs"))
    built = list(corpus.records(place.make("corpus")))
    documents = {record["id"]: record["text"] for record in reversed(built)}  # of one name the first
    questions = DocQuestions(docs=PythonDocs(packages=()), max_documents=80).conversations(1)
    keys = {question.id: question.keys[0] for question in questions if question.id in documents}
    assert len(keys) > 40
    assert keys.items() <= documents.items()


def test_documentation_gives_questions_with_short_answers():
    source = DocQuestions(docs=PythonDocs(packages=()), max_documents=1_000)
    talks = list(source.conversations(1))
    assert list(source.conversations(2)) == talks
    for talk in talks:
        question, answer = talk.messages
        assert talk.id in question.content
        assert " ".join(talk.keys[0].split()).replace("``", "`").startswith(answer.content)
        assert not talk.id.startswith("_")
        assert "._" not in talk.id
    assert len({talk.messages[0].content.replace(talk.id, "{}") for talk in talks}) == 6
    assert len({talk.messages[1].content for talk in talks}) == len({talk.id for talk in talks}) == 1_000


PROSE = {
    "Push item onto heap,\n    keeping it one.\n\nMore.": "Push item onto heap, keeping it one.",
    "Return ``True`` if it is one of them.": "Return `True` if it is one of them.",
    "Return ``True`` if it is a :class:`Graph`.": None,
    "Short.": None,
    "No full stop here at all": None,
    "walk(top, down) walks over a tree.": None,
    "Of these it takes\n- the first\n- and the last.": None,
    "It is too long to be one. " * 12: None,
}


@pytest.mark.parametrize("text", PROSE)
def test_only_prose_is_an_answer(text):
    assert first_sentences(text) == PROSE[text]
