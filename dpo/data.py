"""Pairs of answers to tokens: read, judged, spelt by the template of the fine-tuned model, cut to the context.

    python pipeline.py configs/tiny.py dpo_data   ->  runs/tiny/dpo_data

For each split: `train.bin` holds the ids of one pair after another, little-endian uint16 (uint32 past 65,536 pieces):
prompt, chosen answer, rejected answer. `train.idx` has six int64 numbers a pair: where the prompt, the chosen and the
rejected answer begin and the pair ends, its kind, and the number of its prompt, which pairs may share. `train.txt` has
a line for each: where it came from.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import tokenizer
from cli import UserError, log, progress
from data.batches import Shuffled
from data.corpus import held_out
from data.pack import SPLITS
from data.sources import Records, Unreadable
from dpo.filters import Judge, PairFilters
from dpo.pairs import DocPairs, Pair
from sft.conversations import Message
from sft.data import inputs
from sft.data import load as load  # what it checks is the same
from sft.templates import render
from stage import Stage, check_types
from tokenizer import Tokenizer

COLUMNS = 6  # of the index


@dataclass(frozen=True, kw_only=True)
class PairConfig:
    """What preferences are learnt. Raises TypeError or ValueError, naming the field, for what cannot be."""

    sources: tuple[Records, ...] = (DocPairs(),)
    """Pairs, HubPairs, DocPairs."""
    filters: PairFilters = PairFilters()
    too_long: str = "cut"
    """A pair longer than the context: "cut", first the beginning of its prompt, then the ends of its answers, or
    "drop"."""
    val_fraction: float = 0.05
    """Share of the prompts held out, each with all of its pairs, decided by the hash of its first question."""

    def __post_init__(self):
        check_types(self)
        names = [source.name for source in self.sources]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"sources are called {', '.join(names) or 'nothing'}; expected one or more, each named")
        if wrong := [source.name for source in self.sources if not hasattr(source, "pairs")]:
            raise ValueError(f"sources has {', '.join(wrong)}; expected Pairs, HubPairs or DocPairs")
        if self.too_long not in ("cut", "drop"):
            raise ValueError(f'too_long is {self.too_long!r}; expected "cut" or "drop"')
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction is {self.val_fraction}; expected more than 0 and less than 1")


# ------------------------------------------------------------------------------------------------------------- reading


class Spelt:
    """A pair in ids."""

    def __init__(self, pair: Pair, template: str, spm: Tokenizer):
        self.prompt, _ = render(template, pair.prompt, spm, ask=True)
        self.answers = []
        for answer in (pair.chosen, pair.rejected):
            ids, trained = render(template, [*pair.prompt, Message("assistant", answer)], spm)
            end = len(trained) - trained[::-1].index(True)  # behind it stands only what the template has between turns
            self.answers.append(ids[len(self.prompt) : end])

    def cut(self, context: int) -> bool:
        """Cuts the pair to what a model can read, if it has to be cut.

        The last id of an answer is predicted, not read. The beginning of the prompt goes first, all but the piece that
        begins a text, while half of the context is left to the prompt; then the ends of the answers.
        """
        longest = max(map(len, self.answers))
        kept = max(context + 1 - longest, min(len(self.prompt), max(2, context // 2)))
        room = context + 1 - min(kept, len(self.prompt))
        if kept >= len(self.prompt) and longest <= room:
            return False
        if kept < len(self.prompt):
            self.prompt = self.prompt[:1] + self.prompt[len(self.prompt) - kept + 1 :]
        self.answers = [answer[:room] for answer in self.answers]
        return True


class Split:
    """What one source gives to a split, as it is gathered: ids, lengths of their parts, kind, first key and origin of
    each pair."""

    def __init__(self):
        self.ids: list[np.ndarray] = []
        self.lengths: list[list[int]] = []
        self.kinds: list[str] = []
        self.keys: list[str] = []
        self.origins: list[str] = []


def gather(
    config: PairConfig, template: str, spm: Tokenizer, context: int, workers: int
) -> tuple[dict[str, dict[str, Split]], dict[str, dict]]:
    """The pairs that are kept, {split: {source: Split}}, and by source what was read and dropped."""
    dtype = "<u2" if spm.vocab_size <= 1 << 16 else "<u4"
    found: dict[str, dict[str, Split]] = {split: {} for split in SPLITS}
    tallies, judge = {}, Judge(config.filters)
    for source in config.sources:
        splits = {split: found[split].setdefault(source.name, Split()) for split in SPLITS}
        counts, dropped = Counter(read=0, kept=0, cut=0, tokens=0), Counter()
        for pair in progress(source.pairs(workers), 0, "pairs", source.name):
            counts["read"] += 1
            if isinstance(pair, Unreadable):
                dropped["unreadable"] += 1
                log.debug(str(pair))
                continue
            sides = {held_out(key.encode(), config.val_fraction) for key in pair.keys}
            rule = "of_both_splits" if len(sides) > 1 else None
            if rule is None:
                spelt = Spelt(pair, template, spm)
                cut = spelt.cut(context)
                if cut and config.too_long == "drop":
                    rule = "longer_than_context"
                elif spelt.answers[0] == spelt.answers[1]:
                    rule = "identical_when_cut" if cut and pair.chosen != pair.rejected else "identical"
            if rule := rule or judge.rule(pair):
                dropped[rule] += 1
                continue
            split = splits["val" if sides.pop() else "train"]
            parts = [spelt.prompt, *spelt.answers]
            split.ids.append(np.array([id for part in parts for id in part], dtype=dtype))
            split.lengths.append(list(map(len, parts)))
            split.kinds.append(pair.kind or source.name)
            split.keys.append(pair.keys[0])
            split.origins.append(pair.id)
            counts.update(kept=1, tokens=len(split.ids[-1]), cut=cut)
            if source.max_pairs and counts["kept"] >= source.max_pairs:
                break
        tallies[source.name] = {**counts, "dropped": dict(sorted(dropped.items()))}
    return found, tallies


def write(directory: Path, name: str, splits: Mapping[str, Split]) -> dict:
    """Writes the three files of one split, source by source. Returns its counts."""
    counts: dict = {"pairs": 0, "prompts": 0, "tokens": 0, "longest": 0, "sources": {}, "kinds": {}}
    kinds: dict[str, int] = {}
    prompts: dict[str, int] = {}
    index = []
    with (
        open(directory / f"{name}.bin", "wb") as tokens,
        open(directory / f"{name}.txt", "w", encoding="utf-8") as origins,
    ):
        for source, split in splits.items():
            counts["sources"][source] = {"pair": len(index), "pairs": len(split.ids)}
            parts = zip(split.ids, split.lengths, split.kinds, split.keys, split.origins, strict=True)
            for ids, lengths, kind, key, origin in parts:
                ids.tofile(tokens)
                origins.write(" ".join(origin.split()) + "\n")
                places = np.cumsum([counts["tokens"], *lengths]).tolist()
                index.append([*places, kinds.setdefault(kind, len(kinds)), prompts.setdefault(key, len(prompts))])
                counts["tokens"] = places[-1]
                counts["longest"] = max(counts["longest"], len(ids))
                counts["kinds"][kind] = counts["kinds"].get(kind, 0) + 1
    np.array(index, dtype="<i8").reshape(-1, COLUMNS).tofile(directory / f"{name}.idx")
    return counts | {"pairs": len(index), "prompts": len(prompts)}


def job(config: PairConfig, template: str, context: int, spm: Path, directory: Path, command: str) -> Stage:
    """The stage that makes pairs of at most `context` tokens. spm: the tokenizer's directory. command: what the user
    types to make them."""
    read = inputs(config.sources, spm, directory)
    settings = {"dpo_data": config, "template": template, "context_length": context}
    return Stage(directory, settings, read, command, __file__)


def build(
    job: Stage, config: PairConfig, template: str, context: int, spm: Path, workers: int = 1, force: bool = False
) -> None:
    """Makes the pairs, unless they are there."""
    directory = job.directory
    if job.up_to_date(force):
        return
    spm = tokenizer.load(spm)
    with job.making():
        found, tallies = gather(config, template, spm, context, workers)
        for name, tally in tallies.items():
            dropped = ", ".join(f"{n:,} {rule}" for rule, n in tally["dropped"].items()) or "none"
            cut = f"; {tally['cut']:,} cut to {context:,} tokens" * (tally["cut"] > 0)
            log.info(f"{name}: {tally['kept']:,} of {tally['read']:,} pairs kept (dropped: {dropped}){cut}")
        for split in SPLITS:
            if not sum(len(each.ids) for each in found[split].values()):
                read, kept = (sum(tally[key] for tally in tallies.values()) for key in ("read", "kept"))
                raise UserError(
                    f"of {read:,} pairs {kept:,} were kept, and none is left for {split} at val_fraction = "
                    f"{config.val_fraction}: it takes two prompts at least, better hundreds; add some, or change "
                    "val_fraction or what drops the others"
                )
        counts = {split: write(directory, split, found[split]) for split in SPLITS}
        dtype = "<u2" if spm.vocab_size <= 1 << 16 else "<u4"
        job.finish({"dtype": dtype, "sources": tallies} | counts)
        log.info(
            "dpo_data: "
            + ", ".join(f"{c['pairs']:,} pairs of {c['prompts']:,} prompts to {split}" for split, c in counts.items())
            + f", {counts['train']['tokens']:,} and {counts['val']['tokens']:,} tokens -> {directory}"
        )


# ------------------------------------------------------------------------------------------------------------- batches


class PairRows(Shuffled):
    """Pairs of one split, or of one source of it; each epoch sees every pair once, in an order of its own.

    tokens: a memory map. bounds: (pairs, 4), where prompt, chosen and rejected begin and the pair ends. kinds, prompts:
    (pairs,), all of the split. names: of the kinds. first, count: which pairs are meant; length: how many tokens one of
    them has on average; width: how many the longest of the split has.
    """

    holds = "pairs"

    def __init__(self, directory: Path, split: str, counts: dict, seed: int = 0, source: str = ""):
        self.file, own = str(directory / f"{split}.bin"), counts[split]
        self.tokens = np.memmap(self.file, dtype=counts["dtype"], mode="r")
        index = np.fromfile(directory / f"{split}.idx", dtype="<i8").reshape(-1, COLUMNS)
        self.bounds, self.kinds, self.prompts = index[:, :4], index[:, 4], index[:, 5]
        self.names, self.width = list(own["kinds"]), own["longest"]
        part = own["sources"][source] if source else {"pair": 0, "pairs": own["pairs"]}
        self.first = part["pair"]
        super().__init__(part["pairs"], seed)
        each = self.bounds[self.first : self.first + self.count]
        self.length = float((each[:, 3] - each[:, 0]).mean()) if self.count else 0.0

    def documents(self, row: int) -> range:
        """The pair of a row, by its number in the split."""
        return range(self.first + row, self.first + row + 1)

    def read(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids (rows, width), 0 behind the end of each; where in them prompt, chosen and rejected answer end, (rows, 3);
        and their numbers in the split, (rows,). All int64."""
        numbers = self.first + np.asarray(rows, dtype=np.int64)
        ids = np.zeros((len(numbers), self.width), dtype=np.int64)
        for row, (start, *_, end) in zip(ids, self.bounds[numbers], strict=True):
            row[: end - start] = self.tokens[start:end]
        bounds = self.bounds[numbers, 1:] - self.bounds[numbers, :1]
        return torch.from_numpy(ids), torch.from_numpy(bounds), torch.from_numpy(numbers)

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All of them in order, so many at a time."""
        for start in range(0, self.count, size):
            yield self.read(range(start, min(start + size, self.count)))
