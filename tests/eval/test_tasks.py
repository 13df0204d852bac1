"""What is read of the published tasks, and what is said of data that is not what it should be."""

import argparse
import dataclasses
import json
import lzma

import datasets
import pytest

from cli import UserError
from eval import download, tasks
from eval.tasks import PUBLISHED

RECORDS = {
    "boolq": {"question": "is ice cold?", "title": "Ice", "passage": "Ice is frozen water.", "answer": True},
    "blimp": {
        "UID": "a", "field": "syntax/semantics", "linguistics_term": "agreement",
        "sentence_good": "Cats sleep.", "sentence_bad": "Cats sleeps.",
    },
    "arc_easy": {
        "question": "What falls?", "choices": {"text": ["rain", "sun"], "label": ["A", "B"]}, "answerKey": "A",
    },
    "piqa": {"goal": "cut bread", "sol1": "use a knife", "sol2": "use a spoon", "label": 0},
    "hellaswag": {
        "activity_label": "Baking", "ctx_a": "A man bakes. [header] He", "ctx_b": "the oven", "ctx": "unused",
        "endings": ["opens [title] it", "sings"], "label": "1",
    },
    "winogrande": {"sentence": "Ann met Bea and _ smiled .", "option1": "Ann", "option2": "Bea", "answer": "2"},
}  # fmt: skip
ICE = "Ice is frozen water.\nQuestion: is ice cold?\nAnswer:"
ASKED = {
    "boolq": (((ICE, " no"), (ICE, " yes")), 1),
    "blimp": ((("", "Cats sleep."), ("", "Cats sleeps.")), 0),
    "arc_easy": ((("Question: What falls?\nAnswer:", " rain"), ("Question: What falls?\nAnswer:", " sun")), 0),
    "piqa": (
        (("Question: cut bread\nAnswer:", " use a knife"), ("Question: cut bread\nAnswer:", " use a spoon")),
        0,
    ),
    "hellaswag": (
        (("Baking: A man bakes. He The oven", " opens. it"), ("Baking: A man bakes. He The oven", " sings")),
        1,
    ),
    "winogrande": ((("Ann met Bea and Ann", " smiled ."), ("Ann met Bea and Bea", " smiled .")), 1),
}


@pytest.fixture(autouse=True)
def raw(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", RECORDS)
def test_what_is_asked(raw, name):
    path = raw / f"{name}.jsonl"
    path.write_text(json.dumps(RECORDS[name]) + "\n\n")
    [question] = PUBLISHED[name].load(path)
    assert (question.choices, question.answer) == ASKED[name]


def test_blimp_is_told_apart_by_field_and_term():
    assert tasks.blimp(RECORDS["blimp"]).kind == {"field": "syntax_semantics", "term": "agreement"}


def test_hellaswag_without_its_parts_has_them_joined():
    record = {"ctx": "Baking: A man bakes.  He", "endings": ["a", "b"], "label": 0}
    assert tasks.hellaswag(record).choices[0] == ("Baking: A man bakes. He", " a")


@pytest.mark.parametrize("end", ["jsonl", "jsonl.xz", "jsonl.gz", "jsonl.bz2"])
def test_data_is_found_by_name(raw, end):
    assert PUBLISHED["piqa"].find() is None
    (raw / f"piqa_val.{end}").touch()
    (raw / ".piqa_val.jsonl.partial").touch()
    assert PUBLISHED["piqa"].find() == raw / f"piqa_val.{end}"
    (raw / "hellaswag_val1000.jsonl.xz").touch()
    assert PUBLISHED["hellaswag"].find() == raw / "hellaswag_val1000.jsonl.xz"
    (raw / "piqa_val2.jsonl").touch()
    with pytest.raises(UserError, match="which is it"):
        PUBLISHED["piqa"].find()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b"{", "line 1: not a record of baber/piqa"),
        (b"[1]", "line 1"),
        (b"null", "line 1"),
        (b'{"goal": "x"}', "no 'sol1'"),
        (json.dumps(RECORDS["piqa"]).encode() + b"\n" + b'{"goal": 1, "sol1": "a", "sol2": "b", "label": 3}', "line 2"),
        (json.dumps(RECORDS["piqa"] | {"sol1": " "}).encode(), "a choice is empty"),
        (json.dumps(RECORDS["piqa"] | {"sol1": 5}).encode(), "line 1"),
        (json.dumps(RECORDS["piqa"] | {"goal": "\ud800"}).encode(), "line 1"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 100_000, "line 1"),
    ],
)
def test_data_that_is_not_what_it_should_be(raw, content, message):
    path = raw / "piqa_val.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        PUBLISHED["piqa"].load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("hellaswag", {"endings": "abcd"}),
        ("hellaswag", {"endings": {"a": 1, "b": 2}}),
        ("hellaswag", {"label": 0.9}),
        ("hellaswag", {"label": True}),
        ("hellaswag", {"label": float("inf")}),
        ("arc_easy", {"choices": {"text": ["rain", "sun", "fog"], "label": ["A", "B"]}}),
        ("arc_easy", {"choices": {"text": ["rain", "sun"], "label": ["A", "A"]}}),
        ("arc_easy", {"answerKey": "E"}),
        ("arc_easy", {"choices": {"text": "ab", "label": ["A", "B"]}}),
        ("winogrande", {"option1": " "}),
        ("winogrande", {"sentence": "No blank."}),
        ("winogrande", {"answer": "3"}),
        ("blimp", {"linguistics_term": "\ud800"}),
        ("piqa", {"sol1": ["a"]}),
    ],
)
def test_records_of_wrong_types(raw, name, change):
    path = raw / f"{name}.jsonl"
    path.write_text(json.dumps(RECORDS[name] | change))
    with pytest.raises(UserError, match="line 1: not a record"):
        PUBLISHED[name].load(path)


def test_running_text_as_it_should_be(raw):
    path = raw / "wiki.test.raw"
    path.write_bytes(b" \r\n = Ice = \r\n \r\n Ice is frozen . \r\n")
    assert PUBLISHED["wikitext2"].load(path) == " \n = Ice = \n \n Ice is frozen . \n"
    path.write_text("= Ice =\nIce is frozen .\n")
    with pytest.raises(UserError, match="does not begin with a title"):
        PUBLISHED["wikitext2"].load(path)


def test_what_is_no_file(raw):
    (raw / "piqa_val.jsonl").symlink_to(raw / "nowhere")
    with pytest.raises(UserError, match="is not a file"):
        PUBLISHED["piqa"].find()


def test_a_damaged_archive(raw):
    path = raw / "piqa_val.jsonl.xz"
    path.write_bytes(lzma.compress(json.dumps(RECORDS["piqa"]).encode())[:-8])
    with pytest.raises(UserError, match="cannot be read"):
        PUBLISHED["piqa"].load(path)


def test_blimp_wants_a_term(raw):
    path = raw / "blimp.jsonl"
    path.write_text(json.dumps(RECORDS["blimp"] | {"linguistics_term": None}))
    with pytest.raises(UserError, match="line 1: not a record"):
        PUBLISHED["blimp"].load(path)


def test_boolq_wants_true_or_false():
    with pytest.raises(ValueError, match="'yes', not true or false"):
        tasks.boolq(RECORDS["boolq"] | {"answer": "yes"})


def local(name: str, raw, records: list[dict], monkeypatch) -> None:
    """A dataset in a directory, laid out as one on the Hub, in place of a task's."""
    home = raw / "hub"
    home.mkdir()
    datasets.Dataset.from_list(records).to_json(home / f"{PUBLISHED[name].split}.jsonl")
    there = dataclasses.replace(PUBLISHED[name], dataset=str(home), subset=None)
    monkeypatch.setitem(PUBLISHED, name, there)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(raw / "cache"))


def test_download_brings_what_evaluation_reads(raw, monkeypatch):
    local("piqa", raw, [RECORDS["piqa"]] * 3, monkeypatch)
    path = download.download(PUBLISHED["piqa"])
    assert path == PUBLISHED["piqa"].find() == raw / "piqa_val.jsonl"
    assert len(PUBLISHED["piqa"].load(path)) == 3


def test_download_of_running_text(raw, monkeypatch):
    rows = ["", " = Ice = \n", "", " Ice is frozen . \n", " = Rain = \n", " Rain falls . \n"]
    local("wikitext2", raw, [{"text": row} for row in rows], monkeypatch)
    path = download.download(PUBLISHED["wikitext2"])
    assert path == raw / "wikitext-2/wiki.test.raw"
    assert path.read_text() == " \n = Ice = \n \n Ice is frozen . \n = Rain = \n Rain falls . \n"


def test_a_download_that_fails_leaves_nothing(raw, monkeypatch):
    monkeypatch.setitem(PUBLISHED, "piqa", dataclasses.replace(PUBLISHED["piqa"], dataset=str(raw / "nowhere")))
    with pytest.raises(UserError, match="cannot be had"):
        download.download(PUBLISHED["piqa"])
    local("boolq", raw, [RECORDS["piqa"]], monkeypatch)
    with pytest.raises(UserError, match="not a record"):
        download.download(PUBLISHED["boolq"])
    assert not list(raw.glob("*.jsonl")) + list(raw.glob(".*"))


def test_an_unknown_task(raw):
    with pytest.raises(UserError, match="no task boolqq has data of its own; there are wikitext2, boolq"):
        download.main(argparse.Namespace(tasks=["boolqq"]))
