"""Conversations, and what they look like on disk: the layouts that instruction data is published in, and pairs from the
documentation that Python carries.

A source yields its conversations in an order that depends on nothing but the input. Each begins with at most one system
message; then user and assistant take turns, and the assistant has the last word.
"""

import hashlib
import itertools
import json
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from data.clean import Cleaning, clean
from data.sources import FileRecords, HubRecords, PythonDocs, Record, Records, Unreadable


class Message(NamedTuple):
    """One turn."""

    role: str
    """"system", "user" or "assistant"."""
    content: str
    input: str = ""
    """Alpaca's second field: what an instruction is about. Only of a user's message."""


class Conversation(NamedTuple):
    """One example."""

    id: str
    messages: tuple[Message, ...]
    key: str
    """By whose hash it is held out: of most sources what the user says first."""
    language: str | None = None
    """Where the data says it, such as "en"."""
    where: str = ""
    """For messages: "path, line 3"."""


class Refused(Exception):
    """Why a record is no conversation. where: of which record, if not of the one at hand."""

    def __init__(self, why: str, where: str = ""):
        super().__init__(why)
        self.where = where


# ------------------------------------------------------------------------------------------------------- one record

CLEANING = Cleaning(html=False, repeated_line_chars=0)  # an answer may be about HTML, and may repeat itself


def cleaned(text: str) -> str:
    """What a message says, as a model is shown it."""
    return clean(text, CLEANING).strip()


def _content(value, name: str) -> str:
    """The text of a field, clean. Refused, naming the field, if it is none."""
    if not isinstance(value, str):
        raise Refused(f"{name} is {_short(value)}; expected a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Refused(f"{name} holds half a surrogate pair; mend it") from None
    return cleaned(value)


def _short(value) -> str:
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    return textwrap.shorten(json.dumps(value, default=str), 80)


def text_field(record: dict, *names: str, required: bool = True) -> str:
    """The text of the first of these fields that the record has, clean; "" if it has none, or null, and needs none."""
    name = next((name for name in names if name in record), names[0])
    return _content(record.get(name), name) if required or record.get(name) is not None else ""


def _instruction(record: dict, input: tuple[str, ...], output: tuple[str, ...]) -> list[Message]:
    asked = Message("user", text_field(record, "instruction"), text_field(record, *input, required=False))
    return [asked, Message("assistant", text_field(record, *output))]


def _alpaca(record: dict) -> list[Message]:
    return _instruction(record, ("input",), ("output",))


def _dolly(record: dict) -> list[Message]:
    return _instruction(record, ("context", "input"), ("response", "output"))


def _openorca(record: dict) -> list[Message]:
    return [
        Message("system", text_field(record, "system_prompt", required=False)),
        Message("user", text_field(record, "question")),
        Message("assistant", text_field(record, "response")),
    ]


def _prompt(record: dict) -> list[Message]:
    asked, answer = text_field(record, "prompt"), text_field(record, *ANSWERS)
    return [Message("user", asked), Message("assistant", answer)]


def message_list(record: dict, names: tuple[str, ...], role: str, content: str, roles: dict[str, str]) -> list[Message]:
    """The messages of a list of objects; role, content: their fields; roles: what each role is to us."""
    name = next(name for name in names if name in record)
    if not isinstance(record[name], list):
        raise Refused(f"{name} is {_short(record[name])}; expected a list of objects with the fields {role}, {content}")
    found = []
    for number, turn in enumerate(record[name], start=1):
        if not isinstance(turn, dict) or not {role, content} <= turn.keys():
            raise Refused(
                f"message {number}: expected an object with the fields {role}, {content}; found {_fields(turn)}"
            )
        if not isinstance(turn[role], str) or turn[role] not in roles:
            raise Refused(f"{role} of message {number} is {_short(turn[role])}; expected one of {', '.join(roles)}")
        text = _joined(turn.get(content), f"{content} of message {number}")
        found.append(Message(roles[turn[role]], _content(text, f"{content} of message {number}")))
    return found


def _joined(content, name: str):
    """What a message says, where that is a list of parts."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise Refused(
                f'{name} has a part of type {_short(kind)}; expected {{"type": "text", "text": a string}} only'
            )
    return "".join(part["text"] for part in content)


ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
SPEAKERS = {"human": "user", "user": "user", "system": "system"} | dict.fromkeys(
    ("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"
)
ROW = ("message_id", "message_tree_id", "text", "role")  # of OASST1, a message a row
SHAREGPT, ANSWERS = ("conversations", "conversation"), ("response", "completion", "answer")


def _messages(record: dict) -> list[Message]:
    return message_list(record, ("messages",), "role", "content", ROLES)


def _sharegpt(record: dict) -> list[Message]:
    return message_list(record, SHAREGPT, "from", "value", SPEAKERS)


def _wizardlm(record: dict) -> list[Message]:
    return _alpaca(record) if _has(record, "instruction") else _sharegpt(record)


def _oasst1(record: dict) -> list[Message]:
    """The path through a tree that takes the best-ranked reply at each message."""
    message, found, roles = record["prompt"], [], {"prompter": "user", "assistant": "assistant"}
    if isinstance(message, dict) and message.get("deleted"):
        raise Refused("its prompt is deleted")
    while message is not None:
        if not isinstance(message, dict):
            raise Refused(f"a message is {_short(message)}; expected an object with the fields text, role, replies")
        if not isinstance(role := message.get("role"), str) or role not in roles:
            raise Refused(f"role of message {len(found) + 1} is {_short(role)}; expected one of {', '.join(roles)}")
        found.append(Message(roles[role], _content(message.get("text"), f"text of message {len(found) + 1}")))
        replies = message.get("replies") or []
        if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
            raise Refused(f"replies of message {len(found)} is {_short(replies)}; expected a list of objects")
        message = min((reply for reply in replies if not reply.get("deleted")), key=_rank, default=None)
    return found


def _rank(message: dict) -> float:
    """0 is the best; a message without a rank comes last."""
    rank = message.get("rank")
    return rank if isinstance(rank, (int, float)) and rank == rank else math.inf  # NaN is not itself


def _has(record: dict, *names: str) -> bool:
    return all(name in record for name in names)


def _has_one(record: dict, names: tuple[str, ...]) -> bool:
    return any(name in record for name in names)


class Format(NamedTuple):
    """A layout of records."""

    fields: str
    """Those that a record must have, for messages."""
    fits: Callable[[dict], bool]
    """Whether a record has them."""
    read: Callable[[dict], object]
    """What a record that fits says: of a conversation, its messages. Refused if a field is not what it should be."""


# In the order in which "auto" tries them: each comes before those whose fields are among its own.
FORMATS = {
    "oasst1": Format(
        "prompt (an object with text, role, replies), or message_id, message_tree_id, parent_id, text, role",
        lambda r: isinstance(r.get("prompt"), dict) or _has(r, *ROW),
        _oasst1,
    ),
    "messages": Format("messages (a list of role, content)", lambda r: _has(r, "messages"), _messages),
    "sharegpt": Format("conversations (a list of from, value)", lambda r: _has_one(r, SHAREGPT), _sharegpt),
    "openorca": Format("question, response (and system_prompt)", lambda r: _has(r, "question", "response"), _openorca),
    "dolly": Format(
        "instruction, response (or category, output)",
        lambda r: _has(r, "instruction") and (_has(r, "response") or _has(r, "category", "output")),
        _dolly,
    ),
    "alpaca": Format("instruction, output", lambda r: _has(r, "instruction", "output"), _alpaca),
    "prompt": Format(
        "prompt, response (or completion, or answer)", lambda r: _has(r, "prompt") and _has_one(r, ANSWERS), _prompt
    ),
    # By name only: a record of it is one of alpaca or of sharegpt.
    "wizardlm": Format(
        "instruction, output, or conversations (a list of from, value)",
        lambda r: _has(r, "instruction", "output") or _has_one(r, SHAREGPT),
        _wizardlm,
    ),
}


def recognise(record: dict, formats: Mapping[str, Format] = FORMATS) -> str | None:
    """The name of the first format that fits, or None."""
    return next((name for name, format in formats.items() if format.fits(record)), None)


def in_turn(messages: list[Message]) -> tuple[Message, ...]:
    """The messages without blank system messages and without what a user says last. Refused if the roles are out of
    order, a user says nothing or no one answers."""
    numbered = [(n, m) for n, m in enumerate(messages, start=1) if m.role != "system" or m.content]
    turns = numbered[1:] if numbered and numbered[0][1].role == "system" else numbered
    for (number, message), expected in zip(turns, itertools.cycle(("user", "assistant"))):
        if message.role != expected:
            raise Refused(
                f"roles out of order: message {number} is of role {message.role}, expected {expected}; user and "
                "assistant take turns, after one system message at most"
            )
    if len(turns) < 2:
        raise Refused("no answer: it has no message of the assistant's")
    kept = numbered[:-1] if len(turns) % 2 else numbered
    for number, message in kept:
        if message.role == "user" and not message.content and not message.input:
            raise Refused(f"message {number}, the user's, is empty")
    return tuple(message for _, message in kept)


# ------------------------------------------------------------------------------------------------------- the sources


@dataclass(frozen=True, kw_only=True)
class ChatSource(Records):
    """What every source of conversations can be told."""

    max_tokens: int | None = None
    """Reading stops once conversations of this many tokens are kept."""

    def conversations(self, workers: int) -> Iterator[Conversation | Unreadable]:
        """Its conversations, `max_documents` at most; in the place of one that cannot be read, why. UserError for that
        one where `unreadable` is "stop"."""
        return itertools.islice(self._conversations(workers), self.max_documents)

    def _conversations(self, workers: int) -> Iterator[Conversation | Unreadable]:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Formatted(Records):
    """Records in one of several formats."""

    format: str = "auto"
    """One of `layouts`; "auto" takes, file by file, the one that the first readable record has, for all of the file."""
    layouts = FORMATS  # which there are; not a field

    def __post_init__(self):
        super().__post_init__()
        if self.format != "auto" and self.format not in self.layouts:
            raise ValueError(f'format is {self.format!r}; expected "auto" or one of {", ".join(self.layouts)}')

    def example(self, rows: list[Record], format: Format):
        """What a record says, or several that belong together. Refused if it is not what it should be."""
        raise NotImplementedError

    def examples(self, workers: int) -> Iterator:
        """What `example` makes of every record; in the place of one that cannot be read, an Unreadable."""
        file, name, basis = None, None, ""
        for rows in self._together(self.records(workers)):
            record = rows[0]
            if isinstance(record.value, Unreadable):
                yield record.value
                continue
            if record.file != file:
                file, name, basis = record.file, None, ""
                if self.format != "auto":
                    name, basis = self.format, self.format
            try:
                if name is None:
                    name = self._recognised(record.value)
                    basis = f"as in {record.where.removeprefix(f'{record.file}, ')}, {name}"
                elif found := self._mismatch(record.value, name):
                    raise Refused(f"expected the fields {self.layouts[name].fields} ({basis}); found {found}")
                yield self.example(rows, self.layouts[name])
            except Refused as error:
                yield self.refuse(f"{error.where or record.where}: {error}")

    def _together(self, records: Iterator[Record]) -> Iterator[list[Record]]:
        """The rows of a tree together, every other record by itself."""

        def tree(record: Record):
            value = record.value
            oasst1 = self.format in ("auto", "oasst1") and "oasst1" in self.layouts
            if oasst1 and isinstance(value, dict) and _has(value, *ROW):
                return record.file, value["message_tree_id"]
            return record.id, record.where

        for _, rows in itertools.groupby(records, tree):
            yield list(rows)

    def _recognised(self, value) -> str:
        if isinstance(value, dict) and (name := recognise(value, self.layouts)):
            return name
        known = "; ".join(f"{name}: {format.fields}" for name, format in self.layouts.items())
        raise Refused(f"found {_fields(value)}, which fits no format; expected the fields of one ({known})")

    def _mismatch(self, value, name: str) -> str | None:
        """What a record is, unless it is of the format."""
        if not isinstance(value, dict) or not self.layouts[name].fits(value):
            return _fields(value)
        if self.format == "auto" and (other := recognise(value, self.layouts)) != name:
            return f"{_fields(value)} ({other})"
        return None


def _fields(value) -> str:
    if not isinstance(value, dict):
        return _short(value)
    return textwrap.shorten(", ".join(key[:80] for key in value), 200).encode(errors="replace").decode() or "no field"


@dataclass(frozen=True, kw_only=True)
class ChatRecords(Formatted, ChatSource):
    """Records that are conversations, or rows of one."""

    def _conversations(self, workers: int) -> Iterator[Conversation | Unreadable]:
        return self.examples(workers)

    def example(self, rows: list[Record], format: Format) -> Conversation:
        first, record, language = rows[0], rows[0].value, None
        if format is FORMATS["oasst1"]:
            if not isinstance(record.get("prompt"), dict):
                record = {"prompt": _tree(rows)}
            language = record["prompt"].get("lang")
        messages = in_turn(format.read(record))
        language = language if isinstance(language, str) else None
        return Conversation(first.id, messages, first_question(messages), language, first.where)


def first_question(messages: Sequence[Message]) -> str:
    """What the user says first."""
    asked = next(message for message in messages if message.role == "user")
    return "\n\n".join(filter(None, (asked.content, asked.input)))


def _tree(rows: list[Record]) -> dict:
    """OASST1's messages of one tree, each after the one that it replies to, as the nested tree."""
    nodes: dict[str, dict] = {}
    for row in rows:
        id, parent = row.value["message_id"], row.value.get("parent_id")
        if not isinstance(id, str) or id in nodes:
            raise Refused(f"message_id is {_short(id)}; expected a string that no other message has", row.where)
        if (parent is not None) if not nodes else (not isinstance(parent, str) or parent not in nodes):
            raise Refused(
                f"parent_id is {_short(parent)}; expected null in the first row of a tree, then the message_id of an "
                "earlier one; the rows of a tree come one after another",
                row.where,
            )
        node = nodes[id] = row.value | {"replies": []}
        if parent is not None:
            nodes[parent]["replies"].append(node)
    return next(iter(nodes.values()))


@dataclass(frozen=True, kw_only=True)
class Chats(FileRecords, ChatRecords):
    """The user's own conversations: a record each, as FileRecords has them; of OASST1's rows, a tree each."""

    name: str = "chats"


@dataclass(frozen=True, kw_only=True)
class HubChats(HubRecords, ChatRecords):
    """A dataset of conversations, as HubRecords streams it."""


# --------------------------------------------------------------------------------------------------- Python's own

QUESTIONS = (
    "What does {} do?",
    "What is {} for?",
    "What is the purpose of {}?",
    "Describe {} briefly.",
    "What can you tell me about {}?",
    "I came across {} in Python. What is it for?",
)


@dataclass(frozen=True, kw_only=True)
class DocQuestions(ChatSource):
    """Questions about Python's own documentation, each answered by the first paragraph of a docstring.

    Held out is a pair whose docstring is: the key is the document that a corpus of the same `docs` has.
    """

    name: str = "python_questions"
    licence: str = PythonDocs.licence
    docs: PythonDocs = field(default_factory=PythonDocs)

    def inputs(self) -> dict[str, str]:
        return self.docs.inputs()

    def _conversations(self, workers: int) -> Iterator[Conversation]:
        names, answers = set(), set()
        for document in self.docs.documents(workers):
            name = document.id
            if name in names or any(part.startswith("_") for part in name.split(".")):
                continue
            text = clean(document.text, self.docs.cleaning)
            if (answer := first_sentences(text)) is None or answer in answers:  # of equal answers the first
                continue
            names.add(name)
            answers.add(answer)
            form = QUESTIONS[int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % len(QUESTIONS)]
            messages = (Message("user", form.format(name)), Message("assistant", answer))
            yield Conversation(name, messages, text, "en", name)


NO_PROSE = re.compile(
    r">>>|::|->|\.\.|[\\|$@{}]|https?:|:\w[\w:+-]*:`|\]_|`_|==|--| - |~|__|\*{3}|^[\w.]+\(|"
    r"^(?:We|I|If|See|Same|Like|As|Also|But|Note|Usage|Overrid\w*|Copyright|Author|Written|Based)\b|"
    r"\b(?:TODO|XXX|[Dd]eprecated|[Ii]nternal|[Pp]rivate|[Tt]his file|generated from|[Bb]ackwards?[ -]compat\w*)\b"
)
LIST = re.compile(r"^\s*(?:[-*+•]|\(?\w[.)])\s|:\s*$", re.MULTILINE)


def first_sentences(text: str) -> str | None:
    """A docstring's first paragraph on one line, or None if that is no short piece of prose."""
    paragraph = text.split("\n\n", 1)[0]
    answer = " ".join(paragraph.split()).replace("``", "`")
    if not 20 <= len(answer) <= 300 or not answer.endswith(".") or not answer[0].isupper() or answer.count(" ") < 3:
        return None
    paired = answer.count("(") == answer.count(")") and answer.count("`") % 2 == 0  # else it breaks off, or is odd code
    return answer if paired and not NO_PROSE.search(answer) and not LIST.search(paragraph) else None
