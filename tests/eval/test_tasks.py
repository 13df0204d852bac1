"""What is read of the published tasks, and what is said of data that is not what it should be."""

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
BREAD, BAKES = "Question: cut bread\nAnswer:", "Baking: A man bakes. He The oven"
ASKED = {
    "boolq": (((ICE, " no"), (ICE, " yes")), 1),
    "blimp": ((("", "Cats sleep."), ("", "Cats sleeps.")), 0),
    "arc_easy": ((("Question: What falls?\nAnswer:", " rain"), ("Question: What falls?\nAnswer:", " sun")), 0),
    "piqa": (((BREAD, " use a knife"), (BREAD, " use a spoon")), 0),
    "hellaswag": (((BAKES, " opens. it"), (BAKES, " sings")), 1),
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
    assert (tuple(question.choices), question.answer) == ASKED[name]
    if name == "blimp":
        assert question.kind == {"field": "syntax_semantics", "term": "agreement"}
    if name == "hellaswag":  # some files have its parts joined
        record = {"ctx": "Baking: A man bakes.  He", "endings": ["a", "b"], "label": 0}
        assert tasks.hellaswag(record).choices[0] == ("Baking: A man bakes. He", " a")


@pytest.mark.parametrize("end", ["jsonl", "jsonl.xz"])
def test_data_is_found_by_name(raw, end):
    assert PUBLISHED["piqa"].find() is None
    (raw / f"piqa_val.{end}").touch()
    (raw / ".piqa_val.jsonl.partial").touch()
    assert PUBLISHED["piqa"].find() == raw / f"piqa_val.{end}"
    (raw / "hellaswag_val1000.jsonl.xz").touch()
    assert PUBLISHED["hellaswag"].find() == raw / "hellaswag_val1000.jsonl.xz"
    (raw / "piqa_val2.jsonl").touch()
    with pytest.raises(UserError, match="remove all but one"):
        PUBLISHED["piqa"].find()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("piqa", {"sol1": 5}, "TypeError"),
        ("piqa", {"sol1": " "}, "a choice is empty"),
        ("piqa", {"goal": "\ud800"}, "UnicodeEncodeError"),
        ("piqa", {"label": -1}, "the answer is number -1 of 2 choices"),  # as in its test set
        ("piqa", {"label": 2}, "the answer is number 2 of 2 choices"),
        ("hellaswag", {"label": "-1"}, "the answer is number -1 of 2 choices"),
        ("hellaswag", {"endings": "abcd"}, "'abcd' is no list of choices"),
        ("hellaswag", {"label": 0.9}, "ValueError"),
        ("hellaswag", {"label": ""}, "ValueError"),  # as in its test set
        ("arc_easy", {"answerKey": "E"}, "'E' is not in list"),
        ("arc_easy", {"choices": {"text": ["rain", "sun", "fog"], "label": ["A", "B"]}}, "ValueError"),
        ("arc_easy", {"choices": {"text": ["rain"], "label": ["A", "B"]}}, "ValueError"),
        ("arc_easy", {"choices": {"text": "ab", "label": ["A", "B"]}}, "'ab' is no list of choices"),
        ("arc_easy", {"choices": {"text": ["rain", "sun"], "label": ["A", "A"]}}, "number 0 of 1 choices"),
        ("boolq", {"answer": "yes"}, "'yes' is not in list"),
        ("blimp", {"linguistics_term": None}, "AttributeError"),
        ("blimp", {"sentence_bad": None}, "TypeError"),
        ("winogrande", {"sentence": "No blank."}, "ValueError"),
        ("winogrande", {"answer": "3"}, "the answer is number 2 of 2 choices"),
        ("winogrande", {"answer": "0"}, "the answer is number -1 of 2 choices"),
    ],
)
def test_a_record_that_is_not_what_it_should_be(raw, name, change, message):
    path = raw / "data"
    path.write_text("\n".join(map(json.dumps, [RECORDS[name], RECORDS[name] | change])))
    with pytest.raises(UserError) as error:
        PUBLISHED[name].load(path)
    assert str(error.value).startswith(f"{path}, line 2: not the data of {PUBLISHED[name].dataset}: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("piqa", b"", "the file is empty"),
        ("piqa", b"\n \n", "the file is empty"),
        ("piqa", b"{", "line 1: not the data of baber/piqa"),
        ("piqa", b'{"goal": "x"}', "line 1: .*'sol1'"),
        ("piqa", b"[1]", "line 1"),
        ("piqa", b"[" * 100_000, "line 1"),
        ("piqa", b"text \xff" * 1000, "UnicodeDecodeError"),
        ("wikitext2", b"", "no title line"),
        ("wikitext2", b"= Ice =\nIce is frozen .\n", "no title line"),
    ],
)
def test_a_file_that_is_not_what_it_should_be(raw, name, content, message):
    path = raw / "data"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        PUBLISHED[name].load(path)
    assert str(error.value).startswith(str(path))
    assert len(str(error.value)) < 300 + len(str(path))


def test_text_with_other_line_ends_and_a_damaged_archive(raw):
    path = raw / "wiki.test.raw"
    path.write_bytes(b" \r\n = Ice = \r\n \r\n Ice is frozen . \r\n")
    assert PUBLISHED["wikitext2"].load(path) == " \n = Ice = \n \n Ice is frozen . \n"
    path = raw / "piqa_val.jsonl.xz"
    path.write_bytes(lzma.compress(json.dumps(RECORDS["piqa"]).encode())[:-8])
    with pytest.raises(UserError, match=r"piqa_val.jsonl.xz: not the data"):
        PUBLISHED["piqa"].load(path)


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
    with pytest.raises(UserError, match="cannot load the dataset"):
        download.download(PUBLISHED["piqa"])
    local("boolq", raw, [RECORDS["piqa"]], monkeypatch)
    with pytest.raises(UserError, match="not the data"):
        download.download(PUBLISHED["boolq"])
    assert not list(raw.glob("*.jsonl")) + list(raw.glob(".*"))
