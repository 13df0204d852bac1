"""The prompts (prompts.json) and the rules that judge the answers. Both were fixed before any model had answered."""

# Anyone can check a rule by reading the answer. Rules find failures: expected words are missing, loops, marks of a chat
# template, too few or too many words. They do not find quality. An answer passes if it passes every rule.

import fnmatch
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import stage

MARKS = ("<|", "|>", "[INST]", "<s>", "</s>", "###", "```", "Human:", "User:", "Assistant:", "System:", "\ufffd")
REPEATED = 0.2  # the largest share of four-word runs that may repeat an earlier run


class Prompt(NamedTuple):
    category: str
    text: str
    expected: list[str]  # the answer must have `least` of these words; a * at the end stands for any ending
    words: tuple[int, int]  # the fewest and the most words of an answer
    least: int


TEXTS = stage.read_json(Path(__file__).with_suffix(".json"))
SMOKE = {prompt["text"]: Prompt(**prompt) for prompt in TEXTS["smoke"]}


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"\w+(?:['’]\w+)*", text.lower())


def distinct(texts: Sequence[Sequence[str]], n: int) -> float:
    """Distinct runs of n words over all runs, in several texts together (distinct-n, arXiv:1510.03055); 0 if none."""
    runs = []
    for tokens in texts:
        runs += zip(*(tokens[i:] for i in range(n)), strict=False)
    return len(set(runs)) / max(1, len(runs))


def repetition(tokens: Sequence[str]) -> float:
    """The share of runs of four words that have occurred in the text before; 0 if there are none."""
    return 1 - distinct([tokens], 4) if len(tokens) >= 4 else 0.0


def judge(prompt: Prompt, answer: str) -> dict[str, dict]:
    """{rule: {"rule": in words, "found": in the answer, "passed": bool}}"""
    verdicts = {}

    def add(name: str, rule: str, found: str, passed: bool) -> None:
        verdicts[name] = {"rule": rule, "found": found or "none", "passed": passed}

    tokens = words(answer)
    share = repetition(tokens)
    fewest, most = prompt.words
    expected = [word for word in prompt.expected if fnmatch.filter(tokens, word)]
    marks = [mark for mark in MARKS if mark in answer]
    wanted = f"at least {prompt.least} of {', '.join(prompt.expected)}"
    add("content", wanted, ", ".join(expected), len(expected) >= prompt.least)
    add("repetition", f"at most {REPEATED:.0%} of four-word runs repeat", f"{share:.0%}", share <= REPEATED)
    add("leakage", f"none of {escaped(MARKS)}", escaped(marks), not marks)
    add("length", f"{fewest} to {most} words", str(len(tokens)), fewest <= len(tokens) <= most)
    return verdicts


def escaped(marks: Sequence[str]) -> str:
    return " ".join(marks).encode("unicode_escape").decode()
