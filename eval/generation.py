"""What a model writes, from prompts, documents and seeds that are fixed beforehand: nothing is selected."""

from collections.abc import Sequence

import numpy as np

import generate
from data.pack import Packed
from eval.language import Subject
from eval.prompts import SMOKE, distinct, judge, repetition, words
from eval.statistics import standard_error
from sft.conversations import Message, cleaned
from sft.templates import ends, render


def write(subject: Subject, prompts: list[list[int]], new_tokens: int, template: str | None = None) -> list[dict]:
    """For each prompt {"seed", "new": the new ids, "ended": whether the model ended them}."""
    config, seed = subject.config, subject.config.seed
    seeds = list(range(seed, seed + len(prompts)))
    stop = ends(template, subject.tokenizer) if template else (subject.tokenizer.eos,)
    options = {"temperature": config.temperature, "top_p": config.top_p, "seed": seeds, "stop": stop}
    samples = []
    for seed, new in zip(seeds, generate.generate(subject.model, prompts, new_tokens, **options), strict=True):
        samples.append({"seed": seed, "new": new, "ended": len(new) < new_tokens})
    return samples


def answer(subject: Subject, prompts: Sequence[str]) -> list[dict]:
    """{"prompt", "seed", "answer", "ended"} for each prompt, in the template in which the model learnt to answer."""
    spm, ids = subject.tokenizer, []
    for prompt in prompts:
        if subject.template:
            message = Message("user", cleaned(prompt))
            ids.append(render(subject.template, [message], spm, ask=True)[0])
        else:
            ids.append([spm.bos, *spm.encode(prompt)])
    texts = []
    for prompt, sample in zip(
        prompts, write(subject, ids, subject.config.answer_tokens, subject.template), strict=True
    ):
        text = spm.decode(sample["new"], begins=False)
        texts.append({"prompt": prompt, "seed": sample["seed"], "answer": text, "ended": sample["ended"]})
    return texts


def smoke(subject: Subject) -> dict:
    """The task `smoke`: the share of short prompts whose answer passes every rule, and each rule; and the answers."""
    texts = answer(subject, [prompt.text for prompt in SMOKE])
    passed, categories = np.zeros(len(SMOKE)), {}
    for i, (prompt, text) in enumerate(zip(SMOKE, texts, strict=True)):
        text["category"], text["rules"] = prompt.category, judge(prompt, text["answer"])
        text["passed"] = all(rule["passed"] for rule in text["rules"].values())
        passed[i] = text["passed"]
        categories.setdefault(prompt.category, []).append(text["passed"])
    numbers = {"passed": float(passed.mean())}
    for rule in texts[0]["rules"]:
        numbers[rule] = sum(text["rules"][rule]["passed"] for text in texts) / len(texts)
    numbers["by_category"] = {category: float(np.mean(own)) for category, own in categories.items()}
    # The baseline is an empty answer, which passes no prompt.
    return numbers | {"stderr": standard_error(passed), "baseline": 0.0, "n": len(texts), "texts": texts}


def prompts(subject: Subject, asked: Sequence[str]) -> dict:
    """The tasks `prompts` and `everyday`: how much the answers repeat themselves; and the answers."""
    texts = answer(subject, asked)
    tokens = [words(text["answer"]) for text in texts]
    for text, own in zip(texts, tokens, strict=True):
        for n in (1, 2, 3):
            text[f"distinct_{n}"] = distinct([own], n)
        text["repetition"] = repetition(own)
    ended = sum(text["ended"] for text in texts) / len(texts)
    return variety(tokens) | {"ended": ended, "texts": texts}


def continuations(subject: Subject, held_out: Packed) -> dict:
    """The task `continuations`: continuations of held-out documents, and how much they repeat themselves."""
    config, decode = subject.config, subject.tokenizer.decode
    cut, texts, length = config.prompt_tokens, [], config.prompt_tokens + config.new_tokens
    chosen = documents(held_out, length, config.continuations)
    if not chosen:
        return {"skipped": f"no held-out document has over {length:,} tokens; lower prompt_tokens of EvalConfig"}
    begun = [[subject.tokenizer.bos, *ids[:cut]] for ids in chosen]
    for ids, sample in zip(chosen, write(subject, begun, config.new_tokens), strict=True):
        text = {"seed": sample["seed"], "prompt": decode(ids[:cut])}
        text["continuation"] = decode(sample["new"], begins=False)
        text["truth"] = decode(ids[cut:], begins=False)  # how the document continues
        texts.append(text)
    numbers = variety([words(text["continuation"]) for text in texts])
    truth = variety([words(text["truth"]) for text in texts])
    numbers["baseline"] = truth["repetition"]
    for n in (1, 2, 3):
        numbers[f"baseline_distinct_{n}"] = truth[f"distinct_{n}"]
    return numbers | {"texts": texts}


def variety(texts: list[list[str]]) -> dict[str, float]:
    """How much texts repeat themselves: the mean share of four-word runs that repeat, and distinct-n of all."""
    shares = np.array([repetition(tokens) for tokens in texts])
    numbers = {"repetition": float(shares.mean()), "stderr": standard_error(shares)}
    for n in (1, 2, 3):
        numbers[f"distinct_{n}"] = distinct(texts, n)
    return numbers | {"n": len(texts)}


def documents(held_out: Packed, length: int, wanted: int) -> list[list[int]]:
    """The first `length` ids of held-out documents, evenly spaced among those that are longer."""
    starts = held_out.starts
    lengths = np.diff(np.append(starts, len(held_out.tokens)))
    long = np.flatnonzero(lengths > length)
    if len(long) > wanted:
        long = long[np.arange(wanted) * len(long) // wanted]
    return [held_out.tokens[start : start + length].tolist() for start in starts[long]]
