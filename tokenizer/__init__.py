"""The tokenizer as everything else uses it: `tokenizer.load(DIR)`, lossless in both directions."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

import stage
from cli import UserError

SPACE = "\u2581".encode()  # how SentencePiece spells a space inside its pieces
PART = 1 << 13  # bytes encoded at a time, about
CUT = re.compile(rb"[^ ](?= )")
NO_PREFIX = b"\x1a\x02\x18\x00"  # appended to a model: its normalizer_spec (field 3) with add_dummy_prefix (3) false


class Tokenizer:
    """A SentencePiece model. `decode(encode(text)) == text` for every text, if the model is one of ours or LLaMA's.

    model: the bytes of spm.model. sha256: their digest, its identity. vocab_size: pieces. eos: the id that ends a
    document. bos: the id before a text that begins one; a model without has eos there. control: the ids of pieces that
    no text is spelt with, for chat templates. UserError for what is no SentencePiece model, or one without eos.
    """

    def __init__(self, model: bytes, sha256: str):
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise UserError("the tokenizer is damaged: its bytes are not a SentencePiece model") from None
        # A model may put a space before every text, as LLaMA's does. That must come once, not before every part.
        self._prefix = self.pieces.normalize("x") == "▁x"
        # One that changes white space itself has to see the text whole.
        self._whole = self.pieces.normalize("x  x").removeprefix("▁") != "x▁▁x" or not self.pieces.is_byte(
            self.pieces.piece_to_id("<0xE2>")
        )
        if self._prefix and not self._whole:
            self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model + NO_PREFIX)
        self.model, self.sha256 = model, sha256
        self.vocab_size = self.pieces.get_piece_size()
        self.eos = self.pieces.eos_id()
        if self.eos < 0:
            raise UserError("the SentencePiece model has no end-of-text piece; expected one, usually </s>")
        self.bos = self.pieces.bos_id() if self.pieces.bos_id() >= 0 else self.eos
        special = (self.pieces.unk_id(), self.bos, self.eos)
        ids = [i for i in range(self.vocab_size) if self.pieces.is_control(i) and i not in special]
        self.control = {self.pieces.id_to_piece(i): i for i in ids}
        # A text may itself hold U+2581, which SentencePiece would give back as a space: it is spelt in bytes.
        spelt = [self.pieces.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE]
        self._space_bytes = np.array(spelt, dtype=np.int32)
        # Where no piece has a space behind another character, a text can be cut before any space that follows one.
        pieces = map(self.pieces.id_to_piece, range(self.vocab_size))
        self._cuts = not any(SPACE.decode() in piece.lstrip(SPACE.decode()) for piece in pieces)

    def encode(self, text: str, begins: bool = True) -> list[int]:
        """The ids of a text, without an end token. UserError for half a surrogate pair, which no file can hold.

        begins: whether a text begins here, or goes on: where the model puts a space before every text, a beginning has
        one.
        """
        try:
            return self.encode_array(text.encode(), begins).tolist()
        except UnicodeEncodeError as error:
            raise UserError(
                f"the text holds a lone surrogate, {text[error.start]!a}, at character {error.start}"
            ) from None

    def encode_array(self, text: bytes, begins: bool = True) -> np.ndarray:
        """The same of a text in UTF-8, int32, made without a Python number for each."""
        if self._whole:
            return self.pieces.encode(text, return_type="numpy")
        if self._prefix and text and begins:
            text = b" " + text
        parts = re.split(b"(%s)" % SPACE, text) if SPACE in text else [text]
        ids = []
        for part in parts:
            if part == SPACE:
                ids.append(self._space_bytes)
            else:
                ids += (self.pieces.encode(cut, return_type="numpy") for cut in self._cut(part))
        return ids[0] if len(ids) == 1 else np.concatenate(ids)

    def _cut(self, text: bytes) -> Iterator[bytes]:
        """A long text in parts, which give the ids of the whole. SentencePiece's memory grows with what it encodes at
        once, and its float32 sums along the text lose the digits that tell near-equal spellings apart."""
        start = 0
        while len(text) - start > PART:
            end = start + 64 * PART  # of a text without spaces; elsewhere a cut costs a token at most
            if self._cuts and (found := CUT.search(text, start + PART - 1, end)):
                end = found.end()
            while end < len(text) and text[end] & 0xC0 == 0x80:  # within a character
                end -= 1
            yield text[start:end]
            start = end
        yield text[start:]

    def decode(self, ids: Sequence[int], begins: bool = True) -> str:
        """The text of ids. Control pieces, such as the end of a document, have none, nor have rows that an embedding
        has past the pieces; broken byte runs give U+FFFD.

        begins: whether they begin a text, or go on with one: where the model puts a space before every text, it is
        dropped from a beginning.
        """
        text = self.pieces.decode([i for i in ids if i < self.vocab_size])
        return text.removeprefix(" ") if self._prefix and begins and not self._whole else text


def load(directory: Path | str, command: str | None = None) -> Tokenizer:
    """The tokenizer in a finished directory. UserError, naming the command, if it is missing or damaged."""
    directory = Path(directory)
    manifest = stage.finished(directory, command)
    return Tokenizer((directory / "spm.model").read_bytes(), manifest["wrote"]["spm.model"]["sha256"])
