"""Corpus to tokenizer: a SentencePiece model, frozen, that can spell any text.

    python pipeline.py configs/tiny.py tokenizer   ->  runs/tiny/tokenizer

Its SHA-256 is its identity: packed tokens and checkpoints carry it, and refuse another.
"""

import io
import math
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

import cli
import data.corpus
import stage
from cli import UserError, log
from stage import Stage, check_types
from tokenizer import Tokenizer

LONGEST = 1 << 20  # characters that SentencePiece is given at once; it drops what is longer than 16 MB


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """How a tokenizer is trained. Raises TypeError or ValueError, naming the field, for what cannot be."""

    vocab_size: int = 32_768
    """Pieces, the 256 byte pieces and the control pieces among them."""
    algorithm: str = "bpe"
    """"bpe" (arXiv:1508.07909), LLaMA's own, whose ids transformers reproduces exactly; or "unigram"
    (arXiv:1804.10959), which encodes three times as fast."""
    sample_bytes: int = 20_000_000
    """At most this much text is learnt from, taken evenly from the corpus."""
    normalization: str = "identity"
    """"identity" gives every text back as it was; "nfkc" first replaces characters by their compatible forms."""
    control: tuple[str, ...] = ("<|im_start|>", "<|im_end|>", *(f"<|reserved_{i}|>" for i in range(6)))
    """Pieces that stand for themselves and that no text is ever spelt with, for chat templates."""

    def __post_init__(self):
        check_types(self)
        if not 300 <= self.vocab_size <= 1 << 20:
            raise ValueError(f"vocab_size is {self.vocab_size}; expected 300 to {1 << 20}")
        if self.algorithm not in ("unigram", "bpe"):
            raise ValueError(f'algorithm is {self.algorithm!r}; expected "unigram" or "bpe"')
        if self.normalization not in ("identity", "nfkc"):
            raise ValueError(f'normalization is {self.normalization!r}; expected "identity" or "nfkc"')
        taken = {"", "<unk>", "<s>", "</s>", "<pad>", *(f"<0x{byte:02X}>" for byte in range(256))}
        if taken & set(self.control) or len(set(self.control)) < len(self.control):
            raise ValueError(
                f"control is {self.control}; expected pieces that differ, none empty, <unk>, </s> or a byte"
            )
        if self.sample_bytes < 1:
            raise ValueError(f"sample_bytes is {self.sample_bytes}; expected at least 1")


def sample(corpus: Path, total: int, limit: int, val_fraction: float) -> Iterator[tuple[str, str]]:
    """(source, text) of training documents, evenly from the corpus, up to `limit` of its `total` bytes; none that are
    held out."""
    share, passed, taken = min(1.0, limit / max(1, total)), 0, 0
    for record in data.corpus.records(corpus):
        text = record["text"].encode()
        if data.corpus.held_out(text, val_fraction):
            continue
        passed += len(text)
        if taken + len(text) / 2 <= share * passed:  # nearer to an even share with it than without it
            text = text[: limit - taken].decode(errors="ignore")
            taken += len(text.encode())
            yield record["source"], text


def train(corpus: Path, total: int, config: TokenizerConfig, val_fraction: float) -> bytes:
    """A SentencePiece model: byte fallback, white space kept, digits apart.

    The number of threads is fixed, because the sums that training makes depend on it.
    """
    sampled = sample(corpus, total, config.sample_bytes, val_fraction)
    texts = (text[i : i + LONGEST] for _, text in sampled for i in range(0, len(text), LONGEST))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=texts,
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
            num_threads=4,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"SentencePiece cannot make {config.vocab_size:,} pieces of this corpus: lower vocab_size or add text "
            f"({error})"
        ) from None
    return model.getvalue()


def job(config: TokenizerConfig, corpus: Path, val_fraction: float, directory: Path, command: str) -> Stage:
    """The stage that makes a tokenizer from the corpus in a directory. val_fraction: share of the documents that it
    does not learn from. command: what the user types to make it."""
    settings = {"tokenizer": config, "val_fraction": val_fraction}
    return Stage(directory, settings, stage.outputs(corpus), command, __file__)


def build(
    job: Stage,
    config: TokenizerConfig,
    corpus: Path,
    val_fraction: float,
    force: bool = False,
    replaced: Collection[Path] = (),
) -> None:
    """Makes the tokenizer, unless it is there. replaced: directories that are made again after it."""
    directory = job.directory
    if job.up_to_date(force):
        return
    made = [path for path in made_with(directory) if path not in replaced and path.parent not in replaced]
    if made:
        raise UserError(
            f"{', '.join(map(str, made))} was made with the tokenizer in {directory}; another would not fit. Make it "
            "all again with --force-from tokenizer, or give the experiment another name"
        )
    manifest = stage.finished(corpus)
    with job.making():
        log.info(f"tokenizer: training {config.vocab_size:,} pieces")
        total = manifest["counts"]["bytes"]
        with cli.pool(1) as pool:  # SentencePiece does not hear Ctrl-C; this process does
            model = pool.submit(train, corpus, total, config, val_fraction).result()
        tokenizer, settings = write(directory, model)
        numbers = measure(tokenizer, sample(corpus, total, 2_000_000, 0.0), config.normalization == "identity")
        (directory / "TOKENIZER_CARD.md").write_text(
            card(directory.parent.name, config, settings, numbers), encoding="utf-8"
        )
        job.finish(numbers)
        log.info(f"tokenizer: {numbers['bytes_per_token']:.2f} bytes a token -> {directory}")


def write(directory: Path, model: bytes) -> tuple[Tokenizer, dict]:
    """Writes a SentencePiece model, its vocabulary to read, and its settings. Returns tokenizer and settings."""
    (directory / "spm.model").write_bytes(model)
    tokenizer = Tokenizer(model, stage.sha256(directory / "spm.model"))
    pieces = tokenizer.pieces
    vocabulary = (f"{pieces.id_to_piece(i)}\t{pieces.get_score(i):g}\n" for i in range(tokenizer.vocab_size))
    (directory / "spm.vocab").write_text("".join(vocabulary), encoding="utf-8", newline="\n")
    settings = {
        "vocab_size": tokenizer.vocab_size,
        "unk": pieces.unk_id(),
        "bos": tokenizer.bos,
        "eos": tokenizer.eos,
        "control": tokenizer.control,
        "sha256": tokenizer.sha256,
    }
    stage.write_json(directory / "tokenizer_config.json", settings)
    return tokenizer, settings


def made_with(directory: Path) -> list[Path]:
    """Directories of packed tokens and of models that were made with the tokenizer in one."""
    name = f"{directory.parent.name}/{directory.name}/spm.model"
    manifests = sorted([*stage.runs().glob("*/*/manifest.json"), *stage.runs().glob("*/*/*/manifest.json")])
    return [path.parent for path in manifests if name in (stage.read_manifest(path.parent) or {"read": {}})["read"]]


def measure(tokenizer: Tokenizer, texts: Iterator[tuple[str, str]], lossless: bool) -> dict:
    """What the tokenizer makes of (source, text) pairs: for each source and for all, bytes and characters a token,
    tokens a word (fertility), the share of unknown tokens, and how many texts come back as they were.

    score: bits of text that one bit of an id holds, 8 · bytes a token / log2(vocab_size). AssertionError if `lossless`
    and a text does not come back.
    """
    sums: dict[str, Counter] = {}
    for source, text in texts:
        ids = tokenizer.encode(text)
        same = tokenizer.decode(ids) == text
        if lossless and not same:
            raise AssertionError(f"the tokenizer does not give back {text[:80]!r}")
        counted = Counter(documents=1, tokens=len(ids), bytes=len(text.encode()), characters=len(text))
        counted.update(words=len(text.split()), unknown=ids.count(0), same=int(same))
        for name in (source, "all"):
            sums.setdefault(name, Counter()).update(counted)
    rates = {
        name: {
            "documents": s["documents"],
            "bytes_per_token": round(s["bytes"] / s["tokens"], 4),
            "characters_per_token": round(s["characters"] / s["tokens"], 4),
            "fertility": round(s["tokens"] / max(1, s["words"]), 4),
            "unknown_rate": s["unknown"] / s["tokens"],
            "round_trips": s["same"],
        }
        for name, s in sums.items()
    }
    everything = rates.pop("all")
    score = 8 * everything["bytes_per_token"] / math.log2(tokenizer.vocab_size)
    return {**everything, "score": round(score, 4), "sources": rates}


def card(name: str, config: TokenizerConfig, settings: dict, numbers: dict) -> str:
    """TOKENIZER_CARD.md: what the tokenizer is and how well it compresses its corpus."""
    columns = ("documents", "bytes_per_token", "characters_per_token", "fertility", "unknown_rate", "round_trips")
    rows = "\n".join(
        f"| {source} | {' | '.join(f'{rates[column]:g}' for column in columns)} |"
        for source, rates in {**numbers["sources"], "all": numbers}.items()
    )
    text = (
        "Lossless: text is not normalised, white space is kept"
        if config.normalization == "identity"
        else f"Text is normalised ({config.normalization}), and so does not always come back; white space is kept"
    )
    return f"""# Tokenizer of {name}

SentencePiece {config.algorithm}, {settings["vocab_size"]:,} pieces, SHA-256 `{settings["sha256"]}`.

{text}, digits stand apart, and what has no piece is spelt in bytes.
Piece {settings["eos"]} ends a document. Held-out documents were not learnt from. Control pieces, which no text is spelt
with: {", ".join(f"`{piece}`" for piece in config.control) or "none"}.

On documents taken evenly from its corpus, most of them learnt from:

| source | documents | bytes a token | characters a token | tokens a word | unknown | came back as they were |
|---|---|---|---|---|---|---|
{rows}

Score: {numbers["score"]} bits of text in a bit of id, 8 · bytes a token / log2(pieces). More is better.
"""
