"""A model and its tokenizer as one GGUF file for llama.cpp and Ollama: `convert.py to-gguf`."""

# llama.cpp computes the same logits. Its tokenizers differ in places: a text that spells a control piece, such as
# "</s>", may become that piece; U+2581 in a text becomes a space; and in a unigram model, which has no byte pieces in
# llama.cpp, a character beyond ASCII that is no piece becomes the unknown piece.

import json
from pathlib import Path

import numpy as np
import torch

import cli
from cli import UserError
from model import Transformer
from sft.templates import IMPORTED, TEMPLATES, ends
from tokenizer import Tokenizer
from tokenizer.huggingface import HuggingFace

TENSORS = {  # part of a parameter's name in `Transformer`: the same part in GGUF
    "embed.": "token_embd.",
    "head.": "output.",
    "blocks.": "blk.",
    "attn.q.": "attn_q.",
    "attn.k.": "attn_k.",
    "attn.v.": "attn_v.",
    "attn.o.": "attn_output.",
    "mlp_norm.": "ffn_norm.",
    "mlp.": "ffn_",
}
PRE_TOKENIZERS = {  # how byte-level BPE splits a text: the name in GGUF, and the description in tokenizer.json
    "gpt-2": ["ByteLevel use_regex"],
    "smollm": ["Digits individual_digits", "ByteLevel use_regex"],
    "llama-bpe": [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
        "ByteLevel",
    ],
}
PROMPTS = {  # our chat templates in the template language of Go, for Ollama
    "chatml": "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}"
    "<|im_start|>assistant\n",
    "instruct": '{{ range .Messages }}{{ if eq .Role "user" }}### Instruction:\n{{ .Content }}\n\n### Response:\n'
    '{{ else if eq .Role "assistant" }}{{ .Content }}EOS{{ else }}{{ .Content }}\n\n{{ end }}{{ end }}',
    None: "{{ .Prompt }}",
}


def write(path: Path, model: Transformer, spm: Tokenizer | HuggingFace, template: str | None, kind: str) -> None:
    """Writes a model. template: the chat template in which it learnt to answer. kind: "f32", "f16" or "q8_0"."""
    gguf = cli.extra("gguf", "gguf", "to-gguf")
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    types = gguf.GGMLQuantizationType
    wanted = {"f32": types.F32, "f16": types.F16, "q8_0": types.Q8_0}[kind]
    file_types = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[file_types[kind]])
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(model.blocks[0].mlp.up.out_features)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(model.blocks[0].attn.n_kv_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    add_tokenizer = add_sentencepiece if isinstance(spm, Tokenizer) else add_byte_level
    add_tokenizer(writer, gguf.TokenType, spm, config.vocab_size)
    writer.add_bos_token_id(spm.bos)
    writer.add_eos_token_id(spm.eos)
    writer.add_add_bos_token(bool(spm.opening))
    writer.add_add_eos_token(False)
    if template:
        writer.add_eot_token_id(ends(template, spm)[-1])
        writer.add_chat_template(spm.settings["chat_template"] if template == IMPORTED else TEMPLATES[template].jinja)
    if config.rope_scaling:  # a factor for each pair of dimensions
        frequency = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
        slowed = config.rope_scaling.slowed(torch.from_numpy(frequency)).numpy()
        writer.add_tensor("rope_freqs.weight", (frequency / slowed).astype(np.float32))
    for name, parameter in model.state_dict().items():
        if name == "head.weight" and config.tie_embeddings:
            continue
        weight = parameter.detach().float().cpu().numpy()
        if ".attn.q." in name or ".attn.k." in name:
            # llama.cpp rotates the pair x_{2i} and x_{2i+1}; we rotate x_i and x_{i + E/2}, E the head dimension.
            halves = weight.reshape(-1, 2, config.head_dim // 2, config.d_model)
            weight = halves.swapaxes(1, 2).reshape(weight.shape)
        for ours, theirs in TENSORS.items():
            name = name.replace(ours, theirs)
        if name == "norm.weight":
            name = "output_norm.weight"
        stored = wanted
        if weight.ndim == 1:
            stored = types.F32
        elif kind == "q8_0" and weight.shape[1] % 32:  # blocks of 32 numbers
            stored = types.F16
        writer.add_tensor(name, gguf.quants.quantize(weight, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_pieces(writer, types, pieces: list[tuple[str, float, object]], rows: int) -> None:
    """Adds (piece, score, type) of each id. The embedding may have more rows than there are pieces."""
    for row in range(len(pieces), rows):
        pieces.append((f"[PAD{row}]", 0.0, types.UNUSED))
    texts, scores, kinds = zip(*pieces, strict=True)
    writer.add_token_list([text.encode() for text in texts])
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)


def exact(spm: Tokenizer):
    """The ModelProto of a SentencePiece model. UserError if another format cannot give its ids."""
    model = spm.proto()
    trainer, normalizer, kinds = model.trainer_spec, model.normalizer_spec, model.SentencePiece
    types = [piece.type for piece in model.pieces]
    changes_text = normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces
    known = trainer.model_type in (trainer.UNIGRAM, trainer.BPE) and types.count(kinds.BYTE) == 256
    if changes_text or trainer.treat_whitespace_as_suffix or not known or kinds.USER_DEFINED in types:
        problem = "another format cannot reproduce this tokenizer exactly; expected unigram or BPE with 256 byte pieces"
        raise UserError(f"{problem}, no text normalisation, white space kept, and no user-defined pieces")
    return model


def add_sentencepiece(writer, types, spm: Tokenizer, rows: int) -> None:
    """Adds a SentencePiece model: BPE is "llama" in GGUF, unigram is "t5"."""
    proto = exact(spm)
    kinds = {proto.SentencePiece.CONTROL: types.CONTROL, proto.SentencePiece.BYTE: types.BYTE}
    kinds |= {proto.SentencePiece.NORMAL: types.NORMAL, proto.SentencePiece.UNKNOWN: types.UNKNOWN}
    is_bpe = proto.trainer_spec.model_type == proto.trainer_spec.BPE
    known = {piece.piece for piece in proto.pieces}
    unknown = min(piece.score for piece in proto.pieces if piece.type == piece.NORMAL) - 10  # SentencePiece's penalty
    pieces = []
    for piece in proto.pieces:
        text, score, kind = piece.piece, piece.score, kinds[piece.type]
        if kind == types.BYTE and not is_bpe:  # "t5" has no byte pieces: make ASCII bytes characters
            character = chr(int(text[3:5], 16))
            if character.isascii() and character not in known:
                text, score, kind = character, unknown, types.NORMAL
        pieces.append((text, score, kind))
    writer.add_tokenizer_model("llama" if is_bpe else "t5")
    writer.add_tokenizer_pre("default")
    add_pieces(writer, types, pieces, rows)
    writer.add_unk_token_id(spm.pieces.unk_id())
    writer.add_add_space_prefix(proto.normalizer_spec.add_dummy_prefix)
    writer.add_remove_extra_whitespaces(False)


def add_byte_level(writer, types, spm: HuggingFace, rows: int) -> None:
    """Adds a byte-level BPE, "gpt2" in GGUF. UserError for another tokenizer.json."""
    described = json.loads(spm.content)
    splits = []
    given = described["pre_tokenizer"] or {}
    for part in given.get("pretokenizers", [given]):
        if part.get("type") == "Split":
            splits.append(part["pattern"].get("Regex"))
        else:
            switches = [name for name in ("individual_digits", "add_prefix_space", "use_regex") if part.get(name)]
            splits.append(" ".join([str(part.get("type")), *switches]))
    names = [name for name, expected in PRE_TOKENIZERS.items() if expected == splits]
    ignores_merges = bool(described["model"].get("ignore_merges"))
    if not names or described["normalizer"] or ignores_merges != (names == ["llama-bpe"]):
        known = ", ".join(PRE_TOKENIZERS)
        raise UserError(f"GGUF has no name for the way in which the tokenizer splits text; expected that of {known}")
    kinds = dict.fromkeys(spm.control.values(), types.CONTROL) | dict.fromkeys(spm.added.values(), types.USER_DEFINED)
    pieces = []
    for id in range(spm.vocab_size):
        name = spm.whole.id_to_token(id)
        kind = types.UNUSED if name is None else kinds.get(id, types.NORMAL)
        pieces.append((name or f"[PAD{id}]", 0.0, kind))
    merges = []
    for merge in described["model"]["merges"]:
        merges.append(merge if isinstance(merge, str) else " ".join(merge))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(names[0])
    add_pieces(writer, types, pieces, rows)
    writer.add_token_merges(merges)


def modelfile(path: Path, spm: Tokenizer | HuggingFace, template: str | None) -> str:
    """A Modelfile for `ollama create`."""
    lines = [f"FROM ./{path.name}"]
    if template in PROMPTS:
        lines.append(f'TEMPLATE """{PROMPTS[template].replace("EOS", spm.spelling(spm.eos)[0])}"""')
    for id in ends(template, spm) if template else ():
        lines.append(f'PARAMETER stop "{spm.spelling(id)[0]}"')
    return "\n".join(lines)
