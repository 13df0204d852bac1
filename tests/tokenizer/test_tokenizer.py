"""The tokenizer gives back every text, and is the same bytes each time it is trained."""

import hashlib

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenizer
from stage import UserError
from tests.conftest import ROOT, Place
from tokenizer.train import TokenizerConfig, train


@pytest.fixture(scope="module")
def spm(made: Place) -> tokenizer.Tokenizer:
    return tokenizer.load(made.runs / "mini/tokenizer")


def test_any_text_comes_back(spm):
    @settings(max_examples=300, deadline=None)
    @given(st.text(st.characters(codec="utf-8")) | st.text(" \n\t▁a1é<s>/", max_size=30))
    def check(text):
        assert spm.decode(spm.encode(text)) == text

    check()


def test_source_files_come_back(spm):
    for path in ROOT.rglob("*.py"):
        if ".venv" not in path.parts:
            text = path.read_text()
            assert spm.decode(spm.encode(text)) == text


def test_agrees_with_sentencepiece_itself(spm, made: Place, text):
    plain = sentencepiece.SentencePieceProcessor(model_file=str(made.runs / "mini/tokenizer/spm.model"))
    for part in text:
        assert spm.encode(part) == plain.encode(part)
    assert (spm.vocab_size, spm.eos) == (512, plain.eos_id())


def test_control_pieces_cannot_be_spelt(spm):
    for text in ("</s>", "<unk>", "a</s>b", "<0x41>"):
        assert not {0, spm.eos} & set(spm.encode(text))
        assert spm.decode(spm.encode(text)) == text
    assert spm.decode([spm.eos]) == ""


def test_digits_stand_apart(spm):
    assert len(spm.encode("2026")) == 4


def test_lone_surrogates_are_refused(spm):
    with pytest.raises(UserError, match=r"lone surrogate, '\\ud800', at character 1"):
        spm.encode("a\ud800")


@pytest.mark.parametrize("algorithm", ["unigram", "bpe"])
def test_training_is_deterministic(made: Place, algorithm):
    config = TokenizerConfig(vocab_size=400, algorithm=algorithm)
    first, again = (train(made.runs / "mini/corpus", 1, config, 0.1) for _ in range(2))
    assert first == again
    other = tokenizer.Tokenizer(first, hashlib.sha256(first).hexdigest())
    assert other.vocab_size == 400
    assert other.decode(other.encode("  x ▁\n\ty é")) == "  x ▁\n\ty é"


def test_more_pieces_than_the_text_holds_are_refused(place: Place):
    place.edit(("vocab_size=512", "vocab_size=300_000"))
    assert "lower vocab_size or add text" in place.run("-m", "tokenizer.train", place.config, status=2).stderr


def test_a_damaged_tokenizer_is_named(packed: Place):
    with open(packed.runs / "mini/tokenizer/spm.model", "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"spm.model has .* bytes; its manifest says"):
        tokenizer.load(packed.runs / "mini/tokenizer")
    with pytest.raises(UserError, match=r"make it with: python -m tokenizer\.train"):
        tokenizer.load(packed.path / "nowhere")
