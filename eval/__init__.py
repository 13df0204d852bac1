"""Evaluation of trained models: `pipeline.py CONFIG eval` measures, `pipeline.py CONFIG report` writes it up."""

import math
from dataclasses import dataclass

from stage import check_types


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What is measured and generated when a model is evaluated. Raises TypeError or ValueError, naming the field."""

    validation_tokens: int = 1_000_000
    """The task `validation` measures all held-out documents; where they have more tokens than this, every k-th one, so
    that about as many are left."""
    continuations: int = 3
    """Held-out documents whose beginning the model continues."""
    prompt_tokens: int = 48
    """Length of the beginning."""
    new_tokens: int = 64
    """Length of the continuation."""
    answer_tokens: int = 128
    """The most that an answer to a prompt may have."""
    answers: int = 16
    """Held-out conversations whose question is answered."""
    temperature: float = 0.7
    """Of sampling; 0 is greedy."""
    top_p: float = 0.9
    """Of sampling."""
    seed: int = 0
    """Of sampling."""

    def __post_init__(self):
        check_types(self)
        for name in ("validation_tokens", "continuations", "prompt_tokens", "new_tokens", "answer_tokens", "answers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if not 0 <= self.seed < 2**62:
            raise ValueError(f"seed is {self.seed}; expected 0 to 2^62 - 1")
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature is {self.temperature}, top_p {self.top_p}; expected ≥ 0, and 0 < top_p ≤ 1")
