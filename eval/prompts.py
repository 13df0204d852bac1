"""What models are asked to write (prompts.json), and the rules that judge it: fixed before any model had answered."""

# Anyone can check a rule with the answer in hand. Rules find failures: nothing that was asked for, loops, marks of a
# chat template, a few words, no end. They do not find quality. An answer passes if it passes every rule.

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import stage

MARKS = ("<|", "|>", "[INST]", "<s>", "</s>", "###", "```", "Human:", "User:", "Assistant:", "System:", "\ufffd")
REPEATED = 0.2  # the largest share of four-word runs that may have stood in the answer before


@dataclass(frozen=True)
class Prompt:
    """A prompt whose answer is judged."""

    category: str
    text: str
    expected: tuple[str, ...]  # the answer must have `least` of these words; a * at the end stands for any ending
    words: tuple[int, int]  # the fewest and the most words of an answer
    least: int


TEXTS = stage.read_json(Path(__file__).with_suffix(".json"))
SMOKE = [Prompt(**prompt) for prompt in TEXTS["smoke"]]


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"\w+(?:['’]\w+)*", text.lower())


def runs(tokens: Sequence[str], n: int) -> Counter:
    """How often each run of n words occurs."""
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def repetition(tokens: Sequence[str], n: int = 4) -> float:
    """The share of runs of n words that have occurred in the text before; 0 if there are none."""
    counts = runs(tokens, n)
    return 1 - len(counts) / counts.total() if counts else 0.0


def distinct(texts: Sequence[Sequence[str]], n: int) -> float:
    """Distinct runs of n words over all runs, in several texts together (distinct-n, arXiv:1510.03055)."""
    counts = Counter()
    for tokens in texts:
        counts += runs(tokens, n)
    return len(counts) / counts.total() if counts else 0.0


def judge(prompt: Prompt, answer: str) -> dict[str, dict]:
    """{rule: {"rule": in words, "found": in the answer, "passed": bool}}"""
    tokens, expected = words(answer), []
    for word in prompt.expected:
        pattern = re.escape(word).replace(r"\*", r"\w*")
        if any(re.fullmatch(pattern, token) for token in tokens):
            expected.append(word)
    marks = [ascii(mark)[1:-1] for mark in MARKS if mark in answer]
    fewest, most = prompt.words
    share = repetition(tokens)
    rules = {
        "content": (
            f"at least {prompt.least} of {', '.join(prompt.expected)}",
            ", ".join(expected) or "none",
            len(expected) >= prompt.least,
        ),
        "repetition": (f"at most {REPEATED:.0%} of four-word runs repeat", f"{share:.0%}", share <= REPEATED),
        "leakage": (
            f"none of {' '.join(ascii(mark)[1:-1] for mark in MARKS)}",
            " ".join(marks) or "none",
            not marks,
        ),
        "length": (f"{fewest} to {most} words", str(len(tokens)), fewest <= len(tokens) <= most),
    }
    return {name: dict(zip(("rule", "found", "passed"), rule, strict=True)) for name, rule in rules.items()}
