"""Every stage by its command, as the Makefile spells it; what a user can get wrong; generation from the shell."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT, Place


def makefile_commands(config: str) -> list[list[str]]:
    """The lines of `make pipeline`, as make itself expands them."""
    made = subprocess.run(
        ["make", "--dry-run", "pipeline", f"CONFIG={config}", "VENV=/v"], cwd=ROOT, capture_output=True, text=True
    )
    return [
        line.split()[1:] for line in made.stdout.splitlines() if line.startswith("/v/bin/python") and config in line
    ]


def test_every_stage_by_command(place: Place):
    commands = makefile_commands(str(place.config))
    assert commands == [["pipeline.py", str(place.config)]]
    place.run(*commands[0])
    for directory in ("corpus", "tokenizer", "packed", "pretrain", "sft_data", "sft", "dpo_data", "dpo", "eval"):
        manifest = json.loads((place.runs / "mini" / directory / "manifest.json").read_text())
        assert {"config", "read", "wrote", "counts", "versions"} <= manifest.keys()
        assert (place.runs / "mini" / directory / "log.txt").read_text()
    assert place.run(*commands[0]).stdout.count("is up to date") == 10  # the reference of dpo too
    plain = "serve.py", place.config, "--checkpoint", place.runs / "mini/pretrain/final", "generate"
    generated = [place.run(*plain, "def ", "--seed", "1", "--max-tokens", "9").stdout for _ in range(2)]
    assert generated[0] == generated[1]
    assert generated[0].startswith("def ")
    piped = place.run(*plain, "--seed", "1", "--max-tokens", "9", stdin="def ").stdout
    assert piped == generated[0]


def test_training_makes_what_is_missing_and_the_stages_agree(made: Place, place: Place):
    assert "corpus:" in made.output
    for name in ("corpus", "tokenizer", "pack"):
        place.run("pipeline.py", place.config, name)
    for path in made.runs.glob("mini/*/*"):
        ours = place.runs / path.relative_to(made.runs)
        if ours.is_file() and path.name != "log.txt":
            assert ours.read_bytes() == path.read_bytes(), path


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


def test_readme_names_only_what_is_there():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"`((?:configs|data|eval|tokenizer|tests|benchmarks)/[\w./]*)`", text):
        assert (ROOT / path).exists() or path in ("data/raw/", "configs/mine.py"), path
    for target in re.findall(r"^make (\w[\w-]*)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists() or (ROOT / module / "__main__.py").exists(), module
