"""A stage of the pipeline: one directory, made once, described by the `manifest.json` that is written last.

    job = Stage(directory, config, read={"tiny/tokenizer/spm.model": "9f86…"}, remake="python -m data.pack …")
    if job.up_to_date(force):        # a finished directory of the same config and inputs; of others: UserError
        return directory
    with job.making():               # locked, logged to log.txt; without a manifest it counts as unfinished
        ...                          # write files
        job.finish(counts={...})     # digests, fsync, manifest.json

Also here: what every command shares, from its arguments to its exit status.
"""

import argparse
import collections
import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import gc
import hashlib
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import sys
import textwrap
import time
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import metadata
from pathlib import Path

from tqdm import tqdm

log = logging.getLogger("lumi")
LEVELS = ("debug", "info", "warning", "error")


class UserError(Exception):
    """A mistake of the user's. Its one line says what was found, what was expected and what mends it."""


# ----------------------------------------------------------------------------------------------------------- configs


def check_types(config) -> None:
    """Raises TypeError if a field of a dataclass is not of its annotated type; an int passes for a float."""
    for name, expected in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not _is(value, expected):
            wanted = getattr(expected, "__name__", expected) if not typing.get_args(expected) else expected
            raise TypeError(f"{name} is {value!r} ({type(value).__name__}); expected {wanted}")


def _is(value, expected) -> bool:
    args = typing.get_args(expected)
    if isinstance(expected, types.UnionType):
        return any(_is(value, each) for each in args)
    if typing.get_origin(expected) is tuple:
        each = args[:1] * len(value) if isinstance(value, tuple) and args[1:] == (...,) else args
        return isinstance(value, tuple) and len(value) == len(each) and all(map(_is, value, each))
    if expected in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if expected is float else typing.get_origin(expected) or expected)


def describe(value):
    """A config as JSON holds it; of the classes that may stand in one place (sources, say), the name is kept."""
    if dataclasses.is_dataclass(value):
        return {"type": type(value).__name__} | {
            f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value)
        }
    if isinstance(value, (tuple, list)):
        return [describe(each) for each in value]
    if isinstance(value, dict):
        return {key: describe(each) for key, each in value.items()}
    return value


def differences(was, now, path: str = "", free: Collection[str] = ()) -> Iterator[str]:
    """Yields a phrase for each place where two JSON values differ, keys in `free` left out."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in was | now:
            if key in free:
                continue
            yield from differences(was.get(key), now.get(key), f"{path}.{key}" if path else str(key), free)
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        for i, (a, b) in enumerate(zip(was, now, strict=True)):
            yield from differences(a, b, f"{path}[{i}]", free)
    elif was != now:
        texts = (json.dumps(value, ensure_ascii=False) for value in (was, now))
        before, after = (textwrap.shorten(re.sub(r"([0-9a-f]{12})[0-9a-f]{52}", r"\1…", text), 80) for text in texts)
        yield f"{path} was {before}, is now {after}"


# ------------------------------------------------------------------------------------------------------------- files


def runs() -> Path:
    """Where experiments live: `runs/`, or RUNS in the environment."""
    return Path(os.environ.get("RUNS") or "runs")


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Asks the disk to keep a file's bytes, or a directory's names, before anything that relies on them."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value) -> None:
    """Writes a JSON file as `write` does."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write(path, text.encode(errors="backslashreplace"))  # of a path that is not UTF-8, as JSON escapes it


def write(path: Path, content: bytes) -> None:
    """Writes a file so that a reader sees the whole of it or none of it, even after a power cut."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_bytes(content)
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def write_manifest(directory: Path, manifest: dict) -> None:
    """Writes a directory's manifest.json, which also holds the digest of what it says: the directory is finished."""
    write_json(directory / "manifest.json", manifest | {"sha256": _digest(manifest)})


def _digest(manifest: dict) -> str:
    """SHA-256 of a manifest as JSON on one line, its own `sha256` left out: however it is indented, what it says."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def read_manifest(directory: Path) -> dict | None:
    """A directory's manifest, or None where there is none: the directory is unfinished. UserError if it is damaged."""
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


def digests(directory: Path, files: Iterable[Path]) -> dict[str, dict]:
    """{name: {"bytes", "sha256"}} for a manifest, each file flushed to disk first."""
    table = {}
    for path in sorted(files):
        sync(path)
        table[path.relative_to(directory).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    return table


def damage(directory: Path, wrote: dict[str, dict], contents: bool = True) -> str | None:
    """What is wrong with a directory's files, by their manifest, or None: sizes first, then, if asked, SHA-256."""
    for name, expected in wrote.items():
        path = directory / name
        if not path.is_file():
            return f"{path} is missing"
        if (found := path.stat().st_size) != expected["bytes"]:
            return f"{path} has {found:,} bytes; its manifest says {expected['bytes']:,}"
    for name, expected in wrote.items() if contents else ():
        if (digest := sha256(directory / name)) != expected["sha256"]:
            return f"{directory / name} has SHA-256 {digest[:12]}…; its manifest says {expected['sha256'][:12]}…"
    return None


def versions() -> dict[str, str]:
    """Of Python and the five packages; recorded, never compared."""
    found = {"python": sys.version.split()[0]}
    for package in ("torch", "numpy", "sentencepiece", "triton", "tqdm"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds a directory against a second process. The lock goes with the process, however that ends."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{directory} is being written by another process; wait for it, or stop it") from None
        yield


class Stage:
    """One stage's directory.

    config: its dataclass, or several by name. read: {path: SHA-256} of its direct inputs; while they are gone, pass
    none: what was made from them stands. remake: the command that makes it, for the user to type. free: names of
    config fields that may change without the result counting as another.
    """

    def __init__(self, directory: Path, config, read: dict[str, str], remake: str, free: Collection[str] = ()):
        self.directory, self.config, self.read, self.remake = directory, describe(config), read, remake
        self.free = free
        self.earlier = 0.0  # seconds that interrupted runs have spent on it

    def up_to_date(self, force: bool = False) -> bool:
        """Whether the directory is finished, from this config and inputs. UserError if from others and not force."""
        if force or (manifest := read_manifest(self.directory)) is None:
            return False
        self.must_match(self.directory)
        if wrong := damage(self.directory, manifest["wrote"], contents=False):
            raise UserError(f"{wrong}; make it anew: {self.remake} --force")
        return True

    def must_match(self, directory: Path) -> None:
        """UserError, naming what differs, if a finished directory was made from another config or other inputs."""
        manifest = read_manifest(directory)
        different = list(differences(manifest["config"], self.config, "", self.free))
        if self.read:
            different += differences(manifest["read"], self.read)
        if different:
            raise UserError(
                f"{directory} was made from something else: {'; '.join(different[:4])}. "
                f"Give the experiment another name, or make it anew: {self.remake} --force"
            )

    @contextlib.contextmanager
    def making(self, keep: bool = False) -> Iterator[None]:
        """Holds the directory and logs to its log.txt while the block runs. Empties it first, unless `keep`."""
        with locked(self.directory):
            if not keep:
                self.clear()
            with logging_to(self.directory):
                self.started = time.perf_counter()
                yield

    def clear(self) -> None:
        """Empties the directory, but for its lock and its log."""
        (self.directory / "manifest.json").unlink(missing_ok=True)  # from here on it is unfinished
        for path in self.directory.iterdir():
            if path.name not in (".lock", "log.txt"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def finish(self, counts: dict, files: Iterable[Path] | None = None) -> None:
        """Writes the manifest: the stage is finished. files: what it wrote; None takes the directory's own files."""
        if files is None:
            kept = (".lock", "log.txt", "manifest.json")
            files = [p for p in self.directory.iterdir() if p.is_file() and p.name not in kept]
        manifest = {
            "config": self.config,
            "read": self.read,
            "wrote": digests(self.directory, files),
            "counts": counts,
            "versions": versions(),
        }
        write_manifest(self.directory, manifest)
        record_seconds(self.directory, self.seconds())

    def seconds(self) -> float:
        """Spent on making it so far."""
        return self.earlier + time.perf_counter() - self.started


def record_seconds(directory: Path, seconds: float) -> None:
    """Notes in `seconds.json`, beside the directory, how long it took to make: outputs themselves carry no clock."""
    write_json(directory.parent / "seconds.json", read_seconds(directory.parent) | {directory.name: round(seconds, 1)})


def read_seconds(run: Path) -> dict[str, float]:
    """How long each directory of a run took to make, as far as that was noted."""
    try:
        noted = dict(json.loads((run / "seconds.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
    return {name: taken for name, taken in noted.items() if isinstance(taken, (int, float)) and 0 <= taken < 1e12}


def outputs(directory: Path) -> dict[str, str]:
    """{path: SHA-256} of what a finished directory holds, as the stage that reads it records it; {} if unfinished."""
    manifest = read_manifest(directory) or {"wrote": {}}
    return {f"{directory.parent.name}/{directory.name}/{name}": f["sha256"] for name, f in manifest["wrote"].items()}


def finished(directory: Path, make: str) -> dict:
    """The manifest of a directory that must be there, its files checked. UserError, naming `make`, if it is not."""
    if (manifest := read_manifest(directory)) is None:
        raise UserError(f"{directory} is not there or unfinished; make it with: {make}")
    if wrong := damage(directory, manifest["wrote"]):
        raise UserError(f"{wrong}; make it again with: {make} --force")
    return manifest


# ------------------------------------------------------------------------------------------------------- the command


class _Console(logging.Handler):
    """Prints records above a progress bar, warnings and errors on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        tqdm.write(self.format(record), file=stream)
        stream.flush()


class _LogFile(logging.FileHandler):
    """Goes on without a line that the disk has no room for: what must be written says so itself."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


@contextlib.contextmanager
def logging_to(directory: Path) -> Iterator[None]:
    """Appends to the directory's log.txt, with the time, what is logged meanwhile."""
    handler = _LogFile(directory / "log.txt", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    log.addHandler(handler)
    try:
        yield
    except (UserError, Stopped) as end:
        handler.handle(log.makeRecord(log.name, logging.ERROR, "", 0, str(end), (), None))
        raise
    finally:
        log.removeHandler(handler)
        handler.close()


def progress(items: Iterable, total: int | Callable[[], tuple[float, float]], unit: str, what: str) -> Iterator:
    """Yields the items under a bar with rate and time left; off a terminal, logs a plain line every ten seconds.

    total: how many items there are, or a function that says how many units are done and, as far as is known by now (or
    0), how many there will be.
    """
    count = 0

    def now() -> tuple[float, float]:
        return total() if callable(total) else (count, total)

    with tqdm(desc=what, total=now()[1] or None, unit=f" {unit}", leave=False, disable=not sys.stderr.isatty()) as bar:
        started = shown = time.monotonic()
        for count, item in enumerate(items, start=1):  # noqa: B007 - now() reads it
            yield item
            done, expected = now()
            bar.total = expected or None
            bar.update(done - bar.n)
            clock = time.monotonic()
            if bar.disable and clock - shown > 10 and done > 0 and not 0 < expected <= done:
                rate, shown = done / (clock - started), clock
                left = f", {(expected - done) / rate:.0f} s left" if expected else ""
                of = f" of {expected:,.0f}" if expected else ""
                log.info(f"{what}: {done:,.0f}{of} {unit}, {rate:.1f} a second{left}")


STOPPING = {signal.SIGINT, signal.SIGTERM}


@contextlib.contextmanager
def pool(workers: int, initializer: Callable = lambda: None, *initargs) -> Iterator[ProcessPoolExecutor]:
    """Processes that end with this one, however this one ends. UserError if one of them is killed.

    Forked, not spawned: a worker needs what is already in memory, and must not run the caller's script again. They all
    start here, with signals held back: a fork that is interrupted by a handler leaves locks that nobody opens.
    """
    fork = multiprocessing.get_context("fork")
    executor = ProcessPoolExecutor(workers, fork, _become_worker, (initializer, *initargs))
    others = multiprocessing.active_children()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    executor.submit(int).result()
    processes = [process for process in multiprocessing.active_children() if process not in others]
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
        yield executor
        executor.shutdown()
    except BrokenProcessPool:
        raise UserError("a worker process was killed, perhaps for want of memory; try fewer --workers") from None
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()


def ordered(pool: ProcessPoolExecutor, function: Callable, items: Iterable, ahead: int) -> Iterator:
    """What the function gives for each item, in order, while at most `ahead` items are in the pool: the rest is not
    read before there is room."""
    waiting = collections.deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def end_with_parent(signum: int) -> None:
    """Has the system send this process a signal when the one that started it ends, however it does."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signum)


def _become_worker(initializer: Callable, *initargs) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal: the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    end_with_parent(signal.SIGKILL)
    gc.freeze()  # what was there before the fork is not looked at again, and so not copied
    initializer(*initargs)


def workers(arguments: argparse.Namespace) -> int:
    return arguments.workers or len(os.sched_getaffinity(0))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        _fail(f"error: {message}; see {self.prog} --help")


def parser(
    description: str, *, config: bool = True, makes: bool = False, many: bool = False
) -> argparse.ArgumentParser:
    """The arguments that commands share: CONFIG if there is one, --log-level; --force if one makes something, --workers
    if many do."""
    raw = argparse.RawDescriptionHelpFormatter
    p = _Parser(description=description, formatter_class=raw, allow_abbrev=False)
    if config:
        p.add_argument("config", metavar="CONFIG", help="the experiment, such as configs/tiny.py")
    p.add_argument("--log-level", default="info", choices=LEVELS)
    if makes:
        p.add_argument("--force", action="store_true", help="discard what an earlier run left and make it anew")
    if many:
        p.add_argument("--workers", type=positive, metavar="N", help="processes; default: one a core")
    return p


def positive(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


class Stopped(BaseException):
    """A signal ended the command, with nothing lost. status: to exit with."""

    def __init__(self, status: int, message: str = "stopped; the same command goes on from here"):
        super().__init__(message)
        self.status = status


def _stop(signum, frame):
    raise Stopped(128 + signum)


# What the machine refuses: no space, no permission, a file where a directory should be.
REFUSED = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EFBIG,
    errno.ELOOP,
    errno.ENAMETOOLONG,
}


def run(main: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> typing.NoReturn:
    """Runs a command and exits: 0 done, 2 the user's mistake, 130 or 143 stopped, 1 (with a traceback) a defect."""
    for name in ("stdin", "stdout", "stderr"):  # one that was closed reads as empty, and swallows what is written
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character still shows the rest
    console = _Console()
    log.setLevel(arguments.log_level.upper())
    log.addHandler(console)
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    try:
        main(arguments)
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            _leave_after_first(2)
        _fail(f"error: {error}")
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        _fail(f"error: {error.strerror}: {error.filename or 'while writing'}; mend that and run the same command again")
    except Stopped as stop:
        if os.environ.get("RANK", "0") != "0" and not str(stop):
            _leave_after_first(stop.status)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _leave(stop.status, str(stop))
    if "RANK" in os.environ:
        _leave(0, "")  # the threads of several processes' connections have been seen to abort an interpreter that ends
    sys.exit(0)


def _fail(message: str) -> typing.NoReturn:
    _leave(2, " ".join(message.split()))


def _leave_after_first(status: int) -> typing.NoReturn:
    """Ends one of several processes, of which the first says why. torchrun, once any has ended, ends the others: so it
    must not find this one gone before the first has spoken."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(10)
    _leave(status, "")


def _leave(status: int, message: str) -> typing.NoReturn:
    """Ends the process at once: the threads of a pool that was killed would have something to say about it."""
    with contextlib.suppress(OSError):
        if message:
            print(message, file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(status)
