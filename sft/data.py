"""Conversations to rows of tokens: read, judged, spelt by the template, packed.

    python pipeline.py configs/tiny.py sft_data   ->  runs/tiny/sft_data

For each split: `train.bin` holds the ids of one conversation after another, little-endian uint16 (uint32 past 65,536
pieces), `train.mask` a byte for each, 1 where it is trained; `train.idx` where each conversation starts, in tokens, and
`train.rows` the first conversation of each row, both int64 and both with the end of the last one behind; `train.txt` a
line for each conversation: where it came from.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import stage
import tokenizer
from cli import UserError, log, progress
from data.batches import Shuffled
from data.corpus import held_out
from data.pack import SPLITS
from data.sources import Records, Unreadable
from sft.conversations import DocQuestions
from sft.filters import Filters, Judge
from sft.packing import best_fit
from sft.templates import TEMPLATES, render
from stage import Stage, check_types
from tokenizer import Tokenizer

IGNORED = -100  # the target of a position that is not trained


@dataclass(frozen=True, kw_only=True)
class ConversationConfig:
    """What is learnt in fine-tuning. Raises TypeError or ValueError, naming the field, for what cannot be."""

    sources: tuple[Records, ...] = (DocQuestions(),)
    """Chats, HubChats, DocQuestions."""
    template: str = "chatml"
    """How a conversation is spelt: "chatml", "instruct" or "alpaca"."""
    filters: Filters = Filters()
    too_long: str = "cut"
    """A conversation longer than the context: "cut" at its end, which is then no end of an answer, or "drop"."""
    val_fraction: float = 0.05
    """Share of the conversations held out, each decided by the hash of its first question."""

    def __post_init__(self):
        check_types(self)
        names = [source.name for source in self.sources]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"sources are called {', '.join(names) or 'nothing'}; expected one or more, each named")
        if wrong := [source.name for source in self.sources if not hasattr(source, "conversations")]:
            raise ValueError(f"sources has {', '.join(wrong)}; expected Chats, HubChats or DocQuestions")
        if self.template not in TEMPLATES:
            raise ValueError(f"template is {self.template!r}; expected one of {', '.join(TEMPLATES)}")
        if self.too_long not in ("cut", "drop"):
            raise ValueError(f'too_long is {self.too_long!r}; expected "cut" or "drop"')
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction is {self.val_fraction}; expected more than 0 and less than 1")


# ------------------------------------------------------------------------------------------------------------- reading


class Split:
    """What one source gives to a split, as it is gathered: ids, mask and origin of each conversation."""

    def __init__(self):
        self.ids: list[np.ndarray] = []
        self.masks: list[np.ndarray] = []
        self.origins: list[str] = []


def fitted(ids: list[int], trained: list[bool], context: int, too_long: str) -> tuple[list[int], list[bool]] | str:
    """A conversation as a row can hold it: up to its last trained id, at most context + 1 of them, for the last one is
    only predicted. Or why it is dropped."""
    end = len(trained) - trained[::-1].index(True)
    if end > context + 1:
        end = context + 1
        if too_long == "drop" or not any(trained[:end]):
            return "longer_than_context"
    return ids[:end], trained[:end]


def gather(
    config: ConversationConfig, spm: Tokenizer, context: int, directory: Path, workers: int
) -> tuple[dict, dict]:
    """The conversations that are kept, {split: {source: Split}}, and by source what was read and dropped. directory:
    for what does not stay."""
    dtype = "<u2" if spm.vocab_size <= 1 << 16 else "<u4"
    found: dict[str, dict[str, Split]] = {split: {} for split in SPLITS}
    tallies = {}
    with Judge(config.filters, directory) as judge:
        for source in config.sources:
            splits = {split: found[split].setdefault(source.name, Split()) for split in SPLITS}
            counts = Counter(read=0, kept=0, cut=0, tokens=0)
            dropped = Counter()
            most = getattr(source, "max_tokens", None) or math.inf
            for conversation in progress(source.conversations(workers), 0, "conversations", source.name):
                counts["read"] += 1
                if isinstance(conversation, Unreadable):
                    dropped["unreadable"] += 1
                    log.debug(str(conversation))
                    continue
                whole = render(config.template, conversation.messages, spm)
                fits = fitted(*whole, context, config.too_long)
                # What does not fit is not remembered: a later copy may be shorter.
                if rule := fits if isinstance(fits, str) else judge.rule(conversation):
                    dropped[rule] += 1
                    continue
                ids, trained = fits
                counts.update(kept=1, tokens=len(ids), cut=sum(whole[1]) > sum(trained))
                split = splits["val" if held_out(conversation.key.encode(), config.val_fraction) else "train"]
                split.ids.append(np.array(ids, dtype=dtype))
                split.masks.append(np.array(trained, dtype=np.uint8))
                split.origins.append(conversation.id)
                if counts["tokens"] >= most:
                    break
            tallies[source.name] = {**counts, "dropped": dict(sorted(dropped.items()))}
    return found, tallies


def write(directory: Path, name: str, splits: Mapping[str, Split], context: int) -> dict:
    """Packs one split, source by source, and writes its five files. Returns its counts."""
    counts = {"conversations": 0, "tokens": 0, "trained": 0, "rows": 0, "sources": {}}
    starts, firsts, used = [0], [0], 0
    with (
        open(directory / f"{name}.bin", "wb") as tokens,
        open(directory / f"{name}.mask", "wb") as masks,
        open(directory / f"{name}.txt", "w", encoding="utf-8") as origins,
    ):
        for source, split in splits.items():
            rows = best_fit([len(ids) - 1 for ids in split.ids], context)
            counts["sources"][source] = {"row": counts["rows"], "rows": len(rows)}
            counts["rows"] += len(rows)
            for row in rows:
                for i in row:
                    split.ids[i].tofile(tokens)
                    split.masks[i].tofile(masks)
                    origins.write(" ".join(split.origins[i].split()) + "\n")
                    starts.append(starts[-1] + len(split.ids[i]))
                    used += len(split.ids[i]) - 1
                firsts.append(firsts[-1] + len(row))
            counts["conversations"] += len(split.ids)
            counts["trained"] += int(sum(mask.sum() for mask in split.masks))
    np.array(starts, dtype="<i8").tofile(directory / f"{name}.idx")
    np.array(firsts, dtype="<i8").tofile(directory / f"{name}.rows")
    counts["tokens"] = starts[-1]
    return counts | {"packing_efficiency": used / (counts["rows"] * context) if counts["rows"] else 0.0}


def inputs(sources: Sequence[Records], spm: Path, directory: Path) -> dict[str, str]:
    """The digests of sources and tokenizer. None, if the directory is finished and the sources have been moved away:
    what was made from them stays valid."""
    try:
        read = {path: digest for source in sources for path, digest in source.inputs().items()}
    except UserError:
        if stage.read_manifest(directory) is None:
            raise
        return {}
    return read | {k: v for k, v in stage.outputs(spm).items() if k.endswith("spm.model")}


def job(config: ConversationConfig, context: int, spm: Path, directory: Path, command: str) -> Stage:
    """The stage that makes rows of `context` tokens. spm: the tokenizer's directory. command: what the user types."""
    read = inputs(config.sources, spm, directory)
    settings = {"sft_data": config, "context_length": context}
    return Stage(directory, settings, read, command, __file__)


def build(
    job: Stage, config: ConversationConfig, context: int, spm: Path, workers: int = 1, force: bool = False
) -> None:
    """Makes the rows of conversations, unless they are there."""
    directory = job.directory
    if job.up_to_date(force):
        return
    spm = tokenizer.load(spm)
    with job.making():
        found, tallies = gather(config, spm, context, directory, workers)
        for name, tally in tallies.items():
            dropped = ", ".join(f"{n:,} {rule}" for rule, n in tally["dropped"].items()) or "none"
            cut = f"; {tally['cut']:,} cut at {context:,} tokens" * (tally["cut"] > 0)
            log.info(f"{name}: {tally['kept']:,} of {tally['read']:,} conversations kept (dropped: {dropped}){cut}")
        for split in SPLITS:
            if not sum(len(each.ids) for each in found[split].values()):
                read, kept = (sum(tally[key] for tally in tallies.values()) for key in ("read", "kept"))
                raise UserError(
                    f"of {read:,} conversations {kept:,} were kept, and none is left for {split} at val_fraction = "
                    f"{config.val_fraction}: it takes two at least that begin differently, better hundreds; add some, "
                    "or change val_fraction or what drops the others"
                )
        counts = {split: write(directory, split, found[split], context) for split in SPLITS}
        train = counts["train"]
        dtype = "<u2" if spm.vocab_size <= 1 << 16 else "<u4"
        about = {"packing_efficiency": train["packing_efficiency"], "dtype": dtype, "sources": tallies}
        job.finish(about | counts)
        log.info(
            f"sft_data: {train['conversations']:,} training and {counts['val']['conversations']:,} validation "
            f"conversations, {train['tokens']:,} and {counts['val']['tokens']:,} tokens, in rows of {context:,}, "
            f"{train['packing_efficiency']:.2%} of them used -> {directory}"
        )


# ------------------------------------------------------------------------------------------------------------- batches


class Rows(Shuffled):
    """Packed conversations of one split, or of one source of it; each epoch sees every row once, in an order of its
    own.

    tokens, trained: memory maps. starts: where each conversation starts. firsts: each row's first conversation. first,
    count: which rows are meant.
    """

    holds = "conversations"

    def __init__(self, directory: Path, split: str, counts: dict, context: int, seed: int = 0, source: str = ""):
        self.file, self.length = str(directory / f"{split}.bin"), context
        self.tokens = np.memmap(directory / f"{split}.bin", dtype=counts["dtype"], mode="r")
        self.trained = np.memmap(directory / f"{split}.mask", dtype=np.uint8, mode="r")
        self.starts = np.fromfile(directory / f"{split}.idx", dtype="<i8")
        self.firsts = np.fromfile(directory / f"{split}.rows", dtype="<i8")
        self.origins = directory / f"{split}.txt"
        part = counts[split]["sources"][source] if source else {"row": 0, "rows": counts[split]["rows"]}
        self.first = part["row"]
        super().__init__(part["rows"], seed)

    def conversations(self, row: int) -> range:
        """The conversations of a row, by their numbers in the split."""
        return range(int(self.firsts[self.first + row]), int(self.firsts[self.first + row + 1]))

    documents = conversations

    def conversation(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask of one."""
        own = slice(self.starts[number], self.starts[number + 1])
        return self.tokens[own].astype(np.int64), self.trained[own].astype(bool)

    def read(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, targets and positions of rows, (rows, length) int64 each.

        A conversation's targets are its ids moved on by one: that shift happens here, and nowhere else. −100 stands
        where the next id is not trained, and behind the last conversation, where a filling is a text of its own.
        """
        inputs = np.zeros((len(rows), self.length), dtype=np.int64)
        targets = np.full((len(rows), self.length), IGNORED)
        positions = np.zeros((len(rows), self.length), dtype=np.int64)
        for i, row in enumerate(rows):
            at = 0
            for number in self.conversations(row):
                ids, trained = self.conversation(number)
                end = at + len(ids) - 1
                inputs[i, at:end] = ids[:-1]
                targets[i, at:end] = np.where(trained[1:], ids[1:], IGNORED)
                positions[i, at:end] = np.arange(len(ids) - 1)
                at = end
            positions[i, at:] = np.arange(self.length - at)
        return torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(positions)


def load(directory: Path, tokenizer_sha256: str) -> dict:
    """The counts of a finished directory, its files checked. UserError if it is missing, damaged, or
    was made with another tokenizer."""
    manifest = stage.finished(directory)
    if tokenizer_sha256 not in manifest["read"].values():
        raise UserError(
            f"{directory} was made with another tokenizer; make it again with: {stage.maker(directory)} --force"
        )
    return manifest["counts"]


def template(directory: Path) -> str:
    """By which the conversations in a finished directory are spelt."""
    return stage.read_manifest(directory)["config"]["sft_data"]["template"]
