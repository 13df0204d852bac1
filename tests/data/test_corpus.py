"""Sources and corpus: what is read, cleaned, dropped and kept."""

import gzip
import json
import lzma
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.corpus import CorpusConfig, clean, documents, fingerprint, gather, held_out, write_shards
from data.sources import Files, PythonDocs
from stage import UserError


@pytest.fixture
def raw(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA", str(tmp_path))
    return tmp_path


def read(*paths: str, **options) -> list[tuple[str, str]]:
    return list(Files(paths=paths, **options).documents(1))


def test_files_of_every_kind(raw):
    (raw / "a.txt").write_text("one\ntwo\n")
    (raw / "b.jsonl").write_text('{"text": "three"}\n\n{"text": "fo\\nur", "n": 1}\n')
    (raw / "c.jsonl.xz").write_bytes(lzma.compress(b'{"text": "five"}'))
    (raw / "d.txt.gz").write_bytes(gzip.compress("sechs ä".encode()))
    found = read("*.txt", "*.jsonl", "c.jsonl.xz", "d.txt.gz", "a.txt")
    assert found == [
        ("a.txt", "one\ntwo\n"),
        ("b.jsonl:1", "three"),
        ("b.jsonl:3", "fo\nur"),
        ("c.jsonl.xz:1", "five"),
        ("d.txt.gz", "sechs ä"),
    ]


def test_another_field(raw):
    (raw / "a.jsonl").write_text('{"body": "x"}')
    assert read("a.jsonl", field="body") == [("a.jsonl:1", "x")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2: not JSON"),
        ("a.jsonl", b'{"body": "x"}\n', "line 1: expected an object whose 'text' is a string"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: expected an object whose 'text' is a string"),
        ("a.jsonl", b'["text"]\n', "line 1: expected an object"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: 'text' holds half a surrogate pair"),
        ("a.txt", b"caf\xe9", "not UTF-8"),
        ("a.txt.xz", b"not xz", "cannot be read"),
        ("a.txt.gz", b"not gz", "cannot be read"),
        ("a.txt.xz", lzma.compress(b"long enough" * 99)[:-20], "cannot be read"),
        ("a.jsonl", b"[" * 200_000, "line 1: not JSON"),
        ("a.txt.bz2", b"BZh9 and no more", "cannot be read"),
        ("a.txt.gz", gzip.compress(bytes(range(256)) * 9)[:40] + bytes(300), "cannot be read"),
        ("a.pdf", b"%PDF", "neither .txt nor .jsonl"),
    ],
)
def test_bad_files_are_named(raw, name, content, message):
    (raw / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read(name)
    assert name in str(error.value)


def test_odd_files_are_read(raw):
    (raw / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}')
    (raw / "b[1].txt").write_text("y")
    assert read("a.jsonl", "b[1].txt") == [("a.jsonl:1", "x"), ("b[1].txt", "y")]
    assert list(PythonDocs(packages=("nowhere.at.all",)).files()) == list(PythonDocs(packages=()).files())


def test_missing_files_are_named(raw):
    with pytest.raises(UserError, match=r"no file at .*nowhere\*.txt; correct the path"):
        read("nowhere*.txt")


def test_clean_by_hand():
    assert clean("\n\n  a\tb \r\nc\x00\x07d\rlast\u00a0  \n\n\n") == "  a\tb\ncd\nlast\u00a0"
    assert clean("def f():\n    return 1\n\n\nx") == "def f():\n    return 1\n\n\nx"


@given(st.text(st.characters(codec="utf-8")))
def test_cleaning_twice_changes_nothing(text):
    assert clean(clean(text)) == clean(text)


def test_short_and_equal_documents_are_dropped_and_counted(raw):
    texts = ["A first document.", "short", "a  FIRST document.\n", "A second document."]
    (raw / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    counts = Counter()
    records = list(gather(CorpusConfig(sources=(Files(paths=("a.jsonl",)),), min_chars=10), 1, counts))
    assert [r["text"] for r in records] == ["A first document.", "A second document."]
    assert [r["id"] for r in records] == ["a.jsonl:1", "a.jsonl:4"]
    assert counts == {"documents": 2, "bytes": 35, "too_short": 1, "duplicates": 1, "from files": 2}


def test_shards_hold_every_record_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr("data.corpus.SHARD_BYTES", 100)
    texts = [f"document {i}, in words\nand lines" for i in range(20)]
    write_shards(tmp_path, ({"text": text} for text in texts))
    assert len(list(tmp_path.glob("shard_*.jsonl"))) > 5
    assert list(documents(tmp_path)) == texts


def test_documents_are_held_out_by_their_own_hash():
    texts = [f"document number {i}" for i in range(4000)]
    share = sum(held_out(text, 0.05) for text in texts) / len(texts)
    assert share == pytest.approx(0.05, abs=0.015)
    assert all(held_out(text, 0.1) for text in texts if held_out(text, 0.05))
    assert fingerprint("Some  Text\n") == fingerprint("some text")


def test_python_docs_are_the_same_for_any_number_of_workers():
    source = PythonDocs(packages=("jinja2", "tqdm", "not_installed"))
    one, three = list(source.documents(1)), list(source.documents(3))
    assert one == three
    docs = dict(one)
    assert docs["json.dumps"].startswith("Serialize ``obj`` to a JSON formatted ``str``.")
    assert docs["jinja2.environment.Environment.from_string"].startswith("Load a template from a source string")
    assert "assert" in docs["pydoc_data.topics.assert"]
    assert not any(".test." in name for name in docs)
    assert len(docs) > 8_000
