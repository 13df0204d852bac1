"""Every stage by its command, as the Makefile gives it; signals; what a user can get wrong."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import configs
import pipeline
from tests.conftest import ROOT, Place, furnish

DIRECTORIES = [configs.DIRECTORIES[name] for name in pipeline.STAGES]


def makefile_commands(config: str) -> list[list[str]]:
    """The lines of `make pipeline`, as make itself expands them."""
    make = ["make", "--dry-run", "pipeline", f"CONFIG={config}", "VENV=/v"]
    lines = subprocess.run(make, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    return [line.split()[1:] for line in lines if line.startswith("/v/bin/python") and config in line]


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, text: list[str]) -> Place:
    """Every stage, by one command."""
    place = furnish(tmp_path_factory.mktemp("whole"), text)
    place.run("pipeline.py", place.config)
    return place


@pytest.fixture
def everything(whole: Place, tmp_path: Path) -> Place:
    """A copy of it."""
    return Place(shutil.copytree(whole.path, tmp_path, dirs_exist_ok=True))


def test_every_stage_by_command(everything: Place):
    assert makefile_commands(str(everything.config)) == [["pipeline.py", str(everything.config)]]
    for directory in DIRECTORIES:
        manifest = json.loads((everything.runs / "mini" / directory / "manifest.json").read_text())
        assert {"config", "read", "wrote", "counts", "versions"} <= manifest.keys()
        assert (everything.runs / "mini" / directory / "log.txt").read_text()
    assert (everything.runs / "mini/REPORT.md").read_text().startswith("# mini")
    again = everything.run("pipeline.py", everything.config)
    assert again.stdout.count("is up to date") == len(DIRECTORIES)
    assert again.stderr == ""
    assert "next:" in everything.run("pipeline.py", everything.config, "corpus").stdout


# -------------------------------------------------------------------------------------------------- together and alone


def contents(place: Place) -> dict[str, str]:
    """The digest of every file of the runs that has no clock, or whose clock can be cut out."""
    table = {}
    for path in sorted(place.runs.rglob("*")):
        clock = path.name in ("manifest.json", "seconds.json", "log.txt", ".lock", "REPORT.md") or "plots" in path.parts
        if path.is_file() and not clock:
            content = re.sub(rb'"(seconds|tokens_per_second)": [0-9.e+-]+', b"", path.read_bytes())
            content = content.replace(str(place.path).encode(), b"")  # results.json names missing files
            table[path.relative_to(place.runs).as_posix()] = hashlib.sha256(content).hexdigest()
    return table


def assert_same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


# A process that makes all stages, is killed as soon as one is finished, and is started again.
KILLED = """
import os, signal, sys, cli, pipeline
from pathlib import Path
apart, kills = cli.apart, 0
def finished():
    return sorted(Path(os.environ["RUNS"]).glob("*/*/manifest.json"))
def deadly(function):
    before = finished()
    apart(function)
    if finished() != before:
        os.kill(os.getpid(), signal.SIGKILL)
cli.apart = deadly
while True:
    if (child := os.fork()) == 0:
        pipeline.main(pipeline.parser().parse_args(sys.argv[1:]))
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
    kills += 1
print(kills, "kills")
"""


def test_killed_between_any_two_stages_it_gives_the_same_bytes(place: Place, whole: Place):
    out = place.run("-c", KILLED, place.config).stdout
    assert_same(contents(place), contents(whole))
    assert f"{len(DIRECTORIES)} kills" in out


def test_each_command_that_makes_several_stages_gives_the_same_bytes(preferring: Place, whole: Place):
    """By train.py, and by pipeline.py for sft and then for dpo."""
    ours, theirs = contents(preferring), contents(whole)
    assert_same(ours, {name: theirs[name] for name in theirs if name in ours})
    assert {name.split("/")[1] for name in theirs.keys() - ours.keys()} == {"eval"}


# ------------------------------------------------------------------------------------------------------ status, force


def states(place: Place) -> dict[str, str]:
    """What --status says of each stage."""
    lines = place.run("pipeline.py", place.config, "--status").stdout.splitlines()
    begin = lines[0].index("state")
    return {line.split()[0]: line[begin:] for line in lines[1:]}


def test_the_status_of_each_stage(everything: Place):
    before = contents(everything)
    out = everything.run("pipeline.py", everything.config, "--status").stdout
    assert re.search(r"\npretrain +[\d.]+  [\d.]+ bits per byte +done\n", out)
    assert contents(everything) == before
    assert states(everything) == dict.fromkeys(pipeline.STAGES, "done")

    everything.edit(("learning_rate=3e-3", "learning_rate=2e-3"))
    (everything.runs / "mini/sft_data/manifest.json").unlink()
    shutil.rmtree(everything.runs / "mini/dpo_reference")
    now = states(everything)
    assert now.pop("sft").startswith("stale: mini/sft_data/train.bin was")
    assert now == {
        "corpus": "done",
        "tokenizer": "done",
        "pack": "done",
        "pretrain": "stale: pretrain.learning_rate was 0.003, is now 0.002",
        "sft_data": "unfinished",
        "dpo_data": "done",
        "dpo_reference": "missing",
        "dpo": "stale: sft is stale",
        "eval": "stale: pretrain is stale",
    }
    shutil.rmtree(everything.runs / "mini/pretrain")
    assert states(everything)["pretrain"] == "missing"
    assert states(everything)["sft"].startswith("stale: mini is not trained")
    shutil.rmtree(everything.runs)
    assert set(states(everything).values()) == {"missing"}


def times(place: Place) -> dict[str, int]:
    """When each finished stage was made."""
    return {path.parent.name: path.stat().st_mtime_ns for path in place.runs.glob("mini/*/manifest.json")}


def test_force_from_makes_a_stage_and_all_later_ones_again(everything: Place):
    everything.edit(("learning_rate=1e-2", "learning_rate=2e-2"))  # of sft
    refused = everything.run("pipeline.py", everything.config, status=2).stderr
    assert "sft.learning_rate was" in refused
    assert refused.endswith(f"python pipeline.py {everything.config} --force-from sft\n")
    before = times(everything)
    everything.run("pipeline.py", everything.config, "--force-from", "sft")
    after = times(everything)
    assert {name for name in before if after[name] == before[name]} == set(DIRECTORIES[:5])
    assert set(states(everything).values()) == {"done"}


def test_the_tokenizer_is_replaced_only_with_everything_that_was_made_with_it(trained: Place):
    before = times(trained)
    trained.edit(('algorithm="bpe"', 'algorithm="unigram"'))
    refused = trained.run("pipeline.py", trained.config, "tokenizer", "--force", status=2).stderr
    assert "--force-from tokenizer" in refused
    trained.run("pipeline.py", trained.config, "corpus", "tokenizer", "pack", "pretrain", "--force-from", "corpus")
    after = times(trained)
    assert all(after[name] > before[name] for name in before)


def test_variants_of_a_fine_tuning_make_its_data_once(tuned: Place):
    other = tuned.path / "other.py"
    shared = "shared=dict.fromkeys(('corpus', 'tokenizer', 'pack', 'pretrain', 'sft_data'), mini)"
    other.write_text(
        f"from dataclasses import replace\nimport configs\nmini = configs.load({str(tuned.config)!r})\n"
        f"train = replace(mini.sft.train, learning_rate=2e-2)\n"
        f"experiment = replace(mini, name='other', sft=replace(mini.sft, train=train), {shared})\n"
    )
    out = tuned.run("pipeline.py", other, "sft").stdout
    assert f"{tuned.runs}/mini/sft_data is up to date" in out
    assert f"next: python pipeline.py {other} dpo, or talk with the model:" in out.splitlines()[-1]
    assert {path.name for path in (tuned.runs / "other").iterdir()} == {"sft", "seconds.json"}


# -------------------------------------------------------------------------------------------------------------- stopped


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGHUP])
def test_stopped_in_training_it_saves_and_resumes_exactly(packed: Place, tmp_path_factory, by):
    """Ctrl-C reaches every process of the command, SIGHUP here only the first, which has lost its output too."""
    packed.edit(("steps=24", "steps=100_000"), ("learning_rate=3e-3, w", "learning_rate=3e-3, min_lr=3e-3, w"))
    with packed.start("pipeline.py", packed.config, "pretrain", start_new_session=True) as run:
        run.wait_for("step 1 of")
        time.sleep(0.5)
        if by == signal.SIGHUP:
            run.stdout.close()
        os.killpg(run.pid, by) if by == signal.SIGINT else run.send_signal(by)
        err = run.stderr.read()
    assert run.returncode == 128 + by
    assert err.count("finishing the step") == err.count("saved at step") == 1
    step = int(re.search(r"saved at step (\d+) of 100000", err)[1])
    assert err.strip().count("\n") == 1

    packed.edit(("steps=100_000", f"steps={step + 3}"))
    straight = Place(shutil.copytree(packed.path, tmp_path_factory.mktemp("straight"), dirs_exist_ok=True))
    shutil.rmtree(straight.runs / "mini/pretrain")
    assert f"resumed from step {step} " in packed.run("pipeline.py", packed.config, "pretrain").stdout
    straight.run("pipeline.py", straight.config, "pretrain")
    for name in ("weights.pt", "state.pt"):
        ours, theirs = (place.runs / "mini/pretrain/final" / name for place in (packed, straight))
        assert ours.read_bytes() == theirs.read_bytes()
    assert packed.metrics() == straight.metrics()


def test_neither_a_closed_pipe_nor_a_closed_terminal_ends_what_nohup_started(packed: Place):
    code = "import runpy, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); sys.argv.pop(0)"
    code += "; runpy.run_path('train.py', run_name='__main__')"
    with packed.start("-c", code, "train.py", packed.config) as run:
        run.wait_for("parameters")
        run.stdout.close()
        run.send_signal(signal.SIGHUP)
    assert run.returncode == 0
    assert "step 24 of 24" in (packed.runs / "mini/pretrain/log.txt").read_text()


def test_stopped_while_making_data(place: Place):
    """Ctrl-C in the shell reaches the workers too; they must be quiet about it."""
    place.edit(('Files(paths=("text.jsonl",), min_chars=20)', "PythonDocs()"), ("import Files", "import PythonDocs"))
    run = place.start("pipeline.py", place.config, "corpus", start_new_session=True)
    while not (place.runs / "mini/corpus/shard_00000.jsonl").exists():
        assert run.poll() is None
    os.killpg(run.pid, 2)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert err == "stopped; run the same command again to continue\n"


# Sends Ctrl-C to a command when it starts to import torch.
IMPORTING = """
import os, runpy, sys
find = lambda name, *_: os.kill(os.getpid(), 2) if name == "torch" else None
sys.meta_path.insert(0, type("Finder", (), {"find_spec": find}))
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@pytest.mark.parametrize("command", ["train.py", "pipeline.py"])
def test_stopped_while_it_imports(command):
    run = subprocess.run([sys.executable, "-c", IMPORTING, command], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (130, "stopped\n")


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("n_layers=2", "n_layer=2", "did you mean n_layers?"),
        ("text.jsonl", "nowhere.jsonl", "no file at"),
    ],
)
def test_mistakes_end_with_one_line_and_status_2(place: Place, before, after, message):
    assert message in place.run("train.py", place.edit((before, after)), status=2).stderr
    assert not list(place.path.glob("runs/**/manifest.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pipeline.py", "--checkpoint", "x"], "--checkpoint is about one stage"),
        (["pipeline.py", "sft", "dpo", "--checkpoint", "x"], "--checkpoint is about one stage"),
        (["pipeline.py", "--resume", "x"], "--resume is about one stage"),
        (["pipeline.py", "sft", "--force", "--checkpoint", "pretrain"], "did you mean"),
        (["pipeline.py", "--force", "stft"], "no stage 'stft'"),
        (["pipeline.py", "sft", "--lr", "1"], "no switch --lr: settings live in {}; set pretrain.learning_rate or"),
        (
            ["train.py", "--steps", "10"],
            "no switch --steps: settings live in {}; set pretrain.steps or sft.train.steps",
        ),
        (["train.py", "--batch-size=10"], "set pretrain.batch_size or sft.train.batch_size or dpo.train.batch_size"),
        (["serve.py", "generate", "x", "--lr", "1"], "no switch --lr: settings live in {}"),
        (["serve.py", "generate", "x", "--temperature", "-1"], "temperature is -1.0"),
        (["serve.py", "generate", "x", "--checkpoint", "nowhere"], "nowhere"),
    ],
)
def test_switches_that_cannot_be_meant_change_nothing(tuned: Place, arguments, message):
    command, *rest = [tuned.runs / "mini/pretrain" if argument == "pretrain" else argument for argument in arguments]
    before = (tuned.runs / "mini/sft/manifest.json").stat().st_mtime_ns
    assert message.format(tuned.config) in tuned.run(command, tuned.config, *rest, status=2).stderr
    assert (tuned.runs / "mini/sft/manifest.json").stat().st_mtime_ns == before


def test_a_changed_corpus_is_noticed_by_training(trained: Place):
    with open(trained.raw / "text.jsonl", "a") as file:
        file.write('{"text": "One more document, long enough to count."}\n')
    error = trained.run("train.py", trained.config, status=2).stderr
    assert "corpus was made from something else: text.jsonl was" in error
    assert f"python pipeline.py {trained.config} --force-from corpus" in error


def test_raw_text_may_be_moved_away_once_it_is_packed(trained: Place):
    (trained.raw / "text.jsonl").unlink()
    assert "is up to date" in trained.run("train.py", trained.config).stdout
    assert "no file at" in trained.run("pipeline.py", trained.config, "corpus", "--force", status=2).stderr
    assert (trained.runs / "mini/corpus/shard_00000.jsonl").exists()


def test_unwritable_directory(place: Place):
    place.runs.write_text("a file where a directory should be")
    assert str(place.runs) in place.run("train.py", place.config, status=2).stderr


def test_reader_that_goes_away_and_a_terminal_without_unicode(trained: Place):
    trained.env["PYTHONIOENCODING"] = "ascii"
    with trained.start("serve.py", trained.config, "generate", "× ", "--max-tokens", "3000") as run:
        assert run.stdout.read(4) == r"\xd7"
        run.stdout.close()
        assert run.wait(60) == 128 + 13
        assert run.stderr.read() == ""


def test_readme_names_only_what_is_there():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"`((?:configs|data|eval|tokenizer|tests|benchmarks)/[\w./]*)`", text):
        assert (ROOT / path).exists() or path in ("data/raw/", "configs/mine.py"), path
    for target in re.findall(r"^make (\w[\w-]*)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists() or (ROOT / module / "__main__.py").exists(), module
