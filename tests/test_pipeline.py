"""Every stage by its command, as the Makefile gives it; signals; what a user can get wrong."""

import hashlib
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
import stage
from tests.conftest import ROOT, Place, furnish

DIRECTORIES = [configs.DIRECTORIES[name] for name in pipeline.NAMES[:-1]]


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
        assert (everything.runs / "mini" / directory / "manifest.json").exists()
        assert (everything.runs / "mini" / directory / "log.txt").read_text()
    assert (everything.runs / "mini/REPORT.md").read_text().startswith("# mini")
    for name in ("tokenizer", "sft"):
        directory = everything.runs / "mini" / name
        stage.write_manifest(directory, stage.read_manifest(directory) | {"code": {"gone.py": "0"}})
    again = everything.run("pipeline.py", everything.config)
    assert again.stdout.count("is up to date") == len(DIRECTORIES)
    assert again.stderr.count("\n") == 1  # one warning, whatever the number of stages
    assert "tokenizer is kept, but gone.py changed since it was made" in again.stderr


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


def test_stages_by_their_own_commands_give_the_same_bytes(place: Place, preferring: Place, whole: Place):
    """One by one; and by train.py, then by pipeline.py for sft and for dpo, which make the data."""
    for name in pipeline.NAMES:
        place.run("pipeline.py", place.config, name)
    theirs = contents(whole)
    assert contents(place) == theirs
    assert contents(preferring) == {name: theirs[name] for name in theirs if name.split("/")[1] != "eval"}


def states(place: Place) -> dict[str, str]:
    """What --status says of each stage."""
    lines = place.run("pipeline.py", place.config, "--status").stdout.splitlines()
    begin = lines[0].index("state")
    return {line.split()[0]: line[begin:] for line in lines[1:]}


def test_the_status_of_each_stage(everything: Place):
    out = everything.run("pipeline.py", everything.config, "--status").stdout
    assert re.search(r"\npretrain +[\d.]+  [\d.]+ bits per byte +done\n", out)
    assert states(everything) == dict.fromkeys(pipeline.NAMES[:-1], "done")
    everything.edit(("learning_rate=3e-3", "learning_rate=2e-3"))
    (everything.runs / "mini/sft_data/manifest.json").unlink()
    shutil.rmtree(everything.runs / "mini/dpo_reference")
    now = states(everything)
    assert now.pop("sft").startswith("stale: mini/sft_data/train.bin was")
    assert now == dict.fromkeys(("corpus", "tokenizer", "pack", "dpo_data"), "done") | {
        "pretrain": "stale: pretrain.learning_rate was 0.003, is now 0.002",
        "sft_data": "unfinished",
        "dpo_reference": "missing",
        "dpo": "stale: sft is stale",
        "eval": "stale: pretrain is stale",
    }
    shutil.rmtree(everything.runs / "mini/eval")
    out = everything.run("pipeline.py", everything.config, "--status").stdout
    assert re.search(r"\npretrain +[\d.]+  [\d.]+ bits per byte in training +stale", out)
    shutil.rmtree(everything.runs / "mini/pretrain")
    assert states(everything)["sft"].startswith("stale: mini is not trained")


def times(place: Place) -> dict[str, int]:
    """When each finished stage was made."""
    return {path.parent.name: path.stat().st_mtime_ns for path in place.runs.glob("mini/*/manifest.json")}


def test_a_missing_file_of_a_later_stage_is_seen_before_the_first(place: Place):
    (place.raw / "pairs.jsonl").unlink()
    error = place.run("pipeline.py", place.config, status=2).stderr
    assert f"no file at {place.raw}/pairs.jsonl" in error
    assert not (place.runs / "mini").exists()


def test_force_from_makes_a_stage_and_all_later_ones_again(everything: Place):
    everything.edit(("learning_rate=1e-2", "learning_rate=2e-2"))  # of sft
    refused = everything.run("pipeline.py", everything.config, status=2).stderr
    assert "sft.learning_rate was" in refused
    assert refused.endswith(f"python pipeline.py {everything.config} --force-from sft\n")
    before = times(everything)
    everything.run("pipeline.py", everything.config, "--force-from", "sft")
    after = times(everything)
    assert {name for name in before if after[name] == before[name]} == set(DIRECTORIES[:5])


def test_the_tokenizer_is_replaced_only_with_everything_that_was_made_with_it(trained: Place):
    before = times(trained)
    trained.edit(('algorithm="bpe"', 'algorithm="unigram"'))
    refused = trained.run("pipeline.py", trained.config, "tokenizer", "--force", status=2).stderr
    assert "--force-from tokenizer" in refused
    trained.run("pipeline.py", trained.config, "pretrain", "--force-from", "corpus")
    assert not before.items() & times(trained).items()


def test_variants_of_a_fine_tuning_make_its_data_once(tuned: Place):
    other = tuned.path / "other.py"
    shared = "shared=dict.fromkeys(('corpus', 'tokenizer', 'pack', 'pretrain', 'sft_data'), mini)"
    other.write_text(
        f"from dataclasses import replace\nimport configs\nmini = configs.load({str(tuned.config)!r})\n"
        f"experiment = replace(mini, name='other', sft=replace(mini.sft, lora=None), {shared})\n"
    )
    out = tuned.run("pipeline.py", other, "sft").stdout
    assert out.splitlines()[-1].startswith(f"next: python pipeline.py {other} dpo, or python serve.py {other} chat")
    assert {path.name for path in (tuned.runs / "other").iterdir()} == {"sft", "seconds.json"}
    before = times(tuned)  # of the other experiment, whose stages are not made again from here
    err = tuned.run("pipeline.py", other, "sft", "--force-from", "pretrain").stderr
    assert f"kept, because other experiments own them: {tuned.runs}/mini/pretrain, {tuned.runs}/mini/sft_data;" in err
    assert f"python pipeline.py {tuned.config} sft --force-from pretrain" in err
    assert times(tuned) == before


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopped_in_training_it_saves_and_resumes_exactly(packed: Place, tmp_path_factory, by):
    """Ctrl-C reaches every process of the command, the others only the first, which with SIGHUP loses its output."""
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
    assert "Traceback" not in err
    step = int(re.search(r"saved at step (\d+) of 100000; resume with: python train.py", err)[1])
    packed.edit(("steps=100_000", f"steps={step + 3}"))
    straight = Place(shutil.copytree(packed.path, tmp_path_factory.mktemp("straight"), dirs_exist_ok=True))
    shutil.rmtree(straight.runs / "mini/pretrain")
    assert f"resumed from step {step} " in packed.run("pipeline.py", packed.config, "pretrain").stdout
    straight.run("pipeline.py", straight.config, "pretrain")
    for name in ("final/weights.pt", "final/state.pt"):
        ours, theirs = (place.runs / "mini/pretrain" / name for place in (packed, straight))
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


def test_stopped_while_it_imports(place: Place):
    """In an interpreter of its own: the tests' fork server has imported everything."""
    run = subprocess.Popen([sys.executable, "train.py", place.config], cwd=ROOT, env=place.env, stderr=subprocess.PIPE)
    while b"libtorch" not in Path(f"/proc/{run.pid}/maps").read_bytes():
        assert run.poll() is None
    run.send_signal(signal.SIGINT)
    assert run.communicate(timeout=60)[1] == b""
    assert run.returncode == -signal.SIGINT  # 130 for a shell


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pipeline.py", "sft", "dpo", "--checkpoint", "pretrain"], "--checkpoint is about one stage"),
        (["pipeline.py", "sft", "--checkpoint", "nowhere"], "nowhere is not a checkpoint: there is no such directory"),
        (["pipeline.py", "--resume", "x"], "--resume is about one stage"),
        (["pipeline.py", "sft", "--force", "--checkpoint", "pretrain"], "did you mean"),
        (["pipeline.py", "--force", "stft"], "no stage 'stft'; did you mean sft?"),
        (["pipeline.py", "corpus", "--force-from", "sft"], "--force-from sft is later than corpus; name an earlier"),
        (["train.py", "--batch-size=10"], "--batch-size=10; settings live in the config; see train.py --help"),
        (["serve.py", "generate", "x", "--checkpoint", "nowhere"], "nowhere"),
    ],
)
def test_switches_that_cannot_be_meant_change_nothing(tuned: Place, arguments, message):
    command, *rest = [tuned.runs / "mini/pretrain" if argument == "pretrain" else argument for argument in arguments]
    before = (tuned.runs / "mini/sft/manifest.json").stat().st_mtime_ns
    assert message in tuned.run(command, tuned.config, *rest, status=2).stderr
    assert (tuned.runs / "mini/sft/manifest.json").stat().st_mtime_ns == before


def test_a_changed_corpus_is_noticed_by_training_but_raw_text_may_be_moved_away_once_it_is_packed(trained: Place):
    with open(trained.raw / "text.jsonl", "a") as file:
        file.write('{"text": "One more document, long enough to count."}\n')
    error = trained.run("train.py", trained.config, status=2).stderr
    assert "corpus was made from something else: text.jsonl was" in error
    assert error.endswith(f"python pipeline.py {trained.config} pretrain --force-from corpus\n")
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
