"""Experiments. A config file sets one `experiment`; another file derives from it with `dataclasses.replace`."""

import dataclasses
import difflib
import operator
import os
import re
import runpy
import shlex
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import stage
import tokenizer
from cli import UserError, meant
from data.batches import Phase
from data.corpus import CorpusConfig
from data.pack import PackConfig
from data.sources import PythonDocs
from dpo.train import DPOConfig
from eval import EvalConfig
from finetune import TEXT
from lora import TARGETS
from model import ModelConfig
from sft.train import SFTConfig
from tokenizer import Tokenizer
from tokenizer.train import TokenizerConfig
from trainer import TrainConfig

INPUTS = {  # stages that a stage makes first if they are missing; none of them trains a model, which takes hours
    "corpus": (),
    "tokenizer": ("corpus",),
    "pack": ("corpus", "tokenizer"),
    "pretrain": ("pack",),
    "sft_data": ("tokenizer",),
    "sft": ("sft_data",),
    "dpo_data": ("tokenizer",),
    "dpo_reference": ("dpo_data",),
    "dpo": ("dpo_data", "dpo_reference"),
    "eval": (),
    "report": (),
}
DIRECTORIES = {name: "packed" if name == "pack" else name for name in INPUTS}
TRAINED = ("pretrain", "sft", "dpo")  # the stages that train, in order
SHARED = {  # stages that experiments can share: the settings that must be equal, and what must be shared with them
    "corpus": ("corpus", ""),
    "tokenizer": ("tokenizer", ""),
    "pack": ("pack", "corpus tokenizer"),
    "pretrain": ("pretrain model mixture", "corpus tokenizer pack"),
    "sft_data": ("sft.data model.context_length", "tokenizer"),
    "sft": ("sft", "pretrain"),
    "dpo_data": ("dpo.data sft.data.template model.context_length", "tokenizer"),
}


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Every stage of an experiment. Raises TypeError or ValueError, naming the field, for an impossible value."""

    name: str  # of its directory in runs/
    model: ModelConfig
    corpus: CorpusConfig
    tokenizer: TokenizerConfig
    pack: PackConfig
    pretrain: TrainConfig
    sft: SFTConfig = field(default_factory=SFTConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    # Stages whose directory is another experiment's: {"corpus": tiny, "tokenizer": tiny}. See SHARED.
    shared: Mapping[str, "Experiment"] = field(default_factory=dict, repr=False)
    # Phases of pretraining: the step where each starts, and the weight of each set; empty: all packed tokens.
    mixture: tuple[Phase, ...] = ()
    # Experiments whose packed tokens the mixture may name too; they share the tokenizer.
    beside: tuple["Experiment", ...] = field(default=(), repr=False)
    # The directory of a converted model (`convert.py from-hf`): training continues from its weights and, in tokenizer/,
    # its tokenizer. Its embedding may have more rows than the tokenizer has pieces.
    imported: Path | None = field(default=None, repr=False)
    # Usual ranges of numbers, such as {"pretrain.validation.bits_per_byte": (1.6, 1.7)}: the report marks a number
    # outside its range. A key is a stage, then a path in its part of results.json or in its manifest's counts.
    # A derived experiment does not inherit it.
    expected: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self):
        stage.check_types(self)
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", self.name):
            raise ValueError(f"name is {self.name!r}; expected letters, digits, _, - and .: it names a directory")
        sizes = self.model.vocab_size, self.tokenizer.vocab_size
        if self.imported is None and sizes[0] != sizes[1]:
            raise ValueError(f"model.vocab_size is {sizes[0]} and tokenizer.vocab_size {sizes[1]}; they must be equal")
        for adapter in (self.sft.lora, self.dpo.lora):
            if adapter and (unknown := set(adapter.targets) - set(TARGETS)):
                raise ValueError(f"targets names {min(unknown)!r}; TARGETS in lora.py has {', '.join(TARGETS)}")
        for name, other in self.shared.items():
            if name not in SHARED:
                raise ValueError(f"shared names {name!r}; expected one of {', '.join(SHARED)}")
            settings, needed = SHARED[name]
            for setting in settings.split():
                if operator.attrgetter(setting)(self) != operator.attrgetter(setting)(other):
                    raise ValueError(f"{name} is shared with {other.name}, but {setting} differs")
            for need in needed.split():
                if self.owner(need).name != other.owner(need).name:
                    raise ValueError(f"{name} is shared with {other.name}; share {needed} with it too")
        known = [source.name for source in (*self.corpus.sources, *self.beside)]
        if len(set(known)) < len(known):
            raise ValueError(f"sources and experiments beside are called {', '.join(known)}; give each its own name")
        for phase in self.mixture:
            if unknown := set(phase.weights) - set(known):
                raise ValueError(f"mixture names {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        starts = [phase.start for phase in self.mixture]
        if starts and (starts[0] != 0 or sorted(set(starts)) != starts):
            raise ValueError(f"mixture has phases from steps {starts}; expected 0 first, then rising steps")
        for key, usual in self.expected.items():
            if not stage.matches(usual, tuple[float, ...]) or len(usual) != 2 or usual[0] > usual[1]:
                raise ValueError(f"expected of {key!r} is {usual!r}; expected two numbers, the smaller one first")
            if key.partition(".")[0] not in DIRECTORIES or "." not in key:
                raise ValueError(f"expected names {key!r}; expected a stage and a number, such as 'sft.answers.loss'")

    @property
    def path(self) -> str:
        """The config file, quoted for a shell: for commands in messages."""
        return stage.CONFIGS.get(self.name, f"configs/{self.name}.py")

    def command(self, name: str) -> str:
        """What the user types to make a stage."""
        owner = self.owner(name)
        if owner.imported and name == "tokenizer":
            return f"python convert.py from-hf DIR {owner.imported}"
        return f"python train.py {owner.path}" if name == "pretrain" else f"python pipeline.py {owner.path} {name}"

    def owner(self, name: str) -> "Experiment":
        """The experiment that owns a stage's directory: this one, or the experiment that it shares the stage with."""
        if name == "sft_data" and name not in self.shared:
            return self.owner("sft")  # an experiment that shares a model also shares the data of that model
        return self.shared[name].owner(name) if name in self.shared else self

    def directory(self, name: str) -> Path:
        """Where a stage writes."""
        owner = self.owner(name)
        if owner.imported and name == "tokenizer":
            return owner.imported / "tokenizer"
        return stage.runs() / owner.name / DIRECTORIES[name]

    def inputs(self, name: str, force: bool = False) -> list[tuple["Experiment", str]]:
        """The stages that must be up to date before a stage, as (experiment, stage), in running order."""
        owner = self.owner(name)
        if name == "tokenizer" and owner.imported:
            return []  # it came with the model
        needed = [(owner, need) for need in INPUTS[name]]
        if name == "pretrain":
            needed += [(other, "pack") for other in owner.beside]
        if name == "sft" and TEXT in owner.sft.weights:
            needed.append((owner, "pack"))
        if name == "dpo" and owner.dpo.reference != "stored":
            needed.remove((owner, "dpo_reference"))
        # Finished data stays valid if its inputs are gone; inputs that still exist must match.
        is_data = name in ("tokenizer", "pack", "sft_data", "dpo_data")
        stands, order = is_data and not force and stage.read_manifest(owner.directory(name)), []
        for other, need in needed:
            if not stands or stage.read_manifest(other.directory(need)):
                order += [*other.inputs(need), (other.owner(need), need)]
        return order

    def following(self, name: str) -> str:
        """The commands to try after a stage; "" after the last."""
        later = [stage for stage in list(INPUTS)[list(INPUTS).index(name) + 1 :] if "_" not in stage]
        commands = [self.command(stage) for stage in later[:1]]
        if name in TRAINED:
            use = 'generate "The"' if name == "pretrain" else "chat"
            commands.append(f"python serve.py {self.path} {use}")
        # By default, SFT and DPO learn from Python's documentation: useless after the user's own text or chats.
        own_text = not isinstance(self.corpus.sources[0], PythonDocs)
        own_chats, own_pairs = self.sft.data != SFTConfig().data, self.dpo.data != DPOConfig().data
        useless = {"pretrain": own_text and not own_chats, "sft": own_chats and not own_pairs}
        if useless.get(name):
            del commands[0]
        return ", or ".join(commands)

    def load_tokenizer(self, checkpoint: Path | None = None) -> Tokenizer:
        """The experiment's tokenizer, or the one inside a converted checkpoint. UserError if missing or damaged."""
        if checkpoint and stage.read_manifest(checkpoint / "tokenizer"):
            return tokenizer.load(checkpoint / "tokenizer", f"python convert.py from-hf DIR {checkpoint}")
        return tokenizer.load(self.directory("tokenizer"), self.command("tokenizer"))

    def trained(self, name: str) -> Path:
        """A stage's final checkpoint. UserError, with the command that trains it, if there is none."""
        final = self.directory(name) / "final"
        if stage.read_manifest(final) is not None:
            return final
        if name == "pretrain" and (imported := self.owner("pretrain").imported):
            return imported
        raise UserError(f"{self.name} is not trained: no {final}; train it with: {self.command(name)}")

    def all_trained(self) -> dict[str, Path]:
        """The final checkpoints of all trained stages, in order. UserError if the model is not even pretrained."""
        finals = {"pretrain": self.trained("pretrain")}
        for name in ("sft", "dpo"):
            if stage.read_manifest(self.directory(name) / "final"):
                finals[name] = self.directory(name) / "final"
        return finals

    def latest(self) -> Path:
        """The final checkpoint of the latest trained stage. UserError if none is trained."""
        return list(self.all_trained().values())[-1]


def load(path: str | Path) -> Experiment:
    """Runs a config file and returns its experiment. UserError, in one line, if it is missing or wrong."""
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, os.listdir(stage.ROOT / "configs"), n=1, cutoff=0.75)
        hint = f"did you mean configs/{near[0]}?" if near else "see configs/"
        if (stage.ROOT / path).is_file():
            hint = f"run the command in {stage.ROOT}"
        raise UserError(f"no config at {path}; {hint}")
    try:
        names = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:  # the config is the user's code: any error is the user's to fix
        line = getattr(error, "lineno", "?")
        for frame in traceback.extract_tb(error.__traceback__):
            line = frame.lineno if frame.filename == str(path) else line
        raise UserError(f"{path}, line {line}: {_explain(error)}") from None
    experiment = names.get("experiment")
    if not isinstance(experiment, Experiment):
        raise UserError(f"{path} sets no experiment; expected a line experiment = Experiment(…)")
    stage.CONFIGS[experiment.name] = shlex.quote(str(path))
    for other in names.values():  # `replace` copies the other experiment's ranges
        if isinstance(other, Experiment) and other is not experiment and other.expected is experiment.expected:
            return dataclasses.replace(experiment, expected={})
    return experiment


def _explain(error: Exception) -> str:
    """An exception in a config, in words; for an unknown field, with the fields that exist."""
    if match := re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error)):
        for module in list(sys.modules.values()):
            if known := list(getattr(vars(module).get(match[1]), "__dataclass_fields__", ())):
                return f"{match[1]} has no field {match[2]!r}; {meant(match[2], known)}"
    text = str(error).replace(".__init__()", "")
    return text if isinstance(error, (TypeError, ValueError)) else f"{type(error).__name__}: {text}"
