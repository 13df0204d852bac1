"""What all commands share: errors, exit status, logging, progress bars, worker processes."""

# A command ends with status 0 when it is done, 2 after the user's mistake (one line on standard error), 1 with a
# traceback for a defect, and 128 + N when signal N stopped it with nothing lost: 130 for Ctrl-C, 143 for SIGTERM.

import argparse
import collections
import contextlib
import ctypes
import difflib
import errno
import gc
import importlib
import logging
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

try:
    from tqdm import tqdm
except ModuleNotFoundError:
    print("error: no package tqdm; run make install, then `. .venv/bin/activate`", file=sys.stderr)
    sys.exit(2)

log = logging.getLogger("lumi")
logging.raiseExceptions = False  # on a full disk: no traceback for every line that log.txt cannot take
LEVELS = ("debug", "info", "warning", "error")
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\u200b\ufeff\ud800-\udfff]")
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class UserError(Exception):
    """The user's mistake. Its one line says what was found, what was expected and what fixes it."""


class Stopped(BaseException):
    """A signal ended the command, with nothing lost. status: the exit status."""

    def __init__(self, status: int, message: str = "stopped; run the same command again to continue"):
        super().__init__(message)
        self.status = status


def extra(module: str, package: str, why: str) -> types.ModuleType:
    """Imports an optional package. UserError, with the command that installs it, if it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] != module.partition(".")[0]:
            raise  # it is installed, but another package that it needs is not
        raise UserError(f"{why} needs {package}; install it with: pip install {package}") from None


class _Console(logging.Handler):
    """Prints log records above a progress bar. Warnings and errors go to standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        try:
            tqdm.write(self.format(record), file=stream)
            stream.flush()
        except OSError:  # a closed terminal, or `| head`: the work continues, and log.txt has every line
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def logging_to(directory: Path) -> Iterator[None]:
    """Appends everything logged inside the block, and the error that ends it, to the directory's log.txt."""
    handler = logging.FileHandler(directory / "log.txt", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    log.addHandler(handler)
    try:
        yield
    except (UserError, Stopped) as error:
        handler.handle(logging.makeLogRecord({"msg": str(error)}))
        raise
    finally:
        log.removeHandler(handler)
        handler.close()


def progress(items: Iterable, total: int | Callable[[], tuple[float, float]], unit: str, what: str) -> Iterator:
    """Yields the items under a bar with rate and time left. Without a terminal it logs a line every ten seconds."""
    # total: the number of items, or a function that returns units done and expected (0: unknown). what: the label.
    started = shown = time.monotonic()
    with tqdm(desc=what, unit=f" {unit}", leave=False, disable=not sys.stderr.isatty()) as bar:
        for count, item in enumerate(items, start=1):
            yield item
            done, expected = total() if callable(total) else (count, total)
            bar.total = expected or None
            bar.update(done - bar.n)
            now = time.monotonic()
            if bar.disable and now - shown > 10 and 0 < done != expected:
                shown, rate = now, done / (now - started)
                of = f" of {expected:,.0f}" if expected else ""
                left = f", {(expected - done) / rate:.0f} s left" if expected else ""
                log.info(f"{what}: {done:,.0f}{of} {unit}, {rate:.1f} a second{left}")


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = (), markdown: bool = False) -> str:
    """Aligned columns for a terminal, or a Markdown table. The first row is the head. right: columns of numbers."""
    if markdown:
        rows = [rows[0], ["--:" if i in right else "---" for i in range(len(rows[0]))], *rows[1:]]
    columns = []
    for i, column in enumerate(zip(*rows, strict=True)):
        width = max(map(len, column))
        columns.append([cell.rjust(width) if i in right else cell.ljust(width) for cell in column])
    lines = zip(*columns, strict=True)
    return "\n".join(f"| {' | '.join(line)} |" if markdown else "  ".join(line).rstrip() for line in lines)


@contextlib.contextmanager
def pool(workers: int, initializer: Callable = lambda: None, *initargs) -> Iterator[ProcessPoolExecutor]:
    """Worker processes that end with this process. UserError if one of them is killed."""
    # Forked, not spawned: a worker needs the data in memory and must not run the caller's script again. All workers
    # start here, with signals blocked: a signal handler that interrupts a fork can leave a lock held forever.
    fork = multiprocessing.get_context("fork")
    executor = ProcessPoolExecutor(workers, fork, _become_worker, (initializer, *initargs))
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        executor.submit(int).result()  # starts all workers
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
        yield executor
        executor.shutdown(cancel_futures=True)
    except BrokenProcessPool:
        raise UserError("a worker process was killed, perhaps because memory ran out; try fewer workers") from None
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def _become_worker(initializer: Callable, *initargs) -> None:
    for number in STOPPING:  # Ctrl-C reaches every process, but only the parent reacts to it
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    end_with_parent(signal.SIGKILL)
    gc.freeze()  # the collector then leaves the parent's objects alone, so their pages stay shared
    initializer(*initargs)


def ordered(pool: ProcessPoolExecutor, function: Callable, items: Iterable, ahead: int) -> Iterator:
    """Yields function(item) for each item, in order. Reads only `ahead` items in advance."""
    waiting = collections.deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def end_with_parent(signum: int) -> None:
    """Asks Linux to send this process a signal when its parent ends for any reason. Other systems cannot do this."""
    if prctl := getattr(ctypes.CDLL(None), "prctl", None):
        prctl(1, signum)  # PR_SET_PDEATHSIG


def meant(word: str, known: Sequence[str]) -> str:
    """A hint for an unknown word: the most similar known word, or all known words."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"


def plural(number: int, noun: str) -> str:
    """A number with its noun: 1 row, 1,200 rows."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def visible(text: str) -> str:
    """Text with escapes such as \\x1b for characters that control a terminal, or that nobody sees."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options):  # the formatter keeps the lines of examples
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> None:
        if message.startswith("unrecognized arguments: -") and any(a.dest == "config" for a in self._actions):
            message += "; settings live in the config"
        _leave(2, f"error: {message}; see {self.prog} --help")


def parser(description: str, config: bool = True) -> argparse.ArgumentParser:
    """A parser with the arguments that commands share: CONFIG, unless config=False, and --log-level."""
    file = Path(sys.argv[0])
    module = file.parent.parent == Path(__file__).parent  # a file in a package is run as `python -m PACKAGE.FILE`
    prog = f"python -m {file.parent.name}.{file.stem}" if module else None
    p = _Parser(description=description, prog=prog)
    if config:
        p.add_argument("config", metavar="CONFIG", help="the experiment, such as configs/tiny.py")
    p.add_argument("--log-level", default="info", choices=LEVELS, help="print this level and above; default: info")
    return p


def positive(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def handle(handler) -> dict:
    """Sets the handler for signals that stop a command; returns the old handlers. Ignored signals stay so (`nohup`)."""
    numbers = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in numbers}


def _stop(signum, frame):
    handle(signal.SIG_IGN)  # Ctrl-C comes from the terminal and from the parent: the second must not stop the clean-up
    raise Stopped(128 + signum)


def run(main: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> None:
    """Runs a command and exits with its status."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a character that the terminal lacks becomes an escape
    log.setLevel(arguments.log_level.upper())
    log.addHandler(_Console())
    handle(_stop)
    _exit_after(lambda: main(arguments))


def apart(function: Callable[[], None]) -> None:
    """Calls a function in a forked process and waits for it. Raises Stopped with its status if that is not 0."""
    # So random state, matrix precision and deterministic mode that the function sets do not reach the next stage.
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        end_with_parent(signal.SIGTERM)
        _exit_after(function)
    caught = []

    def pass_on(signum, frame):
        caught.append(signum)
        os.kill(child, signum)

    handle(pass_on)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])  # the child saves its work, whatever signals come
    handle(_stop)
    if code < 0:
        raise Stopped(128 - code, f"ended by {signal.Signals(-code).name}; run the same command again to continue")
    if code:
        raise Stopped(code, "")  # the child has printed the reason
    if caught:
        raise Stopped(128 + caught[0])


def _exit_after(function: Callable[[], None]) -> None:
    """Calls a function and exits, with status 0 or the status of its exception."""
    status, message = 0, ""
    follower = os.environ.get("RANK", "0") != "0"  # under torchrun: not the first process
    try:
        function()
    except UserError as error:
        status, message = 2, "" if follower else f"error: {error}"
    except Stopped as stop:
        status, message = stop.status, str(stop)
    except BrokenPipeError:  # the program that reads the output has ended, such as `head`
        status = 128 + signal.SIGPIPE
    except Exception as error:
        if not isinstance(error, OSError) or error.errno in (None, errno.ENOENT):
            traceback.print_exc()
            _leave(1, "")
        where = error.filename or "while writing"  # no space, no permission, a file where a directory should be
        status, message = 2, f"error: {error.strerror}: {where}; fix that and run the same command again"
    handle(signal.SIG_IGN)
    if follower and status and not message:
        # torchrun ends all processes as soon as one ends: give the first process time to print the reason.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
    _leave(status, message)


def _leave(status: int, message: str) -> None:
    """Ends the process at once, without Python's clean-up."""
    # In the clean-up, threads of a stopped pool print tracebacks, threads of torch's connections can abort, and a
    # forked process runs its parent's clean-up.
    with contextlib.suppress(OSError):
        if message:
            print(" ".join(message.split()) if status == 2 else message, file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(status)
