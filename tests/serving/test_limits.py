"""The key, CORS, limits of size and time, metrics, and the schema: as browsers, strangers and Prometheus see them."""

import time

import pytest
import schemathesis
import schemathesis.checks
from hypothesis import HealthCheck, given, settings
from prometheus_client.parser import text_string_to_metric_families
from schemathesis.specs.openapi import checks

from serving import api
from serving.schema import BODY
from tests.serving.conftest import Server, posted, problem, received, serve, slow, until

KEY = "ключ-ß"
RIGHT = {"Authorization": b"Bearer " + KEY.encode()}
ORIGIN = "http://localhost:3000"


# -------------------------------------------------------------------------------------------------------- key and CORS


@pytest.fixture(scope="module")
def locked(served):
    with serve(served, key=KEY, origins=[ORIGIN]) as server:
        yield server


def test_without_the_key_nothing_is_answered(locked: Server):
    wrong = [b"", b"Bearer", b"Bearer wrong", RIGHT["Authorization"][:-1], b"Bearer \xff\xfe", b"Basic " + KEY.encode()]
    for route in locked.app.routes:
        for method in route.methods:
            for value in wrong:
                response = locked.request(method, route.path.replace("{name}", "x"), headers={"Authorization": value})
                if route.path in ("/", "/health", "/favicon.ico", "/openapi.json"):
                    assert response.status_code in (200, 204)
                else:
                    assert problem(response, 401)["code"] == "invalid_api_key"
                    assert response.headers["www-authenticate"] == "Bearer"
    assert locked.get("/v1/models", headers=RIGHT).status_code == 200
    assert locked.post("/generate", json={"prompt": "x", "max_tokens": 1}, headers=RIGHT).status_code == 200


def test_a_page_of_an_allowed_origin_may_call_the_api(locked: Server, server: Server, monkeypatch):
    """A browser first sends a preflight, which never carries the key."""
    asked = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    asked["Access-Control-Request-Headers"] = "authorization,content-type,x-stainless-lang"
    preflight = locked.request("OPTIONS", "/v1/chat/completions", headers=asked)
    assert "POST" in preflight.headers["access-control-allow-methods"]
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    for response in (preflight, locked.get("/v1/models", headers={"Origin": ORIGIN} | RIGHT)):
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == ORIGIN
    json_type = {"Origin": ORIGIN, "Content-Type": "application/json"}
    monkeypatch.setattr(locked.engine, "submit", lambda _: {}["a defect"])
    for status, headers, content in (401, {}, b"{}"), (413, RIGHT, b" " * (BODY + 1)), (500, RIGHT, b'{"prompt": "x"}'):
        error = locked.post("/generate", content=content, headers=json_type | headers)
        assert (error.status_code, error.headers["access-control-allow-origin"]) == (status, ORIGIN)
    evil = locked.request("OPTIONS", "/v1/chat/completions", headers=asked | {"Origin": "http://evil.example"})
    for response in (evil, server.get("/v1/models", headers={"Origin": ORIGIN})):  # the second server allows none
        assert "access-control-allow-origin" not in response.headers


# -------------------------------------------------------------------------------------------------------------- limits


def test_a_body_may_be_as_large_as_the_limit_and_no_larger(server: Server):
    content = b'{"prompt": "x", "max_tokens": 1}'
    content += b" " * (BODY - len(content))
    json_type = {"Content-Type": "application/json"}
    assert server.post("/v1/completions", content=content, headers=json_type).is_success
    for larger in (content + b" ", iter([content, b" "])):  # the length of the second one is not announced
        response = server.post("/v1/completions", content=larger, headers=json_type)
        assert "more than 1,048,576 bytes" in problem(response, 413)["message"]
    server.works()


UNFINISHED = [
    b"",
    b"POST /generate HTTP/1.1\r\nHost: x\r\nX-Lo",
    b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{",
    b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /health HT",
]


def test_a_client_that_sends_too_slowly_is_dropped(server: Server, monkeypatch):
    monkeypatch.setattr(api, "PATIENCE", 0.3)
    connections = [(server.connect(), sent) for sent in UNFINISHED * 10]
    for connection, sent in connections:
        connection.sendall(sent)

    def trickle() -> None:
        with server.connect() as connection:
            for letter in b"GET /health HTTP/1.1\r\nX: " + b"x" * 100:
                connection.sendall(bytes([letter]))
                time.sleep(0.02)

    with pytest.raises(ConnectionError):
        trickle()
    server.works()
    for connection, _ in connections:
        received(connection)
        connection.close()
    server.works()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_never_reads_is_dropped(endless, monkeypatch, stream):
    """Its answer is larger than what the system keeps on the way."""
    monkeypatch.setattr(api, "PATIENCE", 0.3)
    with serve(endless) as server:
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4000 if stream else 20, "n": 16}
        body |= {"stream": stream, "logprobs": True, "top_logprobs": 20}
        with server.connect() as connection:
            connection.sendall(posted("/v1/chat/completions", body))
            until(lambda: server.engine.open)
            server.works()
            server.idle()
            until(lambda: not server.server.server_state.connections)


def test_an_answer_may_take_longer_than_the_patience(endless, monkeypatch):
    monkeypatch.setattr(api, "PATIENCE", 0.3)
    with serve(endless) as server:
        slow(server.engine, 0.1)
        response = server.post("/v1/completions", json={"prompt": "x", "max_tokens": 7})
        assert response.json()["usage"]["completion_tokens"] == 7


def test_after_many_requests_nothing_is_left(endless):
    """Good and bad requests, streams, and clients that leave: their answers would take longer than `until` waits."""
    with serve(endless, rows=3, waiting=4) as server:
        slow(server.engine, 0.01)
        body = {"prompt": "Return", "max_tokens": 8}
        for stream in (True, False) * 3:
            server.works()
            problem(server.post("/v1/completions", json={"prompt": 1}), 400)
            assert server.post("/v1/completions", json=body | {"stream": True}).text.endswith("data: [DONE]\n\n")
            with server.connect() as connection:
                connection.sendall(posted("/v1/completions", body | {"max_tokens": 4000, "stream": stream}))
                until(lambda: server.engine.open)
                [generation] = server.engine.open.values()
                until(lambda generation=generation: generation.tokens)
            until(lambda: not server.engine.open)
            assert generation.cancelled
        server.idle()
        assert server.engine.decoder.cache.used.sum() == 0
        until(lambda: not server.server.server_state.connections)


# ------------------------------------------------------------------------------------------------------------- metrics


def samples(server: Server) -> dict:
    """The value of each sample, by name and labels."""
    values = {}
    for family in text_string_to_metric_families(server.get("/metrics").text):
        assert family.documentation
        for sample in family.samples:
            values[(sample.name, *sample.labels.values())] = sample.value
    return values


def test_metrics_count_what_happened(served):
    with serve(served) as server:
        prompt = new = 0
        for n in (1, 2, 3):
            body = {"prompt": "Return", "max_tokens": 4, "n": n, "seed": n}
            usage = server.post("/v1/completions", json=body).json()["usage"]
            prompt, new = prompt + n * usage["prompt_tokens"], new + usage["completion_tokens"]
        server.post("/v1/completions", json={"prompt": 1})
        server.get("/nothing")
        until(lambda: samples(server)["lumi_generated_tokens_total",] == new)
        values = samples(server)
    assert values["lumi_requests_total", "/v1/completions", "200"] == 3
    assert values["lumi_requests_total", "/v1/completions", "400"] == 1
    assert values["lumi_requests_total", "other", "404"] == 1
    assert values["lumi_prompt_tokens_total",] == prompt
    assert values["lumi_request_seconds_count",] == values["lumi_request_seconds_bucket", "+Inf"] == 4
    assert values["lumi_first_token_seconds_count",] == 6
    assert (values["lumi_up",], values["lumi_running",], values["lumi_waiting",]) == (1, 0, 0)


def test_metrics_tell_what_is_under_way(endless):
    with serve(endless, rows=2) as server, server.connect() as connection:
        slow(server.engine, 0.02)
        connection.sendall(posted("/v1/completions", {"prompt": "x", "max_tokens": 4000, "n": 5, "stream": True}))
        until(lambda: sum(bool(text.tokens) for text in list(server.engine.open.values())) == 2)
        values = samples(server)
    assert (values["lumi_running",], values["lumi_waiting",]) == (2, 3)


# -------------------------------------------------------------------------------------------------------------- schema

NAMES = ("status_code_conformance", "content_type_conformance", "response_schema_conformance")
CHECKS = [schemathesis.checks.not_a_server_error, *(getattr(checks, name) for name in NAMES)]


def explore(server: Server, examples: int) -> set[tuple[str, int]]:
    """Sends what /openapi.json allows, and what it does not."""
    seen = set()
    for operation in schemathesis.openapi.from_url(f"{server.url}/openapi.json").get_all_operations():
        operation = operation.ok()

        def check(case) -> None:
            response = case.call(timeout=120)  # the machine may be busy
            seen.add((case.operation.label, response.status_code))
            case.validate_response(response, checks=CHECKS)

        for mode in schemathesis.GenerationMode if operation.body else [schemathesis.GenerationMode.POSITIVE]:
            some = given(case=operation.as_strategy(generation_mode=mode))(check)
            bounds = {"max_examples": examples, "deadline": None, "derandomize": True, "database": None}
            settings(**bounds, suppress_health_check=list(HealthCheck))(some)()
    return seen


@pytest.mark.parametrize("examples", [10, pytest.param(300, marks=pytest.mark.slow)])
def test_the_server_does_what_its_schema_says(server: Server, examples):
    seen = explore(server, examples)
    assert {200, 400} <= {status for _, status in seen}
    if examples > 10:
        for path in ("/v1/completions", "/v1/chat/completions", "/generate"):
            assert {(f"POST {path}", 200), (f"POST {path}", 400)} <= seen
    server.works()
