"""Texts that a model writes. Prompts, documents and seeds are fixed beforehand, so that nobody selects texts."""

import math
from collections.abc import Sequence

import numpy as np
import torch

import generate
from cli import progress
from data.pack import Packed
from eval.language import Subject, perplexity, token_losses
from eval.prompts import SMOKE, distinct, judge, repetition, words
from eval.statistics import mean_and_error, ratio
from sft.conversations import Message, cleaned
from sft.data import Rows
from sft.templates import ends, marked, render, shown


def write(subject: Subject, prompts: list[list[int]], new_tokens: int, template: str | None) -> list[tuple]:
    """(seed, new ids, True if the model ended them) for each prompt."""
    config = subject.config
    seeds = range(config.seed, config.seed + len(prompts))
    stop = ends(template, subject.tokenizer) if template else [subject.tokenizer.eos]
    options = {"temperature": config.temperature, "top_p": config.top_p, "seed": seeds, "stop": stop}
    samples = []
    new = generate.generate(subject.model, prompts, new_tokens, **options)
    for seed, ids in zip(seeds, new, strict=True):
        samples.append((seed, ids, len(ids) < new_tokens))
    return samples


def answer(subject: Subject, prompts: Sequence[str]) -> list[dict]:
    """{"prompt", "seed", "answer", "ended"} for each prompt, in the template in which the model learnt to answer."""
    spm, template = subject.tokenizer, subject.template
    asked, texts = [], []
    for prompt in prompts:
        if template:
            ids, _ = render(template, [Message("user", cleaned(prompt))], spm, ask=True)
            asked.append(ids)
        else:
            asked.append([*spm.opening, *spm.encode(prompt)])
    samples = write(subject, asked, subject.config.answer_tokens, template)
    for prompt, (seed, ids, ended) in zip(prompts, samples, strict=True):
        text = spm.decode(ids, begins=False)
        texts.append({"prompt": prompt, "seed": seed, "answer": text, "ended": ended})
    return texts


def smoke(subject: Subject) -> dict:
    """The task `smoke`: the share of answers to short prompts that pass all rules, and each rule; and the answers."""
    texts = answer(subject, list(SMOKE))
    passed, categories = {"passed": []}, {}
    for text in texts:
        prompt = SMOKE[text["prompt"]]
        text["category"] = prompt.category
        text["rules"] = judge(prompt, text["answer"])
        for name, rule in text["rules"].items():
            passed.setdefault(name, []).append(rule["passed"])
        text["passed"] = all(rule["passed"] for rule in text["rules"].values())
        passed["passed"].append(text["passed"])
        categories.setdefault(prompt.category, []).append(text["passed"])
    _, stderr = mean_and_error(np.array(passed["passed"], float))
    numbers = means(passed)
    numbers |= {"by_category": means(categories), "stderr": stderr}
    return numbers | {"baseline": 0.0, "n": len(texts), "texts": texts}  # the baseline: an empty answer passes nothing


def means(lists: dict[str, list]) -> dict[str, float]:
    return {name: float(np.mean(values)) for name, values in lists.items()}


def prompts(subject: Subject, asked: Sequence[str]) -> dict:
    """The tasks `prompts` and `everyday`: how much the answers repeat themselves; and the answers."""
    texts = answer(subject, asked)
    for text in texts:
        tokens = words(text["answer"])
        text |= distinct_runs([tokens]) | {"repetition": repetition(tokens)}
    return variety(texts, "answer") | {"ended": share(texts, "ended"), "texts": texts}


def continuations(subject: Subject, held_out: Packed) -> dict:
    """The task `continuations`: continuations of held-out documents, and how much they repeat themselves."""
    config, spm = subject.config, subject.tokenizer
    cut = config.prompt_tokens
    length = cut + config.new_tokens
    documents = [ids for ids in held_out.documents() if len(ids) > length]
    if not documents:
        return {"skipped": f"no held-out document has over {length:,} tokens; lower prompt_tokens of EvalConfig"}
    begun, texts = [], []
    for ids in evenly(documents, config.continuations):
        ids = ids[:length].tolist()
        begun.append([*spm.opening, *ids[:cut]])
        prompt = spm.decode(ids[:cut])
        truth = spm.decode(ids[cut:], begins=False)  # how the document continues
        texts.append({"seed": 0, "prompt": prompt, "continuation": "", "truth": truth})
    samples = write(subject, begun, config.new_tokens, None)
    for text, (seed, ids, _) in zip(texts, samples, strict=True):
        text |= {"seed": seed, "continuation": spm.decode(ids, begins=False)}
    numbers = variety(texts, "continuation")
    truth = variety(texts, "truth")
    numbers["baseline"] = truth["repetition"]
    for n in (1, 2, 3):
        numbers[f"baseline_distinct_{n}"] = truth[f"distinct_{n}"]
    return numbers | {"texts": texts}


def share(texts: list[dict], key: str) -> float:
    return sum(text[key] for text in texts) / len(texts)


def evenly(items: Sequence, most: int) -> list:
    """At most `most` of the items, evenly spaced."""
    count = min(most, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def variety(texts: list[dict], key: str) -> dict[str, float]:
    """How much texts repeat themselves: the mean share of four-word runs that repeat, and distinct-n of all."""
    tokens = [words(text[key]) for text in texts]
    mean, stderr = mean_and_error(np.array(list(map(repetition, tokens))))
    return {"repetition": mean, "stderr": stderr} | distinct_runs(tokens) | {"n": len(texts)}


def distinct_runs(texts: list[list[str]]) -> dict[str, float]:
    return {f"distinct_{n}": distinct(texts, n) for n in (1, 2, 3)}


def answers(subject: Subject, train: Rows, held_out: Rows, template: str) -> dict:
    """The task `answers`: the loss of held-out answers in nats per token, and some answers of the model."""
    # The standard errors are over conversations.
    nats, counts = nats_by_conversation(subject, held_out, ends(template, subject.tokenizer))
    loss, stderr = ratio(nats.sum(1), counts.sum(1))
    loss_words, stderr_words = ratio(nats[:, 0], counts[:, 0])
    _, ending_nats = nats.sum(0)
    _, ending_count = counts.sum(0)
    # The baseline: each piece is as likely as it is frequent in the training answers, where each count is 1 higher.
    frequency = 1 + np.bincount(train.tokens[np.flatnonzero(train.trained)], minlength=subject.tokenizer.vocab_size)
    wanted = held_out.tokens[np.flatnonzero(held_out.trained)]
    texts = written(subject, held_out, template)
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "stderr": stderr,
        "loss_words": loss_words,
        "stderr_words": stderr_words,
        "loss_ends": float(ending_nats / max(1, ending_count)),  # of the piece that ends an answer
        "baseline": float(math.log(frequency.sum()) - np.log(frequency[wanted]).mean()),
        "marked": share(texts, "marked"),
        "ended": share(texts, "ended"),
        "conversations": len(counts),
        "n": int(counts.sum()),
        "texts": texts,
    }


def nats_by_conversation(subject: Subject, held_out: Rows, ends: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The sum of −log p in nats over a conversation's words, and over the ends of its answers, (conversations, 2)."""
    # The second array counts these tokens. Only trained tokens count.
    nats, counts = [], []
    count = len(held_out.starts) - 1
    with torch.inference_mode():
        for number in progress(range(count), count, "conversations", "answers"):
            ids, trained = held_out.conversation(number)
            tokens = torch.from_numpy(ids).to(subject.device)
            hidden = subject.model.hidden(tokens[None, :-1])[0]
            losses = token_losses(subject, hidden[trained[1:]], tokens[trained])
            ending = np.isin(ids[trained], ends)
            nats.append(np.bincount(ending, losses, 2))
            counts.append(np.bincount(ending, minlength=2))
    return np.array(nats), np.array(counts)


def written(subject: Subject, held_out: Rows, template: str) -> list[dict]:
    """The model's answers to the first question of some conversations, evenly spaced, beside the true answers."""
    spm = subject.tokenizer
    asked, texts = [], []
    for number in evenly(range(len(held_out.starts) - 1), subject.config.answers):
        ids, trained = held_out.conversation(number)
        first = int(trained.argmax())
        length = int(np.append(trained[first:], False).argmin())
        asked.append(ids[:first].tolist())
        truth = spm.decode(ids[first : first + length].tolist(), begins=False)
        prompt = shown(asked[-1][1:], spm)
        texts.append({"prompt": prompt, "seed": 0, "answer": "", "truth": truth})
    samples = write(subject, asked, subject.config.answer_tokens, template)
    for text, (seed, ids, ended) in zip(texts, samples, strict=True):
        text |= {"seed": seed, "answer": shown(ids, spm), "ended": ended, "marked": marked(template, ids, spm)}
    return texts
