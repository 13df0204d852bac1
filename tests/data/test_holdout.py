"""Held-out text: a share of many documents, at least one of few, the end of a single one. Sections of long ones."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import configs
import data.pack
import stage
import tokenizer
from data.corpus import holdout
from data.holdout import Holdout, split_hash, threshold
from data.sections import SECTION_CHARS, cut, sections
from tests.conftest import Place, build, write_lines
from tests.data.test_corpus import varied


def test_many_documents_are_held_out_by_their_own_hash():
    numbers = [split_hash(b"document number %d" % i) for i in range(4000)]
    limit = threshold(numbers, 0.05)
    assert limit == math.ceil(0.05 * 2**64)
    assert sum(number < limit for number in numbers) / 4000 == pytest.approx(0.05, abs=0.015)
    assert split_hash(b"x") == 0x2D711642B726B044  # sha256sum
    assert threshold([7, 7], 0.05) is threshold([7], 0.05) is None  # no threshold separates them


@given(st.sets(st.integers(0, 2**64 - 1), min_size=2, max_size=6), st.floats(0.001, 0.999))
def test_of_few_documents_neither_side_is_empty(numbers, fraction):
    limit = threshold(numbers, fraction)
    below = {number for number in numbers if number < limit}
    usual = {number for number in numbers if number < fraction * 2**64}
    assert below == (numbers - {max(numbers)} if usual == numbers else usual or {min(numbers)})


def test_a_document_with_most_of_the_text_is_not_held_out_whole(tmp_path):
    note = "A note."
    numbers = {text: split_hash(text.encode()) for text in (f"{i} " + "word " * 99 for i in range(99))}
    for larger in (min(numbers, key=numbers.get), max(numbers, key=numbers.get)):
        write_lines(tmp_path / "shard_00000.jsonl", [{"text": note}, {"text": larger}])
        held = split_hash(note.encode())
        assert holdout(tmp_path, 1e-9).threshold == (None if numbers[larger] < held else held + 1)


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


BOOK = st.lists(st.text("ab .\n", min_size=0, max_size=3000), max_size=30).map("\n\n".join)


@given(BOOK, st.sampled_from(["", "x" * 70_000, "word " * 9_000, "A line.\n" * 6_000]))
def test_sections_join_to_the_text(book, more):
    parts = sections(book + more)
    assert "".join(parts) == book + more
    assert all(len(part) <= 3 * SECTION_CHARS for part in parts)
    assert len(parts) == 1 or all(len(part) >= SECTION_CHARS // 2 for part in parts[1:])


@pytest.mark.parametrize(("count", "fraction"), [(1, "0.1"), (2, "0.1"), (5, "1e-9"), (3, "0.999")])
def test_few_text_files_are_packed(place: Place, count, fraction):
    """The tokenizer does not learn the word at the end of a single document."""
    text = [*varied(200, words=500), *["Zyzzyva"] * 60 * (count == 1)]
    for i in range(count):
        (place.raw / f"{i}.txt").write_text("\n\n".join(text[i::count]))
    place.edit(("text.jsonl", "*.txt"), ("val_fraction=0.1", f"val_fraction={fraction}"))
    place.make("pack")
    spm = tokenizer.load(place.runs / "mini/tokenizer")
    texts = {}
    for name, split in data.pack.load(place.runs / "mini/packed", spm.sha256).items():
        texts[name] = "\n".join(spm.decode(ids.tolist()) for ids in split.documents())
    assert all(texts.values())
    assert len(" ".join(texts.values()).split()) == len(" ".join(text).split())
    if fraction == "1e-9":
        assert texts["val"] == min(place.raw.glob("*.txt"), key=lambda p: split_hash(p.read_bytes())).read_text()
    if count == 1:
        assert texts["val"].endswith("Zyzzyva")
        assert "yzz" not in (place.runs / "mini/tokenizer/spm.vocab").read_text()


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
