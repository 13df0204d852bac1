"""What there is: configs, commands, routes, files, tasks and numbers by name, so that no change loses one unnoticed.

    python -m tests.test_inventory    rewrites inventory.json from the code

The imports and the tables say where the code is. A change that moves code edits them, not the inventory.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import pkgutil
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch

import configs
import convert
import dpo.loss
import dpo.pairs
import eval.tasks
import lora
import pipeline
import serving.api
import serving.chat
import serving.served
import sft.conversations
import stage
import trainer
from data import sources
from sft.templates import TEMPLATES
from tests.conftest import ROOT, Place
from tests.eval.test_language import RAW
from tests.eval.test_main import evaluate, put
from tests.eval.test_tasks import RECORDS
from tests.test_configs import SHIPPED

WRITTEN = ROOT / "tests/inventory.json"
CONFIGS = """
    configs.Experiment model.ModelConfig data.corpus.CorpusConfig data.sources.Files data.sources.Hub
    data.sources.PythonDocs data.clean.Cleaning data.quality.Quality data.quality.C4 data.quality.Gopher
    data.dedup.Deduplication tokenizer.train.TokenizerConfig data.pack.PackConfig data.batches.Phase trainer.TrainConfig
    eval.EvalConfig sft.train.SFTConfig sft.data.ConversationConfig sft.conversations.Chats sft.conversations.HubChats
    sft.conversations.DocQuestions sft.filters.Filters lora.LoRAConfig dpo.train.DPOConfig dpo.data.PairConfig
    dpo.pairs.Pairs dpo.pairs.HubPairs dpo.pairs.DocPairs dpo.filters.PairFilters dpo.loss.LossConfig
"""
CLASSES = [pkgutil.resolve_name(name) for name in CONFIGS.split()]
COMMANDS = {  # how each is started: a file and, after it, the subcommand if there is one
    **{"pipeline": "pipeline.py", "download": "eval/download.py"},
    **{"compare": "eval/compare.py", "harness": "eval/harness.py"},
    **{"inspect": "data/inspect.py", "sft_inspect": "sft/inspect.py"},
    **{name: f"serve.py {name}" for name in ("generate", "chat", "api")},
    **{name: f"convert.py {name}" for name in ("to-hf", "from-hf", "to-gguf")},
}
NAMES = {  # that configs, requests and data may have in them
    "conversations": sft.conversations.FORMATS,
    "pairs": dpo.pairs.FORMATS,
    "text files": sources.Files.formats,
    "record files": sources.FileRecords.formats,
    "compressed": list(sources.OPEN),
    "stages": pipeline.NAMES,
    "templates": {name: hashlib.sha256(form.jinja.encode()).hexdigest() for name, form in TEMPLATES.items()},
    "training": {name: list(values) for name, values in trainer.CHOICES.items()},
    "LoRA targets": lora.TARGETS,
    "DPO losses": list(dpo.loss.LOSSES),
    "tasks": list(eval.tasks.METRICS),
    "chat commands": serving.chat.COMMANDS.split(),
    "server metrics": re.findall(r'"(lumi_\w+)"', (ROOT / "serving/api.py").read_text()),
    "shipped configs": SHIPPED,
}


def fields(config: type) -> dict:
    """The fields of a config and their defaults."""
    found = {}
    for field in dataclasses.fields(config):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        found[field.name] = "required" if default is dataclasses.MISSING else stage.describe(default)
    return found


def switches(command: str) -> dict:
    """The switches and arguments of a command and its subcommand, from the parser that it builds when it is run."""
    (file, *subcommand), parsers, found = command.split(), [], {}

    def stop(parser, *_):
        parsers.append(parser)
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        with pytest.raises(InterruptedError):
            runpy.run_path(str(ROOT / file), run_name="__main__")
    for parser in parsers:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                assert sorted(action.choices) == sorted(c.split()[1] for c in COMMANDS.values() if c.startswith(file))
                parsers.append(action.choices[subcommand[0]])
            elif not isinstance(action, argparse._HelpAction):
                about = {"default": action.default, "choices": action.choices, "nargs": action.nargs}
                if action.dest == "workers":
                    del about["default"]  # the cores of this machine
                kept = {key: value for key, value in about.items() if value not in (None, argparse.SUPPRESS)}
                found.setdefault(" ".join(action.option_strings) or action.dest, {}).update(kept)
    return found


def server(place: Place) -> dict:
    """The routes with their methods, and the OpenAPI schema without its prose."""
    app = serving.api.create_app(serving.served.load(configs.load(place.config), None), None)
    prose = ("title", "description", "summary", "operationId")

    def plain(object: dict) -> dict:
        return {key: value for key, value in object.items() if key not in prose or not isinstance(value, str)}

    schema = json.loads(json.dumps(app.openapi()), object_hook=plain)
    routes = sorted(f"{method} {route.path}" for route in app.routes for method in route.methods)
    return {"routes": routes, "paths": schema["paths"], "schemas": schema["components"]["schemas"]}


def shape(value, name: str = ""):
    """The keys of nested objects and the types of what is in them; of tensors also the size."""
    if isinstance(value, dict):
        if value.get("type") in [config.__name__ for config in CLASSES]:
            return value["type"]
        if name == "wrote":  # digests
            return sorted(value)
        if name == "code":  # digests of whatever files make the stage
            return "object"
        many = len(value) > 200 or (value and all(isinstance(key, int) for key in value))
        return {"*": shape(max(value.items())[1])} if many else {key: shape(each, key) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [shape(value[0])] if value and isinstance(value[0], dict) else "list"
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return value if name == "dtype" else type(value).__name__


def content(path: Path):
    """What a file holds: keys and types, headings, or the digest of integers, which are the same everywhere."""
    if path.suffix == ".json":
        return shape(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return {k: each for line in path.read_text().splitlines() for k, each in shape(json.loads(line)).items()}
    if path.suffix == ".pt":
        return shape(torch.load(path, weights_only=True))
    if path.suffix == ".md":
        return re.findall(r"^#+ (.*)", path.read_text(), re.MULTILINE)
    if path.suffix in (".bin", ".idx", ".mask", ".rows"):
        return f"sha256 {stage.sha256(path)}"
    return f"{path.stat().st_size} bytes" if path.suffix == ".logp" else ""


def files(directory: Path) -> dict:
    """What each file of a directory holds; of the checkpoints after so many steps one stands for all."""
    found = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        name = re.sub(r"step_\d+", "step_N", path.relative_to(directory).as_posix())
        if name not in found:
            found[name] = content(path)
    return found


def generate(place: Place) -> dict:
    """The inventory. place: an experiment of which every stage is trained; evaluation and report are added to it."""
    put(place, *RECORDS)
    (place.raw / "wikitext-2").mkdir()
    (place.raw / "wikitext-2/wiki.test.raw").write_text(RAW)
    evaluate(place)
    place.run("pipeline.py", place.config, "report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNS", str(place.runs))
        to_hf = convert.arguments().parse_args(["to-hf", str(place.config), str(place.path / "converted")])
        to_hf.command(to_hf)
        found = {
            "configs": {config.__name__: fields(config) for config in CLASSES},
            "commands": {name: switches(command) for name, command in COMMANDS.items()},
            "names": NAMES,
            "server": server(place),
            "run": files(place.runs / "mini"),
            "converted": files(place.path / "converted"),
        }
    return json.loads(json.dumps(found, default=str))


def test_nothing_is_lost(preferring: Place, tmp_path: Path):
    now = generate(Place(shutil.copytree(preferring.path, tmp_path, dirs_exist_ok=True)))
    if "WRITE_INVENTORY" in os.environ:
        WRITTEN.write_text(json.dumps(now, indent=1, ensure_ascii=False) + "\n")
    found = list(stage.differences(json.loads(WRITTEN.read_text()), now))
    assert not found, "\n".join(["if it is meant so: python -m tests.test_inventory", *found])


if __name__ == "__main__":
    os.environ["WRITE_INVENTORY"] = "1"
    os.execv(sys.executable, [sys.executable, "-m", "pytest", __file__])
