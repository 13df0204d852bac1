"""Sources to corpus: clean, exactly deduplicated documents in JSONL shards, and a card that says what they are.

    python -m data.corpus configs/tiny.py   ->  runs/tiny/corpus

The same inputs give the same bytes, whatever the number of workers.
"""

import argparse
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import stage
from data.sources import Files, PythonDocs
from stage import Stage, UserError, check_types, log

if TYPE_CHECKING:
    from configs import Experiment

SHARD_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """What a corpus is made of. Raises TypeError or ValueError, naming the field, for what cannot be."""

    sources: tuple[Files | PythonDocs, ...]
    """Read in this order; of equal documents the first is kept."""
    min_chars: int = 64
    """Shorter documents are dropped."""

    def __post_init__(self):
        check_types(self)
        if not self.sources:
            raise ValueError("sources is empty; expected at least one")
        if self.min_chars < 1:
            raise ValueError(f"min_chars is {self.min_chars}; expected at least 1")


CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ufeff]")
TRAILING = re.compile(r"[ \t]+$", re.MULTILINE)


def clean(text: str) -> str:
    """The text with \\n line ends, without control characters, trailing blanks, and empty lines at either end."""
    text = CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    return TRAILING.sub("", text).strip("\n")


def fingerprint(text: str) -> bytes:
    """Equal for documents that differ in case and white space only."""
    return hashlib.sha256(" ".join(text.lower().split()).encode()).digest()[:16]


def held_out(text: str, fraction: float) -> bool:
    """Whether a document is validation data: decided by its own hash alone, so the same whatever stands around it."""
    return int.from_bytes(fingerprint(text)[:8]) < fraction * 2**64


def documents(directory: Path) -> Iterator[str]:
    """The texts of a finished corpus, in order."""
    for shard in sorted(directory.glob("shard_*.jsonl")):
        with open(shard, encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)["text"]


def build(experiment: "Experiment", workers: int = 1, force: bool = False) -> Path:
    """Makes the experiment's corpus, unless it is there. Returns its directory."""
    experiment = experiment.owner("corpus")
    config, directory = experiment.corpus, experiment.directory("corpus")
    finished = stage.read_manifest(directory) is not None and not force
    try:
        read = {path: digest for source in config.sources for path, digest in source.inputs().items()}
    except UserError:
        if not finished:
            raise
        read = {}  # the raw files have been moved away: the finished corpus stands
    job = Stage(directory, config, read, f"python -m data.corpus {experiment.path}")
    if job.up_to_date(force):
        return directory
    with job.making():
        counts = Counter(documents=0, bytes=0, too_short=0, duplicates=0)
        write_shards(directory, gather(config, workers, counts))
        if not counts["documents"]:
            names = ", ".join(source.name for source in config.sources)
            raise UserError(
                f"the corpus is empty: {names} gave {counts['too_short']} documents, all shorter than min_chars = "
                f"{config.min_chars}; add sources or lower min_chars"
            )
        (directory / "DATA_CARD.md").write_text(card(experiment.name, config, counts), encoding="utf-8")
        job.finish(dict(counts))
        log.info(f"corpus: {counts['documents']:,} documents, {counts['bytes'] / 1e6:.1f} MB -> {directory}")
    return directory


def gather(config: CorpusConfig, workers: int, counts: Counter) -> Iterator[dict[str, str]]:
    """The records of the corpus; counts what is kept and what is dropped. Holds 16 bytes a document, not the text."""
    seen: set[bytes] = set()
    for source in config.sources:
        for id, text in source.documents(workers):
            text = clean(text)
            if len(text) < config.min_chars:
                counts["too_short"] += 1
            elif (key := fingerprint(text)) in seen:
                counts["duplicates"] += 1
            else:
                seen.add(key)
                counts["documents"] += 1
                counts["bytes"] += len(text.encode())
                counts[f"from {source.name}"] += 1
                yield {"text": text, "source": source.name, "id": id}


def write_shards(directory: Path, records: Iterator[dict[str, str]]) -> None:
    """Writes shard_00000.jsonl and so on, each closed once it holds SHARD_BYTES."""
    for number in itertools.count():
        with open(directory / f"shard_{number:05d}.jsonl", "wb") as shard:
            for record in records:
                shard.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
                if shard.tell() >= SHARD_BYTES:
                    break
            else:
                return


def card(name: str, config: CorpusConfig, counts: Counter) -> str:
    """DATA_CARD.md: what is in the corpus and what was left out."""
    rows = "\n".join(f"| {source.name} | {counts[f'from {source.name}']:,} |" for source in config.sources)
    return f"""# Corpus of {name}

{counts["documents"]:,} documents, {counts["bytes"]:,} bytes of UTF-8 text.

| source | documents |
|---|---|
{rows}

Dropped: {counts["too_short"]:,} shorter than {config.min_chars} characters, {counts["duplicates"]:,} equal to an
earlier one but for case and white space. Removed from the rest: control characters, carriage returns, blanks at line
ends. The manifest beside this card has the settings, the inputs and the versions they came from.
"""


def main(arguments: argparse.Namespace) -> None:
    import configs

    experiment = configs.load(arguments.config)
    directory = build(experiment, stage.workers(arguments), arguments.force)
    log.info(f"{directory} is up to date")


if __name__ == "__main__":
    from data.corpus import main  # the module that configs import, not this second copy of it

    stage.run(main, stage.parser(__doc__, makes=True, many=True).parse_args())
