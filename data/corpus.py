"""Sources to corpus: clean, judged, decontaminated, deduplicated documents in JSONL shards, and a data card."""

# Workers clean and judge. This process finds duplicates, text after text: they depend on the texts kept before. So the
# same inputs give the same bytes for any number of workers. An interrupted build continues after its last shard.
# Long documents are judged by section: a bad chapter is dropped, the book stays.

import contextlib
import functools
import itertools
import json
import math
import shutil
import sqlite3
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

import cli
import stage
from cli import UserError, log, progress
from data.clean import clean
from data.dedup import Deduplication, Index, MinHash
from data.holdout import Holdout, split_hash, threshold
from data.quality import judge, select_lines
from data.sections import SECTION_CHARS, sections
from data.sources import Record, Source, Unreadable, inputs, log_kept
from data.words import fingerprint, hashes, ngrams, words
from stage import Stage, check_types

SHARD_BYTES = 64 << 20
BATCH_CHARS = 1 << 19  # of documents that one worker takes at a time
BYTES_PER_TOKEN = 4.25  # of English prose with 32,768 pieces: token budgets count before there is a tokenizer
EXAMPLES = 2  # in the card: rejected texts per source and rule


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


class Contamination:
    """The n-grams of words of some evaluation sets. Memory: 9 bytes per n-gram."""

    def __init__(self, sources: Sequence[Source], n: int):
        self.n, self.names = n, [source.name for source in sources]
        runs, owners = [np.empty(0, np.uint64)], [np.empty(0, np.uint8)]
        for number, source in enumerate(sources):
            for document in itertools.islice(source.documents(1), source.max_documents):
                # Training text is compared once it is clean; the set may be clean already.
                for version in {document.value, clean(document.value, source.cleaning)}:
                    runs.append(ngrams(hashes(words(version)), n))
                    owners.append(np.full(len(runs[-1]), number, np.uint8))
        self.runs, first = np.unique(np.concatenate(runs), return_index=True)
        self.owners = np.concatenate(owners)[first]

    def find(self, hashes: np.ndarray) -> str | None:
        """The name of an evaluation set that shares an n-gram with a text, or None. hashes: of its words."""
        runs = ngrams(hashes, self.n)
        at = np.searchsorted(self.runs[1:], runs, side="right")  # the last run of the sets that is not greater
        shared = at[self.runs[at] == runs] if len(self.runs) else at[:0]
        return self.names[self.owners[shared].min()] if len(shared) else None


class Piece(NamedTuple):
    """A document, or a section of one, and the rule that rejects it or the numbers that find its duplicates."""

    text: str
    words: int
    rule: str | None = None
    keys: np.ndarray | None = None  # for Index.duplicate
    shingles: np.ndarray | None = None


class Preparation:
    """Cleans and judges each document by itself."""

    def __init__(self, config: CorpusConfig):
        self.config = config
        self.minhash = config.dedup and MinHash(config.dedup)
        self.contamination = Contamination(config.decontaminate, config.decontaminate_ngram)

    def pieces(self, text: str, source: Source) -> list[Piece]:
        """The pieces of a document, dropped ones included."""
        if isinstance(text, Unreadable):
            return [Piece(text, 0, "unreadable")]
        text, pieces = clean(text, source.cleaning), []
        if source.quality and source.quality.c4:
            text, dropped = select_lines(text, source.quality.c4)
            if dropped:
                pieces.append(Piece(dropped, len(words(dropped)), "c4_lines"))
        short = len(text) < source.min_chars
        if short or len(text) > (source.max_chars or math.inf):
            return [*pieces, Piece(text, len(words(text)), "too_short" if short else "too_long")]
        parts = [part for part in sections(text) if part.strip()]
        listed = [words(part) for part in parts] + [[]]
        for part, spelled, following in zip(parts, listed, listed[1:], strict=False):
            pieces.append(self._piece(part, spelled, following, source))
        return pieces

    def _piece(self, text: str, words: list[bytes], following: list[bytes], source: Source) -> Piece:
        numbers, count = hashes(words), len(words)
        if source.quality and (rule := judge(text, words, numbers, source.quality)):
            return Piece(text, count, rule)
        following = hashes(following[: self.contamination.n - 1])  # no run hides across a cut
        if name := self.contamination.find(np.concatenate([numbers, following])):
            return Piece(text, count, f"contaminated: {name}")
        keys, shingles = fingerprint(words or [text.strip().encode()]), np.empty(0, np.uint32)
        if self.minhash:
            shingles = self.minhash.shingles(numbers)
            keys = np.concatenate([keys, self.minhash.keys(shingles)])
        return Piece(text, count, None, keys, shingles)


def _prepare(number: int, documents: list[Record]) -> list[tuple[Record, list[Piece]]]:
    """Each document of a batch of a source, without its text, and its pieces. Runs in a worker."""
    source = _preparation.config.sources[number]
    return [(document._replace(value=""), _preparation.pieces(document.value, source)) for document in documents]


def _batches(documents: Iterable[Record]) -> Iterator[list[Record]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.value) + 100  # memory of a document without text
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    yield batch


class Tally:
    """How far a build has come: what was read, kept and dropped, with examples. JSON types only: `Index` saves it."""

    def __init__(self, config: CorpusConfig, made: dict):
        self.made, self.source, self.shards = made, 0, {}  # source: the number of the source that is read
        empty = {"read": 0, "documents": 0, "bytes": 0, "words_read": 0, "words": 0}
        self.sources = {source.name: empty | {"dropped": {}, "dropped_words": {}} for source in config.sources}
        self.examples: dict[str, list] = {}  # by "source, rule"; of kept documents by ""

    def add(self, source: str, id: str, text: str, words: int, rule: str = "") -> None:
        """Counts a text that is kept, or dropped by a rule."""
        table = self.sources[source]
        if rule:
            table["dropped"][rule] = table["dropped"].get(rule, 0) + 1
            table["dropped_words"][rule] = table["dropped_words"].get(rule, 0) + words
        else:
            table["documents"] += 1
            table["bytes"] += len(text.encode())
            table["words"] += words
        # The texts with the smallest hashes are a random sample, the same in every run.
        sample = self.examples.setdefault(rule and f"{source}, {rule}", [])
        sample.append([zlib.crc32(f"{source}\n{id}".encode()), id, source, text[:400]])
        sample.sort()
        del sample[EXAMPLES if rule else 10 :]

    def counts(self) -> dict:
        """For the manifest."""
        sums, dropped = Counter(), Counter()
        for table in self.sources.values():
            sums.update({key: table[key] for key in ("read", "documents", "bytes", "words")})
            dropped.update(table["dropped"])
        return {**sums, "dropped": dict(sorted(dropped.items())), "sources": self.sources}


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
        with contextlib.closing(Index(None, directory / "partial")) as index:
            continues = (index.state() or {}).get("made") == made
        if force or not continues:
            job.clear()
        try:
            tally = gather(config, directory, workers, made)
        except sqlite3.OperationalError as error:  # a full disk
            raise UserError(f"{directory}: {error}; fix that and run the same command again") from None
        counts = tally.counts()
        for source in config.sources:
            table = counts["sources"][source.name]
            log_kept(source.name, table["words"], table["words_read"], "words", table["dropped_words"])
            if bad := table["dropped"].get("unreadable"):
                log.warning(f"{source.name}: {bad:,} of {table['read']:,} records could not be read; see the card")
            tokens, asked = table["bytes"] / BYTES_PER_TOKEN, source.max_tokens
            if asked and tokens < asked and not source.max_documents:
                log.warning(f"{source.name} has only about {tokens:,.0f} of the {asked:,} tokens of max_tokens")
        if not counts["documents"]:
            none = f"the corpus is empty: none of {counts['read']:,} documents was kept"
            raise UserError(f"{none}; add sources, or change their min_chars and quality")
        (directory / "DATA_CARD.md").write_text(card(directory.parent.name, config, tally), encoding="utf-8")
        job.finish(counts)
        shutil.rmtree(directory / "partial")
        log.info(f"corpus: {counts['documents']:,} documents, {counts['bytes'] / 1e6:.1f} MB -> {directory}")


def gather(config: CorpusConfig, directory: Path, workers: int, made: dict) -> Tally:
    """Writes the shards, each closed once it holds SHARD_BYTES, and after each the tally to continue from."""
    global _preparation  # the workers inherit it
    _preparation, tally = Preparation(config), Tally(config, made)
    with contextlib.closing(Index(config.dedup, directory / "partial")) as index, cli.pool(workers) as pool:
        vars(tally).update(index.state() or {})
        if tally.shards:
            log.info(f"corpus: continuing after {len(tally.shards)} finished shards")
        lines = _lines(pool, config, workers, tally, index)
        for first in lines:
            path = directory / f"shard_{len(tally.shards):05d}.jsonl"
            with open(path, "wb") as shard:
                for line in itertools.chain([first], lines):
                    shard.write(line)
                    if shard.tell() >= SHARD_BYTES:
                        break
            tally.shards |= stage.digests(directory, [path])
            index.commit(vars(tally))
    return tally


def _lines(pool, config: CorpusConfig, workers: int, tally: Tally, index: Index) -> Iterator[bytes]:
    """The lines of the shards that follow those of the tally."""
    for number in range(tally.source, len(config.sources)):
        source = config.sources[number]
        counts = tally.sources[source.name]
        documents = source.documents(workers, counts["read"])
        if source.max_documents:
            documents = itertools.islice(documents, source.max_documents - counts["read"])
        prepared = cli.ordered(pool, functools.partial(_prepare, number), _batches(documents), 2 * workers)
        yield from _kept(source, itertools.chain.from_iterable(prepared), tally, index)
        tally.source += 1


def _kept(source: Source, prepared: Iterable, tally: Tally, index: Index) -> Iterator[bytes]:
    counts, budget, share = tally.sources[source.name], (source.max_tokens or math.inf) * BYTES_PER_TOKEN, 0.0

    def done() -> tuple[float, float]:
        return counts["read"], counts["read"] / share if share else 0

    for document, pieces in progress(prepared, done, "documents", source.name):
        if counts["bytes"] >= budget:
            return
        share = max(document.read, counts["bytes"] / budget)
        counts["read"] += 1
        text, kept_words = "", 0
        for piece in pieces:
            counts["words_read"] += piece.words
            if rule := piece.rule or index.duplicate(piece.keys, piece.shingles):
                tally.add(source.name, document.id, piece.text, piece.words, rule)
            else:
                text += piece.text
                kept_words += piece.words
        if text := text.strip("\n"):
            tally.add(source.name, document.id, text, kept_words)
            record = {"text": text, "source": source.name, "id": document.id}
            yield json.dumps(record, ensure_ascii=False).encode() + b"\n"


def card(name: str, config: CorpusConfig, tally: Tally) -> str:
    """DATA_CARD.md: what the corpus holds, where it comes from, what was left out and why."""
    counts = tally.counts()
    columns = ("documents read", "kept", "bytes kept", "words kept", "share of the words read")
    rows, dropped = [("source", "licence", *columns)], [("source", "rule", "dropped", "words")]
    for source in config.sources:
        table = tally.sources[source.name]
        numbers = [f"{table[key]:,}" for key in ("read", "documents", "bytes", "words")]
        rows.append((source.name, source.licence, *numbers, f"{table['words'] / max(1, table['words_read']):.1%}"))
        for rule, number in sorted(table["dropped"].items()):
            dropped.append((source.name, rule, f"{number:,}", f"{table['dropped_words'][rule]:,}"))
    examples = []
    for rule, sample in sorted(tally.examples.items()):  # the documents that are kept come first, under ""
        for _, id, source, text in sample:
            text = " ".join(text[:300].split()).replace("`", "'")
            examples.append(f"- {rule or source}, `{id}`: " + (f"`{text}`" if text else "(empty)"))
    kept = len(tally.examples[""])
    near = f"or share {config.dedup.threshold:.0%} of their runs of {config.dedup.ngram} words " if config.dedup else ""
    sets = ", ".join(source.name for source in config.decontaminate) or "no evaluation set: none is named"
    lines = [
        f"# Corpus of {name}\n",
        f"{counts['documents']:,} documents, {counts['bytes']:,} bytes of UTF-8 text, {counts['words']:,} words.",
        "The manifest beside this card has the settings and the inputs.\n\n## Sources\n",
        cli.table(rows, range(2, 7), markdown=True),
        "\n## Left out\n",
        f"Documents, and sections of documents over {2 * SECTION_CHARS:,} characters, by the first rule that each",
        "fails; `c4_lines` counts documents that lost lines. Duplicates have the same words as a text kept before",
        f"{near}. Contaminated text shares {config.decontaminate_ngram} words in a row with {sets}.\n",
        cli.table(dropped, (2, 3), markdown=True),
        "\n## Examples of what was left out\n",
        *(examples[kept:] or ["Nothing was."]),
        "\n## Ten documents at random\n",
        *examples[:kept],
    ]
    return "\n".join(lines) + "\n"
