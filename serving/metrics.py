"""What the server counts, in the text format that Prometheus reads (its "exposition format", version 0.0.4)."""

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0)  # where the buckets end


class Metrics:
    """Counts that only rise, and histograms of seconds. Used by one thread, the server's."""

    def __init__(self, help: Mapping[str, str]):
        self.help = help
        self.counts: Counter[tuple[str, str]] = Counter()  # by name and labels
        self.seconds: dict[str, list[int]] = defaultdict(lambda: [0] * (len(SECONDS) + 1))  # by name, a bucket each
        self.sums: Counter[str] = Counter()

    def add(self, name: str, amount: int = 1, **labels) -> None:
        self.counts[name, ",".join(f'{key}="{value}"' for key, value in labels.items())] += amount

    def observe(self, name: str, seconds: float) -> None:
        self.seconds[name][bisect_left(SECONDS, seconds)] += 1
        self.sums[name] += seconds

    def lines(self, gauges: Mapping[str, float]) -> Iterator[str]:
        """The page, a line at a time. gauges: what is so just now."""
        for name, text in self.help.items():
            yield f"# HELP {name} {text}"
            if name in gauges:
                yield f"# TYPE {name} gauge"
                yield f"{name} {gauges[name]:g}"
            elif name.endswith("_seconds"):
                yield f"# TYPE {name} histogram"
                so_far = 0
                for end, count in zip([*map(str, SECONDS), "+Inf"], self.seconds[name], strict=True):
                    so_far += count
                    yield f'{name}_bucket{{le="{end}"}} {so_far}'
                yield f"{name}_sum {self.sums[name]}"
                yield f"{name}_count {so_far}"
            else:
                yield f"# TYPE {name} counter"
                for (own, labels), count in sorted(self.counts.items()):
                    if own == name:
                        yield f"{name}{{{labels}}} {count}" if labels else f"{name} {count}"
