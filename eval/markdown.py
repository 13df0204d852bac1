"""Text that reads well as Markdown and in a terminal alike, whatever a model has put into it."""

import math
import re
import textwrap
import unicodedata

WIDTH = 100  # columns of text; a table may take more
NUMBER = re.compile(r"[-−]?[\d.,]+(e[-+]?\d+)?( ± [\d.,]+)?( [↑↓=])?|[-−]?inf|nan|not finite|–|")


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown, its columns aligned; to the right those that hold numbers."""
    cells = [[cell(text) for text in row] for row in [head, *rows]]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    right = [all(NUMBER.fullmatch(text) for text in column[1:]) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)) + " |"
        for row in cells
    ]
    rule = "|" + "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def cell(text: str) -> str:
    text = " ".join(visible(text).split())
    return (text if len(text) <= 96 else text[:95] + "…").replace("|", "\\|")


def block(text: str) -> str:
    """Text that a model or a user may have written, as it is: indented, so that Markdown leaves it alone, and cut into
    lines that fit. Half of a wide character is a NUL, which was none of the text's own, for as long as it is cut."""
    lines = []
    if not text.strip():
        text = "(nothing but white space)" if text else "(nothing: for the model the text ends here)"
    for line in visible(text).split("\n"):
        wide = "".join(c + "\0" if unicodedata.east_asian_width(c) in "WF" else c for c in line)
        cut = textwrap.wrap(wide, WIDTH - 4, drop_whitespace=False, replace_whitespace=False, break_on_hyphens=False)
        lines += [each.replace("\0", "").rstrip() for each in cut] or [""]
    return "\n".join(f"    {line}".rstrip() for line in lines)


def visible(text: str) -> str:
    """What a terminal would obey, and what no one would see, spelt out: \\x1b, not an escape."""
    kept = str(text).replace("\t", "    ")
    hidden = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    return "".join(
        c if c == "\n" or unicodedata.category(c) not in hidden else c.encode("unicode_escape").decode() for c in kept
    )


def wrapped(text: str) -> str:
    """A paragraph, or a list, of lines that fit."""
    fill = textwrap.TextWrapper(WIDTH, break_on_hyphens=False, break_long_words=False)
    lines = []
    for line in text.split("\n"):
        fill.subsequent_indent = "  " if line.startswith("- ") else ""
        lines.append(fill.fill(line))
    return "\n".join(lines)


def number(given) -> bool:
    return isinstance(given, (int, float)) and not isinstance(given, bool)


def finite(given) -> bool:
    return number(given) and math.isfinite(given)


def show(given) -> str:
    """A number as a reader wants it: whole ones whole, others to the digits that count. None is one that is not finite:
    JSON has no other name for it."""
    if not number(given):
        return "not finite" if given is None else str(given)
    if isinstance(given, int) or not math.isfinite(given):
        return f"{given:,}"
    size = abs(given)
    if size < 10:
        return f"{given:.3g}" if 0 < size < 0.01 else f"{given:.4f}"
    return f"{given:,.2f}" if size < 1000 else f"{given:,.0f}"


def clock(seconds: float | None) -> str:
    if seconds is None:
        return "not noted"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60:,} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def plural(n: int, thing: str) -> str:
    return f"{n:,} {thing}" + "s" * (n != 1)
