"""Corpus to tokenizer: a SentencePiece model that can encode any text."""

import collections
import hashlib
import io
import itertools
import operator
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
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
    # "bpe" (arXiv:1508.07909): LLaMA uses it, and transformers reproduces its ids exactly. "unigram"
    # (arXiv:1804.10959): encodes three times as fast.
    algorithm: str = "bpe"
    sample_bytes: int = 20_000_000  # trains on about this much text, taken evenly from all documents
    normalization: str = "identity"  # "identity": lossless; "nfkc": replaces characters by their compatible forms
    # Pieces for chat templates. No text is encoded to them.
    control: tuple[str, ...] = ("<|im_start|>", "<|im_end|>", *(f"<|reserved_{i}|>" for i in range(6)))

    def __post_init__(self):
        check_types(self)
        if not SMALLEST <= self.vocab_size <= 1 << 20:
            raise ValueError(f"vocab_size is {self.vocab_size}; expected {SMALLEST} to {1 << 20}")
        for field, *choices in (("algorithm", "unigram", "bpe"), ("normalization", "identity", "nfkc")):
            if getattr(self, field) not in choices:
                raise ValueError(f"{field} is {getattr(self, field)!r}; expected {' or '.join(choices)}")


def sample(corpus: Path, total: int, limit: int, held_out: Holdout | None = None) -> Iterator[tuple[str, str]]:
    """(source, text) spread evenly over the text that is not held out: about `limit` of a corpus's `total` bytes."""
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
        if part and not taken:  # take something from every source
            yield source, part


def train(corpus: Path, total: int, config: TokenizerConfig, val_fraction: float) -> bytes:
    """A SentencePiece model that keeps white space, separates digits and falls back to bytes. total: as in `sample`."""
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
            num_threads=4,  # fixed, because the result depends on it
            minloglevel=2,
        )
    except RuntimeError as error:
        size, setting = f"vocab_size = {config.vocab_size:,}", "set it in the tokenizer and in the model to"
        message = f"SentencePiece cannot make a tokenizer with {size} from this corpus ({error})"
        if most := re.search(r"too high .* <= (\d+)", str(error)):
            smaller = f", or {setting} {int(most[1]):,} or less" if int(most[1]) >= SMALLEST else ""
            message = f"too little text for {size}: add text{smaller}"
        elif least := re.search(r"smaller than required_chars. \d+ vs (\d+)", str(error)):
            message = f"the text has more different characters than {size}: {setting} {int(least[1]):,} or more"
        raise UserError(message) from None
    return model.getvalue()


def job(config: TokenizerConfig, corpus: Path, val_fraction: float, directory: Path, command: str) -> Stage:
    """The stage that makes a tokenizer from the corpus in a directory. command: what the user types to make it."""
    settings = {"tokenizer": config, "val_fraction": val_fraction}
    return Stage(directory, settings, stage.outputs(corpus), command, __file__)


def build(job: Stage, config: TokenizerConfig, corpus: Path, val_fraction: float, force=False, replaced=()) -> None:
    """Makes the tokenizer if it is missing. replaced: directories that will be made again after it."""
    directory = job.directory
    if job.up_to_date(force):
        return
    total = stage.finished(corpus)["counts"]["bytes"]
    with job.making(keep=True):
        log.info(f"tokenizer: training {config.vocab_size:,} pieces")
        with cli.pool(1) as pool:  # SentencePiece does not react to Ctrl-C; this process does
            model = pool.submit(train, corpus, total, config, val_fraction).result()
        name, sha256 = f"{directory.parent.name}/{directory.name}/spm.model", hashlib.sha256(model).hexdigest()
        for path in sorted(stage.runs().rglob("manifest.json")):
            read = stage.read_manifest(path.parent)["read"]
            if read.get(name, sha256) != sha256 and not set(path.parents) & set(replaced):
                raise UserError(
                    f"{path.parent} was made with another tokenizer in {directory}, and the new one would not fit. "
                    "Make all of it again with --force-from tokenizer, or give the experiment another name"
                )
        job.clear()
        spm = write(directory, model)
        numbers = measure(spm, sample(corpus, total, MEASURED))
        text = card(directory.parent.name, config, spm, numbers)
        (directory / "TOKENIZER_CARD.md").write_text(text, encoding="utf-8")
        job.finish(numbers)
        log.info(f"tokenizer: {numbers['bytes_per_token']:.2f} bytes a token -> {directory}")


def write(directory: Path, model: bytes) -> Tokenizer:
    """Writes a SentencePiece model, its vocabulary as readable text, and its settings."""
    (directory / "spm.model").write_bytes(model)
    spm = Tokenizer(model, hashlib.sha256(model).hexdigest())
    pieces = [f"{spm.pieces.id_to_piece(i)}\t{spm.pieces.get_score(i):g}\n" for i in range(spm.vocab_size)]
    (directory / "spm.vocab").write_text("".join(pieces), encoding="utf-8", newline="\n")
    settings = {"vocab_size": spm.vocab_size, "unk": spm.pieces.unk_id(), "bos": spm.bos, "eos": spm.eos}
    stage.write_json(directory / "tokenizer_config.json", settings | {"control": spm.control, "sha256": spm.sha256})
    return spm


def measure(spm: Tokenizer, texts: Iterable[tuple[str, str]]) -> dict:
    """Measures the tokenizer on (source, text) pairs: rates of all texts, and of each source in `sources`."""
    sums = collections.defaultdict(lambda: np.zeros(7, np.int64))
    for source, text in texts:
        ids = spm.encode(text)
        words, unknown, same = len(text.split()), ids.count(0), spm.decode(ids) == text
        sums[source] += (1, len(ids), len(text.encode()), len(text), words, unknown, same)
    return _rates(sum(sums.values())) | {"sources": {source: _rates(counts) for source, counts in sums.items()}}


def _rates(counts: np.ndarray) -> dict:
    documents, tokens, size, characters, words, unknown, same = counts.tolist()
    return {
        "documents": documents,
        "bytes_per_token": round(size / tokens, 4),
        "characters_per_token": round(characters / tokens, 4),
        "fertility": round(tokens / max(1, words), 4),
        "unknown_rate": unknown / tokens,
        "round_trips": same,
    }


def card(name: str, config: TokenizerConfig, spm: Tokenizer, numbers: dict) -> str:
    """TOKENIZER_CARD.md: what the tokenizer is and how well it compresses its corpus."""
    columns = ("documents", "bytes_per_token", "characters_per_token", "fertility", "unknown_rate", "round_trips")
    rows = [("source", *(column.replace("_", " ") for column in columns))]
    for source, rates in [*numbers["sources"].items(), ("all", numbers)]:
        rows.append((source, *(f"{rates[column]:g}" for column in columns)))
    lossless = "is lossless" if config.normalization == "identity" else f"normalises text ({config.normalization})"
    lines = [
        f"# Tokenizer of {name}\n",
        f"SentencePiece {config.algorithm}, {spm.vocab_size:,} pieces, SHA-256 `{spm.sha256}`.",
        f"It {lossless}, keeps white space, separates digits, and encodes a character without a piece in bytes.",
        f"Piece {spm.eos} ends a document. It was not trained on held-out text. Control pieces, which no text",
        f"is encoded to: {', '.join(f'`{piece}`' for piece in config.control) or 'none'}.\n",
        "Measured on documents taken evenly from its corpus; it was trained on most of them. Fertility is tokens per",
        "word.\n",
        cli.table(rows, range(1, 7), markdown=True),
    ]
    return "\n".join(lines) + "\n"
