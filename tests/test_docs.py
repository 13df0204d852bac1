"""README.md, CONTRIBUTING.md and docs/: links lead somewhere, commands parse, configs load, and the Python runs."""

import ast
import re
import runpy
import shlex
import sys
from pathlib import Path

import httpx
import pytest

import cli
import configs
import pipeline
import serving.served
from tests.conftest import ROOT, Place
from tests.pages import Block, blocks
from tests.serving.conftest import Server, serve

README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COURSE = sorted((ROOT / "docs/tour").glob("*.md"))
PROGRAMS = ["pip", "curl", "pytest", ".ci/run"]  # not parsed by us
OURS = ["configs", "data", "eval", "tokenizer", "tests", "benchmarks", "docs", "sft", "dpo", "serving"]
OTHERS = r"data/raw/.*|convert_hf_to_gguf\.py"  # the user's files, and llama.cpp's


def title(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(path: Path) -> str:
    """A page without its blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def python(path: Path) -> list[tuple[str, Block]]:
    """The Python blocks of a page, each with the config that it is, such as configs/mine.py, or an empty string."""
    found = []
    for block in blocks(path):
        if block.language == "python":
            heading = re.match(r"# (configs/\w+\.py)\n", block.text)
            found.append((heading[1] if heading else "", block))
    return found


# ------------------------------------------------------------------------------------------------ limits, links, names


def test_the_readme_fits_on_two_screens():
    text = README.read_text(encoding="utf-8")
    assert text.count("\n") <= 250
    assert len(text.encode()) <= 14_000


def anchors(path: Path) -> list[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def broken(path: Path) -> list[str]:
    """The links of a page to files or headings that do not exist."""
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if not re.match(r"https?:", target):
            file, _, anchor = target.partition("#")
            other = path.parent / file if file else path
            if not other.exists() or (anchor and anchor not in anchors(other)):
                wrong.append(target)
    return wrong


@pytest.mark.parametrize("path", [*PAGES, *COURSE], ids=title)
def test_links_lead_to_files_and_headings(path: Path):
    assert broken(path) == []


def test_a_broken_link_is_seen(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("# A, b-c: `d`\n[x](page.md#a-b-c-d) [y](https://a.b) [z](#none) [w](none.md)\n```\n[v](c)\n```\n")
    assert broken(page) == ["#none", "none.md"]


@pytest.mark.parametrize("path", PAGES, ids=title)
def test_named_files_exist(path: Path):
    made = [name for page in PAGES for name, _ in python(page)]
    for name in re.findall(rf"`((?:{'|'.join(OURS)})/[\w./]*|\w+\.py)`", prose(path)):
        folders = [ROOT, ROOT / "configs"]  # a table of configs names a second one without its folder
        there = name in made or any((folder / name).exists() for folder in folders)
        assert there or re.fullmatch(OTHERS, name), name


def test_lines_of_code_in_the_readme():
    """In its table of projects, in hundreds: within a twentieth."""
    files = [path for kind in ("py", "html", "js", "sh") for path in ROOT.rglob(f"*.{kind}")]
    apart = ("tests", "benchmarks", "runs", "docs", "models", "hf", "imported")
    parts = [path for path in files if not path.relative_to(ROOT).parts[0].startswith((*apart, "."))]
    lines = sum(path.read_text(encoding="utf-8").count("\n") for path in parts)
    printed = re.search(r"^\| lines \| ([\d,]+) ", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert abs(int(printed[1].replace(",", "")) / lines - 1) < 0.05, lines


# ------------------------------------------------------------------------------------------------------------ commands


def commands(path: Path) -> list[str]:
    """The command lines of a page: those of its blocks, and those in its text."""
    lines = re.findall(r"`((?:python|make|torchrun) [^`]+)`", prose(path))
    for block in blocks(path):
        if block.language == "sh":
            lines += block.text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


class Parsed(BaseException):
    """Raised in place of running a command."""


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch):
    """A function that parses the words of a Python command, as the command does, and returns its arguments."""

    def run(main, arguments):
        raise Parsed(arguments)

    def leave(status, message):
        raise AssertionError(message)

    def parse(words: list[str]):
        module = words[0] == "-m"
        start = runpy.run_module if module else runpy.run_path
        monkeypatch.setattr(sys, "argv", words[module:])
        monkeypatch.delitem(sys.modules, words[module], raising=False)  # imported by another test
        with pytest.raises(Parsed) as parsed:
            start(words[1] if module else str(ROOT / words[0]), run_name="__main__")
        return parsed.value.args[0]

    monkeypatch.setattr(cli, "run", run)
    monkeypatch.setattr(cli, "_leave", leave)
    return parse


def check_command(line: str, parse) -> None:
    """Fails if a command line does not do what it says: a file, target, stage, config or switch that is not there."""
    words = shlex.split(line, comments=True)
    while "=" in words[0]:  # a variable of the environment
        words = words[1:]
    program = words.pop(0).removeprefix(".venv/bin/")
    if program == "make":
        targets = [word for word in words if "=" not in word]
        assert re.search(rf"^{targets[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
    elif program in PROGRAMS:
        assert all((ROOT / word).exists() for word in words if word.startswith("tests/")), line
    elif program not in ("python", "torchrun"):
        raise AssertionError(line)
    elif words[:2] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words[2:]), line
    elif words[0] == "-m" and words[1].startswith(("benchmarks.", "tests.")):
        file = ROOT / f"{words[1].replace('.', '/')}.py"
        known = file.read_text() + (ROOT / "benchmarks/common.py").read_text()
        assert all(f'"{word}"' in known for word in words if word.startswith("--")), line
    else:
        while program == "torchrun" and words[0].startswith("--"):
            words = words[1:]
        arguments = parse([word for word in words if word != "…"])
        assert set(getattr(arguments, "stages", [])) <= set(pipeline.NAMES), line
        if config := getattr(arguments, "config", None):
            check_config(config)


def check_config(name: str) -> None:
    """Fails if a config neither is there, nor made by a block or a command of a page."""
    made = {found for page in PAGES for found, _ in python(page)}
    for page in PAGES:
        for line in commands(page):
            if "convert.py from-hf" in line:
                words = [word for word in shlex.split(line, comments=True) if not word.startswith("--")]
                made.add(f"{words[4]}/config.py")
    assert name in ("CONFIG", "configs/NAME.py") or name in made or (ROOT / name).exists(), name


@pytest.mark.parametrize("path", PAGES, ids=title)
def test_commands_parse(path: Path, parse):
    for line in commands(path):
        check_command(line, parse)


@pytest.mark.parametrize(
    "line",
    [
        "make cake",
        "python train.py configs/none.py",
        "python pipeline.py configs/tiny.py corpse",
        "python pipeline.py configs/tiny.py --status --learning-rate 3",
        "python serve.py configs/tiny.py speak",
        "python -m data.inspect configs/tiny.py --stop 3",
        "python -m benchmarks.cpu --quicker",
        "pytest tests/none.py",
        "ls",
    ],
)
def test_a_mistaken_command_is_seen(line: str, parse):
    with pytest.raises(AssertionError):
        check_command(line, parse)


# -------------------------------------------------------------------------------------------------------------- Python


@pytest.mark.parametrize("path", PAGES, ids=title)
def test_configs_load(path: Path, tmp_path: Path):
    for name, block in python(path):
        if name:
            file = tmp_path / Path(name).name
            file.write_text(block.text)
            assert configs.load(file).name == file.stem


@pytest.fixture(scope="module")
def trained(preferring: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which runs/demo and runs/tiny are a small experiment's run."""
    path = tmp_path_factory.mktemp("trained")
    (path / "runs").mkdir()
    for name in ("demo", "tiny"):
        (path / "runs" / name).symlink_to(preferring.runs / "mini")
    (path / "demo.py").write_text(preferring.config.read_text().replace('name="mini"', 'name="demo"'))
    return path


@pytest.fixture(scope="module")
def server(trained: Path):
    """The API with that experiment, under the name demo."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNS", str(trained / "runs"))
        served = serving.served.load(configs.load(trained / "demo.py"), None, "float32")
    with serve(served, rows=2) as server:
        yield server


def program(block: Block) -> ast.Module:
    """A block's code; of a session with >>>, the lines that are typed."""
    lines = block.text.splitlines()
    if lines[0].startswith(">>> "):
        lines = [line[4:] for line in lines if line.startswith((">>> ", "... "))]
    return ast.parse("\n".join(lines))


@pytest.mark.parametrize("path", [path for path in PAGES if any(not name for name, _ in python(path))], ids=title)
def test_python_runs(path: Path, trained: Path, server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(trained)
    for name, block in python(path):
        if not name:
            block.text = block.text.replace("http://127.0.0.1:8000", server.url)
            exec(compile(program(block), f"{path.name}, line {block.line}", "exec"), {})


def test_requests_with_curl_are_answered(server: Server):
    lines = [line for path in PAGES for line in commands(path) if line.startswith("curl")]
    assert lines
    for line in lines:
        _, url, _, header, _, body = shlex.split(line)
        name, value = header.split(": ")
        url = url.replace("http://127.0.0.1:8000", server.url)
        response = httpx.post(url, headers={name: value}, content=body, timeout=30)
        assert response.status_code == 200, response.text
