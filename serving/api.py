"""The server: OpenAI's completions and chat, a plain /generate, and a page to chat on."""

import asyncio
import json
import secrets
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import uvicorn
from fastapi import Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import Request

from cli import UserError, log
from generate import Continuation
from serving import schema
from serving.engine import Engine, Generation, Piece, Refused, Token, seed_of
from serving.schema import ChatRequest, CompletionRequest, GenerateRequest, Sampled
from serving.served import Served

PAGE = Path(__file__).with_name("page.html")
DRAIN_SECONDS = 60  # to finish unfinished answers before the server stops
PATIENCE = 30.0  # seconds that a connection may wait for its client to send or to read
FIRST_PAUSE, LONGEST_PAUSE = 0.005, 0.04  # seconds between two looks at what the engine has written
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0)  # seconds


class Answers:
    """The answers to a completion or chat request, in OpenAI's form."""

    def __init__(self, served: Served, body: Sampled, generations: Sequence[Generation], request: Request):
        self.tokenizer, self.body, self.generations, self.request = served.tokenizer, body, generations, request
        self.chat = isinstance(body, ChatRequest)
        self.head = {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if self.chat else "text_completion",
            "created": int(time.time()),
            "model": served.name,
            "system_fingerprint": served.model.digest[:12],
        }

    async def response(self) -> Response:
        if not self.body.stream:
            return JSONResponse(await self.whole())
        return StreamingResponse(self.stream(), 200, {"Cache-Control": "no-store"}, "text/event-stream")

    async def whole(self) -> dict:
        async for _ in self.arriving():
            pass
        choices = []
        for number, generation in enumerate(self.generations):
            message = {"message": {"role": "assistant", "content": generation.text}}
            text = message if self.chat else {"text": generation.text}
            choices.append(self.choice(number, text, generation.tokens, generation.finish))
        return self.head | {"choices": choices, "usage": self.usage()}

    async def stream(self) -> AsyncIterator[str]:
        """Server-sent events."""
        try:
            async for event in self.events():
                yield f"data: {json.dumps(self.head | event)}\n\n"
        except Refused as error:
            yield f"data: {json.dumps(schema.error_body(error))}\n\n"
        yield "data: [DONE]\n\n"

    async def events(self) -> AsyncIterator[dict]:
        if self.chat:
            self.head["object"] = "chat.completion.chunk"
            for number in range(len(self.generations)):
                yield {"choices": [self.choice(number, {"delta": {"role": "assistant", "content": ""}}, None, None)]}
        async for number, piece in self.arriving():
            text = {"delta": {"content": piece.text}} if self.chat else {"text": piece.text}
            yield {"choices": [self.choice(number, text, piece.tokens, piece.finish)]}
        if self.body.stream_options and self.body.stream_options.include_usage:
            yield {"choices": [], "usage": self.usage()}

    async def arriving(self) -> AsyncIterator[tuple[int, Piece]]:
        """Yields (number of the generation, piece) until all have ended. Raises Refused."""
        # Pause between looks: sending an event takes longer than drawing a small model's token. The pause grows, so the
        # first tokens arrive quickly, and later tokens together.
        pause, unfinished = FIRST_PAUSE, dict(enumerate(self.generations))
        while unfinished:
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
            if await self.request.is_disconnected():
                raise Refused("the client has left", 499)
            for number, generation in list(unfinished.items()):
                piece = generation.read()
                if piece.finish:
                    del unfinished[number]
                if piece.finish or piece.text or piece.tokens:
                    yield number, piece

    def usage(self) -> dict[str, int]:
        """Counts tokens. A prompt with several answers counts once."""
        prompt = sum(generation.prompt_tokens for generation in self.generations[:: self.body.n])
        new = sum(len(generation.tokens) for generation in self.generations)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def choice(self, number: int, text: dict, tokens: Sequence[Token] | None, finish: str | None) -> dict:
        asked = tokens is not None and self.generations[0].continuation.candidates is not None
        return {"index": number, **text, "logprobs": self.logprobs(tokens) if asked else None, "finish_reason": finish}

    def logprobs(self, tokens: Sequence[Token]) -> dict:
        content = []
        for token in tokens:
            likeliest = [self.entry(*pair) for pair in token.candidates]
            content.append(self.entry(token.id, token.logprob) | {"top_logprobs": likeliest})
        if self.chat:
            return {"content": content, "refusal": None}
        columns = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entry, token in zip(content, tokens, strict=True):
            columns["tokens"].append(entry["token"])
            columns["token_logprobs"].append(token.logprob)
            columns["top_logprobs"].append({other["token"]: other["logprob"] for other in entry["top_logprobs"]})
            columns["text_offset"].append(token.start)
        return columns

    def entry(self, id: int, logprob: float) -> dict:
        """A token in OpenAI's form. The text for a part of a character is written like "bytes:\\xe2"."""
        text, content = f"<row {id}>", b""  # the embedding may have more rows than the tokenizer pieces
        if id < self.tokenizer.vocab_size:
            text, content = self.tokenizer.spelling(id)
            if text.encode() != content:
                text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
        return {"token": text, "logprob": logprob, "bytes": list(content)}


class Metrics:
    """The server's counts and times for Prometheus."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        common = {"registry": self.registry}
        Gauge("lumi_up", "1 while the engine runs.", **common).set_function(lambda: engine.running)
        Gauge("lumi_running", "Texts being decoded.", **common).set_function(lambda: len(engine.decoder.texts))
        waiting = Gauge("lumi_waiting", "Texts that wait for decoding.", **common)
        waiting.set_function(lambda: max(0, len(engine.open) - len(engine.decoder.texts)))
        self.requests = Counter("lumi_requests_total", "Requests, by path and status.", ["path", "status"], **common)
        self.prompt_tokens = Counter("lumi_prompt_tokens_total", "Tokens of prompts.", **common)
        self.generated_tokens = Counter("lumi_generated_tokens_total", "Generated tokens.", **common)
        common["buckets"] = BUCKETS
        self.seconds = Histogram("lumi_request_seconds", "Seconds from a request to the end of its answer.", **common)
        self.first = Histogram("lumi_first_token_seconds", "Seconds from a request to its first token.", **common)

    def count(self, generation: Generation) -> None:
        self.prompt_tokens.inc(generation.prompt_tokens)
        self.generated_tokens.inc(len(generation.tokens))
        if generation.first:
            self.first.observe(generation.first - generation.asked)


class Api:
    """The routes. key: clients must send it; None: they need none."""

    def __init__(self, served: Served, engine: Engine, key: str | None):
        self.served, self.engine, self.key, self.counts = served, engine, key, Metrics(engine)
        self.about = {
            "id": served.name,
            "object": "model",
            "created": int((served.directory / "manifest.json").stat().st_mtime),
            "owned_by": "lumi",
            "template": served.template,
            "parameters": served.model.num_parameters(),
            "context_length": served.model.config.context_length,
            "checkpoint": served.model.digest,
            "tokenizer": served.tokenizer.sha256,
        }

    async def check_key(self, request: Request) -> None:
        scheme, _, sent = request.headers.get("authorization", "").partition(" ")
        known = scheme.lower() == "bearer" and secrets.compare_digest(sent.encode("latin-1"), self.key.encode())
        if not known:
            problem = "no API key, or a wrong one; send it as Authorization: Bearer KEY"
            raise Refused(problem, 401, code="invalid_api_key")

    async def health(self) -> Response:
        """Status 200 while the engine runs, and 503 when it has stopped."""
        status, code = ("ok", 200) if self.engine.running else ("the engine has stopped", 503)
        return JSONResponse({"status": status, "model": self.served.name}, code)

    async def metrics(self) -> Response:
        """Counts and times in Prometheus' text format."""
        return Response(generate_latest(self.counts.registry), media_type=CONTENT_TYPE_LATEST)

    async def models(self) -> dict:
        """The one model: size, context and template, and the SHA-256 of its checkpoint and tokenizer."""
        return {"object": "list", "data": [self.about]}

    async def generate(self, body: GenerateRequest, request: Request) -> dict:
        """A fine-tuned model answers the prompt. A base model continues it."""
        ids = await asyncio.to_thread(self.served.prompt, body.prompt)
        options = body.model_dump(exclude={"prompt", "max_tokens"})
        answer = await self.start(CompletionRequest(prompt=ids, **options), request, [ids], body.max_tokens).whole()
        [choice] = answer["choices"]
        usage, finish = answer["usage"], choice["finish_reason"]
        return {"model": self.served.name, "text": choice["text"], "finish_reason": finish, "usage": usage}

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Continues one text or several."""
        prompts = body.prompts()
        if isinstance(prompts[0], str):
            prompts = [await asyncio.to_thread(self.served.text, prompt) for prompt in prompts]
        return await self.start(body, request, prompts, body.max_tokens or 16, body.logprobs).response()

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Writes the next message of a conversation. The model must be fine-tuned."""
        if body.top_logprobs and not body.logprobs:
            raise Refused("top_logprobs: expected logprobs true beside it", param="top_logprobs")
        ids = await asyncio.to_thread(self.served.conversation, [message.message() for message in body.messages])
        max_tokens = body.max_completion_tokens or body.max_tokens or min(self.served.room(ids), schema.MAX_TOKENS)
        candidates = (body.top_logprobs or 0) if body.logprobs else None
        return await self.start(body, request, [ids], max_tokens, candidates).response()

    def start(self, body: Sampled, request: Request, prompts, max_tokens: int, candidates=None) -> Answers:
        """Submits the texts that a request asks for. prompts: a list of ids for each. Their seeds count up."""
        if body.model and body.model != self.served.name:
            problem = f"no model {body.model!r}; expected {self.served.name}"
            raise Refused(problem, param="model", code="model_not_found")
        count = len(prompts) * body.n
        if count > schema.CHOICES:
            raise Refused(f"n: {count} answers in one request; expected at most {schema.CHOICES}", param="n")
        stop_ids = () if body.ignore_eos else self.served.stop
        generations = []
        for number in range(count):
            ids, seed = prompts[number // body.n], seed_of(body.seed, number)
            self.served.room(ids)  # raises Refused if there is none
            continuation = Continuation(ids, max_tokens, body.sampling(), seed, stop_ids, candidates)
            generations.append(Generation(self.served.tokenizer, continuation, body.stops()))
        self.engine.submit(generations)
        request.state.generations.extend(generations)
        return Answers(self.served, body, generations, request)


# --------------------------------------------------------------------------------------------------------- application


def create_app(served: Served, engine: Engine, key: str | None = None, origins: Sequence[str] = ()) -> FastAPI:
    """The application. key: clients must send it. origins: web pages that may call the API from a browser."""
    about = f"OpenAI's API for chat and completions. Ignored are {', '.join(sorted(schema.IGNORED))}."
    wrong = {"description": "The request has a mistake, or exceeds a limit."}
    failed = {"description": "The server failed."}
    options = {"docs_url": None, "redoc_url": None, "redirect_slashes": False}
    app = FastAPI(title="Lumi", description=about, responses={"4XX": wrong, "5XX": failed}, **options)
    api = Api(served, engine, key)
    app.get("/", include_in_schema=False)(lambda: FileResponse(PAGE))
    app.get("/favicon.ico", include_in_schema=False)(lambda: Response(status_code=204))
    app.head("/health", include_in_schema=False)(api.health)
    app.get("/health")(api.health)
    guard = {"dependencies": [Depends(api.check_key)] if key else []}
    app.get("/metrics", response_class=PlainTextResponse, **guard)(api.metrics)
    app.get("/v1/models", **guard)(api.models)
    app.post("/generate", **guard)(api.generate)
    stream = {"responses": {200: {"content": {"text/event-stream": {}}}}}
    app.post("/v1/completions", **stream, **guard)(api.completions)
    app.post("/v1/chat/completions", **stream, **guard)(api.chat)
    for kind in (UserError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, respond)
    app.add_middleware(watched, paths={route.path for route in app.routes}, metrics=api.counts)
    if origins:  # outside of every handler, also that of defects: without it, a browser hides the answer from a page
        stack, methods = app.build_middleware_stack(), ["GET", "POST"]
        app.middleware_stack = CORSMiddleware(stack, origins, allow_methods=methods, allow_headers=["*"])
    return app


async def respond(request: Request, error: Exception) -> Response:
    """Turns an exception into a response."""
    headers = dict(getattr(error, "headers", None) or {})  # Allow, after a wrong method
    if isinstance(error, RequestValidationError):
        error = schema.invalid(error)
    elif isinstance(error, HTTPException):
        error = Refused(f"{error.detail}; /openapi.json lists the routes and their fields", error.status_code)
    elif not isinstance(error, Refused):
        error = Refused(str(error)) if isinstance(error, UserError) else Refused("a defect; see the server's log", 500)
    headers |= {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(error.status, {})
    return JSONResponse(schema.error_body(error), error.status, headers)


def watched(app: Callable, paths: set[str], metrics: Metrics) -> Callable:
    """ASGI middleware. Refuses large bodies. At the end of a request, cancels its texts, counts it and logs it."""

    async def run(scope, receive, send) -> None:
        status, size, started = 500, 0, time.perf_counter()  # 500: a defect, which Starlette answers
        generations = scope["state"]["generations"] = []  # Api.start adds to it

        async def read_some() -> dict:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > schema.BODY:
                raise HTTPException(413, f"the body has more than {schema.BODY:,} bytes")
            return message

        async def note_status(message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await app(scope, read_some, note_status)
        finally:
            seconds = time.perf_counter() - started
            for generation in generations:
                generation.cancelled = True
                metrics.count(generation)
            path = scope["path"] if scope["path"] in paths else "other"
            metrics.requests.labels(path=path, status=status).inc()
            if scope["method"] == "POST":
                metrics.seconds.observe(seconds)
            log.info(f"{scope['method']} {scope['path'][:80]!r}: {status}, {seconds:.2f} s")

    return run


# -------------------------------------------------------------------------------------------------------------- server


def listen(host: str, port: int) -> socket.socket:
    """A listening socket: connections wait there until the server runs. UserError if it cannot listen."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:  # OverflowError: no port
        raise UserError(f"cannot listen on {host} port {port}: {error}; change --host or --port") from None


class Server(uvicorn.Server):
    """Runs until SIGTERM or Ctrl-C, then finishes the unfinished answers. A second signal cuts them off."""

    def __init__(self, app: FastAPI, engine: Engine):
        options = {"ws": "none", "lifespan": "off", "log_config": None, "access_log": False, "server_header": False}
        limits = {"limit_concurrency": 512, "timeout_graceful_shutdown": DRAIN_SECONDS}
        super().__init__(uvicorn.Config(app, http="h11", loop="asyncio", **options, **limits))
        self.engine = engine

    def handle_exit(self, sig, frame) -> None:
        if self.should_exit:
            self.engine.stop()
        elif self.engine.open:
            log.info(f"finishing {len(self.engine.open)} answers, for at most {DRAIN_SECONDS} seconds")
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """uvicorn calls it ten times a second. Drops connections whose clients send or read too slowly."""
        now = time.monotonic()
        for connection in list(self.server_state.connections):
            cycle = connection.cycle
            sending = cycle is None or cycle.response_complete or cycle.more_body
            since = vars(connection).setdefault("waiting_since", now)
            if not sending and not connection.flow.write_paused:
                connection.waiting_since = now
            elif now - since > PATIENCE:
                connection.transport.abort()
        return await super().on_tick(counter)
