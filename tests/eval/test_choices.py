"""The scorer against known answers: models whose probabilities are written down, chance, and each choice read alone."""

import itertools
import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import tokenizer
from eval import choices
from eval.choices import Question, Scored, credit, encode, fit, log_likelihoods, score, summary
from eval.language import Subject
from model import ModelConfig, Transformer
from tests.conftest import Place

SHAPE = ModelConfig(vocab_size=31, context_length=8, n_layers=2, d_model=16, n_heads=2)


@pytest.fixture(scope="module")
def model() -> Transformer:
    """One whose opinions are strong, and depend on every token before."""
    torch.manual_seed(0)
    model = Transformer(SHAPE).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(20)
    return model


def alone(model: Transformer, text: Scored) -> tuple[float, bool]:
    """By one forward pass over nothing else: log p of the scored ids, and whether each is the likeliest."""
    ids = list(text.ids)
    with torch.no_grad():
        log_p = torch.log_softmax(model(torch.tensor([ids[:-1]]))[0].double(), 1)
    scored = range(text.start, len(ids))
    return float(sum(log_p[i - 1, ids[i]] for i in scored)), all(log_p[i - 1].argmax() == ids[i] for i in scored)


ids = st.lists(st.integers(0, 2), min_size=1, max_size=7).map(lambda x: [30, *x])  # beginnings are shared often
scored = st.tuples(ids, st.integers(1, 3)).map(lambda pair: Scored(pair[0], min(pair[1], len(pair[0]) - 1)))


@settings(max_examples=25, deadline=None)
@given(st.lists(scored, min_size=1, max_size=20), st.sampled_from([1, 20, 4096]))
def test_a_text_scores_what_it_scores_alone(model, texts, batch_tokens):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(choices.BATCH_TOKENS, "cpu", batch_tokens)
        log_p, greedy = log_likelihoods(Subject(model, None), texts)
    expected, likeliest = zip(*(alone(model, text) for text in texts), strict=True)
    assert log_p == pytest.approx(expected, abs=2e-4)
    assert greedy.tolist() == list(likeliest)


def test_batches_that_do_not_fit_into_memory_are_halved(model, monkeypatch):
    texts = [Scored([30, *numbers], 1 + len(numbers) // 2) for numbers in itertools.product(range(3), repeat=3)]
    expected, lengths, hidden = log_likelihoods(Subject(model, None), texts), [], model.hidden

    def limited(ids, **rest):
        lengths.append(ids.shape[1])
        if ids.shape[1] > 20:
            raise torch.OutOfMemoryError
        return hidden(ids, **rest)

    monkeypatch.setattr(model, "hidden", limited)
    monkeypatch.setitem(choices.BATCH_TOKENS, "cpu", 80)
    log_p, greedy = log_likelihoods(Subject(model, None), texts)
    assert sum(length > 20 for length in lengths) == 2
    assert log_p == pytest.approx(expected[0], abs=2e-4)
    assert greedy.tolist() == expected[1].tolist()


def test_what_texts_share_is_read_once(model, monkeypatch):
    lengths, hidden = [], model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids, **rest: lengths.append(ids.shape[1]) or hidden(ids, **rest))
    for shared in ([], [1, 2, 3, 4, 5]):
        log_likelihoods(Subject(model, None), [Scored([*shared, 6 + i, 7, 8, 9], 3) for i in range(4)])
    assert lengths == [4 * 3, 8 + 3 * 4]  # the last id is only scored; the last shared id predicts four ids


def test_accuracy_computed_by_hand():
    probabilities = [[0.75, 0.20], [0.05, 0.90], [0.675, 0.08], [0.4, 0.4], [0.20, 0.675]]
    answers = (0, 0, 0, 1, 1)  # right, wrong, right, tied, right
    texts = tuple(("", text) for text in (" yes", " no"))
    numbers = summary([Question(texts, answer) for answer in answers], list(np.log(probabilities)), majority=True)
    assert numbers["accuracy"] == pytest.approx(0.7)
    assert numbers["ties"] == 1
    assert numbers["stderr"] == pytest.approx(statistics.stdev([1, 0, 1, 0.5, 1]) / math.sqrt(5))
    assert (numbers["baseline"], numbers["majority"], numbers["chance"]) == (0.6, 0.6, 0.5)
    # Per character: log 0.4 / 3 for yes beats log 0.4 / 2 for no, the others stay as they are.
    assert numbers["accuracy_norm"] == pytest.approx(0.6)
    assert credit([np.array([-50.0, -50.00001])], [1]) == 0.5  # float32 cannot tell them apart
    assert credit([np.array([-50.0, -50.001])], [1]) == 0
    assert credit([np.array([-1.0, -1.0, -1.0, -2.0])], [3])[0] == 0
    assert credit([np.array([-1.0, -1.0, -1.0, -2.0])], [0])[0] == pytest.approx(1 / 3)


def test_always_saying_what_is_commonest_is_no_better_than_the_baseline():
    questions = [Question((("", "no"), ("", "yes")), answer) for answer in [1] * 62 + [0] * 38]
    numbers = summary(questions, [np.array([-2.0, -1.0])] * 100, majority=True)
    assert numbers["accuracy"] == numbers["baseline"] == 0.62
    assert numbers["p_value"] == 1
    numbers = summary(questions, [np.array([-1.0, -2.0])] * 100, majority=True)
    assert numbers["accuracy"] == 0.38
    # It differs in all questions, and 38 of 100 are better.
    assert numbers["p_value"] == pytest.approx(stats.binomtest(38, 100).pvalue)


def test_a_model_without_opinions_and_accuracy_by_kind():
    kinds = ["syntax", "syntax", "semantics"]
    questions = [Question((("", "a"), ("", "b")), 0, {"field": kind}) for kind in kinds]
    numbers = summary(questions, [np.array([-2.0, -2.0])] * 3, majority=False)
    assert (numbers["accuracy"], numbers["ties"], numbers["p_value"]) == (0.5, 3, 1.0)
    scores = [np.array(pair) for pair in ([-1.0, -2.0], [-2.0, -1.0], [-1.0, -2.0])]
    assert summary(questions, scores, False)["by_field"] == {
        "semantics": {"accuracy": 1, "stderr": pytest.approx(math.sqrt(0.6 * 0.4 / 5)), "n": 1},
        "syntax": {"accuracy": 0.5, "stderr": pytest.approx(0.5), "n": 2},
    }


@pytest.fixture(scope="module")
def spm(made: Place) -> tokenizer.Tokenizer:
    return tokenizer.load(made.runs / "mini/tokenizer")


def test_space_between_context_and_ending_belongs_to_the_ending(spm):
    for context, ending in (("Answer:", " yes"), ("Answer: ", "yes")):
        text = encode(spm, context, ending)
        assert text.ids == [spm.bos, *spm.encode("Answer: yes")]
        assert text.start == 1 + len(spm.encode("Answer:"))
    assert encode(spm, "", "A sentence.") == Scored([spm.bos, *spm.encode("A sentence.")], 1)


@settings(max_examples=25, deadline=None)
@given(st.text(max_size=12), st.text(min_size=1, max_size=12))
def test_something_is_always_scored(spm, context, ending):
    text = encode(spm, context, ending)
    assert spm.decode(text.ids[1:]) == context + ending
    assert 1 <= text.start < len(text.ids)


def test_what_does_not_fit(spm, text):
    """A long context loses its beginning, and the question is counted; a long ending is scored whole."""
    torch.manual_seed(1)
    model = Transformer(ModelConfig(vocab_size=512, context_length=64, n_layers=1, d_model=32, n_heads=2)).eval()
    passage = " ".join(text)[:2000]
    questions = [Question((("Q:", " yes"), ("Q:", " no")), 0), Question(((passage, " yes"), (passage, " no")), 0)]
    scores, truncated = score(Subject(model, spm), questions)
    assert truncated == 1
    for (context, ending), found in zip(questions[1].choices, scores[1], strict=True):
        whole = encode(spm, context, ending)
        last = fit(whole, 64)
        assert last.ids == whole.ids[-65:]
        assert len(last.ids) - last.start == len(whole.ids) - whole.start
        assert found == pytest.approx(alone(model, last)[0], abs=1e-4)
    torch.nn.init.zeros_(model.head.weight)  # now each token costs log 512
    [scores], truncated = score(Subject(model, spm), [Question((("Q:", " " + passage), ("Q:", " no")), 0)])
    lengths = [len(whole.ids) - whole.start for whole in (encode(spm, "Q:", " " + passage), encode(spm, "Q:", " no"))]
    assert scores == pytest.approx([-n * math.log(512) for n in lengths], rel=1e-5)
    assert truncated == 0
