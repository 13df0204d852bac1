"""The task `answers`, and models that were taught to answer, measured beside those that were not."""

import json
import math
import re
from collections import Counter

import numpy as np
import pytest
import torch

import checkpoint
import configs
import generate
import stage
from eval import EvalConfig
from eval.answers import answers, nats_by_conversation
from eval.language import Subject
from sft.conversations import Message
from sft.data import Rows
from sft.templates import render
from tests.conftest import Place


@pytest.fixture
def loaded(fine_tuned: Place):
    """(model, training rows, held-out rows, tokenizer)"""
    directory = fine_tuned.runs / "mini/sft_data"
    counts = stage.read_manifest(directory)["counts"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNS", str(fine_tuned.runs))
        spm = configs.load(fine_tuned.config).load_tokenizer()
    model = checkpoint.load_model(fine_tuned.runs / "mini/sft/final")
    return model, *(Rows(directory, split, counts, 64) for split in ("train", "val")), spm


def test_every_conversation_costs_what_it_costs_alone(loaded):
    model, _, held_out, spm = loaded
    nats, counts = nats_by_conversation(Subject(model, spm), held_out, (spm.control["<|im_end|>"],))
    for number in range(len(held_out.starts) - 1):
        ids, trained = (torch.from_numpy(part) for part in held_out.conversation(number))
        log_p = torch.log_softmax(model(ids[None, :-1])[0].double(), 1)
        own = -log_p[torch.arange(len(ids) - 1), ids[1:]][trained[1:]]
        assert nats[number].sum() == pytest.approx(own.sum().item(), rel=1e-5)
        assert nats[number, 1] == pytest.approx(own[-1].item(), rel=1e-5)
        assert counts[number].tolist() == [len(own) - 1, 1]


def test_loss_error_and_baseline_by_hand(loaded):
    model, train, held_out, spm = loaded
    numbers = answers(Subject(model, spm, "chatml", EvalConfig(answers=2, answer_tokens=4)), train, held_out, "chatml")
    split, counted = nats_by_conversation(Subject(model, spm), held_out, (spm.control["<|im_end|>"],))
    nats, counts = split.sum(1), counted.sum(1)
    assert numbers["loss_words"] == pytest.approx(split[:, 0].sum() / counted[:, 0].sum())
    assert numbers["loss_ends"] == pytest.approx(split[:, 1].mean())
    assert numbers["loss"] == pytest.approx(nats.sum() / counts.sum())
    assert numbers["perplexity"] == pytest.approx(math.exp(numbers["loss"]))
    rest = nats - numbers["loss"] * counts
    n = len(counts)
    assert numbers["stderr"] == pytest.approx(math.sqrt(n / (n - 1) * (rest**2).sum()) / counts.sum())
    seen = Counter(int(i) for i, learnt in zip(train.tokens, train.trained, strict=True) if learnt)
    wanted = [int(i) for i, learnt in zip(held_out.tokens, held_out.trained, strict=True) if learnt]
    total = seen.total() + spm.vocab_size
    assert numbers["baseline"] == pytest.approx(np.mean([-math.log((seen[i] + 1) / total) for i in wanted]))
    assert (numbers["n"], numbers["conversations"]) == (len(wanted), n)


def test_the_same_questions_are_answered_whatever_the_model(loaded):
    model, train, held_out, spm = loaded
    subject = Subject(model, spm, "chatml", EvalConfig(answers=3, answer_tokens=6, seed=7))
    texts = answers(subject, train, held_out, "chatml")["texts"]
    other = answers(subject._replace(template=None), train, held_out, "chatml")["texts"]
    assert texts == other
    assert [text["seed"] for text in texts] == [7, 8, 9]
    for text in texts:
        assert text["prompt"].startswith("<|im_start|>user\nSay ")
        assert text["prompt"].endswith("<|im_end|>\n<|im_start|>assistant\n")
        asked = text["prompt"].split("\n")[1].removesuffix("<|im_end|>")
        assert asked == f"Say {text['truth']}."


def test_a_mark_of_the_template_in_an_answer_is_counted(loaded):
    model, train, held_out, spm = loaded
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.weight[spm.control["<|im_start|>"]] = 50 * torch.sign(model.norm.weight)
        model.norm.weight.abs_()
    config = EvalConfig(answers=4, answer_tokens=40, temperature=1.0)
    found = answers(Subject(model, spm, "chatml", config), train, held_out, "chatml")
    assert found["marked"] == sum("<|im_start|>" in text["answer"] for text in found["texts"]) / 4 > 0


def test_stages_are_measured_alike_and_the_report_sets_them_side_by_side(measured: Place, loaded):
    found = json.loads((measured.runs / "mini/eval/results.json").read_text())
    assert found["sft"]["answers"]["loss"] < found["pretrain"]["answers"]["loss"]
    assert found["sft"]["answers"]["baseline"] == found["pretrain"]["answers"]["baseline"]
    adapter = stage.read_manifest(measured.runs / "mini/sft/final")["wrote"]["adapter.pt"]["sha256"]
    assert {entry["checkpoint"] for entry in found["sft"].values() if "n" in entry} == {adapter}
    texts = json.loads((measured.runs / "mini/eval/generations.json").read_text())
    for task in ("answers", "smoke", "prompts"):
        before, after = texts["pretrain"][task], texts["sft"][task]
        assert [(text["prompt"], text["seed"]) for text in before] == [(text["prompt"], text["seed"]) for text in after]
    # A fine-tuned model is asked in its template.
    model, _, _, spm = loaded
    first = texts["sft"]["prompts"][0]
    ids = render("chatml", [Message("user", first["prompt"])], spm, ask=True)[0]
    stop = (spm.eos, spm.control["<|im_end|>"])
    new = generate.generate(model, ids, 128, temperature=0.7, top_p=0.9, seed=0, stop=stop)
    assert first["answer"] == spm.decode(new, begins=False)
    out = measured.run("pipeline.py", measured.config, "report").stdout
    said = re.findall(r"(?m)^(prompt|pretrain|sft|dpo|truth) +\D", out)
    assert said[-5:] == ["prompt", "pretrain", "sft", "dpo", "truth"]
    page = (measured.runs / "mini/REPORT.md").read_text()
    for text in texts["pretrain"]["answers"]:
        at = page.index(text["prompt"].splitlines()[1], page.index("## Samples"))
        assert page.index("\npretrain", at) < page.index("\nsft", at) < page.index("\ntruth:", at)
