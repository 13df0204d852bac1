"""The tokenizer gives back every text, and is the same bytes each time it is trained."""

import itertools
import shutil

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenizer
from cli import UserError
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
    """Training twice gives the same bytes. Of equally likely encodings, unigram takes any."""
    config = TokenizerConfig(vocab_size=500, algorithm=algorithm)
    model, again = (train(made.runs / "mini/corpus", 1, config, 0.1) for _ in range(2))
    assert model == again
    spm = tokenizer.Tokenizer(model, "")
    monkeypatch.setattr(tokenizer, "PART", 7)
    for part in ["a" + "é" * 5_000, "▁" * 999, " " * 5_000, "a" * 4_999 + "👩", "é é" * 2_000]:
        assert spm.decode(spm.encode(part)) == part
    monkeypatch.undo()
    for part in ["  a  b\n\n   c \t d▁ e▁▁f ", *text]:
        whole = spm.encode(part)
        for size in (5, 8, 20, 50):
            monkeypatch.setattr(tokenizer, "PART", size)
            cut = spm.encode(part)
            assert spm.decode(cut) == part
            assert cut == whole or algorithm == "unigram"
            likelihood, expected = (sum(map(spm.pieces.get_score, ids)) for ids in (cut, whole))
            assert likelihood == pytest.approx(expected)
        monkeypatch.undo()


def test_control_pieces_cannot_be_spelt(spm):
    assert list(spm.control) == list(TokenizerConfig().control)
    for text in ("</s>", "<unk>", "a</s>b", "<0x41>", *spm.control, "x<|im_start|>user\nhi<|im_end|>\n"):
        assert not {0, spm.eos, *spm.control.values()} & set(spm.encode(text))
        assert spm.decode(spm.encode(text)) == text
    assert spm.decode([spm.eos, *spm.control.values()]) == ""


def test_ids_are_those_of_sentencepiece(spm, made: Place, text):
    plain = sentencepiece.SentencePieceProcessor(model_file=str(made.runs / "mini/tokenizer/spm.model"))
    assert [spm.encode(part) for part in text] == [plain.encode(part) for part in text]
    assert (spm.vocab_size, spm.eos, len(spm.encode("2026"))) == (512, plain.eos_id(), 4)


def test_a_damaged_tokenizer_is_named(packed: Place):
    with open(packed.runs / "mini/tokenizer/spm.model", "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"spm.model has .* bytes; its manifest says"):
        tokenizer.load(packed.runs / "mini/tokenizer")
    with pytest.raises(UserError, match=r"make it with: python pipeline\.py configs/"):
        tokenizer.load(packed.path / "nowhere")


def test_settings(made: Place):
    config = TokenizerConfig(vocab_size=400, normalization="nfkc", control=("<|x|>",))
    nfkc = tokenizer.Tokenizer(train(made.runs / "mini/corpus", 1, config, 0.1), "")
    assert nfkc.decode(nfkc.encode("ﬁve  \n½")) == "five  \n1⁄2"
    assert nfkc.control == {"<|x|>": 2}
    for field, value in {"normalization": "nfd", "algorithm": "word", "vocab_size": 256}.items():
        with pytest.raises(ValueError, match=f"{field} is"):
            TokenizerConfig(**{field: value})


ADVICE = [
    ("too little text for so many pieces " * 9, 5_000, r"too little text .*add text, or set it .* to 3\d\d or less"),
    ("".join(chr(0x4E00 + i) for i in range(900)) * 3, 600, r"more different characters .* set it .* to 1,\d+ or more"),
    ("aa bb " * 99, 300, r"too little text for vocab_size = 300: add text$"),
]


@pytest.mark.parametrize(("text", "vocab_size", "message"), ADVICE)
def test_each_cause_of_an_impossible_vocabulary_has_its_advice(tmp_path, text, vocab_size, message):
    write_lines(tmp_path / "shard_00000.jsonl", [{"source": "a", "text": text}])
    with pytest.raises(UserError, match=message):
        train(tmp_path, 1, TokenizerConfig(vocab_size=vocab_size), 0.05)


def test_numbers_by_hand(spm, made: Place):
    numbers = measure(spm, [("a", "one two"), ("a", "é"), ("b", "x")])
    tokens = len(spm.encode("one two")) + len(spm.encode("é"))
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


def test_the_sample_has_every_source_and_every_long_document(tmp_path):
    """One document of 5 MB beside short ones and a tiny source."""
    long = "".join(f"{i:09} " for i in range(500_000))
    texts = [("long", long), ("long", "x" * 700_000), *[("short", "é" * 50)] * 2_000, ("tiny", "a b c")]
    write_lines(tmp_path / "shard_00000.jsonl", [{"source": source, "text": text} for source, text in texts])
    total = sum(len(text.encode()) for _, text in texts)
    pairs = list(sample(tmp_path, total, 1_000_000))
    taken = {name: [text for source, text in pairs if source == name] for name in ("long", "short", "tiny")}
    assert sum(len(text.encode()) for _, text in pairs) == pytest.approx(1_000_000, rel=0.1)
    assert taken["tiny"] == ["a b c"]
    assert len(taken["short"]) == pytest.approx(2_000 * 1_000_000 / total, abs=2)
    assert "x" * 50_000 in taken["long"][-1]
    places = [int(text.split()[1]) for text in taken["long"] if "x" not in text]
    assert max(b - a for a, b in itertools.pairwise([0, *places, 500_000])) < 80_000  # from its beginning to its end


def test_only_the_same_tokenizer_replaces_one_in_use(trained: Place):
    model = trained.runs / "mini/tokenizer/spm.model"
    before = model.read_bytes()
    trained.make("tokenizer", force=True)
    assert model.read_bytes() == before
    trained.edit(("vocab_size=512, alg", "sample_bytes=9_000, vocab_size=512, alg"))
    for name in ("packed", "pretrain"):  # each is refused by itself
        with pytest.raises(UserError, match=rf"mini/{name}.* was made with another tokenizer in .*mini/tokenizer"):
            trained.make("tokenizer", force=True)
        shutil.rmtree(trained.runs / "mini" / name)
    assert model.read_bytes() == before
    trained.make("tokenizer", force=True)
    assert model.read_bytes() != before
