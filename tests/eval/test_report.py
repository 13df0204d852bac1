"""The page tells what the files say, whatever they say: tasks that nobody knows, text that would break Markdown."""

import dataclasses
import hashlib
import json
import re
import shutil
import struct

import pytest

import checkpoint
import configs
import stage
from cli import UserError
from eval import markdown, report, tables
from eval.run import read
from tests.conftest import Place

IDS = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("tokenizer", "data")}


def choice(accuracy: float, p: float, **more) -> dict:
    numbers = {"accuracy": accuracy, "accuracy_norm": accuracy + 0.0123, "stderr": 0.0111, "stderr_norm": 0.0222}
    return (
        numbers | {"baseline": 0.5, "chance": 0.5, "majority": 0.4875, "p_value": p, "truncated": 7, "n": 1838} | more
    )


def results(sha256: str) -> dict:
    """Of three stages, as `pipeline.py CONFIG eval` leaves them."""
    fields = {"syntax": {"accuracy": 0.6321, "stderr": 0.0031, "n": 26_000}}
    measured = {
        "validation": {"loss": 3.1, "perplexity": 22.2, "bits_per_byte": 1.2345, "stderr": 0.0135, "baseline": 2.4690},
        "blimp": choice(0.5678, 0.001, by_field=fields),
        "piqa": choice(0.5101, 0.4),
        "winogrande": {"skipped": "no file at data/raw/winogrande/dev.jsonl; get it from <somewhere>"},
        "smoke": {"passed": 2 / 24, "content": 0.125, "by_category": {"facts": 0.25}, "stderr": 0.06, "n": 24},
        "unheard_of": {"cleverness": 12.345, "stderr": 0.5, "n": 3, "remark": "a word"},
    }
    for entry in measured.values():
        if "skipped" not in entry:
            entry.update(IDS, checkpoint=sha256)
    dpo = {"preference": {"win_rate": 0.5432, "margin": 0.1, "stderr": 0.02, "baseline": 0.5, "n": 300}}
    return {"pretrain": measured, "sft": {"blimp": choice(0.4321, 0.002)}, "dpo": dpo}


def generations(text: str = "an answer") -> dict:
    """Of one stage, every text of the model's and of the user's the same."""
    rules = {"content": {"rule": "names a number", "passed": False, "found": text}}
    rules |= {"length": {"rule": "at most 50 words", "passed": True, "found": "9"}}
    smoke = {"category": "facts", "prompt": text, "seed": 5, "answer": text, "passed": False, "rules": rules}
    longer = {"prompt": text, "seed": 77, "answer": text, "distinct_1": 0.8765, "repetition": 0.25, "ended": False}
    beginnings = {"prompt": text, "continuation": text, "truth": text}
    return {"pretrain": {"continuations": [beginnings], "smoke": [smoke] * 24, "prompts": [longer] * 5}}


def evaluated(place: Place, found: dict | None = None, said: dict | None = None) -> Place:
    """The run with the results of an evaluation."""
    directory = place.runs / "mini/eval"
    directory.mkdir(exist_ok=True)
    weights = stage.sha256(place.runs / "mini/pretrain/final/weights.pt")
    stage.write_json(directory / "results.json", results(weights) if found is None else found)
    (directory / "generations.json").write_text(json.dumps(generations() if said is None else said))
    wrote = stage.digests(directory, directory.glob("*s.json"))
    config = {"eval": {"type": "EvalConfig", "temperature": 0.75, "seed": 0}}
    manifest = {"config": config, "read": {}, "wrote": wrote, "counts": {}, "versions": {"python": "3.99"}}
    stage.write_manifest(directory, manifest)
    return place


def write(place: Place, monkeypatch) -> str:
    """The page that the command writes."""
    monkeypatch.setenv("RUNS", str(place.runs))
    report.write(configs.load(place.config))
    return (place.runs / "mini/REPORT.md").read_text(encoding="utf-8")


def rows(page: str) -> list[list[str]]:
    """The cells of all tables."""
    return [[c.strip() for c in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]


def test_numbers_are_those_of_the_files(trained: Place, monkeypatch):
    page = write(evaluated(trained), monkeypatch)
    manifest = stage.read_manifest(trained.runs / "mini/pretrain")
    model = checkpoint.load_model(trained.runs / "mini/pretrain/final")
    assert f"mini has {model.num_parameters():,} parameters" in page
    assert "it takes 1.2345 ± 0.0135 bits for a byte of held-out text, 0.500 of what" in " ".join(page.split())
    table = rows(page)
    for row in (
        ["validation", "bits per byte", "1.2345 ± 0.0135", "–", "–", "2.4690", "–"],
        ["blimp", "accuracy", "0.5678 ± 0.0111 ↑", "0.4321 ± 0.0111 ↓", "–", "0.5000", "1,838"],
        ["preference", "win rate", "–", "–", "0.5432 ± 0.0200", "0.5000", "300"],
        ["unheard_of", "cleverness", "12.35 ± 0.5000", "–", "–", "–", "3"],
        ["accuracy norm", "0.5801 ± 0.0222", "0.5224 ± 0.0222"],
        ["p value", "0.001", "0.4000"],
        ["syntax", "0.6321 ± 0.0031", "–", "–"],
        ["facts", "0.2500", "–", "–"],
        ["data of piqa", IDS["data"]],
        ["pretrain/final/weights.pt", stage.sha256(trained.runs / "mini/pretrain/final/weights.pt")],
        ["packed/val.bin", stage.sha256(trained.runs / "mini/packed/val.bin")],
        ["ran on", manifest["counts"]["machine"]],
    ):
        assert row in table, row
    logged = trained.metrics()
    best = min((m["val_loss"], m["step"]) for m in logged if "val_loss" in m)
    assert ["best validation loss", f"{best[0]:.4f} at step {best[1]}"] in table
    for m in logged:
        assert ("val_loss" in m) == any(row[0] == str(m["step"]) and f"{m['loss']:.4f}" in row for row in table)
    for text in ("winogrande (pretrain): no file at data/raw", "<somewhere>", manifest["counts"]["machine"], "3.99"):
        assert text in page
    for name in ("corpus", "tokenizer", "pack", "eval"):
        assert f"    python pipeline.py {trained.config} {name}\n" in page
    assert f"    {manifest['counts']['command']}\n" in page
    assert "temperature 0.75, seed 0" in page
    assert page.count("seed 77") == 5
    assert len(re.findall(r"(?m)^    \d+\. facts, seed 5$", page)) == page.count("    pretrain: FAIL\n") == 24


def test_the_summary_tells_what_is_better_than_its_baseline_from_what_is_not(trained: Place, monkeypatch):
    sha256, told = "0" * 64, {}
    for side, accuracy, p in (("above the", 0.6, 0.01), ("below the", 0.4, 0.01), ("not to be told", 0.6, 0.1)):
        evaluated(trained, {"pretrain": {"piqa": choice(accuracy, p, checkpoint=sha256)}})
        told[side] = write(trained, monkeypatch)
    for side, page in told.items():
        assert [other for other in told if f"accuracy is {other}" in " ".join(page.split())] == [side]


def test_tables_are_aligned_and_lines_fit(trained: Place, monkeypatch):
    page = write(evaluated(trained), monkeypatch)
    assert max(map(len, page.replace(str(trained.path), "").splitlines())) <= 120
    for part in page.split("\n\n"):
        if part.startswith("|"):
            assert len({tuple(m.start() for m in re.finditer(r"\|", line)) for line in part.splitlines()}) == 1, part


def test_plots_are_pictures_and_come_out_the_same(trained: Place, monkeypatch):
    evaluated(trained)
    drawn = []
    for _ in range(2):
        page = write(trained, monkeypatch)
        drawn.append({path.name: path.read_bytes() for path in (trained.runs / "mini/plots").iterdir()})
    assert drawn[0] == drawn[1]
    assert drawn[0].keys() == {"pretrain.png", "evaluation.png"}
    for name, png in drawn[0].items():
        assert f"](plots/{name})" in page
        assert png.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", png[16:24])
        assert 1200 <= width <= 1400
        assert 400 <= height <= 900
        assert 5_000 < len(png) < 500_000
        assert b"tEXt" not in png


def test_without_matplotlib_the_page_says_how_to_get_it(trained: Place, tmp_path):
    (tmp_path / "without").mkdir()
    (tmp_path / "without/matplotlib.py").write_text("raise ModuleNotFoundError('No module named matplotlib')")
    evaluated(trained).env["PYTHONPATH"] += f":{tmp_path / 'without'}"
    printed = trained.run("pipeline.py", trained.config, "report").stdout
    page = (trained.runs / "mini/REPORT.md").read_text()
    assert page.startswith(printed[: printed.index("\nNext:")].rstrip())
    assert "`pip install matplotlib`" in page
    assert "1.2345 ± 0.0135" in page
    assert "](plots/" not in page
    assert not (trained.runs / "mini/plots").exists()


@pytest.mark.parametrize(
    ("lines", "said", "curves"),
    [
        (['{"step": 30, "loss": 1.5, "grad_norm": null, "val_loss": null}', '{"step": 31, "lo'], "1 line of", True),
        (["[]", "7", '{"step": "x"}', '{"step": 1, "loss": "low"}', "\x00\xff"], "5 lines of", True),
        (None, "metrics.jsonl holds no line", False),
    ],
)
def test_a_damaged_log_is_told_of(trained: Place, monkeypatch, lines, said, curves):
    path = trained.runs / "mini/pretrain/metrics.jsonl"
    path.write_text(path.read_text() + "\n".join(lines) if lines else "", encoding="latin-1")
    page = write(evaluated(trained), monkeypatch)
    assert said in page
    assert ("plots/pretrain.png" in page) == curves
    assert "# mini" in page


def test_a_log_without_an_evaluation_or_with_nothing_finite(trained: Place, monkeypatch):
    path = trained.runs / "mini/pretrain/metrics.jsonl"
    for lines in (
        [{"step": 1, "loss": None, "lr": 0.1, "grad_norm": None}],
        [{"step": s, "loss": 2.5} for s in (1, 2)],
    ):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        page = write(evaluated(trained), monkeypatch)
        assert "never evaluated" in page
        assert "plots/pretrain.png" in page
        assert ["1", "not finite" if lines[0]["loss"] is None else "2.5000"] in [row[:2] for row in rows(page)]


@pytest.mark.parametrize(
    ("gone", "command"),
    [
        ("corpus", "pipeline.py CONFIG corpus"),
        ("tokenizer", "pipeline.py CONFIG tokenizer"),
        ("packed", "pipeline.py CONFIG pack"),
        ("pretrain", "train.py CONFIG"),
        ("eval", "pipeline.py CONFIG eval"),
    ],
)
def test_a_missing_stage_is_named_with_its_command_and_the_old_page_stays(trained: Place, monkeypatch, gone, command):
    before = write(evaluated(trained), monkeypatch)
    shutil.rmtree(trained.runs / "mini" / gone)
    with pytest.raises(
        UserError, match=f"missing or unfinished; make it with: python {command.replace('CONFIG', str(trained.config))}"
    ):
        write(trained, monkeypatch)
    assert (trained.runs / "mini/REPORT.md").read_text() == before


def test_a_failing_disk_leaves_the_old_page(trained: Place, monkeypatch):
    before, whole = write(evaluated(trained), monkeypatch), stage.sync
    evaluated(trained, {"pretrain": {"new": {"metric": 1.0, "n": 1}}})

    def full(path):
        if "REPORT" in path.name:
            raise OSError(28, "No space left on device")
        whole(path)

    monkeypatch.setattr(stage, "sync", full)
    with pytest.raises(OSError, match="No space"):
        write(trained, monkeypatch)
    assert (trained.runs / "mini/REPORT.md").read_text() == before


def test_unfinished_training_is_told_from_the_model_that_is_there(trained: Place, monkeypatch):
    (evaluated(trained).runs / "mini/pretrain/manifest.json").unlink()
    page = " ".join(write(trained, monkeypatch).split())
    assert "The training of pretrain is unfinished. This page is about `final/` as it stands, of step 24" in page
    assert f"`python train.py {trained.config}`" in page


def test_results_of_another_checkpoint_are_told_of(trained: Place, monkeypatch):
    assert "another checkpoint" not in write(evaluated(trained), monkeypatch)
    page = write(evaluated(trained, results("0" * 64)), monkeypatch).replace("\n", " ")
    before_the_summary = page.split("mini has")[0]
    assert "The results of pretrain are of another checkpoint" in before_the_summary
    assert f"`python pipeline.py {trained.config} eval --force`" in before_the_summary


def test_later_stages_show_up(trained: Place, monkeypatch):
    shutil.copytree(evaluated(trained).runs / "mini/pretrain", trained.runs / "mini/sft")
    (trained.runs / "mini/dpo").mkdir()
    page = write(trained, monkeypatch)
    assert "## Training: sft" in page
    assert "plots/sft.png" in page
    assert "The results of sft" not in page  # they do not say of which checkpoint they are
    assert "dpo is unfinished" in page


def test_an_imported_model_is_told_as_far_as_it_is_known(trained: Place, monkeypatch, tmp_path):
    imported = tmp_path / "imported"
    shutil.copytree(trained.runs / "mini/pretrain/final", imported)
    shutil.copytree(trained.runs / "mini/tokenizer", imported / "tokenizer")
    stage.write_manifest(imported, stage.read_manifest(imported) | {"counts": {"step": 0}})
    evaluated(trained)
    monkeypatch.setenv("RUNS", str(tmp_path / "others"))
    shutil.copytree(trained.runs / "mini/eval", tmp_path / "others/mini/eval")
    experiment = dataclasses.replace(configs.load(trained.config), imported=imported)
    page = report.page(read(experiment), None)
    assert "converted by `convert.py from-hf`; it has no corpus, pack, pretrain here" in " ".join(page.split())
    assert "| parameters " in page
    assert "1.2345 ± 0.0135" in page
    assert "## Training" not in page
    assert "pretrain took" not in page


HOSTILE = [
    "| a | b |\n|---|---|\n# no heading\n```\nnever closed",
    "<script>alert(1)</script> <!-- &amp; [x](y) ![z](plots/none.png) **bold** \\",
    "\x1b[2J\x1b]0;title\x07 bell\r\noverwritten\rover \x00\x7f\x9b\u202e\u2028\u200b\ud800\ufeff",
    "word" * 400,
    "字" * 300 + " " + "é" * 200,
    "\n\n\n",
    "\n\n  leading  " + "- far " * 50,
    "",
    "    \n\tindented\n- list\n1. one\n> quote\n---",
]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_no_text_of_a_model_can_break_the_page(trained: Place, monkeypatch, hostile):
    """All of it stands indented; everything else is what it is with harmless text."""

    def frame(page: str) -> list[str]:
        return [line for line in page.splitlines() if line and not line.startswith("    ")]

    monkeypatch.setenv("RUNS", str(trained.runs))
    monkeypatch.setattr(report, "provenance", lambda run: [])  # it has the digest of what was said
    harmless, page = (
        report.page(read(configs.load(evaluated(trained, said=generations(each)).config)), {})
        for each in ("an answer", hostile)
    )
    page.encode()
    assert frame(page) == frame(harmless)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202e\u200b\ufeff]", page)
    for line in page.replace(str(trained.path), "").splitlines():
        assert sum(2 if "\u2e80" < c < "\uffef" else 1 for c in line) <= 120
    kept = "".join(page.split())
    for word in ("never closed", "**bold**", "overwritten", "> quote"):
        assert (word in hostile) <= ("".join(word.split()) in kept)


def test_text_is_cut_and_not_changed():
    for text in ("a  b   c\n  d", "x" * 500, "one two " * 60, "字" * 120):
        lines = [line[4:] for line in markdown.block(text).split("\n")]
        assert "".join("".join(lines).split()) == "".join(text.split())
    assert markdown.block("") == "    (nothing: for the model the text ends here)"
    assert markdown.visible("\x1b[0m\t\u202e") == "\\x1b[0m    \\u202e"


def test_numbers_read_well():
    shown = {1234567: "1,234,567", 1.5: "1.5000", 39213.4: "39,213", 22.2: "22.20", 0.0123: "0.0123", 1e-12: "1e-12"}
    shown |= {0.0: "0.0000", float("inf"): "inf", None: "not finite", "word": "word", -0.004: "-0.004"}
    assert {given: markdown.show(given) for given in shown} == shown
    clocks = {None: "not noted", 3.04: "3.0 s", 59.7: "1 min 0 s", 151: "2 min 31 s", 7322: "2 h 2 min"}
    assert {seconds: markdown.clock(seconds) for seconds in clocks} == clocks
    assert tables.value({"a": 0.5, "stderr": 0.00001}, "a", "a") == "0.5000 ± 1e-05"


def test_a_cell_holds_what_it_is_given_in_one_line():
    made = markdown.table(["task|s", "n"], [["a|b\nc\x1b", "1.0 ± 0.5"], ["x" * 200, "–"]]).splitlines()
    assert [re.split(r" (?<!\\)\| ", line.strip("|")) for line in made[2:]] == [
        [" a\\|b c\\x1b" + " " * 86, "1.0 ± 0.5 "],
        [" " + "x" * 95 + "…", "        – "],
    ]
    assert made[1] == "|" + "-" * 98 + "|" + "-" * 10 + ":|"
