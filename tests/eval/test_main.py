"""The stage `eval` as a user runs it: what is there is measured, nothing is measured twice, nothing is lost."""

import json
import logging
import lzma
import os
import shutil
import signal

import pytest

import cli
import pipeline
from cli import UserError
from tests.conftest import ROOT, Place
from tests.eval.test_language import RAW
from tests.eval.test_tasks import RECORDS

TASKS = ["validation", "wikitext2", *RECORDS, "answers", "preference", "smoke", "prompts", "everyday", "continuations"]


def results(place: Place) -> dict:
    return json.loads((place.runs / "mini/eval/results.json").read_text())["pretrain"]


def put(place: Place, *names: str) -> None:
    """Data for tasks: a record twice."""
    for name in names:
        end = "" if name == "blimp" else "_val"
        (place.raw / f"{name}{end}.jsonl").write_text(2 * (json.dumps(RECORDS[name]) + "\n"))


def evaluate(place: Place, *options, status: int = 0) -> str:
    """The command in this process, which has imported everything: what it logs, or for status 2 the user's mistake."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DATA", "RUNS"):
            patch.setenv(name, place.env[name])
        patch.setattr(cli.log, "_cache", {})  # of what is logged at the level so far
        patch.setattr(cli.log, "level", logging.INFO)
        patch.setattr(cli.log, "handlers", [handler])
        patch.setattr(cli.log, "propagate", False)
        patch.setattr(cli, "apart", lambda function: function())
        arguments = pipeline.parser().parse_args(list(map(str, [place.config, "eval", *options])))
        if status == 2:
            with pytest.raises(UserError) as mistake:
                pipeline.main(arguments)
            return str(mistake.value)
        pipeline.main(arguments)
    return "\n".join(["", *lines, ""])


def test_all_tasks(trained: Place):
    put(trained, *RECORDS)
    (trained.raw / "wikitext-2").mkdir()
    (trained.raw / "wikitext-2/wiki.test.raw.xz").write_bytes(lzma.compress(RAW.encode()))
    trained.run("pipeline.py", trained.config, "sft_data")
    out = trained.run("pipeline.py", trained.config, "eval").stdout
    found = results(trained)
    assert list(found) == TASKS
    assert found.pop("preference").keys() == {"skipped"}
    assert out.count("skipped") == 1
    manifest = json.loads((trained.runs / "mini/pretrain/final/manifest.json").read_text())
    spm = json.loads((trained.runs / "mini/tokenizer/manifest.json").read_text())["wrote"]["spm.model"]["sha256"]
    for name, entry in found.items():
        assert {"stderr", "n", "data"} <= entry.keys(), name
        assert "baseline" in entry or name in ("prompts", "everyday")
        assert entry["checkpoint"] == manifest["wrote"]["weights.pt"]["sha256"]
        assert entry["tokenizer"] == spm
    last = trained.metrics()[-1]
    assert found["validation"]["loss"] == pytest.approx(last["val_loss"], rel=0.1)  # there: 8 windows, and no overlap
    assert found["validation"]["bits_per_byte"] == pytest.approx(last["val_bits_per_byte"], rel=0.1)
    again = trained.run("pipeline.py", trained.config, "eval").stdout
    assert "is up to date" in again
    assert f"{found['boolq']['accuracy']:.4f} ± {found['boolq']['stderr']:.4f}" in again
    seconds = json.loads((trained.runs / "mini/eval/seconds.json").read_text())
    assert seconds.keys() == {f"pretrain-{name}" for name in found}
    said = json.loads((trained.runs / "mini/eval/generations.json").read_text())["pretrain"]
    expected = {"answers": 8, "smoke": 24, "prompts": 5, "everyday": 15, "continuations": 2}
    assert {name: len(texts) for name, texts in said.items()} == expected


def test_what_is_missing_is_listed_and_added_when_it_comes(trained: Place):
    out = evaluate(trained)
    for name in [*RECORDS, "wikitext2"]:
        assert f"pretrain {name} skipped: no {trained.raw}" in out
        assert f"get it with: python -m eval.download {name}" in out
        assert results(trained)[name].keys() == {"skipped"}
    assert "boolq skipped" in evaluate(trained)  # of a finished evaluation too
    before = results(trained)
    elsewhere = trained.path / "elsewhere"
    elsewhere.mkdir()
    put(trained, "piqa")
    shutil.move(trained.raw / "piqa_val.jsonl", elsewhere)
    out = evaluate(trained, "--data", elsewhere)
    assert "piqa: " in out
    assert "validation: " not in out  # it is not measured again
    now = results(trained)
    assert now["piqa"]["n"] == 2
    assert [now[name] for name in ("validation", "smoke", "prompts")] == [
        before[name] for name in ("validation", "smoke", "prompts")
    ]
    shutil.rmtree(elsewhere)
    assert "is up to date" in evaluate(trained)  # what was measured stands
    assert results(trained)["piqa"]["n"] == 2
    assert "no directory 'nowhere'" in evaluate(trained, "--data", "nowhere", status=2)


def test_other_data_and_other_weights_are_noticed(trained: Place):
    put(trained, "piqa")
    evaluate(trained)
    (trained.raw / "piqa_val.jsonl").write_text(json.dumps(RECORDS["piqa"] | {"goal": "cut cake"}) + "\n")
    error = evaluate(trained, status=2)
    assert "piqa_val was" in error
    assert f"python pipeline.py {trained.config} eval --force" in error
    assert results(trained)["piqa"]["n"] == 2
    evaluate(trained, "--force")
    assert results(trained)["piqa"]["n"] == 1
    trained.edit(("steps=24", "steps=26"))
    trained.run("train.py", trained.config)
    assert "pretrain/final/weights.pt was" in evaluate(trained, status=2)
    assert "of another checkpoint" in trained.run("pipeline.py", trained.config, "report").stdout


@pytest.mark.parametrize(("content", "message"), [("", "is empty"), ("{}\n", "line 1: not a record"), ("[", "line 1")])
def test_damaged_data_is_said_before_anything_is_measured(trained: Place, content, message):
    (trained.raw / "boolq_val.jsonl").write_text(content)
    error = evaluate(trained, status=2)
    assert message in error
    assert "boolq_val.jsonl" in error
    assert not (trained.runs / "mini/eval/results.json").exists()
    (trained.raw / "boolq_val.jsonl").unlink()
    evaluate(trained)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_goes_on_with_the_next_task(trained: Place, signum):
    put(trained, *RECORDS)
    trained.edit(("new_tokens=8)", "new_tokens=8, answer_tokens=400)"))  # there is much to do after the signal
    whole = trained.path / "whole"
    shutil.copytree(trained.runs, whole)
    with trained.start("pipeline.py", trained.config, "eval") as run:
        run.wait_for("validation: ")
        run.send_signal(signum)
        run.wait(60)
    assert not (trained.runs / "mini/eval/manifest.json").exists()
    assert "validation" in results(trained)
    assert "is missing or unfinished" in trained.run("pipeline.py", trained.config, "report", status=2).stderr
    out = trained.run("pipeline.py", trained.config, "eval").stdout
    assert "validation: " not in out
    assert "prompts: " in out
    trained.env["RUNS"] = str(whole)
    trained.run("pipeline.py", trained.config, "eval")
    for name in ("results.json", "generations.json"):
        undisturbed = (whole / "mini/eval" / name).read_bytes()
        assert (trained.runs / "mini/eval" / name).read_bytes() == undisturbed


@pytest.mark.parametrize(
    ("file", "content", "again"),
    [
        ("generations.json", "", {"smoke", "prompts", "continuations"}),
        ("generations.json", '{"pretrain": {"smoke": null}}', {"smoke", "prompts", "continuations"}),
        ("generations.json", "[]", {"smoke", "prompts", "continuations"}),
        ("results.json", '{"pretrain": null}', {"validation", "smoke"}),
        ("results.json", '{"pretrain": {"validation": 3, "smoke": {"n": "x"}}}', {"validation", "smoke"}),
        ("results.json", '{"pretrain": {"validation": {"n": NaN}}}', {"validation", "smoke"}),
        ("seconds.json", '{"pretrain-smoke": "x", "pretrain-prompts": NaN}', set()),
    ],
)
def test_what_an_unfinished_run_left_damaged_is_measured_again(trained: Place, file, content, again):
    evaluate(trained)
    directory = trained.runs / "mini/eval"
    before = {name: (directory / name).read_bytes() for name in ("results.json", "generations.json")}
    (directory / "manifest.json").unlink()
    (directory / file).write_text(content)
    out = evaluate(trained)
    assert {name for name in TASKS if f"\n{name}: " in out} >= again
    assert {name: (directory / name).read_bytes() for name in before} == before
    assert "NaN" not in (trained.runs / "mini/seconds.json").read_text()


def test_no_held_out_document_is_long_enough(trained: Place):
    trained.edit(("prompt_tokens=8", "prompt_tokens=10_000"))
    evaluate(trained)
    assert "lower prompt_tokens or new_tokens" in results(trained)["continuations"]["skipped"]


def test_a_path_that_is_not_utf_8(trained: Place):
    directory = os.fsdecode(b"caf\xe9")
    shutil.copytree(trained.runs / "mini/pretrain/best", trained.path / directory)
    trained.run("pipeline.py", trained.config, "eval", "--checkpoint", trained.path / directory)
    found = json.loads((trained.path / f"eval_{directory}/results.json").read_text())["pretrain"]
    assert found["validation"]["n"] > 0


def test_an_empty_path_is_no_path(trained: Place):
    for option in ("--checkpoint", "--data"):
        evaluate(trained, option, "", status=2)


def test_a_checkpoint_by_path(trained: Place):
    best = trained.runs / "mini/pretrain/best"
    evaluate(trained, "--checkpoint", best)
    found = json.loads((trained.runs / "mini/pretrain/eval_best/results.json").read_text())["pretrain"]
    manifest = json.loads((best / "manifest.json").read_text())
    assert found["validation"]["checkpoint"] == manifest["wrote"]["weights.pt"]["sha256"]
    assert not (trained.runs / "mini/eval").exists()


def test_another_tokenizer(trained: Place):
    trained.edit(('algorithm="bpe"', 'algorithm="unigram"'))
    shutil.rmtree(trained.runs / "mini/tokenizer")
    shutil.rmtree(trained.runs / "mini/packed")
    shutil.move(trained.runs / "mini/pretrain", trained.path)  # while it is there, no other tokenizer is made
    trained.run("pipeline.py", trained.config, "tokenizer")
    shutil.move(trained.path / "pretrain", trained.runs / "mini")
    error = evaluate(trained, status=2)
    assert "was trained with tokenizer" in error
    assert not (trained.runs / "mini/eval").exists()


def test_without_packed_tokens_the_rest_is_measured(trained: Place):
    shutil.rmtree(trained.runs / "mini/packed")
    out = evaluate(trained)
    assert f"validation skipped: no packed tokens; make them with: python pipeline.py {trained.config} pack" in out
    assert "skipped" in results(trained)["continuations"]


def test_what_was_measured_stands_when_its_data_has_gone(trained: Place):
    put(trained, "piqa")
    evaluate(trained)
    before = {name: (trained.runs / "mini/eval" / name).read_bytes() for name in ("results.json", "generations.json")}
    shutil.rmtree(trained.runs / "mini/packed")
    (trained.raw / "piqa_val.jsonl").unlink()
    assert "is up to date" in evaluate(trained)
    for name, content in before.items():
        assert (trained.runs / "mini/eval" / name).read_bytes() == content


def test_a_half_measured_evaluation_takes_nothing_of_another_config_or_model(trained: Place):
    evaluate(trained)
    whole = results(trained)
    (trained.runs / "mini/eval/manifest.json").unlink()
    trained.edit(("EvalConfig(", "EvalConfig(validation_tokens=300, "))
    out = evaluate(trained)
    assert "validation: " in out
    assert "smoke: " not in out
    assert results(trained)["validation"]["n"] < whole["validation"]["n"]
    (trained.runs / "mini/eval/manifest.json").unlink()
    trained.edit(("steps=24", "steps=26"))
    trained.run("train.py", trained.config)
    shutil.rmtree(trained.runs / "mini/packed")
    evaluate(trained)
    now = results(trained)
    assert {name for name, entry in now.items() if "skipped" in entry} >= {"validation", "continuations"}
    assert now["smoke"]["checkpoint"] != whole["smoke"]["checkpoint"]
    said = json.loads((trained.runs / "mini/eval/generations.json").read_text())["pretrain"]
    assert said.keys() == {"smoke", "prompts", "everyday"}


@pytest.mark.parametrize(("name", "hint"), [("pretrain", "did you mean"), ("packed", ""), ("nowhere", "")])
def test_what_is_no_checkpoint(trained: Place, name, hint):
    error = evaluate(trained, "--checkpoint", trained.runs / "mini" / name, status=2)
    assert "is not a checkpoint" in error
    assert hint in error


def test_an_untrained_experiment_says_how_to_train_it(packed: Place):
    for command in (["pipeline.py", packed.config, "eval"], ["serve.py", packed.config, "generate", "x"]):
        assert f"train it with: python train.py {packed.config}" in packed.run(*command, status=2).stderr
    assert not (packed.runs / "mini/eval").exists()


def test_every_task_is_in_the_readme():
    text = (ROOT / "README.md").read_text()
    assert not [name for name in TASKS if f"`{name}`" not in text]
