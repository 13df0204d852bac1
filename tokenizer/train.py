"""Corpus to tokenizer: a SentencePiece model that can encode any text."""

#     python pipeline.py configs/tiny.py tokenizer   ->  runs/tiny/tokenizer
#
# Its SHA-256 is its identity: packed tokens and checkpoints record it and refuse another.

import hashlib
import io
import itertools
import math
import operator
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

import cli
import data.corpus
import stage
from cli import UserError, log
from data.holdout import Holdout
from stage import Stage, check_types
from tokenizer import Tokenizer

PART = 1 << 16  # characters of a document that are sampled together
SMALLEST = 300  # pieces: 256 bytes, control pieces, and some text
MEASURED = 2_000_000  # bytes of text that the numbers in the card are measured on


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """How a tokenizer is trained. Raises TypeError or ValueError, naming the field, for an impossible setting."""

    vocab_size: int = 32_768  # pieces, including 256 bytes and the control pieces
    # "bpe" (arXiv:1508.07909): as LLaMA; transformers reproduces its ids exactly. "unigram" (arXiv:1804.10959):
    # encodes three times as fast.
    algorithm: str = "bpe"
    sample_bytes: int = 20_000_000  # trains on about this much text, taken evenly from all documents
    normalization: str = "identity"  # "identity": lossless; "nfkc": replaces characters by their compatible forms
    # Pieces for chat templates. No text is encoded to them.
    control: tuple[str, ...] = ("<|im_start|>", "<|im_end|>", *(f"<|reserved_{i}|>" for i in range(6)))

    def __post_init__(self):
        check_types(self)
        if not SMALLEST <= self.vocab_size <= 1 << 20:
            raise ValueError(f"vocab_size is {self.vocab_size}; expected {SMALLEST} to {1 << 20}")
        if self.algorithm not in ("unigram", "bpe"):
            raise ValueError(f'algorithm is {self.algorithm!r}; expected "unigram" or "bpe"')
        if self.normalization not in ("identity", "nfkc"):
            raise ValueError(f'normalization is {self.normalization!r}; expected "identity" or "nfkc"')


def sample(corpus: Path, total: int, limit: int, held_out: Holdout | None = None) -> Iterator[tuple[str, str]]:
    """(source, text) evenly from all text that is not held out: about `limit` of the `total` bytes of a corpus."""
    share = min(1.0, limit / max(1, total))
    for source, documents in itertools.groupby(data.corpus.records(corpus), operator.itemgetter("source")):
        passed, taken, part = 0, 0, ""
        for document in documents:
            text = held_out.split(document["text"])[0] if held_out else document["text"]
            for start in range(0, len(text), PART):
                part = text[start : start + PART]
                size = len(part.encode())
                passed += size
                if taken + size / 2 <= share * passed:  # closer to an even share with the part than without it
                    taken += size
                    yield source, part
        if part and not taken:  # every source is represented
            yield source, part


def train(corpus: Path, total: int, config: TokenizerConfig, val_fraction: float) -> bytes:
    """A SentencePiece model with byte fallback, all white space, and digits apart. total: bytes of the corpus."""
    texts = sample(corpus, total, config.sample_bytes, data.corpus.holdout(corpus, val_fraction))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(text for _, text in texts),
            model_writer=model,
            vocab_size=config.vocab_size,
            model_type=config.algorithm,
            normalization_rule_name=config.normalization,
            control_symbols=list(config.control),
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            split_digits=True,
            character_coverage=0.9999,
            max_sentence_length=1 << 24,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            num_threads=4,  # fixed: the sums of the training depend on it
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(_advice(config.vocab_size, str(error))) from None
    return model.getvalue()


def _advice(vocab_size: int, error: str) -> str:
    """The message for an error of SentencePiece."""
    size, setting = f"vocab_size = {vocab_size:,}", "set it in the tokenizer and in the model to"
    if most := re.search(r"too high .* <= (\d+)", error):
        smaller = f", or {setting} {int(most[1]):,} or less" if int(most[1]) >= SMALLEST else ""
        return f"too little text for {size}: add text{smaller}"
    if least := re.search(r"smaller than required_chars. \d+ vs (\d+)", error):
        return f"the text has more different characters than {size}: {setting} {int(least[1]):,} or more"
    return f"SentencePiece cannot make {vocab_size:,} pieces of this corpus ({error})"


def job(config: TokenizerConfig, corpus: Path, val_fraction: float, directory: Path, command: str) -> Stage:
    """The stage that makes a tokenizer from the corpus in a directory. command: what the user types to make it."""
    settings = {"tokenizer": config, "val_fraction": val_fraction}
    return Stage(directory, settings, stage.outputs(corpus), command, __file__)


def build(job: Stage, config: TokenizerConfig, corpus: Path, val_fraction: float, force=False, replaced=()) -> None:
    """Makes the tokenizer if it is missing. replaced: directories that are made again after it."""
    directory = job.directory
    if job.up_to_date(force):
        return
    total = stage.finished(corpus)["counts"]["bytes"]
    with job.making(keep=True):
        log.info(f"tokenizer: training {config.vocab_size:,} pieces")
        with cli.pool(1) as pool:  # SentencePiece does not react to Ctrl-C; this process does
            model = pool.submit(train, corpus, total, config, val_fraction).result()
        others = [path for path in made_with_another(directory, model) if not {path, path.parent} & set(replaced)]
        if others:
            raise UserError(
                f"{', '.join(map(str, others))} was made with another tokenizer in {directory}, and the new one would "
                "not fit. Make it all again with --force-from tokenizer, or give the experiment another name"
            )
        job.clear()
        tokenizer, settings = write(directory, model)
        numbers = measure(tokenizer, sample(corpus, total, MEASURED), config.normalization == "identity")
        text = card(directory.parent.name, config, settings, numbers)
        (directory / "TOKENIZER_CARD.md").write_text(text, encoding="utf-8")
        job.finish(numbers)
        log.info(f"tokenizer: {numbers['bytes_per_token']:.2f} bytes a token -> {directory}")


def made_with_another(directory: Path, model: bytes) -> list[Path]:
    """Directories of packed tokens and models that were made with another model in a tokenizer's directory."""
    name, sha256 = f"{directory.parent.name}/{directory.name}/spm.model", hashlib.sha256(model).hexdigest()
    paths = []
    for path in sorted([*stage.runs().glob("*/*/manifest.json"), *stage.runs().glob("*/*/*/manifest.json")]):
        if stage.read_manifest(path.parent)["read"].get(name, sha256) != sha256:
            paths.append(path.parent)
    return paths


def write(directory: Path, model: bytes) -> tuple[Tokenizer, dict]:
    """Writes a SentencePiece model, its vocabulary to read, and its settings. Returns tokenizer and settings."""
    (directory / "spm.model").write_bytes(model)
    tokenizer = Tokenizer(model, stage.sha256(directory / "spm.model"))
    pieces = tokenizer.pieces
    vocabulary = [f"{pieces.id_to_piece(i)}\t{pieces.get_score(i):g}\n" for i in range(tokenizer.vocab_size)]
    (directory / "spm.vocab").write_text("".join(vocabulary), encoding="utf-8", newline="\n")
    settings = {"vocab_size": tokenizer.vocab_size, "unk": pieces.unk_id(), "bos": tokenizer.bos, "eos": tokenizer.eos}
    settings |= {"control": tokenizer.control, "sha256": tokenizer.sha256}
    stage.write_json(directory / "tokenizer_config.json", settings)
    return tokenizer, settings


def measure(tokenizer: Tokenizer, texts: Iterable[tuple[str, str]], lossless: bool) -> dict:
    """Measures the tokenizer on (source, text) pairs. AssertionError if `lossless` and a text does not come back."""
    # fertility: tokens per word. score: bits of text per bit of an id, 8 · bytes per token / log2(vocab_size).
    sums: dict[str, Counter] = {}
    for source, text in texts:
        ids = tokenizer.encode(text)
        same = tokenizer.decode(ids) == text
        if lossless and not same:
            raise AssertionError(f"the tokenizer does not give back {text[:80]!r}")
        counts = Counter(documents=1, tokens=len(ids), bytes=len(text.encode()), characters=len(text))
        counts.update(words=len(text.split()), unknown=ids.count(0), same=int(same))
        for name in (source, "all"):
            sums.setdefault(name, Counter()).update(counts)
    rates = {}
    for name, counts in sums.items():
        rates[name] = {
            "documents": counts["documents"],
            "bytes_per_token": round(counts["bytes"] / counts["tokens"], 4),
            "characters_per_token": round(counts["characters"] / counts["tokens"], 4),
            "fertility": round(counts["tokens"] / max(1, counts["words"]), 4),
            "unknown_rate": counts["unknown"] / counts["tokens"],
            "round_trips": counts["same"],
        }
    total = rates.pop("all")
    score = 8 * total["bytes_per_token"] / math.log2(tokenizer.vocab_size)
    return {**total, "score": round(score, 4), "sources": rates}


def card(name: str, config: TokenizerConfig, settings: dict, numbers: dict) -> str:
    """TOKENIZER_CARD.md: what the tokenizer is and how well it compresses its corpus."""
    columns = ("bytes a token", "characters a token", "tokens a word", "unknown", "came back the same")
    rows = [("source", "documents", *columns)]
    for source, rates in [*numbers["sources"].items(), ("all", numbers)]:
        keys = ("documents", "bytes_per_token", "characters_per_token", "fertility", "unknown_rate", "round_trips")
        rows.append((source, *(f"{rates[key]:g}" for key in keys)))
    lossless = "Lossless: it does not normalise text."
    if config.normalization != "identity":
        lossless = f"It normalises text ({config.normalization}): a text does not always come back."
    lines = [
        f"# Tokenizer of {name}\n",
        f"SentencePiece {config.algorithm}, {settings['vocab_size']:,} pieces, SHA-256 `{settings['sha256']}`.",
        f"{lossless} It keeps white space, separates digits, and encodes text without a piece in bytes.",
        f"Piece {settings['eos']} ends a document. It was not trained on held-out text. Control pieces, which no text",
        f"is encoded to: {', '.join(f'`{piece}`' for piece in config.control) or 'none'}.\n",
        "Measured on documents taken evenly from its corpus, most of which it was trained on:\n",
        cli.table(rows, range(1, 7), markdown=True),
        f"\nScore: {numbers['score']} bits of text per bit of id, 8 · bytes a token / log2(pieces). More is better",
    ]
    return "\n".join(lines) + "\n"
