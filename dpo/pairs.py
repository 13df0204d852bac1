"""Pairs of answers to one prompt, of which one was preferred: the layouts they are published in, and pairs made from
the documentation that Python carries.

A source yields its pairs in an order that depends on nothing but the input.
"""

import hashlib
import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from data.sources import FileRecords, HubRecords, PythonDocs, Record, Records, Unreadable
from sft.conversations import (
    ROLES,
    Conversation,
    DocQuestions,
    Format,
    Formatted,
    Message,
    Refused,
    cleaned,
    first_question,
    in_turn,
    message_list,
    text_field,
)


class Pair(NamedTuple):
    """One example."""

    id: str
    prompt: tuple[Message, ...]
    """What both answer: at most one system message, then turns, the user's last."""
    chosen: str
    rejected: str
    keys: tuple[str, ...]
    """By whose hashes it is held out: what the user says first, and what else it must not be parted from."""
    kind: str = ""
    """Where a source makes pairs in several ways: in which."""
    language: str | None = None
    """Where the data says it, such as "en"."""
    where: str = ""
    """For messages: "path, line 3"."""


Said = tuple[list[Message], str, str]  # prompt, chosen, rejected


# ------------------------------------------------------------------------------------------------------- one record


def parted(chosen: list[Message], rejected: list[Message]) -> Said:
    """The turns that two conversations share, and the answer that each ends with. Refused if they part before."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if not messages or messages[-1].role != "assistant":
            raise Refused(f"{name} does not end with an answer of the assistant's")
    for messages in (chosen, rejected):
        if len(messages) > shared + 1:
            raise Refused(
                f"chosen and rejected part at message {shared + 1}; expected two answers to the same messages"
            )
    return chosen[:shared], chosen[-1].content, rejected[-1].content


def _listed(record: dict, name: str) -> list[Message]:
    try:
        return message_list(record, (name,), "role", "content", ROLES)
    except Refused as error:
        raise Refused(f"{name}: {error}") from None


def _preference(record: dict) -> Said:
    """Prompt, chosen and rejected, each a string or messages; of messages the prompt may be a part."""
    prompt = []
    if isinstance(record.get("prompt"), list):
        prompt = _listed(record, "prompt")
    elif "prompt" in record:
        prompt = [Message("user", text_field(record, "prompt"))]
    answers = []
    for name in ("chosen", "rejected"):
        if isinstance(record[name], list):
            said = _listed(record, name)
            if len(said) > 1 and isinstance(record.get("prompt"), list) and said[: len(prompt)] != prompt:
                raise Refused(f"{name} does not begin with the messages of prompt")
            answers.append(said if len(said) > 1 else prompt + said)
        else:
            answers.append([*prompt, Message("assistant", text_field(record, name))])
    return parted(*answers)


def _orca(record: dict) -> Said:
    system = Message("system", text_field(record, "system", required=False))
    return [system, Message("user", text_field(record, "question"))], *(text_field(record, n) for n in SIDES)


SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


def _transcript(record: dict, name: str) -> list[Message]:
    """The turns of an Anthropic HH transcript."""
    before, *parts = SPEAKER.split(text_field(record, name))
    if before.strip() or not parts:
        raise Refused(f'{name} is no transcript: expected turns that begin "\\n\\nHuman:" and "\\n\\nAssistant:"')
    roles = {"Human": "user", "Assistant": "assistant"}
    return [Message(roles[who], cleaned(text)) for who, text in zip(parts[::2], parts[1::2], strict=True)]


def _hh(record: dict) -> Said:
    return parted(*(_transcript(record, name) for name in SIDES))


SIDES = ("chosen", "rejected")


def _both(record: dict) -> bool:
    return all(name in record for name in SIDES)


def _lists(record: dict) -> bool:
    return any(isinstance(record.get(name), list) for name in SIDES)


# In the order in which "auto" tries them.
FORMATS = {
    "orca": Format(
        "question, chosen, rejected (and system)", lambda r: _both(r) and "question" in r and not _lists(r), _orca
    ),
    "preference": Format(
        "prompt, chosen, rejected (each a string, or a list of role, content; without prompt, lists that begin alike)",
        lambda r: _both(r) and ("prompt" in r or _lists(r)),
        _preference,
    ),
    "hh": Format('chosen, rejected (transcripts of "\\n\\nHuman:", "\\n\\nAssistant:")', _both, _hh),
}


# ------------------------------------------------------------------------------------------------------- the sources


@dataclass(frozen=True, kw_only=True)
class PairSource(Records):
    """What every source of pairs can be told."""

    max_pairs: int | None = None
    """Reading stops once so many pairs are kept."""

    def pairs(self, workers: int) -> Iterator[Pair | Unreadable]:
        """Its pairs; in the place of one that cannot be read, why. UserError for that one where `unreadable` is
        "stop"."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class PairRecords(Formatted, PairSource):
    """Records that are pairs."""

    layouts = FORMATS

    def pairs(self, workers: int) -> Iterator[Pair | Unreadable]:
        return itertools.islice(self.examples(workers), self.max_documents)

    def example(self, rows: list[Record], format: Format) -> Pair:
        [record] = rows
        prompt, chosen, rejected = format.read(record.value)
        *prompt, _ = in_turn([*prompt, Message("assistant", chosen)])
        return Pair(record.id, tuple(prompt), chosen, rejected, (first_question(prompt),), where=record.where)


@dataclass(frozen=True, kw_only=True)
class Pairs(FileRecords, PairRecords):
    """The user's own pairs: a record each, as FileRecords has them."""

    name: str = "pairs"


@dataclass(frozen=True, kw_only=True)
class HubPairs(HubRecords, PairRecords):
    """A dataset of pairs, as HubRecords streams it."""


# --------------------------------------------------------------------------------------------------- Python's own


@dataclass(frozen=True, kw_only=True)
class DocPairs(PairSource):
    """Questions about Python's documentation: what a function's docstring says, against three things that are worse.

    "another": what another one's says; "shuffled": the same words in no order; "repeated": a sentence said twice. Each
    question comes once with each of them. Held out are the questions whose docstrings are, as in DocQuestions; a pair
    whose other answer is on the other side is dropped by the reader, by its keys.
    """

    name: str = "python_pairs"
    licence: str = PythonDocs.licence
    docs: PythonDocs = field(default_factory=PythonDocs)

    def inputs(self) -> dict[str, str]:
        return self.docs.inputs()

    def pairs(self, workers: int) -> Iterator[Pair]:
        found = list(DocQuestions(docs=self.docs, max_documents=self.max_documents).conversations(workers))
        # In the order of their hashes, by which they are held out, neighbours are on the same side.
        order = sorted(range(len(found)), key=lambda i: hashlib.sha256(found[i].key.encode()[:4096]).digest())
        other = {i: order[place - 1] for place, i in enumerate(order)}
        for i, each in enumerate(found):
            answer, source = each.messages[-1].content, random.Random(each.id)
            partner = found[other[i]]
            yield _pair(each, "another", partner.messages[-1].content, partner.key)
            yield _pair(each, "shuffled", shuffled(answer, source))
            yield _pair(each, "repeated", repeated(answer, source))


def _pair(asked: Conversation, kind: str, rejected: str, *keys: str) -> Pair:
    *prompt, answer = asked.messages
    own = (asked.key, *keys)
    return Pair(f"{asked.id} {kind}", tuple(prompt), answer.content, rejected, own, kind, "en", asked.where)


def shuffled(text: str, source: random.Random) -> str:
    """The words of a text in another order; of equal words there is none."""
    words = text.split()
    if len(set(words)) > 1:
        while (drawn := source.sample(words, len(words))) == words:
            pass
        words = drawn
    return " ".join(words)


def repeated(text: str, source: random.Random) -> str:
    """A text in which one of its sentences stands twice."""
    sentences = re.split(r"(?<=[.!?])\s+", text)
    place = source.randrange(len(sentences))
    return " ".join([*sentences[: place + 1], *sentences[place:]])
