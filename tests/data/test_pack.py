"""Packed tokens hold the corpus, all of it, in order, in the split that each document's hash gives."""

import json

import numpy as np
import pytest

import data.pack
import stage
import tokenizer
from data.corpus import documents, held_out
from stage import UserError
from tests.conftest import Place


@pytest.fixture
def spm(made: Place) -> tokenizer.Tokenizer:
    return tokenizer.load(made.runs / "mini/tokenizer")


def test_documents_come_back(made: Place, spm):
    splits = data.pack.load(made.runs / "mini/packed", spm.sha256, "")
    corpus = list(documents(made.runs / "mini/corpus"))
    for split, packed in splits.items():
        texts = [text for text in corpus if held_out(text, 0.1) == (split == "val")]
        found = [ids.tolist() for ids in packed.documents()]
        assert [spm.decode(ids) for ids in found] == texts
        assert all(ids[-1] == spm.eos and spm.eos not in ids[:-1] for ids in found)
        assert packed.bytes == sum(len(text.encode()) for text in texts)
    assert sum(len(p.starts) for p in splits.values()) == len(corpus)


@pytest.mark.parametrize("chunk", [1, 97, 4096])
@pytest.mark.parametrize("workers", [1, 3])
def test_bytes_do_not_depend_on_workers_or_chunks(made: Place, spm, tmp_path, monkeypatch, chunk, workers):
    monkeypatch.setattr("data.pack.CHUNK", chunk)
    data.pack.pack(made.runs / "mini/corpus", spm, 0.1, tmp_path, workers)
    for name in ("train.bin", "val.bin", "train.idx", "val.idx"):
        assert (tmp_path / name).read_bytes() == (made.runs / "mini/packed" / name).read_bytes()


def test_format_on_disk(made: Place):
    directory = made.runs / "mini/packed"
    tokens, starts = np.fromfile(directory / "train.bin", "<u2"), np.fromfile(directory / "train.idx", "<i8")
    counts = json.loads((directory / "manifest.json").read_text())["counts"]["train"]
    assert (counts["tokens"], counts["documents"]) == (len(tokens), len(starts))
    assert starts[0] == 0
    assert (tokens[starts[1:] - 1] == 1).all()


def test_another_tokenizer_is_refused(made: Place):
    with pytest.raises(UserError, match=r"was packed with tokenizer .*, but the tokenizer here is 0{12}…; pack again"):
        data.pack.load(made.runs / "mini/packed", "0" * 64, "python -m data.pack x.py")


def test_a_split_without_documents_is_named(place: Place):
    place.edit(("val_fraction=0.1", "val_fraction=1e-9"))
    error = place.run("-m", "data.pack", place.config, status=2).stderr
    assert "none is left for val" in error
    assert stage.read_manifest(place.runs / "mini/packed") is None
