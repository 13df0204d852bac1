"""Experiments. One experiment is one file, which sets `experiment`; another derives from it with `dataclasses.replace`.

    >>> configs.load("configs/tiny.py").model.d_model
    256

A config is a program of the user's own: loading it runs it.
"""

import dataclasses
import difflib
import re
import runpy
import shlex
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import finetune
import stage
import tokenizer
from cli import UserError
from data.batches import Phase
from data.clean import Cleaning
from data.corpus import CorpusConfig
from data.dedup import Deduplication
from data.pack import PackConfig
from data.quality import C4, Gopher, Quality
from data.sources import Files, Hub, PythonDocs
from dpo.data import PairConfig
from dpo.filters import PairFilters
from dpo.loss import LossConfig
from dpo.pairs import DocPairs, HubPairs, Pairs
from dpo.train import DPOConfig
from eval import EvalConfig
from lora import TARGETS, LoRAConfig
from model import ModelConfig
from sft.conversations import Chats, DocQuestions, HubChats
from sft.data import ConversationConfig
from sft.filters import Filters
from sft.train import SFTConfig
from tokenizer import Tokenizer
from tokenizer.train import TokenizerConfig
from trainer import TrainConfig

DIRECTORIES = {"corpus": "corpus", "tokenizer": "tokenizer", "pack": "packed", "pretrain": "pretrain"}
DIRECTORIES |= {name: name for name in ("sft_data", "sft", "dpo_data", "dpo_reference", "dpo", "eval")}
TRAINED = ("pretrain", "sft", "dpo")  # the stages that train, in order
SHARED = ("corpus", "tokenizer", "pack", "pretrain", "sft")
INPUTS = {  # what a stage makes first if it is missing; a trained model takes hours and is never made this way
    "tokenizer": ("corpus",),
    "pack": ("corpus", "tokenizer"),
    "pretrain": ("pack",),
    "sft_data": ("tokenizer",),
    "sft": ("sft_data",),
    "dpo_data": ("tokenizer",),
    "dpo_reference": ("dpo_data",),
    "dpo": ("dpo_data", "dpo_reference"),
}


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Every stage of one experiment. Raises TypeError or ValueError, naming the field, for what cannot be."""

    name: str
    """Its directory under runs/."""
    model: ModelConfig
    corpus: CorpusConfig
    tokenizer: TokenizerConfig
    pack: PackConfig
    pretrain: TrainConfig
    sft: SFTConfig = field(default_factory=SFTConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    shared: Mapping[str, "Experiment"] = field(default_factory=dict, repr=False)
    """Stages (corpus, tokenizer, pack, pretrain, sft) whose directory is another experiment's: for sizes that are to be
    compared, or to fine-tune one model in several ways."""
    mixture: tuple[Phase, ...] = ()
    """What training batches are drawn from, by weight and from which step on; empty: all of the packed tokens."""
    beside: tuple["Experiment", ...] = field(default=(), repr=False)
    """Experiments whose packed tokens the mixture may name too; they share the tokenizer."""
    imported: Path | None = field(default=None, repr=False)
    """The directory of a converted model (`convert.py from-hf`): training goes on from its weights and, in
    `tokenizer/`, its tokenizer. Its embedding may have more rows than the tokenizer has pieces."""
    file: Path | None = field(default=None, repr=False)
    """Where `load` found it."""

    def __post_init__(self):
        stage.check_types(self)
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", self.name):
            raise ValueError(f"name is {self.name!r}; expected letters, digits, _, - and .: it names a directory")
        if self.imported is None and self.model.vocab_size != self.tokenizer.vocab_size:
            raise ValueError(
                f"model.vocab_size is {self.model.vocab_size} and tokenizer.vocab_size {self.tokenizer.vocab_size}; "
                "they must be equal"
            )
        for stage_name, other in self.shared.items():
            if stage_name not in SHARED:
                raise ValueError(f"shared names {stage_name!r}; expected one of {', '.join(SHARED)}")
            if getattr(self, stage_name) != getattr(other, stage_name):
                raise ValueError(f"{stage_name} is shared with {other.name}, but differs from its {stage_name}")
        if other := self.shared.get("pretrain"):
            if (self.model, self.mixture) != (other.model, other.mixture):
                raise ValueError(f"pretrain is shared with {other.name}, but model or mixture differ from its")
            if lacks := [name for name in SHARED[:3] if self.owner(name).name != other.owner(name).name]:
                raise ValueError(f"pretrain is shared with {other.name}; share {', '.join(lacks)} with it too")
        if (other := self.shared.get("sft")) and self.owner("pretrain").name != other.owner("pretrain").name:
            raise ValueError(f"sft is shared with {other.name}; share pretrain with it too")

        known = [*(source.name for source in self.corpus.sources), *(other.name for other in self.beside)]
        if len(set(known)) < len(known):
            raise ValueError(f"sources and experiments beside are called {', '.join(known)}; give each its own name")
        for phase in self.mixture:
            if unknown := set(phase.weights) - set(known):
                raise ValueError(f"mixture names {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        starts = [phase.start for phase in self.mixture]
        if starts and (starts[0] != 0 or sorted(set(starts)) != starts):
            raise ValueError(f"mixture has phases from steps {starts}; expected 0 first, then later and later ones")

    @property
    def path(self) -> str:
        """The config file, as a shell reads it: for commands in messages."""
        return shlex.quote(str(self.file or Path("configs") / f"{self.name}.py"))

    def command(self, stage_name: str) -> str:
        """What the user types to make a stage."""
        owner = self.owner(stage_name)
        if owner.imported and stage_name == "tokenizer":
            return f"python convert.py from-hf DIR {owner.imported}"
        if stage_name == "pretrain":
            return f"python train.py {owner.path}"
        return f"python pipeline.py {owner.path} {stage_name}"

    def owner(self, stage_name: str) -> "Experiment":
        """The experiment whose directory a stage's is: itself, or the one it shares, of sft with its data."""
        stage_name = "sft" if stage_name == "sft_data" else stage_name
        return self.shared[stage_name].owner(stage_name) if stage_name in self.shared else self

    def directory(self, stage_name: str) -> Path:
        """Where a stage writes."""
        owner = self.owner(stage_name)
        if owner.imported and stage_name == "tokenizer":
            return owner.imported / "tokenizer"
        return stage.runs() / owner.name / DIRECTORIES[stage_name]

    def inputs(self, stage_name: str, force: bool = False) -> list[tuple["Experiment", str]]:
        """The stages that a stage makes first if they are missing, each with the experiment it belongs to.

        A finished stage of data stands without its inputs, unless it is made again by force: then only those that are
        still there are named, because they must still match.
        """
        owner = self.owner(stage_name)
        if stage_name == "tokenizer" and owner.imported:
            return []  # it came with the model
        needed = [(owner, name) for name in INPUTS.get(stage_name, ())]
        if stage_name == "pretrain":
            needed += [(other, "pack") for other in owner.beside]
        if stage_name == "dpo" and owner.dpo.reference != "stored":
            needed.remove((owner, "dpo_reference"))
        stands = stage_name in ("tokenizer", "pack", "sft_data", "dpo_data") and not force
        if not stands or stage.read_manifest(owner.directory(stage_name)) is None:
            return needed
        return [(other, name) for other, name in needed if stage.read_manifest(other.directory(name)) is not None]

    def load_tokenizer(self, checkpoint: Path | None = None) -> Tokenizer:
        """The experiment's tokenizer, or the one that a checkpoint brings with it, as a converted model does.
        UserError, with the command that makes it, if it is missing or damaged."""
        if checkpoint and stage.read_manifest(checkpoint / "tokenizer"):
            return tokenizer.load(checkpoint / "tokenizer", f"python convert.py from-hf DIR {checkpoint}")
        return tokenizer.load(self.directory("tokenizer"), self.command("tokenizer"))

    def trained(self, stage_name: str) -> Path:
        """A stage's final checkpoint. UserError, with the command that trains it, while there is none."""
        final = self.directory(stage_name) / "final"
        if stage.read_manifest(final) is None:
            if stage_name == "pretrain" and (imported := self.owner("pretrain").imported):
                return imported
            raise UserError(f"{self.name} is not trained: no {final}; train it with: {self.command(stage_name)}")
        return final

    def all_trained(self) -> dict[str, Path]:
        """The final checkpoints of the stages that are trained, in order. UserError while not even the first is."""
        later = [name for name in TRAINED if stage.read_manifest(self.directory(name) / "final") is not None]
        return {name: self.trained(name) for name in dict.fromkeys(["pretrain", *later])}

    def latest(self) -> Path:
        """The final checkpoint of the latest stage that is trained. UserError while none is."""
        return list(self.all_trained().values())[-1]


CONFIGS = (
    *(Experiment, ModelConfig, CorpusConfig, Files, Hub, PythonDocs, Cleaning, Quality, C4, Gopher, Deduplication),
    *(TokenizerConfig, PackConfig, Phase, TrainConfig, EvalConfig),
    *(SFTConfig, ConversationConfig, Chats, HubChats, DocQuestions, Filters, LoRAConfig),
    *(DPOConfig, PairConfig, Pairs, HubPairs, DocPairs, PairFilters, LossConfig),
)


def load(path: str | Path) -> Experiment:
    """The experiment that a config file describes. UserError, in one line, for a file that is missing or mistaken."""
    path = Path(path)
    if not path.is_file():
        there = sorted(p.as_posix() for p in Path("configs").glob("*.py") if p.name != "__init__.py")
        raise UserError(f"no config at {path}; {_meant(path.as_posix(), there)}")
    try:
        found = runpy.run_path(str(path)).get("experiment")
    except (Exception, SystemExit) as error:  # a config is the user's own code: whatever it raises is theirs to mend
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        line = frames[-1].lineno if frames else getattr(error, "lineno", "?")
        raise UserError(f"{path}, line {line}: {_explain(error)}") from None
    if not isinstance(found, Experiment):
        raise UserError(f"{path} sets no experiment; expected a line experiment = Experiment(…)")
    for adapter in (found.sft.lora, found.dpo.lora):
        if adapter and not set(adapter.targets) <= set(TARGETS):  # others matter only when the adapter is trained
            finetune.check_targets(found.model, adapter)
    return dataclasses.replace(found, file=path)


def _explain(error: Exception) -> str:
    """An exception in a config, in words; for a misspelt field, with the one that was meant."""
    if match := re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error)):
        name, field_name = match.groups()
        known = [f.name for cls in CONFIGS if cls.__name__ == name for f in dataclasses.fields(cls)]
        return f"{name} has no field {field_name!r}; {_meant(field_name, known)}"
    if isinstance(error, (TypeError, ValueError)):
        return str(error).replace(".__init__()", "")
    return f"{type(error).__name__}: {error}"


def _meant(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
