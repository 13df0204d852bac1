"""How fast multiple choice is scored, beside one choice at a time, with a trained model.

    DATA=… python -m benchmarks.evaluation configs/tiny.py   ->  benchmarks/results/evaluation.json

One at a time: each choice is a forward pass of its own, which computes all of its logits. Both see questions of one
task, evenly spaced, in turn; results are medians. More questions share more beginnings: with all of BLiMP the rate is
higher than with the part measured here.
"""

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
import torch

import checkpoint
import configs
import data.sources
import pipeline
from benchmarks.common import interleaved, parser, run, write
from cli import UserError
from eval.choices import Question, encode, fit, score
from eval.language import Subject
from eval.tasks import PUBLISHED
from model import Transformer
from tokenizer import Tokenizer

ROUNDS = 7


@torch.inference_mode()
def one_at_a_time(model: Transformer, spm: Tokenizer, questions: list[Question]) -> list[np.ndarray]:
    """What `together` gives."""
    found = []
    for question in questions:
        nats = []
        for context, ending in question.choices:
            ids, start = fit(encode(spm, context, ending), model.config.context_length)
            log_p = torch.log_softmax(model(torch.tensor([ids[:-1]]))[0], 1)
            nats.append(float(log_p[torch.arange(start - 1, len(ids) - 1), ids[start:]].double().sum()))
        found.append(np.array(nats))
    return found


def together(model: Transformer, spm: Tokenizer, questions: list[Question]) -> list[np.ndarray]:
    return score(Subject(model, spm), questions)[0]


def every(questions: list[Question], n: int) -> list[Question]:
    return [questions[i * len(questions) // n] for i in range(n)]


def measure(model: Transformer, spm: Tokenizer, questions: list[Question], rounds: int) -> dict:
    few, many = every(questions, min(40, len(questions))), every(questions, min(2_000, len(questions)))
    pairs = zip(one_at_a_time(model, spm, few), together(model, spm, few), strict=True)
    apart = max(np.abs(a - b).max() for a, b in pairs)
    ways = {"one": lambda: one_at_a_time(model, spm, few), "ours": lambda: together(model, spm, many)}
    seconds = interleaved(rounds, ways)
    one, ours = statistics.median(seconds["one"]) / len(few), statistics.median(seconds["ours"]) / len(many)
    ratios = [a / len(few) / (b / len(many)) for a, b in zip(seconds["one"], seconds["ours"], strict=True)]
    return {
        "speed_vs_one_at_a_time": round(one / ours, 2),
        "from_to": [round(min(ratios), 2), round(max(ratios), 2)],
        "questions_per_second": round(1 / ours, 1),
        "largest_difference_in_nats": float(apart),
    }


def write_questions(directory: Path) -> None:
    """Data of three tasks, for a quick run."""
    sentences = [f"{'The one' if i % 2 else 'A'} {word} was {i}." for i, word in enumerate(("way", "day", "man") * 7)]
    blimp = {"field": "syntax", "linguistics_term": "none", "UID": "none"}
    article = " = A day = \n\n The way was long , and the day was not . \n"
    (directory / "wikitext-2").mkdir()
    (directory / "wikitext-2/wiki.test.raw").write_text(article * 2)
    records = {
        "blimp": [blimp | {"sentence_good": s, "sentence_bad": s[::-1]} for s in sentences],
        "piqa_val": [{"goal": s, "sol1": "go", "sol2": "look back", "label": i % 2} for i, s in enumerate(sentences)],
    }
    for name, lines in records.items():
        (directory / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


def main(arguments: argparse.Namespace) -> None:
    if arguments.quick:
        write_questions(data.sources.raw())
        pipeline.main(pipeline.parser().parse_args([arguments.config, "pretrain"]))
    experiment = configs.load(arguments.config)
    final = experiment.trained("pretrain")
    spm, model = experiment.load_tokenizer(final), checkpoint.load_model(final)
    found = {"parameters": model.num_parameters()}
    for name, published in PUBLISHED.items():
        if published.question and (path := published.find()):
            found[name] = measure(model, spm, published.load(path), 1 if arguments.quick else ROUNDS)
            print(name, found[name])
    if len(found) == 1:
        raise UserError(f"no data of a task in {data.sources.raw()}; fetch it with: python -m eval.download")
    write("evaluation", f"python -m benchmarks.evaluation {arguments.config}", found, arguments.quick)


if __name__ == "__main__":
    run(main, parser(__doc__, "configs/tiny.py"))
