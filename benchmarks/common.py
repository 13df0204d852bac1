"""What all benchmarks share: timing in turn, ratios, and results with the machine, versions and commit."""

import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import machine
import stage

RESULTS = Path(__file__).parent / "results"


def interleaved(rounds: int, functions: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of each function in each round, timed in turn after an uncounted round: a slow minute slows all."""
    seconds = {name: [] for name in functions}
    for i in range(rounds + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if i:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """The median over the rounds of the quotient."""
    return round(statistics.median(a / b for a, b in zip(numerator, denominator, strict=True)), 3)


def output(*command: str) -> str:
    """What a command prints; empty if it is not installed."""
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def write(name: str, command: str, found: dict, quick: bool = False) -> None:
    """Prints the results, and writes them to results/NAME.json unless this was a quick run."""
    commit = output("git", "-C", str(RESULTS), "describe", "--always", "--dirty", "--exclude=*")
    about = {"command": command, "commit": commit, "machine": machine.name(machine.pick_device())}
    found = about | {"versions": stage.versions()} | found
    print(json.dumps(found, indent=2))
    if not quick:
        RESULTS.mkdir(exist_ok=True)
        stage.write_json(RESULTS / f"{name}.json", found)
