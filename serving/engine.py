"""The engine: requests that come and go, decoded together by one thread, each as it would be alone.

    with Engine(model, tokenizer) as engine:
        for piece in engine.submit([Request(ids=ids, max_tokens=50, sampling=Sampling())])[0]:
            print(piece.text, end="")

model.py's Decoder draws the tokens; here they become text, in a queue of requests that may be cancelled or time out.
"""

import functools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cli import UserError, log
from generate import Continuation, Decoder, Sampling
from model import Transformer
from tokenizer import Tokenizer

READ = 256  # tokens of prompts read between two steps: what a long prompt may delay the others by


class Busy(Exception):
    """As many requests wait as may."""


class Failed(Exception):
    """The engine, or what it was asked, came to grief."""


class TimedOut(Failed):
    """A request took longer than it may."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """ids: of the prompt. stop_ids: ids that end the text; stop: strings that do, left out of it themselves. logprobs:
    how many likeliest tokens to report beside each; None: nothing is reported."""

    ids: Sequence[int]
    max_tokens: int
    sampling: Sampling
    seed: int | None = None
    stop_ids: Sequence[int] = ()
    stop: Sequence[str] = ()
    logprobs: int | None = None


@dataclass(frozen=True)
class Token:
    """One that was drawn. start: where in the text its own begins. logprob: in nats; candidates: (id, the same) of the
    likeliest: of a request that asked for them."""

    id: int
    start: int
    logprob: float | None = None
    candidates: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True)
class Piece:
    """Some more of a text, and the tokens that it begins to be spelt by. finish: of the last piece, why it is the last:
    "stop", "length" or "cancelled"."""

    text: str
    tokens: Sequence[Token] = ()
    finish: str | None = None


class Writer:
    """The text of tokens as they come: what it gives, put together, is their `decode`, up to the first stop string.

    A character may be spelt by several byte tokens, and a stop string by several tokens: text is held back until it is
    certain.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self.ids: list[int] = []  # those whose text is not certain, behind some that give them their place
        self.before, self.known = 0, ""  # how many, and their text
        self.held = ""  # text that may be the beginning of a stop string
        self.length = 0  # characters given
        self.tokens: list[Token] = []  # not given yet
        self.stopped = False

    def add(self, token: int, logprob: float | None = None, candidates: Sequence[tuple[int, float]] = ()) -> Piece:
        """What is certain with one token more."""
        self.tokens.append(Token(token, self.length + len(self.held), logprob, candidates))
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids, begins=False)
        if text.endswith("\ufffd"):  # a character that is not whole
            return Piece("")
        new = text[len(self.known) :]
        if alone := self.tokenizer.decode(self.ids[self.before :], begins=False):
            self.ids, text = self.ids[self.before :], alone
        self.before, self.known = len(self.ids), text
        return self._give(new, last=False)

    def rest(self) -> Piece:
        """What is left when no token is to come."""
        return self._give(self.tokenizer.decode(self.ids, begins=False)[len(self.known) :], last=True)

    def _give(self, new: str, last: bool) -> Piece:
        self.held += new
        found = [place for text in self.stop if (place := self.held.find(text)) >= 0]
        self.stopped = bool(found)
        if found:
            text = self.held[: min(found)]
        else:
            longest = len(self.held) + 1
            begun = (k for text in self.stop for k in range(1, min(len(text), longest)) if self.held.endswith(text[:k]))
            text = self.held if last else self.held[: len(self.held) - max(begun, default=0)]
        self.held, self.length = self.held[len(text) :], self.length + len(text)
        given = [token for token in self.tokens if token.start < self.length or (last and not found)]
        self.tokens = self.tokens[len(given) :]
        return Piece(text, given)


class Generation:
    """A request under way. Iterating gives its pieces as they come; it raises Failed if that comes to grief.

    put: where pieces, or the exception that ends them, go instead: called by the engine's thread.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer, put: Callable | None, seconds: float):
        self.text = Continuation(
            request.ids, request.max_tokens, request.sampling, request.seed, request.stop_ids, request.logprobs
        )
        self.writer = Writer(tokenizer, request.stop)
        self.pieces: queue.SimpleQueue[Piece | Failed] = queue.SimpleQueue()
        self.put = put or self.pieces.put
        self.cancelled = False
        self.prompt_tokens, self.tokens = len(request.ids), 0  # of the prompt; drawn, without the id that ended it
        self.asked = time.monotonic()
        self.deadline = self.asked + seconds
        self.first: float | None = None  # when the first token was drawn
        self.ended: float | None = None

    def cancel(self) -> None:
        """Has it end within a token; what was written stands."""
        self.cancelled = True

    def __iter__(self) -> Iterator[Piece]:
        while True:
            piece = self.pieces.get()
            if isinstance(piece, Exception):
                raise piece
            yield piece
            if piece.finish:
                return

    def give(self, piece: Piece | Failed) -> None:
        """Gives a piece to whoever asked. One who fails at taking it gets no more; the others know nothing of it."""
        try:
            self.put(piece)
        except Exception:
            log.exception("a piece of text could not be given to whoever asked for it")
            self.cancel()

    def read(self, token: int) -> Piece:
        """What the token that was just drawn has to say."""
        self.first = self.first or time.monotonic()
        finish = self.text.ended
        if finish == "stop":
            piece = Piece("")
        else:
            self.tokens += 1
            piece = self.writer.add(token, *(self.text.logprobs[-1:] or [()])[0])
            if self.writer.stopped:
                return Piece(piece.text, piece.tokens, "stop")
        return self.last(finish, piece) if finish else piece

    def last(self, finish: str, before: Piece = Piece("")) -> Piece:
        """The piece that ends it, with what was held back."""
        rest = self.writer.rest()
        finish = "stop" if self.writer.stopped else finish
        return Piece(before.text + rest.text, [*before.tokens, *rest.tokens], finish)


class Engine:
    """rows: texts decoded together. waiting: how many more may wait for a row. seconds: the longest that a request may
    take, waiting included."""

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, rows: int = 8, waiting: int = 64, seconds: float = 600.0
    ):
        self.model, self.tokenizer, self.seconds = model, tokenizer, seconds
        self.most = rows + waiting
        self.rows, self.decoder = rows, None  # made by the thread that uses it
        self.open: dict[Continuation, Generation] = {}  # not ended
        self.arrived: list[Generation] = []  # of them, those that the thread has not seen yet
        self.changed = threading.Condition()
        self.closing = False
        self.thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def __enter__(self) -> "Engine":
        self.thread.start()
        with self.changed:
            self.changed.wait_for(lambda: self.decoder is not None or self.closing)
        if self.decoder is None:
            raise UserError(f"no memory for {self.rows} texts together; take fewer (--batch-size, --samples)")
        return self

    def __exit__(self, *_) -> None:
        self.stop()
        self.thread.join()

    def stop(self) -> None:
        """Ends what is under way, and takes in no more."""
        with self.changed:
            self.closing = True
            self.changed.notify()

    def submit(
        self, requests: Sequence[Request], put: Callable[[int, Piece | Failed], None] | None = None
    ) -> list[Generation]:
        """Takes in requests, all of them or none: their generations. put(i, piece): called by the engine's thread with
        what the i-th gets. Raises Busy, Failed, or ValueError for an impossible request."""
        new = [
            Generation(request, self.tokenizer, put and functools.partial(put, i), self.seconds)
            for i, request in enumerate(requests)
        ]
        with self.changed:
            if self.closing:
                raise Failed("the engine has stopped")
            for generation in new:
                self.decoder.check(generation.text)
            if len(new) > self.most:
                raise ValueError(f"{len(new)} answers asked for; at most {self.most} may be under way")
            if len(self.open) + len(new) > self.most:
                raise Busy(f"{len(self.open)} requests are under way; at most {self.most} may be")
            self.open |= {generation.text: generation for generation in new}
            self.arrived += new
            self.changed.notify()
        return new

    @property
    def running(self) -> bool:
        """Whether it takes requests."""
        return not self.closing

    def load(self) -> tuple[int, int]:
        """How many texts are being decoded, and how many wait for that."""
        running = len(self.decoder.texts)
        return running, max(0, len(self.open) - running)

    def _work(self) -> None:
        try:
            # libgomp has its threads spin between operations only while they are no more than the cores, and counts
            # those of every thread that has computed and still lives: a second one would take decoding to a third.
            decoder = Decoder(self.model, self.rows, chunk=READ)
            with self.changed:
                self.decoder = decoder
                self.changed.notify()
            while True:
                with self.changed:
                    self.changed.wait_for(lambda: self.open or self.closing)
                    if self.closing:
                        break
                    arrived, self.arrived = self.arrived, []
                    taken = list(self.open.values())
                for generation in arrived:
                    self.decoder.add(generation.text)
                self._let_go(taken)
                for text, token in self.decoder.step():
                    generation = self.open[text]
                    if text.error:
                        self._end(generation, Failed(str(text.error)))
                    else:
                        piece = generation.read(token)
                        if piece.finish and not text.ended:  # a stop string, of which the decoder knows nothing
                            self.decoder.remove(text)
                        if piece.finish:
                            self._end(generation, piece)
                        elif piece.text or piece.tokens:
                            generation.give(piece)
        except BaseException:  # whatever it is, those who wait must hear of it
            log.exception("the engine has failed")
        with self.changed:
            self.closing = True
            self.changed.notify_all()
        for generation in list(self.open.values()):
            self._end(generation, Failed("the engine has stopped"))

    def _let_go(self, taken: Sequence[Generation]) -> None:
        """Ends those whose time is up, those that nobody waits for, and those that asked for no token."""
        now = time.monotonic()
        for generation in taken:
            if generation.text.ended:
                self._end(generation, generation.last(generation.text.ended))
            elif generation.cancelled or now > generation.deadline:
                late = TimedOut(f"it took longer than {self.seconds:g} seconds")
                self.decoder.remove(generation.text)
                self._end(generation, generation.last("cancelled") if generation.cancelled else late)

    def _end(self, generation: Generation, last: Piece | Failed) -> None:
        with self.changed:
            del self.open[generation.text]
        generation.ended = time.monotonic()
        generation.give(last)
