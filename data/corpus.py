"""Sources to corpus: clean, judged, decontaminated, deduplicated documents in JSONL shards, and a data card."""

#     python pipeline.py configs/tiny.py corpus   ->  runs/tiny/corpus
#
# The same inputs give the same bytes for any number of workers. An interrupted build continues after its last finished
# shard. Workers clean and judge. This process finds duplicates, text after text: they depend on the texts kept before.
# Long documents are judged by section: a bad chapter is dropped, the book stays.

import functools
import itertools
import json
import math
import shutil
import sqlite3
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

import cli
import stage
from cli import UserError, log, progress
from data.clean import clean
from data.decontaminate import Contamination
from data.dedup import Deduplication, Index, MinHash
from data.holdout import Holdout, split_hash, threshold
from data.holdout import held_out as held_out
from data.quality import Quality, judge, select_lines
from data.sections import SECTION_CHARS, sections
from data.sources import Document, Source, Unreadable, inputs, log_kept
from data.words import fingerprint, hashes, words
from stage import Stage, check_types

SHARD_BYTES = 64 << 20
BATCH_CHARS = 1 << 19  # of documents that one worker takes at a time
BYTES_PER_TOKEN = 4.25  # of English prose with 32,768 pieces: token budgets count before there is a tokenizer
SAMPLES, EXAMPLES = 10, 2  # in the card: documents, and rejected texts per source and rule


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """The contents of a corpus. Raises TypeError or ValueError, naming the field, for an impossible setting."""

    sources: tuple[Source, ...]  # read in this order; of equal texts the first is kept
    # None drops exact duplicates only: texts that differ in nothing but case, punctuation and white space.
    dedup: Deduplication | None = Deduplication()
    # Evaluation sets: texts that share `decontaminate_ngram` words in a row with one of them are dropped.
    decontaminate: tuple[Source, ...] = ()
    decontaminate_ngram: int = 13

    def __post_init__(self):
        check_types(self)
        if not self.sources:
            raise ValueError("sources is empty; expected at least one")
        for field in ("sources", "decontaminate"):
            names = [source.name for source in getattr(self, field)]
            if len(set(names)) < len(names):
                raise ValueError(f"{field} are called {', '.join(names)}; give each a name of its own")


def records(directory: Path) -> Iterator[dict[str, str]]:
    """The documents of a finished corpus, in order, each with `text`, `source` and `id`."""
    for shard in sorted(directory.glob("shard_*.jsonl")):
        with open(shard, encoding="utf-8") as file:
            yield from map(json.loads, file)


def holdout(directory: Path, fraction: float) -> Holdout:
    """The rule that holds out about `fraction` of a finished corpus."""
    numbers = (split_hash(record["text"].encode()) for record in records(directory))
    return Holdout(fraction, threshold(numbers, fraction))


# --------------------------------------------------------------------------------------------------------- the workers


class Piece(NamedTuple):
    """A document, or a section of one."""

    text: str
    words: int
    rule: str | None  # the name of the rule that rejects it
    keys: np.ndarray | None = None  # for Index.duplicate
    shingles: np.ndarray | None = None


class Preparation:
    """Cleans and judges each document by itself."""

    def __init__(self, config: CorpusConfig):
        self.config = config
        self.minhash = config.dedup and MinHash(config.dedup)
        self.contamination = Contamination(config.decontaminate, config.decontaminate_ngram)

    def pieces(self, text: str, source: Source) -> list[Piece]:
        """The pieces of a document. Each has the rule that rejects it, or the numbers that find its duplicates."""
        if isinstance(text, Unreadable):
            return [Piece(text, 0, "unreadable")]
        text, pieces = clean(text, source.cleaning), []
        if source.quality and source.quality.c4:
            text, dropped = select_lines(text, source.quality.c4)
            if dropped:
                pieces.append(Piece(dropped, len(words(dropped)), "c4_lines"))
        if len(text) < source.min_chars or len(text) > (source.max_chars or math.inf):
            rule = "too_short" if len(text) < source.min_chars else "too_long"
            return [*pieces, Piece(text, len(words(text)), rule)]
        parts = [part for part in sections(text) if part.strip()]
        listed = [words(part) for part in parts] + [[]]
        for i, part in enumerate(parts):
            following = listed[i + 1][: self.config.decontaminate_ngram - 1]  # no run hides across a cut
            pieces.append(self._piece(part, listed[i], following, source.quality))
        return pieces

    def _piece(self, text: str, words: list[bytes], following: list[bytes], quality: Quality | None) -> Piece:
        numbers, count = hashes(words), len(words)
        if quality and (rule := judge(text, words, numbers, quality)):
            return Piece(text, count, rule)
        if name := self.contamination.find(np.concatenate([numbers, hashes(following)])):
            return Piece(text, count, f"contaminated: {name}")
        keys, shingles = fingerprint(words or [text.strip().encode()]), np.empty(0, np.uint32)
        if self.minhash:
            shingles = self.minhash.shingles(numbers)
            keys = np.concatenate([keys, self.minhash.keys(shingles)])
        return Piece(text, count, None, keys, shingles)


def _start_worker(preparation: Preparation) -> None:
    global _worker
    _worker = preparation


def _prepare(number: int, documents: list[Document]) -> list[tuple[Document, list[Piece]]]:
    """Each document of a batch, without its text, and its pieces. number: of the source."""
    source = _worker.config.sources[number]
    return [(document._replace(text=""), _worker.pieces(document.text, source)) for document in documents]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text) + 100  # memory of a document without text
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    yield batch


# ----------------------------------------------------------------------------------------------------------- the stage


class Tally:
    """What was read, kept and dropped, with examples. JSON types only, so that it can be saved."""

    def __init__(self, config: CorpusConfig):
        empty = {"read": 0, "documents": 0, "bytes": 0, "words_read": 0, "words": 0}
        self.sources = {source.name: empty | {"dropped": {}, "dropped_words": {}} for source in config.sources}
        self.samples: list[list] = []
        self.examples: dict[str, list] = {}

    def drop(self, source: str, id: str, piece: Piece, rule: str) -> None:
        for column, amount in (("dropped", 1), ("dropped_words", piece.words)):
            table = self.sources[source][column]
            table[rule] = table.get(rule, 0) + amount
        _sample(self.examples.setdefault(f"{source}, {rule}", []), EXAMPLES, source, id, piece.text)

    def keep(self, source: str, id: str, text: str, words: int) -> None:
        for column, amount in (("documents", 1), ("bytes", len(text.encode())), ("words", words)):
            self.sources[source][column] += amount
        _sample(self.samples, SAMPLES, source, id, text)

    def counts(self) -> dict:
        """For the manifest."""
        sums, dropped = Counter(), Counter()
        for table in self.sources.values():
            sums.update({key: table[key] for key in ("read", "documents", "bytes", "words")})
            dropped.update(table["dropped"])
        return {**sums, "dropped": dict(sorted(dropped.items())), "sources": self.sources}


def _sample(sample: list, size: int, source: str, id: str, text: str) -> None:
    """Keeps the texts with the smallest hashes: a random sample, the same in every run."""
    sample.append([zlib.crc32(f"{source}\n{id}".encode()), id, source, text[:400]])
    sample.sort()
    del sample[size:]


def job(config: CorpusConfig, directory: Path, command: str) -> Stage:
    """The stage that makes a corpus in `directory`. command: what the user types to make it."""
    return Stage(directory, config, inputs((*config.sources, *config.decontaminate), directory), command, __file__)


def build(job: Stage, config: CorpusConfig, workers: int = 1, force: bool = False) -> None:
    """Makes the corpus if it is missing."""
    directory = job.directory
    if job.up_to_date(force):
        return
    for source in (*config.sources, *config.decontaminate):
        source.inputs()  # UserError if a file is missing, before --force removes the old corpus
    with job.making(keep=True):
        made = {"config": job.config, "read": job.read}
        if force or not _continues(directory, made):
            job.clear()
        try:
            tally = gather(config, directory, workers, made)
        except sqlite3.OperationalError as error:  # a full disk
            raise UserError(f"{directory}: {error}; fix that and run the same command again") from None
        counts = tally.counts()
        _report(config, tally)
        if not counts["documents"]:
            none = f"the corpus is empty: none of {counts['read']:,} documents was kept"
            raise UserError(f"{none}; add sources, or change their min_chars and quality")
        (directory / "DATA_CARD.md").write_text(card(directory.parent.name, config, tally), encoding="utf-8")
        job.finish(counts)
        shutil.rmtree(directory / "partial")
        log.info(f"corpus: {counts['documents']:,} documents, {counts['bytes'] / 1e6:.1f} MB -> {directory}")


def _report(config: CorpusConfig, tally: Tally) -> None:
    for source in config.sources:
        table = tally.sources[source.name]
        log_kept(source.name, table["words"], table["words_read"], "words", table["dropped_words"])
        if unreadable := table["dropped"].get("unreadable"):
            log.warning(f"{source.name}: {unreadable:,} of {table['read']:,} records could not be read; see the card")
        tokens, asked = table["bytes"] / BYTES_PER_TOKEN, source.max_tokens
        if asked and tokens < asked and not source.max_documents:
            log.warning(f"{source.name} has only about {tokens:,.0f} of the {asked:,} tokens of max_tokens")


def _continues(directory: Path, made: dict) -> bool:
    """True if an interrupted build of the same corpus has left finished shards."""
    if not (directory / "partial/index.db").is_file():
        return False
    with Index(None, directory / "partial") as index:
        state = index.state() or {"made": None}
    return state["made"] == made and not stage.damage(directory, state["shards"], contents=False)


def gather(config: CorpusConfig, directory: Path, workers: int, made: dict) -> Tally:
    """Writes the shards, each closed once it holds SHARD_BYTES, and after each the state to continue from."""
    tally, preparation = Tally(config), Preparation(config)
    (directory / "partial").mkdir(exist_ok=True)
    with (
        Index(config.dedup, directory / "partial") as index,
        cli.pool(workers, _start_worker, preparation) as pool,
    ):
        state = index.state() or {"made": made, "source": 0, "read": 0, "shards": {}, "tally": vars(tally)}
        vars(tally).update(state["tally"])
        shards = state["shards"]
        if shards:
            log.info(f"corpus: continuing after {len(shards)} finished shards")
        lines = _kept(pool, config, workers, state, tally, index)
        for first in lines:
            path = directory / f"shard_{len(shards):05d}.jsonl"
            with open(path, "wb") as shard:
                for line in itertools.chain([first], lines):
                    shard.write(line)
                    if shard.tell() >= SHARD_BYTES:
                        break
            shards |= stage.digests(directory, [path])
            index.commit(state | {"tally": vars(tally)})
    return tally


def _kept(pool, config: CorpusConfig, workers: int, state: dict, tally: Tally, index: Index) -> Iterator[bytes]:
    """The lines of the shards. Updates `source` and `read` of the state: the position after each line."""
    for number in range(state["source"], len(config.sources)):
        source = config.sources[number]
        rest = source.max_documents and source.max_documents - state["read"]
        batches = _batches(itertools.islice(source.documents(workers, state["read"]), rest))
        prepared = cli.ordered(pool, functools.partial(_prepare, number), batches, 2 * workers)
        yield from _kept_of(source, itertools.chain.from_iterable(prepared), state, tally, index)
        state |= {"source": number + 1, "read": 0}


def _kept_of(source: Source, prepared: Iterator, state: dict, tally: Tally, index: Index) -> Iterator[bytes]:
    """The lines that a source adds to the shards."""
    counts, budget, share = tally.sources[source.name], (source.max_tokens or math.inf) * BYTES_PER_TOKEN, 0.0

    def done() -> tuple[float, float]:
        return counts["read"], counts["read"] / share if share else 0

    for document, pieces in progress(prepared, done, "documents", source.name):
        if counts["bytes"] >= budget:
            return
        share = max(document.read, counts["bytes"] / budget)
        state["read"] += 1
        counts["read"] += 1
        kept = []
        for piece in pieces:
            counts["words_read"] += piece.words
            if rule := piece.rule or index.duplicate(piece.keys, piece.shingles):
                tally.drop(source.name, document.id, piece, rule)
            else:
                kept.append(piece)
        if text := "".join(piece.text for piece in kept).strip("\n"):
            tally.keep(source.name, document.id, text, sum(piece.words for piece in kept))
            record = {"text": text, "source": source.name, "id": document.id}
            yield json.dumps(record, ensure_ascii=False).encode() + b"\n"


def card(name: str, config: CorpusConfig, tally: Tally) -> str:
    """DATA_CARD.md: what the corpus holds, where it comes from, what was left out and why."""
    counts, examples = tally.counts(), []
    columns = ("documents read", "kept", "bytes kept", "words kept", "share of the words read")
    rows, dropped = [("source", "licence", *columns)], [("source", "rule", "dropped", "words")]
    for source in config.sources:
        table = tally.sources[source.name]
        numbers = [f"{table[key]:,}" for key in ("read", "documents", "bytes", "words")]
        share = table["words"] / max(1, table["words_read"])
        rows.append((source.name, source.licence, *numbers, f"{share:.1%}"))
        for rule, number in sorted(table["dropped"].items()):
            dropped.append((source.name, rule, f"{number:,}", f"{table['dropped_words'][rule]:,}"))
            for _, id, _, text in tally.examples[f"{source.name}, {rule}"]:
                examples.append(f"- {source.name}, {rule}, `{id}`: {_line(text)}")
    samples = [f"- {source}, `{id}`: {_line(text)}" for _, id, source, text in tally.samples]
    near = "have the same words"
    if config.dedup:
        near += f" or share {config.dedup.threshold:.0%} of their runs of {config.dedup.ngram} words"
    sets = ", ".join(source.name for source in config.decontaminate) or "no evaluation set: none is named"
    lines = [
        f"# Corpus of {name}\n",
        f"{counts['documents']:,} documents, {counts['bytes']:,} bytes of UTF-8 text, {counts['words']:,} words.",
        "The manifest beside this card has the settings and the inputs.\n\n## Sources\n",
        cli.table(rows, range(2, 7), markdown=True),
        "\n## Left out\n",
        f"Documents, and sections of documents over {2 * SECTION_CHARS:,} characters, by the first rule that each",
        "fails; `c4_lines` counts documents that lost lines. Duplicates of a text kept before",
        f"{near}. Contaminated text shares {config.decontaminate_ngram} words in a row with {sets}.\n",
        cli.table(dropped, (2, 3), markdown=True),
        "\n## Examples of what was left out\n",
        *(examples or ["Nothing was."]),
        "\n## Ten documents at random\n",
        *samples,
    ]
    return "\n".join(lines) + "\n"


def _line(text: str) -> str:
    """The beginning of a text, on one line of Markdown."""
    text = " ".join(text[:300].split())
    return f"`{text.replace('`', chr(39))}`" if text else "(empty)"
