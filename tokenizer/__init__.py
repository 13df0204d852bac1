"""The tokenizer that all other code uses: `tokenizer.load(DIR)` has `encode` and `decode`."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

import stage
from cli import UserError, extra

SPACE = "▁"  # U+2581: SentencePiece writes a space like this inside its pieces
PART = 1 << 13  # about this many bytes are encoded at a time
CUT = re.compile(rb"[^ ](?= )")
NO_PREFIX = b"\x1a\x02\x18\x00"  # appended to a model: its normalizer_spec (field 3) with add_dummy_prefix (3) false
FILES = ("spm.model", "tokenizer.json")  # a tokenizer is one of these; its SHA-256 is the tokenizer's identity


class Tokenizer:
    """A SentencePiece model. `decode(encode(text)) == text` for every text, unless the model normalises text."""

    # sha256: the digest of the model, its identity. eos: the id after a document. bos: the id before a text; it is eos
    # if the model has no bos. opening: the ids before every text.
    # control: {piece: id} of the pieces for chat templates, which no text is encoded to.

    file = FILES[0]

    def __init__(self, model: bytes, sha256: str):
        """model: the bytes of spm.model. UserError if they are no SentencePiece model, or one without eos."""
        try:
            pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise UserError("the tokenizer is damaged: its bytes are not a SentencePiece model") from None
        # LLaMA's model puts a space before every text. A long text is encoded in parts; only the first gets the space.
        self._prefix = pieces.normalize("x") == SPACE + "x"
        # Parts need a model that has byte pieces, keeps white space, and has no piece with a space inside.
        keeps_space = pieces.normalize("x  x").removeprefix(SPACE) == f"x{SPACE}{SPACE}x"
        names = pieces.id_to_piece(list(range(pieces.get_piece_size())))
        crosses = any(SPACE in name.lstrip(SPACE) for name in names)
        self._whole = not keeps_space or crosses or not pieces.is_byte(pieces.piece_to_id("<0xE2>"))
        if self._prefix and not self._whole:
            pieces = sentencepiece.SentencePieceProcessor(model_proto=model + NO_PREFIX)
        self.pieces, self.model, self.sha256 = pieces, model, sha256
        self.vocab_size, self.eos = len(names), pieces.eos_id()
        if self.eos < 0:
            raise UserError("the SentencePiece model has no end-of-text piece; expected one, usually </s>")
        self.bos = pieces.bos_id() if pieces.bos_id() >= 0 else self.eos
        self.opening = [self.bos]
        # SentencePiece would decode U+2581 in a text to a space, so U+2581 is encoded in bytes.
        self._space_bytes = np.array([pieces.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()], np.int32)
        self.control: dict[str, int] = {}
        for id, name in enumerate(names):
            if pieces.is_control(id) and id not in (pieces.unk_id(), self.bos, self.eos):
                self.control[name] = id

    def encode(self, text: str, begins: bool = True) -> list[int]:
        """The ids of a text, without an end token. begins: False if the text continues another."""
        return self.encode_array(text.encode(), begins).tolist()

    def encode_array(self, text: bytes, begins: bool = True) -> np.ndarray:
        """The ids of a text in UTF-8, int32."""
        if self._whole:
            return self.pieces.encode(text, return_type="numpy")
        if self._prefix and text and begins:
            text = b" " + text
        ids = []
        for number, part in enumerate(text.split(SPACE.encode())):
            if number:
                ids.append(self._space_bytes)
            ids += [self.pieces.encode(cut, return_type="numpy") for cut in self._parts(part)]
        return np.concatenate(ids)

    def _parts(self, text: bytes) -> Iterator[bytes]:
        """A long text in parts whose ids joined are the ids of the text."""
        # SentencePiece's memory grows with the text, and its float32 sums lose the digits that separate near-equal
        # encodings.
        start = 0
        while len(text) - start > PART:
            end = start + 64 * PART  # the place to cut if there is no space: this costs at most a token
            if match := CUT.search(text, start + PART - 1, end):
                end = match.end()
            while end < len(text) and text[end] & 0xC0 == 0x80:  # inside a character
                end -= 1
            yield text[start:end]
            start = end
        yield text[start:]

    def decode(self, ids: Sequence[int], begins: bool = True) -> str:
        """The text of ids; broken byte sequences give U+FFFD. begins: False if the ids continue a text."""
        # Control pieces have no text. Nor have ids past the vocabulary: an embedding may have more rows than pieces.
        text = self.pieces.decode([id for id in ids if id < self.vocab_size])
        return text.removeprefix(" ") if self._prefix and begins and not self._whole else text

    def proto(self):
        """The model as SentencePiece's ModelProto."""
        module = extra("sentencepiece.sentencepiece_model_pb2", "protobuf", "the conversion of a SentencePiece model")
        return module.ModelProto.FromString(self.model)

    def spelling(self, id: int) -> tuple[str, bytes]:
        """A token's text, U+FFFD if it is a part of a character, and its bytes."""
        name = self.pieces.id_to_piece(id)
        if self.pieces.is_byte(id):  # <0xE2>
            content = bytes.fromhex(name[3:5])
            return content.decode(errors="replace"), content
        text = name.replace(SPACE, " ")
        return text, text.encode()


def load(directory: Path | str, command: str | None = None) -> Tokenizer:
    """The tokenizer in a finished directory. UserError, naming the command, if it is missing or damaged."""
    wrote, directory = stage.finished(Path(directory), command)["wrote"], Path(directory)
    if FILES[0] in wrote:
        return Tokenizer((directory / FILES[0]).read_bytes(), wrote[FILES[0]]["sha256"])
    from tokenizer.huggingface import HuggingFace

    settings = stage.read_json(directory / "tokenizer_config.json")
    return HuggingFace((directory / FILES[1]).read_bytes(), wrote[FILES[1]]["sha256"], settings)


def identity(directory: Path) -> dict[str, str]:
    """{path: SHA-256} of the tokenizer in a directory, for a manifest; {} if there is none."""
    return {path: digest for path, digest in stage.outputs(directory).items() if path.endswith(FILES)}
