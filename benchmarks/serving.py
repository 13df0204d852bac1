"""The server under load: requests together beside the same one after another, and a soak.

    python -m benchmarks.serving configs/tiny.py   ->  benchmarks/results/serving.json

A real server process of the experiment's latest model, asked over HTTP with held-out text to go on with. Both ways are
timed in turn, round by round; quoted is the median of the rounds' ratios.
"""

import argparse
import asyncio
import collections
import json
import os
import random
import re
import statistics
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import cli
import configs
import data.pack
import pipeline
from benchmarks.common import command, parser, run, write

CLIENTS = 8
DONE = b"data: [DONE]"
NEAR = 1e-4  # nats between two candidates, under which either may be taken


class Size(NamedTuple):
    """How much is asked. requests: a round and way."""

    requests: int = 32
    rounds: int = 5
    new_tokens: int = 128
    soak: int = 2_000


QUICK = Size(8, 1, 8, 24)


@dataclass
class Answer:
    """status: of the response. seconds: until its end, and until its first event. lines: read only when no time is
    taken."""

    status: int = 0
    seconds: float = 0.0
    first: float = 0.0
    lines: list[bytes] = field(default_factory=list)

    @cached_property
    def parts(self) -> list[dict]:
        """The objects that it consists of."""
        return [json.loads(line.removeprefix(b"data: ")) for line in self.lines if line.strip(b"\n") not in (b"", DONE)]

    @property
    def text(self) -> str:
        return "".join(choice["text"] for part in self.parts for choice in part.get("choices", []))

    @property
    def tokens(self) -> int:
        return self.parts[-1]["usage"]["completion_tokens"]

    @property
    def failed(self) -> bool:
        return any("error" in part for part in self.parts)


async def ask(port: int, path: str, body: dict, leave_after: int | None = None) -> Answer:
    """One request on a connection of its own. leave_after: lines after which the client goes away."""
    found, started = Answer(), time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    found.status = int((await reader.readline()).split()[1])
    while (await reader.readline()).strip():
        pass
    async for line in reader:
        found.first = found.first or time.perf_counter() - started
        found.lines.append(line)
        if len(found.lines) == leave_after:
            break
    found.seconds = time.perf_counter() - started
    writer.close()
    return found


async def crowd(jobs: list[Callable[[], Coroutine]], clients: int) -> list:
    """What each job gives, with so many under way at any time."""
    found, left = [None] * len(jobs), iter(enumerate(jobs))

    async def client() -> None:
        for i, job in left:
            found[i] = await job()

    await asyncio.gather(*(client() for _ in range(clients)))
    return found


class Prompts:
    """Beginnings that the model has not seen, as ids: of the held-out documents."""

    def __init__(self, experiment: configs.Experiment, seed: int):
        packed = data.pack.load(experiment.directory("pack"), experiment.load_tokenizer().sha256)
        self.tokens = packed["val"].tokens
        self.random = random.Random(seed)

    def draw(self, least: int, most: int) -> list[int]:
        length = self.random.randint(least, most)
        start = self.random.randrange(len(self.tokens) - length)
        return self.tokens[start : start + length].tolist()


def percentiles(seconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {"p50": round(cuts[49], 3), "p99": round(cuts[98], 3)}


async def load(port: int, prompts: Prompts, size: Size, options: dict) -> dict:
    """Tokens/s of CLIENTS at once and of one, for the same requests, and how long each had to wait."""
    ratios, rates, answers = [], {1: [], CLIENTS: []}, {1: [], CLIENTS: []}
    for i in range(size.rounds + 1):
        bodies = []
        for j in range(size.requests):
            body = {"prompt": prompts.draw(16, 64), "max_tokens": size.new_tokens, "ignore_eos": True}
            bodies.append(body | {"seed": 1000 * i + j} | options)
        for clients in rates:
            started = time.perf_counter()
            found = await crowd([lambda b=b: ask(port, "/v1/completions", b) for b in bodies], clients)
            if i:  # the first round does not count
                rates[clients].append(size.requests * size.new_tokens / (time.perf_counter() - started))
                answers[clients] += found
        if i:
            ratios.append(rates[CLIENTS][-1] / rates[1][-1])
    together = answers[CLIENTS]
    first = {
        "first_token_seconds": percentiles([a.first for a in together]),
        "one_after_another_first_token_seconds": percentiles([a.first for a in answers[1]]),
    }
    return {
        "together_vs_one_after_another": round(statistics.median(ratios), 2),
        "of_each_round": [round(r, 2) for r in ratios],
        "tokens_per_second": round(statistics.median(rates[CLIENTS]), 1),
        "one_after_another_tokens_per_second": round(statistics.median(rates[1]), 1),
        "requests": len(together),
        "shorter": sum(a.tokens != size.new_tokens for a in together + answers[1]),
        "seconds": percentiles([a.seconds for a in together]),
        "one_after_another_seconds": percentiles([a.seconds for a in answers[1]]),
        "same_text": sum(a.text == b.text for a, b in zip(together, answers[1], strict=True)),
        **(first if options.get("stream") else {}),
    }


async def soak(port: int, pid: int, prompts: Prompts, requests: int, context: int) -> dict:
    """Mixed requests by twice as many clients as rows; then each greedy one again, alone."""
    chance, bodies = prompts.random, []
    for i in range(requests):
        kind = chance.choice(("greedy", "greedy", "sampled", "streamed", "left", "wrong"))
        body = {"prompt": prompts.draw(1, 48 if chance.random() < 0.9 else context - 1)}
        body["max_tokens"] = chance.randint(1, 48)
        match kind:
            case "greedy":
                body |= {"temperature": 0, "logprobs": 2}
            case "sampled":
                body |= {"n": chance.randint(1, 3), "seed": i, "top_p": 0.9, "stop": ["\n", "the"], "top_k": 50}
            case "streamed" | "left":
                body |= {"stream": True, "seed": i, "temperature": 0.7}
            case "wrong":
                body |= chance.choice(({"max_tokens": -2}, {"prompt": []}, {"temperature": "hot"}, {"tools": [1]}))
        bodies.append((kind, body))
    memory, left = [], requests

    async def one(kind: str, body: dict) -> Answer:
        nonlocal left
        answer = await ask(port, "/v1/completions", body, 3 if kind == "left" else None)
        left -= 1
        if left % max(1, requests // 10) == 0:
            memory.append(resident(pid))
        return answer

    found = await crowd([lambda k=k, b=b: one(k, b) for k, b in bodies], 2 * CLIENTS)
    wrong = [a for (kind, _), a in zip(bodies, found, strict=True) if a.status != (400 if kind == "wrong" else 200)]
    greedy = [(body, a) for (kind, body), a in zip(bodies, found, strict=True) if kind == "greedy"]
    other, near = 0, 0
    for body, together in greedy:
        alone = await ask(port, "/v1/completions", body)
        if alone.text != together.text:
            near, other = near + close(together, alone), other + (not close(together, alone))
    return {
        "requests": requests,
        "errors": len(wrong) + sum(a.status == 200 and a.failed for a in found),
        "greedy": len(greedy),
        "greedy_other_than_alone": other,
        "greedy_other_within_1e-4": near,
        "resident_mib": memory,
    }


def close(a: Answer, b: Answer) -> bool:
    """Whether two greedy answers part where the two likeliest tokens are as likely as each other, nearly."""
    a, b = (answer.parts[0]["choices"][0]["logprobs"] for answer in (a, b))
    tokens = zip(a["tokens"], b["tokens"], strict=False)
    at = next((i for i, (one, other) in enumerate(tokens) if one != other), None)
    if at is None:  # one has ended, of which there are no probabilities
        return False
    best, second = sorted(a["top_logprobs"][at].values(), reverse=True)[:2]
    return best - second < NEAR


def resident(pid: int) -> int:
    """MiB of memory that a process has now."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) // 1024


async def measure(experiment: configs.Experiment, port: int, pid: int, size: Size) -> dict:
    prompts = Prompts(experiment, seed=0)
    sampled = {"temperature": 0.7, "top_p": 0.9}
    streamed = sampled | {"stream": True, "stream_options": {"include_usage": True}}
    return {
        "greedy": await load(port, prompts, size, {"temperature": 0}),
        "sampled": await load(port, prompts, size, sampled),
        "sampled_streams": await load(port, prompts, size, streamed),
        "soak": await soak(port, pid, prompts, size.soak, experiment.model.context_length),
    }


def main(arguments: argparse.Namespace) -> None:
    configs.load(arguments.config)  # raises the error of a wrong path
    if arguments.quick:
        pipeline.main(pipeline.parser().parse_args([arguments.config, "pretrain"]))
    reading, writing = os.pipe()
    server = command("serve.py", arguments.config, "api", "--port", "0", "--batch-size", str(CLIENTS), stdout=writing)
    os.close(writing)
    with open(reading) as lines:
        line = lines.readline()
        if not line:
            raise RuntimeError("the server did not start; its error stands above")
        port = int(re.search(r":(\d+):", line)[1])
        threading.Thread(target=collections.deque, args=(lines, 0)).start()  # or it would fill the pipe
        size = QUICK if arguments.quick else Size(soak=arguments.requests)
        try:
            measured = asyncio.run(measure(configs.load(arguments.config), port, server.pid, size))
        finally:
            server.terminate()
            server.join()
    found = {"model": line.split()[0], "clients": CLIENTS} | measured
    write("serving", f"python -m benchmarks.serving {arguments.config}", found, arguments.quick)


if __name__ == "__main__":
    p = parser(__doc__, "configs/tiny.py")
    p.add_argument("--requests", type=cli.positive, default=2000, metavar="N", help="of the soak (2000)")
    run(main, p)
