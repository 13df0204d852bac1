"""To and from the Hugging Face layout: against transformers, SentencePiece and llama.cpp, and there and back."""

import dataclasses
import io
import itertools
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import safetensors.torch
import sentencepiece
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoint
import configs
import convert
import generate
import stage
import tokenizer
from cli import UserError
from data.sources import PythonDocs
from model import ModelConfig, Transformer
from serving import served
from sft.conversations import Message
from sft.templates import TEMPLATES, render
from tests.conftest import Place, build
from tokenizer.train import TokenizerConfig, train

SHAPE = {"vocab_size": 512, "context_length": 64, "n_layers": 2, "d_model": 32, "n_heads": 4}
SHAPES = {
    "grouped and tied": ModelConfig(**SHAPE, n_kv_heads=2, d_ff=80, tie_embeddings=True, rope_theta=500.0),
    "untied": ModelConfig(**SHAPE, rms_norm_eps=1e-3),
}
KEPT = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
OTHERS = {
    "LLaMA's": {**KEPT, "model_type": "bpe"},
    "unigram": KEPT,
    "identity": {"normalization_rule_name": "identity"},
    "SentencePiece's defaults": {},
}
PARTS = [*" \n\t▁a1é=-<|>", "  ", "    ", "<0x41>", "<0xE2>", "<|im_start|>", "<|im_end|>", "</s>", "<unk>"]
TEXTS = st.text(st.characters(codec="utf-8")) | st.lists(st.sampled_from(PARTS)).map("".join)
TOKENS = torch.randint(512, (2, 64), generator=torch.Generator().manual_seed(0))


def command(*words) -> None:
    """Runs convert.py's command in this process."""
    parsed = convert.arguments().parse_args([str(word) for word in words])
    parsed.command(parsed)


def llama(**changes) -> transformers.LlamaForCausalLM:
    """A small LLaMA that transformers initialises."""
    torch.manual_seed(0)
    shape = {"vocab_size": 1024, "hidden_size": 32, "intermediate_size": 80, "max_position_embeddings": 64}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    shape["rope_parameters"] = {"rope_type": "default", "rope_theta": 500.0}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape | changes))


def spm_model(texts: list[str], **options) -> bytes:
    """A SentencePiece model with the library's own defaults."""
    written = io.BytesIO()
    options = {"byte_fallback": True, "minloglevel": 2} | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=written, **options)
    return written.getvalue()


def save(directory: Path, config: ModelConfig, spm_sha256: str, template: str | None = None) -> Path:
    """A checkpoint with random weights that are far from their initial sizes."""
    torch.manual_seed(1)
    model = Transformer(config)
    for p in model.parameters():
        p.data.mul_(10) if p.dim() == 2 else p.data.uniform_(0.5, 1.5)
    settings = {"model": stage.describe(config), "template": template}
    about = {"config": settings, "read": {"mini/tokenizer/spm.model": spm_sha256}, "counts": {"step": 1}}
    checkpoint.save(directory, {"weights.pt": model.state_dict(), "state.pt": {}}, about)
    return directory


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


@pytest.fixture(scope="module")
def documents() -> list[str]:
    """400 docstrings of the standard library."""
    return [document.value for document in itertools.islice(PythonDocs(packages=()).documents(1), 400)]


@pytest.fixture(scope="module")
def spms(made: Place, text) -> dict[str, tokenizer.Tokenizer]:
    """A tokenizer of ours by each algorithm, and one like LLaMA's, which puts a space before every text."""
    models = {"LLaMA's": spm_model(text, vocab_size=600, **OTHERS["LLaMA's"])}
    for algorithm in ("unigram", "bpe"):
        config = TokenizerConfig(vocab_size=500, algorithm=algorithm)
        models[algorithm] = train(made.runs / "mini/corpus", 1, config, 0.1)
    return {name: tokenizer.Tokenizer(model, "") for name, model in models.items()}


@pytest.fixture(scope="module")
def exported(made: Place, tmp_path_factory):
    """{name of the shape: (checkpoint, the directory that to-hf wrote)}"""
    sha256, pairs = stage.sha256(made.runs / "mini/tokenizer/spm.model"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNS", str(made.runs))
        for name, config in SHAPES.items():
            place = tmp_path_factory.mktemp("exported")
            command("to-hf", made.config, place / "hf", "--checkpoint", save(place / "step", config, sha256))
            pairs[name] = place / "step", place / "hf"
    return pairs


@pytest.fixture
def foreign(tmp_path: Path, text: list[str]) -> Path:
    """A LLaMA as transformers saves it, with a SentencePiece tokenizer like LLaMA's and a padded embedding."""
    llama().save_pretrained(tmp_path / "foreign")
    (tmp_path / "foreign/tokenizer.model").write_bytes(spm_model(text, vocab_size=600, **OTHERS["LLaMA's"]))
    return tmp_path / "foreign"


def edit(directory: Path, **changes) -> Path:
    """Changes fields of config.json; ... removes one."""
    given = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps({k: v for k, v in given.items() if v is not ...}))
    return directory


# --------------------------------------------------------------------------------------------------------- the weights


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_computes_the_same(exported, name):
    ours = checkpoint.load_model(exported[name][0])
    other = transformers.AutoModelForCausalLM.from_pretrained(exported[name][1])
    assert type(other) is transformers.LlamaForCausalLM
    assert other.dtype == torch.float32
    with torch.no_grad():
        assert relative(ours(TOKENS), other(TOKENS).logits) < 1e-5
        assert ours(TOKENS[:, :-1], TOKENS[:, 1:]).item() == pytest.approx(other(TOKENS, labels=TOKENS).loss.item())
    greedy = other.generate(TOKENS[:1, :8], max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert generate.generate(ours, TOKENS[0, :8].tolist(), 12, temperature=0) == greedy[0, 8:].tolist()


@pytest.mark.parametrize("name", SHAPES)
def test_there_and_back_is_bit_for_bit(exported, name, tmp_path):
    before, hf = exported[name]
    command("from-hf", hf, tmp_path / "back")
    ours, back = checkpoint.read(before, "weights.pt"), checkpoint.read(tmp_path / "back", "weights.pt")
    assert ours.keys() == back.keys()
    assert all(torch.equal(ours[name].view(torch.int32), back[name].view(torch.int32)) for name in ours)
    checkpoint.load_model(tmp_path / "back", shape=SHAPES[name])  # in which n_kv_heads and d_ff may be None
    for directory in (before, tmp_path / "back"):
        checkpoint.must_match(directory, tokenizer.load(tmp_path / "back/tokenizer").sha256)
    command("to-hf", tmp_path / "back/config.py", tmp_path / "hf")
    for file in sorted(path.name for path in hf.iterdir()):
        assert (hf / file).read_bytes() == (tmp_path / "hf" / file).read_bytes(), file
    tied = SHAPES[name].tie_embeddings
    assert ("lm_head.weight" in safetensors.torch.load_file(hf / "model.safetensors")) != tied


@pytest.mark.parametrize("how", ["sharded", "bin", "bfloat16", "tied", "old names"])
def test_llamas_of_transformers_come_over(foreign, tmp_path, how):
    other, options = llama(tie_word_embeddings=how == "tied"), {}
    if how == "sharded":
        options = {"max_shard_size": "20KB"}
    if how == "bfloat16":
        options = {"state_dict": {name: weight.bfloat16() for name, weight in other.state_dict().items()}}
        other.load_state_dict(options["state_dict"])
    (foreign / "model.safetensors").unlink()
    other.save_pretrained(foreign, **options)
    weights = {name: weight.clone() for name, weight in other.state_dict().items()}
    if how == "bin":
        (foreign / "model.safetensors").unlink()
        torch.save(weights, foreign / "pytorch_model.bin")
    if how == "old names":  # as transformers 4 wrote them, buffers included, and as Mistral calls itself
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        safetensors.torch.save_file(weights, foreign / "model.safetensors")
        mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
        edit(foreign, rope_parameters=..., rope_theta=500.0, rope_scaling=None, head_dim=..., **mistral)
    command("from-hf", foreign, tmp_path / "out")
    assert {weight.dtype for weight in checkpoint.read(tmp_path / "out", "weights.pt").values()} == {torch.float32}
    ours = checkpoint.load_model(tmp_path / "out")
    with torch.no_grad():
        assert relative(ours(TOKENS), other(TOKENS).logits) < 1e-5
    assert (tmp_path / "out/weights.pt").stat().st_size < 4 * ours.num_parameters() + 20_000
    assert ours.config.rope_theta == 500.0


# ------------------------------------------------------------------------------------------------------ our tokenizers


def fast(spm: tokenizer.Tokenizer) -> tokenizers.Tokenizer:
    """Our tokenizer.json as tokenizers reads it, control pieces read as text."""
    opened = tokenizers.Tokenizer.from_str(json.dumps(convert.fast_tokenizer(spm)))
    opened.encode_special_tokens = True
    return opened


def likelihood(spm: tokenizer.Tokenizer, ids: list[int]) -> float:
    """The number that Unigram maximises. SentencePiece adds it up in float32, tokenizers in float64: of two spellings
    that are as likely as each other they may choose differently."""
    return sum(map(spm.pieces.get_score, ids))


@pytest.mark.parametrize("name", ["unigram", "bpe", "LLaMA's"])
def test_any_text_gets_the_same_ids(spms, documents, name):
    spm, hf = spms[name], fast(spms[name])

    def check(text: str) -> None:
        theirs, ours = hf.encode(text).ids, spm.encode(text)
        assert theirs == ours or name == "unigram"
        assert likelihood(spm, theirs) == pytest.approx(likelihood(spm, ours))
        assert hf.decode(ours) == text

    settings(max_examples=100, deadline=None)(given(TEXTS)(check))()
    long = "\n\n".join(documents[:300])  # far longer than what we encode at once
    different = 0
    for text in [*documents, long]:
        check(text)
        different += hf.encode(text).ids != spm.encode(text)
    assert different <= 0.01 * len(documents)
    for text in ("", "  a", "\n\n", "a▁b▁", "<0x41>", "<0x0A><0xE2>", "<unk></s>", "<|im_start|>x<|reserved_5|>"):
        assert hf.encode(text).ids == spm.encode(text), text


def test_auto_tokenizer_opens_it(exported, text, made: Place):
    hf = transformers.AutoTokenizer.from_pretrained(exported["untied"][1])
    spm = tokenizer.load(made.runs / "mini/tokenizer")
    for part in ["", "  two\n words ▁ é", "a  ", *text]:
        for options in ({}, {"add_special_tokens": False}, {"add_special_tokens": True}):
            assert hf.encode(part, **options) == spm.encode(part)
        assert hf.decode(spm.encode(part)) == part
    assert (hf.bos_token_id, hf.eos_token_id, len(hf), hf.model_max_length) == (spm.eos, spm.eos, 512, 64)
    spelt = "<|im_start|>user\nhi<|im_end|>"
    parsed = [spm.control["<|im_start|>"], *spm.encode("user\nhi"), spm.control["<|im_end|>"]]
    assert hf.encode(spelt) == parsed
    assert hf(spelt, split_special_tokens=True)["input_ids"] == spm.encode(spelt)
    assert hf.decode(parsed, skip_special_tokens=True) == "user\nhi"


@pytest.mark.parametrize("name", ["bpe", "LLaMA's"])
def test_llama_cpp_is_told_whether_a_text_begins_with_a_space(spms, name):
    """Without a word about it, its convert_hf_to_gguf.py assumes a space before every text."""
    settings = convert.tokenizer_files(spms[name], None)["tokenizer_config.json"]
    ids = spms[name].encode("The")
    assert settings["add_prefix_space"] == spms[name].pieces.id_to_piece(ids[0]).startswith("▁")


REFUSED = [{}, KEPT | {"user_defined_symbols": ["<x>"]}, KEPT | {"model_type": "char"}, KEPT | {"byte_fallback": False}]


@pytest.mark.parametrize("options", REFUSED)
def test_a_tokenizer_that_cannot_be_reproduced_is_refused(text, options):
    size = {} if "model_type" in options else {"vocab_size": 600}
    with pytest.raises(UserError, match="cannot reproduce this tokenizer exactly"):
        convert.fast_tokenizer(tokenizer.Tokenizer(spm_model(text, **size, **options), ""))


# ---------------------------------------------------------------------------------------------------- other tokenizers


@pytest.mark.parametrize("name", OTHERS)
def test_other_tokenizers_encode_as_sentencepiece_does(text, documents, name, monkeypatch):
    model = spm_model([line for part in text for line in part.split("\n")], vocab_size=600, **OTHERS[name])
    spm, bare = tokenizer.Tokenizer(model, ""), sentencepiece.SentencePieceProcessor(model_proto=model)
    assert (spm.bos, spm.eos) == (1, 2)
    some = ["", " ", "  two  spaces ", "x", "\n a\n", "é 🙂", "<s>a</s>", *text, *documents[:100]]
    kept = name in ("LLaMA's", "unigram")
    for part in some:
        ids = spm.encode(part)
        assert ids == bare.encode(part)
        assert spm.decode(ids) == (part if kept else bare.decode(bare.encode(part)))
        assert spm.decode([spm.bos, *ids, spm.eos]) == spm.decode(ids)
    monkeypatch.setattr(tokenizer, "PART", 20)
    for part in some:
        cut = spm.encode(part)
        assert cut == bare.encode(part) or name == "unigram"
        assert spm.decode(cut) == part or not kept


# ----------------------------------------------------------------------------------------------------------- templates


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("saved_by", ["to-hf", "transformers"])
def test_a_chat_template_survives_there_and_back(made: Place, tmp_path, monkeypatch, template, saved_by):
    monkeypatch.setenv("RUNS", str(made.runs))
    sha256 = stage.sha256(made.runs / "mini/tokenizer/spm.model")
    shape = dataclasses.replace(SHAPES["untied"], context_length=256)
    taught, hf = save(tmp_path / "taught", shape, sha256, template), tmp_path / "hf"
    command("to-hf", made.config, hf, "--checkpoint", taught)
    if saved_by == "transformers":  # which writes the template to a file of its own, and no tokenizer.model
        hf = tmp_path / "again"
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").save_pretrained(hf)
        transformers.AutoTokenizer.from_pretrained(tmp_path / "hf").save_pretrained(hf)
        shutil.copy(tmp_path / "hf/tokenizer.model", hf)
    command("from-hf", hf, tmp_path / "back")
    experiment = configs.load(tmp_path / "back/config.py")
    before, after = served.load(configs.load(made.config), taught), served.load(experiment)
    assert (experiment.sft.data.template, after.template, after.stop) == (template, template, before.stop)
    asked = render(template, [Message("user", "Hi?")], after.tokenizer, ask=True)[0]
    assert after.prompt("Hi?") == before.prompt("Hi?") == asked
    command("to-hf", tmp_path / "back/config.py", tmp_path / "hf2")
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "hf" / file).read_bytes() == (tmp_path / "hf2" / file).read_bytes(), file


def test_a_model_that_was_only_pretrained_still_continues_texts(exported, made: Place, tmp_path):
    """And its export has the template chatml, for who fine-tunes it elsewhere."""
    hf = transformers.AutoTokenizer.from_pretrained(exported["untied"][1])
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " 1 + 1?\n"}]
    assert hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "</s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n 1 + 1?\n<|im_end|>\n<|im_start|>assistant\n"
    )
    command("from-hf", exported["untied"][1], tmp_path / "back")
    model = served.load(configs.load(tmp_path / "back/config.py"))
    assert model.template is None
    assert model.prompt("The") == [model.tokenizer.bos, *model.tokenizer.encode("The")]


# ----------------------------------------------------------------------------------------------------- what is refused

UNSUPPORTED = [
    ({"rope_parameters": ..., "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0}}, "rope_type is 'yarn'"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rotary_factor"),
    ({"attention_bias": True, "mlp_bias": True}, "attention_bias is True.*mlp_bias is True"),
    ({"hidden_act": "gelu", "head_dim": 16}, "hidden_act is 'gelu'.*head_dim is 16"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
    ({"architectures": ["MistralForCausalLM"], "model_type": "mistral"}, "sliding_window is 4096"),
    ({"num_key_value_heads": 3}, "n_kv_heads is 3"),
    ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "hidden_size": ...}, "GPT2LMHeadModel"),
]


@pytest.mark.parametrize(("changes", "named"), UNSUPPORTED, ids=[named for _, named in UNSUPPORTED])
def test_fields_that_are_not_supported_are_all_named(foreign, tmp_path, changes, named):
    with pytest.raises(UserError, match=f"config.json describes a model that is not supported: .*{named}"):
        command("from-hf", edit(foreign, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensors_that_do_not_fit_are_all_named(foreign, tmp_path):
    weights = safetensors.torch.load_file(foreign / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    safetensors.torch.save_file(weights, foreign / "model.safetensors")
    with pytest.raises(UserError, match=r"gives other logits \(by nan.*not finite"):
        command("from-hf", foreign, tmp_path / "out")
    del weights["model.norm.weight"]
    weights["lm_head.weight"] = weights["lm_head.weight"][1:].clone()
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    safetensors.torch.save_file(weights, foreign / "model.safetensors")
    with pytest.raises(UserError) as error:
        command("from-hf", foreign, tmp_path / "out")
    for problem in ("missing_keys model.norm.", "mismatched_keys ('lm_head.", "unexpected_keys model.layers.0.self_"):
        assert problem in str(error.value)


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harm was done",)


def test_damaged_files_are_refused_and_run_no_code(foreign, tmp_path, monkeypatch):
    def refused(path: Path, content: bytes, match: str) -> None:
        path.write_bytes(content)
        with pytest.raises(UserError, match=match):
            command("from-hf", foreign, tmp_path / "out")
        assert not list(tmp_path.glob("*out*"))

    monkeypatch.chdir(tmp_path)
    weights, spm = foreign / "model.safetensors", foreign / "tokenizer.model"
    refused(spm, spm.read_bytes()[:5_000], "the tokenizer is damaged")
    llama(vocab_size=260).save_pretrained(foreign)
    refused(spm, spm_model(["a b c d"] * 9, vocab_size=265), "has 265 pieces, but the embedding only 260 rows")
    refused(weights, weights.read_bytes()[:-100], r"foreign cannot be read \(SafetensorError")
    weights.unlink()
    for content in (pickle.dumps(Harm()), b"PK\x03\x04"):
        refused(foreign / "pytorch_model.bin", content, "foreign cannot be read")
    assert not (tmp_path / "harm was done").exists()
    refused(foreign / "config.json", b"{", "foreign cannot be read .*not a valid JSON")
    (foreign / "config.json").unlink()
    refused(spm, b"", "config.json; expected the directory of a model")


def test_a_missing_package_or_another_tokenizer_is_named(exported, made: Place, tmp_path, monkeypatch):
    def refused(match: str, saved: Path) -> None:
        with pytest.raises(UserError, match=match):
            command("to-hf", made.config, tmp_path / "out", "--checkpoint", saved)
        assert not (tmp_path / "out").exists()

    monkeypatch.setenv("RUNS", str(made.runs))
    refused("was trained with tokenizer 000000000000", save(tmp_path / "other", SHAPES["untied"], "0" * 64))
    for package in ("sentencepiece.sentencepiece_model_pb2", "transformers"):
        monkeypatch.setitem(sys.modules, package, None)
        refused(r"pip install (transformers )?protobuf", exported["untied"][0])


def test_only_an_earlier_conversion_is_replaced(foreign, tmp_path):
    def refused(match: str, out, *force: str) -> None:
        with pytest.raises(UserError, match=match):
            command("from-hf", foreign, out, *force)

    out = tmp_path / "out"
    command("from-hf", foreign, out)
    refused(r"is not empty.*--force", out)
    command("from-hf", foreign, out, "--force")
    out.rename(tmp_path / ".out.new")  # as a killed process leaves it
    refused("out is not empty", out)
    (out / "thesis.txt").write_text("years of work")
    refused(r"holds thesis\.txt, which no conversion wrote", out, "--force")
    refused("which no conversion wrote", ".", "--force")
    for used in (foreign, tmp_path):
        refused("which is in use", used, "--force")
    assert (out / "thesis.txt").read_text() == "years of work"


def test_a_failure_leaves_the_earlier_conversion(foreign, tmp_path, monkeypatch):
    command("from-hf", foreign, tmp_path / "out")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    monkeypatch.setattr(stage, "write_manifest", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command("from-hf", foreign, tmp_path / "out", "--force")
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


# ------------------------------------------------------------------------------------------------- an imported model


def test_commands_as_a_user_runs_them(place: Place, foreign):
    out = place.path / "llama"
    assert "converted" in place.run("convert.py", "from-hf", foreign, out).stdout
    assert sorted(path.name for path in out.iterdir()) == ["config.py", "manifest.json", "tokenizer", "weights.pt"]
    spm, model = tokenizer.load(out / "tokenizer"), checkpoint.load_model(out)
    new = generate.generate(model, [spm.bos, *spm.encode("The")], 8, temperature=0, stop=[spm.eos])
    options = ["generate", "The", "--temperature", "0", "--max-tokens", "8"]
    assert place.run("serve.py", out / "config.py", *options).stdout == f"The{spm.decode(new, begins=False)}\n"
    shutil.rmtree(out / "tokenizer")
    gone = place.run("serve.py", out / "config.py", *options, status=2).stderr
    assert "make it with: python convert.py from-hf DIR" in gone


@pytest.mark.slow
def test_a_converted_model_is_evaluated_on_text_packed_with_its_tokenizer(trained: Place, foreign):
    out = trained.path / "llama"
    command("from-hf", foreign, out)
    skipped = trained.run("pipeline.py", trained.config, "eval", "--checkpoint", out).stdout
    assert "another tokenizer" in skipped
    config = out / "config.py"
    text = config.read_text().replace("PythonDocs()", 'Files(paths=("text.jsonl",), min_chars=20)')
    config.write_text(text.replace("PackConfig()", "PackConfig(val_fraction=0.1)"))
    trained.run("pipeline.py", config, "pack")
    trained.run("pipeline.py", config, "eval", "--checkpoint", out, "--force")
    assert json.loads((trained.path / "eval_llama/results.json").read_text())["pretrain"]["validation"]["loss"] > 1


def test_a_model_without_a_tokenizer_is_refused(foreign, tmp_path):
    (foreign / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.model and no tokenizer\.json"):
        command("from-hf", foreign, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_training_continues_from_imported_weights(place: Place, foreign, monkeypatch):
    """With a learning rate near 0, it ends at a model near the imported one. A config of another shape is refused."""
    monkeypatch.setenv("DATA", str(place.raw))
    monkeypatch.setenv("RUNS", str(place.runs))
    command("from-hf", foreign, place.path / "out")
    config, written = place.path / "out/config.py", "steps=1_000, batch_size=8, learning_rate=1e-4"
    text = config.read_text().replace("PythonDocs()", 'Files(paths=("text.jsonl",))')
    assert written in text
    text = text.replace(written, "steps=2, batch_size=2, learning_rate=1e-9, compile=False, eval_rows=2")
    config.write_text(text.replace("rope_theta=500.0", "rope_theta=400.0"))
    with pytest.raises(UserError, match=r"another shape than the config describes: rope_theta was 500\.0, is now 400"):
        build("pretrain", configs.load(config))
    config.write_text(text)
    build("pretrain", configs.load(config), force=True)
    start = checkpoint.load_model(place.path / "out").state_dict()
    end = checkpoint.load_model(place.runs / "out/pretrain/final").state_dict()
    for name, weight in end.items():
        torch.testing.assert_close(weight, start[name], rtol=0, atol=1e-6)
