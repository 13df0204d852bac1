"""To and from the Hugging Face LLaMA layout, and to GGUF.

    python convert.py to-hf configs/tiny.py OUT    # for transformers: AutoModelForCausalLM, AutoTokenizer
    python convert.py from-hf DIR OUT              # reads a LLaMA in that layout; DIR may be owner/name on the Hub
    python convert.py to-gguf configs/tiny.py OUT.gguf    # for llama.cpp and Ollama. Needs: pip install gguf

The first two keep every bit of weights and tokenizer and compare logits; they need transformers and protobuf.
Next: python serve.py OUT/config.py generate "The", or llama-cli -m OUT.gguf
"""

import argparse
import dataclasses
import json
import os
import re
from pathlib import Path

import torch

import checkpoint
import cli
import configs
import convert_gguf
import stage
import tokenizer.train
from cli import UserError, log
from model import ModelConfig, RopeScaling, Transformer
from sft.templates import IMPORTED, TEMPLATES, ends
from tokenizer import Tokenizer
from tokenizer.huggingface import HuggingFace

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
    "partial_rotary_factor": 1,
    "quantization_config": None,
}
SCALING = {  # field of RopeScaling: its name in config.json
    "factor": "factor",
    "original_context": "original_max_position_embeddings",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
}
NEVER = -1e4  # score of pieces that Unigram must not use for a text: it must encode a typed "</s>" by its characters
# --force replaces only a directory that holds nothing but these.
WRITTEN = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
WRITTEN |= {"special_tokens_map.json", "tokenizer.model", "weights.pt", "manifest.json", "config.py", "tokenizer"}


def theirs(name: str) -> str:
    """A parameter's name in the Hugging Face layout, such as model.norm.weight, from its name in `Transformer`."""
    for ours, other in TENSORS.items():
        name = re.sub(ours, other, name)
    return name


def extra(module: str, packages: str = "transformers protobuf"):
    """Imports a module of an optional package. UserError, with the command that installs it, if it is missing."""
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # UserErrors say enough
    return cli.extra(module, packages, "convert.py")


def must_be_free(out: Path, force: bool, source: Path) -> None:
    """UserError if writing to `out` would lose anything. force: an earlier conversion may be replaced."""
    if source.resolve().is_relative_to(out.resolve()):
        raise UserError(f"{out} is or holds {source}, which is in use; name another directory to write")
    checkpoint.recover(out.parent, out.name)
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if strange := names - WRITTEN:
        raise UserError(f"{out} holds {min(strange)}, which no conversion wrote; name another directory")
    if names and not force:
        raise UserError(f"{out} is not empty; name another directory, or replace it: --force")


def to_hf(arguments: argparse.Namespace) -> None:
    """Writes a trained model and its tokenizer in the Hugging Face layout, which transformers reads."""
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
    describe = tokenizer_files if isinstance(spm, Tokenizer) else imported_files
    files = {"config.json": description} | describe(spm, checkpoint.template(directory))
    files["tokenizer_config.json"]["model_max_length"] = model.config.context_length
    with checkpoint.replacing(out) as temporary:
        content = extra("safetensors.torch").save(weights, {"format": "pt"})
        (temporary / "model.safetensors").write_bytes(content)
        if isinstance(spm, Tokenizer):
            (temporary / "tokenizer.model").write_bytes(spm.model)
        else:
            (temporary / "tokenizer.json").write_bytes(spm.content)
        for name, value in files.items():
            stage.write_json(temporary / name, value)
    log.info(f"converted: {model.num_parameters():,} parameters, {spm.vocab_size:,} pieces -> {out}")


def to_gguf(arguments: argparse.Namespace) -> None:
    """Writes a trained model and its tokenizer as one file for llama.cpp, and prints a Modelfile for Ollama."""
    experiment, out = configs.load(arguments.config), arguments.out
    directory = arguments.checkpoint or experiment.latest()
    spm, template = experiment.load_tokenizer(directory), checkpoint.template(directory)
    checkpoint.must_match(directory, spm.sha256)
    if out.exists() and (out.is_dir() or not arguments.force or out.read_bytes()[:4] != b"GGUF"):
        raise UserError(f"{out} exists; name another file, or replace a GGUF file: --force")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.partial")
    try:
        convert_gguf.write(temporary, checkpoint.load_model(directory), spm, template, arguments.type)
        stage.sync(temporary)
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    log.info(f"converted: {directory} -> {out}, {out.stat().st_size:,} bytes; a Modelfile for `ollama create`:")
    print(convert_gguf.modelfile(out, spm, template))


def llama_config(config: ModelConfig, spm: Tokenizer) -> dict:
    """config.json of a LlamaForCausalLM. transformers 4 reads `rope_theta`, 5 `rope_parameters`."""
    shape, scaling = checkpoint.full(config), config.rope_scaling
    rotary = {"rope_type": "default", "rope_theta": config.rope_theta}
    if scaling:
        rotary |= {name: getattr(scaling, field) for field, name in SCALING.items()}
        rotary["rope_type"] = "llama3" if scaling.original_context else "linear"
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{name: shape[field] for field, name in FIELDS.items()},
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rope_parameters": rotary,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "bos_token_id": spm.bos,
        "eos_token_id": spm.eos,
        "dtype": "float32",
    }


def must_be_llama(model: Transformer, llama: torch.nn.Module) -> None:
    """UserError if transformers' LLaMA computes other logits from random tokens with the same weights."""
    c = model.config
    tokens = torch.randint(c.vocab_size, (1, c.context_length), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = llama.eval()(tokens).logits
        difference = float((model.eval()(tokens) - expected).abs().max() / expected.abs().max())
    if not difference <= 1e-4:  # NaN, if a weight is not finite
        hint = "was model.py changed, or is a weight not finite?"
        raise UserError(f"a plain LLaMA with these weights gives other logits (by {difference:.1e}); {hint}")


def imported_files(spm: HuggingFace, taught: str | None) -> dict[str, dict]:
    """As `tokenizer_files`, but for an imported tokenizer.json, which is copied as it is."""
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    marks = {mark: spm.settings[mark] for mark in ("bos_token", "eos_token")}
    jinja = TEMPLATES[taught].jinja if taught in TEMPLATES else spm.settings["chat_template"]
    stop = list(ends(taught or IMPORTED, spm))
    return {
        "generation_config.json": {"bos_token_id": spm.bos, "eos_token_id": stop},
        "tokenizer_config.json": settings | marks | {"chat_template": jinja},
        "special_tokens_map.json": marks,
    }


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
    """tokenizer.json with the same ids as SentencePiece. template: cut a text where this template begins an answer."""
    model = convert_gguf.exact(spm)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    scores, added, vocabulary = {}, [], []
    for i, piece in enumerate(model.pieces):
        text, score = piece.piece, NEVER
        if piece.type == piece.NORMAL:
            text, score = text.replace("▁", " "), piece.score  # so that U+2581 in a text is encoded in bytes
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


def merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """The merges of a BPE vocabulary, {piece: score}: every pair of pieces that makes a piece, best score first."""
    pairs = []
    for piece in sorted(scores, key=scores.get, reverse=True):
        for i in range(1, len(piece)):
            if piece[:i] in scores and piece[i:] in scores:
                pairs.append((piece[:i], piece[i:]))
    return pairs


def from_hf(arguments: argparse.Namespace) -> None:
    """Turns a LLaMA in the Hugging Face layout into a checkpoint with its tokenizer and a config."""
    source, out = arguments.source, arguments.out
    must_be_free(out, arguments.force, source)
    if not source.is_dir():
        source = download(str(source), arguments.revision)
    model = read_model(source, arguments.context_length)
    config, (spm, template) = model.config, read_tokenizer(source)
    if spm.vocab_size > config.vocab_size:
        raise UserError(f"the tokenizer has {spm.vocab_size} pieces, but the embedding only {config.vocab_size} rows")
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", out.resolve().name).lstrip(".-") or "imported"  # in paths and manifests
    about = {
        "config": {"model": stage.describe(config), "template": template},
        "read": {f"{name}/tokenizer/{spm.file}": spm.sha256},
        "counts": {"step": 0},
        "versions": stage.versions(),
    }
    with checkpoint.replacing(out) as temporary:
        write_tokenizer(temporary / "tokenizer", spm, name)
        (temporary / "config.py").write_text(config_file(name, config, template), encoding="utf-8")
        checkpoint.write(temporary, {"weights.pt": model.state_dict()}, about)
    log.info(f"converted: {model.num_parameters():,} parameters -> {out}")
    log.info(f"try: python serve.py {out}/config.py " + ("chat" if template else 'generate "The"'))


def download(name: str, revision: str | None) -> Path:
    """The directory of a model from the Hugging Face Hub, such as "HuggingFaceTB/SmolLM2-135M-Instruct"."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"no directory {name}; expected one, or a model's name on the Hub, such as owner/name")
    hub = extra("huggingface_hub", "huggingface_hub")
    try:
        config = hub.hf_hub_download(name, "config.json", revision=revision)
        read_config(json.loads(Path(config).read_text()))  # refuses an unsupported model before its weights arrive
        files = ["*.json", "tokenizer.model", "*.safetensors", "*.jinja"]
        return Path(hub.snapshot_download(name, revision=Path(config).parent.name, allow_patterns=files))
    except UserError:
        raise
    except Exception as error:  # no network, no such model or revision, a model behind a licence
        raise UserError(f"cannot download {name}: {type(error).__name__}: {error}") from None


def read_model(source: Path, context_length: int | None) -> Transformer:
    """The LLaMA in a directory. UserError, naming the problems, if it is incomplete, damaged or not supported."""
    if not (source / "config.json").is_file():
        raise UserError(f"no {source / 'config.json'}; expected the directory of a model in the Hugging Face layout")
    library = extra("transformers")
    try:
        described = library.AutoConfig.from_pretrained(source)
        shape = read_config(described.to_dict())
        if context_length:
            if context_length > (most := shape.context_length):
                raise UserError(f"--context-length is {context_length}; the model's context is {most}")
            shape = dataclasses.replace(shape, context_length=context_length)
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
    kind, scaling = given.get("rope_type") or "default", None
    if kind not in ("default", "linear", "llama3"):
        problems.append(f"rope_type is {kind!r}, supported are 'default', 'linear' and 'llama3'")
    elif kind != "default":
        used = SCALING if kind == "llama3" else ("factor",)
        scaling = RopeScaling(**{field: given[SCALING[field]] for field in used})
    try:
        shape = ModelConfig(rope_scaling=scaling, **{field: given[name] for field, name in FIELDS.items()})
    except (KeyError, TypeError, ValueError) as error:
        problems.append(str(error))
    if problems:
        raise UserError(f"config.json describes a model that is not supported: {'; '.join(problems)}")
    return shape


def read_tokenizer(source: Path) -> tuple[Tokenizer | HuggingFace, str | None]:
    """The tokenizer in a directory, and the template in which the model learnt to answer; None if it learnt none."""
    files = {}
    for name in ("config", "generation_config", "special_tokens_map", "tokenizer_config"):
        files[name] = stage.read_json(source / f"{name}.json") or {}
    settings = files["special_tokens_map"] | files["tokenizer_config"]
    ends = files["generation_config"].get("eos_token_id", files["config"].get("eos_token_id"))
    jinja = settings.get("chat_template")
    if (source / "chat_template.jinja").is_file():  # as transformers 5 saves it
        jinja = (source / "chat_template.jinja").read_text(encoding="utf-8")
    if isinstance(jinja, list):  # several by name
        jinja = {form["name"]: form["template"] for form in jinja}.get("default")
    fast, pieces = source / "tokenizer.json", source / "tokenizer.model"
    cuts = json.dumps((stage.read_json(fast) or {"pre_tokenizer": None})["pre_tokenizer"])
    spm = None
    if pieces.is_file():
        try:
            spm = Tokenizer(pieces.read_bytes(), stage.sha256(pieces))
        except UserError:  # not SentencePiece, as Llama 3's
            if not fast.is_file():
                raise
    if spm:
        # to-hf also gives chatml to a model that was only pretrained; then tokenizer.json does not cut before answers.
        for name, form in TEMPLATES.items():
            taught = not fast.is_file() or json.dumps(form.cut) in cuts
            if jinja == form.jinja and set(form.needs) <= spm.control.keys():
                return spm, name if taught else None
    elif not fast.is_file():
        raise UserError(f"{source} has no tokenizer.model and no tokenizer.json; get one of them too")
    if not fast.is_file() or (spm and not jinja):
        return spm, None
    kept = {"chat_template": jinja}
    for mark in ("bos_token", "eos_token"):
        token = settings.get(mark)
        kept[mark] = token["content"] if isinstance(token, dict) else token
    kept["ends"] = ends if isinstance(ends, list) else [] if ends is None else [ends]
    spm = HuggingFace(fast.read_bytes(), stage.sha256(fast), kept)
    if spm.problem:
        log.warning(f"{spm.problem} for fine-tuning")
    return spm, IMPORTED if jinja else None


def write_tokenizer(directory: Path, spm: Tokenizer | HuggingFace, name: str) -> None:
    """A finished tokenizer directory, as the stage `tokenizer` leaves it."""
    directory.mkdir()
    if isinstance(spm, Tokenizer):
        tokenizer.train.write(directory, spm.model)
    else:
        (directory / spm.file).write_bytes(spm.content)
        stage.write_json(directory / "tokenizer_config.json", spm.settings)
    card = f"# Tokenizer of {name}\n\n{spm.file}, {spm.vocab_size:,} pieces, SHA-256 `{spm.sha256}`.\n\n"
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
from model import ModelConfig, RopeScaling
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
    sft=SFTConfig(
        data=ConversationConfig(template="{template or "chatml"}"),
        train=TrainConfig(epochs=1, batch_size=8, learning_rate=2e-4),
    ),
)
'''


def arguments() -> argparse.ArgumentParser:
    p = cli.parser(__doc__, config=False)
    commands = p.add_subparsers(required=True, metavar="COMMAND")
    for name, command in (("to-hf", to_hf), ("from-hf", from_hf), ("to-gguf", to_gguf)):
        c = commands.add_parser(name, description=command.__doc__, help=command.__doc__, epilog=__doc__)
        c.set_defaults(command=command)
        if command is from_hf:
            c.add_argument("source", type=Path, metavar="DIR", help="a directory, or owner/name on the Hub")
            c.add_argument("--revision", help="of a model on the Hub: a branch, tag or commit")
            c.add_argument("--context-length", type=cli.positive, metavar="N", help="use a shorter context")
        else:
            c.add_argument("config", metavar="CONFIG", help="the experiment, such as configs/tiny.py")
            c.add_argument("--checkpoint", type=Path, metavar="DIR", help="a trained model, instead of the latest")
        if command is to_gguf:
            c.add_argument("--type", choices=("f32", "f16", "q8_0"), default="f32", help="type of the matrices (f32)")
        c.add_argument("out", type=Path, metavar="OUT", help="the directory, or GGUF file, to write")
        c.add_argument("--force", action="store_true", help="replace an earlier conversion")
    return p


if __name__ == "__main__":
    parsed = arguments().parse_args()
    cli.run(parsed.command, parsed)
