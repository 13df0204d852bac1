"""What a model writes: answers to fixed prompts, and held-out documents gone on with.

Nothing is chosen by what it says: prompts, documents and seeds are fixed beforehand.
"""

from collections.abc import Sequence

import numpy as np

import generate
from cli import UserError
from data.pack import Packed
from eval import EvalConfig
from eval.choices import standard_error
from eval.prompts import LONGER, SMOKE, distinct, judge, repetition, words
from model import Transformer
from sft.conversations import Message, cleaned
from sft.templates import ends, render
from tokenizer import Tokenizer


def sampled(
    model: Transformer, prompts: list[list[int]], new_tokens: int, stop: tuple[int, ...], config: EvalConfig
) -> list[list[int]]:
    """The ids that follow each prompt, until one of `stop`, sampled with seeds that count up from the config's."""
    options = {"temperature": config.temperature, "top_p": config.top_p}
    seeds = [config.seed + i for i in range(len(prompts))]
    try:
        return generate.generate(model, prompts, new_tokens, seed=seeds, stop=stop, **options)
    except ValueError as error:  # weights that are not finite
        raise UserError(str(error)) from None


def answer(
    model: Transformer, tokenizer: Tokenizer, prompts: list[str], template: str | None, config: EvalConfig
) -> list[dict]:
    """For each prompt its `seed`, the `answer`, and whether it `ended` before it had to. template: of a model that was
    taught to answer, which is asked; None: a model that goes on with the prompt."""
    ids, stop = [[tokenizer.bos, *tokenizer.encode(prompt)] for prompt in prompts], (tokenizer.eos,)
    if template:
        ids = [render(template, [Message("user", cleaned(prompt))], tokenizer, ask=True)[0] for prompt in prompts]
        stop = ends(template, tokenizer)
    new = sampled(model, ids, config.answer_tokens, stop, config)
    return [
        {
            "prompt": prompt,
            "seed": config.seed + i,
            "answer": tokenizer.decode(own, begins=False),
            "ended": len(own) < config.answer_tokens,
        }
        for i, (prompt, own) in enumerate(zip(prompts, new, strict=True))
    ]


def smoke(
    model: Transformer, tokenizer: Tokenizer, template: str | None, config: EvalConfig
) -> tuple[dict, list[dict]]:
    """The task `smoke`: the share of short prompts whose answer passes every rule, and of those that pass each; and the
    answers. The baseline is an empty answer, which passes none."""
    texts = answer(model, tokenizer, [prompt.text for prompt in SMOKE], template, config)
    for prompt, text in zip(SMOKE, texts, strict=True):
        text["category"], text["rules"] = prompt.category, judge(prompt, text["answer"])
        text["passed"] = all(rule["passed"] for rule in text["rules"].values())
    passed = np.array([text["passed"] for text in texts], dtype=float)
    categories = dict.fromkeys(prompt.category for prompt in SMOKE)
    numbers = {
        "passed": float(passed.mean()),
        **{rule: sum(text["rules"][rule]["passed"] for text in texts) / len(texts) for rule in texts[0]["rules"]},
        "by_category": {c: float(np.mean([t["passed"] for t in texts if t["category"] == c])) for c in categories},
        "stderr": standard_error(passed),
        "baseline": 0.0,
        "n": len(texts),
    }
    return numbers, texts


def prompts(
    model: Transformer, tokenizer: Tokenizer, template: str | None, config: EvalConfig, asked: Sequence[str] = LONGER
) -> tuple[dict, list[dict]]:
    """The tasks `prompts` and `everyday`: how much the answers to what is asked repeat themselves; and the answers."""
    texts = answer(model, tokenizer, list(asked), template, config)
    tokens = [words(text["answer"]) for text in texts]
    for text, own in zip(texts, tokens, strict=True):
        text |= {f"distinct_{n}": distinct([own], n) for n in (1, 2, 3)} | {"repetition": repetition(own)}
    return variety(tokens) | {"ended": sum(text["ended"] for text in texts) / len(texts)}, texts


def continuations(
    model: Transformer, tokenizer: Tokenizer, held_out: Packed, config: EvalConfig
) -> tuple[dict, list[dict]]:
    """The task `continuations`: `seed`, `prompt`, `continuation` and `truth` for held-out documents that are long
    enough, and how much the continuations repeat themselves. The baseline is how the documents really go on."""
    beginnings = documents(held_out, config.prompt_tokens + config.new_tokens, config.continuations)
    begun = [[tokenizer.bos, *ids[: config.prompt_tokens]] for ids in beginnings]  # a document begins here
    new = sampled(model, begun, config.new_tokens, (tokenizer.eos,), config)
    texts = [
        {
            "seed": config.seed + i,
            "prompt": tokenizer.decode(ids[: config.prompt_tokens]),
            "continuation": tokenizer.decode(own, begins=False),
            "truth": tokenizer.decode(ids[config.prompt_tokens :], begins=False),
        }
        for i, (ids, own) in enumerate(zip(beginnings, new, strict=True))
    ]
    theirs = variety([words(text["truth"]) for text in texts])
    numbers = variety([words(text["continuation"]) for text in texts]) | {"baseline": theirs["repetition"]}
    return numbers | {f"baseline_distinct_{n}": theirs[f"distinct_{n}"] for n in (1, 2, 3)}, texts


def variety(texts: list[list[str]]) -> dict[str, float]:
    """How much texts repeat themselves: the mean share of four-word runs that repeat, and distinct-n of all."""
    shares = np.array([repetition(tokens) for tokens in texts])
    found = {"repetition": float(shares.mean()) if len(texts) else 0.0, "stderr": standard_error(shares)}
    return found | {f"distinct_{n}": distinct(texts, n) for n in (1, 2, 3)} | {"n": len(texts)}


def documents(held_out: Packed, length: int, wanted: int) -> list[list[int]]:
    """The first `length` tokens of held-out documents, evenly spaced among those that are longer."""
    starts = held_out.starts
    ends = np.append(starts[1:], len(held_out.tokens))
    enough = np.flatnonzero(ends - starts > length)
    chosen = [enough[i * len(enough) // wanted] for i in range(wanted)] if len(enough) >= wanted else enough
    return [held_out.tokens[starts[i] : starts[i] + length].tolist() for i in chosen]
