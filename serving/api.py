"""The server: the OpenAI API's completions and chat, a plain /generate, a page to chat on. Needs fastapi and uvicorn.

Behind every answer stands the engine; here it is spelt as clients expect it. Nothing that a request says reaches the
disk.
"""

import asyncio
import base64
import contextlib
import hashlib
import json
import math
import re
import signal
import socket
import threading
import time
import uuid
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from cli import UserError, log
from generate import Sampling
from serving import engine as engines
from serving.engine import Busy, Engine, Failed, Piece, Token
from serving.guard import Guard, Protocol
from serving.metrics import Metrics
from serving.schema import (
    CHOICES,
    MAX_TOKENS,
    ChatRequest,
    CompletionRequest,
    ErrorBody,
    GenerateRequest,
    Refused,
    Sampled,
    refusal,
)
from serving.served import Served

PAGE = Path(__file__).with_name("page.html")
DRAIN_SECONDS = 60  # in which what is under way may come to its end when the server is asked to stop
CONNECTIONS = 512
PAUSE = 0.04  # seconds between two events of a stream, at least
HELP = {
    "lumi_up": "Whether the engine runs.",
    "lumi_requests_total": "Requests answered, by path and status.",
    "lumi_prompt_tokens_total": "Tokens of prompts.",
    "lumi_generated_tokens_total": "Tokens drawn.",
    "lumi_running": "Texts being decoded.",
    "lumi_waiting": "Texts that wait for a place among them.",
    "lumi_request_seconds": "From a request to the end of its answer.",
    "lumi_first_token_seconds": "From a request to its first token.",
}

# ------------------------------------------------------------------------------------------------------------- answers


class Answers:
    """What the engine writes for one HTTP request, as it comes to the event loop.

    pause: seconds for which what was written is gathered, the first token and the last apart: to send an event takes
    longer than to draw a small model's token. Raises what `Engine.submit` does, UserError for an impossible request.
    """

    def __init__(self, engine: Engine, requests: Sequence[engines.Request], metrics: Metrics, pause: float):
        self.arrived: deque[tuple[int, Piece | Failed]] = deque()
        self.news = asyncio.Event()
        self.metrics = metrics
        loop, told = asyncio.get_running_loop(), -math.inf

        def put(i: int, piece: Piece | Failed) -> None:  # called by the engine's thread
            nonlocal told
            self.arrived.append((i, piece))
            if isinstance(piece, Failed) or piece.finish or time.monotonic() - told >= pause:
                told = time.monotonic()
                with contextlib.suppress(RuntimeError):  # the loop has ended, with it whoever waited
                    loop.call_soon_threadsafe(self.news.set)

        try:
            self.generations = engine.submit(requests, put)
        except ValueError as error:
            raise UserError(str(error)) from None

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Each piece, with the number of its answer, until all have ended. Raises Failed."""
        left = len(self.generations)
        while left:
            await self.news.wait()
            self.news.clear()
            together: defaultdict[int, list[Piece]] = defaultdict(list)
            failed = None
            while self.arrived:
                i, piece = self.arrived.popleft()
                if isinstance(piece, Exception):
                    failed = piece
                    break
                left -= piece.finish is not None
                together[i].append(piece)
            for i, pieces in together.items():
                yield i, joined(pieces)
            if failed:
                raise failed

    async def whole(self) -> list[Piece]:
        """Each answer in one piece."""
        found: list[list[Piece]] = [[] for _ in self.generations]
        async for i, piece in self.pieces():
            found[i].append(piece)
        return [joined(pieces) for pieces in found]

    def usage(self, prompts: int) -> dict[str, int]:
        """Tokens, of each prompt once."""
        each = len(self.generations) // prompts
        read = sum(generation.prompt_tokens for generation in self.generations[::each])
        drawn = sum(generation.tokens for generation in self.generations)
        return {"prompt_tokens": read, "completion_tokens": drawn, "total_tokens": read + drawn}

    def close(self) -> None:
        """Ends what nobody waits for any more."""
        for generation in self.generations:
            generation.cancel()
            self.metrics.add("lumi_prompt_tokens_total", generation.prompt_tokens)
            self.metrics.add("lumi_generated_tokens_total", generation.tokens)
            if generation.first:
                self.metrics.observe("lumi_first_token_seconds", generation.first - generation.asked)


def joined(pieces: Sequence[Piece]) -> Piece:
    """Pieces of one text, in one."""
    tokens = [token for piece in pieces for token in piece.tokens]
    return Piece("".join(piece.text for piece in pieces), tokens, pieces[-1].finish)


class Stream(StreamingResponse):
    """Server-sent events. Answers end with the connection, however that ends."""

    def __init__(self, events: AsyncIterator[dict], answers: Answers):
        super().__init__(self.spelt(events), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.answers = answers

    @staticmethod
    async def spelt(events: AsyncIterator[dict]) -> AsyncIterator[bytes]:
        try:
            async for event in events:
                yield b"data: %s\n\n" % json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode()
        except Failed as error:
            yield b"data: %s\n\n" % json.dumps(refusal(error).body).encode()
        yield b"data: [DONE]\n\n"

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answers.close()


async def whole(request: Request, answers: Answers) -> list[Piece]:
    """The answers, unless the client goes away meanwhile."""
    writing = asyncio.ensure_future(answers.whole())
    leaving = asyncio.ensure_future(left(request))
    try:
        await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not writing.done():
            raise Refused(499, "the client has gone")
        return writing.result()
    finally:
        writing.cancel()
        leaving.cancel()
        answers.close()


async def left(request: Request) -> None:
    """Returns once the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


# --------------------------------------------------------------------------------------------- how OpenAI spells them


class Spelling:
    """The OpenAI API's objects, of completions, or of `chat`."""

    def __init__(self, served: Served, chat: bool, usage: bool):
        self.served, self.chat, self.with_usage = served, chat, usage
        self.common = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": served.name,
            "system_fingerprint": served.model.digest[:12],
        }

    def whole(self, answers: Sequence[Piece], logprobs: bool, usage: dict) -> dict:
        choices = []
        for i, answer in enumerate(answers):
            said = {"message": {"role": "assistant", "content": answer.text}} if self.chat else {"text": answer.text}
            choices.append(self.choice(i, said, answer, logprobs))
        kind = "chat.completion" if self.chat else "text_completion"
        return self.common | {"object": kind, "choices": choices, "usage": usage}

    async def events(self, answers: Answers, logprobs: bool, prompts: int) -> AsyncIterator[dict]:
        if self.chat:
            for i in range(len(answers.generations)):
                said = {"delta": {"role": "assistant", "content": ""}}
                yield self.chunk([self.choice(i, said, Piece(""), False)])
        async for i, piece in answers.pieces():
            delta = {"content": piece.text} if piece.text or piece.tokens else {}
            said = {"delta": delta} if self.chat else {"text": piece.text}
            yield self.chunk([self.choice(i, said, piece, logprobs)])
        if self.with_usage:
            yield self.chunk([]) | {"usage": answers.usage(prompts)}

    def chunk(self, choices: list[dict]) -> dict:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return self.common | {"object": kind, "choices": choices} | ({"usage": None} if self.with_usage else {})

    def choice(self, i: int, said: dict, piece: Piece, logprobs: bool) -> dict:
        found = self.logprobs(piece.tokens) if logprobs else None
        return {"index": i, **said, "logprobs": found, "finish_reason": piece.finish}

    def logprobs(self, tokens: Sequence[Token]) -> dict:
        if self.chat:
            content = [
                self.token(token.id, token.logprob) | {"top_logprobs": [self.token(*pair) for pair in token.candidates]}
                for token in tokens
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": [self.spelt(token.id)[0] for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{self.spelt(i)[0]: logprob for i, logprob in token.candidates} for token in tokens],
            "text_offset": [token.start for token in tokens],
        }

    def token(self, i: int, logprob: float) -> dict:
        text, spelt = self.spelt(i)
        return {"token": text, "logprob": logprob, "bytes": list(spelt)}

    def spelt(self, i: int) -> tuple[str, bytes]:
        """A token's text, and its bytes: one may be a part of a character only."""
        pieces = self.served.tokenizer.pieces
        name = pieces.id_to_piece(i) if i < self.served.tokenizer.vocab_size else f"<row {i}>"
        if i < self.served.tokenizer.vocab_size and pieces.is_byte(i):
            return f"bytes:\\x{name[3:5].lower()}", bytes.fromhex(name[3:5])
        text = name.replace("\u2581", " ")
        return text, text.encode()


# -------------------------------------------------------------------------------------------------------------- routes


def create_app(served: Served, engine: Engine, key: str | None = None) -> FastAPI:
    """The application. key: what clients must send; None: nothing."""
    app = FastAPI(
        title="Lumi",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
    )
    metrics = Metrics(HELP)
    page = PAGE.read_text(encoding="utf-8")
    about = {
        "id": served.name,
        "object": "model",
        "created": int((served.directory / "manifest.json").stat().st_mtime),
        "owned_by": "lumi",
        "stage": served.stage,
        "parameters": served.model.num_parameters(),
        "context_length": served.model.config.context_length,
        "max_tokens": MAX_TOKENS,
        "template": served.template,
        "checkpoint": served.model.digest,
        "tokenizer": served.tokenizer.sha256,
        "vocab_size": served.tokenizer.vocab_size,
    }

    async def refuse(request: Request, error: Exception) -> Response:
        return refusal(error).response()

    for kind in (Refused, Busy, Failed, UserError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, refuse)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def home() -> Response:
        """The page."""
        return HTMLResponse(page, headers=policy(page))

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return Response(status_code=204)

    @app.get("/health")
    @app.head("/health", include_in_schema=False)
    async def health() -> Response:
        """200 while the engine runs, 503 once it has failed."""
        if not engine.running:
            return JSONResponse({"status": "the engine has failed", "model": served.name}, 503)
        return JSONResponse({"status": "ok", "model": served.name})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def counts() -> Response:
        """Counts and times, in Prometheus' text format."""
        running, waiting = engine.load()
        now = {"lumi_up": engine.running, "lumi_running": running, "lumi_waiting": waiting}
        page = "\n".join(metrics.lines(now)) + "\n"
        return PlainTextResponse(page, media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [about]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict:
        if name != served.name:
            raise Refused(404, f"there is no model {name!r}, only {served.name}", code="model_not_found")
        return about

    @app.post("/generate")
    async def generate(body: GenerateRequest, request: Request) -> dict:
        """The answer to a prompt, of a model that was taught to answer; of another, how it goes on."""
        sampling = Sampling(temperature=body.temperature, top_p=body.top_p, top_k=body.top_k)
        asked = engines.Request(
            ids=await asyncio.to_thread(served.prompt, body.prompt),
            max_tokens=body.max_length,
            sampling=sampling,
            seed=body.seed,
            stop_ids=served.stop,
        )
        answers = Answers(engine, [asked], metrics, math.inf)
        [answer] = await whole(request, answers)
        return {"model": served.name, "text": answer.text, "finish_reason": answer.finish, "usage": answers.usage(1)}

    streamed = {200: {"content": {"text/event-stream": {}}}}

    @app.post("/v1/completions", responses=streamed)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Goes on with one text or several."""
        match body.prompt:
            case str() | [int(), *_]:
                prompts = [body.prompt]
            case _:
                prompts = body.prompt
        spelt = [served.text if isinstance(prompt, str) else served.short for prompt in prompts]
        ids = [await asyncio.to_thread(spell, prompt) for spell, prompt in zip(spelt, prompts, strict=True)]
        return await answer(body, request, False, ids, body.max_tokens or 16, body.logprobs)

    @app.post("/v1/chat/completions", responses=streamed)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """The next answer in a conversation."""
        if body.top_logprobs is not None and not body.logprobs:
            raise Refused(400, "top_logprobs: only with logprobs true", "top_logprobs")
        ids = await asyncio.to_thread(served.conversation, [message.message() for message in body.messages])
        room = served.model.config.context_length - len(ids)
        most = body.max_completion_tokens or body.max_tokens or min(room, MAX_TOKENS)
        return await answer(body, request, True, [ids], most, (body.top_logprobs or 0) if body.logprobs else None)

    async def answer(
        body: Sampled, request: Request, chat: bool, prompts: list[list[int]], most: int, logprobs: int | None
    ) -> Response:
        if body.model not in (None, served.name):
            raise Refused(400, f"there is no model {body.model!r}, only {served.name}", "model", "model_not_found")
        n = body.n or 1
        if n * len(prompts) > CHOICES:
            raise Refused(400, f"{n * len(prompts)} answers asked for; at most {CHOICES}", "n")
        stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
        requests = [
            engines.Request(
                ids=ids,
                max_tokens=most,
                sampling=body.sampling(),
                seed=None if body.seed is None else (body.seed + i) % 2**63,
                stop_ids=() if body.ignore_eos else served.stop,
                stop=[text for text in stop if text],
                logprobs=logprobs,
            )
            for i, ids in enumerate(ids for ids in prompts for _ in range(n))
        ]
        answers = Answers(engine, requests, metrics, PAUSE if body.stream else math.inf)
        options = body.stream_options
        spelling = Spelling(served, chat, bool(body.stream and options and options.include_usage))
        if body.stream:
            return Stream(spelling.events(answers, logprobs is not None, len(prompts)), answers)
        found = await whole(request, answers)
        return JSONResponse(spelling.whole(found, logprobs is not None, answers.usage(len(prompts))))

    known = {route.path for route in app.routes}
    app.add_middleware(Guard, key=key, known=known, metrics=metrics)
    return app


def policy(page: str) -> dict[str, str]:
    """Headers that let a page run its own script and style only, and talk to its own server only."""

    def digest(tag: str) -> str:
        text = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1]
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    rules = f"default-src 'none'; script-src 'sha256-{digest('script')}'; style-src 'sha256-{digest('style')}'"
    rules += "; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return {
        "Content-Security-Policy": rules,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


# ------------------------------------------------------------------------------------------------------------ serving


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on an address: who comes before the server runs waits. UserError if it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(2048)
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"cannot listen on {host} port {port}: {getattr(error, 'strerror', error)}; choose others by --host, --port"
        ) from None
    return found


class Server(uvicorn.Server):
    """A server for `run(sockets=[…])`, which returns once it was asked to stop and has answered what was asked before.

    That is by SIGTERM or SIGINT if it runs in the main thread, else by `should_exit`. What takes too long then, or is
    under way when a second signal comes, is cut off with an error.
    """

    def __init__(self, app: FastAPI, engine: Engine):
        super().__init__(
            uvicorn.Config(
                app,
                http=Protocol,
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                limit_concurrency=CONNECTIONS,
                timeout_graceful_shutdown=DRAIN_SECONDS + 10,
            )
        )
        self.engine = engine

    def handle_exit(self, sig, frame) -> None:
        under_way = len(self.engine.open)
        if self.should_exit:
            self.engine.stop()
        elif under_way:
            log.info(f"finishing {under_way} answers, in {DRAIN_SECONDS} seconds at most; once more cuts them off")
            timer = threading.Timer(DRAIN_SECONDS, self.engine.stop)
            timer.daemon = True
            timer.start()
        self.should_exit = True


def run(served: Served, engine: Engine, listening: socket.socket, key: str | None) -> None:
    """Serves until SIGTERM or Ctrl-C, then answers what was asked before, and returns."""
    ours = Server(create_app(served, engine, key), engine)
    for number in (signal.SIGTERM, signal.SIGINT):  # also in the moments before the server takes them to itself
        signal.signal(number, ours.handle_exit)
    ours.run(sockets=[listening])
