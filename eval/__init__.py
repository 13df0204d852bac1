"""Evaluation of trained models: `pipeline.py CONFIG eval` measures, `pipeline.py CONFIG report` writes it up."""

import math
from dataclasses import dataclass

from stage import check_types


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What the evaluation measures and generates. Raises TypeError or ValueError that names the field."""

    # The task `validation` reads all held-out documents. If they have more tokens than this, it reads only every k-th
    # document, so that about this many tokens are left.
    validation_tokens: int = 1_000_000
    continuations: int = 3  # held-out documents whose beginning the model continues
    prompt_tokens: int = 48  # length of such a beginning
    new_tokens: int = 64  # greatest length of a continuation
    answer_tokens: int = 128  # greatest length of an answer to a prompt
    answers: int = 16  # held-out conversations whose question the model answers
    temperature: float = 0.7  # of sampling; 0 is greedy
    top_p: float = 0.9  # nucleus sampling
    seed: int = 0  # of the first sample; later samples count up

    def __post_init__(self):
        check_types(self)
        for name in ("validation_tokens", "continuations", "prompt_tokens", "new_tokens", "answer_tokens", "answers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if not 0 <= self.seed < 2**62:
            raise ValueError(f"seed is {self.seed}; expected 0 to 2^62 - 1")
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature is {self.temperature}, top_p {self.top_p}; expected ≥ 0, and 0 < top_p ≤ 1")
