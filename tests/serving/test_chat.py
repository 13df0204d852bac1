"""The chat as a user has it: on a terminal, and in a pipe."""

import codecs
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from serving.chat import visible
from tests.conftest import ROOT, Place

SEEDED = ["--temperature", "1", "--top-p", "1", "--seed", "5"]
CTRL_C, CTRL_D = "\x03", "\x04"
PROMPT = r"(?:\n|\r|h)(?:\x1b\[1m)?>(?:\x1b\[0m)? "
# In a session of its own, whose terminal this is: Ctrl-C reaches it as a signal. A token takes its time.
START = """
import fcntl, os, runpy, sys, termios, time
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
import model
step, pause = model.Decoder.step, float(sys.argv[1])
model.Decoder.step = lambda self: time.sleep(pause) or step(self)
del sys.argv[:2]
runpy.run_path("serve.py", run_name="__main__")
"""


class Terminal:
    """A chat on a pseudo-terminal. pause: seconds a token takes. fresh: what was shown since the last `expect`."""

    def __init__(self, place: Place, *options, pause: float = 0, **env: str):
        self.fd, child = pty.openpty()
        fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
        self.fresh = self.all = ""
        self.decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        command = [sys.executable, "-c", START, str(pause), "serve.py", place.config, "chat", *options]
        env = place.env | {"TERM": "xterm-256color"} | env
        self.process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=child, stdout=child, stderr=child)
        os.close(child)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.fd)

    def type(self, text: str | bytes) -> None:
        os.write(self.fd, text.encode() if isinstance(text, str) else text)

    def interrupt(self) -> None:
        """Ctrl-C, as a person would: not in the instant between a prompt and the waiting for a key."""
        time.sleep(0.2)
        self.type(CTRL_C)

    def expect(self, pattern: str, seconds: float = 20) -> str:
        """Waits until it has shown something that the pattern fits: what it showed up to its end."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.fresh, re.DOTALL)):
            ready, _, _ = select.select([self.fd], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"no {pattern!r} in {self.fresh!r}"
            try:
                new = self.decode(os.read(self.fd, 65536))
            except OSError:  # what a terminal says that nobody has open
                raise AssertionError(f"it ended without {pattern!r}: {self.fresh!r}") from None
            self.fresh, self.all = self.fresh + new, self.all + new
        self.fresh, shown = self.fresh[found.end() :], self.fresh[: found.end()]
        return shown

    def prompt(self) -> str:
        """Waits for the prompt: what was shown before it."""
        return plain(self.expect(PROMPT))

    def say(self, text: str) -> str:
        """Sends a line: what is shown until the next prompt."""
        self.type(text + "\n")
        self.expect(r"\r\n")  # its echo
        return self.prompt().removesuffix("> ").strip()

    def end(self) -> int:
        """Its exit status, once it has ended."""
        while self.process.poll() is None or select.select([self.fd], [], [], 0)[0]:
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    new = self.decode(os.read(self.fd, 65536))
                except OSError:
                    break
                self.fresh, self.all = self.fresh + new, self.all + new
        return self.process.wait(30)


def plain(text: str) -> str:
    """Without escape sequences and carriage returns."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", text)


def said(path: Path) -> list[tuple[str, str]]:
    """(role, content) of a saved conversation."""
    return [(message["role"], message["content"]) for message in json.loads(path.read_text())["messages"]]


def asked(path: Path) -> list[str]:
    return [content for role, content in said(path) if role == "user"]


def piped(place: Place, *options, stdin: str | bytes = "", status: int = 0) -> subprocess.CompletedProcess:
    stdin = stdin.encode() if isinstance(stdin, str) else stdin
    command = [sys.executable, "serve.py", place.config, "chat", *map(str, options)]
    done = subprocess.run(command, cwd=ROOT, env=place.env, input=stdin, capture_output=True, timeout=60)
    assert done.returncode == status, done.stderr.decode()
    return done


@pytest.mark.slow
def test_a_conversation_on_a_terminal(fine_tuned: Place, tmp_path):
    saved = tmp_path / "talk.json"
    with Terminal(fine_tuned, *SEEDED) as chat:
        assert re.search(r"mini-sft: [\d,]+ parameters, stage sft; /help", chat.prompt())
        first = chat.say("Say a in.")
        assert re.findall(r"/\w+", chat.say("/foo"))[1:-1] == re.findall(r"^/\w+|(?<=, )/\w+", chat.say("/help"), re.M)
        assert "\x1b[?2004h" in chat.all  # which has the terminal mark a paste
        chat.type("\x1b[200~one\ntwo\n  three\x1b[201~\n")  # a paste
        chat.expect(r"three.*\n")
        chat.prompt()
        chat.type("four\\\n")
        chat.expect(r"\.\.\.\S* ")
        chat.say("five")
        chat.say("//six")
        assert "saved" in chat.say(f"/save {saved}")
        assert asked(saved) == ["Say a in.", "one\ntwo\n  three", "four\nfive", "/six"]
        assert first.startswith(visible(said(saved)[1][1]).strip())
        chat.type("half a li")
        chat.expect("half a li")
        chat.interrupt()
        assert "Ctrl-D or /exit to leave" in chat.prompt()
        chat.interrupt()
        assert "leave" not in chat.prompt()
        os.kill(chat.process.pid, signal.SIGSTOP)
        os.kill(chat.process.pid, signal.SIGCONT)
        assert "temperature 0.5" in chat.say("/temperature 0.5")
        assert "expected 0 (greedy) or more" in chat.say("/temperature nan")
        assert "expected a number" in chat.say("/temperature hot")
        assert "temperature 0.5" in chat.say("/temperature")
        assert "anew" in chat.say("/system Be brief.")
        assert chat.say("/system") == "Be brief."
        assert "nothing has been said" in chat.say(f"/save {saved}")
        chat.say("/temperature 1")
        chat.say("Say a in.")
        chat.say("/reset")
        chat.say("Say a in.")
        chat.say(f"/save {saved}")
        assert [role for role, _ in said(saved)] == ["system", "user", "assistant"]
        assert said(saved)[0][1] == "Be brief."
        chat.type(CTRL_D)
        assert chat.end() == 0
    assert chat.all.endswith("\n")
    assert "Traceback" not in chat.all
    assert list(tmp_path.iterdir()) == [saved]


@pytest.mark.slow
def test_what_ctrl_c_stops_and_a_terminal_that_can_do_little(fine_tuned: Place, tmp_path):
    saved = tmp_path / "talk.json"
    with Terminal(fine_tuned, *SEEDED, pause=0.05, TERM="dumb") as chat:
        chat.prompt()
        chat.type("Say a in.\n")
        chat.expect(r"\r\n *\S+ ")  # the answer comes by and by
        for width in (20, 132, 80):
            fcntl.ioctl(chat.fd, termios.TIOCSWINSZ, struct.pack("4H", 24, width, 0, 0))
            os.kill(chat.process.pid, signal.SIGWINCH)
        chat.interrupt()
        assert "(stopped)" in chat.prompt()
        chat.say(f"/save {saved}")
        whole = piped(fine_tuned, *SEEDED, stdin="Say a in.\n").stdout.decode()
        part = said(saved)[1][1]
        assert 0 < len(part) < len(whole)
        assert whole.startswith(part)
        # A paste where the terminal does not mark it: the lines that wait are of one message.
        chat.type("one\ntwo\\\nthree\n")
        chat.expect("three\r\n")
        chat.interrupt()
        chat.prompt()
        chat.type(b"\xff\xfe\n")
        chat.expect("not UTF-8; the message was not sent")
        chat.prompt()
        chat.type("/temperature 2\n/help\n")  # commands stay by themselves
        chat.expect("this list")
        chat.prompt()
        chat.say(f"/save {saved}")
        assert asked(saved)[0] == "Say a in."
        assert set(asked(saved)[1:]) <= {"one\ntwo\\\nthree"}
        chat.process.send_signal(signal.SIGTERM)
        assert chat.end() == 143
    assert "\x1b" not in chat.all
    assert "Traceback" not in chat.all


def test_a_pipe_gets_the_answers_only(fine_tuned: Place, tmp_path):
    saved, again = tmp_path / "talk.json", tmp_path / "again.json"
    turns = "Say a in.\n\nSay in a.\n", f"/save {saved}\n", f"Say a.\n/save {again}\n"
    whole = piped(fine_tuned, *SEEDED, "--max-tokens", 9, stdin="".join(turns))
    answers = [content for role, content in said(again) if role == "assistant"]
    assert whole.stdout.decode() == "".join(f"{answer}\n" for answer in answers)
    assert len(answers) == 3
    assert json.loads(saved.read_text())["model"] == "mini-sft"
    # Another process goes on as this one did.
    after = piped(fine_tuned, *SEEDED, "--max-tokens", 9, stdin=f"/load {saved}\nSay a.\n/exit\nunheard\n")
    assert after.stdout.decode() == answers[-1] + "\n"


def test_what_cannot_be_loaded_or_written_over(fine_tuned: Place, tmp_path):
    files = {
        "list": ("[1]", "expected an object with the field messages"),
        "broken": ('{"messages": [', "not JSON"),
        "deep": ("[" * 10**6, "not JSON"),
        "types": ('{"messages": [{"role": "user", "content": 3}]}', "content of message 1 is 3"),
        "order": (
            json.dumps({"messages": [{"role": "user", "content": "a"}] * 2}),
            "roles out of order: message 2 is of role user, expected assistant",
        ),
        "half": ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "half a surrogate pair"),
        "large": (" " * (16 * 2**20 + 1), "16,777,217 bytes"),
    }
    for name, (content, _) in files.items():
        (tmp_path / name).write_text(content)
    os.mkfifo(tmp_path / "pipe")
    expected = [why for _, why in files.values()]
    expected += ["is not a file", "is not a file", "No such file", "is there already and not of this"]
    expected += ["No such file", "home directory", "/load needs the name", "saved 2 messages", "saved 2 messages"]
    commands = [f"/load {tmp_path / name}" for name in [*files, "pipe", "", "missing"]]
    commands += [f"/save {tmp_path / 'broken'}", f"/save {tmp_path / 'missing/x'}", "/save ~nobody-here/x", "/load"]
    kept = tmp_path / "kept.json"
    commands = ["Say a in.", *commands, f"/save {kept}", f"/save {kept}"]
    done = piped(fine_tuned, *SEEDED, "--max-tokens", 9, stdin="\n".join(commands))
    notices = done.stderr.decode().splitlines()
    if "(cut off" in notices[0]:
        notices.pop(0)
    for notice, why in zip(notices, expected, strict=True):
        assert why in notice
    assert asked(kept) == ["Say a in."]
    assert (tmp_path / "broken").read_text() == files["broken"][0]


def test_a_conversation_that_outgrows_the_context(fine_tuned: Place, tmp_path):
    saved = tmp_path / "talk.json"
    turns = ["Say a.", "Say b.", "Say c.", "x " * 100, "Say d."]
    done = piped(fine_tuned, *SEEDED, "--max-tokens", 12, stdin="\n".join([*turns, f"/save {saved}"]))
    notices = done.stderr.decode()
    assert notices.count("earliest turns are left out") == 1
    assert "the message is too long and was not sent: the prompt takes" in notices
    assert asked(saved) == ["Say a.", "Say b.", "Say c.", "Say d."]


@pytest.mark.slow
def test_mistakes_and_a_reader_that_goes_away(fine_tuned: Place):
    error = piped(fine_tuned, stdin=b"Say a.\n\xff\n", status=2).stderr.decode()
    assert "standard input is not UTF-8: invalid start byte in line 2" in error
    plain = fine_tuned.runs / "mini/pretrain/final"
    error = piped(fine_tuned, "--checkpoint", plain, stdin="Hello\n", status=2).stderr.decode()
    assert f"python pipeline.py {fine_tuned.config} sft" in error
    assert f"python serve.py {fine_tuned.config} generate" in error
    with fine_tuned.start("serve.py", fine_tuned.config, "chat") as run:
        run.stdout.close()
        run.stdin.write("Say a.\n")
        run.stdin.flush()
        assert run.wait(60) == 128 + 13
        assert "Traceback" not in run.stderr.read()


def test_an_answer_cannot_command_the_terminal():
    assert visible("a\tb\n\x1b[2J\r\x07\x9b\u202e\u2066é") == "a\tb\n\\x1b[2J\\r\\x07\\x9b\\u202e\\u2066é"
