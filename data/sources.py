"""Where text comes from: files, a dataset on the Hugging Face Hub, the documentation that Python carries.

A source yields its documents in an order that depends on nothing but the input, and says what it reads with digests.
Files and datasets hold records, which are read here for sources of other things than documents too.
"""

import ast
import bz2
import glob
import gzip
import hashlib
import importlib
import importlib.util
import io
import itertools
import json
import logging
import lzma
import os
import sysconfig
import time
import types
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cli
from cli import UserError, log
from data.clean import Cleaning
from data.quality import Quality
from stage import check_types, read_manifest, sha256


def raw() -> Path:
    """Where raw text with a relative path is found: `data/raw/`, or DATA in the environment."""
    return Path(os.environ.get("DATA") or "data/raw")


class Unreadable(str):
    """Why a record has no text, in the place of the text, where `unreadable` is "skip"."""


class Record(NamedTuple):
    """What a line of JSON, an element of a list or a row of a table holds."""

    id: str
    file: str
    """The path of the file it is in, "" in a dataset."""
    where: str
    """For messages: "path, line 3"; "record 3" in a dataset."""
    value: object
    """As JSON has it, or Unreadable."""
    read: float = 0.0
    """Share of all the records that has been read with it, as far as that is known."""


class Document(NamedTuple):
    """One text of a source."""

    id: str
    text: str | Unreadable
    read: float = 0.0
    """Share of the source that has been read with it, as far as that is known."""


@dataclass(frozen=True, kw_only=True)
class Records:
    """What can be told of whatever is read. Raises TypeError or ValueError, naming the field, for what cannot be."""

    name: str = ""
    """What it is called in what is made of it; unique among the sources of one stage."""
    licence: str = "not stated"
    """For the data card."""
    max_documents: int | None = None
    """Reading stops after this many documents, kept or not."""
    unreadable: str = "stop"
    """At a record that is not what it should be: "stop" with an error, or "skip" it and count it."""

    def __post_init__(self):
        check_types(self)
        self._at_least_1("max_documents")
        if self.unreadable not in ("stop", "skip"):
            raise ValueError(f'unreadable is {self.unreadable!r}; expected "stop" or "skip"')

    def _at_least_1(self, *fields: str) -> None:
        for each in fields:
            if (value := getattr(self, each)) is not None and value < 1:
                raise ValueError(f"{each} is {value}; expected at least 1")

    def inputs(self) -> dict[str, str]:
        """{what it reads: SHA-256}, for the manifest."""
        raise NotImplementedError

    def records(self, workers: int, skip: int = 0) -> Iterator[Record]:
        """Its records, without the first `skip`."""
        raise NotImplementedError

    def refuse(self, message: str) -> Unreadable:
        """What stands for a record that is not what it should be; UserError where `unreadable` is "stop"."""
        if self.unreadable == "stop":
            raise UserError(f'{message}; or set unreadable="skip"')
        return Unreadable(message)


@dataclass(frozen=True, kw_only=True)
class Source(Records):
    """What every source of a corpus can be told."""

    max_tokens: int | None = None
    """Reading stops once about this many tokens are kept, at data.corpus.BYTES_PER_TOKEN."""
    min_chars: int = 64
    """A document that is shorter once clean is dropped."""
    max_chars: int | None = None
    """A document that is longer once clean is dropped."""
    cleaning: Cleaning = Cleaning()
    quality: Quality | None = None
    """The rules its texts must pass; None takes them as they are."""

    def __post_init__(self):
        super().__post_init__()
        self._at_least_1("max_tokens", "min_chars", "max_chars")

    def documents(self, workers: int, skip: int = 0) -> Iterator[Document]:
        """Its documents, without the first `skip`."""
        raise NotImplementedError


def inputs(sources: Iterable[Records], directory: Path) -> dict[str, str]:
    """{input: SHA-256} of all sources of a stage. {} if its directory is finished and the sources have been moved away:
    what was made from them stays valid."""
    try:
        return {path: digest for source in sources for path, digest in source.inputs().items()}
    except UserError:
        if read_manifest(directory) is None:
            raise
        return {}


def log_kept(name: str, kept: int, read: int, unit: str, dropped: Mapping[str, int]) -> None:
    """Logs how much of a source was kept and what each rule dropped. Warns of a rule that dropped more than a third."""
    rules = ", ".join(f"{number:,} {rule}" for rule, number in sorted(dropped.items())) or "none"
    log.info(f"{name}: {kept:,} of {read:,} {unit} kept (dropped: {rules})")
    for rule, number in dropped.items():
        if 3 * number > read:
            log.warning(f"{name}: {rule} dropped {number:,} of {read:,} {unit}; is its setting too strict?")


def extra(module: str, package: str, why: str) -> types.ModuleType:
    """A package that only this needs. UserError, with the command that installs it, where it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        raise UserError(f"{why} needs {package}; install it with: pip install {package}") from None


# ------------------------------------------------------------------------------------------------------------- files


class Streams(io.RawIOBase):
    """What one or more .xz or .bz2 streams hold. `lzma.open` and `bz2.open` end quietly where a later one is broken."""

    SIZE = 1 << 16

    def __init__(self, file, decompressor):
        self.file, self.decompressor, self.stream, self.rest = file, decompressor, decompressor(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = b""
        while not data:
            if self.stream.eof:
                self.rest = (self.rest or self.file.read(self.SIZE)).lstrip(b"\0")  # streams may be padded
                if self.rest:
                    self.stream = self.decompressor()
                elif not self.file.peek(1):
                    return 0
            else:
                if self.stream.needs_input and not self.rest:
                    self.rest = self.file.read(self.SIZE)
                    if not self.rest:
                        raise EOFError("it breaks off")
                data = self.stream.decompress(self.rest, len(buffer))
                self.rest = self.stream.unused_data
        buffer[: len(data)] = data
        return len(data)


OPEN = {
    ".gz": gzip.open,
    ".bz2": lambda file: io.BufferedReader(Streams(file, bz2.BZ2Decompressor)),
    ".xz": lambda file: io.BufferedReader(Streams(file, lzma.LZMADecompressor)),
}
PLAIN = (".txt", ".md", ".raw", ".tokens")  # the last two are WikiText's


@dataclass(frozen=True, kw_only=True)
class FileRecords(Records):
    """The user's own records. `.jsonl`: one a line; `.json`: one an element of its list; `.parquet` (with pyarrow): one
    a row. All but Parquet also as .gz, .bz2 or .xz. Encoded in UTF-8."""

    paths: tuple[str, ...]
    """Paths or globs; relative ones are found under DATA in the environment, by default `data/raw/`."""

    formats = (".jsonl", ".json", ".parquet")

    def __post_init__(self):
        super().__post_init__()
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
            if _format(path) not in self.formats:
                known = ", ".join(self.formats)
                raise UserError(f"{path} is none of {known} (all but .parquet also as .gz, .bz2 or .xz)")
        once: dict[Path, Path] = {}  # a file that several links or patterns lead to is read once
        for path in found:
            once.setdefault(path.resolve(), path)
        return list(once.values())

    def inputs(self) -> dict[str, str]:
        # By the path under DATA: the same files in another place are the same input.
        names = {p: p.relative_to(raw()) if p.is_relative_to(raw()) else p for p in self.files()}
        return {str(name): sha256(path) for path, name in names.items()}

    def records(self, workers: int, skip: int = 0) -> Iterator[Record]:
        files = self.files()
        total, before, number = sum(path.stat().st_size for path in files) or 1, 0, 0
        for path in files:
            with open(path, "rb") as file:
                for id, where, value in self._read(path, file):
                    number += 1
                    if number > skip:
                        yield Record(id, str(path), where, value, (before + file.tell()) / total)
                before += path.stat().st_size

    def _read(self, path: Path, file) -> Iterator[tuple[str, str, object]]:
        """(id, where, value) of each record of an open file."""
        try:
            if _format(path) == ".parquet":
                yield from self._rows(path, file)
                return
            with OPEN[path.suffix](file) if path.suffix in OPEN else file as plain:
                yield from self._lines(path, plain) if _format(path) == ".jsonl" else self._whole(path, plain)
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise UserError(f"{path} cannot be read: {error}; replace the file") from None

    def _whole(self, path: Path, file) -> Iterator[tuple[str, str, object]]:
        records = self._parse(file.read().removeprefix(BOM), str(path))
        for number, record in enumerate(records if isinstance(records, list) else [records], start=1):
            yield f"{path.name}:{number}", f"{path}, element {number}", record

    def _lines(self, path: Path, file) -> Iterator[tuple[str, str, object]]:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(BOM)
            if line.strip():
                where = f"{path}, line {number}"
                yield f"{path.name}:{number}", where, self._parse(line, where)

    def _columns(self) -> list[str] | None:
        """Those of a table that are read; None: all."""
        return None

    def _rows(self, path: Path, file) -> Iterator[tuple[str, str, object]]:
        parquet = extra("pyarrow.parquet", "pyarrow", "a .parquet file")
        arrow = extra("pyarrow", "pyarrow", "a .parquet file")
        try:
            batches = parquet.ParquetFile(file).iter_batches(256, columns=self._columns())
            records = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            for number, record in enumerate(records, start=1):
                yield f"{path.name}:{number}", f"{path}, row {number}", record
        except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read: {error}; replace the file") from None

    def _decode(self, data: bytes, where: str) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            found = f"byte {data[error.start]:#04x} at {error.start:,}"
            return self.refuse(f"{where} is not UTF-8 ({found}); convert it, or leave it out if it is not text")

    def _parse(self, line: bytes, where: str):
        if isinstance(text := self._decode(line, where), Unreadable):
            return text
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            return self.refuse(f"{where}: not JSON ({error}); mend or remove it")


@dataclass(frozen=True, kw_only=True)
class Files(FileRecords, Source):
    """The user's own text: a document a record, as FileRecords has them; of `.txt` and `.md`, a document a file."""

    name: str = "files"
    field: str = "text"
    """Which field of a record is the text; "*" joins every string in the record, however deep."""

    formats = (*PLAIN, *FileRecords.formats)

    def documents(self, workers: int, skip: int = 0) -> Iterator[Document]:
        for record in self.records(workers, skip):
            yield Document(record.id, self._text(record.value, record.where), record.read)

    def _whole(self, path: Path, file) -> Iterator[tuple[str, str, object]]:
        if _format(path) not in PLAIN:
            yield from super()._whole(path, file)
        else:
            text = self._decode(file.read().removeprefix(BOM), str(path))
            yield path.name, str(path), text if isinstance(text, Unreadable) else {self.field: text}

    def _columns(self) -> list[str] | None:
        return None if self.field == "*" else [self.field]

    def _text(self, record, where: str) -> str:
        """The text of a record."""
        if isinstance(record, Unreadable):
            return record
        text = "\n".join(_strings(record)) if self.field == "*" else None
        if isinstance(record, dict) and self.field != "*":
            text = record.get(self.field)
        if not isinstance(text, str):
            return self.refuse(f"{where}: expected an object whose {self.field!r} is a string; set Files(field=…)")
        try:
            text.encode()
        except UnicodeEncodeError:
            return self.refuse(f"{where}: {self.field!r} holds half a surrogate pair; mend it")
        return text


BOM = b"\xef\xbb\xbf"


def _format(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in OPEN else path.suffix


def _strings(value) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)


# --------------------------------------------------------------------------------------------------------------- Hub


@dataclass(frozen=True, kw_only=True)
class HubRecords(Records):
    """A dataset on the Hugging Face Hub, or a directory laid out like one, streamed by the package `datasets`.

    Reading goes on after a failed read, from the record after the last good one.
    """

    dataset: str
    """Such as "allenai/c4"; also what it is called, unless `name` is given."""
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    """Commit or tag; None takes the newest, and what that was is in the manifest."""
    retries: int = 5
    """How many reads may fail one after another, with 1, 2, 4, … seconds between them."""
    unreadable: str = "skip"

    def __post_init__(self):
        if not self.name:
            object.__setattr__(self, "name", self.dataset)
        super().__post_init__()

    def _builder(self):
        datasets = extra("datasets", "datasets", f"the source {self.name}")
        datasets.utils.logging.disable_progress_bar()
        datasets.utils.logging.set_verbosity(logging.CRITICAL)  # what it says of a failed read, we say
        try:
            builder = datasets.load_dataset_builder(self.dataset, self.subset, revision=self.revision)
            if self.split not in (builder.config.data_files or {self.split: ()}):
                raise ValueError(f"its splits are {', '.join(map(str, builder.config.data_files))}")
            return builder
        except (FileNotFoundError, ValueError) as error:  # no such dataset, subset, split or revision
            raise UserError(f"{self._what()}: {error}") from None

    def _what(self) -> str:
        return f"dataset {self.dataset}, subset {self.subset}, split {self.split}, revision {self.revision}"

    def _retrying(self, read):
        """What `read()` yields; after a failure it is called again, until `retries` in a row have failed."""
        failures = 0
        while True:
            try:
                for item in read():
                    failures = 0
                    yield item
                return
            except UserError:
                raise
            except Exception as error:
                failures += 1
                if failures > self.retries:
                    raise UserError(
                        f"{self._what()} cannot be read, tried {failures} times ({type(error).__name__}: {error}); the "
                        "same command goes on from the last finished shard"
                    ) from None
                log.warning(f"{self.name}: {type(error).__name__}: {error}; trying again")
                time.sleep(2 ** (failures - 1))

    def inputs(self) -> dict[str, str]:
        """The addresses of its files, which hold the commit; for a directory, the files' contents."""
        builder = next(self._retrying(lambda: iter([self._builder()])))
        files = [str(file) for file in (builder.config.data_files or {}).get(self.split, ())]
        local = {file: sha256(Path(file)) for file in files if Path(file).is_file()}
        digest = hashlib.sha256("\n".join(local.values() or files).encode()).hexdigest()
        return {f"{self.dataset}/{self.subset or 'default'}/{self.split}": digest}

    def records(self, workers: int, skip: int = 0) -> Iterator[Record]:
        done = skip

        def read() -> Iterator[Record]:
            nonlocal done
            for value in self._builder().as_streaming_dataset(split=self.split).skip(done):
                done += 1
                yield Record(f"{self.name}:{done}", "", f"record {done}", value)

        yield from self._retrying(read)

    def refuse(self, message: str) -> Unreadable:
        return super().refuse(f"{self._what()}, {message}" if self.unreadable == "stop" else message)


@dataclass(frozen=True, kw_only=True)
class Hub(HubRecords, Source):
    """A dataset as HubRecords streams it: a document a record."""

    field: str = "text"
    """Which field of a record is the text; "*" joins every string in the record, however deep."""

    def documents(self, workers: int, skip: int = 0) -> Iterator[Document]:
        for record in self.records(workers, skip):
            yield Document(record.id, self._text(record.value, record.where))

    def _text(self, record: dict, where: str) -> str:
        text = "\n".join(_strings(record)) if self.field == "*" else record.get(self.field)
        if isinstance(text, str):
            return text
        why = f"{where}: expected a string {self.field!r} among {', '.join(record)}"
        if self.unreadable == "stop":
            raise UserError(f'{self._what()}, {why}; set Hub(field=…), or unreadable="skip"')
        return Unreadable(why)


# ------------------------------------------------------------------------------------------------------- Python's own


@dataclass(frozen=True, kw_only=True)
class PythonDocs(Source):
    """The documentation that every installation carries: the docstrings of the standard library and of the packages
    that come with torch and numpy, and the language topics of `pydoc`. Parsed, never imported.

    A document is one docstring, its id the full name of what it documents. Another Python or another version of a
    package gives other text; the same environment gives the same.
    """

    name: str = "python_docs"
    licence: str = "those of Python (PSF-2.0) and of the packages"
    cleaning: Cleaning = Cleaning(html=False, repeated_line_chars=0)  # it is about HTML, and has tables
    packages: tuple[str, ...] = ("torch", "numpy", "sympy", "networkx", "mpmath", "jinja2", "triton", "tqdm")
    """Packages read beside the standard library. Those not installed are left out."""

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

    def documents(self, workers: int, skip: int = 0) -> Iterator[Document]:
        modules, number = self.files(), 0
        with cli.pool(workers) as pool:
            for done, found in enumerate(cli.ordered(pool, _docstrings, modules, 16 * workers), start=1):
                for id, text in found:
                    number += 1
                    if number > skip:
                        yield Document(id, text, done / len(modules))


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
