"""Sources to corpus: clean, judged, decontaminated, deduplicated documents in JSONL shards, and a data card."""

# Workers clean and judge. This process finds duplicates, one text after another, because they depend on the texts kept
# so far. So any number of workers gives the same bytes. An interrupted build continues after its last finished shard.
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
BATCH_CHARS = 1 << 19  # characters of the documents that one worker takes at a time
BYTES_PER_TOKEN = 4.25  # English prose, 32,768 pieces: token budgets need an estimate before there is a tokenizer
EXAMPLES = 2  # rejected texts that the card shows for each source and rule


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
    rule = Holdout(fraction, threshold(numbers, fraction))
    if rule.threshold and rule.threshold > math.ceil(fraction * 2**64):  # few documents: one is held out
        train, val = 0, 0
        for record in records(directory):
            parts = rule.split(record["text"])
            train, val = train + len(parts[0]), val + len(parts[1])
        if val > train:
            return Holdout(fraction, None)
    return rule


class Piece(NamedTuple):
    """A document, or a section of one, and the rule that rejects it or the numbers that find its duplicates."""

    text: str
    words: int
    rule: str | None
    keys: np.ndarray | None = None  # for Index.duplicate
    shingles: np.ndarray | None = None


def runs_of(sources: Sequence[Source], n: int) -> dict[str, np.ndarray]:
    """{name: the sorted hashes of its runs of n words} of evaluation sets. Memory: 8 bytes per run."""
    sets = {}
    for source in sources:
        runs, unreadable = [np.zeros(1, np.uint64)], 0
        for document in source.documents(1):
            # Training text is cleaned before it is compared. So compare the set as it is, and cleaned.
            for text in {document.value, clean(document.value, source.cleaning)[0]}:
                runs.append(ngrams(hashes(words(text)), n))
            unreadable += isinstance(document.value, Unreadable)
        if unreadable:
            log.warning(f"{source.name}: records of this evaluation set that could not be read: {unreadable:,}")
        sets[source.name] = np.unique(np.concatenate(runs))
    return sets


def pieces(text: str, source: Source) -> Iterator[Piece]:
    """The pieces of a document, dropped pieces included."""
    if isinstance(text, Unreadable):
        yield Piece(text, 0, "unreadable")
        return
    text, repeated = clean(text, source.cleaning)
    lost = {"repeated_lines": repeated}
    if source.quality and source.quality.c4:
        text, lost["c4_lines"] = select_lines(text, source.quality.c4)
    if len(text) < source.min_chars:
        lost["too_short"], text = text, ""
    for rule, lines in lost.items():
        if lines or rule == "too_short":
            yield Piece(lines, len(words(lines)), rule)
    sets, n, minhash = _settings
    parts = [part for part in sections(text) if part.strip()]
    spelled = [words(part) for part in parts] + [[]]
    for i, part in enumerate(parts):
        numbers = hashes(spelled[i])
        rule = judge(part, spelled[i], numbers, source.quality) if source.quality else None
        following = hashes(spelled[i + 1][: n - 1])  # also finds runs across a cut
        runs = ngrams(np.append(numbers, following), n)
        for name, known in sets.items():
            at = np.searchsorted(known[1:], runs, side="right")  # the last known run that is not greater
            if (known[at] == runs).any():
                rule = rule or f"contaminated: {name}"
        keys, shingles = fingerprint(spelled[i] or [part.strip().encode()]), np.empty(0, np.uint32)
        if minhash and not rule:
            shingles = minhash.shingles(numbers)
            keys = np.append(keys, minhash.keys(shingles))
        yield Piece(part, len(spelled[i]), rule, keys, shingles)


def _prepare(source: Source, documents: list[Record]) -> list[tuple[Record, list[Piece]]]:
    """For each document of a batch: its record without the text, and its pieces. Runs in a worker."""
    return [(document._replace(value=""), [*pieces(document.value, source)]) for document in documents]


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
    """Counts of what a build has read, kept and dropped, with examples. Only JSON types, because `Index` saves it."""

    def __init__(self, config: CorpusConfig):
        self.source, self.shards = 0, 0  # the number of the source that is read; finished shards
        empty = {"read": 0, "documents": 0, "bytes": 0, "words_read": 0, "words": 0}
        self.sources = {source.name: empty | {"dropped": {}, "dropped_words": {}} for source in config.sources}
        self.examples: dict[str, list] = {}  # of dropped texts, by "source, rule"

    def add(self, source: str, id: str, text: str, words: int, rule: str = "") -> None:
        """Counts a text that is kept, or dropped by a rule."""
        table = self.sources[source]
        if not rule:
            table["documents"] += 1
            table["bytes"] += len(text.encode())
            table["words"] += words
            return
        table["dropped"][rule] = table["dropped"].get(rule, 0) + 1
        table["dropped_words"][rule] = table["dropped_words"].get(rule, 0) + words
        # The texts with the smallest hashes are a random sample, the same in every run.
        sample = self.examples.setdefault(f"{source}, {rule}", [])
        sample.append([zlib.crc32(f"{source}\n{id}".encode()), id, text[:400]])
        sample.sort()
        del sample[EXAMPLES:]

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
        made_from = json.dumps([job.config, job.read]).encode()
        partial = directory / f"partial_{zlib.crc32(made_from):08x}"
        if force or not partial.exists():
            job.clear()
        try:
            tally = gather(config, partial, workers)
        except sqlite3.OperationalError as error:  # a full disk
            raise UserError(f"{directory}: {error}; fix that and run the same command again") from None
        counts = tally.counts()
        for source in config.sources:
            table, asked = counts["sources"][source.name], source.max_tokens
            log_kept(source.name, table["words"], table["words_read"], "words", table["dropped_words"])
            if bad := table["dropped"].get("unreadable"):
                log.warning(f"{source.name}: records that could not be read: {bad:,}; see the card")
            tokens = table["bytes"] / BYTES_PER_TOKEN
            if asked and tokens < asked and not source.max_documents:
                log.warning(f"{source.name} has only about {tokens:,.0f} of the {asked:,} tokens of max_tokens")
        if not counts["documents"]:
            none = f"the corpus is empty: documents read {counts['read']:,}, kept 0"
            raise UserError(f"{none}; add sources, or change their min_chars and quality")
        (directory / "DATA_CARD.md").write_text(card(directory.parent.name, config, tally), encoding="utf-8")
        job.finish(counts)
        shutil.rmtree(partial)
        log.info(f"corpus: {counts['bytes'] / 1e6:.1f} MB, documents: {counts['documents']:,} -> {directory}")


def gather(config: CorpusConfig, partial: Path, workers: int) -> Tally:
    """Writes the shards. After each, saves in `partial` what an interrupted build needs to continue."""
    global _settings  # the workers inherit them
    sets, n = runs_of(config.decontaminate, config.decontaminate_ngram), config.decontaminate_ngram
    _settings = sets, n, config.dedup and MinHash(config.dedup)
    tally = Tally(config)
    with contextlib.closing(Index(config.dedup, partial)) as index, cli.pool(workers) as pool:
        vars(tally).update(index.state())
        if tally.shards:
            log.info(f"corpus: continuing with shard_{tally.shards:05d}.jsonl")
        lines = _lines(pool, config, workers, tally, index)
        for first in lines:
            path = partial.parent / f"shard_{tally.shards:05d}.jsonl"
            with open(path, "wb") as shard:
                for line in itertools.chain([first], lines):
                    shard.write(line)
                    if shard.tell() >= SHARD_BYTES:
                        break
            stage.sync(path)
            tally.shards += 1
            index.commit(vars(tally))
    return tally


def _lines(pool, config: CorpusConfig, workers: int, tally: Tally, index: Index) -> Iterator[bytes]:
    """The lines of the shards that are not written yet."""
    state = 0, 0.0  # documents read of a source, and documents expected

    def done() -> tuple[int, float]:
        return state

    for source in config.sources[tally.source :]:
        counts, budget = tally.sources[source.name], (source.max_tokens or math.inf) * BYTES_PER_TOKEN
        batches = _batches(source.documents(workers, counts["read"]))
        prepared = cli.ordered(pool, functools.partial(_prepare, source), batches, 2 * workers)
        for document, parts in progress(itertools.chain.from_iterable(prepared), done, "documents", source.name):
            if counts["bytes"] >= budget:
                break
            counts["read"] += 1
            share = max(document.read, counts["bytes"] / budget)
            state = counts["read"], counts["read"] / share if share else 0
            text, kept_words = "", 0
            for piece in parts:
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
        tally.source += 1


def card(name: str, config: CorpusConfig, tally: Tally) -> str:
    """DATA_CARD.md: what the corpus holds, where it comes from, what was left out and why."""
    counts, dropped = tally.counts(), [("source", "rule", "dropped", "words")]
    rows = [("source", "licence", "documents read", "kept", "bytes kept", "words read", "kept")]
    for source in config.sources:
        table = tally.sources[source.name]
        numbers = [f"{table[key]:,}" for key in ("read", "documents", "bytes", "words_read", "words")]
        rows.append((source.name, source.licence, *numbers))
        for rule, number in sorted(table["dropped"].items()):
            dropped.append((source.name, rule, f"{number:,}", f"{table['dropped_words'][rule]:,}"))
    examples = []
    for rule, sample in sorted(tally.examples.items()):
        for _, id, text in sample:
            text = " ".join(text[:300].split()).replace("`", "'")
            examples.append(f"- {rule}, `{id}`: " + (f"`{text}`" if text else "(empty)"))
    near = f" or share {config.dedup.threshold:.0%} of their runs of {config.dedup.ngram} words" if config.dedup else ""
    sets = ", ".join(source.name for source in config.decontaminate) or "an evaluation set: none is configured"
    lines = [
        f"# Corpus of {name}\n",
        f"Documents: {counts['documents']:,}. Bytes of UTF-8 text: {counts['bytes']:,}. Words: {counts['words']:,}.",
        "The manifest beside this card has the settings and the inputs.\n\n## Sources\n",
        cli.table(rows, range(2, 7), markdown=True),
        "\n## Left out\n",
        f"Documents, and sections of documents over {2 * SECTION_CHARS:,} characters, by the first rule that each",
        "fails; `c4_lines` and `repeated_lines` count documents that lost lines. Duplicates have the same words as a",
        f"text kept before{near}. Contaminated text shares {config.decontaminate_ngram} words in a row with {sets}.\n",
        cli.table(dropped, (2, 3), markdown=True),
        "\n## Examples of what was left out\n",
        *(examples or ["Nothing was left out."]),
    ]
    return "\n".join(lines) + "\n"
