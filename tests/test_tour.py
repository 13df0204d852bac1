"""The course in docs/tour/: every snippet prints what its chapter shows, every exercise does what its chapter says."""

import ast
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.pages import blocks, check, check_changes

TOUR = ROOT / "docs/tour"
CHAPTERS = sorted(path for path in TOUR.glob("*.md") if path.name != "README.md")


def test_there_are_twelve_chapters_and_an_appendix_of_at_most_100_lines():
    numbers = [path.name.partition("_")[0] for path in CHAPTERS]
    assert numbers == [f"{number:02}" for number in range(1, 14)]
    for path in CHAPTERS:
        assert path.read_text(encoding="utf-8").count("\n") <= 100, path.name


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_snippets_print_what_the_chapter_shows(path: Path):
    assert all(block.language for block in blocks(path))
    assert check(path) >= 3


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_the_exercise_does_what_the_chapter_says(path: Path, tmp_path: Path):
    assert check_changes(path, tmp_path) >= 1


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_every_named_function_exists(path: Path):
    assert check_names(path), "the chapter names no function to open"


def check_names(path: Path) -> int:
    """Looks up each name such as `model.py: Attention.forward`: a file, then a name in it. Returns their number."""
    named = re.findall(r"`([^`\s]+\.py):\s*([^`]+)`", path.read_text(encoding="utf-8"))
    for file, name in named:
        scope = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
        for part in name.split("."):
            nodes = [node for node in scope if part in defines(node)]
            assert nodes, f"{file} has no {name}"
            scope = getattr(nodes[0], "body", [])
    return len(named)


@pytest.mark.parametrize("name", ["model.py: Attention()", "model.py:None", "model.py: sees.none", "model.py:12"])
def test_a_name_that_does_not_exist_is_seen(name: str, tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(f"Open `model.py: Attention.forward`, then\n`{name}`.")
    with pytest.raises(AssertionError, match=r"model\.py has no"):
        check_names(page)


def defines(node: ast.stmt) -> list[str]:
    """The names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


PAGE = """
```python
import trainer

print(trainer.GOOD_STEPS)
```

```text
2000
```

```diff
trainer.py
-FIRST_SCALE, GOOD_STEPS = 65_536.0, 2_000
+FIRST_SCALE, GOOD_STEPS = 65_536.0, 3_000
```

```text
3000
```
"""


def test_a_page_that_shows_something_else_fails(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert check(page) == 1
    assert check_changes(page, tmp_path / "right") == 1
    page.write_text(PAGE.replace("\n2000\n", "\n2001\n").replace("\n3000\n", "\n3001\n"))
    with pytest.raises(AssertionError, match="line 3"):
        check(page)
    with pytest.raises(AssertionError, match="line 13"):
        check_changes(page, tmp_path / "wrong")
    page.write_text(PAGE[: PAGE.rindex("```text")])
    with pytest.raises(AssertionError, match="no output after the change"):
        check_changes(page, tmp_path / "none")
