"""Corpus and tokenizer to packed tokens: two flat files per split that training maps into memory."""

# `train.bin` and `val.bin` hold the ids of one document after another, each followed by the end token, as little-endian
# uint16 (uint32 past 65,536 pieces). `train.idx` and `val.idx` hold the start of each document, in tokens, as int64.

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
from data.corpus import holdout
from stage import Stage, check_types

CHUNK = 1 << 20  # bytes of a shard that a worker takes at a time
SPLITS = ("train", "val")


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """How a corpus becomes tokens. Raises TypeError or ValueError, naming the field, for an impossible setting."""

    # Share of the documents held out for validation, by the hash of each. A single document loses its last part.
    val_fraction: float = 0.05

    def __post_init__(self):
        check_types(self)
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction is {self.val_fraction}; expected more than 0 and less than 1")


def token_dtype(vocab_size: int) -> str:
    """The type of token ids on disk."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


class Packed:
    """Packed tokens: `tokens`, a memory map of ids, and `starts`, where the documents in it begin."""

    # counts: from the manifest, among them the `bytes` of UTF-8 text that the tokens encode.
    # file, first: the file that holds the tokens, and the number of the first document in that file.

    def __init__(self, name: str, tokens: np.ndarray, starts: np.ndarray, counts: dict, file: str = "", first: int = 0):
        self.name, self.tokens, self.starts, self.counts = name, tokens, starts, counts
        self.bytes, self.file, self.first = counts["bytes"], file or name, first

    def of(self, source: str) -> "Packed":
        """The tokens of one source of the corpus. They are consecutive: the corpus has one source after another."""
        if source not in self.counts["sources"]:
            raise UserError(f"{self.name} has no text of {source}; its sources are {', '.join(self.counts['sources'])}")
        counts = self.counts["sources"][source]
        start, end = counts["start"], counts["start"] + counts["tokens"]
        first, last = np.searchsorted(self.starts, (start, end)).tolist()
        starts, name = self.starts[first:last] - start, f"{source} in {self.name}"
        return Packed(name, self.tokens[start:end], starts, counts, self.file, self.first + first)

    def documents(self) -> Iterator[np.ndarray]:
        """The ids of each document with its end token."""
        for start, end in zip(self.starts, [*self.starts[1:], len(self.tokens)], strict=True):
            yield self.tokens[start:end]


def load(directory: Path, tokenizer_sha256: str) -> dict[str, Packed]:
    """The splits of a finished packed directory. UserError if it is missing, damaged, or of another tokenizer."""
    manifest = stage.finished(directory)
    (made_with,) = (digest for path, digest in manifest["read"].items() if path.endswith(tokenizer.FILES))
    if made_with != tokenizer_sha256:
        raise UserError(
            f"{directory} was packed with tokenizer {made_with[:12]}…, but the tokenizer here is "
            f"{tokenizer_sha256[:12]}…; pack again with: {stage.remaker(directory)}"
        )
    splits, counts = {}, manifest["counts"]
    for split in SPLITS:
        file = directory / f"{split}.bin"
        tokens = np.memmap(file, dtype=counts["dtype"], mode="r")
        splits[split] = Packed(str(file), tokens, np.fromfile(file.with_suffix(".idx"), "<i8"), counts[split])
    return splits


def _encode(chunk: tuple[Path, int]) -> list[tuple[str, str, np.ndarray, int]]:
    """(split, source, ids with the end token, bytes of text) of each document that begins in a chunk of a shard."""
    spm, rule, dtype = _settings
    (shard, start), encoded = chunk, []
    with open(shard, "rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()
        while file.tell() < start + CHUNK and (line := file.readline()):
            record = json.loads(line)
            for split, text in zip(SPLITS, rule.split(record["text"]), strict=True):
                if text:
                    content = text.encode()
                    ids = np.append(spm.encode_array(content), spm.eos).astype(dtype)
                    encoded.append((split, record["source"], ids, len(content)))
    return encoded


def job(config: PackConfig, corpus: Path, spm: Path, directory: Path, command: str) -> Stage:
    """The stage that packs a corpus. corpus, spm: directories. command: what the user types."""
    shards, model = stage.outputs(corpus), tokenizer.identity(spm)
    read = shards | model if shards and model else {}  # if an input is gone, packed tokens stay valid
    return Stage(directory, config, read, command, __file__)


def build(job: Stage, config: PackConfig, corpus: Path, spm: Path, workers: int = 1, force: bool = False) -> None:
    """Packs the corpus if that is not done."""
    if job.up_to_date(force):
        return
    stage.finished(corpus)
    spm = tokenizer.load(spm)
    with job.making():
        counts = pack(corpus, spm, config.val_fraction, job.directory, workers)
        job.finish(counts)
        train, val = counts["train"], counts["val"]
        if missing := ", ".join(sorted(train["sources"].keys() - val["sources"].keys())):
            log.warning(f"no document of {missing} is held out: validation does not measure it")
        log.info(f"packed: {train['tokens']:,} training and {val['tokens']:,} validation tokens -> {job.directory}")


def pack(corpus: Path, spm: tokenizer.Tokenizer, val_fraction: float, directory: Path, workers: int) -> dict:
    """Writes the four files and returns their counts. The order of documents does not depend on the workers."""
    global _settings  # the workers inherit it
    dtype, rule = token_dtype(spm.vocab_size), holdout(corpus, val_fraction)
    _settings = spm, rule, dtype
    if rule.threshold is None:
        log.info(f"packed: too few documents to hold out a whole one: the last {val_fraction:.1%} of each is held out")
    counts = {split: {"documents": 0, "tokens": 0, "bytes": 0, "sources": {}} for split in SPLITS}
    chunks = []
    for shard in sorted(corpus.glob("shard_*.jsonl")):
        chunks += [(shard, start) for start in range(0, shard.stat().st_size, CHUNK)]
    with cli.pool(workers) as pool, contextlib.ExitStack() as stack:
        files = {}
        for name in ("train.bin", "train.idx", "val.bin", "val.idx"):
            files[name] = stack.enter_context(open(directory / name, "wb"))
        encoded = cli.ordered(pool, _encode, chunks, 4 * workers)
        for documents in progress(encoded, len(chunks), "MB", "packing"):
            for split, source, ids, size in documents:
                total = counts[split]
                files[f"{split}.idx"].write(np.array(total["tokens"], "<i8"))
                files[f"{split}.bin"].write(ids)
                empty = {"start": total["tokens"], "documents": 0, "tokens": 0, "bytes": 0}
                for table in (total, total["sources"].setdefault(source, empty)):
                    table["documents"] += 1
                    table["tokens"] += len(ids)
                    table["bytes"] += size
    return {"dtype": dtype, **counts}
