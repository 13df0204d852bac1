"""What the server counts, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from serving.engine import Engine, Generation

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0)  # upper ends of the buckets


class Metrics:
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
        common["buckets"] = SECONDS
        self.seconds = Histogram("lumi_request_seconds", "Seconds from a request to the end of its answer.", **common)
        self.first = Histogram("lumi_first_token_seconds", "Seconds from a request to its first token.", **common)

    def count(self, generation: Generation) -> None:
        """Counts the tokens of a generation that has ended."""
        self.prompt_tokens.inc(generation.prompt_tokens)
        self.generated_tokens.inc(len(generation.tokens))
        if generation.first:
            self.first.observe(generation.first - generation.asked)
