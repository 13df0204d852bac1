"""Sampling against hand-worked cases and transformers; decoding many texts against decoding each alone."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from generate import Continuation, Decoder, Int8Linear, Sampling, generate, stream, to_int8
from tests.test_model import SMALL, TIED, build, random_tokens, to_transformers

GREEDY = Sampling(temperature=0)


def frequencies(sampling: Sampling, logits: torch.Tensor, draws: int = 3000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = [sampling.draw(logits, [0], generator) for _ in range(draws)]
    return torch.bincount(torch.tensor(drawn), minlength=len(logits)) / draws


def test_a_stream_yields_each_step():
    model = build()
    a, b = generate(model, [[1], [2, 3]], 9, temperature=0)
    steps = stream(model, [[1], [2, 3]], 9, temperature=0)
    assert [next(steps) for _ in range(4)] == [[(0, a[i]), (1, b[i])] for i in range(4)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0.5}, [0.685, 0.247, 0.062, 0.007]),  # p², normalised
        ({"temperature": 1e-3}, [1, 0, 0, 0]),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.7}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.81}, [0.526, 0.316, 0.158, 0]),
        ({"top_p": 0.01}, [1, 0, 0, 0]),
        ({"min_p": 0.4}, [0.625, 0.375, 0, 0]),
        ({"top_k": 3, "top_p": 0.6, "min_p": 0.1}, [0.625, 0.375, 0, 0]),  # top_p is of the three
    ],
)
def test_sampling_follows_the_distribution(options, expected):
    frequency = frequencies(Sampling(**options), torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05])))
    assert frequency.tolist() == pytest.approx(expected, abs=0.03)
    assert [p > 0 for p in frequency.tolist()] == [p > 0 for p in expected]


@pytest.mark.parametrize("span", [0.1, 9, 300])
@pytest.mark.parametrize("top_p", [0.02, 0.9, 0.999, 1.0])
def test_top_p_draws_what_a_full_sort_draws(span, top_p):
    """From flat distributions, where most of 3,000 tokens are candidates, to peaked ones."""
    logits = torch.linspace(0, span, 3000)[torch.randperm(3000, generator=torch.Generator().manual_seed(1))]
    p = np.exp(logits.double().numpy() - span)
    p /= p.sum()
    order = np.argsort(-p) if top_p < 1 else np.arange(3000)
    kept = order[: int(np.searchsorted(np.cumsum(p[order]), top_p * (1 - 1e-15))) + 1]
    reached = np.cumsum(p[kept])
    for seed in range(10):
        point = float(torch.rand((), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))) * reached[-1]
        drawn = Sampling(top_p=top_p).draw(logits, [0], torch.Generator().manual_seed(seed))
        assert drawn == kept[np.searchsorted(reached, point, side="right")]


def test_of_equally_likely_tokens_top_k_and_top_p_keep_the_first():
    logits = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0])
    assert Sampling(top_k=2).candidates(torch.softmax(logits, 0)).tolist() == [1, 2]
    assert Sampling(top_p=0.4).candidates(torch.tensor([0.25, 0.25, 0.25, 0.25])).tolist() == [0, 1]
    assert Sampling(top_p=0.5).candidates(torch.tensor([0.25, 0.25, 0.25, 0.25])).tolist() == [0, 1]


def test_penalties_by_hand():
    logits = torch.tensor([2.0, -2.0, 1.0, -1.0])
    assert Sampling(repetition_penalty=2.0).penalised(logits, [0, 1, 1]).tolist() == [1.0, -4.0, 1.0, -1.0]
    # 3 was followed by 0.
    assert Sampling(no_repeat_ngram=2).penalised(logits, [3, 0, 2, 3]).tolist() == [-math.inf, -2.0, 1.0, -1.0]


@pytest.mark.filterwarnings("ignore")  # from transformers
@pytest.mark.parametrize(("penalty", "ngram"), [(1.0, None), (1.7, None), (1.0, 1), (1.2, 3)])
def test_greedy_generation_equals_that_of_transformers(penalty, ngram):
    model, prompt = build(TIED, scale=3.0), [5, 6, 7, 5, 6]
    options = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    options |= {"repetition_penalty": penalty, "no_repeat_ngram_size": ngram or 0}
    expected = to_transformers(model).generate(torch.tensor([prompt]), **options)[0].tolist()
    new = generate(model, prompt, 40, temperature=0, repetition_penalty=penalty, no_repeat_ngram=ngram)
    assert prompt + new == expected


def test_generation_past_the_context():
    model = build()
    new = generate(model, list(range(60)), 3 * SMALL.context_length, temperature=0)
    assert len(new) == 3 * SMALL.context_length
    # The model sees the last 24 ids. For the second token the cache is full: it reads the later half again.
    seen = [*range(36, 60), new[0]]
    with torch.no_grad():
        assert new[0] == int(model(torch.tensor([seen[:-1]]))[0, -1].argmax())
        assert new[1] == int(model(torch.tensor([seen[-12:]]))[0, -1].argmax())


def test_seeds_decide_the_draws():
    model = build(scale=3.0)
    a, b, c = (generate(model, [1, 2], 20, seed=seed) for seed in (7, 7, 8))
    assert a == b != c
    assert generate(model, [[1, 2], [1, 2]], 20, seed=7) == [a, a]
    assert generate(model, [1, 2], 20) != generate(model, [1, 2], 20)


def test_a_stop_token_ends_the_text():
    free = generate(build(), [3], 12, temperature=0)
    assert generate(build(), [3], 12, temperature=0, stop=(free[5],)) == free[: free.index(free[5])]


NO_IDS = [([], {}), ([-1], {}), ([97], {}), ([1, 2**40], {})]
WRONG = [{"temperature": math.nan}, {"top_p": 0}, {"top_k": 0}, {"min_p": 1.5}, {"repetition_penalty": 0.0}]
WRONG += [{"no_repeat_ngram": 0}, {"seed": -1}]


@pytest.mark.parametrize(("ids", "options"), NO_IDS + [([1], options) for options in WRONG])
def test_impossible_requests_are_refused(ids, options):
    with pytest.raises(ValueError, match=next(iter(options), "at least one id, each in 0..96")):
        generate(build(), ids, 3, **options)


@pytest.mark.parametrize("temperature", [0, 1.3])
def test_log_probabilities_are_those_of_a_forward_pass(temperature):
    """Before temperature and penalties."""
    model, texts = build(scale=3.0).double(), []
    decoder = Decoder(model, 2, chunk=4)
    for ids in ([1, 2, 3, 4, 5, 6], [7]):
        texts.append(Continuation(ids, 12, Sampling(temperature=temperature, repetition_penalty=1.2), 3, (), 4))
        decoder.add(texts[-1])
    finish(decoder)
    for text in texts:
        with torch.no_grad():
            p = model(torch.tensor([text.ids[:-1]]))[0, -12:].log_softmax(-1)
        for expected, token, (logprob, candidates) in zip(p, text.ids[-12:], text.logprobs, strict=True):
            assert logprob == pytest.approx(float(expected[token]), abs=1e-5)  # logits are rounded to float32
            assert [i for i, _ in candidates] == expected.topk(4).indices.tolist()
            assert [value for _, value in candidates] == pytest.approx(expected.topk(4).values.tolist(), abs=1e-5)


def finish(decoder: Decoder) -> None:
    for _ in range(1000):
        if not decoder:
            return
        decoder.step()
    raise AssertionError("texts that never end")


@given(count=st.integers(1, 8), rows=st.integers(1, 4), chunk=st.none() | st.integers(1, 30), seed=st.integers(0, 999))
def test_texts_that_come_and_go_get_what_they_get_alone(count, rows, chunk, seed):
    """Greedy and sampled; longer than the context of 24, too; some are removed while they wait, are read or grow."""
    model, chance = build(seed=seed, scale=3.0).double(), random.Random(seed)
    decoder, stop, texts, expected, comes, leaves = Decoder(model, rows, chunk=chunk), range(0, 97, 19), [], [], [], []
    for number in range(count):
        prompt, most = random_tokens(chance.randint(1, 40), seed=seed + number).tolist(), chance.randint(0, 30)
        temperature = chance.choice([0, 1.0])
        alone = generate(model, prompt, most, temperature=temperature, seed=number, stop=stop)
        texts.append(Continuation(prompt, most, Sampling(temperature=temperature), number, stop))
        expected.append((prompt + alone, "stop" if len(alone) < most else "length"))
        comes.append(chance.randint(0, 25))
        leaves.append(chance.choice([1000, comes[-1] + chance.randint(0, 40)]))
    for step in range(200):
        for text, come, leave in zip(texts, comes, leaves, strict=True):
            if come == step:
                decoder.add(text)
            if leave == step and not text.ended:
                decoder.remove(text)
        drawn = decoder.step()
        assert len(decoder.texts) <= rows
        assert len({text for text, _ in drawn}) == len(drawn)
        for text, token in drawn:
            assert text.ids[-1] == token
    assert not decoder
    for text, (ids, ended), leave in zip(texts, expected, leaves, strict=True):
        if text.ended:
            assert text.ended == ended
            assert (text.ids[:-1] if ended == "stop" else text.ids) == ids
        else:
            assert leave < 1000
            assert text.ids == ids[: len(text.ids)]


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_text_whose_logits_are_not_finite_ends_alone(rows):
    """What it leaves in the cache harms no text that takes its place."""
    model = build(scale=3.0).double()
    with torch.no_grad():
        model.embed.weight[96] = math.nan
        model.head.weight[96] = 0  # so that 96 is never drawn
    prompts = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [5, 96, 7, 8], [4, 96], [9, 8], [7], [3, 96, 1, 1, 1, 2], [2, 1, 2]]
    decoder, texts = Decoder(model, rows, chunk=3), []
    for ids in prompts:
        texts.append(Continuation(ids, 14, GREEDY))
        decoder.add(texts[-1])
    finish(decoder)
    for text, ids in zip(texts, prompts, strict=True):
        if 96 in ids:
            assert text.ended == "error"
            assert "not finite" in str(text.error)
        else:
            assert text.ids == ids + generate(model, ids, 14, temperature=0)
    with pytest.raises(ValueError, match="not finite"):
        generate(model, [96], 3)


def test_decoding_in_inference_mode_leaves_a_model_that_can_be_trained():
    model = build()
    with torch.inference_mode():
        generate(model, [1, 2], 2)
    model(random_tokens(1, 5)).sum().backward()


def test_int8_weights_of_any_shape_count_as_parameters_and_are_not_trained():
    """PyTorch's int8 product needs rows of 16: others take the other way."""
    for inputs in (40, 48):
        weight, x = torch.randn(8, inputs), torch.randn(1, 3, inputs).bfloat16()
        exact = torch.nn.functional.linear(x.float(), weight)
        assert (Int8Linear(weight)(x).float() - exact).norm() < 0.03 * exact.norm()
    model = build()
    count = model.num_parameters()
    to_int8(model)
    assert model.num_parameters() == count
    with pytest.raises(AttributeError):  # its codes without their scale would give a wrong loss
        model(random_tokens(1, 4), random_tokens(1, 4))


def test_int8_weights_are_close_and_decode_together_as_alone():
    """Each weight is off by at most half a step, and bfloat16 rounds; long and short inputs take two ways."""
    exact, model, tokens = build(scale=1.0), build(scale=1.0), random_tokens(3, 20)
    to_int8(model)
    for ours, theirs in ((model.blocks[1].attn.k, exact.blocks[1].attn.k), (model.head, exact.head)):
        restored = ours.codes.float() * ours.scale.float()[:, None]
        step = theirs.weight.abs().amax(1, keepdim=True) / 127
        assert ((restored - theirs.weight).abs() <= 0.75 * step).all()  # the scale is rounded to 8 bits, too
    with torch.no_grad():
        expected = exact(tokens)
        for rows in (tokens, tokens[:, :5]):  # 60 rows, and 15
            error = model(rows).float() - expected[:, : rows.shape[1]]
            assert error.norm() <= 0.03 * expected[:, : rows.shape[1]].norm()
    prompts = [random_tokens(length, seed=length).tolist() for length in (3, 4, 9)]
    for ids, text in zip(generate(model, prompts, 9, temperature=0), prompts, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([text + ids[:-1]]))[0, len(text) - 1 :].float()
        drawn = logits.gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert float((logits.max(1).values - drawn).max()) <= 0.02 * float(logits.abs().max())
