"""The rules that judge answers, by hand; and that nothing of what is shown was chosen by what the model says."""

from collections import Counter

import pytest

import checkpoint
import data.pack
import generate
import tokenizer
from eval import EvalConfig
from eval.generation import continuations, prompts, smoke
from eval.language import Subject
from eval.prompts import SMOKE, TEXTS, Prompt, distinct, judge, repetition, words
from tests.conftest import Place

CONFIG = EvalConfig(continuations=2, prompt_tokens=8, new_tokens=8, answer_tokens=12, seed=3)


def test_three_prompts_in_each_of_eight_categories():
    assert list(Counter(prompt.category for prompt in SMOKE).values()) == [3] * 8
    assert (len(TEXTS["prompts"]), len(TEXTS["everyday"])) == (5, 15)


def test_an_empty_answer_passes_no_prompt():
    assert not any(all(rule["passed"] for rule in judge(prompt, "").values()) for prompt in SMOKE)


def test_measures_by_hand():
    assert words("Don't STOP, the end-of 7 Ärger!") == ["don't", "stop", "the", "end", "of", "7", "ärger"]
    assert repetition(list("abcdabcd")) == pytest.approx(1 - 4 / 5)  # abcd bcda cdab dabc abcd
    assert repetition(list("aaaaaa")) == pytest.approx(1 - 1 / 3)
    assert repetition(list("abc")) == 0
    assert distinct([list("ab"), list("ac")], 1) == 3 / 4
    assert distinct([list("ab"), list("ab")], 2) == 1 / 2
    assert distinct([[]], 2) == 0


COLOURS = Prompt("x", "List two colours.", ("red", "blue*", "light green"), words=(2, 6), least=2)


@pytest.mark.parametrize(
    ("answer", "fails"),
    [
        ("Red and blueish.", set()),
        ("red red Red", {"content"}),
        ("reddish and blue", {"content"}),  # without a * a word counts only whole
        ("red blue one two three four five", {"length"}),
        ("red", {"content", "length"}),
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
    assert [each["seed"] for each in first] == [3, 4]
    texts = [spm.decode(ids.tolist()) for ids in packed.documents()]
    for example in first:
        assert any(text.startswith(example["prompt"] + example["truth"]) for text in texts)
    ours, theirs = ([words(each[key]) for each in first] for key in ("continuation", "truth"))
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
    assert numbers["ended"] == sum(text["ended"] for text in numbers["texts"]) / 5


def test_smoke_counts_what_passed(subject):
    numbers = smoke(subject[0])
    texts = numbers["texts"]
    assert [text["prompt"] for text in texts] == [prompt.text for prompt in SMOKE]
    for prompt, text in zip(SMOKE, texts, strict=True):
        assert text["rules"] == judge(prompt, text["answer"])
    assert numbers["passed"] == sum(text["passed"] for text in texts) / 24
    assert numbers["length"] == sum(text["rules"]["length"]["passed"] for text in texts) / 24
    assert sum(numbers["by_category"].values()) == pytest.approx(8 * numbers["passed"])
