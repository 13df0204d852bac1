"""Markdown pages as programs: their Python blocks run in order in one namespace, and print what the page shows.

A block ```text directly after a block ```python is what it prints. A block ```diff is a change of the project; its
first line is the file. The block ```text after it is what the last Python block before it prints after the change.
Whatever nobody would check is refused: other languages, indented fences and commands, a block ```text elsewhere.
"""

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import PRESENT, ROOT, Command

FENCED = re.compile(r"^```(python|text|diff|mermaid|sh|)\n((?:(?!```).*\n)*)```$", re.MULTILINE)
# Outside of those blocks: another fence (also in a list or a quotation), and an indented command.
REFUSED = re.compile(
    r"^[ \t>*+\d.)-]*(?:```|~~~).*|^(?: {4}|\t)[ $]*(?:\w+=\S* +)*(?:\.venv/bin/)?(?:python3?|make|pip|torchrun)\b.*",
    re.MULTILINE,
)
SEPARATOR = "-- the end of a block --"
# Forgets our modules, so that they are imported from a changed copy.
FORGET = f"""
import sys
for name, module in list(sys.modules.items()):
    if str(getattr(module, "__file__", "")).startswith({str(ROOT)!r}) and name != "__main__":
        if ".venv" not in module.__file__:
            del sys.modules[name]
sys.path.insert(0, PLACE)
"""


@dataclass
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    line: int  # of its first line in the page, from 1
    shown: str | None = None  # what it prints (```python), or what is printed after it (```diff), as the page shows

    @property
    def config(self) -> str:
        """The config that a Python block is, such as configs/mine.py, or an empty string."""
        heading = re.match(r"# (configs/\w+\.py)\n", self.text)
        return heading[1] if heading and self.language == "python" else ""


def prose(page: Path) -> str:
    """A page without its blocks."""
    return FENCED.sub("", page.read_text(encoding="utf-8"))


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order. AssertionError if the page has something that nobody would check."""
    refused = REFUSED.search(prose(page))
    assert not refused, f"{page.name} has a block that is not checked: {refused[0]}"
    text, found, before, end = page.read_text(encoding="utf-8"), [], "", 0
    for match in FENCED.finditer(text):
        language, line = match[1], text[: match.start()].count("\n") + 2
        follows = not text[end : match.start()].strip()
        if language == "text" or (not language and follows and before == "python"):
            printed = before == "diff" or (before == "python" and follows)
            assert printed, f"{page.name}, line {line}: no program and no change is before this output"
            found[-1].shown = match[2]
        found.append(Block(language, match[2], line))
        before, end = language, match.end()
    return found


def outputs(programs: list[str], place: Path = ROOT, **environment: str) -> list[str]:
    """What each of the programs prints. They run in one namespace, in a new process; the modules come from `place`."""
    code = ["import sys", "" if place == ROOT else FORGET.replace("PLACE", repr(str(place)))]
    for program in programs:
        code.append(f"exec(compile({program!r}, '<the page>', 'exec'))\nprint({SEPARATOR!r}, flush=True)")
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = Command([sys.executable, "-c", "\n".join(code)], cwd=ROOT, env=PRESENT | environment, text=True, **pipes)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, f"{out}\n{err}"
    return out.split(SEPARATOR + "\n")[:-1]


def check(page: Path, **environment: str) -> int:
    """Runs the Python blocks of a page and compares what they print. Returns their number."""
    programs = [block for block in blocks(page) if block.language == "python"]
    printed = outputs([block.text for block in programs], **environment)
    for block, text in zip(programs, printed, strict=True):
        assert text == (block.shown or ""), f"{page.name}, line {block.line}"
    return len(programs)


def check_changes(page: Path, copy: Path, **environment: str) -> int:
    """Makes each change of a page in a copy of the project and compares what is printed then. Returns their number."""
    programs, changes = [], 0
    for block in blocks(page):
        if block.language == "python":
            programs.append(block.text)
        elif block.language == "diff":
            assert block.shown, f"{page.name}, line {block.line}: no output after the change"
            changes += 1
            project = copy_project(copy / str(changes))
            apply(block.text, project)
            assert outputs(programs, project, **environment)[-1] == block.shown, f"{page.name}, line {block.line}"
    return changes


def copy_project(path: Path) -> Path:
    """A copy of the project's modules."""
    leave = shutil.ignore_patterns(".*", "runs", "__pycache__", "results", "tests", "docs")
    return shutil.copytree(ROOT, path, ignore=leave)


def apply(diff: str, project: Path) -> None:
    """Makes the change of a block ```diff: its first line is the file, its lines - become its + lines."""
    name, _, lines = diff.partition("\n")
    text = (project / name).read_text(encoding="utf-8")
    changes = re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)*)", lines, re.MULTILINE)
    assert changes, diff
    for removed, added in changes:
        old, new = (re.sub(r"^[-+]", "", part, flags=re.MULTILINE) for part in (removed, added))
        assert text.count(old) == 1, f"{name} does not have once:\n{old}"
        text = text.replace(old, new)
    (project / name).write_text(text, encoding="utf-8")
