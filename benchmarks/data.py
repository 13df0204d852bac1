"""The data stages on real prose: how long they take, what deduplication finds, how fast it and packing are.

    DATA=… python -m benchmarks.data   ->  benchmarks/results/data.json

Needs the files of configs/prose_tiny.py. What is compared is timed in turn, block by block; results are medians.
"""

import argparse
import contextlib
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import sentencepiece

import cli
import configs
import data.corpus
import data.pack
import tokenizer
from benchmarks.common import command, interleaved, parser, ratio, run, write
from data.clean import clean
from data.dedup import Deduplication, Index, MinHash
from data.quality import PROSE, judge
from data.sources import Files
from data.words import fingerprint, hashes, words


def pss(root: int) -> int:
    """Bytes of memory that a process and its children hold; what several share counts once."""
    total, parents = 0, {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
    family = {root}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    for process in family:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
    return total


def stages(path: str) -> dict:
    """Seconds and peak memory of each data stage of an experiment, as commands with two workers."""
    found = {}
    for name in ("corpus", "tokenizer", "pack"):
        peak, started = 0, time.perf_counter()
        process = command("pipeline.py", path, name, "--workers", "2")
        while process.is_alive():
            peak = max(peak, pss(process.pid))
            process.join(0.2)
        if process.exitcode:
            sys.exit(process.exitcode)
        found[name] = {"seconds": round(time.perf_counter() - started, 1), "peak_gb": round(peak / 1e9, 2)}
    found["seconds"] = round(sum(each["seconds"] for each in found.values()), 1)
    return found


def reviews(file: str, count: int) -> list[str]:
    documents = Files(paths=(file,)).documents(1)
    return [clean(document.value)[0] for document, _ in zip(documents, range(count), strict=False)]


def changed(text: str, rng: random.Random) -> str:
    """A copy with up to a quarter of its words replaced by others of it, dropped, or moved."""
    spelt = text.split(" ")
    vocabulary = text.split()
    for _ in range(int(len(spelt) * 10 ** rng.uniform(-3, -0.6))):
        i, kind = rng.randrange(len(spelt)), rng.choice(("replace", "drop", "move"))
        if kind == "replace":
            spelt[i] = rng.choice(vocabulary)
        elif kind == "drop" and len(spelt) > 9:
            del spelt[i]
        else:
            spelt.insert(rng.randrange(len(spelt)), spelt.pop(i))
    return " ".join(spelt)


def similarity(a: str, b: str) -> float:
    """Jaccard's, of the sets of three words one after another, split at white space."""
    sets = [{tuple(w[i : i + 3]) for i in range(len(w) - 2)} for w in (a.lower().split(), b.lower().split())]
    return len(sets[0] & sets[1]) / max(1, len(sets[0] | sets[1]))


class Ours:
    """As data.corpus does it: words, shingles, keys, the index."""

    def __init__(self, directory: Path):
        self.minhash, self.index = MinHash(Deduplication()), Index(Deduplication(), directory)

    def duplicate(self, text: str) -> bool:
        spelt = words(text)
        shingles = self.minhash.shingles(hashes(spelt))
        keys = np.concatenate([fingerprint(spelt), self.minhash.keys(shingles)])
        return self.index.duplicate(keys, shingles) is not None


class Datasketch:
    """datasketch as its documentation has it: a MinHash, a query, an insertion."""

    def __init__(self):
        self.module = cli.extra("datasketch", "datasketch", "the comparison with datasketch")
        self.lsh, self.count = self.module.MinHashLSH(threshold=0.85, num_perm=128), 0

    def duplicate(self, text: str) -> bool:
        spelt = text.lower().split()
        minhash = self.module.MinHash(num_perm=128)
        minhash.update_batch({" ".join(spelt[i : i + 3]).encode() for i in range(max(1, len(spelt) - 2))})
        found = bool(self.lsh.query(minhash))
        if not found:
            self.count += 1
            self.lsh.insert(self.count, minhash)
        return found


def planted(texts: list[str], directory: Path) -> dict:
    """What the index says of a changed copy of each text, by their true similarity."""
    rng, ours = random.Random(0), Ours(directory)
    originals = [text for text in texts if not ours.duplicate(text)]
    near, far = [], []
    for text in originals:
        copy = changed(text, rng)
        true = similarity(text, copy)
        if true >= 0.9 or true <= 0.6:
            (near if true >= 0.9 else far).append(ours.duplicate(copy))
    return {
        "originals": len(originals),
        "copies_at_0.9_or_more": len(near),
        "recall": round(sum(near) / len(near), 5),
        "copies_at_0.6_or_less": len(far),
        "lost": round(sum(far) / len(far), 5),
    }


def dedup_vs_datasketch(texts: list[str], directory: Path) -> dict:
    block = len(texts) // 12
    blocks = [texts[start : start + block] for start in range(0, len(texts) - block + 1, block)]

    def reading(index: Ours | Datasketch):
        left = iter(blocks)  # a block a round
        return lambda: [index.duplicate(text) for text in next(left)]

    ways = {"ours": reading(Ours(directory)), "theirs": reading(Datasketch())}
    seconds = interleaved(len(blocks) - 1, ways)
    return {
        "documents_per_second": round(block / statistics.median(seconds["ours"])),
        "datasketch_documents_per_second": round(block / statistics.median(seconds["theirs"])),
        "ratio": ratio(seconds["theirs"], seconds["ours"]),
    }


def bare(text: str) -> int:
    return len(_pieces.encode(text))


def pack_vs_sentencepiece(experiment: configs.Experiment, rounds: int) -> dict:
    """Tokens a second of data.pack with two workers; of two processes that encode the same texts and keep nothing."""
    global _pieces
    corpus, spm = experiment.directory("corpus"), experiment.directory("tokenizer")
    _pieces = sentencepiece.SentencePieceProcessor(model_file=str(spm / "spm.model"))
    texts = [record["text"] for record in data.corpus.records(corpus)]
    tokens = sum(map(bare, texts))

    def encode() -> None:
        with cli.pool(2) as pool:  # multiprocessing.Pool can hang: a worker that waits for a lock may miss SIGTERM
            assert sum(pool.map(bare, texts, chunksize=64)) == tokens

    def pack() -> None:
        with tempfile.TemporaryDirectory(dir=corpus.parent) as out:
            data.pack.pack(corpus, tokenizer.load(spm), 0.05, Path(out), 2)

    seconds = interleaved(rounds, {"encode": encode, "pack": pack})
    return {
        "tokens_per_second": round(tokens / statistics.median(seconds["pack"])),
        "sentencepiece_tokens_per_second": round(tokens / statistics.median(seconds["encode"])),
        "ratio": ratio(seconds["encode"], seconds["pack"]),
    }


def english(texts: list[str]) -> float:
    """Share of texts that the test for English keeps."""
    spelt = map(words, texts)
    return sum(judge(t, w, hashes(w), PROSE) != "not_english" for t, w in zip(texts, spelt, strict=True)) / len(texts)


def main(arguments: argparse.Namespace) -> None:
    experiment, quick = configs.load(arguments.config), arguments.quick
    experiment.corpus.sources[0].files()  # names what is missing before anything is timed
    cli.extra("datasketch", "datasketch", "the comparison with datasketch")
    found = {"stages": stages(arguments.config), "pack_vs_sentencepiece": pack_vs_sentencepiece(experiment, 3)}
    texts = reviews("text.jsonl" if quick else "imdb.jsonl.xz", 75_000)
    found["reviews_kept_as_english"] = round(english(texts), 5)
    with tempfile.TemporaryDirectory() as place:
        for name, function, count in ("planted", planted, 20_000), ("dedup_vs_datasketch", dedup_vs_datasketch, 6_000):
            (Path(place) / name).mkdir()
            found[name] = function(texts[:count], Path(place) / name)
    write("data", f"python -m benchmarks.data {arguments.config}", found, quick)


def in_new_runs(arguments: argparse.Namespace) -> None:
    """Stages are timed in a temporary RUNS, where nothing is made yet."""
    with tempfile.TemporaryDirectory() as os.environ["RUNS"]:
        main(arguments)


if __name__ == "__main__":
    run(in_new_runs, parser(__doc__, "configs/prose_tiny.py"))
