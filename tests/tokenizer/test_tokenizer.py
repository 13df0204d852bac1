"""The tokenizer gives back every text, and is the same bytes each time it is trained."""

import hashlib
import itertools
import json
import lzma
import shutil
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

import stage
import tokenizer
from cli import UserError
from data.sources import raw
from tests.conftest import Place, write_lines
from tokenizer.train import TokenizerConfig, measure, sample, train


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


@pytest.mark.parametrize("long", ["a" + "é" * 5_000, "▁" * 999, " " * 5_000, "a" * 4_999 + "👩", "é é" * 2_000])
def test_long_texts_without_a_place_to_cut_come_back(spm, long, monkeypatch):
    monkeypatch.setattr(tokenizer, "PART", 7)
    assert spm.decode(spm.encode(long)) == long


def test_control_pieces_cannot_be_spelt(spm):
    assert list(spm.control) == list(TokenizerConfig().control)
    for text in ("</s>", "<unk>", "a</s>b", "<0x41>", *spm.control, "x<|im_start|>user\nhi<|im_end|>\n"):
        assert not {0, spm.eos, *spm.control.values()} & set(spm.encode(text))
        assert spm.decode(spm.encode(text)) == text
    assert spm.decode([spm.eos, *spm.control.values()]) == ""


def test_by_hand(spm, made: Place, text):
    plain = sentencepiece.SentencePieceProcessor(model_file=str(made.runs / "mini/tokenizer/spm.model"))
    assert [spm.encode(part) for part in text] == [plain.encode(part) for part in text]
    assert (spm.vocab_size, spm.eos, len(spm.encode("2026"))) == (512, plain.eos_id(), 4)
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


def test_a_damaged_tokenizer_is_named(packed: Place):
    with open(packed.runs / "mini/tokenizer/spm.model", "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"spm.model has .* bytes; its manifest says"):
        tokenizer.load(packed.runs / "mini/tokenizer")
    with pytest.raises(UserError, match=r"make it with: python pipeline\.py configs/"):
        tokenizer.load(packed.path / "nowhere")


def test_normalised_by_choice(made: Place):
    config = TokenizerConfig(vocab_size=400, algorithm="bpe", normalization="nfkc", control=("<|x|>",))
    model = train(made.runs / "mini/corpus", 1, config, 0.1)
    nfkc = tokenizer.Tokenizer(model, hashlib.sha256(model).hexdigest())
    assert nfkc.decode(nfkc.encode("ﬁve  \n½")) == "five  \n1⁄2"
    assert nfkc.control == {"<|x|>": 2}


def test_numbers_by_hand(spm, made: Place):
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
    card = (made.runs / "mini/tokenizer/TOKENIZER_CARD.md").read_text()
    assert all(part in card for part in ("| files ", "| all ", "`<|im_start|>`"))
    assert numbers["score"] == pytest.approx(8 * (10 / (tokens + len(ids[2]))) / 9, abs=1e-3)  # 512 pieces: 9 bits


def corpus(directory: Path, **sources: list[str]) -> tuple[Path, int]:
    """A corpus directory and its bytes."""
    records = [{"source": name, "text": text} for name, texts in sources.items() for text in texts]
    directory.mkdir()
    write_lines(directory / "shard_00000.jsonl", records)
    return directory, sum(len(record["text"].encode()) for record in records)


def test_the_sample_has_every_source_and_every_long_document(tmp_path):
    """One document of 5 MB beside short ones and a tiny source."""
    long = "".join(f"{i:09} " for i in range(500_000))
    directory, total = corpus(tmp_path / "corpus", long=[long, "x" * 700_000], short=["é" * 50] * 2_000, tiny=["a b c"])
    taken: dict[str, list[str]] = {}
    for source, text in sample(directory, total, 1_000_000):
        taken.setdefault(source, []).append(text)
    assert sum(len(text.encode()) for texts in taken.values() for text in texts) == pytest.approx(1_000_000, rel=0.1)
    assert taken["tiny"] == ["a b c"]
    assert len(taken["short"]) == pytest.approx(2_000 * 1_000_000 / total, abs=2)
    assert "x" * 50_000 in taken["long"][-1]
    places = [int(text.split()[1]) for text in taken["long"] if "x" not in text]
    assert max(b - a for a, b in itertools.pairwise([0, *places, 500_000])) < 80_000  # from its beginning to its end


@pytest.mark.parametrize("count", [1, 3])
def test_a_text_file_of_five_megabytes_has_numbers(place: Place, text, count):
    (place.raw / "long.txt").write_text("\n\n".join(f"{i} {part}" for i in range(320) for part in text))
    for i in range(1, count):
        (place.raw / f"{i}.txt").write_text(f"Another document, number {i}, which is short. " * 9)
    place.edit(
        ('paths=("text.jsonl",)', 'paths=("*.txt",)'),
        ("vocab_size=512, alg", "sample_bytes=60_000, vocab_size=512, alg"),
    )
    numbers = stage.read_manifest(place.make("tokenizer"))["counts"]
    assert numbers["documents"] == numbers["round_trips"] >= 20


@pytest.mark.parametrize(("field", "value"), [("normalization", "nfd"), ("algorithm", "word"), ("vocab_size", 256)])
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} is"):
        TokenizerConfig(**{field: value})


def test_only_the_same_tokenizer_replaces_one_in_use(trained: Place):
    model = trained.runs / "mini/tokenizer/spm.model"
    before = model.read_bytes()
    trained.make("tokenizer", force=True)
    assert model.read_bytes() == before
    trained.edit(("vocab_size=512, alg", "sample_bytes=9_000, vocab_size=512, alg"))
    for name in ("packed", "pretrain"):  # each is refused by itself
        with pytest.raises(UserError, match=rf"mini/{name}.* was made with another tokenizer in .*mini/tokenizer"):
            trained.make("tokenizer", force=True)
        shutil.rmtree(trained.runs / "mini/packed", ignore_errors=True)
    assert model.read_bytes() == before
    shutil.rmtree(trained.runs / "mini/pretrain")
    trained.make("tokenizer", force=True)
    assert model.read_bytes() != before


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
