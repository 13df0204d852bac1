"""/metrics as Prometheus' own parser reads it."""

import math
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.metrics import SECONDS, Metrics
from tests.serving.conftest import posted, serve, until


def families(text: str) -> dict:
    found = {family.name: family for family in text_string_to_metric_families(text)}
    assert all(family.documentation for family in found.values())
    return found


def value(found: dict, name: str, **labels) -> float:
    family = found[name.removesuffix("_total")]
    return sum(s.value for s in family.samples if s.name == name and labels.items() <= s.labels.items())


def check_histogram(family, count: int) -> None:
    assert family.type == "histogram"
    buckets = [(float(s.labels["le"]), s.value) for s in family.samples if s.name.endswith("_bucket")]
    assert [end for end, _ in buckets] == [*SECONDS, math.inf]
    assert [n for _, n in buckets] == sorted(n for _, n in buckets)
    [counted] = (s.value for s in family.samples if s.name.endswith("_count"))
    [total] = (s.value for s in family.samples if s.name.endswith("_sum"))
    assert buckets[-1][1] == counted == count
    previous = 0
    low = high = 0.0
    for (end, n), start in zip(buckets, (0, *SECONDS), strict=True):  # the sum is one that the buckets allow
        low, high, previous = low + (n - previous) * start, high + (n - previous) * end if n > previous else high, n
    assert low <= total <= high or not count


def test_metrics_are_what_happened(served):
    """Of a server of its own, with known requests."""
    with serve(served) as server:

        def read() -> dict:
            response = server.get("/metrics")
            assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
            return families(response.text)

        before = read()
        assert before["lumi_up"].type == "gauge"
        assert value(before, "lumi_up") == 1
        assert value(before, "lumi_generated_tokens_total") == 0
        prompt = drawn = 0
        for n in (1, 2, 3):
            usage = server.post("/v1/completions", {"prompt": "Return", "max_tokens": 4, "n": n, "seed": n}).json()[
                "usage"
            ]
            prompt, drawn = prompt + n * usage["prompt_tokens"], drawn + usage["completion_tokens"]
        server.post("/v1/completions", {"prompt": 1})
        server.post("/generate", {"prompt": ""})
        server.get("/nothing")
        server.get("/v1/models/none-such")
        for _ in range(3):
            server.get("/health")
        found = read()
        asked = "lumi_requests_total"
        assert found["lumi_requests"].type == "counter"
        assert value(found, asked, path="/v1/completions", status="200") == 3
        assert value(found, asked, path="/v1/completions", status="400") == 1
        assert value(found, asked, path="/generate", status="400") == 1
        assert value(found, asked, path="other", status="404") == 2
        assert value(found, asked, path="/health", status="200") == 3
        assert value(found, asked, path="/metrics", status="200") == 1
        assert value(found, asked) == 11
        assert value(found, "lumi_prompt_tokens_total") == prompt
        assert value(found, "lumi_generated_tokens_total") == drawn
        check_histogram(found["lumi_request_seconds"], 5)
        check_histogram(found["lumi_first_token_seconds"], 6)
        assert value(found, "lumi_running") == value(found, "lumi_waiting") == 0


def test_metrics_say_what_is_under_way(endless):
    with serve(endless, rows=2) as server:
        step = server.engine.decoder.step
        server.engine.decoder.step = lambda: (time.sleep(0.02), step())[1]
        with server.connect() as connection:
            connection.sendall(posted("/v1/completions", {"prompt": "x", "max_tokens": 4000, "n": 5, "stream": True}))
            until(lambda: sum(generation.tokens > 0 for generation in list(server.engine.open.values())) == 2)
            found = families(server.get("/metrics").text)
            assert value(found, "lumi_running") == 2
            assert value(found, "lumi_waiting") == 3
        server.idle()
        until(lambda: value(families(server.get("/metrics").text), "lumi_requests_total", path="/v1/completions") == 1)
        found = families(server.get("/metrics").text)
        assert value(found, "lumi_running") == value(found, "lumi_waiting") == 0
        assert value(found, "lumi_generated_tokens_total") >= 2


@pytest.mark.parametrize("seconds", [0.0, 0.01, 0.010001, 3.0, 100.0, 1e6])
def test_a_time_counts_in_each_bucket_that_it_is_not_past(seconds):
    metrics = Metrics({"some_seconds": "Some."})
    metrics.observe("some_seconds", seconds)
    [family] = families("\n".join(metrics.lines({})) + "\n").values()
    buckets = {float(s.labels["le"]): s.value for s in family.samples if s.name.endswith("_bucket")}
    assert buckets == {end: float(seconds <= end) for end in (*SECONDS, math.inf)}
