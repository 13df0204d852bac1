"""A server as clients see it: on a socket, with the small fine-tuned model."""

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
        assert time.monotonic() < end, "it never became true"
        time.sleep(0.002)


class Endless(Served):
    """Its texts end by their length only."""

    stop = ()


class Server:
    """A server in a thread. The system keeps little of what is sent and not yet read."""

    def __init__(self, served: Served, engine: Engine, **options):
        self.served, self.engine = served, engine
        self.app = api.create_app(served, engine, **options)
        self.server = api.Server(self.app, engine)
        listening = api.listen("127.0.0.1", 0)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.port = listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        alone = httpx.Limits(max_keepalive_connections=0)  # a connection for each request
        self.client = httpx.Client(base_url=self.url, timeout=30, limits=alone)
        self.get, self.post, self.request = self.client.get, self.client.post, self.client.request
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listening]})
        self.thread.start()
        until(lambda: self.server.started)

    def stop(self) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()

    def works(self) -> None:
        """A good request is answered."""
        response = self.post("/v1/completions", json={"prompt": "Return", "max_tokens": 2, "temperature": 0})
        assert response.status_code == 200, response.text
        assert response.json()["usage"]["completion_tokens"] <= 2

    def connect(self) -> socket.socket:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(10)
        connection.connect(("127.0.0.1", self.port))
        return connection

    def idle(self) -> None:
        """Returns when nothing is left of any request."""
        until(lambda: not self.engine.open and not self.engine.decoder)
        until(lambda: not self.server.server_state.tasks)


def received(connection: socket.socket) -> bytes:
    """All until the other side closes or resets the connection."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def posted(path: str, body: dict, headers: str = "") -> bytes:
    """A request as bytes."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\n{headers}Content-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def problem(response: httpx.Response, status: int) -> dict:
    """The error of a response, in OpenAI's form."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    [(name, error)] = response.json().items()
    assert name == "error"
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@contextlib.contextmanager
def serve(served: Served, key: str | None = None, origins=(), **options) -> Iterator[Server]:
    with Engine(served.model, **options) as engine:
        server = Server(served, engine, key=key, origins=origins)
        try:
            yield server
        finally:
            server.stop()


def slow(engine: Engine, seconds: float) -> None:
    """Makes each step take a while."""
    step = engine.decoder.step
    engine.decoder.step = lambda: (time.sleep(seconds), step())[1]


@pytest.fixture(scope="session")
def served(fine_tuned: Place) -> Served:
    """In float64: a text decoded beside others is then exactly the text decoded alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNS", str(fine_tuned.runs))
        patch.setenv("DATA", str(fine_tuned.raw))
        loaded = load(configs.load(fine_tuned.config))
    return dataclasses.replace(loaded, model=loaded.model.double())


@pytest.fixture(scope="session")
def server(served: Served) -> Iterator[Server]:
    with serve(served) as running:
        yield running
        running.idle()


@pytest.fixture(scope="session")
def endless(served: Served) -> Served:
    return Endless(**vars(served))
