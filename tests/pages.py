"""Markdown pages as programs: their Python blocks run in order in one namespace, and print what the page shows.

A block ```text directly after a block ```python is what it prints. A block ```diff is a change of the project; its
first line is the file. The block ```text after it is what the last Python block before it prints after the change.
"""

import itertools
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import PRESENT, ROOT, Command

SEPARATOR = "-- the end of a block --"
# The names of our modules, to import them again from a changed copy.
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
    follows: bool  # True if only an empty line is between the block before and this one


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text, found, last = page.read_text(encoding="utf-8"), [], None
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        follows = last is not None and not text[last : match.start()].strip()
        found.append(Block(match[1], match[2], text[: match.start()].count("\n") + 2, follows))
        last = match.end()
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
    programs, expected, lines = [], [], []
    for block in blocks(page):
        if block.language == "python":
            programs.append(block.text)
            expected.append("")
            lines.append(block.line)
        elif block.language == "text" and block.follows and programs and not expected[-1]:
            expected[-1] = block.text
    for line, printed, shown in zip(lines, outputs(programs, **environment), expected, strict=True):
        assert printed == shown, f"{page.name}, line {line}"
    return len(programs)


def check_changes(page: Path, copy: Path, **environment: str) -> int:
    """Makes each change of a page in a copy of the project and compares what is printed then. Returns their number."""
    programs, changes = [], 0
    parts = blocks(page)
    for change, after in itertools.pairwise(parts):
        if change.language == "python":
            programs.append(change.text)
        elif change.language == "diff":
            assert after.language == "text", f"{page.name}, line {change.line}: no output after the change"
            changes += 1
            project = copy_project(copy / str(changes))
            apply(change.text, project)
            assert outputs(programs, project, **environment)[-1] == after.text, f"{page.name}, line {change.line}"
    return changes


def copy_project(path: Path) -> Path:
    """A copy of the project's modules."""
    leave = shutil.ignore_patterns(".*", "runs", "__pycache__", "results", "tests", "docs")
    return shutil.copytree(ROOT, path, ignore=leave)


def apply(diff: str, project: Path) -> None:
    """Makes the change of a block ```diff: its first line is the file, its lines - become its lines +."""
    name, _, lines = diff.partition("\n")
    text = (project / name).read_text(encoding="utf-8")
    changes = re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)*)", lines, re.MULTILINE)
    assert changes, diff
    for removed, added in changes:
        old, new = (re.sub(r"^[-+]", "", part, flags=re.MULTILINE) for part in (removed, added))
        assert text.count(old) == 1, f"{name} does not have once:\n{old}"
        text = text.replace(old, new)
    (project / name).write_text(text, encoding="utf-8")
