"""The stage `eval` as a user runs it: what is there is measured, nothing is measured twice, nothing is lost."""

import json
import logging
import lzma
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
    trained.make("sft_data")
    out = trained.run("pipeline.py", trained.config, "eval").stdout
    found = results(trained)
    assert list(found) == TASKS
    assert found.pop("preference") == {
        "skipped": f"no dpo_data; make it with: python pipeline.py {trained.config} dpo_data"
    }
    assert out.count("Skipped: ") == out.count("preference") == 1
    manifest = json.loads((trained.runs / "mini/pretrain/final/manifest.json").read_text())
    spm = json.loads((trained.runs / "mini/tokenizer/manifest.json").read_text())["wrote"]["spm.model"]["sha256"]
    for name, entry in found.items():
        assert {"stderr", "n", "data"} <= entry.keys(), name
        assert "baseline" in entry or name in ("prompts", "everyday")
        assert entry["checkpoint"] == manifest["wrote"]["weights.pt"]["sha256"]
        assert entry["tokenizer"] == spm
    assert "is up to date" in evaluate(trained)
    assert f"boolq: accuracy {found['boolq']['accuracy']:.4f} ± {found['boolq']['stderr']:.2g}" in out
    said = json.loads((trained.runs / "mini/eval/generations.json").read_text())["pretrain"]
    expected = {"answers": 8, "smoke": 24, "prompts": 5, "everyday": 15, "continuations": 2}
    assert {name: len(texts) for name, texts in said.items()} == expected


def test_what_is_missing_is_one_line_and_added_when_it_comes(trained: Place):
    shutil.move(trained.runs / "mini/packed", trained.path)
    out = evaluate(trained)
    [line] = [line for line in out.splitlines() if line.startswith("Skipped: ")]
    assert "wikitext2, boolq, blimp, arc_easy, piqa, hellaswag, winogrande (" in line
    assert f"validation, continuations (no pack; make it with: python pipeline.py {trained.config} pack)" in line
    before = results(trained)
    assert before["boolq"] == {"skipped": f"no {trained.raw}/boolq_val.*; get it with: python -m eval.download boolq"}
    shutil.move(trained.path / "packed", trained.runs / "mini")
    put(trained, "piqa")
    out = evaluate(trained)
    assert {name for name in TASKS if f"\n{name}: " in out} == {"piqa", "validation", "continuations"}
    now = results(trained)
    assert now["piqa"]["n"] == 2
    assert [now[name] for name in ("smoke", "prompts")] == [before[name] for name in ("smoke", "prompts")]
    (trained.raw / "piqa_val.jsonl").unlink()
    assert "is up to date" in evaluate(trained)  # what was measured stands
    assert results(trained) == now


def test_other_data_and_other_weights_are_noticed(trained: Place):
    put(trained, "piqa")
    evaluate(trained)
    (trained.raw / "piqa_val.jsonl").write_text(json.dumps(RECORDS["piqa"] | {"goal": "cut cake"}) + "\n")
    error = evaluate(trained, status=2)
    assert "piqa_val was" in error
    assert results(trained)["piqa"]["n"] == 2
    evaluate(trained, "--force")
    assert results(trained)["piqa"]["n"] == 1
    trained.edit(("steps=24", "steps=26"))
    trained.make("pretrain")
    assert "pretrain/final/weights.pt was" in evaluate(trained, status=2)
    assert "are of an earlier checkpoint" in trained.run("pipeline.py", trained.config, "report").stdout


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_continues_with_the_next_task(trained: Place, signum):
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
    assert "eval is unfinished" in trained.run("pipeline.py", trained.config, "report").stdout
    out = trained.run("pipeline.py", trained.config, "eval").stdout
    assert "validation: " not in out
    assert "prompts: " in out
    trained.env["RUNS"] = str(whole)
    trained.run("pipeline.py", trained.config, "eval")
    for name in ("results.json", "generations.json"):
        undisturbed = (whole / "mini/eval" / name).read_bytes()
        assert (trained.runs / "mini/eval" / name).read_bytes() == undisturbed


SHARES = """
from dataclasses import replace
owners = dict.fromkeys(("corpus", "tokenizer", "pack", "pretrain"), experiment)
experiment = replace(experiment, name="other", shared=owners)
"""


def test_a_shared_model_is_not_measured_again(trained: Place):
    trained.make("sft_data")  # of mini alone: the other experiment has no such data
    evaluate(trained)
    measured = {task: entry for task, entry in results(trained).items() if "n" in entry and task != "answers"}
    trained.config.write_text(trained.config.read_text() + SHARES)
    out = evaluate(trained)
    assert not [name for name in TASKS if f"\n{name}: " in out]
    other = json.loads((trained.runs / "other/eval/results.json").read_text())["pretrain"]
    assert {task: entry for task, entry in other.items() if "n" in entry} == measured
    texts = json.loads((trained.runs / "other/eval/generations.json").read_text())["pretrain"]
    assert list(texts) == ["smoke", "prompts", "everyday", "continuations"]


def test_an_unfinished_run_keeps_nothing_of_another_config(trained: Place):
    trained.edit(("prompt_tokens=8", "prompt_tokens=10_000"))
    evaluate(trained)
    assert "lower prompt_tokens of EvalConfig" in results(trained)["continuations"]["skipped"]
    assert "is up to date" in evaluate(trained)
    (trained.runs / "mini/eval/manifest.json").unlink()
    trained.edit(("prompt_tokens=10_000", "prompt_tokens=8"))
    out = evaluate(trained)
    assert "validation: " in out
    assert results(trained)["continuations"]["n"] == 2


def test_another_tokenizer(trained: Place):
    trained.edit(('algorithm="bpe"', 'algorithm="unigram"'))
    shutil.move(trained.runs / "mini/pretrain", trained.path)  # while it is there, no other tokenizer is made
    shutil.rmtree(trained.runs / "mini/tokenizer")
    shutil.rmtree(trained.runs / "mini/packed")
    trained.make("tokenizer")
    shutil.move(trained.path / "pretrain", trained.runs / "mini")
    assert "was trained with tokenizer" in evaluate(trained, status=2)
    assert not (trained.runs / "mini/eval").exists()


def test_no_checkpoint_no_model_and_damaged_data_stop_before_anything_is_measured(trained: Place):
    for where in (trained.runs / "mini/pretrain", trained.runs / "nowhere", ""):
        assert "is not a checkpoint" in evaluate(trained, "--checkpoint", where, status=2)
    (trained.raw / "boolq_val.jsonl").write_text("{}\n")
    assert "boolq_val.jsonl, line 1: not the data" in evaluate(trained, status=2)
    shutil.rmtree(trained.runs / "mini/pretrain")
    assert f"train it with: python train.py {trained.config}" in evaluate(trained, status=2)
    assert not (trained.runs / "mini/eval").exists()


def test_every_task_is_in_the_docs():
    text = (ROOT / "docs/evaluation.md").read_text()
    assert not [name for name in TASKS if f"`{name}`" not in text]
