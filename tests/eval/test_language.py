"""Likelihoods against known answers: a uniform model, and every token counted once with the context it is due."""

import lzma
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import checkpoint
import data.pack
import tokenizer
from cli import UserError
from eval import EvalConfig
from eval.language import Subject, articles, detokenized, token_nats, validation, wikitext2
from model import ModelConfig, Transformer
from tests.conftest import Place


@pytest.fixture(scope="module")
def strong() -> Subject:
    """A model whose opinions depend on every token before, and a tokenizer that knows the id that opens a text."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=31, context_length=8, n_layers=1, d_model=16, n_heads=2)).eval()
    with torch.no_grad():
        model.embed.weight.mul_(50)
        model.head.weight.mul_(50)
    return Subject(model, SimpleNamespace(bos=1))


@torch.inference_mode()
def nats_after(subject: Subject, stream: list[int], first: int, i: int) -> float:
    """What the token after position i costs, given those from `first` on."""
    logits = subject.model(torch.tensor([stream[first : i + 1]]))[0, -1]
    return -float(torch.log_softmax(logits.double(), 0)[stream[i + 1]])


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(made: Place):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=512, context_length=64, n_layers=1, d_model=16, n_heads=2)).eval()
    torch.nn.init.zeros_(model.head.weight)
    spm = tokenizer.load(made.runs / "mini/tokenizer")
    packed = data.pack.load(made.runs / "mini/packed", spm.sha256)["val"]
    found = validation(Subject(model, spm), packed)
    assert found["perplexity"] == pytest.approx(512)
    assert found["bits_per_byte"] == pytest.approx(9 * len(packed.tokens) / packed.bytes)
    joined = "\n".join(spm.decode(ids.tolist()) for ids in packed.documents()).encode()
    assert found["xz_bits_per_byte"] == 8 * len(lzma.compress(joined, preset=9)) / len(joined)
    assert found["n"] == len(packed.tokens)


@pytest.mark.parametrize("n", [1, 3, 8, 9, 12, 13, 16, 41])
def test_each_token_is_predicted_once_from_at_least_half_a_context(strong, n):
    tokens = np.random.default_rng(0).integers(31, size=n)
    found, stream, T = token_nats(strong, tokens), [1, *tokens.tolist()], 8
    assert found.shape == (n,)
    for i in range(n):
        # All contexts the token may have: no longer than T, and reaching its stream's start or half a context back.
        firsts = range(max(0, i - T + 1), (0 if i < T else i - T // 2) + 1)
        assert min(abs(found[i] - nats_after(strong, stream, first, i)) for first in firsts) < 1e-4


@pytest.mark.parametrize("n", [1, 8, 9, 19, 33])
def test_windows_that_do_not_overlap(strong, n):
    """As in lm-evaluation-harness: each predicts context_length tokens; the last one ends where the text ends."""
    tokens = np.random.default_rng(1).integers(31, size=n)
    found = token_nats(strong, tokens, step=8)
    for i in range(n):
        window = min(i // 8 * 8, max(0, n - 8))
        assert found[i] == pytest.approx(nats_after(strong, [1, *tokens.tolist()], window, i), abs=1e-4)


def test_weights_that_are_not_finite(strong):
    broken = Transformer(strong.model.config).eval()
    torch.nn.init.constant_(broken.head.weight, np.nan)
    with pytest.raises(UserError, match="the logits are not finite"):
        token_nats(strong._replace(model=broken), np.arange(20))


def test_of_many_held_out_documents_some_are_read(made: Place):
    model = checkpoint.load_model(made.runs / "mini/pretrain/final")
    spm = tokenizer.load(made.runs / "mini/tokenizer")
    packed = data.pack.load(made.runs / "mini/packed", spm.sha256)["val"]
    few = EvalConfig(validation_tokens=len(packed.tokens) // 3 + 1)
    whole, third = (validation(Subject(model, spm, None, config), packed) for config in (EvalConfig(), few))
    documents = [len(ids) for ids in packed.documents()]
    assert (whole["n"], third["n"]) == (sum(documents), sum(documents[::3]))
    assert third["documents"] == len(documents[::3])
    assert third["bits_per_byte"] == pytest.approx(whole["bits_per_byte"], rel=0.3)


# ---------------------------------------------------------------------------------------------------------- WikiText-2

RAW = (
    ' \n = Ice ( water ) = \n \n Ice is " frozen " water , mostly : it is 0 @.@ 9 times as dense . \n'
    " \n = = Uses = = \n The Inuits ' houses cost 1 @,@ 000 @-@ odd ; [ citation needed ] 4 ° C ! \n"
    " = Rain = \n \n It 's rain that falls . \n"
)
FIRST = (
    ' = Ice (water) =\n\nIce is "frozen" water, mostly: it is 0.9 times as dense.\n'
    "\n== Uses ==\nThe Inuits' houses cost 1,000-odd; [citation needed] 4°C!\n"
)


def test_articles_and_their_spacing():
    pages = articles(RAW)
    assert [page.splitlines()[0].strip() for page in pages] == ["= Ice ( water ) =", "= Rain ="]
    assert "".join(pages) == RAW.removeprefix(" \n")
    assert [detokenized(page) for page in pages] == [FIRST, " = Rain =\n\nIt's rain that falls.\n"]
    assert articles("") == articles(" \n \n") == []


def test_perplexities_of_a_uniform_model(made: Place):
    model = Transformer(ModelConfig(vocab_size=512, context_length=64, n_layers=1, d_model=16, n_heads=2)).eval()
    torch.nn.init.zeros_(model.head.weight)
    spm = tokenizer.load(made.runs / "mini/tokenizer")
    found = wikitext2(Subject(model, spm), RAW)
    tokens = sum(len(spm.encode(detokenized(page))) for page in articles(RAW))
    words = sum(len(re.split(r"\s+", page)) for page in articles(RAW))
    size = len(RAW.removeprefix(" \n").encode())
    assert found["n"] == tokens
    for prefix in ("", "strided_"):
        assert found[f"{prefix}token_perplexity"] == pytest.approx(512)
        assert found[f"{prefix}word_perplexity"] == pytest.approx(512 ** (tokens / words), rel=1e-5)
        assert found[f"{prefix}byte_perplexity"] == pytest.approx(512 ** (tokens / size), rel=1e-5)
        assert found[f"{prefix}bits_per_byte"] == pytest.approx(9 * tokens / size)
