"""Corpus and tokenizer to packed tokens: two flat files that training maps into memory.

    python pipeline.py configs/tiny.py pack   ->  runs/tiny/packed

`train.bin` and `val.bin` hold the ids of one document after another, each closed by the end token, little-endian uint16
(uint32 past 65,536 pieces). `train.idx` and `val.idx` hold where each document starts, in tokens, as int64.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import cli
import stage
import tokenizer
import tokenizer.train
from cli import UserError, log, progress
from data.corpus import held_out
from stage import Stage, check_types

CHUNK = 1 << 20  # bytes of a shard that one worker takes at a time
SPLITS = ("train", "val")


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """How a corpus becomes tokens. Raises TypeError or ValueError, naming the field, for what cannot be."""

    val_fraction: float = 0.05
    """Share of the documents held out for validation, each decided by its own hash."""

    def __post_init__(self):
        check_types(self)
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction is {self.val_fraction}; expected more than 0 and less than 1")


def token_dtype(vocab_size: int) -> str:
    """The type of token ids on disk: little-endian uint16, or uint32 past 65,536 pieces."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


class Packed:
    """Packed tokens: `tokens`, a memory map of ids, and `starts`, where the documents in it begin.

    name: for messages. counts: of the manifest: `bytes` of UTF-8 text that the tokens spell, and those of each source.
    file, first: of a part, whose tokens these are, and the number that its first document has there.
    """

    def __init__(
        self, name: str, tokens: np.ndarray, starts: np.ndarray, counts: dict, file: str | None = None, first: int = 0
    ):
        self.name, self.tokens, self.starts, self.counts = name, tokens, starts, counts
        self.bytes = counts["bytes"]
        self.file, self.first = file or name, first

    def of(self, source: str) -> "Packed":
        """The part that one source of the corpus has given: the corpus has one source after another."""
        if source not in self.counts["sources"]:
            raise UserError(f"{self.name} has nothing of {source}; there are {', '.join(self.counts['sources'])}")
        counts = self.counts["sources"][source]
        start, end = counts["start"], counts["start"] + counts["tokens"]
        first, last = np.searchsorted(self.starts, (start, end))
        name = f"{source} in {self.name}"
        part = self.tokens[start:end], self.starts[first:last] - start
        return Packed(name, *part, counts, self.file, self.first + int(first))

    def documents(self) -> Iterator[np.ndarray]:
        """The ids of each document, its end token included."""
        for start, end in zip(self.starts, [*self.starts[1:], len(self.tokens)], strict=True):
            yield self.tokens[start:end]


def load(directory: Path, tokenizer_sha256: str) -> dict[str, Packed]:
    """The splits of a finished packed directory, every file checked against its manifest.

    UserError if it is missing, damaged, or was made with another tokenizer.
    """
    manifest = stage.finished(directory)
    made_with = next(digest for path, digest in manifest["read"].items() if path.endswith("spm.model"))
    if made_with != tokenizer_sha256:
        raise UserError(
            f"{directory} was packed with tokenizer {made_with[:12]}…, but the tokenizer here is "
            f"{tokenizer_sha256[:12]}…; pack again with: {stage.maker(directory)} --force"
        )
    splits = {}
    for split in SPLITS:
        tokens = np.memmap(directory / f"{split}.bin", dtype=manifest["counts"]["dtype"], mode="r")
        starts = np.fromfile(directory / f"{split}.idx", dtype="<i8")
        splits[split] = Packed(str(directory / f"{split}.bin"), tokens, starts, manifest["counts"][split])
    return splits


def _chunks(corpus: Path) -> list[tuple[Path, int]]:
    """Every shard cut into pieces of CHUNK bytes; a line belongs to the piece that its first byte lies in."""
    shards = sorted(corpus.glob("shard_*.jsonl"))
    return [(shard, start) for shard in shards for start in range(0, shard.stat().st_size, CHUNK)]


def _start_worker(spm: tokenizer.Tokenizer, val_fraction: float, dtype: str) -> None:
    global _worker
    _worker = spm, val_fraction, dtype


def _encode(chunk: tuple[Path, int]) -> dict:
    """{split: {source: (ids, document lengths in tokens, bytes of text)}} of one piece of a shard."""
    (spm, val_fraction, dtype), (shard, start) = _worker, chunk
    found: dict[str, dict[str, list]] = {split: {} for split in SPLITS}
    end = np.array([spm.eos], dtype=dtype)
    with open(shard, "rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()
        while file.tell() < start + CHUNK and (line := file.readline()):
            record = json.loads(line)
            text = record["text"].encode()
            split = found["val" if held_out(text, val_fraction) else "train"]
            part = split.setdefault(record["source"], [[], [], 0])
            ids = spm.encode_array(text)
            part[0] += ids.astype(dtype), end
            part[1].append(len(ids) + 1)
            part[2] += len(text)
    for parts in found.values():
        for part in parts.values():
            part[0] = np.concatenate(part[0])
            if part[0].max() >= spm.vocab_size:
                raise AssertionError(f"id {part[0].max()} of {spm.vocab_size} pieces, in {shard} from byte {start:,}")
    return found


def job(config: PackConfig, corpus: Path, spm: Path, directory: Path, command: str) -> Stage:
    """The stage that packs the corpus in a directory. spm: the tokenizer's directory. command: what the user types."""
    read = stage.outputs(corpus) | {k: v for k, v in stage.outputs(spm).items() if k.endswith("spm.model")}
    if not stage.read_manifest(corpus) or not stage.read_manifest(spm):
        read = {}  # an input has been removed: there is nothing to compare with, and what is packed stays valid
    return Stage(directory, config, read, command, __file__)


def build(job: Stage, config: PackConfig, corpus: Path, spm: Path, workers: int = 1, force: bool = False) -> None:
    """Packs the corpus, unless that is done."""
    directory = job.directory
    if job.up_to_date(force):
        return
    stage.finished(corpus)
    spm = tokenizer.load(spm)
    with job.making():
        counts = pack(corpus, spm, config.val_fraction, directory, workers)
        for split in SPLITS:
            if not counts[split]["documents"]:
                documents = sum(counts[each]["documents"] for each in SPLITS)
                raise UserError(
                    f"of {documents:,} documents none is left for {split} at val_fraction = {config.val_fraction}; "
                    "add documents (a .txt file is one, a line of .jsonl another), or change val_fraction"
                )
        job.finish(counts)
        if missing := ", ".join(s for s in counts["train"]["sources"] if s not in counts["val"]["sources"]):
            log.warning(f"no document of {missing} is held out: validation says nothing of it")
        train, val = counts["train"], counts["val"]
        log.info(f"packed: {train['tokens']:,} training and {val['tokens']:,} validation tokens -> {directory}")


def pack(corpus: Path, spm: tokenizer.Tokenizer, val_fraction: float, directory: Path, workers: int) -> dict:
    """Writes the four files. The pieces are written in order, however many workers encode them."""
    dtype = token_dtype(spm.vocab_size)
    counts = {split: {"documents": 0, "tokens": 0, "bytes": 0, "sources": {}} for split in SPLITS}
    chunks = _chunks(corpus)
    with contextlib.ExitStack() as stack:
        files = {
            name: stack.enter_context(open(directory / name, "wb"))
            for split in SPLITS
            for name in (f"{split}.bin", f"{split}.idx")
        }
        pool = stack.enter_context(cli.pool(workers, _start_worker, spm, val_fraction, dtype))
        encoded = cli.ordered(pool, _encode, chunks, 4 * workers)
        for pieces in progress(encoded, len(chunks), "MB", "packing"):
            for split, parts in pieces.items():
                total = counts[split]
                for source, (ids, lengths, size) in parts.items():
                    starts = total["tokens"] + np.cumsum([0, *lengths[:-1]])
                    files[f"{split}.bin"].write(ids)
                    files[f"{split}.idx"].write(starts.astype("<i8").tobytes())
                    empty = {"start": total["tokens"], "documents": 0, "tokens": 0, "bytes": 0}
                    for table in (total, total["sources"].setdefault(source, empty)):
                        table["documents"] += len(lengths)
                        table["tokens"] += len(ids)
                        table["bytes"] += size
    return {"dtype": dtype, **counts}
