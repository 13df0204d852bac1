"""How fast multiple choice is scored, beside one choice at a time, with a trained model.

    DATA=… python -m benchmarks.evaluation configs/tiny.py   ->  benchmarks/results/evaluation.json

One at a time: each choice is a forward pass of its own, which computes all of its logits. Both see questions of one
task, evenly spaced, in turn, in ROUNDS; quoted are medians. More questions share more beginnings: with all of BLiMP the
rate is higher than with the part measured here.
"""

import argparse
import os
import statistics
import subprocess
import time
from pathlib import Path

import numpy as np
import torch

import checkpoint
import cli
import configs
import machine
import stage
from eval.choices import Question, encode, fit, score
from eval.language import Subject
from eval.tasks import PUBLISHED
from model import Transformer
from tokenizer import Tokenizer

RESULT = Path(__file__).parent / "results/evaluation.json"
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


def measure(model: Transformer, spm: Tokenizer, questions: list[Question]) -> dict:
    few, many = every(questions, 40), every(questions, min(2_000, len(questions)))
    pairs = zip(one_at_a_time(model, spm, few), together(model, spm, few), strict=True)
    apart = max(np.abs(a - b).max() for a, b in pairs)
    seconds = {"one": [], "ours": []}
    for _ in range(ROUNDS):
        for name, own, run in (("one", few, one_at_a_time), ("ours", many, together)):
            started = time.perf_counter()
            run(model, spm, own)
            seconds[name].append((time.perf_counter() - started) / len(own))
    one, ours = (statistics.median(seconds[name]) for name in ("one", "ours"))
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    return {
        "speed_vs_one_at_a_time": round(one / ours, 2),
        "from_to": [round(min(ratios), 2), round(max(ratios), 2)],
        "questions_per_second": round(1 / ours, 1),
        "largest_difference_in_nats": float(apart),
    }


def main(arguments: argparse.Namespace) -> None:
    experiment = configs.load(arguments.config)
    final = experiment.trained("pretrain")
    spm, model = experiment.load_tokenizer(final), checkpoint.load_model(final)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    found = {
        "command": f"python -m benchmarks.evaluation {Path(arguments.config).name}",
        "commit": commit,
        "machine": machine.name(torch.device("cpu")),
        "cores": len(os.sched_getaffinity(0)),
        "versions": stage.versions(),
        "parameters": model.num_parameters(),
    }
    for name, published in PUBLISHED.items():
        if published.question and (path := published.find()):
            found[name] = measure(model, spm, published.load(path))
            print(name, found[name])
    stage.write_json(RESULT, found)


if __name__ == "__main__":
    cli.run(main, cli.parser(__doc__).parse_args())
