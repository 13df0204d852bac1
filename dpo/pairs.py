"""Pairs: two answers to one prompt, of which the first was preferred. The layouts that they are published in, and pairs
made from Python's own documentation."""

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from data.sources import FileRecords, HubRecords, PythonDocs, Record, Records, Unreadable
from sft.conversations import (
    ROLES,
    DocQuestions,
    Message,
    Refused,
    earlier_turns,
    examples,
    first_question,
    in_turn,
    message_list,
    present,
    text_of,
)


class Pair(NamedTuple):
    """One example."""

    id: str
    prompt: tuple[Message, ...]  # at most one system message, then turns; the last is the user's
    chosen: str
    rejected: str
    keys: tuple[str, ...]  # texts that must be in the same split; first the first question
    kind: str = ""  # how the source made the pair, if it has several ways
    language: str | None = None  # such as "en", if the data states it

    @property
    def answers(self) -> tuple[str, str]:
        return self.chosen, self.rejected

    @property
    def messages(self) -> list[Message]:
        return [*self.prompt, Message("assistant", self.chosen), Message("assistant", self.rejected)]


# ------------------------------------------------------------------------------------------------------------ layouts

SIDES = (("chosen",), ("rejected",))
FORMATS = {"preference": SIDES, "orca": (("question",), *SIDES), "hh": SIDES}  # as in sft.conversations
SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


def read_pair(record: Record, fields: dict, layout: str) -> Pair:
    """The pair in a record. Each answer may be a text, or a list of messages, which may begin with the prompt.

    Without a prompt, two texts are transcripts as Anthropic's HH has them. Refused if a field has a wrong type, or the
    two answers do not belong to one prompt.
    """
    earlier, prompt, sides = earlier_turns(fields), [], []
    name = present(fields, ("prompt", "question"))
    transcripts = layout == "hh" or (not name and isinstance(fields["chosen"], str))
    if name and not transcripts:
        prompt = message_list(fields, name, "user")
    for name in ("chosen", "rejected"):
        messages = transcript(fields, name) if transcripts else message_list(fields, name, "assistant")
        if len(messages) == 1:
            messages = prompt + messages
        elif len(messages) > 1 and isinstance(record.value.get("prompt"), list) and messages[: len(prompt)] != prompt:
            raise Refused(f"{name} does not begin with the messages of prompt")
        if not messages or messages[-1].role != "assistant":
            raise Refused(f"{name} does not end with an answer of the assistant")
        sides.append(in_turn(earlier + messages))
    (*prompt, chosen), (*other, rejected) = sides
    if prompt != other:
        raise Refused("chosen and rejected part before the last message; expected two answers to the same messages")
    return Pair(record.id, tuple(prompt), chosen.content, rejected.content, (first_question(prompt),))


def transcript(fields: dict, name: str) -> list[Message]:
    """Removes a field that is a transcript; its turns."""
    before, *parts = SPEAKER.split(text_of(fields.pop(name), name))
    if before.strip() or not parts:
        raise Refused(f'{name} is no transcript: expected turns that begin "\\n\\nHuman:" and "\\n\\nAssistant:"')
    messages = []
    for speaker, text in zip(parts[::2], parts[1::2], strict=True):
        messages.append(Message(ROLES[speaker.lower()], text.removeprefix(" ")))
    return messages


def pairs(source: Records, workers: int) -> Iterator[Pair | Unreadable]:
    """The pairs in a source's records."""
    return examples(source, source.records(workers), FORMATS, read_pair)


@dataclass(frozen=True, kw_only=True)
class Pairs(FileRecords):
    """The user's own pairs, one per record."""

    name: str = "pairs"
    format: str = "auto"  # a name in FORMATS; "auto": for each file the layout of its first record
    max_pairs: int | None = None  # reading stops when this many pairs are kept
    pairs = pairs


@dataclass(frozen=True, kw_only=True)
class HubPairs(HubRecords):
    """A dataset of pairs on the Hugging Face Hub."""

    format: str = "auto"  # as in Pairs
    max_pairs: int | None = None
    pairs = pairs


# ------------------------------------------------------------------------------------------------------- Python's own


@dataclass(frozen=True, kw_only=True)
class DocPairs(Records):
    """Questions about Python's documentation. The chosen answer is the function's docstring, the rejected one is worse:
    another function's docstring ("another"), the same words in random order ("shuffled"), or a sentence said twice
    ("repeated"). Each question comes once with each."""

    name: str = "python_pairs"
    licence: str = PythonDocs.licence
    max_pairs: int | None = None
    docs: PythonDocs = field(default_factory=PythonDocs)

    def inputs(self) -> dict[str, str]:
        return self.docs.inputs()

    def pairs(self, workers: int) -> Iterator[Pair]:
        questions = list(DocQuestions(docs=self.docs, max_documents=self.max_documents).conversations(workers))
        # Neighbours in the order of the hashes that decide what is held out are in the same split, but for one.
        hashes = [hashlib.sha256(question.keys[0].encode()[:4096]).digest() for question in questions]
        order = sorted(range(len(questions)), key=hashes.__getitem__)
        neighbour = {number: order[place - 1] for place, number in enumerate(order)}
        for number, question in enumerate(questions):
            *prompt, answer = question.messages
            other, source = questions[neighbour[number]], random.Random(question.id)
            rejected = {"another": other.messages[-1].content}
            rejected["shuffled"] = shuffled(answer.content, source)
            rejected["repeated"] = repeated(answer.content, source)
            for kind, text in rejected.items():
                keys = question.keys + other.keys if kind == "another" else question.keys
                yield Pair(f"{question.id} {kind}", tuple(prompt), answer.content, text, keys, kind, "en")


def shuffled(text: str, source: random.Random) -> str:
    """The words of a text in another order, if its words differ."""
    words = text.split()
    drawn = words
    while drawn == words and len(set(words)) > 1:
        drawn = source.sample(words, len(words))
    return " ".join(drawn)


def repeated(text: str, source: random.Random) -> str:
    """A text with one of its sentences twice."""
    sentences = re.split(r"(?<=[.!?])\s+", text)
    place = source.randrange(len(sentences))
    return " ".join([*sentences[: place + 1], *sentences[place:]])
