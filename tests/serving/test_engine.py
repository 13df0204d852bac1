"""The engine against what the model and the tokenizer give for each request alone."""

import itertools
import math
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import generate
import tokenizer
from cli import UserError
from generate import Continuation, Sampling
from model import ModelConfig, Transformer
from serving.engine import Engine, Generation, Piece, Refused
from tests.conftest import Place
from tests.serving.conftest import slow, until
from tests.test_convert import OTHERS, spm_model

SHAPE = ModelConfig(vocab_size=512, context_length=40, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2)
GREEDY = Sampling(temperature=0)
KINDS = ["LLaMA's", "SentencePiece's defaults"]


@pytest.fixture(scope="module")
def model() -> Transformer:
    """In float64, so that decoding beside others is exact."""
    torch.manual_seed(0)
    model = Transformer(SHAPE)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3) if p.dim() == 2 else p.uniform_(0.5, 1.5)
    return model.double()


@pytest.fixture(scope="module")
def ours(made: Place) -> tokenizer.Tokenizer:
    return tokenizer.load(made.runs / "mini/tokenizer")


@pytest.fixture(scope="module")
def spms(ours, text) -> dict[str, tokenizer.Tokenizer]:
    """Ours, and tokenizers that put a space before every text, or change white space."""
    lines = [line for part in text for line in part.split("\n")]
    others = {kind: tokenizer.Tokenizer(spm_model(lines, vocab_size=600, **OTHERS[kind]), "") for kind in KINDS}
    return {"ours": ours} | others


# -------------------------------------------------------------------------------------------------------------- text


def certain(spm: tokenizer.Tokenizer, ids: list[int]) -> list[str]:
    """The certain text before each token and, last, after all: where no character is cut."""
    texts = [""]
    for k in range(1, len(ids) + 1):
        text = spm.decode(ids[:k], begins=False)
        texts.append(texts[-1] if text.endswith("\ufffd") else text)
    return texts


def cut(spm: tokenizer.Tokenizer, ids: list[int], stop: list[str]) -> tuple[str, int | None]:
    """The text before the first stop string, and how many tokens it takes to complete one; None: there is none."""
    for k, text in enumerate([*certain(spm, ids), spm.decode(ids, begins=False)]):
        if places := [text.find(s) for s in stop if s in text]:
            return text[: min(places)], min(k, len(ids))
    return spm.decode(ids, begins=False), None


def write(spm: tokenizer.Tokenizer, ids: list[int], stop: list[str]) -> tuple[list[Piece], int | None]:
    """The pieces of a text, and after how many tokens it stopped."""
    text, pieces = Generation(spm, Continuation([0], 1, GREEDY), stop), []
    for k, token in enumerate(ids, 1):
        text.add(token)
        pieces.append(text.read())
        if text.finish:
            return pieces, k
    text.end("length")
    pieces.append(text.read())
    return pieces, len(ids) if text.finish == "stop" else None


def sequences(spm: tokenizer.Tokenizer) -> st.SearchStrategy[list[int]]:
    """Ids of real text, of characters in bytes, of anything, of control pieces, and of rows without a piece."""
    byte = [spm.pieces.piece_to_id(f"<0x{b:02X}>") for b in range(256)]
    characters = st.text(st.sampled_from("é€🙂▁ a"), max_size=4).map(lambda text: [byte[b] for b in text.encode()])
    broken = st.lists(st.sampled_from([byte[b] for b in (0x41, 0x80, 0xAC, 0x82, 0xE2, 0xF0, 0x9F, 0x20)]), max_size=5)
    real = st.text(st.sampled_from("the return self. \n()é"), max_size=20).map(spm.encode)
    control = st.sampled_from([[i] for i in (spm.bos, spm.eos, *spm.control.values(), spm.vocab_size + 3)])
    some = st.lists(st.integers(0, spm.vocab_size - 1), max_size=6)
    parts = st.lists(st.one_of(characters, broken, real, control, some), max_size=7)
    return parts.map(lambda lists: list(itertools.chain(*lists)))


@pytest.mark.parametrize("name", ["ours", *KINDS])
def test_the_pieces_add_up_to_the_decoded_text_before_a_stop_string(spms, name):
    spm = spms[name]

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(data=st.data(), ids=sequences(spm))
    def check(data, ids):
        text = spm.decode(ids, begins=False)
        places = st.tuples(st.integers(0, max(0, len(text) - 1)), st.integers(1, 9))
        inside = places.map(lambda place: text[place[0] : sum(place)] or "x")
        others = st.sampled_from(["aa", "aab", "ret", "\n\n", "\ufffd", "é", " "])
        stop = data.draw(st.lists(inside | others, max_size=4))
        pieces, stopped = write(spm, ids, stop)
        text = "".join(piece.text for piece in pieces)
        assert (text, stopped) == cut(spm, ids, stop)
        before = certain(spm, ids)
        tokens = [token for piece in pieces for token in piece.tokens]
        if stopped is None:
            assert [token.id for token in tokens] == ids
        else:  # the tokens that begin before the stop string
            begun = [i for i, t in zip(ids, before, strict=False) if len(t) < len(text)]
            assert [token.id for token in tokens] == begun
        assert [token.start for token in tokens] == [len(t) for t in before[: len(tokens)]]

    check()


# ------------------------------------------------------------------------------------------------------------ engine


def ask(spm, ids=(1, 2, 3), most=8, sampling=GREEDY, seed=None, stop_ids=(), stop=()) -> Generation:
    return Generation(spm, Continuation(ids, most, sampling, seed, stop_ids), stop)


def whole(generation: Generation) -> tuple[str, str]:
    """The text and why it ended."""
    pieces = list(generation)
    assert all(piece.finish is None for piece in pieces[:-1])
    assert "".join(piece.text for piece in pieces) == generation.text
    return generation.text, pieces[-1].finish


def alone(model, spm, ids, most, sampling=GREEDY, seed=None, stop_ids=(), stop=()) -> tuple[str, str]:
    """The text of a request that the model has for itself, and why it ends."""
    options = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k, "seed": seed}
    new = generate.generate(model, ids, most, stop=stop_ids, **options)
    text, stopped = cut(spm, new, stop)
    return text, "stop" if stopped is not None or len(new) < most else "length"


@pytest.fixture
def small(model):
    """A slow engine, with room for one text and two that wait."""
    with Engine(model, rows=1, waiting=2) as engine:
        slow(engine, 0.05)
        yield engine


def test_many_requests_at_once_get_what_each_gets_alone(model, ours):
    rng, requests = random.Random(0), []
    for i in range(60):
        request = {"ids": rng.choices(range(512), k=rng.randint(1, 60)), "most": rng.randint(1, 16), "seed": i}
        options = {"top_p": rng.choice([None, 0.9]), "top_k": rng.choice([None, 40])}
        request["sampling"] = Sampling(temperature=rng.choice([0, 0.7, 1.3]), **options)
        request["stop_ids"] = rng.sample(range(512), rng.choice([0, 8]))
        request["stop"] = rng.sample(["e", "th", " ", "se", "\n", "re"], rng.choice([0, 0, 1, 2]))
        requests.append(request)

    def answer(request: dict) -> tuple[str, str]:
        engine.submit([generation := ask(ours, **request)])
        return whole(generation)

    with Engine(model, rows=5, waiting=200) as engine, ThreadPoolExecutor(12) as clients:
        answers = list(clients.map(answer, requests))
        until(lambda: not engine.open and not engine.decoder)
    assert answers == [alone(model, ours, **request) for request in requests]


def test_the_queue_has_a_limit(small, model, ours):
    texts = [ask(ours, [i], 3) for i in (1, 2, 3)]
    small.submit(texts[:1])
    with pytest.raises(Refused, match="takes at most 3") as error:
        small.submit([ask(ours), ask(ours), ask(ours)])
    assert error.value.status == 429
    assert len(small.open) == 1  # all or none
    small.submit(texts[1:])
    with pytest.raises(Refused):
        small.submit([ask(ours)])
    for i, text in enumerate(texts, 1):
        assert whole(text) == alone(model, ours, [i], 3)


def test_a_cancelled_request_frees_its_place(small, model, ours):
    """While it waits for a row, and while it is decoded."""
    decoded, waiting = ask(ours, [1, 2], 30), ask(ours, [3, 4], 30)
    small.submit([decoded, waiting])
    until(lambda: len(decoded.tokens) >= 3)
    waiting.cancelled = True
    assert whole(waiting) == ("", "cancelled")
    until(lambda: list(small.open.values()) == [decoded])
    before = len(decoded.tokens)
    decoded.cancelled = True
    text, finish = whole(decoded)
    assert finish == "cancelled"
    assert len(decoded.tokens) <= before + 2
    new = generate.generate(model, [1, 2], len(decoded.tokens), temperature=0)
    assert text == ours.decode(new, begins=False)
    until(lambda: not small.open and not small.decoder)


def test_a_request_ends_when_its_time_is_up(model, ours):
    with Engine(model, rows=1, seconds=0.3) as engine:
        step = engine.decoder.step
        slow(engine, 0.05)
        decoded, waiting = ask(ours, most=1000), ask(ours, most=1000)
        engine.submit([decoded, waiting])
        for text in (decoded, waiting):
            with pytest.raises(Refused, match=r"longer than 0\.3 seconds") as error:
                list(text)
            assert error.value.status == 504
        until(lambda: not engine.open and not engine.decoder)
        assert decoded.tokens
        engine.decoder.step = step
        engine.submit([text := ask(ours)])
        assert whole(text)[1] == "length"


def test_a_closed_engine_ends_its_texts_with_an_error(model, ours):
    with Engine(model, rows=1) as engine:
        slow(engine, 0.05)
        engine.submit([decoded := ask(ours, most=1000), waiting := ask(ours)])
    for text in (decoded, waiting):
        with pytest.raises(Refused, match="has stopped"):
            list(text)
    with pytest.raises(Refused, match="has stopped"):
        engine.submit([ask(ours)])


def test_logits_that_are_not_finite_fail_that_request_alone(model, ours):
    damaged = Transformer(SHAPE).double()
    damaged.load_state_dict(model.state_dict())
    with torch.no_grad():
        damaged.embed.weight[511] = math.nan
    with Engine(damaged, rows=2) as engine:
        bad, good = ask(ours, [1, 511]), ask(ours, [3, 4])
        engine.submit([bad, good])
        with pytest.raises(Refused, match="the logits are not finite"):
            list(bad)
        assert whole(good) == alone(model, ours, [3, 4], 8)
        assert engine.running


def test_an_engine_without_memory_says_so(model, monkeypatch):
    monkeypatch.setattr("serving.engine.Decoder", lambda *_, **__: torch.empty(1 << 60))
    with pytest.raises(UserError, match="no memory for 3 texts"):
        Engine(model, rows=3)
