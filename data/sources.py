"""Where text comes from: files, datasets on the Hugging Face Hub, the documentation that Python carries."""

import ast
import bz2
import glob
import gzip
import hashlib
import importlib.util
import itertools
import json
import logging
import lzma
import os
import sysconfig
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cli
from cli import UserError, extra, log
from data.clean import Cleaning
from data.quality import Quality
from stage import check_types, read_manifest, sha256


def raw() -> Path:
    """The directory for relative paths of raw text: `data/raw/`, or DATA in the environment."""
    return Path(os.environ.get("DATA") or "data/raw")


class Unreadable(str):
    """The reason why a record cannot be read. It replaces the record's value if `unreadable` is "skip"."""


class Record(NamedTuple):
    """A line of JSON, an element of a JSON list, a row of a table, or a whole text file."""

    id: str
    file: str  # path of its file, "" in a dataset
    where: str  # for messages: "path, line 3"; "name, record 3" in a dataset
    value: object  # a JSON value, the text of a file or of a document, or Unreadable
    read: float = 0.0  # share of the source that has been read so far, with this record; 0 if unknown


@dataclass(frozen=True, kw_only=True)
class Records:
    """A source of records. Raises TypeError or ValueError, naming the field, for an impossible setting."""

    # A subclass has `inputs()`, {input: SHA-256} for the manifest, and `records(workers)`, whose order depends only on
    # the input.

    name: str = ""  # unique among the sources of a stage
    licence: str = "not stated"  # for the data card
    max_documents: int | None = None  # reads at most this many records, kept or not
    unreadable: str = "stop"  # at a record that cannot be read: "stop" with an error, or "skip" and count it

    def __post_init__(self):
        check_types(self)
        for field, value in vars(self).items():
            if field.startswith(("max_", "min_")) and value is not None and value < 1:
                raise ValueError(f"{field} is {value}; expected at least 1")
        if self.unreadable not in ("stop", "skip"):
            raise ValueError(f'unreadable is {self.unreadable!r}; expected "stop" or "skip"')

    def refuse(self, message: str) -> Unreadable:
        """The Unreadable that replaces a record's value. UserError if `unreadable` is "stop"."""
        if self.unreadable == "stop":
            raise UserError(f'{message}; or set unreadable="skip"')
        return Unreadable(message)


@dataclass(frozen=True, kw_only=True)
class Source(Records):
    """A source of documents for a corpus: its limits, cleaning and rules."""

    max_tokens: int | None = None  # stops once about this many tokens are kept, at data.corpus.BYTES_PER_TOKEN
    min_chars: int = 64  # drops a document that is shorter after cleaning
    cleaning: Cleaning = Cleaning()
    quality: Quality | None = None  # the rules that its texts must pass; None keeps all texts

    def documents(self, workers: int, skip: int = 0) -> Iterator[Record]:
        """The records after the first `skip`, each with its text, or Unreadable, as value."""
        for record in itertools.islice(self.records(workers), skip, self.max_documents):
            text = value = record.value
            if self.field == "*" and not isinstance(value, str):
                text = "\n".join(_strings(value))
            elif isinstance(value, dict):
                text = value.get(self.field)
            if not isinstance(text, str):
                found = ", ".join(value) if isinstance(value, dict) else type(value).__name__
                expected = f"expected an object whose {self.field!r} is a string"
                text = self.refuse(f"{record.where}: {expected}, found {found}; set field=…")
            yield record._replace(value=text)


def _strings(value) -> Iterator[str]:
    """Every string inside a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def inputs(sources: Iterable[Records], directory: Path) -> dict[str, str]:
    """{input: SHA-256} of all sources of a stage; {} if its directory is finished and a source has been moved away."""
    table = {}
    try:
        for source in sources:
            table |= source.inputs()
    except UserError:
        if read_manifest(directory) is None:
            raise
        return {}
    return table


def log_kept(name: str, kept: int, read: int, unit: str, dropped: Mapping[str, int]) -> None:
    """Logs how much of a source was kept and what each rule dropped. Warns of a rule that dropped more than a third."""
    rules = ", ".join(f"{number:,} {rule}" for rule, number in sorted(dropped.items())) or "none"
    log.info(f"{name}: {kept:,} of {read:,} {unit} kept (dropped: {rules})")
    for rule, number in dropped.items():
        if 3 * number > read:
            log.warning(f"{name}: {rule} dropped {number:,} of {read:,} {unit}; is that what you want?")


def _strict(kind: type, file):
    """Opens a compressed file. Reading fails if bytes after its first stream are damaged; Python would ignore them."""
    opened = kind(file)
    opened._buffer.raw._trailing_error = ()
    return opened


OPEN = {".gz": gzip.open, ".bz2": partial(_strict, bz2.BZ2File), ".xz": partial(_strict, lzma.LZMAFile)}
BROKEN = (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error)  # pyarrow's errors are among these
NOUNS = {".jsonl": "line", ".json": "element", ".parquet": "row"}


def _format(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in OPEN else path.suffix


@dataclass(frozen=True, kw_only=True)
class FileRecords(Records):
    """Records in files: each line of .jsonl, each element of the list in .json, each row of .parquet (with pyarrow)."""

    paths: tuple[str, ...]  # paths or globs; relative ones are found under DATA in the environment, or data/raw/

    formats = tuple(NOUNS)
    expected = ".jsonl, .json or .parquet"
    columns = None  # of a .parquet file; None reads all

    def __post_init__(self):
        super().__post_init__()
        if not self.paths:
            raise ValueError("paths is empty; expected at least one path or glob")

    def files(self) -> list[Path]:
        """The files, sorted within each pattern. UserError for a pattern without a file, or for another format."""
        files: dict[Path, Path] = {}  # by the path behind links: reads each file once
        for pattern in self.paths:
            paths: list[Path] = []
            for spelled in (glob.escape(pattern), pattern.replace("[", "[[]"), pattern):  # a name may hold * and [
                names = [] if paths else sorted(glob.glob(spelled, root_dir=raw(), recursive=True))
                paths += [raw() / name for name in names if (raw() / name).is_file()]
            if not paths:
                fix = "correct the path, or set DATA to where relative paths are found"
                if (raw() / pattern).is_dir():
                    fix = f"to read a directory, name its files: {Path(pattern) / '*'}{self.formats[0]}"
                raise UserError(f"no file at {raw() / pattern}; {fix}")
            for path in paths:
                if _format(path) not in self.formats:
                    raise UserError(f"{path} has another format; expected {self.expected}")
                files.setdefault(path.resolve(), path)
        return list(files.values())

    def inputs(self) -> dict[str, str]:
        # Keys are paths under DATA: the same files in another place are the same input.
        return {str(path).removeprefix(f"{raw()}/"): sha256(path) for path in self.files()}

    def records(self, workers: int) -> Iterator[Record]:
        files, before = self.files(), 0
        total = sum(path.stat().st_size for path in files) or 1
        for path in files:
            name = path.name.encode(errors="backslashreplace").decode()  # a name may not be UTF-8
            with open(path, "rb") as file:
                try:
                    for number, value in self._read(path, file):
                        id, where = name, str(path)
                        if number:
                            id, where = f"{name}:{number}", f"{path}, {NOUNS[_format(path)]} {number}"
                        yield Record(id, str(path), where, value, (before + file.tell()) / total)
                except BROKEN as error:
                    raise UserError(f"{path} cannot be read: {error}; replace the file") from None
            before += path.stat().st_size

    def _read(self, path: Path, file) -> Iterator[tuple[int, object]]:
        """The number and the value of each record of an open file. A text file has one record, number 0."""
        content = OPEN[path.suffix](file) if path.suffix in OPEN else file
        if _format(path) == ".jsonl":
            for number, line in enumerate(content, start=1):
                if line.strip():
                    yield number, self._decode(line, f"{path}, line {number}", json.loads)
        elif _format(path) == ".json":
            value = self._decode(content.read(), str(path), json.loads)
            yield from enumerate(value if isinstance(value, list) else [value], start=1)
        elif _format(path) == ".parquet":
            table = extra("pyarrow.parquet", "pyarrow", "a .parquet file").ParquetFile(file)
            batches = (batch.to_pylist() for batch in table.iter_batches(256, columns=self.columns))
            yield from enumerate(itertools.chain.from_iterable(batches), start=1)
        else:
            yield 0, self._decode(content.read(), str(path), str)

    def _decode(self, content: bytes, where: str, parse: Callable):
        try:
            return parse(content.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            kind = "UTF-8" if isinstance(error, UnicodeDecodeError) else "JSON"
            return self.refuse(f"{where} is not {kind} ({error}); correct it or leave it out")


@dataclass(frozen=True, kw_only=True)
class Files(FileRecords, Source):
    """Documents in files: each record that FileRecords reads, and each .txt or .md file as a whole."""

    name: str = "files"
    field: str = "text"  # the field of a record that is the text; "*" joins every string inside the record

    formats = (".txt", ".md", ".raw", ".tokens", *FileRecords.formats)  # .raw and .tokens are WikiText's
    expected = f".txt, .md, {FileRecords.expected}"

    @property
    def columns(self) -> list[str] | None:
        return None if self.field == "*" else [self.field]


# (dataset, revision): the commit that this process reads. A newer commit must not come in between inputs and records.
COMMITS: dict[tuple[str, str | None], str] = {}
PASSING = ("HfHubHTTPError", "ReadTimeout", "RemoteProtocolError")  # errors of requests that the client makes only once


@dataclass(frozen=True, kw_only=True)
class HubRecords(Records):
    """The records of a dataset on the Hugging Face Hub, or of a directory laid out like one, streamed by `datasets`."""

    dataset: str  # such as "allenai/c4"; also the name, unless `name` is set
    subset: str | None = None
    split: str = "train"
    revision: str | None = None  # commit or tag; None takes the newest: if its files are others, the stage is stale
    retries: int = 5  # reads that may fail in a row, with 1, 2, 4, … seconds between them
    unreadable: str = "skip"

    def __post_init__(self):
        if not self.name:
            object.__setattr__(self, "name", self.dataset)
        super().__post_init__()

    def _builder(self):
        datasets = extra("datasets", "datasets", f"the source {self.name}")
        datasets.utils.logging.disable_progress_bar()
        datasets.utils.logging.set_verbosity(logging.CRITICAL)  # `records` logs failed reads
        key = self.dataset, self.revision
        for wait in (1, 4, 16, None):
            try:
                builder = datasets.load_dataset_builder(self.dataset, self.subset, revision=COMMITS.get(key, key[1]))
                splits = builder.config.data_files
                if self.split not in splits:
                    raise ValueError(f"no split {self.split!r}; there are {', '.join(map(str, splits))}")
                COMMITS[key] = builder.hash
                return builder
            except Exception as error:  # no such dataset, subset, split or revision; no network
                if wait is None or type(error).__name__ not in PASSING:
                    raise UserError(f"dataset {self.dataset}: {error}") from None
                log.warning(f"{self.name}: {type(error).__name__}: {error}; trying again")
                time.sleep(wait)

    def inputs(self) -> dict[str, str]:
        """The digest of its files: of their content, or of their ids on the Hub, which a new commit may keep."""
        files = list(map(str, self._builder().config.data_files[self.split]))
        ids = {file: sha256(Path(file)) for file in files if Path(file).is_file()}
        system = extra("huggingface_hub", "datasets", "the Hub").HfFileSystem()
        try:
            for folder in {file.rpartition("/")[0] for file in files if file not in ids}:
                ids |= {f"hf://{entry['name']}": entry.get("blob_id") for entry in system.ls(folder)}
        except Exception as error:  # of the network
            raise UserError(f"dataset {self.dataset}: {error}") from None
        digest = hashlib.sha256("\n".join(ids[file] for file in files).encode()).hexdigest()
        return {f"{self.dataset}/{self.subset or 'default'}/{self.split}": digest}

    def records(self, workers: int) -> Iterator[Record]:
        done, failures = 0, 0
        while True:
            try:
                for value in self._builder().as_streaming_dataset(split=self.split).skip(done):
                    done, failures = done + 1, 0
                    yield Record(f"{self.name}:{done}", "", f"{self.name}, record {done}", value)
                return
            except Exception as error:  # of the network, the file system or a library below `datasets`
                failed, failures = f"dataset {self.dataset}: {type(error).__name__}: {error}", failures + 1
            if failures > self.retries:
                raise UserError(f"{failed} (attempt {failures}); the same command continues after the last whole shard")
            log.warning(f"{failed}; trying again")
            time.sleep(2 ** (failures - 1))


@dataclass(frozen=True, kw_only=True)
class Hub(HubRecords, Source):
    """Documents in a dataset: each record that HubRecords reads."""

    field: str = "text"  # as in Files


@dataclass(frozen=True, kw_only=True)
class PythonDocs(Source):
    """The documentation that comes with Python: docstrings, read without importing a module, and topics of `pydoc`."""

    name: str = "python_docs"
    licence: str = "those of Python (PSF-2.0) and of the packages"
    cleaning: Cleaning = Cleaning(html=False, repeated_line_chars=0)  # it describes HTML, and has tables
    # Packages read after the standard library. Those that are not installed are left out.
    packages: tuple[str, ...] = ("torch", "numpy", "sympy", "networkx", "mpmath", "jinja2", "triton", "tqdm")

    field = "text"

    def inputs(self) -> dict[str, str]:
        return {}  # the input is the installed packages; the manifest has the versions of the main ones

    def records(self, workers: int) -> Iterator[Record]:
        roots, modules = {"": sysconfig.get_path("stdlib")}, []
        for package in self.packages:
            spec = importlib.util.find_spec(package.partition(".")[0]) and importlib.util.find_spec(package)
            if spec and spec.submodule_search_locations:
                roots[package] = spec.submodule_search_locations[0]
        for package, root in roots.items():
            for path in sorted(Path(root).rglob("*.py")):
                parts = path.relative_to(root).with_suffix("").parts
                if {"site-packages", "dist-packages", "test", "tests", "idle_test"}.isdisjoint(parts):
                    name = ".".join([package, *parts]).removeprefix(".").removesuffix(".__init__")
                    modules.append((name, path))
        with cli.pool(workers) as pool:
            for done, docstrings in enumerate(cli.ordered(pool, _docstrings, modules, 16 * workers), start=1):
                for name, text in docstrings:
                    yield Record(name, "", name, text, done / len(modules))


def _docstrings(module: tuple[str, Path]) -> list[tuple[str, str]]:
    """(name, docstring) of a module and of the classes and functions in it, from the top down."""
    name, path = module
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes in strings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates, and files that are broken on purpose
        return []
    if name == "pydoc_data.topics":
        return [(f"{name}.{topic}", text) for topic, text in ast.literal_eval(tree.body[-1].value).items()]
    pairs, nodes = [], [(name, tree)]
    while nodes:
        name, node = nodes.pop()
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if documented and (text := ast.get_docstring(node)):
            pairs.append((name, text.encode(errors="replace").decode()))  # may hold half a surrogate pair
        for child in reversed(list(ast.iter_child_nodes(node))):
            if not isinstance(child, ast.expr):
                nodes.append((f"{name}.{child.name}" if hasattr(child, "name") else name, child))
    return pairs
