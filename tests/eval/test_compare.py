"""Runs side by side: the page says what their files say."""

import argparse
import json
import re
import shutil
import struct
from pathlib import Path

import pytest

import checkpoint
import stage
import tokenizer
from cli import UserError, visible
from eval import EvalConfig, compare, generation
from eval.language import Subject
from eval.prompts import SMOKE
from tests.conftest import Place
from tests.eval.test_report import cells

STAGES = ("corpus", "tokenizer", "packed", "pretrain")


@pytest.fixture(scope="session")
def both(measured: Place, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """`mini` with all stages and an evaluation, and `other` with another tokenizer and another pretraining."""
    place = Place(Path(shutil.copytree(measured.path, tmp_path_factory.mktemp("both"), dirs_exist_ok=True)))
    place.edit(('name="mini"', 'name="other"'), ("vocab_size=512", "vocab_size=500"), ("steps=24", "steps=16"))
    place.make("pretrain")
    return place


@pytest.fixture
def runs(both: Place, tmp_path: Path, monkeypatch) -> Path:
    """A copy of the two. The configs are elsewhere."""
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    return Path(shutil.copytree(both.runs, tmp_path / "runs"))


def page(*words: str, out: Path) -> str:
    """What the command writes."""
    compare.main(argparse.Namespace(runs=list(words), out=out))
    (file,) = out.glob("*.md")
    return file.read_text(encoding="utf-8")


def test_the_page_shows_settings_numbers_curves_and_texts(runs: Path, capsys):
    text = page("mini", "other", out=runs / "compare")
    assert text in capsys.readouterr().out
    assert (runs / "compare/mini_other.md").read_text() == text
    rows = {tuple(row[:2]): row[2:] for row in cells(text)}
    # A field that several stages record is shown once, and the rest, which is equal, is not shown.
    settings = [key for key in list(rows)[2 : list(rows).index(("stage", "number"))] if not key[1].startswith("input")]
    assert settings == [
        ("tokenizer", "tokenizer.vocab_size"),
        ("pretrain", "model.vocab_size"),
        ("pretrain", "pretrain.steps"),
    ]
    assert rows["pretrain", "model.vocab_size"] == ["512", "500"]
    assert rows["pack", "input tokenizer"][0].strip('"…') == tokenizer.load(runs / "mini/tokenizer").sha256[:12]
    assert ("tokenizer", "input corpus") not in rows  # the text is the same
    ends = [
        json.loads((runs / name / "pretrain/metrics.jsonl").read_text().splitlines()[-1]) for name in ("mini", "other")
    ]
    for key in ("val_loss", "val_bits_per_byte"):
        assert rows["pretrain", key.replace("_", " ")] == [f"{end[key]:,.4f}" for end in ends]
    assert rows["pretrain", "step"] == rows["pretrain", "of steps"] == ["24", "16"]
    manifests = [stage.read_manifest(runs / name / "pretrain")["counts"] for name in ("mini", "other")]
    assert rows["pretrain", "parameters"] == [f"{counts['parameters']:,}" for counts in manifests]
    assert ("sft", "step") not in rows  # nothing to compare with
    assert "The tokenizers differ: " in text
    width, height = struct.unpack(">II", (runs / "compare/mini_other.png").read_bytes()[16:24])
    assert 800 <= width <= 1600 >= height >= 400
    assert "](mini_other.png)" in text
    for name in ("mini", "other"):
        model, spm = checkpoint.load_model(runs / name / "pretrain/final"), tokenizer.load(runs / name / "tokenizer")
        subject = Subject(model, spm, None, EvalConfig(answer_tokens=60))
        first = generation.answer(subject, list(SMOKE)[:3])[0]["answer"]
        assert visible(first)[:4].strip() in text


def test_evaluations_have_their_errors_and_equal_runs_no_differences(runs: Path):
    shutil.copytree(runs / "mini", runs / "elsewhere/mini")
    text = page("mini", "elsewhere/mini", out=runs / "out")
    results = stage.read_json(runs / "mini/eval/results.json")
    table = cells(text)
    for name in ("pretrain", "sft", "dpo"):
        entry = results[name]["validation"]
        shown = f"{entry['bits_per_byte']:.4f} ± {entry['stderr']:.2g}"
        assert [name, "validation: bits per byte", shown, shown] in table
    assert ["dpo", "val accuracy"] in [row[:2] for row in table]
    assert "## What differs\n\nNothing" in text
    assert "tokenizers differ" not in text
    assert "The models of dpo write" in text
    sides = [part.splitlines() for part in text.split("\n\n") if re.match(" +mini +elsewhere/mini\n", part)]
    assert len(sides) == 3
    for head, *lines in sides:  # the same model writes the same
        second = head.index("elsewhere")
        assert all(line[:second].strip() == line[second:].strip() for line in lines)


def test_runs_may_be_unfinished_and_models_may_be_missing(runs: Path):
    directory = runs / "other/pretrain"
    for name in ("final", "best"):
        shutil.rmtree(directory / name)
    (directory / "manifest.json").unlink()
    lines = (directory / "metrics.jsonl").read_text().splitlines()[:15]
    (directory / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 16, "lo']))
    (runs / "mini/pretrain/final/weights.pt").write_bytes(b"damaged")
    shutil.rmtree(runs / "other/corpus")
    text = page("other", "mini", out=runs / "out")
    rows = {tuple(row[:2]): row[2:] for row in cells(text)}
    assert rows["pretrain", "validation: bits per byte"][0] == ""
    assert rows["pretrain", "step"] == ["15", "24"]
    assert rows["pretrain", "evaluated at step"] == ["8", ""]
    assert rows["pretrain", "of steps"] == ["16", "24"]
    assert re.search("(?m)^No texts of mini: .*weights.pt has ", text)
    assert "No texts of other" not in text


def rewrite(path: Path, change) -> None:
    """Changes a manifest as if it had been written so."""
    manifest = stage.read_manifest(path)
    change(manifest)
    del manifest["sha256"]
    stage.write_manifest(path, manifest)


def test_numbers_of_another_moment_are_named(runs: Path):
    """The newest checkpoint is older than the last evaluation, and newer than the one before."""
    shutil.copytree(runs / "mini", runs / "a$b_$c")
    for name in ("final", "best"):
        shutil.rmtree(runs / "a$b_$c/pretrain" / name)
    (runs / "a$b_$c/pretrain/manifest.json").unlink()
    lines = [json.loads(line) for line in (runs / "mini/pretrain/metrics.jsonl").read_text().splitlines()]
    text = page("mini", "a$b_$c", out=runs / "out")
    rows = {tuple(row[:2]): row[2:] for row in cells(text)}
    assert rows["pretrain", "step"] == ["24", "20"]
    assert rows["pretrain", "evaluated at step"] == ["", "16"]
    held_out = {line["step"]: f"{line['val_loss']:,.4f}" for line in lines if "val_loss" in line}
    assert rows["pretrain", "val loss"] == [held_out[24], held_out[16]]
    assert rows["pretrain", "validation: bits per byte"][1] == "of an old checkpoint"
    assert rows["pretrain", "tokens"][1] == f"{lines[19]['tokens']:,}"


def test_equal_changes_in_two_stages_are_both_shown(runs: Path):
    shutil.copytree(runs / "mini", runs / "twin")
    for name in ("sft", "dpo"):
        rewrite(runs / "twin" / name, lambda manifest: manifest["config"]["lora"].update(rank=64))
    text = page("mini", "twin", out=runs / "out")
    settings = [row[:2] for row in cells(text) if row[1] == "lora.rank"]
    assert settings == [["sft", "lora.rank"], ["dpo", "lora.rank"]]
    assert "held-out sets may differ" not in text
    rewrite(runs / "twin/pretrain", lambda manifest: manifest["config"]["pretrain"].update(eval_rows=3))
    assert "held-out sets may differ" in page("mini", "twin", out=runs / "again")


def test_runs_of_one_name_stay_apart(runs: Path):
    longer = runs / ("a" * 50) / "mini"
    shutil.copytree(runs / "mini", longer)
    shutil.copytree(runs / "mini", runs / ("b" * 50) / "mini")
    found = compare.load([str(longer), f"{runs}/{'b' * 50}/mini"])
    assert len({run.name for run in found}) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mini", "othr"], "no run othr in .*; did you mean other?"),
        (["mini", "configs/other.py"], "did you mean other?"),
        (["mini"], "name two or more runs"),
        (["mini", "other", "{}/mini/"], "names the run .*mini again"),
        (["other", "{}/tuned"], "no two of these runs have trained the same stage: found pretrain, sft"),
        (["other", "{}/none"], "nothing is trained in .*none: no checkpoint in pretrain/, sft/, dpo/"),
    ],
)
def test_mistakes_are_told_in_a_line(runs: Path, words, message):
    (runs / "none").mkdir()
    shutil.copytree(runs / "mini/sft", runs / "tuned/sft")
    with pytest.raises(UserError, match=message) as mistake:
        compare.load([word.format(runs) for word in words])
    assert "\n" not in str(mistake.value)


def test_the_command_ends_with_status_2_after_a_mistake(both: Place):
    assert "no run nowhere" in both.run("-m", "eval.compare", "mini", "nowhere", status=2).stderr
