"""The engine: one thread decodes many texts together. Each text is the same as if it were decoded alone."""

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from cli import UserError, log
from generate import Continuation, Decoder
from model import Transformer
from tokenizer import Tokenizer

CHUNK = 256  # the most prompt tokens read between two steps, so that a long prompt does not delay other texts
PAUSE = 0.01  # seconds between two looks at a text


class Refused(UserError):
    """A request gets no answer. status: of its HTTP response. param: the wrong field. code: a short name."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def seed_of(seed: int | None, number: int) -> int | None:
    """The seed of text `number` of a request. For None and -1: None, a new seed each time."""
    return None if seed in (None, -1) else (seed + number) % 2**63


class Token(NamedTuple):
    """A new token. start: where its text begins, in characters. logprob: in nats, if the request asks for it."""

    id: int
    start: int
    logprob: float | None = None
    candidates: Sequence[tuple[int, float]] = ()  # the likeliest ids with their log-probabilities


class Piece(NamedTuple):
    """New text, and the tokens that begin in it. finish: "stop", "length" or "cancelled" in the last piece."""

    text: str
    tokens: Sequence[Token]
    finish: str | None


class Generation:
    """A text that the engine writes and a client reads, piece by piece. It ends before the first stop string."""

    def __init__(self, tokenizer: Tokenizer, continuation: Continuation, stop: Sequence[str] = ()):
        self.tokenizer, self.continuation, self.stop = tokenizer, continuation, stop
        self.prompt_tokens = len(continuation.ids)
        self.asked, self.first = time.monotonic(), None  # first: the time of the first token
        self.text = ""
        self.held = max(map(len, stop), default=1) - 1  # characters at the end that may begin a stop string
        self.tokens: list[Token] = []  # without the id that ended the text
        self.window: list[int] = []  # the last ids, decoded together: an id's text can depend on the ids before it
        self.decoded = 0, ""  # how many ids of the window are decoded, and their text
        self.sent_text = self.sent_tokens = 0  # characters and tokens that the client has read
        self.cancelled = False  # set by the client
        self.finish: str | None = None
        self.error: Refused | None = None

    def add(self, id: int, logprob: float | None = None, candidates: Sequence[tuple[int, float]] = ()) -> None:
        """Adds a token. Ends the text if a stop string is complete."""
        self.first = self.first or time.monotonic()
        self.tokens.append(Token(id, len(self.text), logprob, candidates))
        self.window.append(id)
        text = self.tokenizer.decode(self.window, begins=False)
        if text.endswith("\ufffd"):  # several byte tokens spell one character: wait for the others
            return
        count, before = self.decoded
        self.append(text[len(before) :])
        # Shorten the window, but not to ids without text: some tokenizers drop a space at its beginning.
        shorter = self.tokenizer.decode(self.window[count:], begins=False)
        if shorter:
            self.window, text = self.window[count:], shorter
        self.decoded = len(self.window), text

    def append(self, new: str) -> None:
        """Adds whole characters. Ends the text before the first stop string."""
        text = self.text + new
        places = [text.find(stop) for stop in self.stop if stop in text]
        if not places:
            self.text = text
            return
        self.text = text[: min(places)]
        self.tokens = [token for token in self.tokens if token.start < len(self.text)]
        self.finish = "stop"

    def end(self, finish: str) -> None:
        """Ends the text: nothing follows that could complete a character or a stop string."""
        self.append(self.tokenizer.decode(self.window, begins=False)[len(self.decoded[1]) :])
        self.finish = self.finish or finish

    def read(self) -> Piece:
        """The new text and tokens since the last call. Raises Refused if the engine cannot continue."""
        if self.error:
            raise self.error
        finish, text = self.finish, self.text  # in this order: the engine's thread sets `finish` last
        text = text[self.sent_text : len(text) if finish else max(self.sent_text, len(text) - self.held)]
        self.sent_text += len(text)
        tokens = [token for token in self.tokens[self.sent_tokens :] if finish or token.start < self.sent_text]
        self.sent_tokens += len(tokens)
        return Piece(text, tokens, finish)

    def __iter__(self) -> Iterator[Piece]:
        while not (piece := self.read()).finish:
            yield piece
            time.sleep(PAUSE)
        yield piece


class Engine:
    """rows: texts decoded together. waiting: texts that may wait. seconds: limit for a text, waiting included."""

    def __init__(self, model: Transformer, rows: int = 8, waiting: int = 64, seconds: float = 600.0):
        self.limit, self.seconds = rows + waiting, seconds
        self.open: dict[Continuation, Generation] = {}  # texts that have not ended
        self.changed = threading.Condition()
        self.running = True
        # Only this thread computes: OpenMP is 3 times as slow once a second thread has computed.
        self.thread = ThreadPoolExecutor(1, "engine")
        try:
            self.decoder = self.thread.submit(Decoder, model, rows, chunk=CHUNK).result()
        except (RuntimeError, MemoryError):
            raise UserError(f"no memory for {rows} texts at once; lower --batch-size") from None

    def __enter__(self) -> "Engine":
        self.thread.submit(self._work)
        return self

    def __exit__(self, *_) -> None:
        self.stop()
        self.thread.shutdown()

    def stop(self) -> None:
        """Ends all texts with an error, and accepts no more."""
        with self.changed:
            self.running = False
            self.changed.notify()

    def submit(self, generations: Sequence[Generation]) -> None:
        """Accepts all or none. Raises Refused."""
        try:
            for generation in generations:
                self.decoder.check(generation.continuation)
        except ValueError as error:
            raise Refused(str(error)) from None
        with self.changed:
            if not self.running:
                raise Refused("the engine has stopped", 500)
            count = len(self.open) + len(generations)
            if count > self.limit:
                problem = f"{count} texts at once; the server takes at most {self.limit}; try again later"
                raise Refused(problem, 429, code="busy")
            for generation in generations:
                self.open[generation.continuation] = generation
                self.decoder.add(generation.continuation)  # appends to its queue, which is safe during a step
            self.changed.notify()

    def _work(self) -> None:
        try:
            while self.running:
                with self.changed:
                    self.changed.wait_for(lambda: self.open or not self.running)
                    generations = list(self.open.values())
                for generation in generations:
                    if time.monotonic() - generation.asked > self.seconds:
                        problem = f"it took longer than {self.seconds:g} seconds"
                        self._end(generation, error=Refused(problem, 504, code="timeout"))
                    elif generation.cancelled:
                        self._end(generation, "cancelled")
                for continuation, id in self.decoder.step():
                    self._deliver(self.open[continuation], id)
        except BaseException:  # whatever it is, the clients must hear of it
            log.exception("the engine has failed")
        self.stop()
        for generation in self.open.values():
            generation.error = Refused("the engine has stopped", 500)
        self.open.clear()

    def _deliver(self, generation: Generation, id: int) -> None:
        """Adds a token that was drawn."""
        continuation = generation.continuation
        if continuation.error:
            self._end(generation, error=Refused(str(continuation.error), 500))
            return
        if continuation.ended != "stop":  # else the id ends the text, and is not a part of it
            generation.add(id, *(continuation.logprobs[-1] if continuation.logprobs else ()))
        if generation.finish or continuation.ended:
            self._end(generation, continuation.ended)

    def _end(self, generation: Generation, finish: str | None = None, error: Refused | None = None) -> None:
        generation.error = error
        if not error and not generation.finish:
            generation.end(finish)
        if not generation.continuation.ended:
            self.decoder.remove(generation.continuation)
        with self.changed:
            del self.open[generation.continuation]
