"""The tokenizer as everything else uses it: `tokenizer.load(DIR)`, lossless in both directions."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece

import stage
from stage import UserError

SPACE = "\u2581"  # how SentencePiece spells a space inside its pieces


class Tokenizer:
    """A SentencePiece model. `decode(encode(text)) == text` for every text.

    sha256: the digest of spm.model, its identity. vocab_size: pieces. eos: the id that ends a document; it also stands
    before a text that begins one. control: the ids of pieces that no text is spelt with, for chat templates.
    """

    def __init__(self, model: bytes, sha256: str):
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.sha256 = sha256
        self.vocab_size = self.pieces.get_piece_size()
        self.eos = self.pieces.eos_id()
        special = (0, self.eos)  # 0: unknown
        ids = [i for i in range(self.vocab_size) if self.pieces.is_control(i) and i not in special]
        self.control = {self.pieces.id_to_piece(i): i for i in ids}
        # A text may itself hold U+2581, which SentencePiece would give back as a space: it is spelt in bytes.
        self._space_bytes = [self.pieces.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without an end token. UserError for half a surrogate pair, which no file can hold."""
        _must_be_text(text)
        if SPACE not in text:
            return self.pieces.encode(text)
        ids: list[int] = []
        for part in re.split(f"({SPACE})", text):
            ids += self._space_bytes if part == SPACE else self.pieces.encode(part)
        return ids

    def encode_array(self, text: str) -> np.ndarray:
        """The same ids as an integer array, several times as fast to make."""
        if SPACE in text:
            return np.array(self.encode(text), dtype=np.int32)
        _must_be_text(text)
        return self.pieces.encode(text, return_type="numpy")

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids. Control pieces, such as the end of a document, have none; broken byte runs give U+FFFD."""
        return self.pieces.decode(list(ids))


def _must_be_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the text holds a lone surrogate, {text[error.start]!a}, at character {error.start}") from None


def load(directory: Path | str, make: str = "python -m tokenizer.train CONFIG") -> Tokenizer:
    """The tokenizer in a finished directory. UserError, naming `make`, if it is missing or not as its manifest says."""
    directory = Path(directory)
    manifest = stage.finished(directory, make)
    return Tokenizer((directory / "spm.model").read_bytes(), manifest["wrote"]["spm.model"]["sha256"])
