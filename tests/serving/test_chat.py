"""The chat as a user has it: on a terminal, and in a pipe."""

import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest

import generate
from cli import visible
from sft.conversations import Message
from tests.conftest import ROOT, Place

SEEDED = ["--temperature", "1", "--top-p", "1", "--seed", "5"]
CTRL_C, CTRL_D = "\x03", "\x04"
# In a session of its own with this terminal: Ctrl-C arrives as a signal. A token takes its time.
START = """
import fcntl, os, runpy, sys, termios, time
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
import generate
step = generate.Decoder.step
generate.Decoder.step = lambda self: time.sleep(0.05) or step(self)
del sys.argv[0]
runpy.run_path("serve.py", run_name="__main__")
"""


class Terminal:
    """A command on a pseudo-terminal. fresh: what was shown since the last `expect`."""

    def __init__(self, place: Place, *words: str):
        self.fd, child = pty.openpty()
        self.fresh = ""
        command = [sys.executable, "-c", START, "serve.py", place.config, *words]
        env = place.env | {"TERM": "xterm-256color"}
        self.process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=child, stdout=child, stderr=child)
        os.close(child)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.fd)

    def type(self, text: str) -> None:
        if text == CTRL_C:  # as a person does it: not between a prompt and the wait for a key
            time.sleep(0.2)
        os.write(self.fd, text.encode())

    def expect(self, pattern: str) -> str:
        """Waits until the pattern was shown. Returns what was shown up to its end."""
        while not (match := re.search(pattern, self.fresh, re.DOTALL)):
            ready, _, _ = select.select([self.fd], [], [], 20)
            assert ready, f"no {pattern!r} in {self.fresh!r}"
            shown = os.read(self.fd, 65536).decode(errors="replace")
            self.fresh += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", shown)
        self.fresh = self.fresh[match.end() :]
        return match.string[: match.end()]

    def prompt(self) -> str:
        """Waits for the prompt. Returns what was shown before it."""
        return self.expect(r"(?:\n|\A|h)> ")

    def say(self, text: str) -> str:
        """Sends a line. Returns what is shown until the next prompt."""
        self.type(text + "\n")
        self.expect("\n")  # its echo
        return self.prompt().removesuffix("> ").strip()


def piped(place: Place, *options, **input) -> subprocess.CompletedProcess:
    return place.run("serve.py", place.config, "chat", *options, **input)


@pytest.mark.slow
def test_a_conversation_on_a_terminal(fine_tuned: Place):
    with Terminal(fine_tuned, "chat", "--temperature", "2", "--seed", "9") as chat:
        assert re.search(r"mini-sft: [\d,]+ parameters; /help", chat.prompt())
        assert chat.say("Say a in.")
        assert re.findall(r"/\w+", chat.say("/foo"))[1:] == re.findall(r"^/\w+|(?<=, )/\w+", chat.say("/help"), re.M)
        chat.type("\x1b[200~one\ntwo\n  three\x1b[201~\n")  # a paste is one message
        chat.expect("three.*\n")
        chat.prompt()
        chat.say("//six")
        chat.type("half a li")
        chat.expect("half a li")
        chat.type(CTRL_C)
        assert "Ctrl-D or /exit leaves" in chat.prompt()
        chat.say("/system Be brief.")
        assert chat.say("/system") == "Be brief."
        chat.type("Say a in.\n")
        chat.expect("\n *\\S+ ")  # the answer has begun
        chat.type(CTRL_C)
        assert "(stopped)" in chat.prompt()
        chat.type(CTRL_D)
        assert chat.process.wait(20) == 0


@pytest.mark.slow
def test_generate_asks_for_a_prompt_on_a_terminal(fine_tuned: Place):
    with Terminal(fine_tuned, "generate") as terminal:
        terminal.expect("Ctrl-D")
        terminal.type(f"Say a in.\n{CTRL_D}")
        assert terminal.process.wait(20) == 0


def test_a_pipe_gets_the_answers_only(fine_tuned: Place, served):
    lines = ["Say a in.", "", "//Say in.", "/reset", "Say a.", "/exit", "unheard"]
    done = piped(fine_tuned, *SEEDED, "--max-tokens", 9, stdin="\n".join(lines))
    assert done.stderr.count("a new conversation starts") == 1
    answers, messages = [], []
    for seed, text in enumerate(("Say a in.", "/Say in.", "Say a."), start=5):
        messages = [*(messages if seed < 7 else []), Message("user", text)]
        while len(ids := served.conversation(messages)) > 48:  # three quarters of the context
            messages = messages[2:]
        new = generate.generate(served.model, ids, 9, seed=seed, stop=served.stop)
        answers.append(served.tokenizer.decode(new, begins=False))
        messages.append(Message("assistant", answers[-1]))
    assert done.stdout == "".join(f"{answer}\n" for answer in answers)


def test_a_conversation_longer_than_the_context(fine_tuned: Place):
    turns = ["Say a.", "Say b.", "Say c.", "x " * 100, "Say d."]
    done = piped(fine_tuned, *SEEDED, "--max-tokens", 12, stdin="\n".join(turns))
    assert "earliest messages are left out" in done.stderr
    assert done.stderr.count("the context of 64 must hold the answer too") == 1
    assert len(done.stdout.splitlines()) >= 4


@pytest.mark.slow
def test_mistakes_and_a_reader_that_leaves(fine_tuned: Place):
    base = fine_tuned.runs / "mini/pretrain/final"
    error = piped(fine_tuned, "--checkpoint", base, stdin="Hello\n", status=2).stderr
    assert f"python pipeline.py {fine_tuned.config} sft" in error
    with fine_tuned.start("serve.py", fine_tuned.config, "chat") as run:
        run.stdout.close()
        run.stdin.write("Say a.\n")
        run.stdin.flush()
        assert run.wait(60) == 128 + 13
        assert "Traceback" not in run.stderr.read()


def test_an_answer_cannot_control_the_terminal():
    assert visible("a\tb\n\x1b[2J\r\x07\x9b\u202e\u2066é") == "a\tb\n\\x1b[2J\\r\\x07\\x9b\\u202e\\u2066é"
