"""What stands between the network and the API: the key, the size of a body, and the patience with slow clients."""

import asyncio
import hashlib
import hmac
import time

from uvicorn.protocols.http.h11_impl import H11Protocol

from cli import log
from serving.metrics import Metrics
from serving.schema import BODY, Refused

OPEN = ("/", "/health", "/favicon.ico")  # what needs no key
BODY_SECONDS = 10.0  # in which the body has to come
HEAD_SECONDS = 10.0  # in which what stands before it has to
STALL_SECONDS = 30.0  # in which a client has to take some of what waits for it
DISCARDED = 16 * BODY  # bytes read of a body that is too large, so that the client gets to hear so


class Guard:
    """An ASGI application around another: lets in requests that have the key and are not too large, with their body
    read; counts and logs them, by the paths in `known`."""

    def __init__(self, app, key: str | None, known: set[str], metrics: Metrics):
        self.app, self.key, self.known, self.metrics = app, key and _digest(key.encode()), known, metrics

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0

        async def sent(message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            try:
                self.check_key(scope)
                body = await asyncio.wait_for(read(scope, receive), BODY_SECONDS)
            except TimeoutError:
                raise Refused(408, f"the body did not come within {BODY_SECONDS:g} seconds") from None
        except Refused as error:
            await error.response()(scope, receive, sent)
        else:
            if body is not None:

                async def replay():
                    nonlocal body
                    if body is None:
                        return await receive()
                    message, body = {"type": "http.request", "body": body, "more_body": False}, None
                    return message

                try:
                    await self.app(scope, replay, sent)
                except Exception:  # to which Starlette, around us, answers 500
                    status = status or 500
                    raise
        finally:
            path = scope["path"] if scope["path"] in self.known else "other"
            seconds = time.perf_counter() - started
            self.metrics.add("lumi_requests_total", path=path, status=status or "gone")
            if scope["method"] == "POST":
                self.metrics.observe("lumi_request_seconds", seconds)
            shown = path if path != "other" else f"{scope['path'][:80]!r}"
            log.info(f"{scope['method']} {shown}: {status or 'the client has gone'}, {seconds:.2f} s")

    def check_key(self, scope) -> None:
        """Raises Refused for a request without the key. How long that takes tells nothing about the key."""
        if self.key is None or scope["path"] in OPEN:
            return
        kind, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        if not hmac.compare_digest(_digest(given.strip()), self.key) or kind.lower() != b"bearer":
            raise Refused(401, "a wrong API key, or none; send it as Authorization: Bearer KEY", code="invalid_api_key")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


async def read(scope, receive) -> bytes | None:
    """A request's body; None if the client has gone. Raises Refused if it is too large."""
    body, size = bytearray(), 0
    announced = dict(scope["headers"]).get(b"content-length", b"0")
    over = Refused(413, f"the body has more than {BODY:,} bytes")
    if announced.isdigit() and int(announced[:20]) > DISCARDED:
        raise over
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        size += len(message["body"])
        body = body + message["body"] if size <= BODY else bytearray()
        if size > BODY and (size > DISCARDED or not message["more_body"]):
            raise over
        if not message["more_body"]:
            return bytes(body)


class Protocol(H11Protocol):
    """uvicorn's HTTP, which lets go of clients that take too long to say what they want, or to take what they get."""

    late = stalled = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # whatever waits for a client has it stalled
        self.late = self.loop.call_later(HEAD_SECONDS, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        asked = self.cycle is not None and not self.cycle.response_complete
        if self.late and asked:
            self.late.cancel()
            self.late = None
        elif not self.late and not asked:
            self.late = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.stalled = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.stalled:
            self.stalled.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self.late, self.stalled):
            if timer:
                timer.cancel()
        super().connection_lost(exc)
