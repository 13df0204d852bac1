"""Sources: what is read, in which order, and the errors for what cannot be read."""

import bz2
import gzip
import lzma
import os
import re
import shutil
import sys

import pyarrow
import pyarrow.parquet
import pytest

from cli import UserError
from data.sources import Files, Hub, PythonDocs, Unreadable


def read(*paths: str, **options) -> list[tuple[str, str]]:
    return [(d.id, d.value) for d in Files(paths=paths, **options).documents(1)]


def test_files_of_every_kind(raw):
    content = {
        "a.txt": b"one\ntwo\n",
        "b.jsonl": b'\xef\xbb\xbf{"text": "three"}\n\n{"text": "fo\\nur", "n": 1}\n',
        "c.jsonl.xz": lzma.compress(b'{"text": "five"}'),
        "d.txt.gz": gzip.compress("sechs ä".encode()),
        "e.md": b"\xef\xbb\xbf# seven\x00",
        "f.json": b'[{"text": "eight"}, {"text": "nine"}]',
        "g.json.bz2": bz2.compress(b'{"text": "ten"}'),
        "h.txt": b"",
        "i.jsonl": b"",
    }
    for name, data in content.items():
        (raw / name).write_bytes(data)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["eleven", "twelve"], "n": [1, 2]}), raw / "j.parquet")
    paths = ("*.txt", "*.jsonl", "c.jsonl.xz", "d.txt.gz", "a.txt", "e.md", "*.json*", "j.parquet")
    whole = [
        *(("a.txt", "one\ntwo\n"), ("h.txt", ""), ("b.jsonl:1", "three"), ("b.jsonl:3", "fo\nur")),
        *(("c.jsonl.xz:1", "five"), ("d.txt.gz", "sechs ä"), ("e.md", "# seven\x00"), ("f.json:1", "eight")),
        *(("f.json:2", "nine"), ("g.json.bz2:1", "ten"), ("j.parquet:1", "eleven"), ("j.parquet:2", "twelve")),
    ]
    assert read(*paths) == whole
    for skip in range(13):
        assert [(d.id, d.value) for d in Files(paths=paths).documents(1, skip)] == whole[skip:]
    shares = [d.read for d in Files(paths=paths).documents(1)]
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] <= 1
    (raw / "k.jsonl").write_text('{"body": "x", "n": 1, "more": {"b": ["y", {"c": "z"}]}}')
    assert read("k.jsonl", field="body") == [("k.jsonl:1", "x")]
    assert read("k.jsonl", field="*") == [("k.jsonl:1", "x\ny\nz")]


BAD = [
    ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2 is not JSON"),
    ("a.jsonl", b'{"body": "x"}\n', "line 1: expected an object whose 'text' is a string, found body"),
    ("a.jsonl", b'{"text": "x"}\nnull\n{"text": "z"}\n', "line 2: expected an object"),
    ("a.jsonl", b'{"text": "caf\xe9"}\n', "line 1 is not UTF-8"),
    ("a.jsonl", b"[" * 200_000, "line 1 is not JSON"),
    ("a.json", b'[{"text": "x"},', "is not JSON"),
    ("a.json", b'[{"body": "x"}]', "element 1: expected an object"),
    ("a.txt", b"caf\xe9", r"is not UTF-8 \(.* byte 0xe9 in position 3"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_bad_records_are_named_or_skipped(raw, name, content, message):
    (raw / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}.*{message}.*unreadable=\"skip\""):
        read(name)
    texts = [text for _, text in read(name, unreadable="skip")]
    assert re.search(message, " ".join(text for text in texts if isinstance(text, Unreadable)))
    good = [letter for letter in "xz" if name == "a.jsonl" and b'"text": "%b"}' % letter.encode() in content]
    assert [text for text in texts if not isinstance(text, Unreadable)] == good


LINES = b'{"text": "x"}\n' * 9999
NOISE = os.urandom(30_000).hex().encode()
BROKEN = [
    *(("a.txt.xz", b"not xz"), ("a.txt.xz", b""), ("a.txt.gz", b"not gz"), ("a.txt.bz2", b"BZh9 and no more")),
    *(("a.jsonl.xz", lzma.compress(LINES)[:-40]), ("a.jsonl.bz2", bz2.compress(LINES)[:-9])),
    *(("a.jsonl.gz", gzip.compress(LINES)[:-9]), ("a.jsonl.gz", gzip.compress(LINES) * 2 + b"broken")),
    *(("a.txt.xz", lzma.compress(b"1") + lzma.compress(NOISE)[:-5]), ("a.txt.xz", lzma.compress(b"1") + b"\1" + NOISE)),
    *(("a.txt.bz2", bz2.compress(b"1") + b"BZhx" + NOISE), ("a.parquet", b"PAR1 and no more")),
]


@pytest.mark.parametrize(("name", "content"), BROKEN)
def test_damaged_files_are_named_whatever_the_policy(raw, name, content):
    (raw / name).write_bytes(content)
    for policy in ("stop", "skip"):
        with pytest.raises(UserError, match=f"{name} cannot be read: .*; replace the file"):
            read(name, unreadable=policy)


@pytest.mark.parametrize(("end", "compress"), [("xz", lzma.compress), ("bz2", bz2.compress), ("gz", gzip.compress)])
def test_streams_one_after_another(raw, end, compress):
    """As `cat a.xz b.xz > c.xz` makes them. Damage in the last is seen, however short."""
    (raw / f"a.txt.{end}").write_bytes(b"".join(compress(part) for part in (NOISE, b"two", NOISE)))
    assert read(f"a.txt.{end}") == [(f"a.txt.{end}", (NOISE + b"two" + NOISE).decode())]
    (raw / f"b.txt.{end}").write_bytes(compress(NOISE) + compress(b"two")[:-3])
    with pytest.raises(UserError, match=f"b.txt.{end} cannot be read"):
        read(f"b.txt.{end}")


def test_parquet_with_a_fault_is_named(raw, monkeypatch):
    offsets, letters = pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")
    column = pyarrow.StringArray.from_buffers(1, offsets, letters)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), raw / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet cannot be read: .*; replace the file"):
        read("a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), raw / "b.parquet")
    with pytest.raises(UserError, match="row 1: expected an object whose 'text' is a string"):
        read("b.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"a .parquet file needs pyarrow; install it with: pip install pyarrow"):
        read("b.parquet")


@pytest.mark.parametrize("name", ["第一章　序.txt", "👨‍👩‍👧.txt", "b[1].txt", "a*b?.txt", "caf\udce9.txt"])
@pytest.mark.parametrize("directory", ["", "books [1999]/", "第　一/part [2]/", "caf\udce9/"])
def test_any_file_name_is_read(raw, name, directory):
    (raw / directory).mkdir(parents=True, exist_ok=True)
    (raw / directory / name).write_text("x")
    (raw / directory / "a1.txt").write_text("y")
    assert [text for _, text in read(f"{directory}{name}")] == ["x"]
    for pattern in (f"{directory}*.txt", "**/*.txt", f"{raw}/{directory}*.txt"):
        assert sorted(text for _, text in read(pattern, f"{directory}{name}")) == ["x", "y"]
    assert [id.encode() for id, _ in read("**/*.txt")]
    assert [id for id, _ in read("**/a[12].txt")] == ["a1.txt"]


def test_impossible_sources_are_refused(raw):
    (raw / "a.pdf").write_bytes(b"%PDF")
    (raw / "folder").mkdir()
    for path, message in (
        ("a.pdf", "has another format; expected .txt, .md, .jsonl, .json or .parquet"),
        ("no*.txt", "no file at .*; correct the path"),
        ("folder/", r"no file at .*folder; .* name its files: folder/\*\.txt"),
    ):
        with pytest.raises(UserError, match=message):
            read(path)
    for field, value in {"paths": (), "max_tokens": 0, "unreadable": "perhaps"}.items():
        with pytest.raises(ValueError, match=f"{field} is"):
            Files(**{"paths": ("a",), field: value})


def test_python_docs_are_the_same_for_any_number_of_workers():
    source = PythonDocs(packages=("jinja2", "not_installed", "not.installed"))
    one, three = list(source.documents(1)), list(source.documents(3, 17))
    assert one[17:] == three
    docs = {d.id: d.value for d in one}
    assert docs["json.dumps"].startswith("Serialize ``obj`` to a JSON formatted ``str``.")
    assert docs["jinja2.environment.Environment.from_string"].startswith("Load a template from a source string")
    assert "assert" in docs["pydoc_data.topics.assert"]
    assert not any(".test." in name for name in docs)
    assert len(docs) > 7_000  # some distributions leave out parts of the library


@pytest.fixture
def dataset(tmp_path):
    """A directory laid out like a dataset: `datasets` streams it by the code that streams from the network."""
    (tmp_path / "set").mkdir()
    for shard in range(3):
        table = pyarrow.table({"text": [f"document {shard * 100 + i}" for i in range(100)], "n": list(range(100))})
        pyarrow.parquet.write_table(table, tmp_path / f"set/train-{shard}.parquet", row_group_size=10)
    return tmp_path / "set"


def test_a_dataset_is_streamed_in_order_from_anywhere(dataset):
    source = Hub(dataset=str(dataset), name="set")
    whole = [(f"set:{i + 1}", f"document {i}") for i in range(300)]
    assert [(d.id, d.value) for d in source.documents(1)] == whole
    assert [(d.id, d.value) for d in source.documents(1, 150)] == whole[150:]
    before = source.inputs()
    (dataset / "train-1.parquet").unlink()
    assert list(before) == list(source.inputs()) == [f"{dataset}/default/train"]
    assert before != source.inputs()


def test_a_failed_read_is_tried_again_where_it_failed(dataset, tmp_path, monkeypatch, caplog):
    whole = tmp_path / "whole.parquet"
    shutil.move(dataset / "train-1.parquet", whole)
    (dataset / "train-1.parquet").write_bytes(whole.read_bytes()[:-100])  # the second file breaks off
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        if len(waited) == 4:
            shutil.copy(whole, dataset / "train-1.parquet")  # and then it is whole

    monkeypatch.setattr("data.sources.time.sleep", sleep)
    with pytest.raises(UserError, match=r"ArrowInvalid.*\(attempt 3\); the same command continues"):
        list(Hub(dataset=str(dataset), retries=2).documents(1))
    source = Hub(dataset=str(dataset), name="set")
    assert [d.value for d in source.documents(1)] == [f"document {i}" for i in range(300)]
    assert waited == [1, 2, 1, 2]
    assert "trying again" in caplog.text


def test_what_a_dataset_lacks_is_named(dataset):
    for options, message in (
        ({"subset": "en"}, "set: .*'en' not found"),
        ({"split": "a"}, "set: no split 'a'; there are train"),
    ):
        with pytest.raises(UserError, match=message):
            Hub(dataset=str(dataset), **options).inputs()
    message = "expected an object whose 'body' is a string, found text, n; set field"
    skipped = [d.value for d in Hub(dataset=str(dataset), field="body").documents(1)]
    assert all(isinstance(text, Unreadable) for text in skipped)
    assert skipped[7].startswith(f"{dataset}, record 8: {message}")
    with pytest.raises(UserError, match=f"{dataset}, record 1: {message}"):
        list(Hub(dataset=str(dataset), field="body", unreadable="stop").documents(1))
