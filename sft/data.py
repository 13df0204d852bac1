"""Conversations to rows of tokens: read, filtered, rendered by the template, packed. `gather` also reads pairs."""

# For each split, `train.bin` holds the ids of all conversations, little-endian uint16 (uint32 past 65,536 pieces), and
# `train.mask` a byte for each id, 1 if it is trained. `train.idx` has the start of each conversation in tokens, and
# `train.rows` the first conversation of each row, both int64 with the total at the end. `train.txt` has their origins.

import bisect
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import stage
import tokenizer
from cli import UserError, log, progress
from data.batches import Shuffled, Windows
from data.holdout import split_hash, threshold
from data.pack import token_dtype
from data.sources import Records, Unreadable, inputs, log_kept
from model import IGNORED
from sft.conversations import FORMATS, Conversation, DocQuestions
from sft.filters import Filters, Judge
from sft.templates import IMPORTED, TEMPLATES, render
from stage import Stage, check_types
from tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Settings of conversations and of pairs. Raises TypeError or ValueError, with the field's name."""

    sources: tuple[Records, ...]
    too_long: str = "cut"  # examples longer than the context: "cut" (the end; of pairs first the beginning) or "drop"
    val_fraction: float = 0.05  # share of the examples held out, by the hash of the first question

    def __post_init__(self):
        check_types(self)
        for source in self.sources:
            if not hasattr(source, self.unit):
                raise ValueError(f"sources has {source.name}, which does not give {self.unit}")
            layout = getattr(source, "format", "auto")
            if layout not in ("auto", *self.formats):
                known = ", ".join(("auto", *self.formats))
                raise ValueError(f"sources has {source.name} with format {layout!r}; expected one of {known}")
        names = [source.name for source in self.sources]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"sources are called {', '.join(names)}; expected at least one, with unique names")
        for name, choices in (("too_long", ("cut", "drop")), ("template", (*TEMPLATES, IMPORTED))):
            value = getattr(self, name, None)
            if value not in (None, *choices):
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction is {self.val_fraction}; expected more than 0 and less than 1")


@dataclass(frozen=True, kw_only=True)
class ConversationConfig(DataConfig):
    """The data of fine-tuning."""

    sources: tuple[Records, ...] = (DocQuestions(),)  # Chats, HubChats, DocQuestions
    template: str = "chatml"  # "chatml", "instruct" or "alpaca"
    filters: Filters = Filters()
    unit, formats, limit = "conversations", FORMATS, "max_tokens"


class Item(NamedTuple):
    """An example that passed the filters."""

    source: str
    id: str
    kind: str  # of a pair: how it was made
    hashes: list[int]  # of its keys, which decide if it is held out, and of the whole example
    ids: np.ndarray
    parts: np.ndarray  # the mask of a conversation; the lengths of a pair's prompt and answers
    cut: bool


def gather(config: DataConfig, encode: Callable, judge: Judge, workers: int):
    """Reads all sources. Returns {"train": [Item], "val": [Item]}, and counts by source. encode: as `encode` below."""
    items, counts = [], {}
    for source in config.sources:
        count = counts[source.name] = {"read": 0, "kept": 0, "cut": 0, "tokens": 0, "dropped": Counter()}
        size, most = 0, getattr(source, config.limit, None) or math.inf
        for example in progress(getattr(source, config.unit)(workers), 0, config.unit, source.name):
            count["read"] += 1
            if isinstance(example, Unreadable):
                log.debug(example)
                count["dropped"]["unreadable"] += 1
                continue
            encoded = encode(example)
            # An example that does not fit is not remembered: a later copy may be shorter.
            if rule := encoded if isinstance(encoded, str) else judge.rule(example):
                count["dropped"][rule] += 1
                continue
            hashes = [split_hash(key.encode()) for key in (*example.keys, repr(example))]
            items.append(Item(source.name, example.id, example.kind or source.name, hashes, *encoded))
            size += len(items[-1].ids) if config.limit == "max_tokens" else 1
            if size >= most:
                break
    splits = split(items, counts, config.val_fraction)
    for name, count in counts.items():
        count["dropped"] = dict(sorted(count["dropped"].items()))
        log_kept(name, count["kept"], count["read"], config.unit, count["dropped"])
        if count["cut"]:
            log.info(f"{name}: {config.unit} cut to the context: {count['cut']:,}")
    train, val = len(splits["train"]), len(splits["val"])
    log.info(f"{config.unit} to train on: {train:,}, held out: {val:,}")
    if not train or not val:
        few = f"{config.unit} that are left: {len(items)}; expected at least 2, better hundreds"
        raise UserError(f"{few}: add some, or change the filters or context_length; the log counts what each drops")
    share = val / (train + val)
    if val > 1 and share > 4 * config.val_fraction:
        why = f"many {config.unit} begin with the same question, and all of them are in one split"
        log.warning(f"{share:.0%} of the {config.unit} are held out, not {config.val_fraction:.0%}: {why}")
    return splits, counts


def split(items: list[Item], counts: dict, fraction: float) -> dict[str, list[Item]]:
    """Divides the items by the hashes of their keys, and counts those that are kept."""
    limit = threshold((item.hashes[0] for item in items), fraction)
    deciding = slice(0, -1)
    if limit is None:  # all begin alike: the whole example decides
        deciding = slice(-1, None)
        limit = threshold((item.hashes[-1] for item in items), fraction) or 0
    splits = {"train": [], "val": []}
    for item in items:
        count, hashes = counts[item.source], item.hashes[deciding]
        if min(hashes) < limit <= max(hashes):  # a pair whose two answers belong to different splits
            count["dropped"]["of_both_splits"] += 1
            continue
        splits["val" if hashes[0] < limit else "train"].append(item)
        count["kept"] += 1
        count["cut"] += item.cut
        count["tokens"] += len(item.ids)
    return splits


def write_texts(directory: Path, name: str, items: Sequence[Item]) -> None:
    """Writes the ids and the origins of a split."""
    np.concatenate([item.ids for item in items]).tofile(directory / f"{name}.bin")
    with open(directory / f"{name}.txt", "w", encoding="utf-8") as origins:
        origins.writelines(" ".join(item.id.split()) + "\n" for item in items)


def digests(sources: Sequence[Records], spm: Path, directory: Path) -> dict[str, str]:
    """The digests of sources and tokenizer; {} if the directory is finished and the sources have been moved away."""
    return inputs([*sources, SimpleNamespace(inputs=lambda: tokenizer.identity(spm))], directory)


def load(directory: Path, tokenizer_sha256: str) -> dict:
    """The counts of a finished directory. UserError if it is missing, damaged, or made with another tokenizer."""
    manifest = stage.finished(directory)
    if tokenizer_sha256 not in manifest["read"].values():
        command = f"{stage.maker(directory)} --force"
        raise UserError(f"{directory} was made with another tokenizer; make it again with: {command}")
    return manifest["counts"]


def encode(config: ConversationConfig, spm: Tokenizer, context: int, conversation: Conversation):
    """Ids and mask of a conversation, and True if it was cut; or the name of the rule that drops it."""
    ids, trained = render(config.template, conversation.messages, spm)
    end = len(trained) - trained[::-1].index(True)
    fits = min(end, context + 1)  # the last id of a row is a target, but no input
    if True not in trained[:fits] or (fits < end and config.too_long == "drop"):
        return "longer_than_context"
    ids = np.array(ids[:fits], dtype=token_dtype(spm.vocab_size))
    mask = np.array(trained[:fits], dtype=np.uint8)
    return ids, mask, fits < end


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of at most `capacity` tokens that hold every text once: for each row the numbers of its texts."""
    # Best fit, decreasing (Johnson 1974): the longest text first, each into the row where it leaves the least room.
    rows, rooms = [], []  # rooms, sorted: (tokens that still fit, minus the step that last added a text, row)
    longest_first = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    for step, text in enumerate(longest_first):
        at = bisect.bisect_left(rooms, (lengths[text],))  # the least room that is enough
        if at == len(rooms):
            rooms.append((capacity, 0, len(rows)))
            rows.append([])
        room, _, row = rooms.pop(at)
        rows[row].append(text)
        bisect.insort(rooms, (room - lengths[text], -step, row))
    return rows


def write(directory: Path, name: str, items: list[Item], sources: Sequence[str], context: int) -> dict:
    """Packs one split, source by source, and writes its five files. Returns its counts."""
    packed, firsts, parts = [], [0], {}
    for source in sources:
        texts = [item for item in items if item.source == source]
        rows = best_fit([len(item.ids) - 1 for item in texts], context)
        parts[source] = {"row": len(firsts) - 1, "rows": len(rows)}
        for row in rows:
            packed += [texts[number] for number in row]
            firsts.append(len(packed))
    write_texts(directory, name, packed)
    mask = np.concatenate([item.parts for item in packed])
    mask.tofile(directory / f"{name}.mask")
    starts = np.cumsum([0, *(len(item.ids) for item in packed)])
    starts.astype("<i8").tofile(directory / f"{name}.idx")
    np.array(firsts, "<i8").tofile(directory / f"{name}.rows")
    rows = len(firsts) - 1
    counts = {"conversations": len(items), "tokens": len(mask), "trained": int(mask.sum()), "rows": rows}
    return counts | {"sources": parts, "packing_efficiency": (len(mask) - len(packed)) / (rows * context)}


def job(config: ConversationConfig, context: int, spm: Path, directory: Path, command: str) -> Stage:
    """The stage that makes rows of `context` tokens. spm: the tokenizer's directory. command: what the user types."""
    settings = {"sft_data": config, "context_length": context}
    return Stage(directory, settings, digests(config.sources, spm, directory), command, __file__)


def build(job: Stage, config: ConversationConfig, context: int, spm: Path, workers: int, force: bool) -> None:
    """Makes the rows, unless the stage is up to date."""
    if job.up_to_date(force):
        return
    spm = tokenizer.load(spm)
    with job.making():
        encoded, judge = partial(encode, config, spm, context), Judge(config.filters)
        splits, sources = gather(config, encoded, judge, workers)
        counts = {"dtype": token_dtype(spm.vocab_size), "sources": sources}
        for name, items in splits.items():
            counts[name] = write(job.directory, name, items, list(sources), context)
        efficiency = counts["train"]["packing_efficiency"]
        log.info(f"training rows: {counts['train']['rows']:,}, {efficiency:.2%} full -> {job.directory}")
        job.finish(counts | {"packing_efficiency": efficiency})


class Rows(Shuffled):
    """Rows of one split, or of one of its sources. Each epoch sees every row once, in its own order."""

    holds = "conversations"

    def __init__(self, directory: Path, split: str, counts: dict, context: int, seed: int = 0, source: str = ""):
        self.file, self.length = str(directory / f"{split}.bin"), context
        self.tokens = np.memmap(self.file, dtype=counts["dtype"], mode="r")
        self.trained = np.memmap(directory / f"{split}.mask", dtype=np.uint8, mode="r")
        self.starts = np.fromfile(directory / f"{split}.idx", dtype="<i8")
        self.firsts = np.fromfile(directory / f"{split}.rows", dtype="<i8")
        part = counts[split]["sources"][source] if source else {"row": 0, "rows": counts[split]["rows"]}
        self.first = part["row"]
        super().__init__(part["rows"], seed)

    def documents(self, row: int) -> range:
        """The numbers in the split of a row's conversations."""
        return range(*self.firsts[self.first + row :][:2].tolist())

    def conversation(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids (n,) int64 and mask (n,) bool of a conversation."""
        place = slice(*self.starts[number : number + 2])
        return self.tokens[place].astype(np.int64), self.trained[place].astype(bool)

    def read(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, targets and positions of rows, (rows, length) int64 each."""
        # A conversation's targets are its ids shifted by one: the only shift of conversations. A target is IGNORED if
        # the next id is not trained, or is padding. The padding after the last conversation counts as another text.
        inputs = np.zeros((len(rows), self.length), dtype=np.int64)
        targets = np.full_like(inputs, IGNORED)
        positions = np.zeros_like(inputs)
        for i, row in enumerate(rows):
            at = 0
            for number in self.documents(row):
                ids, trained = self.conversation(number)
                end = at + len(ids) - 1
                inputs[i, at:end] = ids[:-1]
                targets[i, at:end] = np.where(trained[1:], ids[1:], IGNORED)
                positions[i, at:end] = np.arange(end - at)
                at = end
            positions[i, at:] = np.arange(self.length - at)
        return torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(positions)


class TextRows(Windows):
    """Rows of plain text: the packed tokens of pretraining. Every token is trained."""

    def read(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, targets and positions of rows, (rows, length) int64 each."""
        inputs, targets = super().read(rows)
        return inputs, targets, torch.arange(self.length).expand_as(inputs)
