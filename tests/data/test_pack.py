"""Packed tokens hold the corpus, all of it, in order, in the split that each document's hash gives."""

import json
import re

import numpy as np
import pytest

import configs
import data.pack
import stage
import tokenizer
from cli import UserError
from data.batches import mixture
from data.corpus import held_out, records
from tests.conftest import Place


@pytest.fixture
def spm(made: Place) -> tokenizer.Tokenizer:
    return tokenizer.load(made.runs / "mini/tokenizer")


def test_documents_come_back(made: Place, spm):
    splits = data.pack.load(made.runs / "mini/packed", spm.sha256)
    corpus = [record["text"] for record in records(made.runs / "mini/corpus")]
    for split, packed in splits.items():
        texts = [text for text in corpus if held_out(text.encode(), 0.1) == (split == "val")]
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
        data.pack.load(made.runs / "mini/packed", "0" * 64)


def two_sources(place: Place) -> None:
    """A second source of 40 kB."""
    lines = (
        json.dumps({"text": f"{i} " + " ".join(f"word{(i * 31 + k) % 997}" for k in range(40))}) for i in range(150)
    )
    (place.raw / "more.jsonl").write_text("\n".join(lines))
    place.edit(
        ("min_chars=20),)", 'min_chars=20), Files(name="more", paths=("more.jsonl",)))'),
        (
            "    pretrain=",
            """    mixture=(
                Phase(start=0, weights={"files": 1, "more": 3}),
                Phase(start=10, weights={"files": 1}),
            ),
            pretrain=""",
        ),
        ("from data.corpus", "from data.batches import Phase\nfrom data.corpus"),
    )


def test_each_source_is_a_part(place: Place):
    two_sources(place)
    place.run("pipeline.py", place.config, "pack")
    spm = tokenizer.load(place.runs / "mini/tokenizer")
    packed = data.pack.load(place.runs / "mini/packed", spm.sha256)["train"]
    files, more = packed.of("files"), packed.of("more")
    assert np.concatenate([files.tokens, more.tokens]).tolist() == packed.tokens.tolist()
    assert (len(files.starts) + len(more.starts), files.bytes + more.bytes) == (len(packed.starts), packed.bytes)
    assert all(spm.decode(ids.tolist()).split()[1].startswith("word") for ids in more.documents())
    with pytest.raises(UserError, match="has nothing of x; there are files, more"):
        packed.of("x")


def test_a_mixture_is_trained_on_and_shown(place: Place):
    two_sources(place)
    place.edit(("steps=24", "steps=12"))
    out = place.run("train.py", place.config).stdout
    assert place.metrics()[9]["seen"] == {"files": 10 * 3 * 64, "more": 10 * 9 * 64}
    assert place.metrics()[11]["seen"] == {"files": (10 * 3 + 2 * 12) * 64, "more": 10 * 9 * 64}
    assert "drawn so far: files 3,456 tokens (37.5%), more 5,760 tokens (62.5%)" in out
    shown = place.run("-m", "data.inspect", place.config, "--rows", 12, "--step", 9).stdout
    assert (shown.count(": files, window"), shown.count(": more, window")) == (3, 9)
    assert place.run("-m", "data.inspect", place.config, "--rows", 12, "--step", 10).stdout.count("files, window") == 12
    place.edit(("start=10", "start=11"))
    assert "mixture" in place.run("train.py", place.config, status=2).stderr


def test_experiments_beside_each_other(made: Place, place: Place):
    """Packed tokens of another experiment join the mixture; with another tokenizer they are refused."""
    other = place.path / "other.py"
    text = place.config.read_text().replace('name="mini"', 'name="other"')
    other.write_text(text.replace("experiment = ", "first = "))
    text = f"""{other.read_text()}
from dataclasses import replace
from data.batches import Phase
experiment = replace(first, name="mini", shared={{"tokenizer": first}}, beside=(first,),
    mixture=(Phase(start=0, weights={{"files": 1, "other": 1}}),), pretrain=replace(first.pretrain, steps=2))
"""
    place.config.write_text(text)
    place.run("train.py", place.config)
    read = stage.read_manifest(place.runs / "mini/pretrain")["read"]
    assert {"mini/packed/train.bin", "other/packed/train.bin"} <= set(read)
    place.config.write_text(
        text.replace('shared={"tokenizer": first}, ', "").replace(
            "beside", "tokenizer=replace(first.tokenizer, sample_bytes=9_000), beside"
        )
    )
    assert "tokenizer" in place.run("train.py", place.config, "--force", status=2).stderr


def test_inspect_shows_documents_and_batches(made: Place):
    shown = ("--documents", 2, "--step", 5, "--rows", 3, "--chars", 10_000)
    process = made.run("-m", "data.inspect", made.config, "--split", "val", *shown)
    packed = data.pack.load(made.runs / "mini/packed", tokenizer.load(made.runs / "mini/tokenizer").sha256)
    assert f"{len(packed['train'].tokens):,} tokens" in process.stdout
    assert process.stdout.count("⟨end⟩") >= 2
    assert process.stdout.count("the last target") == 3
    assert "found --first 999" in made.run("-m", "data.inspect", made.config, "--first", 999, status=2).stderr


def test_documents_of_a_batch_are_found_by_their_numbers(made: Place):
    """The numbers are those of data.inspect: every row of the batch is text of the documents that it then shows."""
    spm = tokenizer.load(made.runs / "mini/tokenizer")
    packed = data.pack.load(made.runs / "mini/packed", spm.sha256)["train"]
    config = configs.load(made.config).pretrain
    batches = mixture("mini", (), packed, {}, 64, config.batch_size, config.seed)
    (line,) = batches.documents(7)
    assert line.startswith(f"{made.runs}/mini/packed/train.bin: documents ")
    held, documents = batches.sets["mini"].documents(batches.drawn(7 * 12)[1]), list(packed.documents())
    row = batches.batch(7)[0][0].tolist()
    together = np.concatenate([documents[number] for number in sorted(held)]).tolist()
    assert any(together[i : i + 64] == row for i in range(len(together)))
    number = min(held)
    shown = made.run("-m", "data.inspect", made.config, "--first", number, "--documents", 1, "--chars", 30).stdout
    text = spm.decode(documents[number].tolist()).replace("\n", "⏎")
    assert re.search(rf"^{number} \[[\d,]+ to [\d,]+\) {re.escape(text[:30])}", shown, re.MULTILINE)


def test_inspect_names_what_is_missing(place: Place):
    error = place.run("-m", "data.inspect", place.config, status=2).stderr
    assert f"python pipeline.py {place.config} tokenizer" in error


def test_a_split_without_documents_is_named(place: Place):
    place.edit(("val_fraction=0.1", "val_fraction=1e-9"))
    error = place.run("pipeline.py", place.config, "pack", status=2).stderr
    assert "none is left for val" in error
    assert stage.read_manifest(place.runs / "mini/packed") is None
