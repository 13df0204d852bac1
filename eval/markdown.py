"""Text that reads well as Markdown and on a terminal, whatever a model has written."""

import math
import re
import textwrap
import unicodedata

import cli

WIDTH = 100  # columns of text; a table may be wider
NUMBER = re.compile(r"[-−]?[\d.,]+(e[-+]?\d+)?( ± \S+)?( [↑↓=])?|inf|not finite|")
METRICS = {"validation": "bits_per_byte", "wikitext2": "bits_per_byte", "answers": "loss", "preference": "win_rate"}
METRICS |= {"smoke": "passed", "prompts": "repetition", "everyday": "repetition", "continuations": "repetition"}
HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # Unicode categories that a terminal would obey or not show


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, its columns of numbers aligned to the right."""
    cells = []
    for row in [head, *rows]:
        cells.append([" ".join(visible(text).split()).replace("|", "\\|") for text in row])
    columns = enumerate(zip(*cells[1:], strict=True))
    return cli.table(cells, [i for i, column in columns if all(map(NUMBER.fullmatch, column))], markdown=True)


def block(text: str) -> str:
    """Text of a model or a user, unchanged: indented, so that Markdown leaves it alone, and wrapped."""
    lines = []
    for line in visible(text if text.strip() else "(nothing)").split("\n"):
        lines += textwrap.wrap(line, WIDTH - 4, drop_whitespace=False, replace_whitespace=False) or [""]
    return "\n".join(f"    {line}".rstrip() for line in lines)


def visible(text: str) -> str:
    """Text with control and invisible characters as escapes, such as \\x1b."""
    shown = ""
    for c in str(text).replace("\t", "    "):
        hidden = c != "\n" and unicodedata.category(c) in HIDDEN
        shown += c.encode("unicode_escape").decode() if hidden else c
    return shown


def show(value) -> str:
    """A number with the digits that count. JSON holds null for a number that is not finite."""
    if value is None:
        return "not finite"
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    size = abs(value)
    if size >= 1000 or not math.isfinite(value):
        return f"{value:,.0f}"
    return f"{value:.3g}" if 0 < size < 0.01 else f"{value:.4f}"


def main_metric(task: str) -> str:
    """The metric that `stderr` and `baseline` of a task are about."""
    return METRICS.get(task, "accuracy")


def with_error(entry: dict, key: str, main: str) -> str:
    """A metric of a task with its standard error and, for a tested accuracy, the side of the baseline it is on."""
    text, error = show(entry[key]), entry.get(key.replace(main, "stderr"))
    if error is not None and main in key:
        text += f" ± {error:.2g}"
    if key == "accuracy" and "p_value" in entry:
        side = "↑" if entry["accuracy"] > entry["baseline"] else "↓"
        text += f" {side}" if entry["p_value"] < 0.05 else " ="
    return text
