"""The numbers in README.md and docs/ are those of benchmarks/results/ and of docs/report/results.json."""

import json
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

RESULTS = ROOT / "benchmarks/results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def lookup(found: dict, path: str) -> float:
    """The value at a path such as train.ratio; a key may have dots in it."""
    for key, value in found.items():
        if path == key:
            return value
        if path.startswith(f"{key}.") and isinstance(value, dict):
            return lookup(value, path[len(key) + 1 :])
    raise KeyError(path)


def cells(page: Path) -> list[list[str]]:
    """The rows of a page's tables."""
    lines = page.read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def sourced(page: Path) -> list[tuple[str, str, str]]:
    """(number, file, keys) of each row that names where its numbers are from."""
    rows = []
    for *_, number, source in (row for row in cells(page) if len(row) > 1):
        if match := re.fullmatch(r"`(\w+\.json): (.+)`", source):
            rows.append((number, *match.groups()))
    return rows


def agree(printed: str, value: float) -> bool:
    """Whether a printed number, such as 2,905 or 99.8 %, is the value rounded to its digits."""
    digits = printed.removesuffix(" %").replace(",", "")
    decimals = len(digits.partition(".")[2])
    value = 100 * value if printed.endswith("%") else value
    return abs(float(digits) - value) <= 0.500001 * 10**-decimals


def numbers(text: str) -> list[str]:
    return re.findall(r"\d(?:[\d,]*\d)?(?:\.\d+)?(?: %)?", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_numbers_are_those_of_the_results(page: Path):
    wrong = []
    for text, file, keys in sourced(page):
        directory = ROOT / "docs/report" if file == "results.json" else RESULTS
        found = json.loads((directory / file).read_text())
        values = [lookup(found, key) for key in keys.split(", ")]
        printed = numbers(text)
        assert len(printed) == len(values), f"{text!r} has other numbers than keys: {keys}"
        wrong += [(p, v, keys) for p, v in zip(printed, values, strict=True) if not agree(p, v)]
    assert not wrong


def test_commits_are_those_of_the_results():
    named = {row[0].strip("`"): row[-1] for row in cells(ROOT / "docs/measured.md") if row[0].endswith(".json`")}
    assert named == {path.name: json.loads(path.read_text())["commit"] for path in RESULTS.glob("*.json")}


def test_a_page_has_numbers():
    assert len(sourced(ROOT / "docs/measured.md")) > 30
    assert len(sourced(ROOT / "README.md")) > 5


def test_the_comparison_sees_a_wrong_digit():
    assert agree("2.58", 2.5848)
    assert agree("99.8 %", 0.9976)
    assert agree("2,905", 2905)
    assert not agree("2.59", 2.5848)
    assert not agree("93.6 %", 0.9375)
    assert not agree("2,906", 2905)
    assert numbers("1.48 and 1.24 times, 2,905 tokens/s, 99.8 % and 0") == ["1.48", "1.24", "2,905", "99.8 %", "0"]
