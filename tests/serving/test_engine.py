"""The engine against what the model and the tokenizer say of each request alone."""

import itertools
import math
import random
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoint
import generate
import tokenizer
from cli import UserError
from generate import Sampling
from model import ModelConfig, Transformer
from serving.engine import Busy, Engine, Failed, Piece, Request, TimedOut, Writer
from tests.conftest import Place
from tests.test_convert import OTHERS, spm_model

SHAPE = ModelConfig(vocab_size=512, context_length=40, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2)
GREEDY = Sampling(temperature=0)


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
    """Ours, and those that put a space before every text, or change white space."""
    lines = [line for part in text for line in part.split("\n")]
    models = {name: spm_model(lines, vocab_size=600, **options) for name, options in OTHERS.items()}
    return {"ours": ours} | {name: tokenizer.Tokenizer(model, "") for name, model in models.items()}


# -------------------------------------------------------------------------------------------------------------- text


def certain(spm: tokenizer.Tokenizer, ids: list[int]) -> list[str]:
    """What is certain of the text before each token, and, last, behind all: where no character is cut."""
    found = [""]
    for k in range(1, len(ids) + 1):
        text = spm.decode(ids[:k], begins=False)
        found.append(found[-1] if text.endswith("\ufffd") else text)
    return found


def cut(spm: tokenizer.Tokenizer, ids: list[int], stop: list[str]) -> tuple[str, int | None]:
    """The text up to the first stop string of those that are there when one first is, and how many tokens that took."""
    for k, text in enumerate([*certain(spm, ids), spm.decode(ids, begins=False)]):
        if found := [text.find(s) for s in stop if s in text]:
            return text[: min(found)], min(k, len(ids))
    return spm.decode(ids, begins=False), None


def write(spm: tokenizer.Tokenizer, ids: list[int], stop: list[str] = ()) -> tuple[list[Piece], int | None]:
    """A writer's pieces, and after how many tokens it stopped."""
    writer, pieces = Writer(spm, stop), []
    for k, token in enumerate(ids, 1):
        pieces.append(writer.add(token))
        if writer.stopped:
            return pieces, k
    pieces.append(writer.rest())
    return pieces, len(ids) if writer.stopped else None


def sequences(spm: tokenizer.Tokenizer) -> st.SearchStrategy[list[int]]:
    """Ids of real text, of characters spelt in bytes, of anything at all, control pieces and rows past the pieces."""
    spelt = [spm.pieces.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
    characters = st.text(st.sampled_from("é€🙂▁ a"), max_size=4)
    of_bytes = characters.map(lambda text: [spelt[byte] for byte in text.encode()])
    broken = st.lists(st.sampled_from([spelt[b] for b in (0x41, 0x80, 0xAC, 0x82, 0xE2, 0xF0, 0x9F, 0x20)]), max_size=5)
    real = st.text(st.sampled_from("the return self. \n()é"), max_size=20).map(spm.encode)
    control = st.sampled_from([[i] for i in (spm.bos, spm.eos, *spm.control.values(), spm.vocab_size + 3)])
    some = st.lists(st.integers(0, spm.vocab_size - 1), max_size=6)
    return st.lists(st.one_of(of_bytes, broken, real, control, some), max_size=7).map(
        lambda p: list(itertools.chain(*p))
    )


def check_writer(spm: tokenizer.Tokenizer, ids: list[int], stop: list[str]) -> None:
    pieces, stopped = write(spm, ids, stop)
    text = "".join(piece.text for piece in pieces)
    assert (text, stopped) == cut(spm, ids, stop)
    tokens = [token for piece in pieces for token in piece.tokens]
    before = certain(spm, ids)
    if stopped is None:
        assert [token.id for token in tokens] == ids
    else:  # those that begin before the stop string does
        assert not any(s in text for s in stop)
        assert [token.id for token in tokens] == [i for i, t in zip(ids, before, strict=False) if len(t) < len(text)]
    assert [token.start for token in tokens] == [len(t) for t in before[: len(tokens)]]
    so_far = 0
    for piece in pieces:  # a token comes no later than the text that it begins
        so_far += len(piece.text)
        tokens = tokens[len(piece.tokens) :]
        assert all(token.start >= so_far for token in tokens) or stopped is not None


@pytest.mark.parametrize("name", ["ours", *OTHERS])
def test_the_pieces_of_a_text_are_its_decode(spms, name):
    spm = spms[name]

    @settings(max_examples=120, deadline=None, derandomize=True)
    @given(ids=sequences(spm))
    def check(ids):
        assert "".join(piece.text for piece in write(spm, ids)[0]) == spm.decode(ids, begins=False)
        check_writer(spm, ids, [])

    check()


@pytest.mark.parametrize("name", ["ours", *OTHERS])
def test_a_stop_string_cuts_the_text_where_it_first_stands(spms, name):
    spm = spms[name]

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(data=st.data(), ids=sequences(spm))
    def check(data, ids):
        text = spm.decode(ids, begins=False)
        places = st.tuples(st.integers(0, max(0, len(text) - 1)), st.integers(1, 9))
        there = places.map(lambda place: text[place[0] : sum(place)]).filter(bool) if text else st.just("x")
        stop = data.draw(
            st.lists(there | st.sampled_from(["aa", "aab", "ret", "\n\n", "\ufffd", "é", " "]), max_size=4)
        )
        check_writer(spm, ids, stop)

    check()


def test_a_stop_string_over_several_tokens_is_never_shown(ours):
    pieces, stopped = write(ours, ours.encode("one aaaab two"), ["aab"])
    assert "".join(piece.text for piece in pieces) == "one aa"
    assert stopped is not None
    pieces, stopped = write(ours, ours.encode("one aa"), ["aab"])
    assert ("".join(piece.text for piece in pieces), stopped) == ("one aa", None)


# ------------------------------------------------------------------------------------------------------------ engine


def ask(ids=(1, 2, 3), most=8, **options) -> Request:
    return Request(**{"ids": list(ids), "max_tokens": most, "sampling": GREEDY, **options})


def whole(generation) -> tuple[str, list[int], str]:
    """Text, ids reported and why it ended."""
    pieces = list(generation)
    assert all(piece.finish is None for piece in pieces[:-1])
    return "".join(p.text for p in pieces), [t.id for p in pieces for t in p.tokens], pieces[-1].finish


def alone(model, spm, request: Request) -> tuple[str, str, int]:
    """Text, why it ended, and how many tokens were drawn, of a request that the model has for itself."""
    s = request.sampling
    options = {"temperature": s.temperature, "top_p": s.top_p, "top_k": s.top_k, "seed": request.seed}
    ids = generate.generate(model, request.ids, request.max_tokens, stop=request.stop_ids, **options)
    text, stopped = cut(spm, ids, request.stop)
    finish = "stop" if stopped is not None or len(ids) < request.max_tokens else "length"
    return text, finish, len(ids) if stopped is None else stopped


def until(true, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.002)


class Gate:
    """Lets an engine take a step at a time."""

    def __init__(self, engine: Engine):
        self.steps, self.step, self.open = threading.Semaphore(0), engine.decoder.step, False
        self.at = threading.Semaphore(0)
        engine.decoder.step = self

    def __call__(self):
        if not self.open:
            self.at.release()
            self.steps.acquire()
        return self.step()

    def wait(self) -> None:
        """Returns when the engine stands before a step."""
        assert self.at.acquire(timeout=10)

    def go(self) -> None:
        self.steps.release()

    def free(self) -> None:
        self.open = True
        self.steps.release()


@pytest.fixture
def gated(model, ours):
    """An engine with room for one text and two that wait, that stands still."""
    with Engine(model, ours, rows=1, waiting=2) as engine:
        gate = Gate(engine)
        yield engine, gate
        gate.free()


def test_many_requests_at_once_get_what_each_gets_alone(model, ours):
    rng, requests = random.Random(0), []
    for i in range(200):
        ids = [rng.randrange(512) for _ in range(rng.randint(1, 60))]
        sampling = Sampling(
            temperature=rng.choice([0, 0.7, 1.3]), top_p=rng.choice([None, 0.9]), top_k=rng.choice([None, 40])
        )
        stop_ids = rng.sample(range(512), rng.choice([0, 8]))
        stop = rng.sample(["e", "th", " ", "se", "\n", "re"], rng.choice([0, 0, 1, 2]))
        requests.append(ask(ids, rng.randint(0, 16), sampling=sampling, seed=i, stop_ids=stop_ids, stop=stop))
    found = {}
    with Engine(model, ours, rows=5, waiting=200) as engine:

        def client(mine: list[int]) -> None:
            for i in mine:
                [generation] = engine.submit([requests[i]])
                text, _, finish = whole(generation)
                found[i] = text, finish, generation.tokens

        clients = [threading.Thread(target=client, args=(range(k, 200, 12),)) for k in range(12)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        assert not engine.open
        assert not engine.decoder
    assert found == {i: alone(model, ours, request) for i, request in enumerate(requests)}


def test_what_is_reported_of_tokens_is_what_was_drawn(model, ours):
    request = ask(ours.encode("Return the"), 12, logprobs=3)
    with Engine(model, ours) as engine:
        tokens = [token for piece in engine.submit([request])[0] for token in piece.tokens]
    assert [token.id for token in tokens] == generate.generate(model, request.ids, 12, temperature=0)
    with torch.no_grad():
        p = model(torch.tensor([[*request.ids, *(token.id for token in tokens)][:-1]]))[0, -12:].log_softmax(-1)
    for token, expected in zip(tokens, p, strict=True):
        assert token.logprob == pytest.approx(float(expected[token.id]), abs=1e-5)
        assert [i for i, _ in token.candidates] == expected.topk(3).indices.tolist()


def test_no_tokens_asked_for_is_an_empty_text(model, ours):
    with Engine(model, ours, seconds=5) as engine:
        [generation] = engine.submit([ask(most=0)])
        assert whole(generation) == ("", [], "length")
        assert whole(engine.submit([ask()])[0])[2] == "length"


def test_as_many_wait_as_may_and_no_more(gated, model, ours):
    engine, gate = gated
    first = engine.submit([ask([1], 3)])
    gate.wait()
    with pytest.raises(Busy, match="1 requests are under way; at most 3 may be"):
        engine.submit([ask([2]), ask([3]), ask([4])])
    assert len(engine.open) == 1  # all of them or none
    more = engine.submit([ask([2], 3), ask([3], 3)])
    assert engine.load() == (0, 3)
    with pytest.raises(Busy):
        engine.submit([ask([5])])
    gate.free()
    for i, generation in enumerate([*first, *more], 1):
        assert whole(generation)[0] == alone(model, ours, ask([i], 3))[0]
    until(lambda: not engine.open)
    assert whole(engine.submit([ask([6])])[0])[2] == "length"


def test_impossible_requests_are_refused_all_together(gated):
    engine, _ = gated
    for wrong in (ask([512]), ask([]), ask(seed=-1), ask(most=-1)):
        with pytest.raises(ValueError, match="expected"):
            engine.submit([ask(), wrong])
    assert not engine.open
    assert not engine.arrived


def test_a_request_that_nobody_waits_for_frees_its_place(gated, model, ours):
    """While it waits for a row, while its prompt is read, and while it is decoded."""
    engine, gate = gated
    [decoded, waiting] = engine.submit([ask([1, 2], 30), ask([3, 4], 30)])
    for _ in range(4):  # at the fourth, three tokens are drawn
        gate.wait()
        gate.go()
    waiting.cancel()
    gate.wait()
    gate.go()
    gate.wait()
    assert whole(waiting) == ("", [], "cancelled")
    assert list(engine.open.values()) == [decoded]
    before = decoded.tokens
    decoded.cancel()
    gate.go()
    until(lambda: decoded.ended)
    assert decoded.tokens <= before + 1
    text, _, finish = whole(decoded)
    assert finish == "cancelled"
    assert text == ours.decode(generate.generate(model, [1, 2], decoded.tokens, temperature=0), begins=False)
    assert (len(engine.open), len(engine.decoder)) == (0, 0)


def test_a_request_may_be_cancelled_while_its_prompt_is_read(gated, model, ours):
    engine, gate = gated
    engine.decoder.chunk = 4
    [generation, other] = engine.submit([ask(range(30), 5), ask([7, 8], 5)])
    for _ in range(3):
        gate.wait()
        gate.go()
    gate.wait()
    assert engine.decoder.texts == [generation.text]
    assert engine.decoder.ready == 0
    generation.cancel()
    gate.free()
    assert whole(generation) == ("", [], "cancelled")
    assert whole(other)[0] == alone(model, ours, ask([7, 8], 5))[0]


def test_a_request_may_be_cancelled_before_the_engine_has_seen_it(gated):
    """The engine's thread stands between taking in those that have arrived and letting go those that have left."""
    engine, gate = gated
    let_go, here, on = engine._let_go, threading.Event(), threading.Event()

    def held(*taken):
        here.set()
        assert on.wait(10)
        let_go(*taken)

    engine._let_go = held
    [first] = engine.submit([ask()])
    assert here.wait(10)
    [second] = engine.submit([ask()])
    second.cancel()
    on.set()
    gate.free()
    assert whole(second) == ("", [], "cancelled")
    assert whole(first)[2] == "length"
    assert engine.running


def test_a_request_ends_when_its_time_is_up(model, ours):
    with Engine(model, ours, rows=1, seconds=0.3) as engine:
        step = engine.decoder.step
        engine.decoder.step = lambda: (time.sleep(0.05), step())[1]
        [decoded, waiting] = engine.submit([ask(most=1000), ask(most=1000)])
        for generation in (decoded, waiting):
            with pytest.raises(TimedOut, match=r"longer than 0\.3 seconds"):
                list(generation)
        assert not engine.open
        assert not engine.decoder
        assert decoded.tokens
        engine.decoder.step = step
        assert whole(engine.submit([ask()])[0])[2] == "length"


def test_when_the_engine_fails_everyone_hears_of_it(model, ours, caplog):
    with Engine(model, ours, rows=1) as engine:
        gate = Gate(engine)
        generations = engine.submit([ask(), ask()])
        gate.wait()

        def fail():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        gate.step = fail
        gate.free()
        for generation in generations:
            with pytest.raises(Failed, match="the engine has stopped"):
                list(generation)
        assert not engine.running
        with pytest.raises(Failed, match="the engine has stopped"):
            engine.submit([ask()])
        assert not engine.open
    assert "illegal memory access" in caplog.text


def test_closing_ends_what_is_under_way(model, ours):
    with Engine(model, ours, rows=1) as engine:
        generations = engine.submit([ask(most=10**6), ask(most=10**6)])
        until(lambda: generations[0].tokens > 3)
    for generation in generations:
        with pytest.raises(Failed, match="the engine has stopped"):
            list(generation)
    assert not engine.thread.is_alive()


def test_a_model_that_gives_nan_fails_that_request_alone(model, ours):
    damaged = Transformer(SHAPE).double()
    damaged.load_state_dict(model.state_dict())
    expected = alone(model, ours, ask([3, 4]))[0]
    with torch.no_grad():
        damaged.embed.weight[511] = math.nan
    with Engine(damaged, ours, rows=2) as engine:
        bad, good, later = engine.submit([ask([1, 511]), ask([3, 4]), ask([3, 4])])
        with pytest.raises(Failed, match="the logits are not finite"):
            list(bad)
        assert whole(good)[0] == whole(later)[0] == expected
        assert engine.running


def test_a_client_that_raises_harms_nobody_else(model, ours, caplog):
    got = []

    def put(i: int, piece) -> None:
        got.append(i)
        raise RuntimeError("nobody is there")

    with Engine(model, ours, rows=2) as engine:
        [raising] = engine.submit([ask([1], 100)], put)
        [good] = engine.submit([ask([3, 4])])
        assert whole(good)[0] == alone(model, ours, ask([3, 4]))[0]
        until(lambda: raising.ended)
        assert raising.tokens < 100
        assert engine.running
        engine.submit([ask([1], 2)], put)
    assert got
    assert "nobody is there" in caplog.text
    assert not engine.open


def test_what_several_requests_get_is_told_apart_by_number(model, ours):
    got: dict[int, list] = {0: [], 1: [], 2: []}
    with Engine(model, ours, rows=2) as engine:
        generations = engine.submit([ask([i], 6) for i in (4, 5, 6)], lambda i, piece: got[i].append(piece))
        until(lambda: all(generation.ended for generation in generations))
    for i, pieces in got.items():
        assert "".join(piece.text for piece in pieces) == alone(model, ours, ask([i + 4], 6))[0]
        assert [piece.finish for piece in pieces if piece.finish] == ["length"]


def test_a_long_stop_string_costs_the_others_nothing(made: Place):
    """What it may begin with is no longer than the text that is held back."""
    spm = tokenizer.load(made.runs / "mini/tokenizer")
    writer, ids = Writer(spm, ["q" * 1_000_000]), spm.encode("quite a quick question")
    text = "".join(writer.add(i).text for i in ids) + writer.rest().text
    assert text == "quite a quick question"


def test_an_engine_without_room_says_so(made: Place, monkeypatch, caplog):
    monkeypatch.setattr("serving.engine.Decoder", lambda *_, **__: torch.empty(1 << 60))
    model, spm = checkpoint.load_model(made.runs / "mini/pretrain/final"), tokenizer.load(made.runs / "mini/tokenizer")
    with pytest.raises(UserError, match="no memory for 3 texts"), Engine(model, spm, rows=3):
        pass
