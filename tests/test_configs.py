"""Every shipped config loads; a mistaken one is explained in one line."""

from pathlib import Path

import pytest

import configs
from cli import UserError
from tests.conftest import MINI, ROOT

SHIPPED = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem != "__init__")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_config_loads(name, monkeypatch):
    monkeypatch.delenv("RUNS", raising=False)
    experiment = configs.load(f"configs/{name}.py")
    assert experiment.name == name
    owners = {"alpaca": "prose_tiny", "dolly": "prose_tiny", "oasst1": "tiny_web", "chat_mix": "tiny_web"}
    owners |= {"hh_rlhf": "tiny_web", "orca_dpo": "tiny_web", "alpaca_eval": "prose_mini", "hh_harmless": "prose_mini"}
    tuned = {"hh_rlhf": "oasst1", "orca_dpo": "oasst1", "alpaca_eval": "prose_mini", "hh_harmless": "prose_mini"}
    assert experiment.directory("pretrain") == Path("runs") / owners.get(name, name) / "pretrain"
    assert experiment.directory("sft") == Path("runs") / tuned.get(name, name) / "sft"
    assert experiment.directory("sft_data") == Path("runs") / tuned.get(name, name) / "sft_data"
    assert experiment.directory("dpo") == Path("runs") / name / "dpo"
    assert experiment.model.head_dim == 64


def test_the_five_sizes_are_there():
    assert {"demo", "micro", "tiny", "small", "base"} <= set(SHIPPED)


def test_web_recipes_are_as_large_as_they_say(monkeypatch):
    monkeypatch.setenv("RUNS", "elsewhere")
    for name, millions in {"micro_web": 200, "tiny_web": 600, "small_web": 1_800, "tokenizer_web": 100}.items():
        experiment = configs.load(f"configs/{name}.py")
        assert sum(source.max_tokens for source in experiment.corpus.sources) == millions * 1_000_000
        assert {source.dataset for source in experiment.corpus.sources} == {
            "allenai/c4",
            "sedthh/gutenberg_english",
            "HuggingFaceFW/fineweb-edu",
            "wikimedia/wikipedia",
        }
        assert experiment.directory("tokenizer") == Path("elsewhere/tokenizer_web/tokenizer")


def test_base_web_has_two_phases_of_one_and_a_half_billion():
    experiment = configs.load("configs/base_web.py")
    first, second = experiment.mixture
    batch = experiment.pretrain.batch_size * experiment.model.context_length
    assert first.start == 0
    assert second.start * batch == pytest.approx(1.5e9, rel=1e-3)
    assert (experiment.pretrain.steps - second.start) * batch == pytest.approx(1.5e9, rel=1e-3)
    assert set(second.weights) - set(first.weights) == {"c4"}
    for source in experiment.corpus.sources:  # enough of each for one pass
        share = sum(1.5e9 / len(phase.weights) for phase in experiment.mixture if source.name in phase.weights)
        assert source.max_tokens * 0.95 >= share


def test_prose_sizes_share_their_data(monkeypatch):
    monkeypatch.setenv("RUNS", "elsewhere")
    experiment = configs.load("configs/prose_micro.py")
    for stage_name in ("corpus", "tokenizer", "pack"):
        assert experiment.owner(stage_name).name == "prose_tiny"


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ("(Phase(start=0, weights={'x': 1}),)", "mixture names x; there are files"),
        ("(Phase(start=5, weights={'files': 1}),)", "mixture has phases from steps [5]; expected 0 first"),
        ("(Phase(start=0, weights={'files': 0}),)", "expected a positive number"),
    ],
)
def test_mistaken_mixtures_are_explained(tmp_path, mixture, message):
    path = tmp_path / "wrong.py"
    text = MINI.replace("experiment = Experiment(", f"experiment = Experiment(mixture={mixture},")
    path.write_text("from data.batches import Phase\n" + text)
    with pytest.raises(UserError) as error:
        configs.load(path)
    assert message in str(error.value)


def test_sizes_share_one_tokenizer(monkeypatch):
    monkeypatch.setenv("RUNS", "elsewhere")
    for name in ("micro", "small", "base"):
        assert configs.load(f"configs/{name}.py").directory("tokenizer") == Path("elsewhere/tiny/tokenizer")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("n_layers=2", "n_layer=2", "ModelConfig has no field 'n_layer'; did you mean n_layers?"),
        ("steps=24", "step=24", "TrainConfig has no field 'step'; did you mean steps?"),
        ('name="mini",', "", "Experiment missing 1 required keyword-only argument: 'name'"),
        ("n_layers=2", 'n_layers="2"', "n_layers is '2' (str); expected int"),
        ("steps=24", "steps=24.5", "steps is 24.5 (float); expected int | None"),
        ("d_model=32", "d_model=33", "d_model is 33 and n_heads 2"),
        ("val_fraction=0.1", "val_fraction=1.5", "val_fraction is 1.5; expected"),
        ("vocab_size=512, context", "vocab_size=513, context", "model.vocab_size is 513 and tokenizer.vocab_size 512"),
        ('"text.jsonl",', "3,", "paths is (3,) (tuple); expected tuple[str, ...]"),
        ('("text.jsonl",)', '"text.jsonl"', "paths is 'text.jsonl' (str); expected tuple[str, ...]"),
        ('name="mini"', 'name="../mini"', "name is '../mini'; expected letters"),
        ("experiment =", "experimnt =", "sets no experiment"),
        ("n_layers=2", "n_layers=2 n_heads", "invalid syntax"),
        ("n_layers=2", "n_layers=two", "NameError: name 'two' is not defined"),
    ],
)
def test_mistakes_are_explained(tmp_path, before, after, message):
    path = tmp_path / "wrong.py"
    assert before in MINI
    path.write_text(MINI.replace(before, after))
    with pytest.raises(UserError) as error:
        configs.load(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_the_line_of_a_mistake_is_named(tmp_path):
    path = tmp_path / "wrong.py"
    path.write_text("x = 1\ny = x + None\n")
    with pytest.raises(UserError, match=r"wrong.py, line 2: unsupported operand"):
        configs.load(path)


def test_a_missing_config_is_named_with_the_one_meant():
    with pytest.raises(UserError, match=r"no config at configs/tini.py; did you mean configs/tiny.py\?"):
        configs.load("configs/tini.py")


def test_what_is_shared_must_be_the_same(tmp_path):
    path = tmp_path / "other.py"
    path.write_text(
        "from dataclasses import replace\nfrom configs.small import experiment as small\n"
        "experiment = replace(small, name='other', pack=replace(small.pack, val_fraction=0.2))\n"
    )
    with pytest.raises(UserError, match="pack is shared with tiny, but differs"):
        configs.load(path)
