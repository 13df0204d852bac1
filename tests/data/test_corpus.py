"""The corpus: what is kept and dropped, for any number of workers and after any interruption."""

import contextlib
import hashlib
import json
import multiprocessing
import random
import sqlite3
import subprocess
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pyarrow.parquet
import pytest

import data.corpus
from cli import UserError
from data.corpus import CorpusConfig, Tally, gather, records
from data.dedup import Index
from data.quality import C4, Quality
from data.sections import sections
from data.sources import Files, Hub, Record
from tests.conftest import Place, write_lines
from tests.data.test_quality import FOREIGN, GOOD


def write(path: Path, texts: list[str]) -> None:
    write_lines(path, ({"text": text} for text in texts))


def make(config: CorpusConfig, directory: Path, workers: int = 1) -> tuple[Tally, list[dict[str, str]]]:
    directory.mkdir()
    tally = gather(config, directory / "partial", workers)
    return tally, list(records(directory))


def source(name: str, **options) -> Files:
    return Files(name=name, paths=(f"{name}.jsonl",), **{"min_chars": 10, **options})


def word(number: int) -> str:
    syllables = [consonant + vowel for consonant in "bcdfgklmnprst" for vowel in "aeiou"]
    return syllables[number % 65] + (word(number // 65) if number >= 65 else "")


def varied(count: int, seed: int = 0, words: int = 10**6) -> list[str]:
    """Texts that share no runs of words."""
    rng = random.Random(seed)
    return [" ".join(word(rng.randrange(words)) for _ in range(rng.randrange(20, 90))) for _ in range(count)]


def test_what_is_dropped_is_counted(raw, tmp_path):
    a = varied(4)
    rest = [a[1].upper(), f"{a[0]} indeed", a[1], "!!! ??? ...", "... ??? !!!", "!!! ??? ..."]
    write(raw / "a.jsonl", [f"{a[0]}\n{a[0]}\n{a[0]}", "short", *rest])
    write(raw / "b.jsonl", [a[2], a[0].replace(" ", "\n")])
    config = CorpusConfig(sources=(source("a"), source("b")))
    tally, documents = make(config, tmp_path / "corpus")
    kept = [*(("a", f"a.jsonl:{i}") for i in (1, 3, 6, 7)), ("b", "b.jsonl:1")]
    assert [(r["source"], r["id"]) for r in documents] == kept
    counts = tally.counts()
    of_a = {"repeated_lines": 1, "too_short": 1, "near_duplicate": 1, "duplicate": 2}
    of_b = {"duplicate": 1}
    assert [counts["sources"][name]["dropped"] for name in "ab"] == [of_a, of_b]
    assert counts["dropped"] == Counter(of_a) + Counter(of_b)
    assert (counts["read"], counts["documents"]) == (10, 5)
    assert counts["bytes"] == sum(len(r["text"].encode()) for r in documents)
    for table in tally.sources.values():
        assert table["words_read"] == table["words"] + sum(table["dropped_words"].values())
    _, exact = make(replace(config, dedup=None), tmp_path / "exact")
    assert [r["id"] for r in exact][:3] == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:4"]
    write(raw / "c.jsonl", varied(300))
    budget, documents = make(CorpusConfig(sources=(source("c", max_tokens=2_000),)), tmp_path / "budget")
    size = 2_000 * data.corpus.BYTES_PER_TOKEN
    assert size <= budget.sources["c"]["bytes"] < size + 1_000
    assert budget.sources["c"]["read"] == len(documents)


def test_each_source_has_its_own_rules(raw, tmp_path):
    write(raw / "a.jsonl", [GOOD + "\n\nA heading", *FOREIGN])
    write(raw / "b.jsonl", [GOOD, *FOREIGN])
    line = " ".join(f"Sentence number {i} has some words in it." for i in range(900))
    (raw / "c").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": [line]}), raw / "c/train.parquet")
    strict = Quality(c4=C4(min_line_words=1))
    lines = Quality(gopher=None, min_english=None)  # sections are cut after C4 has seen whole lines
    sources = source("b"), source("a", quality=strict), Hub(dataset=str(raw / "c"), quality=lines)
    tally, documents = make(CorpusConfig(sources=sources), tmp_path / "corpus")
    assert len(documents) == 6
    assert tally.sources["a"]["dropped"] == {"not_english": 4, "c4_sentences": 1, "c4_lines": 1}
    assert documents[-1]["text"] == line


def test_evaluation_sets_are_kept_out(raw, tmp_path):
    words, far = [f"word{i}" for i in range(40)], varied(4)
    marked = "<p>It couldn&#39;t be <b>clearer</b> that one two three four five six seven eight nine &amp; so on</p>"
    book = " ".join(varied(400, 3))
    first, second = sections(book)[:2]
    across = " ".join([*first.split()[-7:], *second.split()[:7]])  # a run that a cut parts
    write(raw / "test.jsonl", [" ".join(words), "a sentence shorter than a run", marked, across, varied(9, 9)[8]])
    write(raw / "other.jsonl", ["One, two, three. Four? Five: six; seven! Eight 'nine' (ten) eleven - twelve thirteen"])
    bad = [
        f"{far[0]} {' '.join(words[5:18])} {far[0]}",
        f"{far[2]} ONE two three four five six seven eight nine ten eleven twelve THIRTEEN and more",
        marked,  # as it is, and as it becomes when it is clean
    ]
    good = [f"{far[1]} {' '.join(words[20:32])} {far[1]}", f"{far[3]} a sentence shorter than a run", varied(9, 9)[8]]
    write(raw / "a.jsonl", [*bad, *good, book])
    sets = (source("test", field="*", max_documents=4), source("other", field="*"))
    tally, documents = make(CorpusConfig(sources=(source("a"),), decontaminate=sets), tmp_path / "corpus")
    assert [r["id"] for r in documents] == [f"a.jsonl:{i}" for i in (4, 5, 6, 7)]
    assert tally.sources["a"]["dropped"] == {"contaminated: test": 3, "contaminated: other": 1}
    assert documents[-1]["text"] == book.removeprefix(first)


def test_a_book_is_judged_by_section(raw, tmp_path):
    chapters, before, after = varied(400), varied(300, 1), varied(300, 2)
    write(raw / "a.jsonl", ["\n\n".join(chapters)])
    book = "\n\n".join([*before, *chapters[100:200], *after])
    write(raw / "b.jsonl", [book])
    tally, documents = make(CorpusConfig(sources=(source("a"), source("b"))), tmp_path / "corpus")
    assert sum(tally.sources["b"]["dropped"].values()) >= 2
    kept = documents[-1]["text"]
    assert kept.startswith(before[0])
    assert kept.endswith(after[-1])
    assert 0.75 < len(kept) / len(book) < 0.95
    one, other = sections(book), sections("A preface, which only this edition has.\n\n" * 30 + book)
    assert len(set(one) & set(other)) > 0.9 * len(one) > 18


def test_what_a_source_lacks_is_logged(place: Place, caplog):
    lines = (place.raw / "text.jsonl").read_text().splitlines()
    lines[20:20] = ["{", '{"body": 3}']
    (place.raw / "text.jsonl").write_text("\n".join([*lines, *[json.dumps({"text": GOOD})] * 99]))
    write_lines(place.raw / "test.jsonl", [{"text": "x"}, {"body": "y"}])
    options = 'min_chars=20, unreadable="skip", max_tokens=1_000_000'
    test = ', decontaminate=(Files(name="test", paths=("test.jsonl",), unreadable="skip"),)'
    place.edit(("min_chars=20),)", f"{options}),){test}"))
    card = (place.make("corpus") / "DATA_CARD.md").read_text()
    assert "files: records that could not be read: 2; see the card" in caplog.text
    assert "test: records of this evaluation set that could not be read: 1" in caplog.text
    assert "of the 1,000,000 tokens of max_tokens" in caplog.text
    assert "files: duplicate dropped" in caplog.text  # more than a third
    assert "line 21 is not JSON" in card
    assert "line 22: expected an object whose 'text' is a string" in card
    place.edit(("min_chars=20", "min_chars=20_000"))
    with pytest.raises(UserError, match=r"the corpus is empty: documents read \d+, kept 0; add sources"):
        place.make("corpus", force=True)
    with pytest.raises(ValueError, match="sources are called a, a; give each a name of its own"):
        CorpusConfig(sources=(source("a"), source("a")))


def files(directory: Path) -> dict[str, str]:
    paths = [path for path in directory.rglob("*") if path.suffix in (".jsonl", ".md", ".model", ".bin", ".idx")]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture
def mixed(raw: Path, monkeypatch) -> CorpusConfig:
    """Two sources with duplicates, a budget and an evaluation set; shards and batches are small."""
    monkeypatch.setattr(data.corpus, "SHARD_BYTES", 5_000)
    monkeypatch.setattr(data.corpus, "BATCH_CHARS", 1_000)
    a, b = varied(120), varied(120, 1)
    write(raw / "a.jsonl", [*a, *a[:9], *(f"{t} and more" for t in a[20:30]), "\n\n".join(a[:100])])
    write(raw / "b.jsonl", ["short", *b, *a[40:60]])
    write(raw / "test.jsonl", a[77:80])
    sources = source("a", licence="CC0", max_documents=139), source("b", max_tokens=9_000)
    return CorpusConfig(sources=sources, decontaminate=(source("test"),))


@pytest.fixture
def crash(monkeypatch):
    """Ends every build after a finished shard."""
    commit = Index.commit

    def crashing(index, state):
        commit(index, state)
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(Index, "commit", crashing)
        yield patch


def test_interruptions_and_workers_change_no_byte(mixed, tmp_path, crash):
    broken = tmp_path / "broken"
    broken.mkdir()
    for shards in range(1, 16):
        with pytest.raises(InterruptedError):
            gather(mixed, broken / "partial", 2)
        (broken / f"shard_{shards:05d}.jsonl").write_text("half a li")
    crash.undo()
    tally = gather(mixed, broken / "partial", 4)
    whole, _ = make(mixed, tmp_path / "whole")
    assert files(broken) == files(tmp_path / "whole")
    assert len(files(broken)) > 15
    assert tally.counts() == whole.counts()
    card = data.corpus.card("x", mixed, tally)
    assert card == data.corpus.card("x", mixed, whole)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in card.split("\n")]
    assert ["a", "CC0", "139"] in [row[:3] for row in rows]
    assert ["a", "contaminated: test", "3"] in [row[:3] for row in rows]
    assert "- b, too_short, `b.jsonl:1`: `short`" in card


def test_a_full_disk_is_named(place: Place, monkeypatch):
    monkeypatch.setattr(Index, "commit", Mock(side_effect=sqlite3.OperationalError("database or disk is full")))
    with pytest.raises(UserError, match="mini/corpus: database or disk is full; fix that and run the same command"):
        place.make("corpus")
    assert not (place.runs / "mini/corpus/manifest.json").exists()


def test_only_a_build_of_the_same_corpus_continues(place: Place, monkeypatch, crash, caplog):
    monkeypatch.setattr(data.corpus, "SHARD_BYTES", 3_000)
    caplog.set_level("INFO", "lumi")
    for before, now, continued in ((20, 20, 0), (20, 21, 0), (21, 21, 1)):
        place.edit((f"min_chars={before}", f"min_chars={now}"))
        with pytest.raises(InterruptedError):
            place.make("corpus")
        for worker in multiprocessing.active_children():  # a killed worker holds the lock until it is gone
            worker.join()
        assert caplog.text.count("continuing with shard_00001.jsonl") == continued
    crash.undo()
    (place.runs / "mini/corpus/shard_00099.jsonl").write_text("left by another build")
    place.edit(("min_chars=21", "min_chars=22"))
    names = sorted(path.name for path in place.make("corpus").glob("[!.]*"))
    assert [name for name in names if "shard" not in name] == ["DATA_CARD.md", "log.txt", "manifest.json"]
    assert "shard_00099.jsonl" not in names


@pytest.mark.parametrize("quality", [None, Quality()])
def test_odd_documents_go_through_every_rule(raw, tmp_path, quality):
    """Each is kept or counted."""
    odd = ["x" * 900_000, "word " * 100_000, "\x00" * 50, "?" * 20_000, "<b>" * 9_000, "港" * 9_000, "a\n" * 20_000]
    odd += ["", "half \ud800 a pair " * 20]
    write(raw / "a.jsonl", odd)
    tally, documents = make(CorpusConfig(sources=(source("a", quality=quality),)), tmp_path / "corpus")
    assert tally.sources["a"]["read"] == len(odd)
    assert sum(tally.sources["a"]["dropped"].values()) + len(documents) >= len(odd)


def test_empty_records_fill_a_batch_too(monkeypatch):
    monkeypatch.setattr(data.corpus, "BATCH_CHARS", 1_000)
    assert [len(batch) for batch in data.corpus._batches([Record("", "", "", "")] * 95)] == [10] * 9 + [5]


SMALL = """
import runpy, data.corpus, data.pack
data.corpus.SHARD_BYTES, data.corpus.BATCH_CHARS, data.pack.CHUNK = 30_000, 3_000, 9_000
runpy.run_path("pipeline.py", run_name="__main__")
"""


@pytest.mark.slow
def test_ten_random_kills_change_no_byte(place: Place, tmp_path):
    write(place.raw / "text.jsonl", varied(4_000))
    started = time.monotonic()
    place.run("-c", SMALL, place.config, "pack", "--workers", 1)
    seconds = time.monotonic() - started
    whole, place.env["RUNS"] = files(place.runs), str(tmp_path / "killed")
    for _ in range(10):
        process = place.start("-c", SMALL, place.config, "pack", "--workers", 4)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(random.uniform(0, 0.4) * seconds)
        process.kill()
        process.communicate()
    place.run("-c", SMALL, place.config, "pack", "--workers", 4)
    assert files(tmp_path / "killed") == whole
