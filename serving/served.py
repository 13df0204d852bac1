"""The model that is served: its tokenizer, and the template that it learnt."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

import checkpoint
from cli import log
from configs import TRAINED, Experiment
from generate import to_int8
from machine import pick_device, slowdown
from model import Transformer
from serving.engine import Refused
from sft.conversations import Message, cleaned
from sft.templates import ends, render
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Served:
    """A model with its tokenizer. template: None for a base model, which continues texts and answers no questions."""

    name: str
    directory: Path
    model: Transformer
    tokenizer: Tokenizer
    template: str | None

    @property
    def stop(self) -> tuple[int, ...]:
        """The ids that end an answer."""
        return ends(self.template, self.tokenizer) if self.template else (self.tokenizer.eos,)

    def conversation(self, messages: Sequence[Message]) -> list[int]:
        """The ids that ask for the next answer. Raises Refused."""
        if not self.template:
            raise Refused(f"{self.name} is a base model, which only continues texts; fine-tune it first (stage sft)")
        messages = [message._replace(content=cleaned(message.content)) for message in messages]
        if messages[-1].role != "user" or not messages[-1].content.strip():
            raise Refused("the last message is empty or not the user's; end with a question")
        return render(self.template, messages, self.tokenizer, ask=True)[0]

    def prompt(self, text: str) -> list[int]:
        """The ids of a question, or for a base model of the beginning of a document."""
        return self.conversation([Message("user", text)]) if self.template else self.text(text)

    def text(self, text: str) -> list[int]:
        return [*self.tokenizer.opening, *self.tokenizer.encode(text)] or [self.tokenizer.bos]

    def room(self, ids: Sequence[int]) -> int:
        """How many tokens the answer to a prompt may have. Raises Refused if there is none."""
        context = self.model.config.context_length
        if len(ids) >= context:
            problem = f"the prompt has {len(ids):,} tokens; the context of {context:,} must hold the answer too"
            raise Refused(problem, code="context_length_exceeded")
        return context - len(ids)


def load(experiment: Experiment, directory: Path | None = None, precision: str = "float32") -> Served:
    """Loads a checkpoint; None: the experiment's latest. UserError: missing, damaged, or needs another tokenizer."""
    # precision: of the weights in memory, "float32", "bfloat16" or "int8".
    directory = directory or experiment.latest()
    tokenizer = experiment.load_tokenizer(directory)
    checkpoint.must_match(directory, tokenizer.sha256)
    # Load in a thread that ends: while a second thread that has computed is alive, OpenMP decodes 3 times as slowly.
    with ThreadPoolExecutor(1) as loader:
        device = pick_device()
        dtype = torch.float32 if precision == "int8" else getattr(torch, precision)
        if precision != "float32" and (times := loader.submit(slowdown, device, torch.bfloat16).result()) > 1:
            slower = f"takes {times:.1f} times as long as a float32 product on this machine"
            log.warning(f"--precision {precision}: a bfloat16 product {slower}; float32 is probably faster")
        model = loader.submit(checkpoint.load_model, directory, str(device), dtype=dtype).result()
        if precision == "int8":
            loader.submit(to_int8, model).result()
    name = directory.name
    for stage in TRAINED:
        if directory.resolve().parent == experiment.directory(stage).resolve():
            name = f"{experiment.name}-{stage}"
    return Served(name, directory, model, tokenizer, checkpoint.template(directory))
