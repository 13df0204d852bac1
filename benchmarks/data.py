"""The data stages on real prose: how long they take, what deduplication finds, how fast it and packing are.

    DATA=… python -m benchmarks.data   ->  benchmarks/results/data.json

Needs the files of configs/prose_tiny.py. What is compared is timed in turn, block by block; quoted are medians.
"""

import contextlib
import json
import multiprocessing
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import datasketch
import numpy as np
import sentencepiece

import cli
import configs
import data.corpus
import data.pack
import stage
import tokenizer
from data.clean import clean
from data.dedup import Deduplication, Index, MinHash
from data.quality import PROSE, judge
from data.sources import Files
from data.words import fingerprint, hashes, words

RESULT = Path(__file__).parent / "results/data.json"


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


def stages(runs: Path) -> dict:
    """Seconds and peak memory of each stage of configs/prose_tiny.py, as commands with two workers."""
    found = {}
    for key, name in {"data.corpus": "corpus", "tokenizer.train": "tokenizer", "data.pack": "pack"}.items():
        peak, started = 0, time.perf_counter()
        command = [sys.executable, "pipeline.py", "configs/prose_tiny.py", name, "--workers", "2"]
        with subprocess.Popen(command, env=os.environ | {"RUNS": str(runs)}) as process:
            while process.poll() is None:
                peak = max(peak, pss(process.pid))
                time.sleep(0.2)
        if process.returncode:
            sys.exit(process.returncode)
        found[key] = {"seconds": round(time.perf_counter() - started, 1), "peak_gb": round(peak / 1e9, 2)}
    found["seconds"] = round(sum(each["seconds"] for each in found.values()), 1)
    return found


def reviews(count: int) -> list[str]:
    documents = Files(paths=("imdb.jsonl.xz",)).documents(1)
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
        self.lsh, self.count = datasketch.MinHashLSH(threshold=0.85, num_perm=128), 0

    def duplicate(self, text: str) -> bool:
        spelt = text.lower().split()
        minhash = datasketch.MinHash(num_perm=128)
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


def dedup_vs_datasketch(texts: list[str], directory: Path, block: int = 500) -> dict:
    ours, theirs, times = Ours(directory), Datasketch(), []
    for start in range(0, len(texts), block):
        pair = []
        for each in (ours, theirs):
            started = time.perf_counter()
            for text in texts[start : start + block]:
                each.duplicate(text)
            pair.append(time.perf_counter() - started)
        times.append(pair)
    mine, others = zip(*times, strict=True)
    return {
        "documents_per_second": round(block / statistics.median(mine)),
        "datasketch_documents_per_second": round(block / statistics.median(others)),
        "ratio": round(statistics.median(b / a for a, b in times), 2),
    }


def bare(text: str) -> int:
    return len(_pieces.encode(text))


def pack_vs_sentencepiece(runs: Path, rounds: int = 3) -> dict:
    """Tokens a second of data.pack with two workers; of two processes that encode the same texts and keep nothing."""
    global _pieces
    corpus, spm = (runs / "prose_tiny" / name for name in ("corpus", "tokenizer"))
    _pieces = sentencepiece.SentencePieceProcessor(model_file=str(spm / "spm.model"))
    texts = [record["text"] for record in data.corpus.records(corpus)]
    times, tokens = [], 0
    for _ in range(rounds):
        started = time.perf_counter()
        with multiprocessing.get_context("fork").Pool(2) as pool:
            tokens = sum(pool.imap(bare, texts, chunksize=64))
        with tempfile.TemporaryDirectory(dir=runs) as out:
            middle = time.perf_counter()
            data.pack.pack(corpus, tokenizer.load(spm), 0.05, Path(out), 2)
            times.append((middle - started, time.perf_counter() - middle))
    return {
        "tokens_per_second": round(tokens / statistics.median(b for _, b in times)),
        "sentencepiece_tokens_per_second": round(tokens / statistics.median(a for a, _ in times)),
        "ratio": round(statistics.median(a / b for a, b in times), 3),
    }


def english(texts: list[str]) -> float:
    """Share of texts that the test for English keeps."""
    spelt = map(words, texts)
    return sum(judge(t, w, hashes(w), PROSE) != "not_english" for t, w in zip(texts, spelt, strict=True)) / len(texts)


def main() -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    configs.load("configs/prose_tiny.py").corpus.sources[0].files()  # names what is missing before anything is timed
    with tempfile.TemporaryDirectory() as place:
        runs = Path(place)
        found = {
            "device": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
            "commit": commit,
            "versions": stage.versions(),
            "stages": stages(runs),
            "pack_vs_sentencepiece": pack_vs_sentencepiece(runs),
        }
        texts = reviews(75_000)
        found["reviews_kept_as_english"] = round(english(texts), 5)
        for name, function, some in (
            ("planted", planted, texts[:20_000]),
            ("dedup_vs_datasketch", dedup_vs_datasketch, texts[:6_000]),
        ):
            (runs / name).mkdir()
            found[name] = function(some, runs / name)
    RESULT.parent.mkdir(exist_ok=True)
    stage.write_json(RESULT, found)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    try:
        main()
    except cli.UserError as error:
        sys.exit(f"error: {error}")
