"""The tokenizer gives back every text, and is the same bytes each time it is trained."""

import hashlib
import json
import lzma
import shutil

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenizer
from cli import UserError
from data.sources import raw
from tests.conftest import ROOT, Place
from tokenizer.train import TokenizerConfig, measure, train


@pytest.fixture(scope="module")
def spm(made: Place) -> tokenizer.Tokenizer:
    return tokenizer.load(made.runs / "mini/tokenizer")


def test_any_text_comes_back(spm):
    @settings(max_examples=300, deadline=None)
    @given(st.text(st.characters(codec="utf-8")) | st.text(" \n\t▁a1é<s>/", max_size=30))
    def check(text):
        assert spm.decode(spm.encode(text)) == text

        assert spm.encode_array(text.encode()).tolist() == spm.encode(text)

    check()


@pytest.mark.parametrize("algorithm", ["unigram", "bpe"])
def test_a_long_text_is_cut_where_no_piece_is(made: Place, text, algorithm, monkeypatch):
    model = train(made.runs / "mini/corpus", 1, TokenizerConfig(vocab_size=500, algorithm=algorithm), 0.1)
    spm = tokenizer.Tokenizer(model, "")
    for part in ["  a  b\n\n   c \t d▁ e▁▁f ", *text]:
        whole = spm.encode(part)
        for size in (5, 8, 20, 50):
            monkeypatch.setattr(tokenizer, "PART", size)
            cut = spm.encode(part)
            assert spm.decode(cut) == part
            if algorithm == "bpe":
                assert cut == whole
            assert likelihood(spm, cut) == pytest.approx(likelihood(spm, whole))
        monkeypatch.undo()


def likelihood(spm: tokenizer.Tokenizer, ids: list[int]) -> float:
    """What a unigram model makes as large as it can; of equally likely spellings it takes any."""
    return sum(map(spm.pieces.get_score, ids))


@pytest.mark.parametrize("long", ["é" * 5_000, "▁" * 999, " " * 5_000, "a" * 4_999 + "👩", "é é" * 2_000])
def test_long_texts_without_a_place_to_cut_come_back(spm, long, monkeypatch):
    monkeypatch.setattr(tokenizer, "PART", 7)
    assert spm.decode(spm.encode(long)) == long


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
    assert list(spm.control) == list(TokenizerConfig().control)
    for text in ("</s>", "<unk>", "a</s>b", "<0x41>", *spm.control, "x<|im_start|>user\nhi<|im_end|>\n"):
        assert not {0, spm.eos, *spm.control.values()} & set(spm.encode(text))
        assert spm.decode(spm.encode(text)) == text
    assert spm.decode([spm.eos, *spm.control.values()]) == ""


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
    assert "lower vocab_size or add text" in place.run("pipeline.py", place.config, "tokenizer", status=2).stderr


def test_a_damaged_tokenizer_is_named(packed: Place):
    with open(packed.runs / "mini/tokenizer/spm.model", "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"spm.model has .* bytes; its manifest says"):
        tokenizer.load(packed.runs / "mini/tokenizer")
    with pytest.raises(UserError, match=r"make it with: python pipeline\.py CONFIG"):
        tokenizer.load(packed.path / "nowhere")


def test_normalised_by_choice(made: Place):
    config = TokenizerConfig(vocab_size=400, algorithm="bpe", normalization="nfkc", control=("<|x|>",))
    model = train(made.runs / "mini/corpus", 1, config, 0.1)
    nfkc = tokenizer.Tokenizer(model, hashlib.sha256(model).hexdigest())
    assert nfkc.decode(nfkc.encode("ﬁve  \n½")) == "five  \n1⁄2"
    assert nfkc.control == {"<|x|>": 2}


def test_numbers_by_hand(spm):
    numbers = measure(spm, iter([("a", "one two"), ("a", "é"), ("b", "x")]), lossless=True)
    ids = [spm.encode(text) for text in ("one two", "é", "x")]
    tokens = sum(map(len, ids[:2]))
    assert numbers["sources"]["a"] == {
        "documents": 2,
        "bytes_per_token": round(9 / tokens, 4),
        "characters_per_token": round(8 / tokens, 4),
        "fertility": round(tokens / 3, 4),
        "unknown_rate": 0.0,
        "round_trips": 2,
    }
    assert numbers["documents"] == 3
    assert numbers["score"] == pytest.approx(8 * (10 / (tokens + len(ids[2]))) / 9, abs=1e-3)  # 512 pieces: 9 bits


def test_what_it_was_measured_on_is_in_the_card(made: Place):
    card = (made.runs / "mini/tokenizer/TOKENIZER_CARD.md").read_text()
    assert "| files |" in card
    assert "| all |" in card
    assert "`<|im_start|>`" in card


WRONG = [("normalization", "nfd"), ("algorithm", "word"), *(("control", c) for c in (("a", "a"), ("",), ("<0x41>",)))]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} is"):
        TokenizerConfig(**{field: value})


def test_a_tokenizer_in_use_is_not_overwritten(packed: Place):
    error = packed.run("pipeline.py", packed.config, "tokenizer", "--force", status=2).stderr
    assert f"{packed.runs}/mini/packed was made with the tokenizer in {packed.runs}/mini/tokenizer;" in error
    before = (packed.runs / "mini/tokenizer/spm.model").read_bytes()
    shutil.rmtree(packed.runs / "mini/packed")
    packed.run("pipeline.py", packed.config, "tokenizer", "--force")
    assert (packed.runs / "mini/tokenizer/spm.model").read_bytes() == before


def test_a_tokenizer_that_models_speak_is_not_overwritten(trained: Place):
    shutil.rmtree(trained.runs / "mini/packed")
    error = trained.run("pipeline.py", trained.config, "tokenizer", "--force", status=2).stderr
    assert "mini/pretrain" in error


@pytest.mark.slow
def test_real_documents_come_back(spm):
    """Every document of WikiText-2 and every IMDb review, where DATA has them."""
    files = [*raw().glob("wikitext-2/*.xz"), *raw().glob("imdb.jsonl.xz")]
    if not files:
        pytest.skip("no wikitext-2/ or imdb.jsonl.xz under DATA")
    for path in files:
        with lzma.open(path, "rt", encoding="utf-8", newline="") as file:
            texts = (json.loads(line)["text"] for line in file) if ".jsonl" in path.name else file.read().split("\n \n")
            assert all(spm.decode(spm.encode(text)) == text for text in texts)
