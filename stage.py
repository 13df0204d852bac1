"""A stage of the pipeline: one directory, made once, described by the `manifest.json` that is written last."""

import ast
import collections
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
import time
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

from cli import UserError, log, logging_to

ROOT = Path(__file__).resolve().parent
# For the commands in messages: the config file of each loaded experiment, and the last stage that is wanted ("": all).
CONFIGS: dict[str, str] = {}
GOAL = ""


def check_types(config) -> None:
    """Raises TypeError if a dataclass field does not have its annotated type."""
    for name, expected in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not matches(value, expected):
            wanted = expected if typing.get_args(expected) else getattr(expected, "__name__", expected)
            raise TypeError(f"{name} is {value!r} ({type(value).__name__}); expected {wanted}")


def matches(value, expected) -> bool:
    """True if a value has an annotated type. An int passes for a float."""
    if isinstance(expected, types.UnionType):
        return any(matches(value, choice) for choice in typing.get_args(expected))
    if typing.get_origin(expected) is tuple:  # tuple[X, ...], the only tuples that configs have
        return isinstance(value, tuple) and all(matches(item, typing.get_args(expected)[0]) for item in value)
    if expected in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if expected is float else typing.get_origin(expected) or expected)


def describe(value):
    """A config as JSON values. A dataclass keeps its class name, because several classes may fit one field."""
    return json.loads(json.dumps(value, default=lambda config: {"type": type(config).__name__} | vars(config)))


def different(values: Sequence, path: str = "", free: Collection[str] = ()) -> Iterator[tuple[str, Sequence]]:
    """Yields each place where two or more JSON values differ, and the values there. Keys in `free` are skipped."""
    kinds = set(map(type, values))
    if kinds == {dict}:
        for key in dict.fromkeys(key for value in values for key in value if key not in free):
            inner = [value.get(key) for value in values]
            yield from different(inner, f"{path}.{key}" if path else key, free)
    elif kinds == {list} and len(set(map(len, values))) == 1:
        for i, inner in enumerate(zip(*values, strict=True)):
            yield from different(inner, f"{path}[{i}]", free)
    elif any(value != values[0] for value in values):
        yield path, values


def differences(was, now, free: Collection[str] = ()) -> Iterator[str]:
    """Yields a phrase for each place where two JSON values differ."""
    for path, (before, after) in different([was, now], free=free):
        yield f"{path} was {short(before)}, is now {short(after)}"


def short(value) -> str:
    """A JSON value for a message: digests cut to 12 digits, the whole to 80 characters."""
    text = re.sub(r"([0-9a-f]{12})[0-9a-f]{52}", r"\1…", json.dumps(value, ensure_ascii=False))
    return "not set" if value is None else text if len(text) <= 80 else text[:79] + "…"


def _first(phrases: list[str]) -> str:
    """The first three phrases, and how many more there are."""
    rest = len(phrases) - 3
    return "; ".join(phrases[:3]) + (f" and {rest} more" if rest > 0 else "")


def runs() -> Path:
    """The directory of all experiments: `runs/`, or RUNS in the environment."""
    return Path(os.environ.get("RUNS") or "runs")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flushes a file's bytes, or a directory's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
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
    except ValueError as error:
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


@functools.cache
def imported_code(main: str) -> dict[str, str]:
    """{file: SHA-256} of a module of this project and of the project's modules that it imports, directly or not."""
    # From the source text, so that other modules in the process make no difference. Each file is read once per
    # process. Call this before long work: if a file is edited meanwhile, its digest is still that of the running code.
    # Left out are configs, which are compared by value, and cli.py and stage.py, which change no results.
    path = Path(main).resolve()
    name = path.relative_to(ROOT).as_posix()
    if name in ("cli.py", "stage.py", "configs/__init__.py"):
        return {}
    source, names = path.read_bytes(), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    table = {name: hashlib.sha256(source).hexdigest()}
    for place in (ROOT / name.replace(".", "/") for name in names):
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            table |= imported_code(str(file)) if file.is_file() else {}
    return dict(sorted(table.items()))


def changed_code(directory: Path, code: dict[str, str]) -> str:
    """The source files that changed since they made a finished directory; "" if none. code: {file: SHA-256} now."""
    was = (read_manifest(directory) or {}).get("code", {})
    return _first([name for name in was if was[name] != code.get(name)]).replace(";", ",")


def warn_of_changed_code(directories: Iterable[Path], code: dict[str, str]) -> None:
    """Warns of the first finished directory that was made by other code. All directories are kept."""
    for directory in directories:
        if changed := changed_code(directory, code):
            kept = f"{directory} is kept, but {changed} changed since it was made"
            log.warning(f"{kept}; only to reproduce its numbers, make it again with: {remaker(directory)}")
            return


def write_manifest(directory: Path, manifest: dict) -> None:
    """Writes manifest.json, which makes the directory finished. Its key `sha256` is the digest of its other keys."""
    write_json(directory / "manifest.json", manifest | {"sha256": _digest(manifest)})


def _digest(manifest: dict) -> str:
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()  # indentation does not count


def read_manifest(directory: Path) -> dict | None:
    """A directory's manifest, or None if it has none: the directory is unfinished. UserError if it is damaged."""
    manifest = read_json(directory / "manifest.json")
    if manifest is not None and (type(manifest) is not dict or manifest.get("sha256") != _digest(manifest)):
        raise UserError(f"{directory}/manifest.json is damaged; delete it, and the directory counts as unfinished")
    return manifest


def damage(directory: Path, wrote: dict[str, dict], contents: bool = True) -> str | None:
    """What is wrong with a directory's files according to its manifest, or None. contents: compare SHA-256 too."""
    for name, expected in wrote.items():
        path = directory / name
        if not path.is_file():
            return f"{path} is missing"
        if (size := path.stat().st_size) != expected["bytes"]:
            return f"{path} has {size:,} bytes; its manifest says {expected['bytes']:,}"
        if contents and (digest := sha256(path)) != expected["sha256"]:
            return f"{path} has SHA-256 {digest[:12]}…; its manifest says {expected['sha256'][:12]}…"
    return None


def outputs(directory: Path) -> dict[str, str]:
    """{path: SHA-256} of a finished directory's files, as `read` in the next stage's manifest; {} if unfinished."""
    wrote = (read_manifest(directory) or {"wrote": {}})["wrote"]
    return {f"{directory.parent.name}/{directory.name}/{name}": file["sha256"] for name, file in wrote.items()}


def maker(directory: Path) -> str:
    """The command that makes runs/NAME/STAGE."""
    name, stage = directory.parent.name, directory.name.replace("packed", "pack")
    return f"python pipeline.py {CONFIGS.get(name, f'configs/{name}.py')} {stage}"


def remaker(directory: Path) -> str:
    """The command that makes runs/NAME/STAGE again, and the later stages up to GOAL."""
    command, _, stage = maker(directory).rpartition(" ")
    return " ".join(filter(None, [command, GOAL, "--force-from", stage]))


def finished(directory: Path, command: str | None = None) -> dict:
    """The manifest of a directory that must exist, its files checked. UserError, naming the command, if it does not."""
    command = command or maker(directory)
    if (manifest := read_manifest(directory)) is None:
        raise UserError(f"{directory} is missing or unfinished; make it with: {command}")
    if wrong := damage(directory, manifest["wrote"]):
        raise UserError(f"{wrong}; make it again with: {command} --force")
    return manifest


def read_seconds(run: Path) -> dict[str, float]:
    """Seconds that each directory of a run took. In `seconds.json`, so that manifests are the same in every run."""
    return read_json(run / "seconds.json") or {}


def record_seconds(directory: Path, seconds: float) -> None:
    """Records how long a directory took to make."""
    write_json(directory.parent / "seconds.json", read_seconds(directory.parent) | {directory.name: round(seconds, 1)})


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Locks a directory against a second process. The lock ends with the process, even if the process is killed."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{directory} is being written by another process; wait for it, or stop it") from None
        yield


@dataclasses.dataclass
class Stage:
    """One stage's directory, and what identifies its content."""

    directory: Path
    config: object  # its dataclass, or several by name
    read: dict[str, str]  # {path: SHA-256} of its direct inputs; empty if they are gone: the outputs stay valid
    command: str  # what the user types to make it
    code: str  # the file of the module that makes it; after __post_init__ {file: SHA-256} of it and its imports
    free: Collection[str] = ()  # config fields that may change: the directory still matches
    earlier: float = 0.0  # seconds that interrupted runs have spent on it

    def __post_init__(self):
        self.config, self.code = describe(self.config), imported_code(self.code)

    def up_to_date(self, force: bool = False) -> bool:
        """As `is_finished`, and logs a line if it is."""
        if finished := self.is_finished(force):
            log.info(f"{self.directory} is up to date")
        return finished

    def is_finished(self, force: bool = False) -> bool:
        """True if the directory is finished and not forced. UserError if its config or inputs have changed."""
        if force or (manifest := read_manifest(self.directory)) is None:
            return False
        self.must_match(self.directory)
        if wrong := damage(self.directory, manifest["wrote"], contents=False):
            raise UserError(f"{wrong}; make it again with: {self.command} --force")
        return True

    def state(self) -> str:
        """The state of a finished directory: "done", or "stale" and why."""
        wrote = read_manifest(self.directory)["wrote"]
        if wrong := self.different(self.directory) or damage(self.directory, wrote, contents=False):
            return f"stale: {wrong}"
        changed = changed_code(self.directory, self.code)
        return f"done, but {changed} changed since" if changed else "done"

    def different(self, directory: Path) -> str:
        """The parts of config and inputs that changed since a directory was finished; "" if none."""
        manifest = read_manifest(directory)
        inputs = differences(manifest["read"], self.read) if self.read else ()
        return _first([*differences(manifest["config"], self.config, self.free), *inputs])

    def must_match(self, directory: Path) -> None:
        """UserError, naming what differs, if a finished directory was made from another config or other inputs."""
        if different := self.different(directory):
            # A command with switches, such as --checkpoint, is about one stage.
            again = f"{self.command} --force" if " --" in self.command else remaker(self.directory)
            other = f"{directory} was made from something else: {different}. Give the experiment another name"
            raise UserError(f"{other}, or make this stage and the later ones again with: {again}")

    @contextlib.contextmanager
    def making(self, keep: bool = False) -> Iterator[None]:
        """Locks the directory and logs to its log.txt while the block runs. Empties it first, unless `keep`."""
        with locked(self.directory), logging_to(self.directory):
            if not keep:
                self.clear()
            self.started = time.perf_counter()
            yield

    def clear(self) -> None:
        """Empties the directory, except for its lock and its log."""
        (self.directory / "manifest.json").unlink(missing_ok=True)  # first: from here on it is unfinished
        for path in self.directory.iterdir():
            if path.name not in (".lock", "log.txt"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def about(self, wrote: dict, counts: dict) -> dict:
        """The content of the stage's manifest, or of the manifest of a checkpoint during training."""
        about = {"config": self.config, "read": self.read, "wrote": wrote, "counts": counts}
        return about | {"versions": versions(), "code": self.code}

    def finish(self, counts: dict, files: Iterable[Path] | None = None) -> None:
        """Writes the manifest: the stage is finished. files: what it wrote; None: all files of the directory."""
        if files is None:
            files = [path for path in self.directory.glob("[!.]*") if path.is_file() and path.name != "log.txt"]
        write_manifest(self.directory, self.about(digests(self.directory, files), counts))
        record_seconds(self.directory, self.seconds())

    def seconds(self) -> float:
        """Seconds spent on making it so far."""
        return self.earlier + time.perf_counter() - self.started


Step = collections.namedtuple("Step", ["job", "make"])  # a Stage, and the function that makes it unless it is done
