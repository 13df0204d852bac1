"""A conversation with a model in the terminal. In a pipe, every line is a message.

Standard output carries the answers only; notices go to standard error.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import stage
from cli import UserError
from generate import Continuation, Sampling
from serving.engine import Engine, Generation
from serving.served import Served
from sft.conversations import Message

HELP = """\
/help            show this list
/reset           forget the conversation, but not the system message
/system TEXT     set the system message and start again; without TEXT: show it; -: remove it
/temperature X   0: always the likeliest token; higher: freer answers; without X: show it
/save FILE       save the conversation as JSON
/load FILE       continue a saved conversation
/exit, /quit     leave, like Ctrl-D
Ctrl-C stops an answer. End a line with a backslash to continue the message on the next line.
To send a message that begins with /, type //."""
COMMANDS = " ".join(re.findall(r"/\w+", HELP.partition("Ctrl-C")[0]))
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """The text with escapes such as \\x1b for characters that control a terminal or the writing direction."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def write(text: str) -> None:
    """Writes a part of an answer on standard output."""
    print(visible(text) if sys.stdout.isatty() else text, end="", flush=True)


def notice(text: str) -> None:
    print(visible(text), file=sys.stderr, flush=True)


class Chat:
    """The conversation so far. max_tokens: of an answer; None: what fits the context. system: "" for none."""

    def __init__(self, served: Served, engine: Engine, sampling: Sampling, max_tokens, seed, system: str):
        self.served, self.engine = served, engine
        self.system = [Message("system", system)] if system else []
        self.sampling, self.max_tokens, self.seed = sampling, max_tokens, seed
        self.messages: list[Message] = []
        self.first = 0  # the first message that still fits the context
        self.files: set[Path] = set()  # files of this session, which /save may overwrite
        self.terminal = sys.stdin.isatty()

    def run(self) -> None:
        """Reads messages until the input ends or the user leaves."""
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
        if self.terminal:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # raises KeyboardInterrupt
            with contextlib.suppress(ImportError):
                importlib.import_module("readline").parse_and_bind("set enable-bracketed-paste on")
            parameters = self.served.model.num_parameters()
            notice(f"{self.served.name}: {parameters:,} parameters; /help lists the commands")
        text = ""
        while text not in ("/exit", "/quit"):
            try:
                text = self.read()
                if text.startswith("/") and not text.startswith("//"):
                    self.command(*text.split(maxsplit=1))
                elif text.strip():
                    self.ask(text.removeprefix("/") if text.startswith("//") else text)
            except EOFError:
                break
            except KeyboardInterrupt:
                notice("\nCtrl-D or /exit leaves")
            except UnicodeDecodeError:
                if not self.terminal:
                    raise UserError("standard input is not UTF-8") from None
                notice("the message is not UTF-8")
            except (UserError, OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~user with an unknown user
                failed = not self.terminal and getattr(error, "status", 0) >= 500
                if failed or isinstance(error, BrokenPipeError):  # the reader of the answers has left
                    raise
                notice(str(error))

    def read(self, prompt: str = "> ") -> str:
        """The next message, or command. Raises EOFError."""
        readline = self.terminal and sys.stdout.isatty()  # then input() has editing and history
        if self.terminal and not readline:
            print(prompt, end="", file=sys.stderr, flush=True)
        text = input(prompt if readline else "")
        if self.terminal and text.endswith("\\"):
            return text[:-1] + "\n" + self.read("... ")
        return text

    def ask(self, text: str) -> None:
        """Sends a message and writes the answer."""
        question = Message("user", text)
        ids, first = self.fitting(question)
        room = self.served.room(ids)
        limit = min(room, self.max_tokens or room)
        seed = None if self.seed is None else self.seed + len(self.messages) // 2
        continuation = Continuation(ids, limit, self.sampling, seed, self.served.stop)
        answer = Generation(self.served.tokenizer, continuation)
        self.engine.submit([answer])
        try:
            for piece in answer:
                write(piece.text)
        except KeyboardInterrupt:
            answer.cancelled = True
            for piece in answer:
                write(piece.text)
        write("\n")
        if answer.finish != "stop":
            notice("(stopped)" if answer.finish == "cancelled" else f"(cut off after {limit:,} tokens)")
        if first and not self.first:
            notice("(the conversation is longer than the model's context: its earliest messages are left out)")
        self.first = first
        self.messages += [question, Message("assistant", answer.text)]

    def fitting(self, question: Message) -> tuple[list[int], int]:
        """The prompt's ids, and its first message: the oldest are left out until a quarter of the context is free."""
        for first in range(self.first, len(self.messages) + 1, 2):
            ids = self.served.conversation([*self.system, *self.messages[first:], question])
            if len(ids) <= self.served.model.config.context_length * 3 // 4:
                break
        return ids, first

    def command(self, name: str, rest: str = "") -> None:
        rest = rest.strip()
        match name:
            case "/exit" | "/quit":
                pass
            case "/help":
                notice(HELP)
            case "/reset":
                self.start(self.system)
                notice("the conversation is forgotten")
            case "/system" if rest:
                self.start([Message("system", rest)] if rest != "-" else [])
                notice("a new conversation starts")
            case "/system":
                notice(self.system[0].content if self.system else "no system message")
            case "/temperature":
                if rest:
                    self.sampling = dataclasses.replace(self.sampling, temperature=float(rest))
                notice(f"temperature {self.sampling.temperature:g}")
            case "/save" | "/load" if not rest:
                notice(f"{name} needs the name of a file")
            case "/save" | "/load":
                transfer = self.save if name == "/save" else self.load
                transfer(Path(rest).expanduser())
            case _:
                notice(f"no command {name:.40}; expected one of {COMMANDS}; // begins a message with /")

    def start(self, messages: Sequence[Message]) -> None:
        count = sum(message.role == "system" for message in messages[:1])
        self.system, self.messages, self.first = messages[:count], messages[count:], 0

    def save(self, path: Path) -> None:
        if os.path.lexists(path) and path.resolve() not in self.files:
            raise UserError(f"{path} exists and is not from this session; choose another name")
        turns = [{"role": message.role, "content": message.content} for message in [*self.system, *self.messages]]
        stage.write_json(path, {"model": self.served.name, "sha256": self.served.model.digest, "messages": turns})
        self.files.add(path.resolve())
        notice(f"saved {len(self.messages)} messages to {path}")

    def load(self, path: Path) -> None:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            messages = [Message(turn["role"], turn["content"] + "") for turn in record["messages"]]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is not a conversation that /save wrote") from None
        roles = [message.role for message in messages]
        if roles[roles[:1] == ["system"] :] != ["user", "assistant"] * (len(roles) // 2):
            raise UserError(f"{path}: expected messages of user and assistant in turn")
        self.start(messages)
        self.files.add(path.resolve())
        notice(f"loaded {len(messages)} messages from {path}; they were with {record.get('model')}")
