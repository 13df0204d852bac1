"""The rules that judge answers, by hand; that nothing shown is chosen by what the model says; and held-out answers."""

import json
import math
import re
from collections import Counter

import numpy as np
import pytest
import torch

import checkpoint
import data.pack
import generate
import stage
import tokenizer
from eval import EvalConfig
from eval.generation import answers, continuations, nats_by_conversation, prompts, smoke
from eval.language import Subject
from eval.prompts import SMOKE, TEXTS, Prompt, distinct, judge, repetition, words
from sft.conversations import Message
from sft.data import Rows
from sft.templates import render
from tests.conftest import Place

CONFIG = EvalConfig(continuations=2, prompt_tokens=8, new_tokens=8, answer_tokens=12, seed=3)
COLOURS = Prompt("x", "List two colours.", ("red", "blue*", "light green"), words=(2, 6), least=2)


def test_the_baseline_is_an_empty_answer_which_passes_nothing():
    assert not any(all(rule["passed"] for rule in judge(prompt, "").values()) for prompt in SMOKE.values())


def test_measures_by_hand():
    assert words("Don't STOP, the end-of 7 Ärger!") == ["don't", "stop", "the", "end", "of", "7", "ärger"]
    assert repetition(list("abcdabcd")) == pytest.approx(1 - 4 / 5)  # abcd bcda cdab dabc abcd
    assert repetition(list("abc")) == 0
    assert distinct([list("ab"), list("ac")], 1) == 3 / 4
    assert distinct([list("ab"), list("ab")], 2) == 1 / 2
    assert distinct([[]], 2) == 0


@pytest.mark.parametrize(
    ("answer", "fails"),
    [
        ("Red and blueish.", set()),
        ("red red Red", {"content"}),
        ("reddish and blue", {"content"}),  # without a * a word counts only whole
        ("red blue one two three four five", {"length"}),
        ("red blue <|im_end|>", {"leakage"}),
        ("red blue\ufffd", {"leakage"}),
        ("", {"content", "length"}),
        ("red blue red blue red blue", {"repetition"}),
    ],
)
def test_each_rule(answer, fails):
    found = judge(COLOURS, answer)
    assert {name for name, rule in found.items() if not rule["passed"]} == fails
    assert all(rule["rule"] and rule["found"] for rule in found.values())


@pytest.fixture(scope="module")
def subject(made: Place):
    spm = tokenizer.load(made.runs / "mini/tokenizer")
    packed = data.pack.load(made.runs / "mini/packed", spm.sha256)["val"]
    return Subject(checkpoint.load_model(made.runs / "mini/pretrain/final"), spm, None, CONFIG), packed


def test_continuations_are_of_held_out_documents_and_fixed(subject):
    subject, packed = subject
    numbers, again = (continuations(subject, packed) for _ in range(2))
    assert numbers == again
    first, spm = numbers["texts"], subject.tokenizer
    assert [text["seed"] for text in first] == [3, 4]
    texts = [spm.decode(ids.tolist()) for ids in packed.documents()]
    for example in first:
        assert any(text.startswith(example["prompt"] + example["truth"]) for text in texts)
    ours, theirs = ([words(text[key]) for text in first] for key in ("continuation", "truth"))
    assert numbers["repetition"] == pytest.approx(sum(map(repetition, ours)) / 2)
    assert numbers["baseline"] == pytest.approx(sum(map(repetition, theirs)) / 2)
    assert (numbers["distinct_2"], numbers["baseline_distinct_2"]) == (distinct(ours, 2), distinct(theirs, 2))


def test_answers_are_what_generate_gives(subject):
    subject, _ = subject
    spm, asked = subject.tokenizer, TEXTS["prompts"]
    numbers = prompts(subject, asked)
    for i, (prompt, text) in enumerate(zip(asked, numbers["texts"], strict=True)):
        options = {"temperature": CONFIG.temperature, "top_p": CONFIG.top_p, "seed": 3 + i, "stop": (spm.eos,)}
        new = generate.generate(subject.model, [spm.bos, *spm.encode(prompt)], 12, **options)
        assert (text["prompt"], text["answer"]) == (prompt, spm.decode(new, begins=False))
        assert text["ended"] == (len(new) < 12)
    assert numbers["distinct_1"] == distinct([words(text["answer"]) for text in numbers["texts"]], 1)


def test_smoke_counts_what_passed(subject):
    numbers = smoke(subject[0])
    texts = numbers["texts"]
    assert list(Counter(text["category"] for text in texts).values()) == [3] * 8
    for prompt, text in zip(SMOKE.values(), texts, strict=True):
        assert (text["prompt"], text["rules"]) == (prompt.text, judge(prompt, text["answer"]))
    assert numbers["passed"] == sum(text["passed"] for text in texts) / 24
    assert numbers["length"] == sum(text["rules"]["length"]["passed"] for text in texts) / 24
    assert sum(numbers["by_category"].values()) == pytest.approx(8 * numbers["passed"])


@pytest.fixture
def loaded(fine_tuned: Place):
    """(model, training rows, held-out rows, tokenizer)"""
    directory = fine_tuned.runs / "mini/sft_data"
    counts = stage.read_manifest(directory)["counts"]
    spm = tokenizer.load(fine_tuned.runs / "mini/tokenizer")
    model = checkpoint.load_model(fine_tuned.runs / "mini/sft/final")
    return model, *(Rows(directory, split, counts, 64) for split in ("train", "val")), spm


def test_loss_error_and_baseline_by_hand(loaded):
    model, train, held_out, spm = loaded
    subject = Subject(model, spm, "chatml", EvalConfig(answers=2, answer_tokens=4))
    numbers = answers(subject, train, held_out, "chatml")
    split, counted = nats_by_conversation(subject, held_out, (spm.control["<|im_end|>"],))
    for number in range(len(held_out.starts) - 1):  # a conversation costs what it costs alone
        ids, trained = (torch.from_numpy(part) for part in held_out.conversation(number))
        log_p = torch.log_softmax(model(ids[None, :-1])[0].double(), 1)
        alone = -log_p[torch.arange(len(ids) - 1), ids[1:]][trained[1:]]
        assert split[number].sum() == pytest.approx(alone.sum().item(), rel=1e-5)
        assert split[number, 1] == pytest.approx(alone[-1].item(), rel=1e-5)
        assert counted[number].tolist() == [len(alone) - 1, 1]
    nats, counts, n = split.sum(1), counted.sum(1), len(counted)
    assert numbers["loss_words"] == pytest.approx(split[:, 0].sum() / counted[:, 0].sum())
    assert numbers["loss_ends"] == pytest.approx(split[:, 1].mean())
    assert numbers["loss"] == pytest.approx(nats.sum() / counts.sum())
    rest = nats - numbers["loss"] * counts
    assert numbers["stderr"] == pytest.approx(math.sqrt(n / (n - 1) * (rest**2).sum()) / counts.sum())
    seen = Counter(int(i) for i, learnt in zip(train.tokens, train.trained, strict=True) if learnt)
    wanted = [int(i) for i, learnt in zip(held_out.tokens, held_out.trained, strict=True) if learnt]
    total = seen.total() + spm.vocab_size
    assert numbers["baseline"] == pytest.approx(np.mean([-math.log((seen[i] + 1) / total) for i in wanted]))
    assert (numbers["n"], numbers["conversations"]) == (len(wanted), n)


def test_the_same_questions_are_answered_whatever_the_model(loaded):
    model, train, held_out, spm = loaded
    subject = Subject(model, spm, "chatml", EvalConfig(answers=3, answer_tokens=40, seed=7))
    texts = answers(subject, train, held_out, "chatml")["texts"]
    assert answers(subject._replace(template=None), train, held_out, "chatml")["texts"] == texts
    assert [text["seed"] for text in texts] == [7, 8, 9]
    for text in texts:
        assert text["prompt"] == f"<|im_start|>user\nSay {text['truth']}.<|im_end|>\n<|im_start|>assistant\n"
    with torch.no_grad():  # now it writes marks of the template
        model.head.weight.zero_()
        model.head.weight[spm.control["<|im_start|>"]] = 50 * torch.sign(model.norm.weight)
        model.norm.weight.abs_()
    found = answers(subject, train, held_out, "chatml")
    assert found["marked"] == sum("<|im_start|>" in text["answer"] for text in found["texts"]) / 3 > 0


def test_stages_are_measured_alike_and_the_report_sets_them_side_by_side(measured: Place, loaded):
    found = json.loads((measured.runs / "mini/eval/results.json").read_text())
    assert found["sft"]["answers"]["loss"] < found["pretrain"]["answers"]["loss"]
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
    shown = re.findall(r"(?m)^(prompt|pretrain|sft|dpo|truth) +\D", out)[-5:]
    assert shown == ["prompt", "truth", "pretrain", "sft", "dpo"]
    page = (measured.runs / "mini/REPORT.md").read_text()
    for text in texts["pretrain"]["answers"]:
        at = page.index(text["prompt"].splitlines()[1], page.index("## Samples"))
        assert page.index("\npretrain", at) < page.index("\nsft", at) < page.index("\ntruth:", at)
