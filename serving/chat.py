"""A conversation with a model in the terminal; of a pipe, every line is a turn.

Standard output carries the answers and nothing else; what is said about them goes to standard error.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import re
import select
import signal
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import cli
import stage
from cli import UserError
from generate import Sampling
from serving.engine import Engine, Failed, Generation, Request
from serving.served import Served, TooLong
from sft.conversations import Message, Refused, in_turn, message_list

HELP = """\
/help            this list
/reset           forget the conversation; the system message stays
/system TEXT     set the system message and begin anew; alone: show it; - removes
/temperature X   0: the likeliest answer; more: freer ones; alone: show it
/save FILE       write the conversation to a file, as JSON
/load FILE       go on with the conversation in a file
/exit, /quit     leave, as Ctrl-D does
Ctrl-C stops an answer. A line that ends in a backslash goes on in the next;
lines pasted together are one message. One that begins with /: write //."""
COMMANDS = " ".join(re.findall(r"/\w+", HELP.partition("Ctrl-C")[0]))
LARGEST = 16 * 2**20  # bytes of a saved conversation
PASTE = 0.03  # seconds in which the rest of a paste follows a line
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """The text with what could command a terminal, or turn the writing direction, spelt out, such as \\x1b."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def write(text: str) -> None:
    """Writes some of an answer on standard output: as it is, or for a terminal `visible`."""
    print(visible(text) if sys.stdout.isatty() else text, end="", flush=True)


class Chat:
    """What has been said, and the commands that change it. system: the system message, "" for none."""

    def __init__(
        self, served: Served, engine: Engine, sampling: Sampling, max_tokens: int | None, seed: int | None, system: str
    ):
        self.served, self.engine = served, engine
        self.sampling, self.max_tokens, self.seed = sampling, max_tokens, seed
        self.terminal = sys.stdin.isatty()
        self.colour = os.environ.get("TERM", "dumb") != "dumb" and not os.environ.get("NO_COLOR")
        self.messages: list[Message] = []
        self.files: set[Path] = set()  # that conversations of this session are in
        self.first = 0  # of the messages, the first that still fits the context
        self.system = _whole(system)
        self.reading = self.interrupted = self.told = False
        self.generation: Generation | None = None

    def run(self) -> None:
        """Until the input ends, or the user leaves."""
        if self.terminal:
            size = sum(p.numel() for p in self.served.model.parameters())
            of = f", stage {self.served.stage}" if self.served.stage else ""
            self.notice(f"{self.served.name}: {size:,} parameters{of}; /help lists the commands")
        for text in self._typed() if self.terminal else _piped():
            if text.startswith("/") and not text.startswith("//"):
                if not self.command(text):
                    break
            elif text.strip():
                self.ask(text.removeprefix("/") if text.startswith("//") else text)

    def notice(self, text: str) -> None:
        """Says something that is no answer."""
        dim, plain = ("\x1b[2m", "\x1b[0m") if text and self.colour and sys.stderr.isatty() else ("", "")
        print(f"{dim}{visible(text)}{plain}", file=sys.stderr, flush=True)

    # ------------------------------------------------------------------------------------------------------- input

    def _typed(self) -> Iterator[str]:
        """Messages as they are typed. Ctrl-C drops the one that is being typed."""
        editing, bold, plain = False, "", ""
        if sys.stdout.isatty():
            with contextlib.suppress(ImportError):  # with it, input() has line editing and a history
                readline = importlib.import_module("readline")
                editing = True
                if self.colour:
                    bold, plain = "\001\x1b[1m\002", "\001\x1b[0m\002"
                    readline.parse_and_bind("set enable-bracketed-paste on")  # Python puts it off
        while True:
            try:
                text = _whole(self._line(f"{bold}>{plain} ", editing))
                while not text.startswith("/") and ((more := _waiting()) or text.endswith("\\")):
                    text = text if more else text[:-1]
                    try:
                        text += "\n" + _whole(self._line(f"{bold}...{plain} ", editing))
                    except EOFError:
                        break
            except KeyboardInterrupt:
                self.notice("" if self.told else "\nCtrl-D or /exit to leave")
                self.told = True
            except EOFError:
                self.notice("")
                return
            except UserError as error:
                self.notice(f"{error}; the message was not sent")
            else:
                yield text

    def _line(self, mark: str, editing: bool) -> str:
        if not editing:
            print(mark, end="", file=sys.stderr, flush=True)
        self.interrupted, self.reading = False, True
        try:
            return input(mark if editing else "")
        except UnicodeDecodeError:
            raise UserError("what was typed is not UTF-8") from None
        finally:
            self.reading = False

    def interrupt(self, signum, frame) -> None:
        """Ctrl-C: ends the line that is being typed, or the answer; a command is left to finish."""
        self.interrupted = True
        if self.generation:
            self.generation.cancel()
        if self.reading:
            self.reading = False
            raise KeyboardInterrupt

    # ------------------------------------------------------------------------------------------------------ answers

    def ask(self, text: str) -> None:
        """One turn: writes the answer as it comes. Without an answer the conversation stays as it was."""
        asked, said = Message("user", text), ""
        try:
            ids, first = self._fitting(asked)
            room = self.served.model.config.context_length - len(ids)
            seed = None if self.seed is None else self.seed + len(self.messages) // 2
            limit = min(room, self.max_tokens or room)
            request = Request(ids=ids, max_tokens=limit, sampling=self.sampling, seed=seed, stop_ids=self.served.stop)
            (self.generation,) = self.engine.submit([request])
            if self.interrupted:
                self.generation.cancel()
            for piece in self.generation:
                write(piece.text)
                said += piece.text
            write("\n")
        except TooLong as error:
            return self.notice(f"the message is too long and was not sent: {error}")
        except ValueError as error:
            raise UserError(str(error)) from None
        except Failed as error:
            if not self.terminal:
                raise UserError(str(error)) from None
            return self.notice(f"\nno answer: {error}")
        finally:
            self.generation = None
        notes = {"cancelled": ["stopped"], "length": [f"cut off after {limit:,} tokens"]}.get(piece.finish, [])
        if said.strip():
            self.messages += [asked, Message("assistant", said)]
            self.first = first
        else:
            notes.append("an empty answer; the message is forgotten")
        if notes:
            self.notice(f"({'; '.join(notes)})")
        if self.terminal:
            self.notice("")

    def _fitting(self, asked: Message) -> tuple[list[int], int]:
        """The ids of the conversation and a message more; of the oldest turns as many are left out as must be for the
        answer to have a quarter of the context. And the number of the first message that is left."""
        context = self.served.model.config.context_length
        system = [Message("system", self.system)] if self.system else []
        for first in range(self.first, len(self.messages) + 1, 2):
            try:
                ids = self.served.conversation([*system, *self.messages[first:], asked])
            except TooLong:
                if first == len(self.messages):
                    raise
                continue
            if len(ids) <= context - max(32, context // 4):
                break
        if first and not self.first:
            self.notice("(the conversation has outgrown the model's context: its earliest turns are left out)")
        return ids, first

    # ----------------------------------------------------------------------------------------------------- commands

    def command(self, line: str) -> bool:
        """Does what a line asks for; whether to go on. A command that fails says why, and changes nothing."""
        name, rest = [*line.split(maxsplit=1), ""][:2]
        rest = rest.strip()
        try:
            match name:
                case "/exit" | "/quit":
                    return False
                case "/help":
                    self.notice(HELP)
                case "/reset":
                    self._begin([])
                    self.notice("the conversation is forgotten")
                case "/system" if rest:
                    self._begin([], "" if rest == "-" else rest)
                    self.notice("the conversation begins anew")
                case "/system":
                    self.notice(self.system or "no system message")
                case "/temperature":
                    if rest:
                        self.sampling = dataclasses.replace(self.sampling, temperature=_number(rest))
                    self.notice(f"temperature {self.sampling.temperature:g}")
                case "/save" | "/load" if not rest:
                    self.notice(f"{name} needs the name of a file")
                case "/save":
                    self._save(Path(rest).expanduser())
                case "/load":
                    self._load(Path(rest).expanduser())
                case _:
                    self.notice(f"{name:.40} is none of {COMMANDS}; to send it: /{name:.40}")
        except OSError as error:
            self.notice(f"{rest}: {error.strerror}")
        except (UserError, ValueError, RuntimeError) as error:  # RuntimeError: of a ~user who is unknown
            self.notice(str(error))
        return True

    def _begin(self, messages: list[Message], system: str | None = None) -> None:
        self.messages, self.first = messages, 0
        self.system = self.system if system is None else system

    def _save(self, path: Path) -> None:
        if not self.messages:
            raise UserError("nothing has been said yet")
        if path.exists() and path.resolve() not in self.files:
            raise UserError(f"{path} is there already and not of this conversation: choose another name")
        system = [Message("system", self.system)] if self.system else []
        messages = [{"role": role, "content": content} for role, content, _ in [*system, *self.messages]]
        stage.write_json(path, {"model": self.served.name, "sha256": self.served.model.digest, "messages": messages})
        self.files.add(path.resolve())
        self.notice(f"saved {len(self.messages)} messages to {path}")

    def _load(self, path: Path) -> None:
        record, messages = _saved(path)
        system = messages.pop(0).content if messages[0].role == "system" else ""
        self._begin(messages, system)
        self.files.add(path.resolve())
        other = "" if record.get("sha256") == self.served.model.digest else f"; it was with {record.get('model')!s:.80}"
        self.notice(f"loaded {len(messages)} messages from {path}{other}")


def _saved(path: Path) -> tuple[dict, list[Message]]:
    """A saved conversation. UserError if the file is none."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a file")
    if (size := path.stat().st_size) > LARGEST:
        raise UserError(f"{path} has {size:,} bytes; expected a saved conversation of at most {LARGEST:,}")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict) or "messages" not in record:
            raise Refused("expected an object with the field messages")
        return record, list(in_turn(message_list(dict(record), "messages")))
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not a saved conversation: it is not JSON") from None
    except Refused as error:
        raise UserError(f"{path} is not a saved conversation: {error}") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"temperature is {text!r}; expected a number") from None


def _whole(text: str) -> str:
    """The text. UserError if it holds what is no character: bytes that were not UTF-8."""
    if re.search("[\ud800-\udfff]", text):
        raise UserError("the text holds bytes that are not UTF-8")
    return text


def _waiting() -> bool:
    """Whether more has been typed already: the lines of a paste, where the terminal does not say that it is one."""
    return bool(select.select([sys.stdin], [], [], PASTE)[0])


def _piped() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            yield line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"standard input is not UTF-8: {error.reason} in line {number}") from None


def pause(signum, frame) -> None:
    """Ctrl-Z: when the shell goes on with us, the terminal has to be again as the line that is being typed needs it."""
    modes = termios.tcgetattr(sys.stdin)
    os.kill(os.getpid(), signal.SIGSTOP)
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, modes)


def chat(
    served: Served, engine: Engine, sampling: Sampling, max_tokens: int | None, seed: int | None, system: str
) -> None:
    """A conversation on standard input and output. max_tokens: of an answer; None: as many as fit the context."""
    talk = Chat(served, engine, sampling, max_tokens, seed, system)

    def stop(signum, frame):
        raise cli.Stopped(128 + signum, "\nstopped" if talk.terminal else "stopped")

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, talk.interrupt if talk.terminal else stop)
    if talk.terminal:
        signal.signal(signal.SIGTSTP, pause)
    talk.run()
