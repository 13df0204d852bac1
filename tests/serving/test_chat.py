"""The chat as a user has it: on a terminal, and in a pipe."""

import codecs
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from serving.chat import visible
from tests.conftest import ROOT, Place

SEEDED = ["--temperature", "1", "--top-p", "1", "--seed", "5"]
CTRL_C, CTRL_D = "\x03", "\x04"
# In a session of its own with this terminal: Ctrl-C arrives as a signal. A token takes its time.
START = """
import fcntl, os, runpy, sys, termios, time
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
import generate
step, pause = generate.Decoder.step, float(sys.argv[1])
generate.Decoder.step = lambda self: time.sleep(pause) or step(self)
del sys.argv[:2]
runpy.run_path("serve.py", run_name="__main__")
"""


class Terminal:
    """A chat on a pseudo-terminal. pause: seconds a token takes. fresh: what was shown since the last `expect`."""

    def __init__(self, place: Place, *options, pause: float = 0):
        self.fd, child = pty.openpty()
        self.fresh = ""
        self.decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        command = [sys.executable, "-c", START, str(pause), "serve.py", place.config, "chat", *options]
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
        os.write(self.fd, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C, as a person does it: not between a prompt and the wait for a key."""
        time.sleep(0.2)
        self.type(CTRL_C)

    def expect(self, pattern: str, seconds: float = 20) -> str:
        """Waits until the pattern was shown. Returns what was shown up to its end."""
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.fresh, re.DOTALL)):
            ready, _, _ = select.select([self.fd], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"no {pattern!r} in {self.fresh!r}"
            self.fresh += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", self.decode(os.read(self.fd, 65536)))
        self.fresh, shown = self.fresh[match.end() :], self.fresh[: match.end()]
        return shown

    def prompt(self) -> str:
        """Waits for the prompt. Returns what was shown before it."""
        return self.expect(r"(?:\n|\A|h)> ")

    def say(self, text: str) -> str:
        """Sends a line. Returns what is shown until the next prompt."""
        self.type(text + "\n")
        self.expect("\n")  # its echo
        return self.prompt().removesuffix("> ").strip()


def saved(path: Path) -> list[tuple[str, str]]:
    """(role, content) of a saved conversation."""
    return [(message["role"], message["content"]) for message in json.loads(path.read_text())["messages"]]


def questions(path: Path) -> list[str]:
    return [content for role, content in saved(path) if role == "user"]


def piped(place: Place, *options, stdin: str | bytes = "", status: int = 0) -> subprocess.CompletedProcess:
    stdin = stdin.encode() if isinstance(stdin, str) else stdin
    command = [sys.executable, "serve.py", place.config, "chat", *map(str, options)]
    done = subprocess.run(command, cwd=ROOT, env=place.env, input=stdin, capture_output=True, timeout=60)
    assert done.returncode == status, done.stderr.decode()
    return done


@pytest.mark.slow
def test_a_conversation_on_a_terminal(fine_tuned: Place, tmp_path):
    file = tmp_path / "talk.json"
    with Terminal(fine_tuned, *SEEDED, pause=0.02) as chat:
        assert re.search(r"mini-sft: [\d,]+ parameters; /help", chat.prompt())
        first = chat.say("Say a in.")
        assert re.findall(r"/\w+", chat.say("/foo"))[1:] == re.findall(r"^/\w+|(?<=, )/\w+", chat.say("/help"), re.M)
        chat.type("\x1b[200~one\ntwo\n  three\x1b[201~\n")  # a paste
        chat.expect("three.*\n")
        chat.prompt()
        chat.type("four\\\n")
        chat.expect(r"\.\.\. ")
        chat.say("five")
        chat.say("//six")
        assert "saved" in chat.say(f"/save {file}")
        assert questions(file) == ["Say a in.", "one\ntwo\n  three", "four\nfive", "/six"]
        assert first.startswith(visible(saved(file)[1][1]).strip())
        chat.type("half a li")
        chat.expect("half a li")
        chat.interrupt()
        assert "Ctrl-D or /exit leaves" in chat.prompt()
        assert "temperature 0.5" in chat.say("/temperature 0.5")
        assert "expected 0 (greedy) or more" in chat.say("/temperature nan")
        assert "could not convert" in chat.say("/temperature hot")
        assert "temperature 0.5" in chat.say("/temperature")
        chat.say("/system Be brief.")
        assert chat.say("/system") == "Be brief."
        chat.say("/temperature 1")
        chat.type("Say a in.\n")
        chat.expect("\n *\\S+ ")  # the answer has begun
        chat.interrupt()
        assert "(stopped)" in chat.prompt()
        chat.say(f"/save {file}")
        assert [role for role, _ in saved(file)] == ["system", "user", "assistant"]
        chat.type(CTRL_D)
        assert chat.process.wait(20) == 0


def test_a_pipe_gets_the_answers_only(fine_tuned: Place, tmp_path):
    half, full = tmp_path / "half.json", tmp_path / "full.json"
    turns = f"Say a in.\n\nSay in a.\n/save {half}\nSay a.\n/save {full}\n/save {half}\n"
    done = piped(fine_tuned, *SEEDED, "--max-tokens", 9, stdin=turns)
    answers = [content for role, content in saved(full) if role == "assistant"]
    assert done.stdout.decode() == "".join(f"{answer}\n" for answer in answers)
    assert len(answers) == 3
    assert saved(half) == saved(full)
    # Another process continues a saved conversation.
    record = json.loads(full.read_text())
    assert record["model"] == "mini-sft"
    half.write_text(json.dumps(record | {"messages": record["messages"][:4]}))
    after = piped(fine_tuned, *SEEDED, "--max-tokens", 9, stdin=f"/load {half}\nSay a.\n/exit\nunheard\n")
    assert after.stdout.decode() == answers[-1] + "\n"


def test_files_that_cannot_be_loaded_or_overwritten(fine_tuned: Place, tmp_path):
    two_users = json.dumps({"messages": [{"role": "user", "content": "a"}] * 2})
    files = {"list": "[1]", "broken": '{"messages": [', "types": '{"messages": [{"role": "user", "content": 3}]}'}
    expected = ["not a conversation that /save wrote"] * 3 + ["user and assistant in turn", "Is a directory"]
    expected += ["No such file", "exists and is not from this session", "home directory", "needs the name of a file"]
    for name, content in (files | {"order": two_users}).items():
        (tmp_path / name).write_text(content)
    commands = [f"/load {tmp_path / name}" for name in (*files, "order", "", "missing")]
    commands += [f"/save {tmp_path / 'broken'}", "/save ~nobody-here/x", "/load"]
    notices = piped(fine_tuned, stdin="\n".join(commands)).stderr.decode().splitlines()
    for notice, words in zip(notices, expected, strict=True):
        assert words in notice
    assert (tmp_path / "broken").read_text() == files["broken"]


def test_a_conversation_longer_than_the_context(fine_tuned: Place, tmp_path):
    file = tmp_path / "talk.json"
    turns = ["Say a.", "Say b.", "Say c.", "x " * 100, "Say d."]
    done = piped(fine_tuned, *SEEDED, "--max-tokens", 12, stdin="\n".join([*turns, f"/save {file}"]))
    notices = done.stderr.decode()
    assert notices.count("earliest messages are left out") == 1
    assert notices.count("the context of 64 must hold the answer too") == 1
    assert questions(file) == ["Say a.", "Say b.", "Say c.", "Say d."]


@pytest.mark.slow
def test_mistakes_and_a_reader_that_leaves(fine_tuned: Place):
    assert "standard input is not UTF-8" in piped(fine_tuned, stdin=b"Say a.\n\xff\n", status=2).stderr.decode()
    base = fine_tuned.runs / "mini/pretrain/final"
    error = piped(fine_tuned, "--checkpoint", base, stdin="Hello\n", status=2).stderr.decode()
    assert f"python pipeline.py {fine_tuned.config} sft" in error
    with fine_tuned.start("serve.py", fine_tuned.config, "chat") as run:
        run.stdout.close()
        run.stdin.write("Say a.\n")
        run.stdin.flush()
        assert run.wait(60) == 128 + 13
        assert "Traceback" not in run.stderr.read()


def test_an_answer_cannot_control_the_terminal():
    assert visible("a\tb\n\x1b[2J\r\x07\x9b\u202e\u2066é") == "a\tb\n\\x1b[2J\\r\\x07\\x9b\\u202e\\u2066é"
