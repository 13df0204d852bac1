"""Every shipped config loads; a mistaken one is explained in one line."""

import dataclasses
import re
from pathlib import Path

import pytest

import configs
from cli import UserError
from data.corpus import CorpusConfig
from data.sources import Files
from dpo.data import PairConfig
from dpo.pairs import Pairs
from dpo.train import DPOConfig
from sft.conversations import Chats
from sft.data import ConversationConfig
from sft.train import SFTConfig
from tests.conftest import MINI

NAMES = """
    alpaca alpaca_eval base base_web chat_mix demo dolly hh_harmless hh_rlhf micro micro_web oasst1 orca_dpo prose_micro
    prose_mini prose_tiny prose_tiny_epoch small small_web smollm2 tiny tiny_web tokenizer_web
"""
SHIPPED = NAMES.split()  # by name: configs/ also holds the user's own
# Whose pretrained and fine-tuned model an experiment uses, if not its own.
PRETRAINED = {"alpaca": "prose_tiny", "dolly": "prose_tiny", "alpaca_eval": "prose_mini", "hh_harmless": "prose_mini"}
PRETRAINED |= dict.fromkeys(("oasst1", "chat_mix", "hh_rlhf", "orca_dpo"), "tiny_web")
TUNED = {"hh_rlhf": "oasst1", "orca_dpo": "oasst1", "alpaca_eval": "prose_mini", "hh_harmless": "prose_mini"}
TOKENIZED = {"micro": "tiny", "small": "tiny", "base": "tiny", "prose_micro": "prose_tiny", "tiny_web": "tokenizer_web"}


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RUNS", "elsewhere")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_config_loads(name):
    experiment = configs.load(f"configs/{name}.py")
    assert experiment.name == name
    assert experiment.directory("pretrain") == Path("elsewhere") / PRETRAINED.get(name, name) / "pretrain"
    assert experiment.directory("sft") == Path("elsewhere") / TUNED.get(name, name) / "sft"
    assert experiment.directory("dpo") == Path("elsewhere") / name / "dpo"
    assert experiment.model.head_dim == 64
    if name in TOKENIZED:
        assert experiment.owner("tokenizer").name == TOKENIZED[name]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("n_layers=2", "n_layer=2", "ModelConfig has no field 'n_layer'; did you mean n_layers?"),
        ("min_chars=20),)", "min_chars=20),), lr=3", "CorpusConfig has no field 'lr'; there are sources"),
        ('name="mini",', "", "Experiment missing 1 required keyword-only argument: 'name'"),
        ("steps=24", "steps=24.5", "steps is 24.5 (float); expected int | None"),
        ("d_model=32", "d_model=33", "d_model is 33 and n_heads 2"),
        ("vocab_size=512, context", "vocab_size=513, context", "model.vocab_size is 513 and tokenizer.vocab_size 512"),
        ('("text.jsonl",)', '"text.jsonl"', "paths is 'text.jsonl' (str); expected tuple[str, ...]"),
        ('name="mini"', 'name="../mini"', "name is '../mini'; expected letters"),
        ("experiment =", "experimnt =", "sets no experiment"),
        ("n_layers=2", "n_layers=2 n_heads", "line 21: SyntaxError: invalid syntax"),
        ("n_layers=2", "n_layers=two", "NameError: name 'two' is not defined"),
        ("n_layers=2", "n_layers=2 + None", "line 21: unsupported operand"),
        ('name="mini"', "name='m', mixture=(Phase(start=0, weights={'x': 1}),)", "mixture names x; there are files"),
        ('name="mini"', "name='m', mixture=(Phase(start=5, weights={'files': 1}),)", "phases from steps [5]"),
        ('name="mini"', "name='m', mixture=(Phase(start=0, weights={'files': 0}),)", "expected a positive number"),
        ('name="mini"', "name='m', expected={'loss': (1.0, 2.0)}", "expected names 'loss'"),
        *(
            ('name="mini"', f"name='m', expected={{'sft.answers.loss': {usual}}}", f"is {usual}; expected two numbers")
            for usual in ("3.5", "(0, 1, 2)", "('a', 'b')", "(None, 9)", "(9, 1)")
        ),
    ],
)
def test_mistakes_are_explained(tmp_path, before, after, message):
    path = tmp_path / "wrong.py"
    assert before in MINI
    path.write_text(MINI.replace("\nfrom", "from data.batches import Phase\nfrom", 1).replace(before, after))
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))}.*{re.escape(message)}"):
        configs.load(path)


def test_a_missing_config_is_named_with_the_one_meant():
    with pytest.raises(UserError, match=r"no config at configs/tini.py; did you mean configs/tiny.py\?"):
        configs.load("configs/tini.py")


def vary(*shared: str, **changes) -> configs.Experiment:
    tiny = configs.load("configs/tiny.py")
    changed = {name: dataclasses.replace(getattr(tiny, name), **fields) for name, fields in changes.items()}
    return dataclasses.replace(tiny, name="b", shared=dict.fromkeys(shared, tiny), **changed)


TEXT = CorpusConfig(sources=(Files(paths=("a.txt",)),))
CHATS = SFTConfig(data=ConversationConfig(sources=(Chats(paths=("a.jsonl",)),)))
PAIRS = DPOConfig(data=PairConfig(sources=(Pairs(paths=("a.jsonl",)),)))


@pytest.mark.parametrize(
    ("changes", "stage", "commands"),
    [
        ({}, "corpus", ["pipeline.py {} tokenizer"]),
        ({}, "pretrain", ["pipeline.py {} sft", 'serve.py {} generate "The"']),
        ({"corpus": TEXT}, "pretrain", ['serve.py {} generate "The"']),
        ({"corpus": TEXT, "sft": CHATS}, "pretrain", ["pipeline.py {} sft", 'serve.py {} generate "The"']),
        ({"sft": CHATS}, "sft", ["serve.py {} chat"]),
        ({"sft": CHATS, "dpo": PAIRS}, "sft", ["pipeline.py {} dpo", "serve.py {} chat"]),
        ({}, "dpo", ["pipeline.py {} eval", "serve.py {} chat"]),
        ({}, "report", []),
    ],
)
def test_the_commands_proposed_next_suit_the_model(changes, stage, commands):
    """Not SFT on Python's documentation after the user's own text."""
    experiment = dataclasses.replace(configs.load("configs/demo.py"), **changes)
    assert experiment.following(stage) == ", or ".join(f"python {command}" for command in commands).replace(
        "{}", "configs/demo.py"
    )


def test_variants_of_a_fine_tuning_share_its_data():
    shared = {"corpus", "tokenizer", "pack", "pretrain", "sft_data", "dpo_data"}
    experiment = vary(*shared, sft={"lora": None})
    assert {name for name in configs.INPUTS if experiment.owner(name).name == "tiny"} == shared
    assert experiment.directory("sft_data") == Path("elsewhere/tiny/sft_data")
    assert experiment.command("sft_data") == "python pipeline.py configs/tiny.py sft_data"


@pytest.mark.parametrize(
    ("shared", "change", "message"),
    [
        (("pack",), {"pack": {"val_fraction": 0.2}}, "pack is shared with tiny, but pack differs"),
        (("pack",), {}, "share corpus tokenizer with it too"),
        (("dpo_data",), {}, "share tokenizer with it too"),
        (("sft",), {}, "share pretrain with it too"),
        (("tokenizer", "pretrain"), {}, "share corpus tokenizer pack with it too"),
        (("tokenizer", "dpo_data"), {"model": {"context_length": 512}}, "but model.context_length differs"),
        (("dpo",), {}, "shared names 'dpo'; expected one of corpus, "),
    ],
)
def test_what_is_shared_must_be_the_same(shared, change, message):
    with pytest.raises(ValueError, match=message):
        vary(*shared, **change)


def test_a_derived_experiment_does_not_inherit_the_expected_ranges(tmp_path):
    path = tmp_path / "mine.py"
    lines = ["from dataclasses import replace", "from configs.demo import experiment as demo"]
    path.write_text("\n".join([*lines, "experiment = replace(demo, name='mine')"]))
    assert configs.load("configs/demo.py").expected
    assert configs.load(path).expected == {}
