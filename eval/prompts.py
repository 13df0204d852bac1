"""What models are asked to write, and the rules that judge the answers: set down before any model had answered.

A rule can be checked by anyone with the answer in hand. It finds failures (nothing of what was asked for, loops, the
mark-up of a chat, a few words or no end); it does not find quality. An answer passes if it passes every rule.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

MARKUP = ("<|", "|>", "[INST]", "<s>", "</s>", "###", "```", "Human:", "User:", "Assistant:", "System:", "\ufffd")
REPEATED = 0.2
"""The share of four-word runs that may have stood in the answer before."""


@dataclass(frozen=True)
class Prompt:
    """One task. expected: words of which the answer must have `least` different ones, in any case, as whole words; a *
    at a word's end stands for any ending. words: how few and how many the answer may have."""

    category: str
    text: str
    expected: tuple[str, ...]
    words: tuple[int, int] = (3, 120)
    least: int = 1


SMOKE = (
    Prompt("basic knowledge", "The capital of France is", ("paris",), (1, 120)),
    Prompt("basic knowledge", "Question: How many days are there in a week?\nAnswer:", ("seven", "7"), (1, 120)),
    Prompt("basic knowledge", "Water freezes when the temperature", ("fall*", "drop*", "zero", "0", "below", "32")),
    Prompt("language understanding", "The opposite of hot is", ("cold", "cool", "chilly"), (1, 120)),
    Prompt(
        "language understanding",
        "Tom gave the book to Mary because she wanted to read it. Question: Who wanted to read the book?\nAnswer:",
        ("mary", "she"),
        (1, 120),
    ),
    Prompt("language understanding", "Another word for happy is", ("glad", "joy*", "cheer*", "pleased", "content")),
    Prompt("reasoning", "Question: What is two plus three?\nAnswer:", ("five", "5"), (1, 120)),
    Prompt(
        "reasoning",
        "All birds have feathers. A robin is a bird. Therefore, a robin has",
        ("feathers", "feather"),
        (1, 120),
    ),
    Prompt("reasoning", "It is raining, so if you go outside without an umbrella you will get", ("wet", "soak*")),
    Prompt(
        "creativity",
        "Once upon a time, in a small village by the sea,",
        ("sea", "village*", "boat*", "fish*", "lived", "there", "girl", "boy", "man", "woman"),
        least=2,
    ),
    Prompt(
        "creativity",
        "The old clock on the wall began to speak. It said",
        ("time", "i", "you", "hour*", "clock", "tick*", "wall", "my"),
        least=2,
    ),
    Prompt(
        "creativity",
        "Write two lines about the moon.",
        ("moon*", "night*", "sky", "light*", "star*", "silver", "shin*", "glow*"),
        least=2,
    ),
    Prompt(
        "instruction following",
        "List three colors.",
        ("red", "blue", "green", "yellow", "black", "white", "brown", "orange", "pink", "purple", "gray", "grey"),
        least=3,
    ),
    Prompt(
        "instruction following",
        "Name two animals that live in the ocean.",
        ("fish*", "whale*", "shark*", "dolphin*", "crab*", "seal*", "turtle*", "squid*", "octopus*"),
        least=2,
    ),
    Prompt("instruction following", "Complete the sentence: The sun rises in the", ("east", "morning"), (1, 120)),
    Prompt(
        "encyclopaedic style",
        "The Amazon River is a river in",
        ("south", "america", "brazil", "peru", "colombia", "river", "water", "flow*", "long*", "basin"),
        least=2,
    ),
    Prompt("encyclopaedic style", "A computer is a machine that", ("data", "program*", "comput*", "information")),
    Prompt(
        "encyclopaedic style",
        "William Shakespeare was an English",
        ("poet", "playwright", "dramatist", "writer", "author", "actor"),
    ),
    Prompt(
        "conversation",
        '"Good morning! How are you today?" she asked. He replied,',
        ("well", "fine", "good", "great", "thank*", "morning", "better"),
    ),
    Prompt("conversation", "Hello! What is your name?", ("name", "i'm", "i", "am"), (1, 120)),
    Prompt(
        "conversation",
        "Thank you very much for your help!",
        ("welcome", "thank*", "pleasure", "glad", "help*", "problem"),
    ),
    Prompt("multilingual", "La capitale de la France est", ("paris",), (1, 120)),
    Prompt("multilingual", "Die Hauptstadt von Deutschland ist", ("berlin",), (1, 120)),
    Prompt(
        "multilingual",
        "Buenos días, me llamo",
        ("y", "soy", "de", "el", "la", "en", "que", "tengo", "un", "una"),
        least=2,
    ),
)

LONGER = (
    "Explain what machine learning is in simple terms.",
    "Write a short poem about the ocean.",
    "What are the benefits of renewable energy?",
    "How do you make a good first impression?",
    "Describe the process of photosynthesis.",
)

EVERYDAY = (
    "Good morning! What should I have for breakfast?",
    "How do I boil an egg?",
    "What is a good name for a cat?",
    "I cannot sleep at night. What can I do?",
    "Write a short thank-you note to a neighbour who watered my plants.",
    "What should I pack for a weekend by the sea?",
    "How can I remember people's names?",
    "Explain to a child why the sky is blue.",
    "My friend is sad. What can I say to her?",
    "How do I remove a coffee stain from a shirt?",
    "Suggest three things to do on a rainy Sunday.",
    "What is the difference between weather and climate?",
    "How much water should I drink in a day?",
    "Help me to say no to an invitation politely.",
    "What makes a good teacher?",
)


def words(text: str) -> list[str]:
    """The words of a text in small letters, without punctuation."""
    return re.findall(r"\w+(?:['’]\w+)*", text.lower())


def repetition(tokens: Sequence[str], n: int = 4) -> float:
    """The share of runs of n words that have stood in the text before; 0 where there is none."""
    runs = Counter(zip(*(tokens[i:] for i in range(n)), strict=False))
    return 1 - len(runs) / runs.total() if runs else 0.0


def distinct(texts: Sequence[Sequence[str]], n: int) -> float:
    """Distinct runs of n words, over all of them, in several texts together (distinct-n, arXiv:1510.03055)."""
    runs = Counter(run for tokens in texts for run in zip(*(tokens[i:] for i in range(n)), strict=False))
    return len(runs) / runs.total() if runs else 0.0


def judge(prompt: Prompt, answer: str) -> dict[str, dict]:
    """{rule: {"rule": in words, "found": what was found, "passed"}} for an answer to a prompt."""
    tokens = words(answer)
    stems = {each: re.escape(each).replace(r"\*", r"\w*") for each in prompt.expected}
    there = [each for each, stem in stems.items() if any(re.fullmatch(stem, word) for word in tokens)]
    marks = [ascii(mark)[1:-1] for mark in MARKUP if mark in answer]
    fewest, most = prompt.words
    share = repetition(tokens)
    return {
        "content": {
            "rule": f"at least {prompt.least} of {', '.join(prompt.expected)}",
            "found": ", ".join(there) or "none",
            "passed": len(there) >= prompt.least,
        },
        "repetition": {
            "rule": f"at most {REPEATED:.0%} of four-word runs repeat",
            "found": f"{share:.0%}",
            "passed": share <= REPEATED,
        },
        "leakage": {
            "rule": f"none of {' '.join(ascii(mark)[1:-1] for mark in MARKUP)}",
            "found": " ".join(marks) or "none",
            "passed": not marks,
        },
        "length": {
            "rule": f"{fewest} to {most} words",
            "found": f"{len(tokens)}",
            "passed": fewest <= len(tokens) <= most,
        },
    }
