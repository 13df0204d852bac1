"""Where text comes from.

A source has a `name`, `inputs()` with what it reads and its digests, and `documents(workers)`, which yields (id, text)
pairs in an order that depends on nothing but the input.
"""

import ast
import bz2
import glob
import gzip
import importlib.util
import json
import lzma
import os
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import stage
from stage import UserError, check_types, progress, sha256


def raw() -> Path:
    """Where raw text with a relative path is found: `data/raw/`, or DATA in the environment."""
    return Path(os.environ.get("DATA") or "data/raw")


OPEN = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


@dataclass(frozen=True, kw_only=True)
class Files:
    """The user's own text: `.txt`, a document a file, and `.jsonl`, a document a line; each plain, .gz, .bz2 or .xz."""

    paths: tuple[str, ...]
    """Paths or globs; relative ones are found under DATA in the environment, by default `data/raw/`."""
    field: str = "text"
    """Which field of a `.jsonl` line is the text."""
    name: str = "files"
    """What the corpus calls this source."""

    def __post_init__(self):
        check_types(self)
        if not self.paths:
            raise ValueError("paths is empty; expected at least one path or glob")

    def files(self) -> list[Path]:
        """The files meant, sorted within each pattern. UserError for a pattern that matches none, or another format."""
        found = []
        for pattern in self.paths:
            names = (
                [pattern] if (raw() / pattern).is_file() else sorted(glob.glob(pattern, root_dir=raw(), recursive=True))
            )
            matches = [raw() / name for name in names if (raw() / name).is_file()]
            if not matches:
                full = raw() / pattern
                raise UserError(f"no file at {full}; correct the path, or say with DATA where relative paths are found")
            found += matches
        for path in found:
            if not str(path).isprintable() or "\udc80" <= max(str(path)) <= "\udcff":
                raise UserError(f"{str(path)!a} has characters that cannot be shown; rename the file")
            if _format(path) not in (".txt", ".jsonl"):
                raise UserError(f"{path} is neither .txt nor .jsonl (plain, .gz, .bz2 or .xz)")
        return list(dict.fromkeys(found))

    def inputs(self) -> dict[str, str]:
        # By the path under DATA: the same files in another place are the same input.
        names = {p: p.relative_to(raw()) if p.is_relative_to(raw()) else p for p in self.files()}
        return {str(name): sha256(path) for path, name in names.items()}

    def documents(self, workers: int) -> Iterator[tuple[str, str]]:
        files = self.files()
        for path in progress(files, len(files), "files", "reading"):
            opener = OPEN.get(path.suffix, open)
            try:
                with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
                    if _format(path) == ".txt":
                        yield path.name, file.read()
                    else:
                        yield from self._lines(path, file)
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not UTF-8 (byte {error.object[error.start]:#04x}); convert it") from None
            except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
                raise UserError(f"{path} cannot be read: {error}") from None

    def _lines(self, path: Path, file) -> Iterator[tuple[str, str]]:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: not JSON ({error}); mend or remove the line") from None
            if not isinstance(record, dict) or not isinstance(record.get(self.field), str):
                raise UserError(f"{where}: expected an object whose {self.field!r} is a string; set Files(field=…)")
            try:
                record[self.field].encode()
            except UnicodeEncodeError:
                raise UserError(f"{where}: {self.field!r} holds half a surrogate pair; mend the line") from None
            yield f"{path.name}:{number}", record[self.field]


def _format(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in OPEN else path.suffix


@dataclass(frozen=True, kw_only=True)
class PythonDocs:
    """The documentation that every installation carries: the docstrings of the standard library and of the packages
    that come with torch and numpy, and the language topics of `pydoc`. Parsed, never imported.

    A document is one docstring, its id the full name of what it documents. Another Python or another version of a
    package gives other text; the same environment gives the same.
    """

    packages: tuple[str, ...] = ("torch", "numpy", "sympy", "networkx", "mpmath", "jinja2", "triton", "tqdm")
    """Packages read beside the standard library. Those not installed are left out."""
    name: str = "python_docs"
    """What the corpus calls this source."""

    def __post_init__(self):
        check_types(self)

    def files(self) -> list[tuple[str, Path]]:
        """(module name, path) of every module, tests left out."""
        roots = [(Path(sysconfig.get_path("stdlib")), "")]
        for package in self.packages:
            try:
                spec = importlib.util.find_spec(package)
            except ModuleNotFoundError:  # what a dotted name is part of
                spec = None
            if spec is not None and spec.submodule_search_locations:
                roots.append((Path(spec.submodule_search_locations[0]), package))
        skip = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
        modules = []
        for root, package in roots:
            for path in sorted(root.rglob("*.py")):
                parts = path.relative_to(root).with_suffix("").parts
                if skip.isdisjoint(parts):
                    modules.append((".".join(filter(None, (package, *parts))).removesuffix(".__init__"), path))
        return modules

    def inputs(self) -> dict[str, str]:
        return {}  # the environment, whose versions the manifest records

    def documents(self, workers: int) -> Iterator[tuple[str, str]]:
        modules = self.files()
        with stage.pool(workers) as pool:
            found = pool.map(_docstrings, modules, chunksize=16)
            for documents in progress(found, len(modules), "modules", "reading documentation"):
                yield from documents


def _docstrings(module: tuple[str, Path]) -> list[tuple[str, str]]:
    """(name, docstring) of a module and of the classes and functions in it, from the top down."""
    name, path = module
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes in other people's strings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates, and files meant to be broken
        return []
    if name == "pydoc_data.topics":
        return [(f"{name}.{topic}", text) for topic, text in ast.literal_eval(tree.body[-1].value).items()]
    found, documented = [], (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

    def visit(node: ast.AST, name: str) -> None:
        if isinstance(node, documented) and (text := ast.get_docstring(node)):
            found.append((name, text.encode(errors="replace").decode()))  # a literal can spell half a surrogate
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.expr):
                visit(child, f"{name}.{child.name}" if hasattr(child, "name") else name)

    visit(tree, name)
    return found
