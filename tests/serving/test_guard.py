"""What stands before the API: bytes as no decent client sends them. After each, the next good request is served."""

import asyncio
import contextlib
import json
import time

import httpx
import pytest
import schemathesis
import schemathesis.checks
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi import checks

from serving import guard
from serving.schema import BODY
from tests.serving.conftest import Server, posted, problem, received, serve

KEY = "ключ-ß"
GET = b"GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def answered(connection) -> bytes:
    """One answer whose length is given."""
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += connection.recv(1 << 16)
    length = int(answer.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    while len(answer.partition(b"\r\n\r\n")[2]) < length:
        answer += connection.recv(1 << 16)
    return answer


def status(answer: bytes) -> int:
    assert answer.startswith(b"HTTP/1.1 "), answer[:100]
    return int(answer[9:12])


# ---------------------------------------------------------------------------------------------------------- too large


@pytest.mark.parametrize("path", ["/v1/completions", "/generate", "/nothing", "/"])
def test_a_body_that_is_too_large_is_refused(server: Server, path):
    content = b'{"prompt": "%s"}' % (b"x" * BODY)
    problem(server.post(path, content=content), 413)
    problem(server.post(path, content=iter([content[:1000], content[1000:]])), 413)  # chunked: no length is announced
    server.works()


def test_a_body_that_is_announced_as_huge_is_not_waited_for(server: Server):
    for length in (10**9, 10**19):
        answer = server.raw(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n{" % length)
        assert status(answer) == 413
        assert b"connection: close" in answer.lower()
    server.works()


def test_a_body_that_never_ends_is_not_kept(server: Server):
    def forever():
        for _ in range(10**6):
            yield b"x" * (1 << 16)

    with contextlib.suppress(httpx.WriteError):  # it is told so while it still sends
        problem(server.post("/generate", content=forever()), 413)
    server.works()


def test_a_body_as_large_as_may_be_is_read(server: Server):
    content = json.dumps({"prompt": "x"}).encode()
    content += b" " * (BODY - len(content))
    problem(server.post("/v1/completions", content=content + b" "), 413)
    assert server.post("/v1/completions", content=content, headers={"Content-Type": "application/json"}).is_success


# ------------------------------------------------------------------------------------------------------------- the key


def test_without_the_key_nothing_is_served(served):
    with serve(served, KEY) as server:
        right = {"Authorization": b"Bearer " + KEY.encode()}
        wrong = [
            {},
            {"Authorization": b""},
            {"Authorization": b"Bearer"},
            {"Authorization": b"Bearer wrong"},
            {"Authorization": b"Bearer " + KEY.encode()[:-1]},
            {"Authorization": b"Bearer " + KEY.upper().encode()},
            {"Authorization": b"Bearer \xff\xfe"},
            {"Authorization": b"Basic " + KEY.encode()},
            {"Authorization": KEY.encode()},
            {"X-Api-Key": KEY.encode()},
        ]
        routes = {
            (method, route.path.replace("{name}", "mini-sft"))
            for route in server.app.routes
            for method in route.methods
        }
        routes |= {("GET", "/nothing"), ("DELETE", "/v1/models"), ("OPTIONS", "/generate"), ("POST", "/health/")}
        closed = 0
        for method, path in sorted(routes):
            for headers in wrong:
                found = server.client.request(method, path, headers=headers)
                if path in ("/", "/health", "/favicon.ico"):
                    assert found.status_code in (200, 204, 405)
                elif method == "HEAD":
                    assert found.status_code == 401
                else:
                    assert problem(found, 401)["code"] == "invalid_api_key"
                    assert found.headers["www-authenticate"] == "Bearer"
                    closed += 1
        assert closed >= 8 * len(wrong)
        assert server.get("/v1/models", headers=right).status_code == 200
        assert server.get("/v1/models", headers={"Authorization": b"bearer  " + KEY.encode()}).status_code == 200
        body = {"prompt": "x", "max_tokens": 1}
        assert server.post("/v1/completions", body, headers=right).status_code == 200
        assert not server.engine.open
        large = b"x" * (BODY + 1)
        problem(server.post("/generate", content=large), 401)


def test_without_the_key_a_body_is_not_read(served):
    """Nor does the rest of it keep the connection."""
    with serve(served, KEY) as server, server.connect() as connection:
        connection.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n{")
        assert status(connection.recv(1 << 16)) == 401


# ------------------------------------------------------------------------------------------------------- slow clients


@pytest.fixture
def impatient(monkeypatch):
    for name in ("HEAD_SECONDS", "BODY_SECONDS", "STALL_SECONDS"):
        monkeypatch.setattr(guard, name, 0.3)


def trickle(connection, data: bytes) -> float:
    """Sends a byte at a time until the other side has enough of it: the seconds that took."""
    started = time.monotonic()
    connection.settimeout(0.03)
    for i in range(len(data)):
        try:
            connection.sendall(data[i : i + 1])
            if connection.recv(1, 2) == b"":  # MSG_PEEK
                break
        except TimeoutError:
            continue
        except OSError:
            break
        else:
            break
    connection.settimeout(10)
    return time.monotonic() - started


HEAD = b"POST /generate HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * 500


@pytest.mark.parametrize("first", [b"", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"])
def test_a_head_that_is_trickled_is_not_waited_for(server: Server, impatient, first):
    """Not of the first request of a connection, nor of the next."""
    with server.connect() as connection:
        if first:
            connection.sendall(first)
            assert status(answered(connection)) == 200
        assert trickle(connection, HEAD) < 2
        assert received(connection) == b""
    server.works()


def test_who_says_nothing_is_not_waited_for(server: Server, impatient):
    with server.connect() as connection:
        assert received(connection) == b""
    server.works()


def test_a_body_that_is_trickled_is_not_waited_for(server: Server, impatient):
    with server.connect() as connection:
        connection.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n")
        server.works()  # meanwhile
        assert trickle(connection, b"x" * 400) < 2
        assert status(received(connection)) == 408
    server.works()


def test_a_client_may_think_between_two_requests(server: Server, impatient):
    """But for as long as any keep-alive connection."""
    with server.connect() as connection:
        for _ in range(3):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert status(answered(connection)) == 200
            time.sleep(0.4)


def test_an_answer_may_take_longer_than_a_head(endless, impatient):
    with serve(endless) as server:
        step = server.engine.decoder.step
        server.engine.decoder.step = lambda: (time.sleep(0.1), step())[1]
        found = server.post("/v1/completions", {"prompt": "x", "max_tokens": 7})
        assert found.json()["usage"]["completion_tokens"] == 7


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_never_reads_is_let_go(endless, impatient, stream):
    """Its answer is larger than what the system keeps of it on the way."""
    with serve(endless, buffer=4096) as server:
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 10 if not stream else 4000, "n": 16}
        body |= {"stream": stream, "logprobs": True, "top_logprobs": 20}
        with server.connect(receive=4096) as connection:
            connection.sendall(posted("/v1/chat/completions", body))
            until_closed = time.monotonic() + 10
            while not server.engine.open:
                assert time.monotonic() < until_closed
            server.works()
            server.idle()
            assert time.monotonic() < until_closed
            while server.server.server_state.connections:
                assert time.monotonic() < until_closed
                time.sleep(0.01)
        server.works()


def test_hundreds_who_say_nothing_do_not_keep_others_out(server: Server, impatient):
    connections = [server.connect() for _ in range(200)]
    try:
        server.works()
        for connection in connections:
            assert received(connection) == b""
    finally:
        for connection in connections:
            connection.close()
    server.works()


# ---------------------------------------------------------------------------------------------------------- odd bytes

PATHS = [
    b"/../../etc/passwd",
    b"/../../../../../../etc/passwd",
    b"/%2e%2e/%2e%2e/etc/passwd",
    b"/..%2f..%2fetc%2fpasswd",
    b"/%252e%252e/etc/passwd",
    b"//etc/passwd",
    b"/\\..\\..\\etc\\passwd",
    b"/v1/models/..%2f..%2f..%2fetc%2fpasswd",
    b"/v1/models/%2e%2e",
    b"/v1/models/..",
    b"/v1/models/%00",
    b"/v1/models/%ff%fe",
    b"/v1/models/%ed%a0%80",
    b"/v1/models/mini-sft/",
    b"/%00",
    b"/\x00",
    b"/\xff",
    b"/page.html",
    b"/static/../page.html",
    b"/serving/api.py",
    b"http://etc/passwd",
    b"file:///etc/passwd",
    b"*",
    b"/" + b"a" * 60_000,
    b"/v1/models/" + b"a" * 60_000,
    b"/" + b"a" * 200_000,
    b"/?" + b"a" * 60_000,
]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: repr(path[:30]))
def test_no_path_leads_to_the_disk(server: Server, path):
    answer = server.raw(GET % path)
    assert status(answer) == 200 if path.startswith(b"/?") else status(answer) in (400, 404)
    assert b"root:" not in answer
    assert b"import " not in answer
    server.works()


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),  # TLS
        b"GET /\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",  # no Host
        b"GET / HTTP/1.1\r\nHost: x\r\nbroken\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
        b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\nzz\r\n",
    ],
    ids=lambda data: repr(data[:40]),
)
def test_what_is_no_http_is_refused(server: Server, impatient, data):
    answer = server.raw(data)
    assert not answer or status(answer) >= 400
    server.works()


def test_thousands_of_headers_harm_nobody(server: Server):
    head = GET % b"/health"
    assert status(server.raw(head[:-2] + b"X: y\r\n" * 20_000 + b"\r\n")) in (200, 400, 431)
    server.works()


def test_an_upgrade_is_passed_over(server: Server):
    answer = server.raw(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: upgrade, close\r\nUpgrade: websocket\r\n\r\n")
    assert status(answer) == 200


def test_pipelined_requests_are_answered_in_order(server: Server):
    bodies = [{"prompt": "Return", "max_tokens": n, "temperature": 0} for n in (6, 1, 3)]
    requests = [posted("/v1/completions", body) for body in bodies]
    answer = server.raw(b"".join(requests) + GET % b"/health")
    heads = answer.split(b"HTTP/1.1 ")[1:]
    assert [head[:3] for head in heads] == [b"200"] * 4
    used = [json.loads(head.partition(b"\r\n\r\n")[2])["usage"]["completion_tokens"] for head in heads[:3]]
    alone = [server.post("/v1/completions", body).json()["usage"]["completion_tokens"] for body in bodies]
    assert used == alone
    assert b'"status":"ok"' in heads[3]


def test_a_client_that_leaves_before_its_body_is_whole_is_forgotten(server: Server):
    for _ in range(10):
        with server.connect() as connection:
            connection.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{")
    server.works()
    server.idle()


def test_no_exception_is_left_behind(server: Server, caplog):
    """What uvicorn logs of a request that ended by a defect."""
    asyncio.run(abandon(server))
    server.idle()
    assert not [record for record in caplog.records if record.exc_info]


async def abandon(server: Server) -> None:
    """Leaves in the middle of what comes, at several places."""
    for size in (1, 20, 200):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(posted("/v1/completions", {"prompt": "x", "max_tokens": 60, "stream": True}))
        await reader.read(size)
        writer.transport.abort()


# -------------------------------------------------------------------------------------------------- what it says it is

CHECKS = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]


def explore(server: Server, examples: int) -> set[tuple[str, int]]:
    """Asks what /openapi.json says may be asked, and what it says may not."""
    seen = set()
    for operation in schemathesis.openapi.from_url(f"{server.url}/openapi.json").get_all_operations():
        operation = operation.ok()

        def check(case) -> None:
            response = case.call(timeout=30)
            seen.add((case.operation.label, response.status_code))
            case.validate_response(response, checks=CHECKS)

        for mode in schemathesis.GenerationMode if operation.body else [schemathesis.GenerationMode.POSITIVE]:
            some = given(case=operation.as_strategy(generation_mode=mode))(check)
            bounds = {"max_examples": examples, "deadline": None, "derandomize": True, "database": None}
            settings(**bounds, suppress_health_check=list(HealthCheck))(some)()
    return seen


def test_it_is_as_its_schema_says(server: Server):
    statuses = {status for _, status in explore(server, 10)}
    assert {200, 400} <= statuses
    server.works()


@pytest.mark.slow
def test_it_is_as_its_schema_says_by_many_examples(server: Server):
    paths = ("/v1/completions", "/v1/chat/completions", "/generate")
    assert {(f"POST {path}", status) for path in paths for status in (200, 400)} <= explore(server, 300)
    server.works()
