"""Imports point one way: down the list below, to the modules that know less. Read from the source; nothing runs."""

import ast
import graphlib

from tests.conftest import ROOT
from tests.test_configs import SHIPPED

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
    "eval.* serving convert convert_gguf data.inspect sft.inspect",  # the two are commands, which load a config
    "pipeline serve",
]
PLACES = {name: place for place, line in enumerate(ORDER) for name in line.split()}
TREES: dict[str, ast.Module] = {}  # the project's modules by name, without the user's own scripts and configs
for folder in {name.partition(".")[0] for name in PLACES}:
    for path in (ROOT / f"{folder}.py", *(ROOT / folder).rglob("*.py")):
        if path.is_file() and (path.parent.name != "configs" or path.stem in (*SHIPPED, "__init__")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            TREES[module] = ast.parse(path.read_text(encoding="utf-8"))


def imports(name: str) -> set[str]:
    """The project's modules that a module imports: at the top, in functions and for type checkers."""
    named = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                named.add(inner if inner in TREES else node.module)
    for other in named - TREES.keys():
        assert not (ROOT / other.replace(".", "/")).with_suffix(".py").exists(), f"{other} has no place in ORDER"
    return named & TREES.keys() - {name}


def place(name: str) -> int:
    """The line of ORDER that a module belongs to."""
    folder = name.partition(".")[0]
    return PLACES.get(name, PLACES.get(f"{folder}.*", PLACES.get(folder)))


def test_imports_point_down_and_not_round():
    assert not [(name, other) for name in TREES for other in imports(name) if place(other) > place(name)]
    graphlib.TopologicalSorter({name: imports(name) for name in TREES}).prepare()  # CycleError names the circle


def test_what_a_config_imports_is_no_command():
    """Otherwise running it would import it twice: as __main__, and by its name."""
    waiting, reached = [name for name in TREES if name.startswith("configs.")], set()
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += imports(name)
            assert "__main__" not in ast.unparse(TREES[name]), name
