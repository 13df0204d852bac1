"""Likelihoods against known answers: a uniform model, and every token counted once with the context it is due."""

import lzma
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

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


@pytest.fixture(scope="module")
def uniform(made: Place) -> Subject:
    """A model that finds all 512 pieces equally likely: a token costs 9 bits."""
    model = Transformer(ModelConfig(vocab_size=512, context_length=64, n_layers=1, d_model=16, n_heads=2)).eval()
    torch.nn.init.zeros_(model.head.weight)
    return Subject(model, tokenizer.load(made.runs / "mini/tokenizer"))


def test_validation_of_a_uniform_model(uniform, made: Place):
    spm = uniform.tokenizer
    packed = data.pack.load(made.runs / "mini/packed", spm.sha256)["val"]
    found = validation(uniform, packed)
    assert found["perplexity"] == pytest.approx(512)
    assert found["bits_per_byte"] == pytest.approx(9 * len(packed.tokens) / packed.bytes)
    joined = "\n".join(spm.decode(ids.tolist()) for ids in packed.documents()).encode()
    assert found["xz_bits_per_byte"] == 8 * len(lzma.compress(joined, preset=9)) / len(joined)
    assert found["n"] == len(packed.tokens)
    few = EvalConfig(validation_tokens=len(packed.tokens) // 3 + 1)  # of more documents, every third is read
    third, documents = validation(uniform._replace(config=few), packed), list(packed.documents())[::3]
    assert (third["n"], third["documents"]) == (sum(map(len, documents)), len(documents))


@pytest.mark.parametrize("n", [1, 8, 9, 12, 13, 41])
def test_each_token_is_predicted_once_from_at_least_half_a_context(strong, n):
    tokens = np.random.default_rng(0).integers(31, size=n)
    found, stream, T = token_nats(strong, tokens), [1, *tokens.tolist()], 8
    assert found.shape == (n,)
    apart = token_nats(strong, tokens, step=8)  # as in lm-evaluation-harness
    for i in range(n):
        window = min(i // 8 * 8, max(0, n - 8))  # each predicts 8 tokens; the last one ends where the text ends
        assert apart[i] == pytest.approx(nats_after(strong, stream, window, i), abs=1e-4)
        # All contexts the token may have: no longer than T, and reaching its stream's start or half a context back.
        firsts = range(max(0, i - T + 1), (0 if i < T else i - T // 2) + 1)
        assert min(abs(found[i] - nats_after(strong, stream, first, i)) for first in firsts) < 1e-4


def test_weights_that_are_not_finite(strong):
    broken = Transformer(strong.model.config).eval()
    torch.nn.init.constant_(broken.head.weight, np.nan)
    with pytest.raises(UserError, match="the logits are not finite"):
        token_nats(strong._replace(model=broken), np.arange(20))


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


def test_perplexities_of_a_uniform_model(uniform):
    found = wikitext2(uniform, RAW)
    tokens = sum(len(uniform.tokenizer.encode(detokenized(page))) for page in articles(RAW))
    words = sum(len(re.split(r"\s+", page)) for page in articles(RAW))
    size = len(RAW.removeprefix(" \n").encode())
    assert found["n"] == tokens
    for prefix in ("", "strided_"):
        assert found[f"{prefix}token_perplexity"] == pytest.approx(512)
        assert found[f"{prefix}word_perplexity"] == pytest.approx(512 ** (tokens / words), rel=1e-5)
        assert found[f"{prefix}byte_perplexity"] == pytest.approx(512 ** (tokens / size), rel=1e-5)
        assert found[f"{prefix}bits_per_byte"] == pytest.approx(9 * tokens / size)
