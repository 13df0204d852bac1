"""To and from the Hugging Face LLaMA layout.

    python convert.py to-hf configs/tiny.py OUT    # what transformers opens: AutoModelForCausalLM, AutoTokenizer
    python convert.py from-hf DIR OUT              # a LLaMA in that layout becomes a checkpoint of ours

Both keep every bit of weights and tokenizer, and compare both models' logits. Needs: pip install transformers protobuf
"""

import argparse
import dataclasses
import importlib
import json
import os
import re
from pathlib import Path

import torch

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
SUPPORTED = {  # field of config.json that changes what a model computes: the only value that `Transformer` computes
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "rope_type": "default",
    "partial_rotary_factor": 1,
    "quantization_config": None,
}
NEVER = -1e4  # score of pieces that Unigram must not find in a text, such as "</s>": it is to read characters there
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
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # UserErrors say enough
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"convert.py lacks a package ({error}): pip install transformers protobuf") from None


def must_be_free(out: Path, force: bool, source: Path) -> None:
    """UserError if writing to `out` would lose anything. force: an earlier conversion may be lost."""
    if source.resolve().is_relative_to(out.resolve()):
        raise UserError(f"{out} is or holds {source}, which is in use; name another directory to write")
    checkpoint.recover(out.parent, out.name)
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if strange := names - WRITTEN:
        raise UserError(f"{out} holds {min(strange)}, which no conversion wrote; name another directory")
    if names and not force:
        raise UserError(f"{out} is not empty; name another directory, or replace it: --force")


def to_hf(arguments: argparse.Namespace) -> None:
    """Writes a trained model and its tokenizer as transformers reads them."""
    experiment, out = configs.load(arguments.config), arguments.out
    directory = arguments.checkpoint or experiment.latest()
    spm = experiment.load_tokenizer(directory)
    checkpoint.must_match(directory, spm.sha256)
    must_be_free(out, arguments.force, directory)
    model = checkpoint.load_model(directory)
    weights = {theirs(name): weight.contiguous() for name, weight in model.state_dict().items()}
    description, library = llama_config(model.config, spm), extra("transformers")
    llama = library.LlamaForCausalLM(library.LlamaConfig(**description))
    llama.load_state_dict(weights, strict=False)
    must_be_llama(model, llama)
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


def must_be_llama(model: Transformer, llama: torch.nn.Module) -> None:
    """UserError if a LLaMA of transformers computes other logits with the same weights. Tried on random tokens."""
    c = model.config
    tokens = torch.randint(c.vocab_size, (1, c.context_length), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = llama.eval()(tokens).logits
        difference = float((model.eval()(tokens) - expected).abs().max() / expected.abs().max())
    if not difference <= 1e-4:  # NaN, if a weight is not finite
        hint = "was model.py changed, or is a weight not finite?"
        raise UserError(f"a plain LLaMA with these weights gives other logits (by {difference:.1e}); {hint}")


def tokenizer_files(spm: Tokenizer, taught: str | None) -> dict[str, dict]:
    """The JSON files of a tokenizer by name. taught: the template in which the model learnt to answer."""
    fast, template, stop = fast_tokenizer(spm, taught), taught, [spm.eos]
    marks = {"bos_token": spm.pieces.id_to_piece(spm.bos), "eos_token": spm.pieces.id_to_piece(spm.eos)}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **marks}
    settings["add_prefix_space"] = fast["normalizer"] is not None  # llama.cpp adds a space unless this says no
    if taught is None and set(TEMPLATES["chatml"].needs) <= spm.control.keys():
        template = "chatml"  # so that a model that was only pretrained can be fine-tuned elsewhere
    if template:
        stop = list(ends(template, spm))
        settings["chat_template"] = TEMPLATES[template].jinja
    return {
        "generation_config.json": {"bos_token_id": spm.bos, "eos_token_id": stop if len(stop) > 1 else spm.eos},
        "tokenizer.json": fast,
        "tokenizer_config.json": settings,
        "special_tokens_map.json": marks,
    }


def fast_tokenizer(spm: Tokenizer, template: str | None = None) -> dict:
    """tokenizer.json, which gives the ids of SentencePiece. template: cut a text where an answer in it begins."""
    model = extra("sentencepiece.sentencepiece_model_pb2").ModelProto.FromString(spm.model)
    must_be_exact(model)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    scores, added, vocabulary = {}, [], []
    for i, piece in enumerate(model.pieces):
        text, score = piece.piece, NEVER
        if piece.type == piece.NORMAL:
            text, score = text.replace("▁", " "), piece.score  # so that U+2581 in a text stays what it is: bytes
            scores[text] = score
        elif piece.type == piece.CONTROL:
            added.append({"id": i, "content": text} | plain)
        vocabulary.append((text, score))
    unknown = spm.pieces.unk_id()
    if model.trainer_spec.model_type == model.trainer_spec.BPE:
        body = {"type": "BPE", "unk_token": vocabulary[unknown][0], "fuse_unk": True, "byte_fallback": True}
        body |= {"vocab": {text: i for i, (text, _) in enumerate(vocabulary)}, "merges": merges(scores)}
    else:
        body = {"type": "Unigram", "unk_id": unknown, "byte_fallback": True, "vocab": vocabulary}
    cuts = None
    if template:
        cut = {"type": "Split", "pattern": {"Regex": TEMPLATES[template].cut}, "behavior": "Isolated", "invert": False}
        cuts = {"type": "Sequence", "pretokenizers": [cut]}
    prefix = model.normalizer_spec.add_dummy_prefix  # a space before every text
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Prepend", "prepend": " "} if prefix else None,
        "pre_tokenizer": cuts,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": body,
    }


def must_be_exact(model) -> None:
    """UserError if tokenizer.json cannot give the ids of a SentencePiece ModelProto."""
    trainer, normalizer, kinds = model.trainer_spec, model.normalizer_spec, model.SentencePiece
    types = [piece.type for piece in model.pieces]
    changes_text = normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces
    known = trainer.model_type in (trainer.UNIGRAM, trainer.BPE) and types.count(kinds.BYTE) == 256
    if changes_text or trainer.treat_whitespace_as_suffix or not known or kinds.USER_DEFINED in types:
        problem = "tokenizer.json cannot reproduce this tokenizer exactly; expected unigram or BPE with 256 byte pieces"
        raise UserError(f"{problem}, no text normalisation, white space kept, and no user-defined pieces")


def merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """The merges of a BPE vocabulary, {piece: score}: every pair of pieces that makes a piece, best score first."""
    pairs = []
    for piece in sorted(scores, key=scores.get, reverse=True):
        for i in range(1, len(piece)):
            if piece[:i] in scores and piece[i:] in scores:
                pairs.append((piece[:i], piece[i:]))
    return pairs


def from_hf(arguments: argparse.Namespace) -> None:
    """Writes a LLaMA in the Hugging Face layout as a checkpoint, with its tokenizer and a config to use it by."""
    source, out = arguments.source, arguments.out
    must_be_free(out, arguments.force, source)
    model = read_model(source)
    config, pieces, spm, template = model.config, source / "tokenizer.model", None, None
    if pieces.is_file():
        spm = Tokenizer(pieces.read_bytes(), stage.sha256(pieces))
        template = read_template(source, spm)
        if spm.vocab_size > config.vocab_size:
            raise UserError(f"{pieces} has {spm.vocab_size} pieces, but the embedding only {config.vocab_size} rows")
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", out.resolve().name).lstrip(".-") or "imported"  # in paths and manifests
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
        checkpoint.write(temporary, {"weights.pt": model.state_dict()}, about)
    log.info(f"converted: {model.num_parameters():,} parameters -> {out}")
    if spm:
        log.info(f"try: python serve.py {out}/config.py " + ("chat" if template else 'generate "The"'))
    else:
        log.warning(f"{source} has no tokenizer.model: only checkpoint.load_model opens {out}, not serve.py or eval")


def read_model(source: Path) -> Transformer:
    """The LLaMA in a directory. UserError, naming all of it, for what is missing, damaged or not supported."""
    if not (source / "config.json").is_file():
        raise UserError(f"no {source / 'config.json'}; expected the directory of a model in the Hugging Face layout")
    library = extra("transformers")
    try:
        described = library.AutoConfig.from_pretrained(source)
        shape = read_config(described.to_dict())
        options = {"dtype": torch.float32, "ignore_mismatched_sizes": True, "output_loading_info": True}
        llama, report = library.AutoModelForCausalLM.from_pretrained(source, config=described, **options)
    except UserError:
        raise
    except Exception as error:  # each file format has its own errors
        raise UserError(f"{source} cannot be read ({type(error).__name__}: {error}); get it again") from None
    wrong = []
    for problem, keys in report.items():  # such as missing_keys
        wrong += [f"{problem} {key}" for key in sorted(keys)]
    if wrong:
        raise UserError(f"the weights do not fit config.json, {len(wrong)} tensors: {', '.join(wrong[:8])}")
    model, weights = Transformer(shape), llama.state_dict()
    model.load_state_dict({name: weights[theirs(name)] for name in model.state_dict()})
    must_be_llama(model, llama)
    return model


def read_config(given: dict) -> ModelConfig:
    """The shape of the model in a config.json. UserError, naming every field that is not supported."""
    for name in ("rope_parameters", "rope_scaling"):  # of transformers 5 and 4
        given = given | (given.get(name) or {})
    supported = SUPPORTED | {"head_dim": given.get("hidden_size", 0) // given.get("num_attention_heads", 1)}
    problems = []
    if given["architectures"] not in (["LlamaForCausalLM"], ["MistralForCausalLM"]):
        problems.append(f"{given['architectures']}, supported are LlamaForCausalLM and MistralForCausalLM")
    for name, value in supported.items():
        if given.get(name) not in (None, value):
            problems.append(f"{name} is {given[name]!r}, supported is {value!r}")
    try:
        shape = ModelConfig(**{field: given[name] for field, name in FIELDS.items()})
    except (KeyError, TypeError, ValueError) as error:
        problems.append(str(error))
    if problems:
        raise UserError(f"config.json describes a model that is not supported: {'; '.join(problems)}")
    return shape


def read_template(source: Path, spm: Tokenizer) -> str | None:
    """The template of ours in which the model learnt to answer, if it did."""
    jinja = (stage.read_json(source / "tokenizer_config.json") or {}).get("chat_template")
    if (source / "chat_template.jinja").is_file():  # as transformers 5 saves it
        jinja = (source / "chat_template.jinja").read_text(encoding="utf-8")
    fast = stage.read_json(source / "tokenizer.json")
    # to-hf gives chatml to a model that was only pretrained too, but then tokenizer.json does not cut before answers.
    for name, form in TEMPLATES.items():
        taught = fast is None or json.dumps(form.cut) in json.dumps(fast["pre_tokenizer"])
        if jinja == form.jinja and taught and set(form.needs) <= spm.control.keys():
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
from data.sources import Files, PythonDocs
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
    corpus=CorpusConfig(sources=(PythonDocs(),)),  # your own text: Files(paths=("FILE.txt",)), in data/raw/
    pack=PackConfig(),
    pretrain=TrainConfig(steps=1_000, batch_size=8, learning_rate=1e-4),
    sft=SFTConfig(data=ConversationConfig(template="{template or "chatml"}")),
)
'''


def arguments() -> argparse.ArgumentParser:
    p = cli.parser(__doc__, config=False)
    commands = p.add_subparsers(required=True, metavar="COMMAND")
    to = commands.add_parser("to-hf", description=to_hf.__doc__, help=to_hf.__doc__)
    to.add_argument("config", metavar="CONFIG", help="the experiment, such as configs/tiny.py")
    to.add_argument("--checkpoint", type=Path, metavar="DIR", help="a trained model, instead of the latest")
    back = commands.add_parser("from-hf", description=from_hf.__doc__, help=from_hf.__doc__)
    back.add_argument("source", type=Path, metavar="DIR", help="config.json, weights, tokenizer.model if there is one")
    for parser, command in (to, to_hf), (back, from_hf):
        parser.set_defaults(command=command)
        parser.add_argument("out", type=Path, metavar="OUT", help="the directory to write")
        parser.add_argument("--force", action="store_true", help="replace a model that is in OUT")
    return p


if __name__ == "__main__":
    parsed = arguments().parse_args()
    cli.run(parsed.command, parsed)
