"""Packed tokens hold the whole corpus, in order, in the split that the hash of each document gives."""

import argparse
import re

import numpy as np
import pytest

import data.inspect
import data.pack
import stage
import tokenizer
from cli import UserError
from data.corpus import records
from data.holdout import split_hash
from tests.conftest import Place, write_lines


@pytest.fixture
def spm(made: Place) -> tokenizer.Tokenizer:
    return tokenizer.load(made.runs / "mini/tokenizer")


def test_documents_come_back(made: Place, spm):
    directory = made.runs / "mini/packed"
    corpus = [record["text"] for record in records(made.runs / "mini/corpus")]
    for split, packed in data.pack.load(directory, spm.sha256).items():
        texts = [text for text in corpus if (split_hash(text.encode()) < 0.1 * 2**64) == (split == "val")]
        documents = [ids.tolist() for ids in packed.documents()]
        assert [spm.decode(ids) for ids in documents] == texts
        assert all(ids[-1] == spm.eos and spm.eos not in ids[:-1] for ids in documents)
        assert packed.bytes == sum(len(text.encode()) for text in texts)
        assert np.fromfile(directory / f"{split}.bin", "<u2").tolist() == [id for ids in documents for id in ids]
        assert np.fromfile(directory / f"{split}.idx", "<i8").tolist() == packed.starts.tolist()
        counts = stage.read_manifest(directory)["counts"][split]
        assert (counts["tokens"], counts["documents"]) == (len(packed.tokens), len(texts))
    with pytest.raises(UserError, match=r"was packed with tokenizer .*, but the tokenizer here is 0{12}…; pack again"):
        data.pack.load(directory, "0" * 64)
    assert [data.pack.token_dtype(size) for size in (65_536, 65_537)] == ["<u2", "<u4"]
    with pytest.raises(ValueError, match="val_fraction is 1; expected more than 0 and less than 1"):
        data.pack.PackConfig(val_fraction=1)


@pytest.mark.parametrize(("chunk", "workers"), [(97, 1), (0, 3), (4096, 4)])
def test_bytes_do_not_depend_on_workers_or_chunks(made: Place, spm, tmp_path, monkeypatch, chunk, workers):
    first_line = (made.runs / "mini/corpus/shard_00000.jsonl").read_bytes().index(b"\n") + 1
    monkeypatch.setattr("data.pack.CHUNK", chunk or first_line)  # a line can begin where a chunk does
    data.pack.pack(made.runs / "mini/corpus", spm, 0.1, tmp_path, workers)
    for name in ("train.bin", "val.bin", "train.idx", "val.idx"):
        assert (tmp_path / name).read_bytes() == (made.runs / "mini/packed" / name).read_bytes()


def inspect(place: Place, **options) -> None:
    """python -m data.inspect in this process."""
    defaults = {"split": "train", "first": 0, "step": 0, "rows": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNS", str(place.runs))
        data.inspect.main(argparse.Namespace(config=place.config, **defaults | options))


def test_a_mixture_of_two_sources_is_trained_on_and_shown(place: Place, capsys, caplog):
    """A source of 40 kB beside the first, and one of a single document, which is not held out."""
    texts = [f"{i} " + " ".join(f"word{(i * 31 + k) % 997}" for k in range(40)) for i in range(150)]
    write_lines(place.raw / "more.jsonl", [{"text": text} for text in texts])
    (place.raw / "one.txt").write_text("One text, number 3. " * 9)
    phases = 'Phase(start=0, weights={"files": 1, "more": 3}), Phase(start=10, weights={"files": 1})'
    more = 'Files(name="more", paths=("more.jsonl",)), Files(name="one", paths=("one.txt",))'
    place.edit(
        ("min_chars=20),)", f"min_chars=20), {more})"),
        ("    pretrain=", f"    mixture=({phases}),\n    pretrain="),
        ("from data.corpus", "from data.batches import Phase\nfrom data.corpus"),
        ("steps=24", "steps=12"),
    )
    place.make("pretrain")
    spm = tokenizer.load(place.runs / "mini/tokenizer")
    packed = data.pack.load(place.runs / "mini/packed", spm.sha256)["train"]
    parts = [packed.of(name) for name in ("files", "more", "one")]
    assert np.concatenate([part.tokens for part in parts]).tolist() == packed.tokens.tolist()
    assert sum(len(part.starts) for part in parts) == len(packed.starts)
    assert sum(part.bytes for part in parts) == packed.bytes
    assert all(spm.decode(ids.tolist()).split()[1].startswith("word") for ids in parts[1].documents())
    with pytest.raises(UserError, match="has no text of x; its sources are files, more, one"):
        packed.of("x")
    assert "no document of one is held out" in caplog.text
    seen = [line["seen"] for line in place.metrics()]
    assert seen[9] == {"files": 10 * 3 * 64, "more": 10 * 9 * 64}
    assert seen[11] == {"files": (10 * 3 + 2 * 12) * 64, "more": 10 * 9 * 64}
    for step, counts in {9: (3, 9), 10: (12, 0)}.items():
        inspect(place, rows=12, step=step)
        shown = capsys.readouterr().out
        assert (shown.count(": files, window"), shown.count(": more, window")) == counts
    place.edit(("start=10", "start=11"))
    with pytest.raises(UserError, match="mixture"):
        place.make("pretrain")


def test_experiments_beside_each_other(place: Place):
    """Packed tokens of another experiment join the mixture. With another tokenizer they are refused."""
    text = place.config.read_text().replace('name="mini"', 'name="other"').replace("experiment = ", "first = ")
    text += """
from dataclasses import replace
from data.batches import Phase
experiment = replace(first, name="mini", shared={"tokenizer": first}, beside=(first,),
    mixture=(Phase(start=0, weights={"files": 1, "other": 1}),), pretrain=replace(first.pretrain, steps=2))
"""
    place.config.write_text(text)
    place.make("pretrain")
    read = stage.read_manifest(place.runs / "mini/pretrain")["read"]
    assert {"mini/packed/train.bin", "other/packed/train.bin"} <= set(read)
    other = "tokenizer=replace(first.tokenizer, sample_bytes=9_000), beside"
    place.config.write_text(text.replace('shared={"tokenizer": first}, ', "").replace("beside", other))
    with pytest.raises(UserError, match="tokenizer"):
        place.make("pretrain", force=True)


def test_inspect_shows_documents_and_batches(made: Place, spm, capsys):
    packed = data.pack.load(made.runs / "mini/packed", spm.sha256)["train"]
    inspect(made, first=7, step=5, rows=3)
    shown = capsys.readouterr().out
    text = spm.decode(list(packed.documents())[7].tolist()).replace("\n", "⏎")
    assert re.search(rf"^7 \[[\d,]+ to [\d,]+\) {re.escape(text[:30])}", shown, re.MULTILINE)
    assert f"tokens {len(packed.tokens):,}" in shown
    assert shown.count("the last target") == 3
    assert "found --first 999" in made.run("-m", "data.inspect", made.config, "--first", 999, status=2).stderr
