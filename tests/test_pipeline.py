"""Every stage by its command, as the Makefile spells it; what a user can get wrong; generation from the shell."""

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


def makefile_commands(config: str) -> list[list[str]]:
    """The lines of `make pipeline`, as make itself expands them."""
    made = subprocess.run(
        ["make", "--dry-run", "pipeline", f"CONFIG={config}", "VENV=/v"], cwd=ROOT, capture_output=True, text=True
    )
    return [
        line.split()[1:] for line in made.stdout.splitlines() if line.startswith("/v/bin/python") and config in line
    ]


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, text: list[str]) -> Place:
    """Every stage, by one command."""
    place = furnish(tmp_path_factory.mktemp("whole"), text)
    place.output = place.run("pipeline.py", place.config).stdout
    return place


@pytest.fixture
def everything(whole: Place, tmp_path: Path) -> Place:
    """A copy of it."""
    return Place(shutil.copytree(whole.path, tmp_path, dirs_exist_ok=True))


DIRECTORIES = ["packed" if name == "pack" else name for name in pipeline.STAGES]


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
    plain = "serve.py", everything.config, "--checkpoint", everything.runs / "mini/pretrain/final", "generate"
    generated = [everything.run(*plain, "def ", "--seed", "1", "--max-tokens", "9").stdout for _ in range(2)]
    assert generated[0] == generated[1]
    assert generated[0].startswith("def ")
    piped = everything.run(*plain, "--seed", "1", "--max-tokens", "9", stdin="def ").stdout
    assert piped == generated[0]


# -------------------------------------------------------------------------------------------------- together and alone


def without_clock(value):
    """JSON without seconds, and without the digests of files that hold seconds or where data was looked for."""
    if isinstance(value, list):
        return [without_clock(item) for item in value]
    if not isinstance(value, dict):
        return value
    clocks = {"seconds", "tokens_per_second", "final/manifest.json", "results.json"}
    clocks |= {"sha256"} if "wrote" in value else set()
    return {key: without_clock(item) for key, item in value.items() if key not in clocks}


def contents(place: Place) -> dict:
    """Every file of the runs: the digest, or for JSON what it says, but for the clock."""
    found = {}
    for path in sorted(place.runs.rglob("*")):
        name = path.relative_to(place.runs).as_posix()
        if path.suffix in (".json", ".jsonl") and path.name != "seconds.json":
            text = re.sub(r"\S*/mini\.py", "mini.py", path.read_text())  # in commands
            text = text.replace(str(place.path), "")
            values = [json.loads(text)] if path.suffix == ".json" else map(json.loads, text.splitlines())
            found[name] = [without_clock(value) for value in values]
        elif path.is_file() and path.name not in (".lock", "log.txt", "seconds.json") and "plots" not in path.parts:
            # The report shows seconds, and digests of manifests.
            found[name] = path.name if path.name == "REPORT.md" else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def assert_same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


# Each stage is started by a process that has only imported pipeline.py, as the command does: one such process a stage,
ALONE = """
import sys, cli, pipeline
def run(*stages):
    pipeline.main(pipeline.parser().parse_args([sys.argv[1], *stages]))
for name in pipeline.NAMES:
    cli.apart(lambda: run(name))
"""
# or one that makes all stages, is killed as soon as one is finished, and is started again.
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


@pytest.mark.parametrize("code", [ALONE, KILLED], ids=["alone", "killed between any two"])
def test_each_stage_gives_the_same_bytes(place: Place, whole: Place, code):
    out = place.run("-c", code, place.config).stdout
    assert_same(contents(place), contents(whole))
    assert code == ALONE or f"{len(DIRECTORIES)} kills" in out


def test_each_command_that_makes_several_stages_gives_the_same_bytes(preferring: Place, whole: Place):
    """By train.py, and by pipeline.py for sft and then for dpo."""
    ours, theirs = contents(preferring), contents(whole)
    assert_same(ours, {name: theirs[name] for name in theirs if name in ours})
    assert {name.split("/")[1] for name in theirs.keys() - ours.keys()} == {"eval", "REPORT.md"}


def states(place: Place) -> dict[str, str]:
    """What --status says of each stage."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATA", str(place.raw))
        patch.setenv("RUNS", str(place.runs))
        arguments = pipeline.parser().parse_args([str(place.config), "--status"])
        lines = pipeline.status(configs.load(place.config), arguments).splitlines()
    begins = lines[0].index("state")
    return {line.split()[0]: line[begins:] for line in lines[1:]}


def test_the_status_of_each_stage(everything: Place, whole: Place):
    before = contents(everything)
    out = everything.run("pipeline.py", everything.config, "--status").stdout
    assert out.count("  done\n") == len(DIRECTORIES)
    assert re.search(r"\npretrain +[\d.]+  [\d.]+ bits per byte +done\n", out)
    assert contents(everything) == before
    assert states(everything) == dict.fromkeys(pipeline.STAGES, "done")

    (everything.runs / "mini/dpo_data/manifest.json").unlink()
    shutil.rmtree(everything.runs / "mini/dpo_reference")
    everything.edit(("learning_rate=3e-3", "learning_rate=2e-3"))
    found = states(everything)
    assert found["dpo_data"] == "unfinished"
    assert found["dpo_reference"] == "missing"
    assert found["pretrain"] == "stale: pretrain.learning_rate was 0.003, is now 0.002"
    assert found["sft"] == "done"
    shutil.rmtree(everything.runs / "mini/pretrain")
    found = states(everything)
    assert found["pretrain"] == "missing"
    assert found["sft"].startswith("missing: mini is not trained")
    shutil.rmtree(everything.runs)
    assert {state.partition(":")[0] for state in states(everything).values()} == {"missing"}


def test_force_from_makes_a_stage_and_all_later_ones_again(everything: Place):
    def when() -> dict[str, int]:
        return {name: (everything.runs / "mini" / name / "manifest.json").stat().st_mtime_ns for name in DIRECTORIES}

    before = when()
    everything.edit(("learning_rate=1e-2", "learning_rate=2e-2"))  # of sft
    assert "sft.learning_rate was" in everything.run("pipeline.py", everything.config, status=2).stderr
    everything.run("pipeline.py", everything.config, "--force-from", "sft")
    after = when()
    assert [name for name in DIRECTORIES if after[name] == before[name]] == DIRECTORIES[:5]
    assert states(everything) == dict.fromkeys(pipeline.STAGES, "done")
    # The tokenizer may be replaced, because everything that was made with it is made again too.
    everything.run("pipeline.py", everything.config, "--force-from", "corpus")
    assert all(when()[name] > after[name] for name in DIRECTORIES)
    assert (
        "another would not fit"
        in everything.run("pipeline.py", everything.config, "tokenizer", "--force", status=2).stderr
    )


def test_changed_code_is_told_of_where_it_makes_the_stage(trained: Place):
    project = trained.path / "project"
    shutil.copytree(ROOT, project, ignore=shutil.ignore_patterns(".*", "tests", "runs", "benchmarks", "docs"))
    with open(project / "model.py", "a") as file:
        file.write("# another line\n")
    trained.env["PYTHONPATH"] = str(project)

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "pipeline.py", str(trained.config), *arguments]
        return subprocess.run(command, cwd=project, env=trained.env, capture_output=True, text=True, check=True)

    done = run("corpus", "pretrain")
    for name in ("corpus", "tokenizer", "packed"):
        assert f"{name} is up to date" in done.stdout
    assert "pretrain is up to date" not in done.stdout
    assert done.stderr == (
        f"{trained.runs}/mini/pretrain is kept as it is, but model.py changed since it was made; "
        f"make it again with: python train.py {trained.config} --force\n"
    )
    assert "  done, but model.py changed since\n" in run("--status").stdout
    shutil.rmtree(trained.runs / "mini/pretrain/final")
    (trained.runs / "mini/pretrain/manifest.json").unlink()
    resumed = run("pretrain")
    assert "resumed from step 20" in resumed.stdout
    assert resumed.stderr.count("model.py changed since") == resumed.stderr.count("\n") == 1


# -------------------------------------------------------------------------------------------------------------- stopped


@pytest.mark.parametrize("by", ["terminal", "kill"])
def test_stopped_in_training_it_saves_and_resumes_exactly(packed: Place, tmp_path_factory, by):
    """A terminal's Ctrl-C reaches every process of the command; `kill` only the first."""
    packed.edit(("steps=24", "steps=100_000"), ("learning_rate=3e-3, w", "learning_rate=3e-3, min_lr=3e-3, w"))
    run = packed.start("pipeline.py", packed.config, "pretrain", start_new_session=True)
    run.wait_for("step 1 of")
    time.sleep(0.5)
    if by == "terminal":
        os.killpg(run.pid, signal.SIGINT)
    else:
        run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=60)
    assert run.returncode == (130 if by == "terminal" else 143)
    assert err.count("finishing the step") == err.count("saved at step") == 1
    step = int(re.search(r"saved at step (\d+) of 100000", err)[1])
    assert err.strip().count("\n") == 1

    packed.edit(("steps=100_000", f"steps={step + 3}"))
    straight = Place(shutil.copytree(packed.path, tmp_path_factory.mktemp("straight"), dirs_exist_ok=True))
    shutil.rmtree(straight.runs / "mini/pretrain")
    assert f"resumed from step {step} " in packed.run("pipeline.py", packed.config, "pretrain").stdout
    straight.run("pipeline.py", straight.config, "pretrain")
    ours, theirs = ({k: v for k, v in contents(place).items() if "/final/" in k and k.endswith(".pt")}
                    for place in (packed, straight))  # fmt: skip
    assert ours == theirs
    assert len(ours) == 2
    assert packed.metrics() == straight.metrics()


def test_stopped_while_making_data(place: Place):
    """Ctrl-C in the shell reaches the workers too; they must be quiet about it."""
    place.edit(('Files(paths=("text.jsonl",), min_chars=20)', "PythonDocs()"), ("import Files", "import PythonDocs"))
    run = subprocess.Popen(
        [sys.executable, "pipeline.py", str(place.config), "corpus"],
        cwd=ROOT, env=place.env, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while not (place.runs / "mini/corpus/shard_00000.jsonl").exists():
        assert run.poll() is None
    os.killpg(run.pid, 2)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert err == "stopped; run the same command again to continue\n"


# ---------------------------------------------------------------------------------------------------- mistakes and uses


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("n_layers=2", "n_layer=2", "did you mean n_layers?"),
        ("steps=24", 'steps="24"', "steps is '24' (str)"),
        ("n_heads=2", "n_heads=0", "n_heads is 0; expected a positive number"),
        ("text.jsonl", "nowhere.jsonl", "no file at"),
        ("min_chars=20", "min_chars=10_000", "the corpus is empty"),
        ("min_chars=20),)", "min_chars=20),), max_chars=3", "CorpusConfig has no field 'max_chars'"),
    ],
)
def test_mistakes_end_with_one_line_and_status_2(place: Place, before, after, message):
    error = place.run("train.py", place.edit((before, after)), status=2).stderr
    assert message in error
    assert not list(place.path.glob("runs/**/manifest.json"))


def test_missing_config(place: Place):
    assert "no config at nowhere.py" in place.run("train.py", "nowhere.py", status=2).stderr


def test_a_changed_corpus_is_noticed_by_training(trained: Place):
    with open(trained.raw / "text.jsonl", "a") as file:
        file.write('{"text": "One more document, long enough to count."}\n')
    error = trained.run("train.py", trained.config, status=2).stderr
    assert "corpus was made from something else: text.jsonl was" in error
    assert f"python pipeline.py {trained.config} corpus --force" in error


def test_raw_text_may_be_moved_away_once_it_is_packed(trained: Place):
    (trained.raw / "text.jsonl").unlink()
    assert "is up to date" in trained.run("train.py", trained.config).stdout


def test_unwritable_directory(place: Place):
    place.runs.write_text("a file where a directory should be")
    process = place.start("train.py", place.config)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.startswith("error: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--top-p", "0"], "top_p is 0.0"),
        (["--top-k", "0"], "top_k is 0"),
        (["--checkpoint", "nowhere"], "nowhere"),
    ],
)
def test_generate_explains_mistakes(trained: Place, options, message):
    # CONFIG and --checkpoint belong to the program, the sampling switches to the command.
    front = options if options[0] == "--checkpoint" else []
    arguments = ["serve.py", *front, trained.config, "generate", "x", *(options if not front else [])]
    assert message in trained.run(*arguments, status=2).stderr


def test_generate_from_a_checkpoint_and_samples(trained: Place):
    best = trained.runs / "mini/pretrain/best"
    options = ["--samples", "3", "--seed", "5", "--max-tokens", "6"]
    out = trained.run("serve.py", trained.config, "--checkpoint", best, "generate", "ä ▁", *options).stdout
    parts = out.split("-" * 40 + "\n")
    assert len(parts) == 3
    assert all(part.startswith("ä ▁") for part in parts)


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "x"], "--checkpoint is about one stage"),
        (["sft", "dpo", "--checkpoint", "x"], "--checkpoint is about one stage"),
        (["--resume", "x"], "--resume is about one stage"),
        (["sft", "--force", "--checkpoint", "pretrain"], "did you mean"),
        (["--force", "stft"], "no stage 'stft'"),
    ],
)
def test_switches_that_cannot_be_meant_change_nothing(tuned: Place, arguments, message):
    arguments = [tuned.runs / "mini/pretrain" if argument == "pretrain" else argument for argument in arguments]
    before = (tuned.runs / "mini/sft/manifest.json").stat().st_mtime_ns
    assert message in tuned.run("pipeline.py", tuned.config, *arguments, status=2).stderr
    assert (tuned.runs / "mini/sft/manifest.json").stat().st_mtime_ns == before


def test_force_keeps_a_corpus_whose_text_is_missing(trained: Place):
    (trained.raw / "text.jsonl").unlink()
    assert "no file at" in trained.run("pipeline.py", trained.config, "corpus", "--force", status=2).stderr
    assert (trained.runs / "mini/corpus/shard_00000.jsonl").exists()


def test_code_that_is_edited_during_a_run_is_not_recorded_as_the_code_that_ran(tmp_path: Path):
    """The digests are read before the first stage; a stage that begins later has those."""
    shutil.copytree(ROOT, tmp_path / "lumi", ignore=shutil.ignore_patterns(".*", "tests", "runs", "benchmarks", "docs"))
    script = """
import pathlib, stage
before = stage.imported_code("pipeline.py")
pathlib.Path("model.py").write_text("syntax error (")
assert stage.imported_code("sft/train.py")["model.py"] == before["model.py"]
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path / "lumi", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
