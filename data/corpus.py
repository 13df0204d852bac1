"""Sources to corpus: clean, judged, decontaminated, deduplicated documents in JSONL shards, and a card that says what
they are and what was left out.

    python pipeline.py configs/tiny.py corpus   ->  runs/tiny/corpus

The same inputs give the same bytes, whatever the number of workers, and however often it was interrupted: it goes on
from the last finished shard.

Workers clean and judge; this process decides on duplicates, one text after another, because what is one depends on what
was kept before. Long documents are judged by section: a bad chapter is dropped, the book stays.
"""

import functools
import itertools
import json
import math
import re
import shutil
import zlib
from collections import Counter
from collections.abc import Iterator
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
from data.holdout import held_out as held_out
from data.quality import Quality, judge, select_lines
from data.sources import Document, Source, Unreadable, inputs
from data.words import fingerprint, hashes, words
from stage import Stage, check_types

SHARD_BYTES = 64 << 20
BATCH_CHARS = 1 << 19  # of documents that one worker takes at a time
BYTES_PER_TOKEN = 4.25  # of English prose, with 32,768 pieces: token budgets count before there is a tokenizer
SECTION_CHARS = 6_000  # a longer document is judged in sections of this to twice this length
SAMPLES, EXAMPLES = 10, 2  # shown in the card: documents, and rejections of a rule and source


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """What a corpus is made of. Raises TypeError or ValueError, naming the field, for what cannot be."""

    sources: tuple[Source, ...]
    """Read in this order; of equal texts the first is kept."""
    dedup: Deduplication | None = Deduplication()
    """None drops exact duplicates only: texts that differ in nothing but case, punctuation and white space."""
    decontaminate: tuple[Source, ...] = ()
    """Evaluation sets: texts that share a run of `decontaminate_ngram` words with one are dropped."""
    decontaminate_ngram: int = 13

    def __post_init__(self):
        check_types(self)
        if not self.sources:
            raise ValueError("sources is empty; expected at least one")
        for field in ("sources", "decontaminate"):
            names = [source.name for source in getattr(self, field)]
            if len(set(names)) < len(names):
                raise ValueError(f"{field} are called {', '.join(names)}; give each a name of its own")
        if self.decontaminate_ngram < 1:
            raise ValueError(f"decontaminate_ngram is {self.decontaminate_ngram}; expected at least 1")


def records(directory: Path) -> Iterator[dict[str, str]]:
    """The documents of a finished corpus, in order, each with `text`, `source` and `id`."""
    for shard in sorted(directory.glob("shard_*.jsonl")):
        with open(shard, encoding="utf-8") as file:
            yield from map(json.loads, file)


# -------------------------------------------------------------------------------------------- what a worker does

PARAGRAPH = re.compile(r"\n{2,}")
GAPS = (PARAGRAPH, re.compile(r"\n"), re.compile(r"(?<=[.!?]) +"), re.compile(r" +"))


def sections(text: str) -> list[str]:
    """A long text cut at gaps between its paragraphs (lines, sentences, words, if there are none) into sections, which
    joined give the text again. Where it is cut, the paragraph before says, so that two copies are cut alike though
    one may have a preface."""
    if len(text) <= 2 * SECTION_CHARS:
        return [text]
    found, start, last = [], 0, 0  # where the section begins, and the last gap that it could end at
    for gap in _gaps(text):
        if gap - start > 2 * SECTION_CHARS and last > start:
            found.append(text[start:last])
            start = last
        long_enough = gap - start >= SECTION_CHARS
        if long_enough and zlib.crc32(text[max(last, gap - 200) : gap].strip().encode()) % 4 == 0:
            found.append(text[start:gap])
            start = gap
        last = gap
    rest = text[start:]
    if found and len(rest) < SECTION_CHARS // 2:
        rest = found.pop() + rest
    return [*found, rest]


def _gaps(text: str) -> Iterator[int]:
    """The ends of its paragraphs; within one that is too long for a section, of its lines, and so on."""

    def within(start: int, end: int, kinds: tuple[re.Pattern, ...]) -> Iterator[int]:
        if end - start <= SECTION_CHARS:
            yield end
        elif not kinds:
            yield from range(start + SECTION_CHARS, end, SECTION_CHARS)
            yield end
        else:
            for match in kinds[0].finditer(text, start, end):
                yield from within(start, match.end(), kinds[1:])
                start = match.end()
            if start < end:
                yield from within(start, end, kinds[1:])

    return within(0, len(text), GAPS)


@dataclass(slots=True)
class Piece:
    """A document, or a section of one."""

    text: str
    words: int
    rule: str | None
    """The name of the rule that rejects it."""
    keys: np.ndarray | None = None
    shingles: np.ndarray | None = None


class Preparation:
    """What is done to each document without a look at the others; the same in every worker."""

    def __init__(self, config: CorpusConfig):
        self.config = config
        self.minhash = config.dedup and MinHash(config.dedup)
        self.contamination = Contamination(config.decontaminate, config.decontaminate_ngram)

    def pieces(self, text: str, source: Source) -> list[Piece]:
        """A document's pieces, each with the rule that rejects it or with what duplicates are recognised by."""
        if isinstance(text, Unreadable):
            return [Piece(text, 0, "unreadable")]
        text, found = clean(text, source.cleaning), []
        if source.quality and source.quality.c4:
            text, dropped = select_lines(text, source.quality.c4)
            if dropped:
                found.append(Piece(dropped, len(words(dropped)), "c4_lines"))
        if len(text) < source.min_chars or (source.max_chars and len(text) > source.max_chars):
            rule = "too_short" if len(text) < source.min_chars else "too_long"
            return [*found, Piece(text, len(words(text)), rule)]
        parts = [(part, words(part)) for part in sections(text) if part.strip()]
        after = self.config.decontaminate_ngram - 1
        for i, (part, spelt) in enumerate(parts):
            following = parts[i + 1][1][:after] if i + 1 < len(parts) else []  # no run hides across a cut
            found.append(self._piece(part, spelt, following, source.quality))
        return found

    def _piece(self, text: str, spelt: list[bytes], following: list[bytes], quality: Quality | None) -> Piece:
        numbers = hashes(spelt)
        if quality and (rule := judge(text, spelt, numbers, quality)):
            return Piece(text, len(spelt), rule)
        if found := self.contamination.find(np.concatenate([numbers, hashes(following)])):
            return Piece(text, len(spelt), f"contaminated: {found}")
        keys, shingles = fingerprint(spelt or [text.strip().encode()]), np.empty(0, np.uint32)
        if self.minhash and spelt:
            shingles = self.minhash.shingles(numbers)
            keys = np.concatenate([keys, self.minhash.keys(shingles)])
        elif self.minhash:  # signs only: nothing to compare but the text itself
            keys = np.repeat(keys, 1 + self.minhash.bands)
        return Piece(text, len(spelt), None, keys, shingles)


def _start_worker(preparation: Preparation) -> None:
    global _worker
    _worker = preparation


class Prepared(NamedTuple):
    """A document as a worker gives it back."""

    id: str
    read: float
    chars: int
    pieces: list[Piece]


def _prepare(number: int, documents: list[Document]) -> list[Prepared]:
    source = _worker.config.sources[number]
    return [Prepared(d.id, d.read, len(d.text), _worker.pieces(d.text, source)) for d in documents]


# --------------------------------------------------------------------------------------------- what the stage does


class Tally:
    """What was read, kept and dropped, and examples of it; as JSON, so that an interrupted build goes on counting."""

    def __init__(self, state: dict | None = None):
        self.sources: dict[str, dict] = state["sources"] if state else {}
        self.samples: list[list] = state["samples"] if state else []
        self.examples: dict[str, list] = state["examples"] if state else {}

    def state(self) -> dict:
        return vars(self)

    def of(self, source: str) -> dict:
        empty = {"read": 0, "documents": 0, "bytes": 0, "words_read": 0, "words": 0, "dropped": {}, "dropped_words": {}}
        return self.sources.setdefault(source, empty)

    def dropped(self, source: str, id: str, piece: Piece, rule: str) -> None:
        for table, amount in (("dropped", 1), ("dropped_words", piece.words)):
            table = self.of(source)[table]
            table[rule] = table.get(rule, 0) + amount
        self._keep(self.examples.setdefault(f"{source}\t{rule}", []), EXAMPLES, id, source, piece.text)

    def kept(self, source: str, id: str, text: str, words: int) -> None:
        table = self.of(source)
        table["documents"] += 1
        table["bytes"] += len(text.encode())
        table["words"] += words
        self._keep(self.samples, SAMPLES, id, source, text)

    def _keep(self, sample: list, size: int, id: str, source: str, text: str) -> None:
        """Keeps the texts whose hashes are smallest: a random sample, the same in every run."""
        entry = [zlib.crc32(f"{source}\n{id}".encode()), id, source, text[:400]]
        if len(sample) < size or entry < sample[-1]:
            sample.append(entry)
            sample.sort()
            del sample[size:]

    def counts(self) -> dict:
        """For the manifest."""
        totals = {key: sum(s[key] for s in self.sources.values()) for key in ("read", "documents", "bytes", "words")}
        dropped = Counter()
        for table in self.sources.values():
            dropped.update(table["dropped"])
        return {**totals, "dropped": dict(sorted(dropped.items())), "sources": self.sources}


def job(config: CorpusConfig, directory: Path, command: str) -> Stage:
    """The stage that makes a corpus in `directory`. command: what the user types to make it."""
    read = inputs((*config.sources, *config.decontaminate), directory)
    return Stage(directory, config, read, command, __file__)


def build(job: Stage, config: CorpusConfig, workers: int = 1, force: bool = False) -> None:
    """Makes the corpus, unless it is there."""
    directory = job.directory
    if job.up_to_date(force):
        return
    for source in (*config.sources, *config.decontaminate):
        source.inputs()  # UserError if a file is missing, before --force removes the old corpus
    with job.making(keep=True):
        if job.up_to_date(force):  # another process was faster
            return
        if (state := None if force else _interrupted(directory, job, config)) is None:
            job.clear()
        tally = gather(config, directory, workers, state or _beginning(job))
        counts = tally.counts()
        if not counts["documents"]:
            dropped = ", ".join(f"{n:,} {rule}" for rule, n in counts["dropped"].items()) or "nothing was dropped"
            raise UserError(
                f"the corpus is empty: of {counts['read']:,} documents none was kept ({dropped}); add sources, or "
                "change their min_chars and quality"
            )
        for source in config.sources:
            table = tally.of(source.name)
            share = table["words"] / max(1, table["words_read"])
            log.info(
                f"{source.name}: {table['documents']:,} of {table['read']:,} documents, {share:.1%} of their words kept"
            )
            if unreadable := table["dropped"].get("unreadable"):
                log.warning(
                    f"{source.name}: {unreadable:,} of {table['read']:,} records could not be read; see the card"
                )
            found, asked = table["bytes"] / BYTES_PER_TOKEN, source.max_tokens
            if asked and found < asked and not source.max_documents:
                log.warning(
                    f"{source.name} gave about {found:,.0f} of the {asked:,} tokens asked of it: it has no more"
                )
        (directory / "DATA_CARD.md").write_text(card(directory.parent.name, config, tally), encoding="utf-8")
        job.finish(counts)
        shutil.rmtree(directory / "partial")
        log.info(f"corpus: {counts['documents']:,} documents, {counts['bytes'] / 1e6:.1f} MB -> {directory}")


def _beginning(job: Stage) -> dict:
    made = {"config": job.config, "read": job.read}
    return {"made": made, "source": 0, "read": 0, "tally": None, "index": (0, 0), "shards": {}}


def _interrupted(directory: Path, job: Stage, config: CorpusConfig) -> dict | None:
    """Where an interrupted build of the same corpus had got to, or None."""
    partial = directory / "partial"
    try:
        state = json.loads((partial / "state.json").read_text(encoding="utf-8"))
        sizes = Index.sizes(config.dedup, state["index"])
        whole = all((partial / name).stat().st_size >= size for name, size in sizes.items())
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None
    whole = whole and not stage.damage(directory, state["shards"], contents=False)
    return state if whole and state["made"] == _beginning(job)["made"] else None


def gather(config: CorpusConfig, directory: Path, workers: int, state: dict) -> Tally:
    """Writes shard_00000.jsonl and so on, each closed once it holds SHARD_BYTES. What `partial/` holds from then on is
    enough to go on from there; state: as `partial/state.json` has it."""
    partial = directory / "partial"
    partial.mkdir(exist_ok=True)
    shards, tally = state["shards"], Tally(state["tally"])
    for left in directory.glob("shard_*.jsonl"):
        if left.name not in shards:
            left.unlink()
    if shards:
        log.info(f"corpus: going on after {len(shards)} finished shards")
    preparation = Preparation(config)
    with Index(config.dedup, partial, state["index"]) as index, cli.pool(workers, _start_worker, preparation) as pool:
        documents = _kept(pool, config, workers, state, tally, index)
        for first in documents:
            with open(directory / f"shard_{len(shards):05d}.jsonl", "wb") as shard:
                for line in itertools.chain([first], documents):
                    shard.write(line)
                    if shard.tell() >= SHARD_BYTES:
                        break
            shards |= stage.digests(directory, [Path(shard.name)])
            state |= {"tally": tally.state(), "index": index.sync()}
            stage.write_json(partial / "state.json", state)
    return tally


def _kept(pool, config: CorpusConfig, workers: int, state: dict, tally: Tally, index: Index) -> Iterator[bytes]:
    """The lines of the shards. state: `source` and `read` say where to begin, and at each line how far it has got."""
    for number in range(state["source"], len(config.sources)):
        source = config.sources[number]
        counts, budget = tally.of(source.name), (source.max_tokens or math.inf) * BYTES_PER_TOKEN
        for document in _prepared(pool, number, source, workers, state["read"], counts):
            if counts["bytes"] >= budget:
                break
            state["read"] += 1
            counts["read"] += 1
            kept = []
            for piece in document.pieces:
                counts["words_read"] += piece.words
                if rule := piece.rule or index.duplicate(piece.keys, piece.shingles):
                    tally.dropped(source.name, document.id, piece, rule)
                else:
                    kept.append(piece)
            if text := "".join(piece.text for piece in kept).strip("\n"):
                tally.kept(source.name, document.id, text, sum(piece.words for piece in kept))
                record = {"text": text, "source": source.name, "id": document.id}
                yield json.dumps(record, ensure_ascii=False).encode() + b"\n"
        state |= {"source": number + 1, "read": 0}


def _prepared(pool, number: int, source: Source, workers: int, skip: int, counts: dict) -> Iterator[Prepared]:
    """A source's documents, cleaned and judged, under a progress bar."""
    chars, share, first = 0, 0.0, math.inf

    def batches() -> Iterator[list[Document]]:
        batch, size = [], 0
        rest = source.max_documents and source.max_documents - skip
        for document in itertools.islice(source.documents(workers, skip), rest):
            batch.append(document)
            size += len(document.text) + 100  # what a document takes without a text
            if size >= BATCH_CHARS:
                yield batch
                batch, size = [], 0
        yield batch

    def so_far() -> tuple[float, float]:
        seen = (share - first) / (1 - first) if share > first else 0  # of what was left to read
        return round(chars / 1e6, 1), round(chars / 1e6 / seen, 1) if seen else 0

    prepared = cli.ordered(pool, functools.partial(_prepare, number), batches(), 2 * workers)
    for document in progress(itertools.chain.from_iterable(prepared), so_far, "MB", source.name):
        chars += document.chars
        first = min(first, document.read)
        done = counts["bytes"] / BYTES_PER_TOKEN / source.max_tokens if source.max_tokens else 0.0
        share = max(document.read, done, counts["read"] / source.max_documents if source.max_documents else 0.0)
        yield document


def card(name: str, config: CorpusConfig, tally: Tally) -> str:
    """DATA_CARD.md: what is in the corpus, where it came from, what was left out and why."""
    counts = tally.counts()
    rows, dropped, examples = [], [], []
    for source in config.sources:
        table = tally.of(source.name)
        share = table["words"] / max(1, table["words_read"])
        rows.append(
            f"| {source.name} | {source.licence} | {table['read']:,} | {table['documents']:,} | {table['bytes']:,} | "
            f"{table['words']:,} | {share:.1%} |"
        )
        for rule, number in sorted(table["dropped"].items()):
            dropped.append(f"| {source.name} | {rule} | {number:,} | {table['dropped_words'][rule]:,} |")
            examples += [
                f"- {source.name}, {rule}, `{id}`: {_line(text)}"
                for _, id, _, text in tally.examples[f"{source.name}\t{rule}"]
            ]
    samples = [f"- {source}, `{id}`: {_line(text)}" for _, id, source, text in tally.samples]
    newline = "\n"
    return f"""# Corpus of {name}

{counts["documents"]:,} documents, {counts["bytes"]:,} bytes of UTF-8 text, {counts["words"]:,} words, by the settings
and from the inputs that the manifest beside this card has.

## Sources

| source | licence | documents read | kept | bytes kept | words kept | share of the words read |
|---|---|---|---|---|---|---|
{newline.join(rows)}

## Left out

By the first rule that each failed: documents, and sections of those longer than {2 * SECTION_CHARS:,} characters, of
which the other sections were kept; `c4_lines` counts documents that lost lines. {_dedup(config.dedup)}
{_evaluation(config)}

| source | rule | dropped | words |
|---|---|---|---|
{newline.join(dropped)}

## Examples of what was left out

{newline.join(examples) or "Nothing was."}

## Ten documents at random

{newline.join(samples)}
"""


def _dedup(dedup: Deduplication | None) -> str:
    if dedup is None:
        return "Duplicates have the same words."
    return f"Near-duplicates share {dedup.threshold:.0%} of their runs of {dedup.ngram} words with a text kept before."


def _evaluation(config: CorpusConfig) -> str:
    sets = ", ".join(source.name for source in config.decontaminate) or "no evaluation set: none is named"
    return f"Contaminated is what shares {config.decontaminate_ngram} words in a row with {sets}."


def _line(text: str) -> str:
    """The beginning of a text, on one line of Markdown."""
    text = " ".join(text[:300].split())
    return f"`{text.replace('`', chr(39))}`" if text else "(empty)"
