"""The summary and the page say what the files say, whatever the files say."""

import dataclasses
import hashlib
import json
import re
import shutil
import struct
import sys

import pytest

import configs
import stage
from cli import UserError
from eval import report, summary
from eval.summary import Run
from tests.conftest import Place

IDS = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("tokenizer", "data")}


def choice(accuracy: float, p: float, **more) -> dict:
    numbers = {"accuracy": accuracy, "accuracy_norm": accuracy + 0.0123, "stderr": 0.0111, "stderr_norm": 0.0222}
    return numbers | {"baseline": 0.5, "p_value": p, "truncated": 7, "n": 1838} | more


def results(sha256: str) -> dict:
    """Of three stages, as `pipeline.py CONFIG eval` writes them."""
    fields = {"syntax": {"accuracy": 0.6321, "stderr": 0.0031, "n": 26_000}}
    validation = {"perplexity": None, "bits_per_byte": 1.2345, "stderr": 0.0135, "baseline": 2.4690, "n": 100}
    measured = {
        "validation": validation,
        "blimp": choice(0.5678, 0.001, by_field=fields),
        "piqa": choice(0.5101, 0.4),
        "winogrande": {"skipped": "no data/raw/winogrande_val.*; get it with: python -m eval.download winogrande"},
        "smoke": {"passed": 2 / 24, "by_category": {"facts": 0.25}, "stderr": 0.06, "n": 24},
    }
    for entry in measured.values():
        if "skipped" not in entry:
            entry.update(IDS, checkpoint=sha256)
    dpo = {"preference": {"win_rate": 0.5432, "margin": 0.1, "stderr": 0.02, "baseline": 0.5, "n": 300}}
    beside_itself = {"win_rate": 0.5, "stderr": 0.0, "baseline": 0.5, "n": 300}
    return {"pretrain": measured, "sft": {"blimp": choice(0.4321, 0.002), "preference": beside_itself}, "dpo": dpo}


def generations(text: str = "an answer") -> dict:
    """Of one stage; all texts of the model and of the user are the same."""
    rules = {"content": {"rule": "names a number", "passed": False, "found": "none"}}
    smoke = {"category": "facts", "prompt": text, "seed": 5, "answer": text, "passed": False, "rules": rules}
    longer = {"prompt": text, "seed": 77, "answer": text, "distinct_1": 0.8765, "repetition": 0.25, "ended": False}
    beginnings = {"prompt": text, "seed": 0, "continuation": text, "truth": text}
    return {"pretrain": {"continuations": [beginnings], "smoke": [smoke] * 24, "prompts": [longer] * 5}}


def evaluated(place: Place, found: dict | None = None, said: dict | None = None) -> Place:
    """The run with the results of an evaluation."""
    directory = place.runs / "mini/eval"
    directory.mkdir(exist_ok=True)
    weights = stage.sha256(place.runs / "mini/pretrain/final/weights.pt")
    stage.write_json(directory / "results.json", results(weights) if found is None else found)
    (directory / "generations.json").write_text(json.dumps(generations() if said is None else said))
    manifest = {"config": {}, "read": {}, "wrote": {}, "counts": {}, "versions": {"python": "3.99"}}
    stage.write_manifest(directory, manifest)
    return place


@pytest.fixture(autouse=True)
def home(trained: Place, monkeypatch):
    monkeypatch.setenv("RUNS", str(trained.runs))


def load(place: Place, **changes) -> Run:
    return Run(dataclasses.replace(configs.load(place.config), **changes))


def write(place: Place) -> str:
    """The page that the command writes."""
    report.write(configs.load(place.config))
    return (place.runs / "mini/REPORT.md").read_text(encoding="utf-8")


def cells(page: str) -> list[list[str]]:
    """The rows of all tables."""
    return [[c.strip() for c in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]


def test_one_row_a_stage_says_whether_its_number_is_usual(trained: Place):
    documents = stage.read_manifest(trained.runs / "mini/corpus")["counts"]["documents"]
    assert [load(evaluated(trained)).result(name) for name in ("sft", "eval")] == ["", "7 results"]
    expected = {
        "sft.answers.los": (1.0, 2.0),
        "pretrain.blimp": (1.0, 2.0),
        "corpus.documents": (documents, documents),
        "pretrain.validation.bits_per_byte": (1.3, 1.5),
        "pretrain.piqa.accuracy": (0.4, 0.5),
        "dpo.preference.win_rate": (0.5432, 1.0),
    }
    assert [row[:4] for row in load(evaluated(trained), expected=expected).rows() if row[3]] == [
        ["corpus", f"{documents:,}", "documents", f"usual {documents} to {documents} ✓"],
        ["pretrain", "1.234", "bits per byte", "usual 1.3 to 1.5 ✗ unusual"],
        ["dpo", "0.543", "of pairs won", "usual 0.5432 to 1.0 ✓"],
        ["pretrain", "0.51", "", "usual 0.4 to 0.5 ✗ unusual"],
    ]
    missing = [note.split()[7] for note in summary.notes(load(trained, expected=expected)) if "no such number" in note]
    assert missing == ["sft.answers.los,", "pretrain.blimp,"]


def test_the_summary_opens_terminal_and_page(trained: Place):
    evaluated(trained)
    out = trained.run("pipeline.py", trained.config, "report").stdout
    assert re.search(r"(?m)^pretrain       1\.234 bits per byte\n {21}of held-out text; xz -9 needs 2\.469$", out)
    assert re.search(r"(?m)^prompt    an answer\ntruth     an answer\npretrain  an answer$", out)
    assert out.count("Skipped: winogrande (get their data with: python -m eval.download)") == 1
    assert re.search(rf"(?m)^Next: \S*python\S* serve.py {trained.config} generate ", out)
    page = (trained.runs / "mini/REPORT.md").read_text()
    assert page.startswith("# mini\n\n| stage ")


def test_a_run_that_was_never_evaluated_has_a_report(trained: Place):
    row = {name: rest for name, *rest in load(trained, expected={"pretrain.validation.bits_per_byte": (9, 10)}).rows()}
    logged = trained.metrics()[-1]["val_bits_per_byte"]
    # Its range is about the evaluation.
    assert row["pretrain"] == [f"{round(logged, 3)}", "bits per byte", "", "in training, on part of the held-out data"]
    page = write(trained)
    assert "pretrain is not evaluated; evaluate it with: python pipeline.py" in page
    assert "plots/pretrain.png" in page
    assert "## Evaluation" not in page
    shutil.rmtree(trained.runs)
    with pytest.raises(UserError, match="has no finished stage"):
        write(trained)


def test_notes_say_what_is_unfinished_or_of_another_checkpoint(trained: Place):
    assert not [note for note in summary.notes(load(evaluated(trained))) if "Note" in note]
    sft = trained.runs / "mini/sft"
    sft.mkdir()
    (sft / "log.txt").touch()
    evaluated(trained, results("0" * 64))
    notes = " ".join(summary.notes(load(trained)))
    assert "the results of pretrain are of an earlier checkpoint" in notes
    assert "sft is unfinished; continue with: " in notes


def test_an_imported_model_has_a_report(trained: Place, monkeypatch, tmp_path):
    imported = tmp_path / "imported"
    shutil.copytree(trained.runs / "mini/pretrain/final", imported)
    shutil.copytree(trained.runs / "mini/tokenizer", imported / "tokenizer")
    evaluated(trained)
    monkeypatch.setenv("RUNS", str(tmp_path / "others"))
    shutil.copytree(trained.runs / "mini/eval", tmp_path / "others/mini/eval")
    run = load(trained, imported=imported)
    assert "1.2345 ± 0.013" in report.page(run, [])
    assert not [note for note in summary.notes(run) if "Note" in note]


def test_numbers_are_those_of_the_files(trained: Place):
    page = write(evaluated(trained))
    manifest = stage.read_manifest(trained.runs / "mini/pretrain")
    table = cells(page)
    for row in (
        ["validation", "bits per byte", "1.2345 ± 0.013", "", "", "2.4690", "100"],
        ["blimp", "accuracy", "0.5678 ± 0.011 ↑", "0.4321 ± 0.011 ↓", "", "0.5000", "1,838"],
        ["piqa", "accuracy", "0.5101 ± 0.011 =", "", "", "0.5000", "1,838"],
        ["preference", "win rate", "", "0.5000", "0.5432 ± 0.02", "0.5000", "300"],
        ["blimp", "accuracy norm", "0.5801 ± 0.022", "0.4444 ± 0.022", ""],
        ["blimp", "by field syntax accuracy", "0.6321 ± 0.0031", "", ""],
        ["smoke", "by category facts", "0.2500", "", ""],
        ["validation", "perplexity", "not finite", "", ""],
    ):
        assert row in table, row
    for text in (manifest["counts"]["machine"], manifest["sha256"][:16], manifest["counts"]["command"], "python 3.99"):
        assert text in page, text
    assert page.count("seed 77") == 5
    assert page.count("pretrain (fails: content):") == 24


def test_plots_are_pictures_and_come_out_the_same(trained: Place, monkeypatch):
    evaluated(trained)
    path = trained.runs / "mini/pretrain/metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 30, "loss": null, "val_loss": null, "grad_norm": null}\n{"step": 31, "lo')
    drawn = []
    for _ in range(2):
        page = write(trained)
        drawn.append({path.name: path.read_bytes() for path in (trained.runs / "mini/plots").iterdir()})
    assert drawn[0] == drawn[1]
    assert drawn[0].keys() == {"pretrain.png", "evaluation.png"}
    for name, png in drawn[0].items():
        assert f"](plots/{name})" in page
        width, height = struct.unpack(">II", png[16:24])
        assert 800 <= width <= 1600 >= height >= 400
        assert b"tEXt" not in png
    path.write_text("")  # nothing is logged
    assert "plots/pretrain.png" not in write(trained)
    monkeypatch.setitem(sys.modules, "eval.plots", None)
    monkeypatch.delattr("eval.plots", raising=False)
    assert "`pip install matplotlib`" in write(trained)


HOSTILE = [
    "| a | b |\n|---|---|\n# no heading\n```\nnever closed",
    "<script>alert(1)</script> <!-- &amp; [x](y) ![z](plots/none.png) **bold** \\",
    "\x1b[2J\x1b]0;title\x07 bell\r\noverwritten\rover \x00\x7f\x9b\u202e\u2028\u200b\ud800\ufeff",
    "字" * 300 + " " + "é" * 200,
    "\n\n\n",
    "    \n\tindented\n- list\n1. one\n> quote\n---",
]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_no_text_of_a_model_can_break_the_page(trained: Place, hostile):
    """All of it stands indented; everything else is what it is with harmless text."""
    pages = [report.page(load(evaluated(trained, said=generations(text))), []) for text in ("an answer", hostile)]
    pages[1].encode()
    frames = [[line for line in page.splitlines() if line and not line.startswith("    ")] for page in pages]
    assert frames[0] == frames[1]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202e\u200b\ufeff]", pages[1])
    kept = "".join(pages[1].split())
    for word in ("neverclosed", "**bold**", "overwritten", ">quote"):
        assert (word in hostile.replace(" ", "")) <= (word in kept)


def test_numbers_and_cells_read_well():
    shown = {1234567: "1,234,567", 1.5: "1.5000", 39213.4: "39,213.4", 0.0123: "0.0123", 1e30: "1e+30"}
    shown |= {float("inf"): "inf", None: "not finite", -0.004: "-0.0040"}
    assert {value: summary.show(value) for value in shown} == shown
    made = report.table(["task|s", "n"], [["a|b\nc\x1b", "1.0 ± 0.5"], ["x", ""]], [1]).splitlines()
    assert made == [
        "| task\\|s    |         n |",
        "| ---        |       --: |",
        "| a\\|b c\\x1b | 1.0 ± 0.5 |",
        "| x          |           |",
    ]
