"""A stage of the pipeline: one directory, made once, described by the `manifest.json` that is written last.

job = Stage(directory, config, read={"tiny/tokenizer/spm.model": "9f86…"}, command="python pipeline.py … pack")
if job.up_to_date(force):        # finished, from the same config and inputs; UserError if from others
    return
with job.making():               # locked, logged to log.txt; unfinished until the manifest is there
    ...                          # write files
    job.finish(counts={...})     # digests, fsync, manifest.json
"""

import ast
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import sys
import textwrap
import time
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator
from importlib import metadata
from pathlib import Path

from cli import UserError, log, logging_to

ROOT = Path(__file__).resolve().parent

# ------------------------------------------------------------------------------------------------------------- configs


def check_types(config) -> None:
    """Raises TypeError if a dataclass field does not have its annotated type. An int passes for a float."""
    for name, expected in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not _matches(value, expected):
            wanted = getattr(expected, "__name__", expected) if not typing.get_args(expected) else expected
            raise TypeError(f"{name} is {value!r} ({type(value).__name__}); expected {wanted}")


def _matches(value, expected) -> bool:
    arguments = typing.get_args(expected)
    if isinstance(expected, types.UnionType):
        return any(_matches(value, choice) for choice in arguments)
    if typing.get_origin(expected) is tuple:
        if not isinstance(value, tuple):
            return False
        wanted = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        return len(value) == len(wanted) and all(map(_matches, value, wanted))
    if expected in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if expected is float else typing.get_origin(expected) or expected)


def describe(value):
    """A config as JSON holds it. A dataclass keeps its class name, because several classes may fit one field."""
    if dataclasses.is_dataclass(value):
        table = {"type": type(value).__name__}
        for field in dataclasses.fields(value):
            table[field.name] = describe(getattr(value, field.name))
        return table
    if isinstance(value, (tuple, list)):
        return [describe(item) for item in value]
    if isinstance(value, dict):
        return {key: describe(item) for key, item in value.items()}
    return value


def differences(was, now, path: str = "", free: Collection[str] = ()) -> Iterator[str]:
    """Yields a phrase for each place where two JSON values differ. Keys in `free` are skipped."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in was | now:
            if key not in free:
                yield from differences(was.get(key), now.get(key), f"{path}.{key}" if path else str(key), free)
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        for i, (a, b) in enumerate(zip(was, now, strict=True)):
            yield from differences(a, b, f"{path}[{i}]", free)
    elif was != now:
        yield f"{path} was {_short(was)}, is now {_short(now)}"


def _short(value) -> str:
    text = re.sub(r"([0-9a-f]{12})[0-9a-f]{52}", r"\1…", json.dumps(value, ensure_ascii=False))
    return textwrap.shorten(text, 80)


# --------------------------------------------------------------------------------------------------------------- files


def runs() -> Path:
    """Where experiments live: `runs/`, or RUNS in the environment."""
    return Path(os.environ.get("RUNS") or "runs")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flushes a file's bytes, or a directory's names, to the disk before anything relies on them."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write(path: Path, content: bytes) -> None:
    """Writes a file so that a reader sees all of it or none of it, even after a power cut."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_bytes(content)
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def write_json(path: Path, value) -> None:
    """Writes a JSON file as `write` does."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write(path, text.encode(errors="backslashreplace"))  # a path may not be UTF-8; JSON escapes it


def read_json(path: Path):
    """The value in a JSON file, or None if there is no file. UserError if it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (IsADirectoryError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it, or restore a copy") from None


def digests(directory: Path, files: Iterable[Path]) -> dict[str, dict]:
    """{name: {"bytes", "sha256"}} for a manifest. Each file is flushed to disk first."""
    table = {}
    for path in sorted(files):
        sync(path)
        table[path.relative_to(directory).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    return table


def versions() -> dict[str, str]:
    """Versions of Python and the core packages: recorded, never compared."""
    table = {"python": sys.version.split()[0]}
    for package in ("torch", "numpy", "sentencepiece", "triton", "tqdm"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            table[package] = metadata.version(package)
    return table


# ---------------------------------------------------------------------------------------------------------------- code

NOT_FOLLOWED = ("cli.py", "stage.py", "configs/__init__.py")  # they do not make results; configs are compared by value


def imported_code(main: str | Path) -> dict[str, str]:
    """{file: SHA-256} of a module of this project and of the project's modules that it imports, directly or not.

    From the source text, so that the answer does not depend on what else the process has imported. Each file is read
    once per process: call this before long work, and a file that is edited meanwhile still has the digest of the code
    that runs.
    """
    table: dict[str, str] = {}
    waiting = [Path(main).resolve()]
    while waiting:
        path = waiting.pop()
        name = path.relative_to(ROOT).as_posix()
        if name in table or name in NOT_FOLLOWED:
            continue
        table[name], imported = _read_source(path)
        waiting += imported
    return dict(sorted(table.items()))


@functools.cache
def _read_source(path: Path) -> tuple[str, list[Path]]:
    """The SHA-256 of a source file, and the project's files that it imports."""
    source = path.read_bytes()
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    places = [ROOT / name.replace(".", "/") for name in names]
    files = [place.with_suffix(".py") for place in places] + [place / "__init__.py" for place in places]
    return hashlib.sha256(source).hexdigest(), [file for file in files if file.is_file()]


# ----------------------------------------------------------------------------------------------------------- manifests


def write_manifest(directory: Path, manifest: dict) -> None:
    """Writes manifest.json: the directory is finished. Its `sha256` is the digest of everything else in it."""
    write_json(directory / "manifest.json", manifest | {"sha256": _digest(manifest)})


def _digest(manifest: dict) -> str:
    """SHA-256 of a manifest as JSON on one line, without its own `sha256`: indentation does not count."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def read_manifest(directory: Path) -> dict | None:
    """A directory's manifest, or None if it has none: the directory is unfinished. UserError if it is damaged."""
    path = directory / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        tables = [manifest[key] for key in ("config", "read", "wrote", "counts")]
        whole = manifest["sha256"] == _digest(manifest)
        if whole and all(isinstance(table, dict) for table in [*tables, *manifest["wrote"].values()]):
            return manifest
        raise ValueError
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (IsADirectoryError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged; delete it, and {directory} counts as unfinished") from None


def damage(directory: Path, wrote: dict[str, dict], contents: bool = True) -> str | None:
    """What is wrong with a directory's files according to its manifest, or None. contents: compare SHA-256 too."""
    for name, expected in wrote.items():
        path = directory / name
        if not path.is_file():
            return f"{path} is missing"
        if (size := path.stat().st_size) != expected["bytes"]:
            return f"{path} has {size:,} bytes; its manifest says {expected['bytes']:,}"
    if contents:
        for name, expected in wrote.items():
            if (digest := sha256(directory / name)) != expected["sha256"]:
                return f"{directory / name} has SHA-256 {digest[:12]}…; its manifest says {expected['sha256'][:12]}…"
    return None


def outputs(directory: Path) -> dict[str, str]:
    """{path: SHA-256} of a finished directory's files, as a stage that reads them records it; {} if unfinished."""
    manifest = read_manifest(directory) or {"wrote": {}}
    place = f"{directory.parent.name}/{directory.name}"
    return {f"{place}/{name}": file["sha256"] for name, file in manifest["wrote"].items()}


def maker(directory: Path) -> str:
    """What the user types to make a stage's directory."""
    return f"python pipeline.py CONFIG {'pack' if directory.name == 'packed' else directory.name}"


def finished(directory: Path, command: str | None = None) -> dict:
    """The manifest of a directory that must exist, its files checked. UserError, naming the command, if it does not."""
    command = command or maker(directory)
    if (manifest := read_manifest(directory)) is None:
        raise UserError(f"{directory} is missing or unfinished; make it with: {command}")
    if wrong := damage(directory, manifest["wrote"]):
        raise UserError(f"{wrong}; make it again with: {command} --force")
    return manifest


# --------------------------------------------------------------------------------------------------------------- stage


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Locks a directory against a second process. The lock ends with the process, however that ends."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{directory} cannot be made: {error.strerror}; RUNS says where runs go") from None
    with open(directory / ".lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{directory} is being written by another process; wait for it, or stop it") from None
        yield


class Stage:
    """One stage's directory.

    config: its dataclass, or several by name. read: {path: SHA-256} of its direct inputs; empty if they are gone, and
    what was made from them stays valid. command: what the user types to make it. code: the module that makes it.
    free: names of config fields that may change without making another result.
    """

    def __init__(
        self,
        directory: Path,
        config,
        read: dict[str, str],
        command: str,
        code: str | Path,
        free: Collection[str] = (),
    ):
        self.directory, self.config, self.read, self.command = directory, describe(config), read, command
        self.code, self.free = imported_code(code), free
        self.earlier = 0.0  # seconds that interrupted runs have spent on it

    def up_to_date(self, force: bool = False) -> bool:
        """As `is_finished`, and logs a line if it is."""
        if finished := self.is_finished(force):
            self.log_up_to_date()
        return finished

    def is_finished(self, force: bool = False) -> bool:
        """Whether the directory is finished, from this config and these inputs: no, if it is to be made by force.

        UserError if the config or the inputs are others.
        """
        if force or (manifest := read_manifest(self.directory)) is None:
            return False
        self.must_match(self.directory)
        if wrong := damage(self.directory, manifest["wrote"], contents=False):
            raise UserError(f"{wrong}; make it again with: {self.command} --force")
        return True

    def log_up_to_date(self) -> None:
        """Logs that the directory is up to date, or which code has changed since it was made."""
        if changed := self.changed_code(self.directory):
            log.warning(
                f"{self.directory} is kept as it is, but {changed} changed since it was made; "
                f"make it again with: {self.command} --force"
            )
        else:
            log.info(f"{self.directory} is up to date")

    def state(self) -> str:
        """ "done", "missing", "unfinished", or "stale" and why."""
        try:
            if read_manifest(self.directory) is None:
                made = self.directory.is_dir() and any(path.name != ".lock" for path in self.directory.iterdir())
                return "unfinished" if made else "missing"
            if different := self.different(self.directory):
                return f"stale: {'; '.join(different)}"
            self.is_finished()
        except UserError as error:
            return f"stale: {error}"
        changed = self.changed_code(self.directory)
        return f"done, but {changed} changed since" if changed else "done"

    def changed_code(self, directory: Path) -> str:
        """The files, by name, that made a finished directory and are different now; "" if none are."""
        was = read_manifest(directory).get("code", self.code)
        names = [name for name in was | self.code if was.get(name) != self.code.get(name)]
        return ", ".join(names)

    def different(self, directory: Path) -> list[str]:
        """A phrase for each part of the config and each input that changed since a directory was finished."""
        manifest = read_manifest(directory)
        found = list(differences(manifest["config"], self.config, "", self.free))
        if self.read:
            found += differences(manifest["read"], self.read)
        return found

    def must_match(self, directory: Path) -> None:
        """UserError, naming what differs, if a finished directory was made from another config or other inputs."""
        if different := self.different(directory):
            raise UserError(
                f"{directory} was made from something else: {'; '.join(different[:4])}. "
                f"Give the experiment another name, or make it again with: {self.command} --force"
            )

    @contextlib.contextmanager
    def making(self, keep: bool = False) -> Iterator[None]:
        """Locks the directory and logs to its log.txt while the block runs. Empties it first, unless `keep`."""
        with locked(self.directory):
            if not keep:
                self.clear()
            with logging_to(self.directory):
                self.started = time.perf_counter()
                yield

    def clear(self) -> None:
        """Empties the directory, except for its lock and its log."""
        (self.directory / "manifest.json").unlink(missing_ok=True)  # first: from here on it is unfinished
        for path in self.directory.iterdir():
            if path.name not in (".lock", "log.txt"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def about(self, wrote: dict, counts: dict) -> dict:
        """A manifest of this stage. A checkpoint that it saves on the way has one too."""
        return {
            "config": self.config,
            "read": self.read,
            "wrote": wrote,
            "counts": counts,
            "versions": versions(),
            "code": self.code,
        }

    def finish(self, counts: dict, files: Iterable[Path] | None = None) -> None:
        """Writes the manifest: the stage is finished. files: what it wrote; None: all files of the directory."""
        if files is None:
            others = (".lock", "log.txt", "manifest.json")
            files = [path for path in self.directory.iterdir() if path.is_file() and path.name not in others]
        write_manifest(self.directory, self.about(digests(self.directory, files), counts))
        record_seconds(self.directory, self.seconds())

    def seconds(self) -> float:
        """Seconds spent on making it so far."""
        return self.earlier + time.perf_counter() - self.started


class Step(typing.NamedTuple):
    """A stage of an experiment, ready to be made: what identifies it, and the function that makes it."""

    job: Stage
    make: Callable[[], object]


def record_seconds(directory: Path, seconds: float) -> None:
    """Notes in `seconds.json`, beside the directory, how long it took: the outputs themselves carry no clock."""
    table = read_seconds(directory.parent)
    table[directory.name] = round(seconds, 1)
    write_json(directory.parent / "seconds.json", table)


def read_seconds(run: Path) -> dict[str, float]:
    """How long each directory of a run took to make, as far as that was noted."""
    try:
        table = dict(json.loads((run / "seconds.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
    return {name: taken for name, taken in table.items() if isinstance(taken, (int, float)) and 0 <= taken < 1e12}
