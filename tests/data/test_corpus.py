"""The corpus: what is kept and dropped, whoever does the work and however often it is killed."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import data.corpus
from data.corpus import SECTION_CHARS, CorpusConfig, Tally, gather, held_out, records, sections
from data.quality import C4, Gopher, Quality
from data.sources import Files
from tests.conftest import ROOT, Place
from tests.data.test_quality import FOREIGN, GOOD


@pytest.fixture
def raw(tmp_path, monkeypatch):
    (tmp_path / "raw").mkdir()
    monkeypatch.setenv("DATA", str(tmp_path / "raw"))
    return tmp_path / "raw"


def write(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def beginning() -> dict:
    return {"made": None, "source": 0, "read": 0, "tally": None, "index": (0, 0), "shards": {}}


def make(config: CorpusConfig, directory: Path, workers: int = 1) -> tuple[Tally, list[dict[str, str]]]:
    directory.mkdir()
    tally = gather(config, directory, workers, beginning())
    return tally, list(records(directory))


def source(name: str, **options) -> Files:
    return Files(name=name, paths=(f"{name}.jsonl",), **{"min_chars": 10, **options})


def varied(count: int, seed: int = 0) -> list[str]:
    """Texts that share no runs of words."""
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randrange(10**6)}" for _ in range(rng.randrange(20, 90))) for _ in range(count)]


def test_what_is_dropped_is_counted(raw, tmp_path):
    a = varied(4)
    write(
        raw / "a.jsonl",
        [a[0], "short", a[1].upper(), f"{a[0]} indeed", a[1], "!!! ??? ...", "... ??? !!!", "!!! ??? ..."],
    )
    long = " ".join(a)
    write(raw / "b.jsonl", [a[2], a[0].replace(" ", "\n"), long])
    config = CorpusConfig(sources=(source("a"), source("b", max_chars=len(long) - 1)))
    tally, found = make(config, tmp_path / "corpus")
    assert [(r["source"], r["id"]) for r in found] == [
        *(("a", f"a.jsonl:{i}") for i in (1, 3, 6, 7)),
        ("b", "b.jsonl:1"),
    ]
    counts = tally.counts()
    assert counts["sources"]["a"]["dropped"] == {"too_short": 1, "near_duplicate": 1, "duplicate": 2}
    assert counts["sources"]["b"]["dropped"] == {"duplicate": 1, "too_long": 1}
    assert counts["dropped"] == {"duplicate": 3, "near_duplicate": 1, "too_long": 1, "too_short": 1}
    assert (counts["read"], counts["documents"]) == (11, 5)
    assert counts["bytes"] == sum(len(r["text"].encode()) for r in found)
    for table in tally.sources.values():
        assert table["words_read"] == table["words"] + sum(table["dropped_words"].values())


def test_without_near_duplicates(raw, tmp_path):
    write(raw / "a.jsonl", [GOOD, GOOD + " Indeed.", GOOD.lower()])
    _, found = make(CorpusConfig(sources=(source("a"),), dedup=None), tmp_path / "corpus")
    assert [r["text"] for r in found] == [GOOD, GOOD + " Indeed."]


def test_each_source_has_its_own_rules(raw, tmp_path):
    write(raw / "a.jsonl", [GOOD + "\n\nA heading", *FOREIGN])
    write(raw / "b.jsonl", [GOOD, *FOREIGN])
    strict = Quality(c4=C4(min_line_words=1), gopher=Gopher())
    tally, found = make(CorpusConfig(sources=(source("b"), source("a", quality=strict))), tmp_path / "corpus")
    assert len(found) == 16
    assert tally.sources["a"]["dropped"] == {"not_english": 15, "c4_sentences": 1, "c4_lines": 1}


def test_evaluation_sets_are_kept_out(raw, tmp_path):
    words = [f"word{i}" for i in range(40)]
    write(raw / "test.jsonl", [" ".join(words), "a sentence that is shorter than a run"])
    write(raw / "other.jsonl", ["One, two, three. Four? Five: six; seven! Eight 'nine' (ten) eleven - twelve thirteen"])
    far = varied(4)
    write(
        raw / "a.jsonl",
        [
            f"{far[0]} {' '.join(words[5:18])} {far[0]}",
            f"{far[1]} {' '.join(words[20:32])} {far[1]}",
            f"{far[2]} ONE two three four five six seven eight nine ten eleven twelve THIRTEEN and more",
            f"{far[3]} a sentence that is shorter than a run",
        ],
    )
    sets = tuple(Files(name=name, paths=(f"{name}.jsonl",), field="*") for name in ("test", "other"))
    tally, found = make(CorpusConfig(sources=(source("a"),), decontaminate=sets), tmp_path / "corpus")
    assert [r["id"] for r in found] == ["a.jsonl:2", "a.jsonl:4"]
    assert tally.sources["a"]["dropped"] == {"contaminated: test": 1, "contaminated: other": 1}


def test_evaluation_text_is_found_as_it_is_and_as_it_becomes(raw, tmp_path):
    marked = "<p>It couldn&#39;t be <b>clearer</b> that one two three four five six seven eight nine &amp; so on</p>"
    write(raw / "test.jsonl", [marked, " ".join(varied(1, 7))])
    write(raw / "a.jsonl", [marked, *varied(1, 7)])
    sets = (Files(name="test", paths=("test.jsonl",), max_documents=1),)
    _, found = make(CorpusConfig(sources=(source("a"),), decontaminate=sets), tmp_path / "corpus")
    assert [r["id"] for r in found] == ["a.jsonl:2"]


def test_evaluation_text_does_not_hide_across_a_cut(raw, tmp_path):
    book = " ".join(varied(400))
    first, second = sections(book)[:2]
    write(raw / "a.jsonl", [book])
    write(raw / "test.jsonl", [" ".join([*first.split()[-7:], *second.split()[:7]])])
    sets = (Files(name="test", paths=("test.jsonl",)),)
    tally, found = make(CorpusConfig(sources=(source("a"),), decontaminate=sets), tmp_path / "corpus")
    assert tally.sources["a"]["dropped"] == {"contaminated: test": 1}
    assert found[0]["text"] == book.removeprefix(first)


def test_a_long_line_is_selected_whole(raw, tmp_path):
    """Sections are cut after C4 has seen the lines, not before."""
    line = " ".join(f"Sentence number {i} has some words in it." for i in range(900))
    write(raw / "a.jsonl", [line])
    c4 = Quality(gopher=None, min_english=None)
    _, found = make(CorpusConfig(sources=(source("a", quality=c4),), dedup=None), tmp_path / "corpus")
    assert [r["text"] for r in found] == [line]


def test_empty_records_fill_a_batch_too(raw, monkeypatch, tmp_path):
    monkeypatch.setattr(data.corpus, "BATCH_CHARS", 1_000)
    sizes = []
    monkeypatch.setattr(
        data.corpus.cli, "ordered", lambda pool, function, items, ahead: sizes.extend(map(len, items)) or []
    )
    write(raw / "a.jsonl", [""] * 95)
    make(CorpusConfig(sources=(source("a"),)), tmp_path / "corpus")
    assert sum(sizes) == 95
    assert max(sizes) == 10


def test_a_damaged_rest_is_not_gone_on_from(place: Place, small):
    config = place.config
    place.run("pipeline.py", config, "corpus")
    whole = (place.runs / "mini/corpus/shard_00000.jsonl").read_bytes()
    kill = "import os, cli, pipeline, stage, data.corpus\ndata.corpus.SHARD_BYTES = 3_000\nwrite = stage.write_json\n"
    kill += "stage.write_json = lambda *a: (write(*a), os._exit(9))\n"
    kill += "cli.run(pipeline.main, pipeline.parser().parse_args())"
    for name in ("keys.bin", "shingles.bin"):
        place.run("-c", kill, config, "corpus", "--force", status=9)
        os.truncate(place.runs / "mini/corpus/partial" / name, 8)
        assert "going on" not in place.run("pipeline.py", config, "corpus").stdout
        assert (place.runs / "mini/corpus/shard_00000.jsonl").read_bytes() == whole
    place.run("-c", kill, config, "corpus", "--force", status=9)
    assert "going on after 1 finished shards" in place.run("pipeline.py", config, "corpus").stdout


BOOK = st.lists(st.text("ab .\n", min_size=0, max_size=3000), max_size=30).map("\n\n".join)


@given(BOOK, st.sampled_from(["", "x" * 70_000, "word " * 9_000, "A line.\n" * 6_000]))
def test_sections_join_to_the_text(book, more):
    text = book + more
    parts = sections(text)
    assert "".join(parts) == text
    assert all(len(part) <= 3 * SECTION_CHARS for part in parts)
    assert len(parts) == 1 or all(len(part) >= SECTION_CHARS // 2 for part in parts[1:])


def test_two_copies_of_a_book_are_cut_alike():
    book = "\n\n".join(varied(900))
    one, other = sections(book), sections("A preface, which only this edition has.\n\n" * 30 + book)
    assert len(one) > 30
    assert len(set(one) & set(other)) > 0.9 * len(one)


def test_a_book_is_judged_by_section(raw, tmp_path):
    chapters = varied(400)
    copied = "\n\n".join(chapters[100:200])
    write(raw / "a.jsonl", ["\n\n".join(chapters), copied])
    book = "\n\n".join([*varied(300, 1), copied, *varied(300, 2)])
    write(raw / "b.jsonl", [book])
    tally, found = make(CorpusConfig(sources=(source("a"), source("b"))), tmp_path / "corpus")
    assert [r["id"] for r in found] == ["a.jsonl:1", *(["a.jsonl:2"] if len(found) == 3 else []), "b.jsonl:1"]
    assert sum(tally.sources["b"]["dropped"].values()) >= 2
    kept = found[-1]["text"]
    assert kept.startswith(varied(300, 1)[0])
    assert kept.endswith(varied(300, 2)[-1])
    assert 0.75 < len(kept) / len(book) < 0.95


def test_limits(raw, tmp_path):
    write(raw / "a.jsonl", varied(300))
    budget = CorpusConfig(sources=(source("a", max_tokens=2_000),))
    tally, found = make(budget, tmp_path / "budget")
    size = 2_000 * data.corpus.BYTES_PER_TOKEN
    assert size <= tally.sources["a"]["bytes"] < size + 1_000
    assert tally.sources["a"]["read"] == len(found)
    _, found = make(CorpusConfig(sources=(source("a", max_documents=7),)), tmp_path / "documents")
    assert len(found) == 7


def test_limits_hold_over_an_interruption(raw, tmp_path, small):
    write(raw / "a.jsonl", varied(90))
    config = CorpusConfig(sources=(source("a", max_documents=50),))
    _, whole = make(config, tmp_path / "whole")
    state = json.loads((tmp_path / "whole/partial/state.json").read_text())
    assert 0 < state["read"] < 50 or state["source"] == 1
    gather(config, tmp_path / "whole", 1, state)
    assert list(records(tmp_path / "whole")) == whole
    assert len(whole) == 50


def test_a_budget_larger_than_the_source_is_said(place: Place):
    place.edit(("min_chars=20", "min_chars=20, max_tokens=1_000_000"))
    process = place.run("pipeline.py", place.config, "corpus")
    assert "files gave about" in process.stderr
    assert "of the 1,000,000 tokens asked of it: it has no more" in process.stderr


def files(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in ("log.txt", ".lock", "seconds.json")
    }


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(data.corpus, "SHARD_BYTES", 5_000)
    monkeypatch.setattr(data.corpus, "BATCH_CHARS", 1_000)


def mixed(raw: Path) -> CorpusConfig:
    a, b = varied(120), varied(120, 1)
    write(raw / "a.jsonl", [*a, *a[:9], *(f"{t} and more" for t in a[20:30]), "\n\n".join(a[:100])])
    write(raw / "b.jsonl", ["short", *b, *a[40:60]])
    write(raw / "test.jsonl", a[77:80])
    sets = (Files(name="test", paths=("test.jsonl",)),)
    return CorpusConfig(sources=(source("a"), source("b", max_tokens=9_000)), decontaminate=sets)


def test_any_number_of_workers_gives_the_same(raw, tmp_path, small):
    config = mixed(raw)
    one, four = (make(config, tmp_path / str(workers), workers)[0] for workers in (1, 4))
    assert len(list((tmp_path / "1").glob("shard_*"))) > 8
    assert files(tmp_path / "1") == files(tmp_path / "4")
    assert one.counts() == four.counts()
    assert data.corpus.card("x", config, one) == data.corpus.card("x", config, four)


def test_an_interrupted_build_goes_on_from_any_shard(raw, tmp_path, small, monkeypatch):
    config = mixed(raw)
    whole, _ = make(config, tmp_path / "whole")
    shards = len(list((tmp_path / "whole").glob("shard_*")))
    (tmp_path / "broken").mkdir()
    written, write_json = 0, data.corpus.stage.write_json

    class Crash(Exception):
        pass

    def crash(path, value):
        nonlocal written
        write_json(path, value)
        written += 1
        raise Crash

    monkeypatch.setattr(data.corpus.stage, "write_json", crash)
    state = beginning()
    for _ in range(shards):
        with pytest.raises(Crash):
            gather(config, tmp_path / "broken", 2, state)
        state = json.loads((tmp_path / "broken/partial/state.json").read_text())
        (tmp_path / "broken" / f"shard_{len(state['shards']):05d}.jsonl").write_text("half a li")
    monkeypatch.setattr(data.corpus.stage, "write_json", write_json)
    assert written == shards
    tally = gather(config, tmp_path / "broken", 2, state)
    assert tally.counts() == whole.counts()
    found, expected = ({p.name: p.read_bytes() for p in (tmp_path / d).glob("shard_*")} for d in ("broken", "whole"))
    assert found == expected
    assert data.corpus.card("x", config, tally) == data.corpus.card("x", config, whole)


def test_nothing_is_left_of_another_build(place: Place):
    """What an interrupted build left is gone on from only if it was of the same corpus."""
    partial = place.runs / "mini/corpus/partial"
    partial.mkdir(parents=True)
    (partial / "state.json").write_text(json.dumps(beginning() | {"made": "something else", "source": 1}))
    (partial.parent / "shard_00007.jsonl").write_text('{"text": "left"}')
    place.run("pipeline.py", place.config, "corpus")
    assert sorted(p.name for p in partial.parent.iterdir() if p.name != ".lock") == [
        *("DATA_CARD.md", "log.txt", "manifest.json", "shard_00000.jsonl")
    ]


def test_the_card_says_what_was_left_out(raw, tmp_path):
    config = mixed(raw)
    config = replace(config, sources=(replace(config.sources[0], licence="CC0"), config.sources[1]))
    tally, found = make(config, tmp_path / "corpus")
    card = data.corpus.card("mixed", config, tally)
    assert "| a | CC0 | 140 |" in card
    assert "| a | contaminated: test |" in card
    assert "- b, too_short, `b.jsonl:1`: `short`" in card
    samples = card.split("## Ten documents at random\n\n")[1].strip().split("\n")
    assert len(samples) == 10
    assert all(any(f"`{r['id']}`" in sample for r in found) for sample in samples)


def test_what_could_not_be_read_is_said(place: Place):
    lines = (place.raw / "text.jsonl").read_text().splitlines()
    (place.raw / "text.jsonl").write_text("\n".join([*lines[:20], "{", '{"body": 3}', *lines[20:]]))
    place.edit(("min_chars=20", 'min_chars=20, unreadable="skip"'))
    process = place.run("pipeline.py", place.config, "corpus")
    assert f"files: 2 of {len(lines) + 2} records could not be read; see the card" in process.stderr
    card = (place.runs / "mini/corpus/DATA_CARD.md").read_text()
    assert "line 21: not JSON" in card
    assert "line 22: expected an object whose 'text' is a string" in card


def test_names_must_differ():
    with pytest.raises(ValueError, match="sources are called a, a; give each a name of its own"):
        CorpusConfig(sources=(source("a"), source("a")))


def test_documents_are_held_out_by_their_own_hash():
    texts = [b"document number %d" % i for i in range(4000)]
    share = sum(held_out(text, 0.05) for text in texts) / len(texts)
    assert share == pytest.approx(0.05, abs=0.015)
    assert all(held_out(text, 0.1) for text in texts if held_out(text, 0.05))


def test_odd_documents_go_through_every_rule(raw, tmp_path):
    """A long line, control characters, no words at all: whatever it is, it is kept or counted."""
    odd = [
        "x" * 5_000_000,
        "word " * 100_000,
        "\x00" * 50,
        "?" * 20_000,
        "<b>" * 9_000,
        "港" * 9_000,
        "a\n" * 20_000,
        "",
    ]
    write(raw / "a.jsonl", odd)
    for name, quality in {"none": None, "all": Quality()}.items():
        tally, found = make(CorpusConfig(sources=(source("a", quality=quality),)), tmp_path / name)
        assert tally.sources["a"]["read"] == len(odd)
        assert sum(tally.sources["a"]["dropped"].values()) + len(found) >= len(odd)


@pytest.fixture
def tmpfs(tmp_path):
    """A file system of 600 kB."""
    place = tmp_path / "full"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting a file system needs to be root")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_disk_that_fills_up_is_named_and_nothing_counts_as_finished(place: Place, tmpfs, tmp_path):
    write(place.raw / "text.jsonl", varied(3_000))
    place.env["RUNS"] = str(tmpfs)
    error = place.run("pipeline.py", place.config, "corpus", status=2).stderr
    assert "No space left on device" in error
    assert not (tmpfs / "mini/corpus/manifest.json").exists()
    place.env["RUNS"] = str(tmp_path / "roomy")
    place.run("pipeline.py", place.config, "corpus")


# Runs all data stages with small shards, so that there is something to go on from.
STAGES = """
import cli, data.corpus, data.pack, pipeline
data.corpus.SHARD_BYTES, data.corpus.BATCH_CHARS, data.pack.CHUNK = 30_000, 3_000, 9_000
print("ready", flush=True)
cli.run(pipeline.main, pipeline.parser().parse_args())
"""


@pytest.mark.slow
def test_ten_random_kills_change_no_byte(place: Place, tmp_path):
    paths = [*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("tests/*/*.py")]
    write(place.raw / "text.jsonl", [part for path in sorted(paths) for part in path.read_text().split("\n\n")])
    place.env["RUNS"] = str(tmp_path / "whole")
    started = time.monotonic()
    place.run("-c", STAGES, place.config, "pack", "--workers", 1)
    seconds = time.monotonic() - started
    place.env["RUNS"] = str(tmp_path / "killed")
    rng, kills = random.Random(time.time_ns()), 0
    while kills < 10:
        process = place.start("-c", STAGES, place.config, "pack", "--workers", 4)
        process.wait_for("ready")
        try:
            process.wait(rng.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
        process.communicate()
        if process.returncode == 0:  # finished before the kill: from the beginning
            for path in sorted((tmp_path / "killed/mini").iterdir()):
                if path.is_dir() and rng.random() < 0.7:
                    shutil.rmtree(path)
    place.run("-c", STAGES, place.config, "pack", "--workers", 4)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
