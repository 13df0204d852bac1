"""What all commands share: errors, exit status, logging, progress bars, worker pools.

    if __name__ == "__main__":
        cli.run(main, cli.parser(__doc__).parse_args())

A command ends with status 0 when it is done, 2 after a mistake of the user's (one line on standard error), 130 or 143
when Ctrl-C or SIGTERM stopped it with nothing lost, and 1 with a traceback for a defect of ours.
"""

import argparse
import collections
import contextlib
import ctypes
import errno
import gc
import logging
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

log = logging.getLogger("lumi")
LEVELS = ("debug", "info", "warning", "error")
STOPPING = {signal.SIGINT, signal.SIGTERM}


class UserError(Exception):
    """A mistake of the user's. Its one line says what was found, what was expected and what fixes it."""


class Stopped(BaseException):
    """A signal ended the command, with nothing lost. status: the exit status."""

    def __init__(self, status: int, message: str = "stopped; run the same command again to continue"):
        super().__init__(message)
        self.status = status


# ------------------------------------------------------------------------------------------------ logging and progress


class _Console(logging.Handler):
    """Prints records above a progress bar, warnings and errors on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        tqdm.write(self.format(record), file=stream)
        stream.flush()


class _LogFile(logging.FileHandler):
    """Ignores a full disk: the files that matter report it themselves."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


@contextlib.contextmanager
def logging_to(directory: Path) -> Iterator[None]:
    """Appends everything logged inside the block to the directory's log.txt, with the time."""
    handler = _LogFile(directory / "log.txt", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    log.addHandler(handler)
    try:
        yield
    except (UserError, Stopped) as error:
        handler.handle(log.makeRecord(log.name, logging.ERROR, "", 0, str(error), (), None))
        raise
    finally:
        log.removeHandler(handler)
        handler.close()


def progress(items: Iterable, total: int | Callable[[], tuple[float, float]], unit: str, what: str) -> Iterator:
    """Yields the items under a bar with rate and time left. Without a terminal it logs a plain line every ten seconds.

    total: the number of items, or a function that returns the units done and the units expected (0 while unknown).
    """
    count = 0

    def state() -> tuple[float, float]:
        return total() if callable(total) else (count, total)

    with tqdm(
        desc=what, total=state()[1] or None, unit=f" {unit}", leave=False, disable=not sys.stderr.isatty()
    ) as bar:
        started = shown = time.monotonic()
        for count, item in enumerate(items, start=1):  # noqa: B007 - state() reads it
            yield item
            done, expected = state()
            bar.total = expected or None
            bar.update(done - bar.n)
            now = time.monotonic()
            unfinished = not expected or done < expected
            if bar.disable and now - shown > 10 and done > 0 and unfinished:
                rate, shown = done / (now - started), now
                of = f" of {expected:,.0f}" if expected else ""
                left = f", {(expected - done) / rate:.0f} s left" if expected else ""
                log.info(f"{what}: {done:,.0f}{of} {unit}, {rate:.1f} a second{left}")


# ---------------------------------------------------------------------------------------------------- worker processes


@contextlib.contextmanager
def pool(workers: int, initializer: Callable = lambda: None, *initargs) -> Iterator[ProcessPoolExecutor]:
    """Worker processes that end with this process, however it ends. UserError if one of them is killed.

    Forked, not spawned: a worker needs what is already in memory and must not run the caller's script again. All of
    them start here, while signals are blocked: a fork that a signal handler interrupts can leave a lock closed forever.
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
        raise UserError("a worker process was killed, perhaps because memory ran out; try fewer --workers") from None
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()


def _become_worker(initializer: Callable, *initargs) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal: the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    end_with_parent(signal.SIGKILL)
    gc.freeze()  # the collector then leaves the parent's objects alone, so their pages stay shared
    initializer(*initargs)


def ordered(pool: ProcessPoolExecutor, function: Callable, items: Iterable, ahead: int) -> Iterator:
    """Yields function(item) for each item, in order. At most `ahead` items are in the pool, the rest unread."""
    waiting = collections.deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def end_with_parent(signum: int) -> None:
    """Asks Linux to send this process a signal when its parent ends, however the parent ends."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signum)


def cores() -> int:
    """How many processor cores this process may use: the default number of workers."""
    return len(os.sched_getaffinity(0))


# ----------------------------------------------------------------------------------------------------------- arguments


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _fail(f"error: {message}; see {self.prog} --help")


def parser(description: str, config: bool = True) -> argparse.ArgumentParser:
    """A parser with the arguments that commands share: CONFIG, unless config=False, and --log-level."""
    raw = argparse.RawDescriptionHelpFormatter
    p = _Parser(description=description, formatter_class=raw, allow_abbrev=False)
    if config:
        p.add_argument("config", metavar="CONFIG", help="the experiment, such as configs/tiny.py")
    p.add_argument("--log-level", default="info", choices=LEVELS)
    return p


def add_making_switches(p: argparse.ArgumentParser) -> None:
    """--force and --workers, of commands that make something."""
    p.add_argument("--force", action="store_true", help="discard what an earlier run left and make it again")
    p.add_argument("--workers", type=positive, default=cores(), metavar="N", help="processes; default: one per core")


def add_training_switches(p: argparse.ArgumentParser) -> None:
    """--force, --workers and --resume."""
    add_making_switches(p)
    p.add_argument("--resume", default="auto", metavar="auto|DIR", help="the checkpoint to resume; default: the newest")


def positive(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


# --------------------------------------------------------------------------------------------------------- exit status

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


def _stop(signum, frame):
    """Ends the command. Ctrl-C reaches a stage's process twice, from the terminal and from its parent: the second
    signal must not interrupt the clean-up."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    raise Stopped(128 + signum)


def run(main: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> NoReturn:
    """Runs a command and exits with its status."""
    for name in ("stdin", "stdout", "stderr"):  # a closed one reads as empty and discards what is written
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a character still shows the rest
    log.setLevel(arguments.log_level.upper())
    log.addHandler(_Console())
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    _exit_after(lambda: main(arguments))


def apart(function: Callable[[], None]) -> None:
    """Runs a function in a forked process and waits for it. Raises Stopped with its status if that is not 0.

    Random state, matrix precision and deterministic mode that the function sets end with its process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if (child := os.fork()) == 0:
        end_with_parent(signal.SIGTERM)
        _exit_after(function)
    caught = []

    def pass_on(signum, frame):
        caught.append(signum)
        with contextlib.suppress(ProcessLookupError):  # the child has just ended
            os.kill(child, signum)

    before = {number: signal.signal(number, pass_on) for number in STOPPING}
    _, status = os.waitpid(child, 0)  # until the child has saved its work, whatever signals come
    for number, handler in before.items():
        signal.signal(number, handler)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        raise Stopped(128 - code, f"ended by {signal.Signals(-code).name}; run the same command again to continue")
    if code:
        raise Stopped(code, "")  # the child said why
    if caught:
        raise Stopped(128 + caught[0])


def _exit_after(function: Callable[[], None]) -> NoReturn:
    """Calls a function and exits: 0, or the status that its exception stands for."""
    follower = os.environ.get("RANK", "0") != "0"  # under torchrun: not the first process
    try:
        function()
    except UserError as error:
        if follower:
            _leave_after_first(2)
        _fail(f"error: {error}")
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _leave(128 + signal.SIGPIPE, "")
    except Stopped as stop:
        if follower and not str(stop):
            _leave_after_first(stop.status)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _leave(stop.status, str(stop))
    except Exception as error:
        if isinstance(error, OSError) and error.errno in REFUSED:
            where = error.filename or "while writing"
            _fail(f"error: {error.strerror}: {where}; fix that and run the same command again")
        traceback.print_exc()
        _leave(1, "")
    _leave(0, "")


def _fail(message: str) -> NoReturn:
    _leave(2, " ".join(message.split()))


def _leave_after_first(status: int) -> NoReturn:
    """Ends a process that is not the first, late: torchrun ends all others as soon as one has ended, and the first
    process must still print the reason."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(10)
    _leave(status, "")


def _leave(status: int, message: str) -> NoReturn:
    """Ends the process at once. During a normal exit the threads of a killed pool would print tracebacks, those of
    torch's connections can abort, and a forked process would run its parent's clean-up."""
    with contextlib.suppress(OSError):
        if message:
            print(message, file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(status)
