"""Imports point one way: down the list below, to the modules that know less. Read from the source, run nothing."""

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

# A name stands for its modules too, unless they have a line of their own. Modules on one line may import each other.
ORDER = [
    "model cli",
    "stage",
    "generate lora optim parallel checkpoint machine tokenizer",
    "trainer metrics data tokenizer.train",
    "finetune",
    "sft",
    "dpo",
    "eval",
    "configs",
    "train",
    "eval.* serving convert data.inspect sft.inspect",  # the two are commands, which load a config
    "pipeline serve",
]
PLACES = {name: place for place, line in enumerate(ORDER) for name in line.split()}
FOLDERS = ("configs", "data", "dpo", "eval", "serving", "sft", "tokenizer")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
TREES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in PATHS}


def imports(name: str) -> set[str]:
    """The project's modules that a module imports: at the top, in functions and for type checkers."""
    named = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                named.add(inner if inner in TREES else node.module)
    return named & TREES.keys() - {name}


def place(name: str) -> int:
    """The line of ORDER that a module belongs to."""
    if name in PLACES:
        return PLACES[name]
    folder = name.partition(".")[0]
    return PLACES[f"{folder}.*"] if f"{folder}.*" in PLACES else PLACES[folder]


@pytest.mark.parametrize("name", sorted(TREES))
def test_imports_point_down(name):
    upwards = [other for other in imports(name) if place(other) > place(name)]
    assert not upwards, f"{name} imports {', '.join(upwards)}: a module that knows more than it does"


def test_no_import_goes_round():
    done, path = set(), []

    def visit(name: str) -> None:
        assert name not in path, f"imports go round: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in done:
            path.append(name)
            for other in sorted(imports(name)):
                visit(other)
            path.pop()
            done.add(name)

    for name in sorted(TREES):
        visit(name)


def test_what_a_config_imports_is_no_command():
    """Otherwise running it would import it twice: as __main__, and by its name."""
    waiting, reached = [name for name in TREES if name.startswith("configs.")], set()
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += imports(name)
    for name in sorted(reached):
        for node in TREES[name].body:
            assert not (isinstance(node, ast.FunctionDef) and node.name == "main"), name
            assert not (isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)), name


def test_every_file_has_a_place():
    """And the list names nothing that is gone."""
    for name in TREES:
        place(name)
    assert {name.removesuffix(".*") for name in PLACES} <= TREES.keys()
