"""Pairs of answers to tokens: read, filtered, rendered by the fine-tuned model's template, cut to the context."""

# For each split, `train.bin` holds the ids of all pairs, little-endian uint16 (uint32 past 65,536 pieces): prompt,
# chosen answer, rejected answer. `train.idx` has six int64 numbers for each pair: the starts of prompt, chosen and
# rejected answer, the end of the pair, the number of its kind, the number of its prompt. `train.txt` has the origins.

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import tokenizer
from data.batches import Shuffled
from data.pack import token_dtype
from data.sources import Records
from dpo.filters import PairFilters, PairJudge
from dpo.pairs import FORMATS, DocPairs, Pair
from sft.conversations import Message
from sft.data import DataConfig, Item, digests, gather, write_texts
from sft.data import load as load  # the same checks
from sft.templates import render
from stage import Stage
from tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class PairConfig(DataConfig):
    """The data of preference learning."""

    sources: tuple[Records, ...] = (DocPairs(),)  # Pairs, HubPairs, DocPairs
    filters: PairFilters = PairFilters()
    unit, formats, limit = "pairs", FORMATS, "max_pairs"


def rendered(pair: Pair, template: str, spm: Tokenizer) -> list[list[int]]:
    """The ids of prompt, chosen and rejected answer."""
    parts = [render(template, pair.prompt, spm, ask=True)[0]]
    # An answer's ids do not depend on the question: put a short question before it, and render the prompt only once.
    for answer in pair.answers:
        ids, trained = render(template, [Message("user", "?"), Message("assistant", answer)], spm)
        first, last = np.flatnonzero(trained)[[0, -1]]  # the template may have more after an answer
        parts.append(ids[first : last + 1])
    return parts


def fitted(parts: list[list[int]], context: int) -> list[list[int]]:
    """The three parts of a pair, cut to the context. The last id of an answer is a target, but no input."""
    # First the prompt loses its beginning, except for the id that begins every text, down to half of the context; then
    # the answers lose their ends.
    prompt, chosen, rejected = parts
    kept = max(context + 1 - max(len(chosen), len(rejected)), context // 2, 2)
    if kept < len(prompt):
        prompt = prompt[:1] + prompt[len(prompt) - kept + 1 :]
    room = context + 1 - len(prompt)
    return [prompt, chosen[:room], rejected[:room]]


def encode(config: PairConfig, template: str, spm: Tokenizer, context: int, pair: Pair):
    """Ids of a pair, the lengths of its parts, and True if it was cut; or the name of the rule that drops it."""
    whole = rendered(pair, template, spm)
    prompt, chosen, rejected = parts = fitted(whole, context)
    cut = parts != whole
    if cut and config.too_long == "drop":
        return "longer_than_context"
    if cut and chosen == rejected and pair.chosen != pair.rejected:
        return "identical_when_cut"
    ids = np.array(prompt + chosen + rejected, dtype=token_dtype(spm.vocab_size))
    return ids, np.array([len(prompt), len(chosen), len(rejected)]), cut


def write(directory: Path, name: str, items: list[Item], sources: Sequence[str]) -> dict:
    """Writes the three files of one split. Returns its counts."""
    write_texts(directory, name, items)
    lengths = np.array([item.parts for item in items])  # (pairs, 3): prompt, chosen, rejected
    ends = lengths.cumsum().reshape(-1, 3)
    kinds, prompts, labels, parts, first = Counter(), {}, [], {}, 0
    for item in items:
        kinds[item.kind] += 1
        prompt = prompts.setdefault(item.hashes[0], len(prompts))
        labels.append([list(kinds).index(item.kind), prompt])
    index = np.column_stack([ends - lengths, ends[:, 2], labels])
    index.astype("<i8").tofile(directory / f"{name}.idx")
    sizes = Counter(item.source for item in items)
    for source in sources:
        parts[source] = {"pair": first, "pairs": sizes[source]}
        first += sizes[source]
    counts = {"pairs": len(items), "prompts": len(prompts), "tokens": int(ends[-1, 2])}
    return counts | {"longest": int(lengths.sum(axis=1).max()), "sources": parts, "kinds": dict(kinds)}


def job(config: PairConfig, template: str, context: int, spm: Path, directory: Path, command: str) -> Stage:
    """The stage that makes pairs of `context` tokens. spm: the tokenizer's directory. command: what the user types."""
    settings = {"dpo_data": config, "template": template, "context_length": context}
    return Stage(directory, settings, digests(config.sources, spm, directory), command, __file__)


def build(job: Stage, config: PairConfig, template: str, context: int, spm: Path, workers: int, force: bool) -> None:
    """Makes the pairs, unless the stage is up to date."""
    if job.up_to_date(force):
        return
    spm = tokenizer.load(spm)
    with job.making():
        encoded, judge = partial(encode, config, template, spm, context), PairJudge(config.filters)
        splits, sources = gather(config, encoded, judge, workers)
        counts = {"dtype": token_dtype(spm.vocab_size), "sources": sources}
        for name, items in splits.items():
            counts[name] = write(job.directory, name, items, list(sources))
        job.finish(counts)


class PairRows(Shuffled):
    """Pairs of one split, or of one of its sources. Each epoch sees every pair once, in its own order."""

    holds = "pairs"

    def __init__(self, directory: Path, split: str, counts: dict, seed: int = 0, source: str = ""):
        totals = counts[split]
        self.file = str(directory / f"{split}.bin")
        self.tokens = np.memmap(self.file, dtype=counts["dtype"], mode="r")
        index = np.fromfile(directory / f"{split}.idx", dtype="<i8").reshape(-1, 6)
        self.bounds = index[:, :4]  # of the whole split
        self.kinds, self.prompts = index[:, 4:].T
        self.names, self.width = list(totals["kinds"]), totals["longest"]  # tokens of the longest pair
        part = totals["sources"][source] if source else {"pair": 0, "pairs": totals["pairs"]}
        self.first = part["pair"]
        super().__init__(part["pairs"], seed)
        lengths = np.ptp(self.bounds[self.first :][: self.count], axis=1)
        self.length = float(lengths.mean()) if self.count else 0.0  # tokens of a pair

    def documents(self, row: int) -> range:
        """The number in the split of a row's pair."""
        return range(self.first + row, self.first + row + 1)

    def read(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids (rows, width), padded with 0; where the three parts end, (rows, 3); numbers, (rows,). All int64."""
        numbers = self.first + np.asarray(rows, dtype=np.int64)  # of the pairs in the split
        bounds = self.bounds[numbers]
        ids = np.zeros((len(numbers), self.width), dtype=np.int64)
        for row, (start, *_, end) in zip(ids, bounds, strict=True):
            row[: end - start] = self.tokens[start:end]
        ends = bounds[:, 1:] - bounds[:, :1]
        return torch.from_numpy(ids), torch.from_numpy(ends), torch.from_numpy(numbers)
