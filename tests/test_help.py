"""--help of every command says what it does, gives examples that work, and names the next step."""

import argparse
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

import cli
from tests.conftest import ROOT

MODULES = ("data.inspect", "sft.inspect", "eval.compare", "eval.harness", "eval.download")
COMMANDS = [[name] for name in ("pipeline.py", "train.py", "serve.py", "convert.py")]
COMMANDS += [["-m", name] for name in MODULES]
COMMANDS += [["serve.py", "configs/tiny.py", name] for name in ("generate", "chat", "api")]
COMMANDS += [["convert.py", name] for name in ("to-hf", "from-hf", "to-gguf")]


class Left(Exception):
    """The command ends. Arguments: the exit status and the message."""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch) -> None:
    """In an empty directory. A command that would run stores its arguments in its parser's place instead."""

    def leave(*arguments):
        raise Left(*arguments)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "handle", lambda handler: {})
    monkeypatch.setattr(cli, "_leave", leave)
    monkeypatch.setattr(cli, "run", lambda main, arguments: leave("parsed", arguments))


def start(words: list[str], monkeypatch) -> None:
    """Runs a command in this process, as `python WORDS` does."""
    module = words[0] == "-m"
    monkeypatch.setattr(sys, "argv", words[module:])
    if module:
        monkeypatch.delitem(sys.modules, words[1], raising=False)  # an earlier test has imported it
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help(words, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        start([*words, "--help"], monkeypatch)
    text = capsys.readouterr().out
    assert not ended.value.code
    usage = " ".join(words).replace("configs/tiny.py", "CONFIG")
    assert re.match(rf"usage: (python )?{re.escape(usage)} ", text)
    assert re.search("(?m)^Next: .", text)
    assert all(len(line) <= 120 for line in text.splitlines())
    lines = re.findall(r"(?m)^ *(?:python|torchrun) (.*)", text)
    examples = [re.split(r" {3,}| +#| +->", line)[0] for line in lines]
    examples += re.findall(r"(?m)^Next:.*?python ([^,\n]*)", text)
    assert any(words == example.split()[: len(words)] for example in examples)
    for example in examples:
        command = [word for word in shlex.split(example) if not word.startswith("--nproc")]
        for config in re.findall(r"configs/\w+\.py", example):
            assert (ROOT / config).is_file()
        if "--help" not in command:
            with pytest.raises(Left, match="parsed"):
                start(command, monkeypatch)


def test_help_of_train_is_about_pretraining_alone(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        start(["train.py", "--help"], monkeypatch)
    text = capsys.readouterr().out
    assert "predict the next token" in text
    assert not re.search("STAGE \\.|--checkpoint|every stage", text)
    with pytest.raises(Left) as parsed:
        start(["train.py", "configs/tiny.py", "--force"], monkeypatch)
    assert isinstance(parsed.value.args[1], argparse.Namespace)
    assert parsed.value.args[1].stages == ["pretrain"]
    with pytest.raises(Left, match=r"unrecognized arguments: sft; see train\.py --help"):
        start(["train.py", "configs/tiny.py", "sft"], monkeypatch)
