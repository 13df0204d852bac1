"""Likelihoods against known answers: a uniform model, and every token counted once with the context it is due."""

import json
import lzma

import numpy as np
import pytest
import torch

import checkpoint
import data.pack
import tokenizer
from eval.continuations import continuations
from eval.language import token_nats, validation
from model import ModelConfig, Transformer
from tests.conftest import MINI, Place

SHAPE = ModelConfig(vocab_size=31, context_length=8, n_layers=1, d_model=16, n_heads=2)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(made: Place):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=512, context_length=64, n_layers=1, d_model=16, n_heads=2)).eval()
    torch.nn.init.zeros_(model.head.weight)
    spm = tokenizer.load(made.runs / "mini/tokenizer")
    packed = data.pack.load(made.runs / "mini/packed", spm.sha256, "")["val"]
    found = validation(model, packed, spm)
    assert found["perplexity"] == pytest.approx(512)
    assert found["bits_per_byte"] == pytest.approx(9 * len(packed.tokens) / packed.bytes)
    joined = "\n".join(spm.decode(ids.tolist()) for ids in packed.documents()).encode()
    assert found["xz_bits_per_byte"] == 8 * len(lzma.compress(joined, preset=9)) / len(joined)
    assert found["n"] == len(packed.tokens)


@pytest.mark.parametrize("n", [1, 3, 8, 9, 12, 13, 16, 40, 41])
def test_each_token_is_predicted_once_from_at_least_half_a_context(n):
    torch.manual_seed(0)
    model = Transformer(SHAPE).eval()
    with torch.no_grad():
        model.embed.weight.mul_(50)
        model.head.weight.mul_(50)
    tokens = np.random.default_rng(0).integers(31, size=n)
    found = token_nats(model, tokens, bos=1)
    stream, T = [1, *tokens.tolist()], 8
    assert found.shape == (n,)
    for i in range(n):
        # All contexts the token may have: no longer than T, and reaching its stream's start or half a context back.
        allowed = []
        for first in range(max(0, i - T + 1), (0 if i < T else i - T // 2) + 1):
            with torch.no_grad():
                log_p = torch.log_softmax(model(torch.tensor([stream[first : i + 1]]))[0, -1].double(), 0)
            allowed.append(-float(log_p[stream[i + 1]]))
        assert min(abs(found[i] - nats) for nats in allowed) < 1e-4


def test_command_writes_what_the_functions_give(trained: Place):
    trained.run("-m", "eval", trained.config)
    results = json.loads((trained.runs / "mini/eval/results.json").read_text())["pretrain"]["validation"]
    assert results.keys() == {"loss", "perplexity", "bits_per_byte", "xz_bits_per_byte", "stderr", "baseline", "n"}
    last = trained.metrics()[-1]
    assert results["loss"] == pytest.approx(last["val_loss"], rel=0.1)  # there: 8 windows, and no overlap
    assert results["bits_per_byte"] == pytest.approx(last["val_bits_per_byte"], rel=0.1)
    assert "is up to date" in trained.run("-m", "eval", trained.config).stdout
    elsewhere = trained.runs / "mini/pretrain/best"
    trained.run("-m", "eval", trained.config, "--checkpoint", elsewhere)
    assert (trained.runs / "mini/pretrain/eval_best/results.json").exists()
    page = trained.run("-m", "eval.report", trained.config).stdout
    assert f"{results['bits_per_byte']:.4f}" in page
    assert (trained.runs / "mini/REPORT.md").read_text() in page


def test_continuations_are_of_held_out_documents_and_fixed(made: Place):
    spm = tokenizer.load(made.runs / "mini/tokenizer")
    packed = data.pack.load(made.runs / "mini/packed", spm.sha256, "")["val"]
    model = checkpoint.load_model(made.runs / "mini/pretrain/final")
    scope: dict = {}
    exec(MINI, scope)
    config = scope["experiment"].eval
    first, again = (continuations(model, packed, spm, config) for _ in range(2))
    assert first == again
    assert len(first) == 2
    texts = [spm.decode(ids.tolist()) for ids in packed.documents()]
    for example in first:
        assert any(text.startswith(example["prompt"] + example["truth"]) for text in texts)


def test_an_untrained_experiment_says_how_to_train_it(packed: Place):
    for command in (["-m", "eval", packed.config], ["serve.py", packed.config, "generate", "x"]):
        assert f"train it with: python train.py {packed.config}" in packed.run(*command, status=2).stderr
    assert not (packed.runs / "mini/eval").exists()
