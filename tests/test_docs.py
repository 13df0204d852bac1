"""README.md, CONTRIBUTING.md and docs/: links lead somewhere, commands parse, configs load, and the Python runs."""

import ast
import itertools
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
from tests.pages import Block, blocks, prose
from tests.serving.conftest import Server, serve

README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "docs/report/README.md"]
COURSE = sorted((ROOT / "docs/tour").glob("*.md"))
PROGRAMS = ["pip", "curl", "git", "pytest", ".ci/run"]  # not parsed by us
OURS = ["configs", "data", "eval", "tokenizer", "tests", "benchmarks", "docs", "sft", "dpo", "serving"]
OTHERS = r"data/raw/.*|convert_hf_to_gguf\.py"  # the user's files, and llama.cpp's


def title(path: Path) -> str:
    return str(path.relative_to(ROOT))


def written(path: Path, text: str) -> Path:
    """A page with the text, in the directory `path`."""
    page = path / "page.md"
    page.write_text(text)
    return page


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
    """The links of a page to files or headings that do not exist, and its links of a kind that is not checked."""
    text = re.sub(r"`[^`]*`", "", prose(path))
    wrong = re.findall(r"\]\[|^ *\[.*\]:|<a\b|<img\b", text, re.MULTILINE | re.IGNORECASE)
    for target in re.findall(r"\]\(([^)]*)\)", text):
        if not target or re.search(r"\s", target):
            wrong.append(target)
        elif not re.match(r"https?:", target):
            file, _, anchor = target.partition("#")
            other = path.parent / file if file else path
            if not other.exists() or (anchor and anchor not in anchors(other)):
                wrong.append(target)
    return wrong


@pytest.mark.parametrize("path", [*PAGES, *COURSE], ids=title)
def test_links_lead_to_files_and_headings(path: Path):
    assert broken(path) == []


def test_a_broken_link_is_seen(tmp_path: Path):
    text = "# A, b-c: `d[0][1]`\n[x](page.md#a-b-c-d01) [y](https://a.b) [z](#none) [w](none.md)\n```\n[v](c)\n```\n"
    assert broken(written(tmp_path, text)) == ["#none", "none.md"]
    text = '[x][y] <a href="none.md">x</a> [x](https://a.b "y") [x](page\nmd) [x]()\n\n[y]: none.md\n'
    assert broken(written(tmp_path, text)) == ["][", "<a", "[y]:", 'https://a.b "y"', "page\nmd", ""]


def missing(path: Path) -> list[str]:
    """The files that a page names, and that are neither there nor made by a page."""
    snippets = "".join(block.text for block in blocks(path) if block.language == "python")
    folders = [ROOT, ROOT / "configs", path.parent]  # a table of configs names a second one without its folder
    wrong = []
    for name in re.findall(rf"`((?:{'|'.join(OURS)})/[\w./-]*|[\w./-]+\.py)`", prose(path)):
        there = name in made() or f'"{name}"' in snippets or any((folder / name).exists() for folder in folders)
        if not there and not re.fullmatch(OTHERS, name):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("path", [*PAGES, *COURSE], ids=title)
def test_named_files_exist(path: Path):
    assert missing(path) == []


def test_a_missing_file_is_seen(tmp_path: Path):
    text = '`model.py` `demo.py` `a.py` `none.py` `no/ne.py` `docs/no-ne.md`\n```python\nopen("a.py", "w")\n```\n'
    assert missing(written(tmp_path, text)) == ["none.py", "no/ne.py", "docs/no-ne.md"]


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
    lines = re.findall(r"`((?:\w+=\S* )*(?:\.venv/bin/)?(?:python|make|torchrun) [^`]+)`", prose(path))
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
        assert all((ROOT / word).exists() for word in words if re.match(r"tests/|.*\.py$", word)), line
    elif program not in ("python", "torchrun"):
        raise AssertionError(line)
    elif words[:2] == ["-i", "-c"]:  # the snippets of a chapter
        assert all((ROOT / name).exists() for name in re.findall(r"docs/tour/\w+\.md", words[2])), line
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
        config = getattr(arguments, "config", None)
        assert config in (None, "CONFIG", "configs/NAME.py") or (ROOT / config).exists() or config in made(), line


def made() -> set[str]:
    """The configs that a block or a command of a page makes."""
    found = {block.config for page in PAGES for block in blocks(page)}
    for line in itertools.chain(*map(commands, PAGES)):
        if "convert.py from-hf" in line:
            words = [word for word in shlex.split(line, comments=True) if not word.startswith("--")]
            found.add(f"{words[4]}/config.py")
    return found


@pytest.mark.parametrize("path", [*PAGES, *COURSE], ids=title)
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
        "git checkout none.py",
        'python -i -c "$(cat docs/tour/none.md)"',
        "ls",
    ],
)
def test_a_mistaken_command_is_seen(line: str, parse):
    with pytest.raises(AssertionError):
        check_command(line, parse)


@pytest.mark.parametrize(
    "text",
    [
        "1. Run\n\n   ```python\n   x\n   ```\n",
        "```rust\nx\n```\n",
        "```python x=1\nx\n```\n",
        "- ~~~\n  x\n  ~~~\n",
        "```python\nx\n\n```python\ny\n```\n",
        "```sh\nls\n```\n```text\nx\n```\n",
        "```python\nx\n```\nIt prints:\n```text\nx\n```\n",
        "```diff\nx\n```\nIt prints:\n```text\nx\n```\n```text\ny\n```\n",
        "Run\n\n    RUNS=x .venv/bin/python train.py\n",
    ],
)
def test_a_block_that_nobody_checks_is_seen(text: str, tmp_path: Path):
    with pytest.raises(AssertionError, match=r"page\.md"):
        blocks(written(tmp_path, text))


# -------------------------------------------------------------------------------------------------------------- Python


@pytest.mark.parametrize("path", PAGES, ids=title)
def test_configs_load(path: Path, tmp_path: Path):
    for block in blocks(path):
        if block.config:
            file = tmp_path / Path(block.config).name
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
    """A block's code. A session with >>> must show no output."""
    lines = block.text.splitlines()
    if lines[0].startswith(">>> "):
        assert all(re.match(r"(>>>|\.\.\.)( |$)", line) for line in lines), f"line {block.line}: an output"
        lines = [line[4:] for line in lines]
    return ast.parse("\n".join(lines))


def check_python(path: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs a page's Python, but for its configs, and compares what it prints where the page shows it."""
    for block in blocks(path):
        capsys.readouterr()
        if block.language == "python" and not block.config:
            block.text = block.text.replace("http://127.0.0.1:8000", url)
            exec(compile(program(block), f"{path.name}, line {block.line}", "exec"), {})
        assert block.shown in (None, capsys.readouterr().out), f"{path.name}, line {block.line}"


@pytest.mark.parametrize("path", PAGES, ids=title)
def test_python_runs(path: Path, trained: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(trained)
    check_python(path, server.url, capsys)


def test_an_output_that_differs_is_seen(tmp_path: Path, capsys):
    text = "```python\n>>> x = 1\n>>> x\n```\n\n```python\nprint(2)\n```\n\n```text\n2\n```\n"
    check_python(written(tmp_path, text), "", capsys)
    faults = [("text\n2", "text\n3"), ("text\n2", "\n3"), (">>> x\n", "1\n"), ("python\nprint", "diff\nprint")]
    for old, new in [*faults, ("print", "# configs/x.py\nprint")]:
        with pytest.raises(AssertionError, match="line "):
            check_python(written(tmp_path, text.replace(old, new)), "", capsys)


def test_requests_with_curl_are_answered(server: Server):
    lines = [line for path in PAGES for line in commands(path) if line.startswith("curl")]
    assert lines
    for line in lines:
        _, url, _, header, _, body = shlex.split(line)
        name, value = header.split(": ")
        url = url.replace("http://127.0.0.1:8000", server.url)
        response = httpx.post(url, headers={name: value}, content=body, timeout=30)
        assert response.status_code == 200, response.text
