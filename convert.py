"""To and from the Hugging Face LLaMA layout.

    python convert.py to-hf configs/tiny.py OUT    # what transformers opens: AutoModelForCausalLM, AutoTokenizer
    python convert.py from-hf DIR OUT              # a LLaMA in that layout becomes a checkpoint of ours

Both ways keep every bit of weights and tokenizer. Needs: pip install safetensors protobuf; to-hf also transformers
"""

import argparse
import dataclasses
import glob
import importlib
import json
import re
from pathlib import Path

import torch
from torch import Tensor

import checkpoint
import cli
import configs
import stage
import tokenizer.train
from cli import UserError, log
from model import ModelConfig, Transformer
from sft.templates import TEMPLATES, ends
from tokenizer import Tokenizer

TENSORS = {  # part of a parameter's name in `Transformer`: the same part in the Hugging Face layout
    r"^embed\.": "model.embed_tokens.",
    r"^norm\.": "model.norm.",
    r"^head\.": "lm_head.",
    r"^blocks\.(\d+)\.": r"model.layers.\1.",
    r"\.attn_norm\.": ".input_layernorm.",
    r"\.mlp_norm\.": ".post_attention_layernorm.",
    r"\.attn\.(\w)\.": r".self_attn.\1_proj.",
    r"\.mlp\.(\w+)\.": r".mlp.\1_proj.",
}
FIELDS = {  # field of ModelConfig: its name in config.json
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "n_layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "d_ff": "intermediate_size",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
DEFAULTS = {"num_key_value_heads": None, "rope_theta": 10_000.0, "tie_word_embeddings": False, "rope_type": "default"}
ARCHITECTURES = {  # what `Transformer` can compute: the values of fields that config.json lacks
    "LlamaForCausalLM": DEFAULTS,
    "MistralForCausalLM": DEFAULTS | {"sliding_window": 4_096},
}
SUPPORTED = {  # field of config.json that changes what a model computes: the only value that `Transformer` computes
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "rope_type": "default",
    "partial_rotary_factor": 1,
    "quantization_config": None,
}
# --force replaces only a directory that holds nothing but these.
WRITTEN = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
WRITTEN |= {"special_tokens_map.json", "tokenizer.model", "weights.pt", "manifest.json", "config.py", "tokenizer"}


def theirs(name: str) -> str:
    """A parameter's name in the Hugging Face layout, such as model.norm.weight, from its name in `Transformer`."""
    for ours, other in TENSORS.items():
        name = re.sub(ours, other, name)
    return name


def extra(module: str):
    """Imports a module of an optional package. UserError, with the command that installs it, if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        command = "pip install safetensors protobuf transformers"
        raise UserError(f"a package is missing ({error}); install what conversion needs with: {command}") from None


def must_be_free(out: Path, force: bool, source: Path) -> None:
    """UserError if writing to `out` would lose anything. force: an earlier conversion may be lost."""
    checkpoint.recover(out.parent, glob.escape(out.name))
    if out.is_file():
        raise UserError(f"{out} is a file; name a directory to write")
    if out.resolve() in (source.resolve(), *source.resolve().parents):
        raise UserError(f"{out} is the directory to convert, or holds it; name another directory to write")
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    strange = names - WRITTEN if names & {"weights.pt", "model.safetensors"} else names
    if names and not force:
        raise UserError(f"{out} is not empty: it holds {min(names)}; name another directory, or replace it: --force")
    if strange:
        raise UserError(f"{out} holds {min(strange)}, which no conversion wrote; name another directory")


# --------------------------------------------------------------------------------------------------------------- to-hf


def to_hf(arguments: argparse.Namespace) -> None:
    """Writes a trained model and its tokenizer as transformers reads them."""
    experiment, out = configs.load(arguments.config), Path(arguments.out)
    directory = Path(arguments.checkpoint) if arguments.checkpoint else experiment.latest()
    spm = experiment.load_tokenizer(directory)
    checkpoint.must_match(directory, spm.sha256)
    must_be_free(out, arguments.force, directory)
    model = checkpoint.load_model(directory)
    weights = {theirs(name): weight.contiguous() for name, weight in model.state_dict().items()}
    description = llama_config(model.config, spm)
    must_be_llama(model, weights, description)
    if model.config.tie_embeddings:
        del weights["lm_head.weight"]
    files = {"config.json": description} | tokenizer_files(spm, checkpoint.template(directory))
    files["tokenizer_config.json"]["model_max_length"] = model.config.context_length
    with checkpoint.replacing(out) as temporary:
        content = extra("safetensors.torch").save(weights, {"format": "pt"})
        (temporary / "model.safetensors").write_bytes(content)
        (temporary / "tokenizer.model").write_bytes(spm.model)
        for name, value in files.items():
            stage.write_json(temporary / name, value)
    log.info(f"converted: {model.num_parameters():,} parameters, {spm.vocab_size:,} pieces -> {out}")


def llama_config(config: ModelConfig, spm: Tokenizer) -> dict:
    """config.json of a LlamaForCausalLM. transformers 4 reads `rope_theta`, 5 `rope_parameters`."""
    shape = checkpoint.full(config)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{name: shape[field] for field, name in FIELDS.items()},
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "bos_token_id": spm.bos,
        "eos_token_id": spm.eos,
        "dtype": "float32",
    }


def must_be_llama(model: Transformer, weights: dict[str, Tensor], description: dict) -> None:
    """UserError if a LLaMA of transformers computes other logits: the architecture in model.py was changed."""
    transformers = extra("transformers")
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**description)).eval()
    refusal = "to-hf exports LLaMAs only, and the architecture in model.py was changed"
    if missing := sorted(llama.state_dict().keys() - weights.keys()):
        raise UserError(f"the model has no {missing[0]}; {refusal}")
    llama.load_state_dict(weights, strict=False)
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (1, model.config.context_length), generator=draw)
    with torch.inference_mode():
        expected = llama(tokens).logits
        difference = float((model(tokens) - expected).abs().max() / expected.abs().max())
    if not difference <= 1e-4:
        raise UserError(f"a plain LLaMA with these weights gives other logits (by {difference:.1e}); {refusal}")


# ----------------------------------------------------------------------------------------------------- their tokenizer


def tokenizer_files(spm: Tokenizer, taught: str | None) -> dict[str, dict]:
    """The JSON files of a tokenizer by name. taught: the template in which the model learnt to answer."""
    template, stop = taught, [spm.eos]
    if taught is None and set(TEMPLATES["chatml"].needs) <= spm.control.keys():
        template = "chatml"  # so that a model that was only pretrained can be fine-tuned elsewhere
    if template:
        stop = list(ends(template, spm))
    marks = {"bos_token": spm.pieces.id_to_piece(spm.bos), "eos_token": spm.pieces.id_to_piece(spm.eos)}
    fast = fast_tokenizer(spm, taught)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **marks}
    settings["add_prefix_space"] = fast["normalizer"] is not None  # llama.cpp adds a space unless this says no
    if template:
        settings["chat_template"] = TEMPLATES[template].jinja
    return {
        "generation_config.json": {"bos_token_id": spm.bos, "eos_token_id": stop if len(stop) > 1 else spm.eos},
        "tokenizer.json": fast,
        "tokenizer_config.json": settings,
        "special_tokens_map.json": marks,
    }


def fast_tokenizer(spm: Tokenizer, template: str | None = None) -> dict:
    """tokenizer.json, which gives the ids of SentencePiece. UserError for a model that it cannot reproduce.

    template: cut a text where an answer in it begins. A control piece in a text is parsed. Pieces are written with the
    space itself, so that U+2581 in a text stays what it is: bytes.
    """
    model = extra("sentencepiece.sentencepiece_model_pb2").ModelProto.FromString(spm.model)
    must_be_exact(model)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    scores, added, vocabulary = {}, [], []
    for i, piece in enumerate(model.pieces):
        text = piece.piece
        if piece.type == piece.NORMAL:
            text = text.replace("▁", " ")
            scores[text] = piece.score
        elif piece.type == piece.CONTROL:
            added.append({"id": i, "content": text} | plain)
        vocabulary.append((text, piece.score))
    places = [TEMPLATES[template].cut] if template else []
    body = {"type": "BPE", "unk_token": vocabulary[spm.pieces.unk_id()][0], "fuse_unk": True, "byte_fallback": True}
    if model.trainer_spec.model_type == model.trainer_spec.BPE:
        body |= {"vocab": {text: i for i, (text, _) in enumerate(vocabulary)}, "merges": merges(scores)}
    else:
        body = {"type": "Unigram", "unk_id": spm.pieces.unk_id(), "byte_fallback": True, "vocab": vocabulary}
        places.append(never_whole(scores, [text for text, _ in vocabulary if text not in scores]))
    cuts = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in places]
    prefix = model.normalizer_spec.add_dummy_prefix  # a space before every text
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Prepend", "prepend": " "} if prefix else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts} if cuts else None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": body,
    }


def must_be_exact(model) -> None:
    """UserError, naming the reasons, if tokenizer.json cannot give the ids of a SentencePiece ModelProto."""
    trainer, normalizer, kinds = model.trainer_spec, model.normalizer_spec, model.SentencePiece
    types = [piece.type for piece in model.pieces]
    problems = {
        "an algorithm that is neither unigram nor BPE": trainer.model_type not in (trainer.UNIGRAM, trainer.BPE),
        "text normalisation": normalizer.precompiled_charsmap != b"",
        "white space that is not kept": normalizer.remove_extra_whitespaces or trainer.treat_whitespace_as_suffix,
        "no byte pieces": types.count(kinds.BYTE) != 256,
        "user-defined or unused pieces": kinds.USER_DEFINED in types or kinds.UNUSED in types,
    }
    if reasons := [reason for reason, applies in problems.items() if applies]:
        raise UserError(f"the tokenizer has {', '.join(reasons)}, which tokenizer.json cannot reproduce exactly")


def merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """The merges of a BPE vocabulary, {piece: score}: every pair of pieces that makes a piece, best score first."""
    pairs = []
    for piece in sorted(scores, key=scores.get, reverse=True):
        for i in range(1, len(piece)):
            if piece[:i] in scores and piece[i:] in scores:
                pairs.append((piece[:i], piece[i:]))
    return pairs


def never_whole(normal: dict[str, float], others: list[str]) -> str:
    """A regular expression that cuts "<0x41>", "</s>" and the like in a text where no normal piece crosses the cut.

    SentencePiece reads them as characters, but Unigram in tokenizers would find the byte or control piece.
    """
    pairs = {piece[i : i + 2] for piece in normal for i in range(len(piece) - 1)}
    places: dict[str, list[str]] = {}
    for piece in others:
        free = [i for i in range(1, len(piece)) if piece[i - 1 : i + 1] not in pairs]
        if not free:
            raise UserError(f"pieces of the tokenizer cross every place in {piece}; tokenizer.json cannot cut it")
        places.setdefault(piece[: free[0]], []).append(re.escape(piece[free[0] :]))
    return "|".join(f"(?<={re.escape(before)})(?={'|'.join(after)})" for before, after in places.items())


# ------------------------------------------------------------------------------------------------------------- from-hf


def from_hf(arguments: argparse.Namespace) -> None:
    """Writes a LLaMA in the Hugging Face layout as a checkpoint, with its tokenizer and a config to use it by."""
    source, out = Path(arguments.source), Path(arguments.out)
    config = read_config(source)
    spm = read_tokenizer(source / "tokenizer.model", config)
    template = read_template(source, spm) if spm else None
    must_be_free(out, arguments.force, source)
    weights = fitted(read_tensors(source), config)
    # The name stands in paths and manifests, as an experiment's does.
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", out.resolve().name).lstrip(".-") or "imported"
    about = {
        "config": {"model": stage.describe(config), "template": template},
        "read": {f"{name}/tokenizer/spm.model": spm.sha256} if spm else {},
        "counts": {"step": 0},
        "versions": stage.versions(),
    }
    with checkpoint.replacing(out) as temporary:
        if spm:
            write_tokenizer(temporary / "tokenizer", spm, name)
            (temporary / "config.py").write_text(config_file(name, config, template), encoding="utf-8")
        checkpoint.write(temporary, {"weights.pt": weights}, about)
    log.info(f"converted: {sum(w.numel() for w in set(weights.values())):,} parameters -> {out}")
    if spm:
        log.info(f"try: python serve.py {out}/config.py " + ("chat" if template else 'generate "The"'))
    else:
        log.warning(f"{source} has no tokenizer.model: only checkpoint.load_model opens {out}, not serve.py or eval")


def read_json(path: Path) -> dict:
    """A JSON object. UserError, naming the file, if it is missing or damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no {path}; expected the directory of a model in the Hugging Face layout") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}; get it again") from None


def read_config(source: Path) -> ModelConfig:
    """The shape that config.json describes. UserError, naming every field that is missing or not supported."""
    path = source / "config.json"
    given = read_json(path)
    architecture = (given.get("architectures") or ["unknown"])[0]
    refusal = f"{path} describes a model that is not supported"
    if architecture not in ARCHITECTURES:
        raise UserError(f"{refusal}: {architecture}; supported are {' and '.join(ARCHITECTURES)}")
    for name in ("rope_parameters", "rope_scaling"):  # of transformers 5 and 4
        if rope := given.get(name):
            given |= rope | {"rope_type": rope.get("rope_type", rope.get("type"))}
    given = ARCHITECTURES[architecture] | given

    problems = [f"{name} is missing" for name in FIELDS.values() if name not in given]
    for name, supported in SUPPORTED.items():
        if given.get(name) not in (None, supported):
            problems.append(f"{name} is {given[name]!r}, supported is {supported!r}")
    if problems:
        raise UserError(f"{refusal}: {'; '.join(problems)}")
    try:
        config = ModelConfig(**{field: given[name] for field, name in FIELDS.items()})
    except (TypeError, ValueError) as error:
        raise UserError(f"{refusal}: {error}") from None
    if given.get("head_dim") not in (None, config.head_dim):
        raise UserError(f"{refusal}: head_dim is {given['head_dim']}, supported is hidden_size / heads")
    return config


def read_tensors(source: Path) -> dict[str, Tensor]:
    """Every tensor of the model's files, on the CPU. UserError, naming the file, if one is missing or damaged."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = source / f"{name}.index.json"
        if (source / name).is_file():
            return read_file(source / name)
        if index.is_file():
            tensors = {}
            for shard in sorted(set(read_json(index)["weight_map"].values())):
                tensors |= read_file(source / shard)
            return tensors
    raise UserError(f"{source} holds no weights; expected model.safetensors or pytorch_model.bin, or their index")


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one .safetensors or .bin file. No code in it is run."""
    if not path.is_file():
        raise UserError(f"{path} is missing, but the index beside it names it; get it again")
    if path.suffix != ".safetensors":
        return checkpoint.load_file(path)
    try:
        return extra("safetensors.torch").load_file(path)
    except extra("safetensors").SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); get it again") from None


def fitted(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The weights in float32 by our names. UserError, naming all tensors that are missing, unexpected or misshapen."""
    with torch.device("meta"):
        expected = {name: list(p.shape) for name, p in Transformer(config).state_dict().items()}
    tensors = {name: t for name, t in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    weights, problems = {}, []
    embedding = tensors.get("model.embed_tokens.weight")
    if config.tie_embeddings and embedding is not None:
        head = tensors.setdefault("lm_head.weight", embedding)
        if not torch.equal(head, embedding):
            problems.append("lm_head.weight differs from model.embed_tokens.weight, which config.json ties it to")
    for name, shape in expected.items():
        tensor = tensors.pop(theirs(name), None)
        if tensor is None:
            problems.append(f"{theirs(name)} is missing")
        elif list(tensor.shape) != shape or not tensor.is_floating_point():
            problems.append(f"{theirs(name)} is {tensor.dtype} {list(tensor.shape)}, expected floats {shape}")
        elif not tensor.isfinite().all():
            problems.append(f"{theirs(name)} has numbers that are not finite")
        else:
            # A copy: a view into a larger tensor would be saved with all of it.
            weights[name] = tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    problems += [f"{name} is unexpected" for name in tensors]
    if problems:
        raise UserError(f"the weights do not fit config.json: {'; '.join(problems[:8])}; {len(problems)} problems")
    if config.tie_embeddings:
        weights["head.weight"] = weights["embed.weight"]
    return weights


def read_tokenizer(path: Path, config: ModelConfig) -> Tokenizer | None:
    """The tokenizer of a tokenizer.model; None without the file. UserError if it does not fit the embedding."""
    if not path.is_file():
        return None
    try:
        spm = Tokenizer(path.read_bytes(), stage.sha256(path))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if spm.vocab_size > config.vocab_size:
        raise UserError(f"{path} has {spm.vocab_size:,} pieces, but the embedding only {config.vocab_size:,} rows")
    return spm


def read_template(source: Path, spm: Tokenizer) -> str | None:
    """The template of ours in which the model learnt to answer, if it did."""
    settings, separate = source / "tokenizer_config.json", source / "chat_template.jinja"
    fast = source / "tokenizer.json"
    jinja = read_json(settings).get("chat_template") if settings.is_file() else None
    if separate.is_file():  # where transformers 5 saves it
        jinja = separate.read_text(encoding="utf-8")
    # to-hf gives chatml to a model that was only pretrained too, but then tokenizer.json does not cut before answers.
    for name, form in TEMPLATES.items():
        cuts = not fast.is_file() or json.dumps(form.cut) in fast.read_text(encoding="utf-8")
        if jinja == form.jinja and cuts and set(form.needs) <= spm.control.keys():
            return name
    return None


def write_tokenizer(directory: Path, spm: Tokenizer, name: str) -> None:
    """A finished tokenizer directory, as the stage `tokenizer` leaves it."""
    directory.mkdir()
    tokenizer.train.write(directory, spm.model)
    card = f"# Tokenizer of {name}\n\nSentencePiece, {spm.vocab_size:,} pieces, SHA-256 `{spm.sha256}`.\n\n"
    card += "It came with a model in the Hugging Face layout, which does not say what it was trained on.\n"
    (directory / "TOKENIZER_CARD.md").write_text(card, encoding="utf-8")
    manifest = {"config": {}, "read": {}, "wrote": stage.digests(directory, directory.iterdir())}
    manifest |= {"counts": {"vocab_size": spm.vocab_size}, "versions": stage.versions()}
    stage.write_manifest(directory, manifest)


def config_file(name: str, config: ModelConfig, template: str | None) -> str:
    """config.py: an experiment that continues from the converted model."""
    shape = ""
    for field in dataclasses.fields(config):
        if (value := getattr(config, field.name)) != field.default:
            shape += f"        {field.name}={value!r},\n"
    return f'''"""{name}: converted from the Hugging Face layout. Its weights and its tokenizer are beside this file."""

from pathlib import Path

from configs import Experiment
from data.corpus import CorpusConfig
from data.pack import PackConfig
from data.sources import PythonDocs
from model import ModelConfig
from sft.data import ConversationConfig
from sft.train import SFTConfig
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
    sft=SFTConfig(data=ConversationConfig(template="{template or "chatml"}")),
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
