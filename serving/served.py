"""What is served: a trained model, its tokenizer, and how it was taught to answer."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import checkpoint
from cli import UserError
from configs import TRAINED, Experiment
from machine import pick_device
from model import Transformer
from sft.conversations import Message, cleaned
from sft.templates import render
from tokenizer import Tokenizer


class TooLong(UserError):
    """A prompt that leaves no room for an answer in the model's context."""


@dataclass(frozen=True)
class Served:
    """template: the one that the model was taught to answer by; None: it goes on with a text."""

    name: str
    stage: str
    directory: Path
    model: Transformer
    tokenizer: Tokenizer
    template: str | None

    @property
    def stop(self) -> tuple[int, ...]:
        """The ids that end what it writes: no answer has a control piece in it."""
        control = self.tokenizer.control.values() if self.template else ()
        return self.tokenizer.eos, *control

    def conversation(self, messages: Sequence[Message]) -> list[int]:
        """The ids that ask for the next answer in a conversation. A control piece that a message spells is text.

        UserError for a model that was not taught to answer, for a conversation that asks nothing, and (TooLong) for one
        that fills the context.
        """
        if not self.template:
            raise UserError(
                f"{self.name} was not taught to answer: it goes on with a text; fine-tune it with sft.train"
            )
        messages = [Message(role, cleaned(content), about) for role, content, about in messages]
        if not messages or messages[-1].role != "user":
            raise UserError("the last message is not the user's; expected one that asks for an answer")
        if not messages[-1].content.strip():
            raise UserError("the message is empty; this model was taught to answer: ask it something")
        return self.short(render(self.template, messages, self.tokenizer, ask=True)[0])

    def text(self, prompt: str) -> list[int]:
        """The ids of the beginning of a text, to go on with. UserError (TooLong) if it fills the context."""
        return self.short([self.tokenizer.bos, *self.tokenizer.encode(prompt)])

    def prompt(self, prompt: str) -> list[int]:
        """The ids of a prompt, as the model was taught: a question to answer, or a text to go on with."""
        return self.conversation([Message("user", prompt)]) if self.template else self.text(prompt)

    def short(self, ids: list[int]) -> list[int]:
        """These ids. TooLong if they fill the context."""
        if len(ids) >= (context := self.model.config.context_length):
            raise TooLong(f"the prompt takes {len(ids):,} tokens; the model sees {context:,}, its answer included")
        return ids


def load(experiment: Experiment, directory: Path | None = None) -> Served:
    """A checkpoint, or the experiment's latest. UserError if it is missing, damaged, or of another tokenizer."""
    directory = directory or experiment.latest()
    spm = experiment.load_tokenizer(directory)
    checkpoint.must_match(directory, spm.sha256)
    # By a thread that ends: one that has computed, and lives, slows the one that decodes (serving/engine.py has why).
    with ThreadPoolExecutor(1) as passing:
        model = passing.submit(checkpoint.load_model, directory, str(pick_device())).result()
    made = {experiment.directory(name).resolve(): name for name in TRAINED}
    found = made.get(directory.resolve().parent, "")
    name = f"{experiment.name}-{found}" if found else directory.name
    return Served(name, found, directory, model, spm, checkpoint.template(directory))
