"""Pairs of answers to one prompt, the first preferred: published layouts, and pairs from Python's documentation."""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from data.holdout import split_hash
from data.sources import FileRecords, HubRecords, PythonDocs, Record, Records, Unreadable
from sft.conversations import DocQuestions, Message, Refused, examples, in_turn, take, take_question, text_of


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


SIDES = (("chosen",), ("rejected",))
FORMATS = {"preference": SIDES, "orca": (("question",), *SIDES), "hh": SIDES}  # as in sft.conversations
SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


def read_pair(record: Record, fields: dict, layout: str, earlier: list[Message]) -> Pair:
    """The pair in a record. Refused if a field has a wrong type, or the two answers do not belong to one prompt."""
    # Each answer is a text, or a list of messages, which may begin with the prompt. Without a prompt, each text is a
    # transcript as in Anthropic's HH. If the prompt is such a transcript, the answers continue it.
    prompt, beginning, sides = [], "", []
    if layout != "hh":
        prompt = take_question(fields, ("prompt", "question", "instruction"))
        if len(prompt) == 1 and SPEAKER.match(prompt[0].content) and prompt[0].content.rstrip().endswith("Assistant:"):
            beginning, prompt = prompt[0].content, []
    for name in ("chosen", "rejected"):
        if layout != "hh" and (prompt or isinstance(fields[name], list)):
            messages = take(fields, (name,), "assistant")
        else:
            messages = transcript(beginning + text_of(fields.pop(name), name), name)
        if len(messages) == 1:
            messages = prompt + messages
        elif not set(prompt) <= set(messages):
            raise Refused(f"{name} is a conversation without the messages of prompt; remove one of them")
        if not messages or messages[-1].role != "assistant":
            raise Refused(f"{name} does not end with an answer of the assistant")
        sides.append(in_turn(earlier + messages))
    (*prompt, chosen), (*other, rejected) = sides
    if prompt != other:
        raise Refused("chosen and rejected differ before the last message; expected two answers to the same messages")
    question = next(message.text() for message in prompt if message.role == "user")
    return Pair(record.id, tuple(prompt), chosen.content, rejected.content, (question,))


def transcript(text: str, name: str) -> list[Message]:
    """The turns of a transcript."""
    before, *parts = SPEAKER.split(text)
    if before.strip() or not parts:
        raise Refused(f'{name} is no transcript, which begins "\\n\\nHuman:"; an answer alone needs the field prompt')
    messages = []
    for speaker, turn in zip(parts[::2], parts[1::2], strict=True):
        messages.append(Message("user" if speaker == "Human" else "assistant", turn.removeprefix(" ")))
    return messages


@dataclass(frozen=True, kw_only=True)
class Pairs(FileRecords):
    """The user's own pairs, one per record."""

    name: str = "pairs"
    format: str = "auto"  # a name in FORMATS; "auto": for each file the layout of its first record
    max_pairs: int | None = None  # reading stops when this many pairs are kept

    def pairs(self, workers: int) -> Iterator[Pair | Unreadable]:
        return examples(self, self.records(workers), FORMATS, read_pair)


@dataclass(frozen=True, kw_only=True)
class HubPairs(HubRecords):
    """A dataset of pairs on the Hugging Face Hub."""

    format: str = "auto"  # as in Pairs
    max_pairs: int | None = None
    pairs = Pairs.pairs


@dataclass(frozen=True, kw_only=True)
class DocPairs(Records):
    """Questions about Python's documentation. Rejected: another docstring, shuffled words, a repeated sentence."""

    name: str = "python_pairs"
    licence: str = PythonDocs.licence
    max_pairs: int | None = None
    docs: PythonDocs = field(default_factory=PythonDocs)

    inputs = PythonDocs.inputs

    def pairs(self, workers: int) -> Iterator[Pair]:
        questions = list(DocQuestions(docs=self.docs, max_documents=self.max_documents).conversations(workers))
        # Questions sorted by the hash that decides what is held out: nearly all neighbours are in the same split.
        ring = sorted(questions, key=lambda question: split_hash(question.keys[0].encode()))
        neighbours = {question.id: ring[place - 1] for place, question in enumerate(ring)}
        for question in questions:
            *prompt, answer = question.messages
            other, source = neighbours[question.id], random.Random(question.id)
            rejected = {"another": other.answers[0]}
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
