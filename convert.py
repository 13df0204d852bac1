"""To and from the Hugging Face LLaMA layout.

    python convert.py to-hf configs/tiny.py OUT    # what transformers opens: AutoModelForCausalLM, AutoTokenizer
    python convert.py from-hf DIR OUT              # a LLaMA of theirs as a checkpoint of ours

There and back is bit for bit, weights and tokenizer both. Needs safetensors: pip install safetensors
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import checkpoint
import cli
import stage
import tokenizer.train
from cli import UserError, log
from model import ModelConfig, Transformer
from sft import templates
from tokenizer import Tokenizer

WRITTEN = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
WRITTEN |= {"special_tokens_map.json", "tokenizer.model", "weights.pt", "manifest.json", "config.py", "tokenizer"}
UNIGRAM, BPE = 1, 2  # in a SentencePiece model, trainer_spec.model_type
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # and the type of a piece


def theirs(name: str) -> str:
    """A parameter's name in the Hugging Face layout, from its name in `Transformer`.

    >>> theirs("blocks.0.attn.q.weight")
    'model.layers.0.self_attn.q_proj.weight'
    """
    for ours, other in (
        (r"^embed\.", "model.embed_tokens."),
        (r"^norm\.", "model.norm."),
        (r"^head\.", "lm_head."),
        (r"^blocks\.(\d+)\.", r"model.layers.\1."),
        (r"\.attn_norm\.", ".input_layernorm."),
        (r"\.mlp_norm\.", ".post_attention_layernorm."),
        (r"\.attn\.(\w)\.", r".self_attn.\1_proj."),
        (r"\.mlp\.(\w+)\.", r".mlp.\1_proj."),
    ):
        name = re.sub(ours, other, name)
    return name


@contextlib.contextmanager
def writing(out: Path, force: bool, source: Path) -> Iterator[Path]:
    """A temporary directory beside `out`, which takes its name when the block has ended well; else it is removed.

    UserError if `out` holds anything and not `force`, or something that no conversion wrote, or the source itself.
    """
    try:
        out, source = out.resolve(), source.resolve()
    except (OSError, RuntimeError) as error:
        raise UserError(f"{out} cannot be written: {error}") from None
    if out == source or out in source.parents:
        raise UserError(f"{out} is what is converted, or holds it; name another directory to write")
    if out.is_file():
        raise UserError(f"{out} is a file; name a directory to write")
    old = out.with_name(f".{out.name}.old")  # left by a process killed while it put a model in place of another
    if old.exists():
        shutil.rmtree(old) if out.exists() else old.rename(out)
    if out.is_dir() and (there := sorted(path.name for path in out.iterdir())):
        if not force:
            raise UserError(
                f"{out} is not empty: it holds {', '.join(there[:3])}; name another, or replace it: --force"
            )
        ours = {"weights.pt", "model.safetensors"} & set(there)
        if strange := sorted(set(there) - WRITTEN) if ours else there:
            raise UserError(
                f"{out} holds {', '.join(strange[:3])}, which no conversion wrote; move it away, or name another"
            )
    temporary = out.with_name(f".{out.name}.partial")
    with stage.locked(temporary):
        for path in temporary.iterdir():  # of a process that was killed
            if path.name != ".lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            yield temporary
            (temporary / ".lock").unlink()
            for path in temporary.rglob("*"):
                stage.sync(path)
            checkpoint.put(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def saving(save, weights: dict[str, Tensor], path: Path, *arguments) -> None:
    """Writes a file as others may read it. UserError where that fails: both libraries hide what the disk said."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save(weights, path, *arguments)
    except Exception as error:
        raise UserError(f"{path.name} cannot be written: {error.__context__ or error}") from None
    path.chmod(mode)  # safetensors keeps what it writes to its owner


def safetensors():
    """The package `safetensors.torch`. UserError, with the command that installs it, where it is missing."""
    try:
        import safetensors.torch
    except ImportError:
        raise UserError("the Hugging Face layout needs safetensors; install it with: pip install safetensors") from None
    return safetensors.torch


# --------------------------------------------------------------------------------------------------------------- to-hf


def to_hf(arguments: argparse.Namespace) -> None:
    """Writes a trained model and its tokenizer as transformers reads them."""
    import configs

    experiment = configs.load(arguments.config)
    directory = Path(arguments.checkpoint) if arguments.checkpoint else experiment.latest()
    out, files = Path(arguments.out), safetensors()
    spm = experiment.load_tokenizer(directory)
    checkpoint.must_match(directory, spm.sha256)
    template = checkpoint.template(directory)
    if template is None and set(templates.TEMPLATES["chatml"].needs) <= spm.control.keys():
        template = "chatml"  # what its control pieces are for, should someone fine-tune it
    with writing(out, arguments.force, directory) as temporary:
        model = checkpoint.load_model(directory)
        weights = {theirs(name): weight.contiguous() for name, weight in model.state_dict().items()}
        must_be_llama(model, weights)
        if model.config.tie_embeddings:
            del weights["lm_head.weight"]
        saving(files.save_file, weights, temporary / "model.safetensors", {"format": "pt"})
        stage.write_json(temporary / "config.json", llama_config(model.config, spm))
        stop = list(templates.ends(template, spm)) if template else [spm.eos]
        ends = {"bos_token_id": spm.bos, "eos_token_id": stop if len(stop) > 1 else spm.eos}
        stage.write_json(temporary / "generation_config.json", ends)
        stage.write_json(temporary / "tokenizer.json", fast_tokenizer(spm, checkpoint.template(directory)))
        marks = {"bos_token": spm.pieces.id_to_piece(spm.bos), "eos_token": spm.pieces.id_to_piece(spm.eos)}
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": model.config.context_length,
            "clean_up_tokenization_spaces": False,
            **marks,
            **({"chat_template": templates.TEMPLATES[template].jinja} if template else {}),
        }
        stage.write_json(temporary / "tokenizer_config.json", settings)
        stage.write_json(temporary / "special_tokens_map.json", marks)
        (temporary / "tokenizer.model").write_bytes(spm.model)
    log.info(f"converted: {model.num_parameters():,} parameters, {spm.vocab_size:,} pieces -> {out}")


def must_be_llama(model: Transformer, weights: dict[str, Tensor]) -> None:
    """UserError if other programs would compute something else from the exported weights than the model does.

    A changed architecture (another feed-forward network, a window, one more norm) would pass every check of names and
    shapes and then answer nonsense elsewhere. So the exported weights go through a plain LLaMA written down here, on a
    full context of random tokens.
    """
    c = model.config
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(c.vocab_size, (1, c.context_length), generator=draw)
    refusal = "to-hf exports LLaMAs only, and the architecture in model.py was changed"
    try:
        expected = llama_logits(weights, c, tokens)
    except KeyError as missing:
        raise UserError(f"the model has no {missing.args[0]}; {refusal}") from None
    with torch.inference_mode():
        difference = float((model(tokens).double() - expected).abs().max() / expected.abs().max())
    if not difference <= 1e-4:
        raise UserError(
            f"a plain LLaMA with these weights gives other logits (by {difference:.1e} of the largest); {refusal}"
        )


def llama_logits(weights: dict[str, Tensor], c: ModelConfig, tokens: Tensor) -> Tensor:
    """The logits (1, T, V) of a LLaMA, in float64, from tensors by their Hugging Face names. tokens: (1, T)."""
    T, E, heads = tokens.shape[1], c.head_dim, c.n_heads
    weights = {name: weight.double() for name, weight in weights.items()}
    frequency = c.rope_theta ** (-torch.arange(0, E, 2, dtype=torch.float64) / E)
    angle = torch.outer(torch.arange(T, dtype=torch.float64), frequency).repeat(1, 2)  # (T, E)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * weights[f"{name}.weight"]

    def split(x: Tensor, name: str) -> Tensor:
        return (x @ weights[f"{name}.weight"].T).view(T, -1, E).transpose(0, 1)  # (H or K, T, E)

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * angle.cos() + torch.cat((-second, first), -1) * angle.sin()

    x = weights["model.embed_tokens.weight"][tokens[0]]  # (T, D)
    for layer in range(c.n_layers):
        at = f"model.layers.{layer}"
        h = norm(x, f"{at}.input_layernorm")
        q, k, v = (split(h, f"{at}.self_attn.{name}_proj") for name in "qkv")
        k, v = (z.repeat_interleave(heads // len(z), 0) for z in (turn(k), v))
        scores = turn(q) @ k.mT / E**0.5 + torch.full((T, T), -torch.inf).triu(1)
        y = (scores.softmax(-1) @ v).transpose(0, 1).reshape(T, -1)
        x = x + y @ weights[f"{at}.self_attn.o_proj.weight"].T
        h = norm(x, f"{at}.post_attention_layernorm")
        gate, up, down = (weights[f"{at}.mlp.{name}_proj.weight"].T for name in ("gate", "up", "down"))
        x = x + (torch.nn.functional.silu(h @ gate) * (h @ up)) @ down
    return (norm(x, "model.norm") @ weights["lm_head.weight"].T)[None]


def llama_config(config: ModelConfig, spm: Tokenizer) -> dict:
    """config.json of a LlamaForCausalLM. transformers 4 reads `rope_theta`, 5 `rope_parameters`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff or 4 * config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads or config.n_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": 0.02,
        "bos_token_id": spm.bos,
        "eos_token_id": spm.eos,
        "dtype": "float32",
    }


def protobuf(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a protobuf message, nested messages as bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80:
                return value

    while at < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
        else:
            size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
            at += size
            yield number, message[at - size : at]


def fast_tokenizer(spm: Tokenizer, template: str | None = None) -> dict:
    """tokenizer.json: ids as SentencePiece gives them, control pieces parsed where a text spells them; cut before
    answers as the template cuts.

    Pieces are spelt with the space itself, so nothing has to be replaced, and a U+2581 in a text is spelt in bytes.
    UserError, naming what, for a model that this cannot reproduce exactly.
    """
    model = dict(protobuf(spm.model))  # the last of each field: of the pieces none is needed
    algorithm = dict(protobuf(model[2])).get(3, UNIGRAM)
    normalizer = {3: 1, 4: 1, 5: 1} | dict(protobuf(model.get(3, b"")))
    pieces, ids = spm.pieces, range(spm.vocab_size)
    kind = [dict(protobuf(piece)).get(3, NORMAL) for number, piece in protobuf(spm.model) if number == 1]
    normal = [pieces.id_to_piece(i) for i in ids if kind[i] == NORMAL]
    wrong = {
        "an algorithm that is neither unigram nor BPE": algorithm not in (UNIGRAM, BPE),
        "text normalisation": bool(normalizer.get(2)),
        "white space that is not kept": normalizer[4] or not normalizer[5] or dict(protobuf(model[2])).get(24),
        "no byte pieces": kind.count(BYTE) != 256,
        "pieces with characters that are none": algorithm == BPE and not set("".join(normal)) <= set(normal),
        "user-defined or unused pieces": not set(kind) <= {NORMAL, UNKNOWN, CONTROL, BYTE},
    }
    if any(wrong.values()):
        raise UserError(
            f"the tokenizer has {', '.join(what for what, found in wrong.items() if found)}, which tokenizer.json "
            "cannot reproduce exactly; only tokenizers without can be converted"
        )
    spelt = [pieces.id_to_piece(i).replace("▁", " ") if kind[i] == NORMAL else pieces.id_to_piece(i) for i in ids]
    places = [templates.TEMPLATES[template].cut] if template else []
    if algorithm == UNIGRAM:
        body = {"type": "Unigram", "unk_id": pieces.unk_id(), "byte_fallback": True}
        body["vocab"] = [[piece, pieces.get_score(i)] for i, piece in enumerate(spelt)]
        places.append(never_whole(spelt, kind))
    else:
        body = {"type": "BPE", "unk_token": spelt[pieces.unk_id()], "fuse_unk": True, "byte_fallback": True}
        body["vocab"] = {piece: i for i, piece in enumerate(spelt)}
        body["merges"] = merges({piece: pieces.get_score(i) for i, piece in enumerate(spelt) if kind[i] == NORMAL})
    cuts = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in places]
    prefix = bool(normalizer[3])  # a space before every text
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": spelt[i]} | plain for i in ids if kind[i] == CONTROL],
        "normalizer": {"type": "Prepend", "prepend": " "} if prefix else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts} if cuts else None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": body,
    }


def merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """The merges of a BPE vocabulary, {piece: score}: every way to put a piece together from two, best score first.

    SentencePiece joins whatever two neighbours make a piece; of equal ones the leftmost.
    """
    return [
        (piece[:i], piece[i:])
        for piece in sorted(scores, key=scores.get, reverse=True)
        for i in range(1, len(piece))
        if piece[:i] in scores and piece[i:] in scores
    ]


def never_whole(spelt: list[str], kind: list[int]) -> str:
    """A regular expression that matches, in every text that spells a byte or control piece, a place within it that no
    other piece crosses: cut there, the text cannot be read as that piece, and nothing else changes."""
    pairs = {
        piece[i : i + 2] for piece, k in zip(spelt, kind, strict=True) if k == NORMAL for i in range(len(piece) - 1)
    }
    places: dict[str, list[str]] = {}
    for piece in (piece for piece, k in zip(spelt, kind, strict=True) if k != NORMAL):
        free = [i for i in range(1, len(piece)) if piece[i - 1 : i + 1] not in pairs]
        if not free:
            raise UserError(f"the tokenizer has pieces across every place in {piece}; tokenizer.json cannot tell them")
        places.setdefault(piece[: free[0]], []).append(re.escape(piece[free[0] :]))
    return "|".join(f"(?<={re.escape(before)})(?={'|'.join(after)})" for before, after in places.items())


# ------------------------------------------------------------------------------------------------------------- from-hf


def from_hf(arguments: argparse.Namespace) -> None:
    """Writes a LLaMA in the Hugging Face layout as a checkpoint, with its tokenizer and a config to use it by."""
    source, out = Path(arguments.source), Path(arguments.out)
    config = read_config(source)
    spm_file = source / "tokenizer.model"
    spm = read_tokenizer(spm_file, config) if os.path.lexists(spm_file) else None
    # The name goes into paths and manifests, where an experiment's would stand.
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", out.resolve().name).lstrip(".-") or "imported"
    with writing(out, arguments.force, source) as temporary:
        weights = fitted(read_tensors(source), config)
        if spm:
            write_tokenizer(temporary / "tokenizer", spm, name)
            (temporary / "config.py").write_text(config_file(name, config), encoding="utf-8")
        saving(torch.save, weights, temporary / "weights.pt")
        manifest = {
            "config": {"model": stage.describe(config)},
            "read": {f"{name}/tokenizer/spm.model": spm.sha256} if spm else {},
            "wrote": stage.digests(temporary, [temporary / "weights.pt"]),
            "counts": {"step": 0},
            "versions": stage.versions(),
        }
        stage.write_manifest(temporary, manifest)
    log.info(f"converted: {sum(w.numel() for w in set(weights.values())):,} parameters -> {out}")
    if spm:
        log.info(f'try: python serve.py {out}/config.py generate "The"')
    else:
        log.warning(
            f"{source} has no tokenizer.model, a SentencePiece tokenizer: checkpoint.load_model opens {out}, but "
            "serve.py and eval cannot use it"
        )


def read_json(path: Path) -> dict:
    """A JSON object. UserError, naming the file, if it is missing, broken, or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no {path}; expected the directory of a model in the Hugging Face layout") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}; get it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}; expected a JSON object")
    return value


def read_config(source: Path) -> ModelConfig:
    """The shape that config.json describes. UserError, naming all of what is not supported or not there."""
    path = source / "config.json"
    given = read_json(path)
    problems = []

    def number(name: str, whole: bool = True, default=None):
        """A field's value, or a problem and None if it is not a positive number."""
        value = default if given.get(name) is None else given[name]
        kind = int if whole else (int, float)
        if value is None:
            problems.append(f"{name} is missing")
        elif not isinstance(value, kind) or isinstance(value, bool) or not 0 < value < 2**31:
            found = f"{value!r:.40}"
            problems.append(f"{name} is {found}, expected a {'whole ' if whole else ''}number above 0, below 2^31")
        else:
            return value
        return None

    def only(name: str, *supported, default=None) -> None:
        if given.get(name, default) not in supported:
            problems.append(f"{name} is {given.get(name, default)!r}, supported is {supported[0]!r}")

    architectures = given.get("architectures") or [given.get("model_type")]
    if architectures not in (["LlamaForCausalLM"], ["MistralForCausalLM"], ["llama"], ["mistral"]):
        problems.append(f"architectures is {architectures!r}, supported are LlamaForCausalLM and MistralForCausalLM")
    if given.get("model_type") == "mistral":
        only("sliding_window", None, default=4096)
    else:
        only("sliding_window", None)
    only("hidden_act", "silu", default="silu")
    only("tie_word_embeddings", False, True, default=False)
    only("attention_bias", False, None)
    only("mlp_bias", False, None)
    only("quantization_config", None)
    ropes = [given.get(name) or {} for name in ("rope_scaling", "rope_parameters")]
    for name, rope in zip(("rope_scaling", "rope_parameters"), ropes, strict=True):
        if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default":
            problems.append(f"{name} is {rope!r}, supported is the type 'default'")
        elif rope.get("partial_rotary_factor", 1) != 1:
            problems.append(f"partial_rotary_factor is {rope['partial_rotary_factor']!r}, supported is 1")
    only("partial_rotary_factor", None, 1)
    if isinstance(ropes[1], dict) and "rope_theta" in ropes[1]:
        given["rope_theta"] = ropes[1]["rope_theta"]
    fields = {
        "vocab_size": number("vocab_size"),
        "context_length": number("max_position_embeddings"),
        "n_layers": number("num_hidden_layers"),
        "d_model": number("hidden_size"),
        "n_heads": number("num_attention_heads"),
        "d_ff": number("intermediate_size"),
        "rope_theta": number("rope_theta", whole=False, default=10_000.0),
        "rms_norm_eps": number("rms_norm_eps", whole=False),
    }
    fields["n_kv_heads"] = number("num_key_value_heads", default=fields["n_heads"] or 1)
    if fields["d_model"] and fields["n_heads"]:
        width = fields["d_model"] / fields["n_heads"]
        if given.get("head_dim") not in (None, width):
            problems.append(f"head_dim is {given['head_dim']!r}, supported is hidden_size / heads, {width:g}")
    if not problems:
        try:
            return ModelConfig(**fields, tie_embeddings=given.get("tie_word_embeddings", False))
        except (TypeError, ValueError) as error:
            problems.append(str(error))
    raise UserError(f"{path} describes a model that is not supported: {'; '.join(problems)}")


def read_tensors(source: Path) -> dict[str, Tensor]:
    """Every tensor of the model's files, on the CPU. UserError, naming the file, if one is missing or damaged."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (source / name).is_file():
            return read_file(source / name)
        index = source / f"{name}.index.json"
        if not index.is_file():
            continue
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(s, str) and Path(s).name == s for s in shards.values()):
            raise UserError(f"{index} is damaged: its weight_map does not name files beside it; get it again")
        tensors = {}
        for shard in sorted(set(shards.values())):
            if not (source / shard).is_file():
                raise UserError(f"{source / shard} is missing; {index.name} names it: get it again")
            tensors |= read_file(source / shard)
        return tensors
    raise UserError(f"{source} holds no weights; expected model.safetensors or pytorch_model.bin, or their index")


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one .safetensors or .bin file; nothing in it is run."""
    safe = path.suffix == ".safetensors"
    reader = safetensors().load_file if safe else lambda p: torch.load(p, map_location="cpu", weights_only=True)
    try:
        found = reader(path)
    except MemoryError:
        raise
    except Exception as error:  # a file made to harm can break the reader anywhere
        what = f"{type(error).__name__} {error}".splitlines()[0]
        raise UserError(f"{path} is damaged, or holds something other than tensors ({what}); get it again") from None
    if not isinstance(found, dict) or not all(isinstance(k, str) and _is_plain(v) for k, v in found.items()):
        raise UserError(f"{path} holds something other than tensors by name; expected a model's state_dict")
    return found


def _is_plain(value) -> bool:
    """Whether something is a tensor with its numbers in it: not sparse, not quantized, not on no device."""
    plain = isinstance(value, Tensor) and value.layout == torch.strided
    return plain and value.device.type == "cpu" and not value.is_quantized


def fitted(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The weights in float32 by our names. UserError, naming all of what is missing, unexpected or of another shape."""
    if config.n_layers > len(tensors):
        raise UserError(f"config.json has {config.n_layers:,} layers, but the files only {len(tensors)} tensors")
    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in Transformer(config).state_dict().items()}
    tensors = {name: t for name, t in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    weights, problems = {}, []
    if config.tie_embeddings and "model.embed_tokens.weight" in tensors:
        embedding = tensors["model.embed_tokens.weight"]
        head = tensors.setdefault("lm_head.weight", embedding)
        if not torch.equal(head.float(), embedding.float()):
            problems.append("lm_head.weight differs from model.embed_tokens.weight, which config.json ties it to")
    for name, shape in expected.items():
        found = tensors.pop(theirs(name), None)
        if found is None:
            problems.append(f"{theirs(name)} is missing")
        elif tuple(found.shape) != shape:
            problems.append(f"{theirs(name)} is {list(found.shape)}, expected {list(shape)}")
        elif not found.is_floating_point():
            problems.append(f"{theirs(name)} is {found.dtype}, expected floating point")
        else:
            # A copy: what is a view into something larger would be saved with all of it.
            weights[name] = found.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            if not weights[name].isfinite().all():
                problems.append(f"{theirs(name)} has numbers that are not finite in float32")
    problems += [f"{name} is unexpected" for name in tensors]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UserError(f"the weights do not fit config.json: {'; '.join(problems[:8])}{more}")
    if config.tie_embeddings and "head.weight" in weights:
        weights["head.weight"] = weights["embed.weight"]
    return weights


def read_tokenizer(path: Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer of a tokenizer.model. UserError if it is damaged, or does not fit the embedding."""
    try:
        spm = Tokenizer(path.read_bytes(), stage.sha256(path))
    except (UserError, OSError) as error:
        raise UserError(f"{path}: {error}") from None
    if spm.vocab_size > config.vocab_size:
        raise UserError(f"{path} has {spm.vocab_size:,} pieces, but the embedding only {config.vocab_size:,} rows")
    return spm


def write_tokenizer(directory: Path, spm: Tokenizer, name: str) -> None:
    """A finished tokenizer directory, as the stage `tokenizer` leaves it."""
    directory.mkdir()
    tokenizer.train.write(directory, spm.model)
    control = ", ".join(f"`{piece}`" for piece in spm.control) or "none"
    (directory / "TOKENIZER_CARD.md").write_text(
        f"# Tokenizer of {name}\n\nSentencePiece, {spm.vocab_size:,} pieces, SHA-256 `{spm.sha256}`.\n\n"
        f"It came with a model in the Hugging Face layout; what it was trained on is not known here.\n"
        f"Piece {spm.bos} begins a document, piece {spm.eos} ends one. Control pieces: {control}.\n",
        encoding="utf-8",
    )
    manifest = {"config": {}, "read": {}, "wrote": stage.digests(directory, directory.iterdir())}
    manifest |= {"counts": {"vocab_size": spm.vocab_size}, "versions": stage.versions()}
    stage.write_manifest(directory, manifest)


def config_file(name: str, config: ModelConfig) -> str:
    """config.py: an experiment that goes on from the converted model."""
    default = {f.name: f.default for f in dataclasses.fields(config)}
    shape = {k: v for k, v in dataclasses.asdict(config).items() if v != default[k]}
    shape = "".join(f"        {key}={value!r},\n" for key, value in shape.items())
    return f'''"""{name}: converted from the Hugging Face layout. Its weights and its tokenizer are beside this file."""

from pathlib import Path

from configs import Experiment
from data.corpus import CorpusConfig
from data.pack import PackConfig
from data.sources import PythonDocs
from model import ModelConfig
from tokenizer.train import TokenizerConfig
from trainer import TrainConfig

experiment = Experiment(
    name="{name}",
    imported=Path(__file__).resolve().parent,
    model=ModelConfig(
{shape}    ),
    tokenizer=TokenizerConfig(),  # not used: the tokenizer came with the model
    corpus=CorpusConfig(sources=(PythonDocs(),)),  # what it is evaluated on: put your own text here
    pack=PackConfig(),
    pretrain=TrainConfig(steps=1_000, batch_size=8, learning_rate=1e-4),
)
'''


def arguments() -> argparse.ArgumentParser:
    p = cli.parser(__doc__, config=False)
    commands = p.add_subparsers(required=True, metavar="COMMAND")
    for name, command in (("to-hf", to_hf), ("from-hf", from_hf)):
        c = commands.add_parser(name, description=command.__doc__, help=command.__doc__, allow_abbrev=False)
        c.set_defaults(command=command)
        if command is to_hf:
            c.add_argument("config", metavar="CONFIG", help="the experiment, such as configs/tiny.py")
            c.add_argument("--checkpoint", metavar="DIR", help="a trained model by path, instead of the experiment's")
        else:
            c.add_argument("source", metavar="DIR", help="config.json, weights, and tokenizer.model if there is one")
        c.add_argument("out", metavar="OUT", help="the directory to write")
        c.add_argument("--force", action="store_true", help="replace a model that is in OUT")
    return p


if __name__ == "__main__":
    parsed = arguments().parse_args()
    cli.run(parsed.command, parsed)
