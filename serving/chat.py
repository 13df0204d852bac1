"""A conversation with a model in the terminal. In a pipe, every line is a message.

Standard output carries the answers only; notices go to standard error.
"""

import contextlib
import signal
import sys

from cli import UserError, visible
from generate import Continuation, Sampling
from serving.engine import Engine, Generation, seed_of
from serving.served import Served
from sft.conversations import Message

HELP = """\
/help            show this list
/reset           forget the conversation, but not the system message
/system TEXT     set the system message and start again; without TEXT: show it; -: remove it
/exit, /quit     leave, like Ctrl-D
Ctrl-C stops an answer. A paste of several lines is one message.
To send a message that begins with /, type //."""
COMMANDS = "/help /reset /system /exit /quit"


def write(text: str) -> None:
    """Writes a part of an answer on standard output."""
    print(visible(text) if sys.stdout.isatty() else text, end="", flush=True)


def notice(text: str) -> None:
    print(visible(text), file=sys.stderr, flush=True)


class Chat:
    """The conversation so far. max_tokens: of an answer; None: as many as fit the context. system: "" for none."""

    def __init__(self, served: Served, engine: Engine, sampling: Sampling, max_tokens, seed, system: str):
        self.served, self.engine = served, engine
        self.sampling, self.max_tokens, self.seed = sampling, max_tokens, seed
        self.system, self.messages, self.answers = system, [], 0
        self.terminal = sys.stdin.isatty() and sys.stdout.isatty()

    def run(self) -> None:
        """Reads messages until the input ends or the user leaves."""
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
        if self.terminal:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # raises KeyboardInterrupt
            with contextlib.suppress(ImportError):
                import readline

                readline.parse_and_bind("set enable-bracketed-paste on")
            parameters = self.served.model.num_parameters()
            notice(f"{self.served.name}: {parameters:,} parameters; /help lists the commands")
        text = ""
        while text not in ("/exit", "/quit"):
            try:
                text = input("> " if self.terminal else "")
                if text.startswith("/") and not text.startswith("//"):
                    name, _, rest = text.partition(" ")
                    self.command(name, rest.strip())
                elif text.strip():
                    self.ask(text.removeprefix("/") if text.startswith("//") else text)
            except EOFError:
                break
            except KeyboardInterrupt:
                notice("\nCtrl-D or /exit leaves")
            except UnicodeDecodeError:
                raise UserError("standard input is not UTF-8") from None
            except UserError as error:
                if getattr(error, "status", 0) >= 500:  # the engine has failed
                    raise
                notice(str(error))

    def ask(self, text: str) -> None:
        """Sends a message and writes the answer."""
        system = [Message("system", self.system)] if self.system else []
        # Forget the oldest messages until a quarter of the context is free.
        for first in range(0, len(self.messages) + 1, 2):
            messages = [*self.messages[first:], Message("user", text)]
            ids = self.served.conversation([*system, *messages])
            if len(ids) <= self.served.model.config.context_length * 3 // 4:
                break
        room = self.served.room(ids)
        limit = min(room, self.max_tokens or room)
        seed = seed_of(self.seed, self.answers)
        answer = Generation(self.served.tokenizer, Continuation(ids, limit, self.sampling, seed, self.served.stop))
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
        if first:
            notice("(the conversation fills the model's context: its earliest messages are left out)")
        self.messages = [*messages, Message("assistant", answer.text)]
        self.answers += 1

    def command(self, name: str, rest: str) -> None:
        match name:
            case "/exit" | "/quit":
                pass
            case "/help":
                notice(HELP)
            case "/system" if not rest:
                notice(self.system or "no system message")
            case "/system" | "/reset":
                if name == "/system":
                    self.system = "" if rest == "-" else rest
                self.messages = []
                notice("a new conversation starts")
            case _:
                notice(f"no command {name:.40}; expected one of {COMMANDS}; // begins a message with /")
