"""The server: OpenAI's completions and chat, a plain /generate, and a page to chat on."""

import asyncio
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Annotated

import uvicorn
from fastapi import Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import Request

from cli import UserError, log
from generate import Continuation
from serving import schema
from serving.answers import Answers, finished, usage
from serving.engine import Engine, Generation, Refused
from serving.metrics import Metrics
from serving.schema import ChatRequest, CompletionRequest, GenerateRequest, Sampled
from serving.served import Served

PAGE = Path(__file__).with_name("page.html")
DRAIN_SECONDS = 60  # for the answers under way when the server is asked to stop
PATIENCE = 30.0  # seconds that a connection may wait for its client to send or to read
CONNECTIONS = 512


async def under_way(request: Request) -> AsyncIterator[list[Generation]]:
    """The generations of a request. They end when it ends, also if the client leaves."""
    generations = []
    try:
        yield generations
    finally:
        for generation in generations:
            generation.cancelled = True
            request.app.state.metrics.count(generation)


UnderWay = Annotated[list[Generation], Depends(under_way)]


class Api:
    """The routes."""

    def __init__(self, served: Served, engine: Engine):
        self.served, self.engine = served, engine
        model, tokenizer = served.model, served.tokenizer
        created = int((served.directory / "manifest.json").stat().st_mtime)
        self.about = {"id": served.name, "object": "model", "created": created, "owned_by": "lumi"}
        self.about |= {"stage": served.stage, "template": served.template, "parameters": model.num_parameters()}
        self.about |= {"context_length": model.config.context_length, "max_tokens": schema.MAX_TOKENS}
        self.about |= {"checkpoint": model.digest, "tokenizer": tokenizer.sha256, "vocab_size": tokenizer.vocab_size}

    async def health(self) -> Response:
        """Status 200 while the engine runs, and 503 when it has stopped."""
        if self.engine.running:
            return JSONResponse({"status": "ok", "model": self.served.name})
        return JSONResponse({"status": "the engine has stopped", "model": self.served.name}, 503)

    async def metrics(self, request: Request) -> Response:
        """Counts and times in Prometheus' text format."""
        return Response(generate_latest(request.app.state.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def models(self) -> dict:
        """The server has one model."""
        return {"object": "list", "data": [self.about]}

    async def model(self, name: str) -> dict:
        """Its stage, size, limits and template, and the SHA-256 of its checkpoint and tokenizer."""
        self.check_name(name, 404)
        return self.about

    async def generate(self, body: GenerateRequest, request: Request, generations: UnderWay) -> dict:
        """A fine-tuned model answers the prompt. A base model continues it."""
        ids = await asyncio.to_thread(self.served.prompt, body.prompt)
        self.start(generations, body, [ids], body.max_length, self.served.stop)
        await finished(generations, request)
        answer = {"model": self.served.name, "text": generations[0].text, "finish_reason": generations[0].finish}
        return answer | {"usage": usage(generations, 1)}

    async def completions(self, body: CompletionRequest, request: Request, generations: UnderWay) -> Response:
        """Continues one text or several."""
        prompts = []
        for prompt in body.prompts():
            ids = await asyncio.to_thread(self.served.text, prompt) if isinstance(prompt, str) else prompt
            prompts.append(ids)
        return await self.answer(generations, body, request, prompts, body.max_tokens or 16, body.logprobs)

    async def chat(self, body: ChatRequest, request: Request, generations: UnderWay) -> Response:
        """Writes the next message of a conversation. The model must be fine-tuned."""
        if body.top_logprobs and not body.logprobs:
            raise Refused("top_logprobs: expected logprobs true beside it", param="top_logprobs")
        ids = await asyncio.to_thread(self.served.conversation, [message.message() for message in body.messages])
        max_tokens = body.max_completion_tokens or body.max_tokens or min(self.served.room(ids), schema.MAX_TOKENS)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        return await self.answer(generations, body, request, [ids], max_tokens, logprobs)

    async def answer(self, generations, body: Sampled, request, prompts, max_tokens, logprobs) -> Response:
        """Completions and chat alike. prompts: a list of ids for each."""
        if body.model:
            self.check_name(body.model, 400)
        prompts = [ids for ids in prompts for _ in range(body.n)]
        if len(prompts) > schema.CHOICES:
            raise Refused(f"n: {len(prompts)} answers in one request; expected at most {schema.CHOICES}", param="n")
        stop_ids = () if body.ignore_eos else self.served.stop
        self.start(generations, body, prompts, max_tokens, stop_ids, logprobs, body.stops())
        answers = Answers(self.served, body, generations, request)
        if not body.stream:
            return JSONResponse(await answers.whole())
        return StreamingResponse(answers.stream(), 200, {"Cache-Control": "no-store"}, "text/event-stream")

    def start(self, generations: list, body, prompts, max_tokens: int, stop_ids, logprobs=None, stop=()) -> None:
        """Submits one generation for each prompt. Their seeds count up."""
        new = []
        for number, ids in enumerate(prompts):
            self.served.room(ids)  # raises Refused if there is none
            seed = None if body.seed is None else (body.seed + number) % 2**63
            continuation = Continuation(ids, max_tokens, body.sampling(), seed, stop_ids, logprobs)
            new.append(Generation(self.served.tokenizer, continuation, stop))
        self.engine.submit(new)
        generations += new

    def check_name(self, name: str, status: int) -> None:
        if name != self.served.name:
            raise Refused(f"no model {name!r}; expected {self.served.name}", status, "model", "model_not_found")


# --------------------------------------------------------------------------------------------------------- application


def create_app(served: Served, engine: Engine, key: str | None = None, origins: Sequence[str] = ()) -> FastAPI:
    """The application. key: clients must send it. origins: web pages that may call the API from a browser."""
    about = "One language model, with OpenAI's API for chat and completions."
    wrong = {"model": schema.ErrorBody, "description": "The request has a mistake, or exceeds a limit."}
    failed = {"model": schema.ErrorBody, "description": "The server failed."}
    options = {"docs_url": None, "redoc_url": None, "redirect_slashes": False, "max_body_size": schema.BODY}
    app = FastAPI(title="Lumi", description=about, responses={"4XX": wrong, "5XX": failed}, **options)
    app.state.metrics = Metrics(engine)
    api = Api(served, engine)
    app.get("/", include_in_schema=False)(lambda: FileResponse(PAGE))
    app.get("/favicon.ico", include_in_schema=False)(lambda: Response(status_code=204))
    app.head("/health", include_in_schema=False)(api.health)
    app.get("/health", summary="Tell if the engine runs")(api.health)
    guard = {"dependencies": [Depends(key_check(key))] if key else []}
    text = {"response_class": PlainTextResponse}
    app.get("/metrics", summary="Report counts and times", **text, **guard)(api.metrics)
    app.get("/v1/models", summary="List the model", **guard)(api.models)
    app.get("/v1/models/{name}", summary="Describe the model", **guard)(api.model)
    app.post("/generate", summary="Answer a question, or continue a text", **guard)(api.generate)
    stream = {"responses": {200: {"content": {"text/event-stream": {}}}}}
    app.post("/v1/completions", summary="Continue texts", **stream, **guard)(api.completions)
    app.post("/v1/chat/completions", summary="Answer a conversation", **stream, **guard)(api.chat)
    for kind in (UserError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, respond)
    app.add_middleware(Watch, paths={route.path for route in app.routes}, metrics=app.state.metrics)
    if origins:
        methods, headers = ["GET", "POST"], ["*"]
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=methods, allow_headers=headers)
    return app


def key_check(key: str) -> Callable:
    """A dependency that refuses requests without the key."""
    bearer = HTTPBearer(auto_error=False, description="The server's LUMI_API_KEY.")

    async def check(given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
        sent = given.credentials.encode("latin-1") if given else b""
        if not secrets.compare_digest(sent, key.encode()):
            problem = "no API key, or a wrong one; send it as Authorization: Bearer KEY"
            raise Refused(problem, 401, code="invalid_api_key")

    return check


async def respond(request: Request, error: Exception) -> Response:
    """The response that an exception means."""
    headers = dict(getattr(error, "headers", None) or {})  # Allow, after a wrong method
    if isinstance(error, RequestValidationError):
        error = schema.invalid(error)
    elif isinstance(error, HTTPException):
        error = Refused(f"{error.detail}; /openapi.json lists the routes and their fields", error.status_code)
    elif not isinstance(error, Refused):
        error = Refused(str(error)) if isinstance(error, UserError) else Refused("a defect; see the server's log", 500)
    headers |= {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(error.status, {})
    return JSONResponse(schema.error_body(error), error.status, headers)


class Watch:
    """ASGI middleware that counts and logs requests."""

    def __init__(self, app, paths: set[str], metrics: Metrics):
        self.app, self.paths, self.metrics = app, paths, metrics

    async def __call__(self, scope, receive, send) -> None:
        status, started = "gone", time.perf_counter()  # gone: the client left before the answer

        async def note_status(message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, note_status)
        except Exception:  # Starlette answers with 500
            status = 500 if status == "gone" else status
            raise
        finally:
            seconds = time.perf_counter() - started
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.requests.labels(path=path, status=status).inc()
            if scope["method"] == "POST":
                self.metrics.seconds.observe(seconds)
            log.info(f"{scope['method']} {scope['path'][:80]!r}: {status}, {seconds:.2f} s")


# -------------------------------------------------------------------------------------------------------------- server


def listen(host: str, port: int) -> socket.socket:
    """A listening socket: connections wait there until the server runs. UserError if it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:  # OverflowError: no port
        raise UserError(f"cannot listen on {host} port {port}: {error}; change --host or --port") from None


class Server(uvicorn.Server):
    """Runs until SIGTERM or Ctrl-C, then finishes the answers under way. A second signal cuts them off."""

    def __init__(self, app: FastAPI, engine: Engine):
        options = {"ws": "none", "lifespan": "off", "log_config": None, "access_log": False, "server_header": False}
        limits = {"limit_concurrency": CONNECTIONS, "timeout_graceful_shutdown": DRAIN_SECONDS}
        super().__init__(uvicorn.Config(app, http="h11", loop="asyncio", **options, **limits))
        self.engine = engine
        self.waiting: dict[object, float] = {}  # connections that wait for their clients, and since when

    def handle_exit(self, sig, frame) -> None:
        if self.should_exit:
            self.engine.stop()
        elif self.engine.open:
            log.info(f"finishing {len(self.engine.open)} answers, for at most {DRAIN_SECONDS} seconds")
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """uvicorn calls it ten times a second. Drops connections whose clients send or read too slowly."""
        now, waiting = time.monotonic(), {}
        for connection in list(self.server_state.connections):
            cycle = connection.cycle
            sending = cycle is None or cycle.response_complete or cycle.more_body
            if sending or connection.flow.write_paused:
                waiting[connection] = self.waiting.get(connection, now)
                if now - waiting[connection] > PATIENCE:
                    connection.transport.abort()
        self.waiting = waiting
        return await super().on_tick(counter)
