"""Held-out text: a share of many documents, at least one of few, the end of a single one."""

import hashlib
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import configs
import data.pack
import stage
import tokenizer
from cli import UserError
from data.holdout import Holdout, held_out, split_hash, threshold
from data.sections import cut
from tests.conftest import Place, build, write_lines
from tests.data.test_corpus import varied
from tokenizer.train import TokenizerConfig, train


def test_many_documents_are_held_out_by_their_own_hash():
    texts = [b"document number %d" % i for i in range(4000)]
    share = sum(held_out(text, 0.05) for text in texts) / len(texts)
    assert share == pytest.approx(0.05, abs=0.015)
    assert all(held_out(text, 0.1) for text in texts if held_out(text, 0.05))
    assert split_hash(b"x") == int(hashlib.sha256(b"x").hexdigest()[:16], 16)
    assert threshold(map(split_hash, texts), 0.05) == math.ceil(0.05 * 2**64)
    assert threshold([7, 7], 0.05) is threshold([7], 0.05) is None  # no threshold separates them


@given(st.sets(st.integers(0, 2**64 - 1), min_size=2, max_size=6), st.floats(0.001, 0.999))
def test_of_few_documents_neither_side_is_empty(numbers, fraction):
    limit = threshold(numbers, fraction)
    below = {number for number in numbers if number < limit}
    assert 0 < len(below) < len(numbers)
    expected = {number for number in numbers if number < fraction * 2**64}
    if 0 < len(expected) < len(numbers):
        assert below == expected
    else:
        assert below == {min(numbers)} if not expected else numbers - below == {max(numbers)}


@pytest.mark.parametrize("gap", ["\n\n", "\n", ". ", " ", ""])
def test_a_single_document_is_cut_at_its_best_gap(gap):
    parts = [("wordword" if gap in (" ", "") else "some words") + str(i) for i in range(2_000)]
    train, val = cut(gap.join(parts), 0.1)
    assert 0.05 < len(val) / len(gap.join(parts)) < 0.2
    assert gap.join(parts) == (train + gap + val if "\n" in gap else train + val)
    assert val in {gap.join(parts[i:]) for i in range(2_000)} or gap == ""


@given(st.text(min_size=2).filter(lambda text: text.strip("\n") == text), st.floats(0.001, 0.999))
def test_a_cut_leaves_both_parts(text, fraction):
    train, val = Holdout(fraction, None).split(text)
    assert train
    assert val
    assert (train + val).replace("\n", "") == text.replace("\n", "")


def packed(place: Place) -> dict[str, str]:
    """The text of both splits."""
    spm = tokenizer.load(place.runs / "mini/tokenizer")
    splits = data.pack.load(place.runs / "mini/packed", spm.sha256)
    return {name: "\n".join(spm.decode(ids.tolist()) for ids in part.documents()) for name, part in splits.items()}


@pytest.mark.parametrize(("count", "fraction"), [(1, "0.1"), (2, "0.1"), (2, "1e-9"), (5, "1e-9"), (3, "0.999")])
def test_few_text_files_are_packed(place: Place, count, fraction):
    text = varied(200, words=500)
    for i in range(count):
        (place.raw / f"{i}.txt").write_text("\n\n".join(text[i::count]))
    place.edit(("text.jsonl", "*.txt"), ("val_fraction=0.1", f"val_fraction={fraction}"))
    place.make("pack")
    texts = packed(place)
    assert all(texts.values())
    assert len(" ".join(texts.values()).split()) == len(" ".join(text).split())
    if fraction == "1e-9":
        assert texts["val"] == min(place.raw.glob("*.txt"), key=lambda p: split_hash(p.read_bytes())).read_text()


def test_the_tokenizer_does_not_learn_what_is_held_out(place: Place):
    """One document: its end has a word that would become a piece."""
    (place.raw / "input.txt").write_text("\n\n".join([*varied(300, words=2_000), *["Zyzzyva"] * 60]))
    place.edit(("text.jsonl", "input.txt"))
    place.make("pack")
    assert packed(place)["val"].endswith("Zyzzyva")
    pieces = (place.runs / "mini/tokenizer/spm.vocab").read_text()
    assert "yzz" not in pieces


def test_a_text_file_of_a_megabyte_goes_through_the_config_of_the_readme(place: Place):
    """With a smaller vocabulary, because the text is simple, and two steps."""
    (place.raw / "input.txt").write_text("\n\n".join(varied(2_500, words=4_000)))
    readme = (stage.ROOT / "README.md").read_text()
    place.config.write_text(readme.split("# configs/mine.py\n")[1].split("```")[0])
    mine = configs.load(place.config)
    train = replace(mine.pretrain, steps=2, warmup_steps=1, eval_rows=8)
    sizes = {"model": replace(mine.model, vocab_size=1_000), "tokenizer": replace(mine.tokenizer, vocab_size=1_000)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATA", str(place.raw))
        patch.setenv("RUNS", str(place.runs))
        build("pretrain", replace(mine, pretrain=train, **sizes))
    counts = stage.read_manifest(place.runs / "mine/packed")["counts"]
    assert 0.04 < counts["val"]["bytes"] / counts["train"]["bytes"] < 0.07
    assert stage.read_manifest(place.runs / "mine/pretrain/final")


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
