"""A server as clients see it: on a socket, its model the small fine-tuned one."""

import contextlib
import dataclasses
import json
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

import configs
from serving import api
from serving.engine import Engine
from serving.served import Served, load
from tests.conftest import Place


def until(true, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.002)


class Endless(Served):
    """One whose texts end by their length alone."""

    stop = ()


class Server:
    """A server in a thread."""

    def __init__(self, served: Served, engine: Engine, key: str | None, buffer: int | None):
        self.served, self.engine = served, engine
        self.app = api.create_app(served, engine, key)
        self.server = api.Server(self.app, self.engine)
        listening = api.listen("127.0.0.1", 0)
        if buffer:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        self.port = listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        alone = httpx.Limits(max_keepalive_connections=0)  # a connection for each request
        self.client = httpx.Client(base_url=self.url, timeout=30, limits=alone)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listening]})
        self.thread.start()
        until(lambda: self.server.started)

    def stop(self) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()

    def post(self, path: str, body=None, **options) -> httpx.Response:
        options = {"json": body} | options if "content" not in options else options
        return self.client.post(path, **options)

    def get(self, path: str, **options) -> httpx.Response:
        return self.client.get(path, **options)

    def works(self) -> None:
        """A good request is served."""
        found = self.post("/v1/completions", {"prompt": "Return", "max_tokens": 2, "temperature": 0})
        assert found.status_code == 200, found.text
        assert found.json()["usage"]["completion_tokens"] <= 2

    def connect(self, receive: int | None = None) -> socket.socket:
        found = socket.socket()
        if receive:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
        found.settimeout(10)
        found.connect(("127.0.0.1", self.port))
        return found

    def raw(self, data: bytes) -> bytes:
        """All that comes back."""
        with self.connect() as connection:
            connection.sendall(data)
            return received(connection)

    def idle(self) -> None:
        """Returns once nothing is left of any request."""
        until(lambda: not self.engine.open and not self.engine.decoder)
        until(lambda: not self.server.server_state.tasks)


def received(connection: socket.socket) -> bytes:
    """All until the other side closes, or resets."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def posted(path: str, body: dict, headers: str = "") -> bytes:
    """A request as it goes over the wire."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\n{headers}Content-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


@contextlib.contextmanager
def serve(served: Served, key: str | None = None, buffer: int | None = None, **options) -> Iterator[Server]:
    with Engine(served.model, served.tokenizer, **options) as engine:
        server = Server(served, engine, key, buffer)
        try:
            yield server
        finally:
            server.stop()


def problem(response: httpx.Response, status: int) -> dict:
    """What an error says, in the shape that OpenAI's have."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    [(name, found)] = response.json().items()
    assert name == "error"
    assert set(found) == {"message", "type", "param", "code"}
    assert found["message"]
    return found


@pytest.fixture(scope="session")
def served(fine_tuned: Place) -> Served:
    """In float64: so that what is decoded together is exactly what each would be alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNS", str(fine_tuned.runs))
        patch.setenv("DATA", str(fine_tuned.raw))
        found = load(configs.load(fine_tuned.config))
    return dataclasses.replace(found, model=found.model.double())


@pytest.fixture(scope="session")
def server(served: Served) -> Iterator[Server]:
    with serve(served) as found:
        yield found
        found.idle()


@pytest.fixture(scope="session")
def endless(served: Served) -> Served:
    return Endless(**{field.name: getattr(served, field.name) for field in dataclasses.fields(served)})
