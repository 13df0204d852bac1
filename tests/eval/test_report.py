"""The summary and the page say what the files say, whatever the files say."""

import dataclasses
import hashlib
import json
import re
import shutil
import struct

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
    return {"pretrain": measured, "sft": {"blimp": choice(0.4321, 0.002)}, "dpo": dpo}


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


# ------------------------------------------------------------------------------------------------------------- summary


def test_one_row_a_stage_says_whether_its_number_is_usual(trained: Place):
    documents = stage.read_manifest(trained.runs / "mini/corpus")["counts"]["documents"]
    assert [load(evaluated(trained)).result(name) for name in ("sft", "eval")] == ["", "6 results"]
    expected = {
        "corpus.documents": (documents, documents),
        "pretrain.validation.bits_per_byte": (1.3, 1.5),
        "pretrain.piqa.accuracy": (0.4, 0.5),
        "dpo.preference.win_rate": (0.5432, 1.0),
    }
    assert [row[:3] for row in load(evaluated(trained), expected=expected).rows() if row[2]] == [
        ["corpus", f"{documents:,} documents", f"{documents} to {documents} ✓"],
        ["pretrain", "1.234 bits per byte", "1.3 to 1.5 ✗ unusual"],
        ["pretrain", "0.510", "0.4 to 0.5 ✗ unusual"],
        ["dpo", "0.543 of pairs won", "0.5432 to 1.0 ✓"],
    ]


def test_the_summary_fits_80_columns_and_opens_terminal_and_page(trained: Place):
    evaluated(trained)
    out = trained.run("pipeline.py", trained.config, "report").stdout
    top = out[: out.index("\nNext:")]
    assert max(map(len, top.splitlines())) <= 80 + len(str(trained.config))  # a path is not cut
    assert re.search(r"(?m)^pretrain       1\.234 bits per byte$", top)
    assert re.search(r"(?m)^prompt    an answer\npretrain  an answer\ntruth     an answer$", top)
    assert top.count("Skipped: winogrande (get their data with: python -m eval.download)") == 1
    page = (trained.runs / "mini/REPORT.md").read_text()
    assert page.startswith("# mini\n\n| stage ")
    assert f"python serve.py {trained.config} generate" in out


def test_a_run_that_was_never_evaluated_has_a_report(trained: Place):
    row = {name: rest for name, *rest in load(trained, expected={"pretrain.validation.bits_per_byte": (9, 10)}).rows()}
    logged = trained.metrics()[-1]["val_bits_per_byte"]
    assert row["pretrain"][:2] == [f"{logged:.3f} bits per byte", ""]  # its range is about the evaluation
    assert row["pretrain"][2] == "in training, on part of the held-out data"
    page = write(trained)
    assert "pretrain is not evaluated; evaluate it with: python pipeline.py" in " ".join(page.split())
    assert "## Training: pretrain" in page
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
    notes = " ".join(" ".join(summary.notes(load(trained))).split())
    assert "the results of pretrain are of an earlier checkpoint" in notes
    assert "sft is unfinished; continue with: " in notes


def test_an_imported_model_has_a_report(trained: Place, monkeypatch, tmp_path):
    imported = tmp_path / "imported"
    shutil.copytree(trained.runs / "mini/pretrain/final", imported)
    shutil.copytree(trained.runs / "mini/tokenizer", imported / "tokenizer")
    evaluated(trained)
    monkeypatch.setenv("RUNS", str(tmp_path / "others"))
    shutil.copytree(trained.runs / "mini/eval", tmp_path / "others/mini/eval")
    page = report.page(load(trained, imported=imported), {})
    assert "1.2345 ± 0.013" in page
    assert "## Training" not in page


# ---------------------------------------------------------------------------------------------------------------- page


def test_numbers_are_those_of_the_files(trained: Place):
    page = write(evaluated(trained))
    manifest = stage.read_manifest(trained.runs / "mini/pretrain")
    table = cells(page)
    for row in (
        ["validation", "bits per byte", "1.2345 ± 0.013", "", "", "2.4690", "100"],
        ["blimp", "accuracy", "0.5678 ± 0.011 ↑", "0.4321 ± 0.011 ↓", "", "0.5000", "1,838"],
        ["piqa", "accuracy", "0.5101 ± 0.011 =", "", "", "0.5000", "1,838"],
        ["preference", "win rate", "", "", "0.5432 ± 0.02", "0.5000", "300"],
        ["blimp", "accuracy norm", "0.5801 ± 0.022", "0.4444 ± 0.022", ""],
        ["blimp", "by field syntax", "0.6321 ± 0.0031", "", ""],
        ["smoke", "by category facts", "0.2500", "", ""],
        ["validation", "perplexity", "not finite", "", ""],
    ):
        assert row in table, row
    logged = [m for m in trained.metrics() if "val_loss" in m]
    for m in logged:
        assert any(row[0] == str(m["step"]) and f"{m['val_loss']:.4f}" in row for row in table)
    for text in (manifest["counts"]["machine"], manifest["sha256"][:16], manifest["counts"]["command"], "python 3.99"):
        assert text in page, text
    assert page.count("seed 77") == 5
    assert page.count("FAIL: names a number; found none") == 24


def test_plots_are_pictures_and_come_out_the_same(trained: Place):
    evaluated(trained)
    drawn = []
    for _ in range(2):
        page = write(trained)
        drawn.append({path.name: path.read_bytes() for path in (trained.runs / "mini/plots").iterdir()})
    assert drawn[0] == drawn[1]
    assert "`pip install matplotlib`" in report.page(load(trained), {})
    assert drawn[0].keys() == {"pretrain.png", "evaluation.png"}
    for name, png in drawn[0].items():
        assert f"](plots/{name})" in page
        width, height = struct.unpack(">II", png[16:24])
        assert 800 <= width <= 1600 >= height >= 400
        assert b"tEXt" not in png


@pytest.mark.parametrize(
    "last", ['{"step": 30, "loss": null, "val_loss": null, "grad_norm": null}', '{"step": 31, "lo', ""]
)
def test_a_log_with_nulls_a_cut_line_or_nothing(trained: Place, last):
    path = trained.runs / "mini/pretrain/metrics.jsonl"
    path.write_text(path.read_text() + last if last else "")
    page = write(evaluated(trained))
    assert ("plots/pretrain.png" in page) == bool(last)


HOSTILE = [
    "| a | b |\n|---|---|\n# no heading\n```\nnever closed",
    "<script>alert(1)</script> <!-- &amp; [x](y) ![z](plots/none.png) **bold** \\",
    "\x1b[2J\x1b]0;title\x07 bell\r\noverwritten\rover \x00\x7f\x9b\u202e\u2028\u200b\ud800\ufeff",
    "字" * 300 + " " + "é" * 200,
    "\n\n\n",
    "    \n\tindented\n- list\n1. one\n> quote\n---",
]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_no_text_of_a_model_can_break_the_page(trained: Place, monkeypatch, hostile):
    """All of it stands indented; everything else is what it is with harmless text."""

    def frame(page: str) -> list[str]:
        return [line for line in page.splitlines() if line and not line.startswith("    ")]

    harmless, page = (
        report.page(load(evaluated(trained, said=generations(text))), {}) for text in ("an answer", hostile)
    )
    page.encode()
    assert frame(page) == frame(harmless)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202e\u200b\ufeff]", page)
    kept = "".join(page.split())
    for word in ("never closed", "**bold**", "overwritten", "> quote"):
        assert (word in hostile) <= ("".join(word.split()) in kept)


def test_numbers_and_cells_read_well():
    shown = {1234567: "1,234,567", 1.5: "1.5000", 39213.4: "39,213", 0.0123: "0.0123", 1e-12: "1e-12", 0.0: "0.0000"}
    shown |= {float("inf"): "inf", None: "not finite", "word": "word", -0.004: "-0.004"}
    assert {value: summary.show(value) for value in shown} == shown
    made = report.table(["task|s", "n"], [["a|b\nc\x1b", "1.0 ± 0.5"], ["x", ""]]).splitlines()
    assert made == [
        "| task\\|s    |         n |",
        "| ---        |       --: |",
        "| a\\|b c\\x1b | 1.0 ± 0.5 |",
        "| x          |           |",
    ]
