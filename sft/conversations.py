"""Conversations: the usual layouts of instruction data, and questions about Python's documentation."""

# A conversation begins with at most one system message. Then user and assistant take turns; the last message is the
# assistant's. A source yields its conversations in an order that depends only on the input.

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from cli import log
from data.clean import clean
from data.holdout import split_hash
from data.sources import FileRecords, HubRecords, PythonDocs, Record, Records, Unreadable


class Message(NamedTuple):
    """One turn."""

    role: str  # "system", "user" or "assistant"
    content: str
    input: str = ""  # Alpaca's second field, the text that an instruction is about; only in a user's message

    def text(self, before_input: str = "\n\n") -> str:
        """The content, then the input if there is one."""
        return self.content + before_input + self.input if self.input else self.content


class Conversation(NamedTuple):
    """One example."""

    id: str
    messages: tuple[Message, ...]
    keys: tuple[str]  # a text whose hash decides if the conversation is held out: usually the first question
    language: str | None = None  # such as "en", if the data states it
    kind: str = ""

    @property
    def answers(self) -> list[str]:
        return [message.content for message in self.messages if message.role == "assistant"]


class Refused(Exception):
    """The reason why a record holds no conversation."""


ROLES = {"system": "system", "developer": "system"}
ROLES |= dict.fromkeys(("user", "human", "prompter"), "user")
ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant")
CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f]")


def cleaned(text: str) -> str:
    """The text with \\n line ends and without control characters. White space stays: in code it has a meaning."""
    return CONTROL.sub("", re.sub("\r\n?", "\n", text))


def shown(value) -> str:
    """A JSON value, short enough for a message."""
    return json.dumps(value, default=str)[:80]


def text_of(value, name: str) -> str:
    """The text of a field: a string, or a list of text parts as OpenAI has them. Refused if it is neither."""
    text = ""
    for part in value if isinstance(value, list) else [{"text": value}]:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise Refused(f"{name} is {shown(value)}; expected a string, or a list of text parts")
        text += part["text"]
    if re.search("[\ud800-\udfff]", text):
        raise Refused(f"{name} holds half a surrogate pair; correct it")
    return cleaned(text)


def present(record: dict, names: Sequence[str]) -> str:
    """The first of these fields that is not null; "" if there is none."""
    return next((name for name in names if record.get(name) is not None), "")


def take(fields: dict, names: Sequence[str], role: str = "") -> list[Message]:
    """Removes the first of these fields that is not null and returns its messages; [] if there is none."""
    # The field is a list of objects with role and content, or from and value; or the text of one message of `role`.
    name, messages = present(fields, names), []
    turns = fields.pop(name, [])
    if role and not isinstance(turns, list):
        return [Message(role, text_of(turns, name))]
    for number, turn in enumerate(turns if isinstance(turns, list) else [turns], start=1):
        left = {key: value for key, value in turn.items() if value is not None} if isinstance(turn, dict) else {}
        speaker = left.pop("role", None) or left.pop("from", None)
        text = left.pop("content" if "content" in left else "value", None)
        if speaker not in ROLES or text is None:
            wanted = "expected content, and the role system, user or assistant"
            raise Refused(f"{name}: message {number} has the role {speaker} and is {shown(turn)}; {wanted}")
        messages.append(Message(ROLES[speaker], text_of(text, f"{name}: content of message {number}")))
        for key, value in left.items():  # `examples` counts them among the fields that are not read
            fields[f"{name}.{key}"] = value
    return messages


def take_question(fields: dict, names: Sequence[str]) -> list[Message]:
    """Removes a question and the text that it is about, and returns its messages."""
    messages = take(fields, names, "user")
    for about in take(fields, ("input", "context"), "user"):
        # Without an instruction the text is the whole question, as it is when somebody asks the model.
        if not messages or not messages[-1].content.strip():
            messages[-1:] = [about]
        elif about.content.strip():
            messages[-1] = messages[-1]._replace(input=about.content)
    return messages


def take_earlier(fields: dict) -> list[Message]:
    """Removes the fields that may stand beside the turns: a system message and a history of [question, answer]."""
    messages = take(fields, ("system", "system_prompt"), "system")
    history = fields.pop("history", None) or []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise Refused(f"history holds {shown(pair)}; expected pairs [question, answer]")
        messages.append(Message("user", text_of(pair[0], "history")))
        messages.append(Message("assistant", text_of(pair[1], "history")))
    return messages


def in_turn(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Drops blank system messages and a last question without an answer. Refused if the order of roles is wrong."""
    kept: list[Message] = []
    for message in messages:
        if message.role == "system" and (not message.content.strip() or kept == [message]):
            continue
        expected = "assistant" if kept and kept[-1].role == "user" else "user"
        if message.role != expected and (message.role != "system" or kept):
            wanted = f"expected {expected}; after at most one system message, user and assistant take turns"
            raise Refused(f"roles out of order: message {len(kept) + 1} is of role {message.role}, {wanted}")
        if message.role == "user" and not message.content.strip() and not message.input:
            raise Refused(f"message {len(kept) + 1}, the user's, is empty")
        kept.append(message)
    while kept and kept[-1].role != "assistant":
        kept.pop()
    if not kept:
        raise Refused("no answer: it has no message of the assistant")
    return tuple(kept)


ANSWERS = ("output", "response", "completion", "answer")
LISTS = ("messages", "conversations", "conversation")
TREE = "message_tree_id"  # of OASST1; `trees` puts the messages in its place
FORMATS = {  # the fields that a layout needs, by all their names; "auto" takes the first layout that fits
    "messages": (LISTS[:1],),
    "sharegpt": (LISTS[1:],),
    "alpaca": (("instruction",), ANSWERS),
    "openorca": (("question",), ANSWERS),
    "prompt": (("prompt",), ANSWERS),
    "dolly": (("instruction",), ANSWERS),
    "wizardlm": (("instruction", *LISTS[1:]), (*ANSWERS, *LISTS[1:])),
    "oasst1": ((TREE,),),
}


def recognise(record, formats: dict) -> str:
    """The first layout whose fields a record has; more fields make no difference. Refused if none fits."""
    if not isinstance(record, dict):
        raise Refused(f"found {shown(record)}; expected an object")
    most, nearest = -1, ""  # most: how many of the nearest layout's fields the record has
    for name, needs in formats.items():
        missing = [" or ".join(names) for names in needs if not present(record, names)]
        if not missing:
            return name
        if len(needs) - len(missing) > most:
            most = len(needs) - len(missing)
            nearest = f"{name}, needs {' and '.join(missing)}"
    fields = ", ".join(name for name in record if record[name] is not None)
    where = "docs/fine-tuning.md and docs/preferences.md list all layouts"
    raise Refused(f"found the fields {fields}; the nearest layout, {nearest}; {where}")


def examples(source: Records, records: Iterator[Record], formats: dict, read: Callable) -> Iterator:
    """Yields read(record, fields, layout, earlier turns) for `max_documents` records; Unreadable for a bad one."""
    # `read` removes the fields that it uses; the log names the others. With format="auto" the first good record of a
    # file decides the layout of the whole file.
    allowed = formats if source.format == "auto" else {source.format: formats[source.format]}
    known, unread = {}, Counter()  # known: the layout of each file
    try:
        for record in itertools.islice(records, source.max_documents):
            if isinstance(record.value, Unreadable):
                yield record.value
                continue
            fields = {LISTS[0]: record.value} if isinstance(record.value, list) else record.value
            try:
                layout = recognise(fields, known.get(record.file, allowed))
                known[record.file] = {layout: formats[layout]}
                fields = fields.copy()
                example = read(record, fields, layout, take_earlier(fields))
            except Refused as error:
                yield source.refuse(f"{record.where}: {error}")
                continue
            unread.update(key for key, value in fields.items() if value not in (None, "", [], {}))
            yield example
    finally:  # also if the reader stops before the end
        if unread:
            names = ", ".join(f"{json.dumps(key)} {count:,}" for key, count in unread.most_common(20))
            log.info(f"{source.name}: fields that are not read, with the number of their records: {names}")


def trees(source: Records, records: Iterator[Record]) -> Iterator[Record]:
    """Replaces a tree of OASST1 (one record, or a row for each message) by its path of best-ranked replies."""

    def tree(record: Record) -> str | None:
        return record.value.get(TREE) if isinstance(record.value, dict) else None

    for name, group in itertools.groupby(records, tree):
        if name is None:
            yield from group
            continue
        first, *others = group
        root = message = first.value.get("prompt") or first.value
        if root.get("deleted") or root.get("parent_id") is not None:
            reason = "the first message of the tree is deleted, or has a parent_id; keep the rows of a tree together"
            yield first._replace(value=source.refuse(f"{first.where}: {reason}"))
            continue
        path = []
        while message is not None:
            path.append({"role": message.get("role"), "content": message.get("text")})
            rows = [row.value for row in others if row.value.get("parent_id") == message.get("message_id")]
            replies = [reply for reply in message.get("replies") or rows if not reply.get("deleted")]
            # 0 is the best rank.
            message = min(replies, key=lambda reply: (reply.get("rank") is None, reply.get("rank") or 0), default=None)
        yield first._replace(value={TREE: path, "lang": root.get("lang")})


def read_conversation(record: Record, fields: dict, layout: str, earlier: list[Message]) -> Conversation:
    """The conversation in a record. Refused if a field has a wrong type, or the roles are out of order."""
    questions = FORMATS[layout][0]
    language = fields.pop("lang") if layout == "oasst1" else None
    if present(fields, questions) in (*LISTS, TREE):
        messages = take(fields, questions)
    else:
        messages = take_question(fields, questions) + take(fields, ANSWERS, "assistant")
    if messages and messages[-1].role == "user":
        fields["a last question without an answer"] = True
    messages = in_turn(earlier + messages)
    question = next(message.text() for message in messages if message.role == "user")
    return Conversation(record.id, messages, (question,), language)


@dataclass(frozen=True, kw_only=True)
class Chats(FileRecords):
    """The user's own conversations: one per record, or one per tree of OASST1."""

    name: str = "chats"
    format: str = "auto"  # a name in FORMATS; "auto": for each file the layout of its first record
    max_tokens: int | None = None  # reading stops when this many tokens are kept

    def conversations(self, workers: int) -> Iterator[Conversation | Unreadable]:
        return examples(self, trees(self, self.records(workers)), FORMATS, read_conversation)


@dataclass(frozen=True, kw_only=True)
class HubChats(HubRecords):
    """A dataset of conversations on the Hugging Face Hub."""

    format: str = "auto"  # as in Chats
    max_tokens: int | None = None
    conversations = Chats.conversations


QUESTIONS = (
    "What does {} do?",
    "What is {} for?",
    "What is the purpose of {}?",
    "Describe {} briefly.",
    "What can you tell me about {}?",
    "I came across {} in Python. What is it for?",
)


@dataclass(frozen=True, kw_only=True)
class DocQuestions(Records):
    """Questions about Python's documentation, each answered by the first paragraph of a docstring."""

    # A question's key is its docstring. So it is held out if a corpus of the same `docs` holds out the docstring.

    name: str = "python_questions"
    licence: str = PythonDocs.licence
    max_tokens: int | None = None
    docs: PythonDocs = field(default_factory=PythonDocs)

    inputs = PythonDocs.inputs

    def conversations(self, workers: int) -> Iterator[Conversation]:
        names, answers = set(), set()
        for document in self.docs.documents(workers):
            name = document.id
            if len(names) == self.max_documents:
                return
            if name in names or name.startswith("_") or "._" in name:
                continue
            text, _ = clean(document.value, self.docs.cleaning)
            answer = first_sentences(text)
            if answer is None or answer in answers:
                continue
            names.add(name)
            answers.add(answer)
            form = QUESTIONS[split_hash(name.encode()) % len(QUESTIONS)]
            messages = (Message("user", form.format(name)), Message("assistant", answer))
            yield Conversation(name, messages, (text,), "en")


NO_PROSE = re.compile(
    r">>>|::|->|\.\.|[\\|$@{}]|https?:|:\w[\w:+-]*:`|\]_|`_|==|--| - |~|__|\*{3}|^[\w.]+\(|"
    r"^(?:We|I|If|See|Same|Like|As|Also|But|Note|Usage|Overrid\w*|Copyright|Author|Written|Based)\b|"
    r"\b(?:TODO|XXX|[Dd]eprecated|[Ii]nternal|[Pp]rivate|[Tt]his file|generated from|[Bb]ackwards?[ -]compat\w*)\b"
)
LIST = re.compile(r"^\s*(?:[-*+•]|\(?\w[.)])\s|:\s*$", re.MULTILINE)


def first_sentences(text: str) -> str | None:
    """The first paragraph of a docstring on one line; None unless it is a short piece of prose."""
    paragraph = text.split("\n\n", 1)[0]
    answer = " ".join(paragraph.split()).replace("``", "`")
    if not 20 <= len(answer) <= 300 or answer.count(" ") < 3:
        return None
    if not answer[0].isupper() or not answer.endswith("."):
        return None
    paired = answer.count("(") == answer.count(")") and answer.count("`") % 2 == 0  # else cut off, or code
    return answer if paired and not NO_PROSE.search(answer) and not LIST.search(paragraph) else None
