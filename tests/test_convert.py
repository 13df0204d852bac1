"""To and from the Hugging Face layout: against transformers and SentencePiece, there and back, and what is wrong."""

import copy
import io
import itertools
import json
import os
import pickle
import re
import shutil
import signal
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
from generate import Continuation, Sampling
from model import ModelConfig, Transformer
from serving.engine import Generation
from tests.conftest import Place
from tokenizer.train import TokenizerConfig, train

SHAPE = {"vocab_size": 512, "context_length": 64, "n_layers": 2, "d_model": 32, "n_heads": 4}
SHAPES = {
    "grouped and tied": ModelConfig(**SHAPE, n_kv_heads=2, d_ff=80, tie_embeddings=True, rope_theta=500.0),
    "untied": ModelConfig(**SHAPE, rms_norm_eps=1e-3),
}
TEXTS = st.text(st.characters(codec="utf-8")) | st.lists(
    st.sampled_from(
        [*" \n\t▁a1é=-<|>", "  ", "    ", "<0x41>", "<0xE2>", "<|im_start|>", "<|im_end|>", "</s>", "<unk>"]
    )
).map("".join)


def command(*words) -> None:
    """Runs convert.py's command in this process."""
    parsed = convert.arguments().parse_args([str(word) for word in words])
    parsed.command(parsed)


def llama(seed: int = 0, **changes) -> transformers.LlamaForCausalLM:
    """A small LLaMA of transformers' own."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": 1024,
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape | changes))


def spm_model(texts: list[str], **options) -> bytes:
    """A SentencePiece model with the library's own defaults."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=written, byte_fallback=True, minloglevel=2, **options
    )
    return written.getvalue()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


@pytest.fixture(scope="module")
def documents() -> list[str]:
    """1,200 real ones: docstrings of the standard library."""
    found = PythonDocs(packages=()).documents(1)
    texts = [document.text for document in itertools.islice(found, 1_200)]
    found.close()
    return texts


@pytest.fixture(scope="module")
def spms(made: Place) -> dict[str, tokenizer.Tokenizer]:
    """A tokenizer of ours by each algorithm."""
    corpus, found = made.runs / "mini/corpus", {}
    for algorithm in ("unigram", "bpe"):
        found[algorithm] = tokenizer.Tokenizer(
            train(corpus, 1, TokenizerConfig(vocab_size=500, algorithm=algorithm), 0.1), ""
        )
    return found


@pytest.fixture(scope="module")
def exported(made: Place, tmp_path_factory):
    """{name of the shape: (checkpoint, what to-hf made of it)}"""
    sha256 = stage.sha256(made.runs / "mini/tokenizer/spm.model")
    pairs = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNS", str(made.runs))
        for name, config in SHAPES.items():
            place = tmp_path_factory.mktemp("exported")
            torch.manual_seed(1)
            model = Transformer(config)
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(10) if p.dim() == 2 else p.uniform_(0.5, 1.5)
            read = {"mini/tokenizer/spm.model": sha256}
            about = {"config": {"model": stage.describe(config)}, "read": read, "counts": {"step": 1}}
            checkpoint.save(place / "step", {"weights.pt": model.state_dict(), "state.pt": {}}, about)
            command("to-hf", made.config, place / "hf", "--checkpoint", place / "step")
            pairs[name] = place / "step", place / "hf"
    return pairs


@pytest.fixture
def foreign(tmp_path: Path, text: list[str]) -> Path:
    """A LLaMA as transformers saves it, with a SentencePiece tokenizer like LLaMA's and a padded embedding."""
    llama().save_pretrained(tmp_path / "foreign")
    options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "model_type": "bpe"}
    (tmp_path / "foreign/tokenizer.model").write_bytes(spm_model(text, vocab_size=600, **options))
    return tmp_path / "foreign"


def edit(directory: Path, **changes) -> Path:
    """Changes fields of config.json; None removes one."""
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
    tokens = torch.randint(512, (3, 64), generator=torch.Generator().manual_seed(0))
    logits, others = ours(tokens), other(tokens).logits
    assert relative(logits, others) < 1e-5
    assert torch.equal(logits.argmax(-1), others.argmax(-1))
    loss, other_loss = ours(tokens[:, :-1], tokens[:, 1:]), other(tokens, labels=tokens).loss
    assert loss.item() == pytest.approx(other_loss.item(), rel=1e-5)
    loss.backward(), other_loss.backward()
    gradients = {name: p.grad for name, p in other.named_parameters()}
    assert len(gradients) == len(list(ours.parameters()))
    for name, p in ours.named_parameters():
        assert relative(p.grad, gradients[convert.theirs(name)]) < 1e-4, name
    greedy = other.generate(tokens[:1, :8], max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert generate.generate(ours, tokens[0, :8].tolist(), 12, temperature=0) == greedy[0, 8:].tolist()


@pytest.mark.parametrize("name", SHAPES)
def test_there_and_back_is_bit_for_bit(exported, name, tmp_path):
    before, hf = exported[name]
    command("from-hf", hf, tmp_path / "back")
    spm = tokenizer.load(tmp_path / "back/tokenizer")
    ours, back = checkpoint.read(before, "weights.pt"), checkpoint.read(tmp_path / "back", "weights.pt")
    assert ours.keys() == back.keys()
    assert all(torch.equal(ours[name].view(torch.int32), back[name].view(torch.int32)) for name in ours)
    before_config, back_config = checkpoint.load_model(before).config, checkpoint.load_model(tmp_path / "back").config
    assert convert.llama_config(before_config, spm) == convert.llama_config(back_config, spm)
    checkpoint.must_match(before, spm.sha256)
    checkpoint.must_match(tmp_path / "back", spm.sha256)
    command("to-hf", tmp_path / "back/config.py", tmp_path / "hf")
    for file in sorted(path.name for path in hf.iterdir()):
        assert (hf / file).read_bytes() == (tmp_path / "hf" / file).read_bytes(), file
    tied = SHAPES[name].tie_embeddings
    assert ("lm_head.weight" in safetensors.torch.load_file(hf / "model.safetensors")) != tied


@pytest.mark.parametrize("how", ["safetensors", "sharded", "bin", "sharded bin", "bfloat16", "tied", "old names"])
def test_llamas_of_transformers_come_over(foreign, tmp_path, how):
    other = llama(tie_word_embeddings=how == "tied")
    saved = other
    if how == "bfloat16":
        saved = copy.deepcopy(other).bfloat16()
        other.load_state_dict(saved.state_dict())
    saved.save_pretrained(foreign, **({"max_shard_size": "20KB"} if how == "sharded" else {}))
    weights = {name: weight.clone() for name, weight in other.state_dict().items()}
    if how != "sharded":
        assert (foreign / "model.safetensors").exists()
    else:
        (foreign / "model.safetensors").unlink()
    if how == "bin":
        (foreign / "model.safetensors").unlink()
        # Every tensor is a view into one storage, which holds more than them.
        pool = torch.cat([*(weight.flatten() for weight in weights.values()), torch.zeros(100_000)])
        parts = pool[:-100_000].split([weight.numel() for weight in weights.values()])
        views = {name: part.view_as(weights[name]) for name, part in zip(weights, parts, strict=True)}
        torch.save(views, foreign / "pytorch_model.bin")
    if how == "sharded bin":
        (foreign / "model.safetensors").unlink()
        index = {name: f"pytorch_model-{i % 2 + 1:05}-of-00002.bin" for i, name in enumerate(weights)}
        for shard in set(index.values()):
            torch.save({k: v for k, v in weights.items() if index[k] == shard}, foreign / shard)
        (foreign / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    if how == "old names":  # as transformers 4 wrote them, buffers included, and as Mistral calls itself
        safetensors.torch.save_file(
            weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, foreign / "model.safetensors"
        )
        mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
        edit(foreign, rope_parameters=..., rope_theta=500.0, rope_scaling=None, head_dim=..., **mistral)
    command("from-hf", foreign, tmp_path / "out")
    assert {weight.dtype for weight in checkpoint.read(tmp_path / "out", "weights.pt").values()} == {torch.float32}
    ours = checkpoint.load_model(tmp_path / "out")
    tokens = torch.randint(1024, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert relative(ours(tokens), other(tokens).logits) < 1e-5
    assert (tmp_path / "out/weights.pt").stat().st_size < 4 * ours.num_parameters() + 20_000
    assert ours.config.rope_theta == 500.0


def test_a_head_that_is_tied_and_stored_too(foreign, tmp_path):
    other = llama(tie_word_embeddings=True)
    other.save_pretrained(foreign)
    weights = {name: weight.clone() for name, weight in other.state_dict().items()}
    assert "lm_head.weight" in weights
    safetensors.torch.save_file(weights, foreign / "model.safetensors")
    command("from-hf", foreign, tmp_path / "out")
    weights["lm_head.weight"][0, 0] += 1
    safetensors.torch.save_file(weights, foreign / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        command("from-hf", foreign, tmp_path / "again")


# ------------------------------------------------------------------------------------------------------ our tokenizers


def fast(spm: tokenizer.Tokenizer) -> tokenizers.Tokenizer:
    """What tokenizers makes of our tokenizer.json, control pieces read as text."""
    found = tokenizers.Tokenizer.from_str(json.dumps(convert.fast_tokenizer(spm)))
    found.encode_special_tokens = True
    return found


def likelihood(spm: tokenizer.Tokenizer, ids: list[int]) -> float:
    """What unigram makes as large as it can. Of spellings that are as likely as each other, SentencePiece's float32
    and tokenizers' float64 sums may choose differently."""
    return sum(map(spm.pieces.get_score, ids))


@pytest.mark.parametrize("algorithm", ["unigram", "bpe"])
def test_real_documents_get_the_same_ids(spms, documents, algorithm):
    spm, hf = spms[algorithm], fast(spms[algorithm])
    together = ["\n\n".join(documents[:300]), "\n\n".join(documents[300:])]  # far longer than what we encode at once
    different = 0
    for text in [*documents, *together]:
        theirs, ours = hf.encode(text).ids, spm.encode(text)
        if theirs != ours:
            assert algorithm == "unigram"
            assert likelihood(spm, theirs) == pytest.approx(likelihood(spm, ours))
            different += 1
        assert hf.decode(ours) == text
    assert different <= 0.01 * len(documents)
    assert len(documents) > 1_000


@pytest.mark.parametrize("algorithm", ["unigram", "bpe"])
def test_any_text_gets_the_same_ids(spms, algorithm):
    spm, hf = spms[algorithm], fast(spms[algorithm])

    @settings(max_examples=500, deadline=None)
    @given(TEXTS)
    def check(text):
        theirs, ours = hf.encode(text).ids, spm.encode(text)
        if algorithm == "bpe":
            assert theirs == ours
        assert likelihood(spm, theirs) == pytest.approx(likelihood(spm, ours))
        assert hf.decode(ours) == text

    check()
    for text in ("", " ", "  a", "\n\n", "a▁b▁", "<0x41>", "<0x0A><0xE2>", "<unk></s>", "<|im_start|>x<|reserved_5|>"):
        assert hf.encode(text).ids == spm.encode(text), text


def test_auto_tokenizer_opens_it(exported, text, made: Place):
    hf = transformers.AutoTokenizer.from_pretrained(exported["untied"][1])
    spm = tokenizer.load(made.runs / "mini/tokenizer")
    for part in ["", "  two\n words ▁ é", "a  ", *text]:
        for options in ({}, {"add_special_tokens": False}, {"add_special_tokens": True}):
            assert hf.encode(part, **options) == spm.encode(part)
        assert hf.decode(spm.encode(part)) == part
    assert (hf.bos_token_id, hf.eos_token_id, len(hf)) == (spm.eos, spm.eos, 512)
    assert hf.model_max_length == 64
    spelt = "<|im_start|>user\nhi<|im_end|>"
    parsed = [spm.control["<|im_start|>"], *spm.encode("user\nhi"), spm.control["<|im_end|>"]]
    assert hf.encode(spelt) == parsed
    assert hf(spelt, split_special_tokens=True)["input_ids"] == spm.encode(spelt)
    assert hf.decode(parsed, skip_special_tokens=True) == "user\nhi"


def test_chats_are_rendered_as_chatml(exported, made: Place):
    hf = transformers.AutoTokenizer.from_pretrained(exported["untied"][1])
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " 1 + 1?\n"}]
    rendered = hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == (
        "</s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n 1 + 1?\n<|im_end|>\n<|im_start|>assistant\n"
    )
    assert not hf.apply_chat_template(messages, tokenize=False).endswith("assistant\n")
    ids = hf.apply_chat_template(messages, return_dict=False)
    assert ids.count(tokenizer.load(made.runs / "mini/tokenizer").control["<|im_end|>"]) == 2


def test_a_tokenizer_that_cannot_be_reproduced_is_refused(made: Place, text):
    config = TokenizerConfig(vocab_size=400, algorithm="bpe", normalization="nfkc")
    model = train(made.runs / "mini/corpus", 1, config, 0.1)
    with pytest.raises(UserError, match=r"text normalisation, which tokenizer\.json cannot reproduce exactly"):
        convert.fast_tokenizer(tokenizer.Tokenizer(model, ""))
    with pytest.raises(UserError, match="text normalisation, white space that is not kept"):
        convert.fast_tokenizer(tokenizer.Tokenizer(spm_model(text, vocab_size=600), ""))
    model = spm_model(text, vocab_size=600, normalization_rule_name="identity", user_defined_symbols=["<x>"])
    with pytest.raises(UserError, match="user-defined or unused pieces"):
        convert.fast_tokenizer(tokenizer.Tokenizer(model, ""))


# ---------------------------------------------------------------------------------------------------- other tokenizers

KEPT = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
OTHERS = {
    "LLaMA's": {**KEPT, "model_type": "bpe"},
    "unigram": KEPT,
    "identity": {"normalization_rule_name": "identity"},
    "SentencePiece's defaults": {},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_tokenizers_encode_as_sentencepiece_does(text, documents, name, monkeypatch):
    model = spm_model([line for part in text for line in part.split("\n")], vocab_size=600, **OTHERS[name])
    spm, bare = tokenizer.Tokenizer(model, ""), sentencepiece.SentencePieceProcessor(model_proto=model)
    assert (spm.bos, spm.eos) == (1, 2)
    some = ["", " ", "  two  spaces ", "x", "\n a\n", "é 🙂", "<s>a</s>", *text, *documents[:200]]
    kept = name in ("LLaMA's", "unigram")
    for part in some:
        ids = spm.encode(part)
        assert ids == bare.encode(part)
        assert spm.decode(ids) == bare.decode(ids) == (part if kept else bare.decode(bare.encode(part)))
        assert spm.decode([spm.bos, *ids, spm.eos]) == spm.decode(ids)
    if kept:
        assert spm.decode(spm.encode("a▁b ▁")) == "a▁b ▁"
    else:
        assert spm.encode("a▁b ▁") == bare.encode("a▁b ▁")
    monkeypatch.setattr(tokenizer, "PART", 20)
    for part in some:
        cut = spm.encode(part)
        assert cut == bare.encode(part) or name == "unigram"
        assert spm.decode(cut) == part or not kept


def test_other_tokenizers_are_exported_exactly(text, documents):
    spm = tokenizer.Tokenizer(spm_model(text, vocab_size=600, **OTHERS["LLaMA's"]), "")
    hf = fast(spm)
    for part in ["", " ", " a", "  ▁x", *text, *documents[:200]]:
        assert hf.encode(part).ids == spm.encode(part)
        assert hf.decode(spm.encode(part)) == part


def written(spm: tokenizer.Tokenizer, ids: list[int]) -> str:
    text = Generation(spm, Continuation([0], 1, Sampling()))
    for token in ids:
        text.add(token)
    text.end("length")
    return text.text


def test_a_continuation_keeps_its_first_space(text):
    spm = tokenizer.Tokenizer(spm_model(text, vocab_size=600, **OTHERS["LLaMA's"]), "")
    ids = spm.encode("one two")
    assert spm.decode(ids[:1], begins=True) + spm.decode(ids[1:], begins=False) == "one two"
    assert written(spm, spm.encode("two")) == " two"


# ------------------------------------------------------------------------------------------------ what is not supported

UNSUPPORTED = [
    ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "llama3"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"attention_bias": True}, "attention_bias is True"),
    ({"mlp_bias": True}, "mlp_bias is True"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"head_dim": 16}, "head_dim is 16"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ({"sliding_window": 128}, "sliding_window is 128"),
    ({"architectures": ["MistralForCausalLM"], "model_type": "mistral"}, "sliding_window is 4096"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    ({"rms_norm_eps": ...}, "rms_norm_eps is missing"),
    ({"hidden_size": "32"}, "hidden_size is '32'"),
    ({"vocab_size": 0}, "vocab_size is 0"),
    ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    ({"num_key_value_heads": 3}, "n_kv_heads is 3"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
    ({"hidden_size": 10**400}, "hidden_size is 10000"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 10**400}}, "rope_theta is 10000"),
]


@pytest.mark.parametrize(("changes", "named"), UNSUPPORTED, ids=[named for _, named in UNSUPPORTED])
def test_what_is_not_supported_is_named(foreign, tmp_path, changes, named):
    with pytest.raises(UserError, match=f"config.json describes a model that is not supported: .*{named}"):
        command("from-hf", edit(foreign, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_all_that_is_not_supported_is_named_at_once(foreign, tmp_path):
    changes = {"attention_bias": True, "hidden_act": "relu", "rope_scaling": {"rope_type": "yarn"}, "head_dim": 99}
    with pytest.raises(UserError) as error:
        command("from-hf", edit(foreign, **changes, intermediate_size=...), tmp_path / "out")
    for name in (*changes, "intermediate_size"):
        assert name in str(error.value)


def test_tensors_that_do_not_fit_are_named_at_once(foreign, tmp_path):
    weights = safetensors.torch.load_file(foreign / "model.safetensors")
    del weights["model.norm.weight"]
    weights["lm_head.weight"] = weights["lm_head.weight"][1:].clone()
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"].to(torch.int8)
    safetensors.torch.save_file(weights, foreign / "model.safetensors")
    with pytest.raises(UserError) as error:
        command("from-hf", foreign, tmp_path / "out")
    for what in (
        "model.norm.weight is missing",
        "lm_head.weight is [1023, 32], expected [1024, 32]",
        "q_proj.bias is unexpected",
        "up_proj.weight is torch.int8",
    ):
        assert what in str(error.value)


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harm was done",)


def test_damaged_files_are_named(foreign, tmp_path, monkeypatch):
    def refused(match: str) -> None:
        with pytest.raises(UserError, match=match) as error:
            command("from-hf", foreign, tmp_path / "out")
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".*"))

    weights, spm = foreign / "model.safetensors", foreign / "tokenizer.model"
    whole, pieces, shape = weights.read_bytes(), spm.read_bytes(), (foreign / "config.json").read_text()
    for broken in (whole[:-100], whole[:50], b"", b"\xff" * 100):
        weights.write_bytes(broken)
        refused("model.safetensors is damaged")
    weights.write_bytes(whole)
    spm.write_bytes(pieces[: len(pieces) // 2])
    refused("tokenizer.model: the tokenizer is damaged")
    spm.write_bytes(pieces)
    for broken in ("{", "[1]", ""):
        (foreign / "config.json").write_text(broken)
        refused("config.json")
    (foreign / "config.json").unlink()
    refused("config.json; expected the directory of a model")
    (foreign / "config.json").write_text(shape)
    weights.unlink()
    refused("holds no weights")
    monkeypatch.chdir(tmp_path)
    for content in (pickle.dumps(Harm()), b"PK\x03\x04", b""):
        (foreign / "pytorch_model.bin").write_bytes(content)
        refused("pytorch_model.bin is damaged, or holds something other")
    torch.save({"model.norm.weight": Harm()}, foreign / "pytorch_model.bin")
    refused("pytorch_model.bin is damaged, or holds something other")
    assert not (tmp_path / "harm was done").exists()
    torch.save([1, 2], foreign / "pytorch_model.bin")
    refused("expected a model's state_dict")
    (foreign / "pytorch_model.bin").unlink()
    for weight_map, match in (
        ({"a": "gone.bin"}, "gone.bin is missing"),
        ({"a": "../x"}, "json is damaged"),
        (3, "json is damaged"),
    ):
        (foreign / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        refused(match)


def test_a_tokenizer_with_more_pieces_than_the_embedding_has_rows_is_refused(foreign, tmp_path):
    llama(vocab_size=500).save_pretrained(foreign)
    with pytest.raises(UserError, match="has 600 pieces, but the embedding only 500 rows"):
        command("from-hf", foreign, tmp_path / "out")


def test_without_safetensors_it_says_what_to_install(foreign, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    with pytest.raises(UserError, match="pip install safetensors"):
        command("from-hf", foreign, tmp_path / "out")


# -------------------------------------------------------------------------------------------------------- the commands


def test_commands_as_a_user_runs_them(trained: Place, foreign):
    hf, back = trained.path / "hf", trained.path / "back"
    assert "converted" in trained.run("convert.py", "to-hf", trained.config, hf).stdout
    assert "not empty" in trained.run("convert.py", "to-hf", trained.config, hf, status=2).stderr
    trained.run("convert.py", "from-hf", hf, back)
    options = ["generate", "The", "--temperature", "0", "--max-tokens", "8"]
    ours = trained.run("serve.py", trained.config, *options).stdout
    assert trained.run("serve.py", back / "config.py", *options).stdout == ours

    llama_dir = trained.path / "llama"
    trained.run("convert.py", "from-hf", foreign, llama_dir)
    spm = tokenizer.load(llama_dir / "tokenizer")
    new = generate.generate(
        checkpoint.load_model(llama_dir), [spm.bos, *spm.encode("The")], 8, temperature=0, stop=[spm.eos]
    )
    for config in (llama_dir / "config.py", trained.config):
        out = trained.run("serve.py", config, "--checkpoint", llama_dir, *options).stdout
        assert out == f"The{written(spm, new)}\n"


def test_a_converted_model_is_evaluated_on_text_packed_with_its_tokenizer(trained: Place, foreign):
    out = trained.path / "llama"
    trained.run("convert.py", "from-hf", foreign, out)
    config = out / "config.py"
    skipped = trained.run("pipeline.py", trained.config, "eval", "--checkpoint", out).stdout
    assert re.search("validation skipped: .* was packed with another tokenizer", skipped)
    source = 'Files(paths=("text.jsonl",), min_chars=20)'
    text = config.read_text().replace("PythonDocs()", source).replace("import PythonDocs", "import Files")
    config.write_text(text.replace("PackConfig()", "PackConfig(val_fraction=0.1)"))
    trained.run("pipeline.py", config, "pack")
    trained.run("pipeline.py", config, "eval", "--checkpoint", out, "--force")
    results = json.loads((trained.path / "eval_llama/results.json").read_text())
    assert results["pretrain"]["validation"]["loss"] > 1


def test_without_a_sentencepiece_tokenizer_the_weights_come_over_with_a_warning(place: Place, foreign):
    (foreign / "tokenizer.model").unlink()
    done = place.run("convert.py", "from-hf", foreign, place.path / "out")
    assert "has no tokenizer.model" in done.stderr
    assert checkpoint.load_model(place.path / "out").config.vocab_size == 1024
    assert not (place.path / "out/config.py").exists()


def test_a_checkpoint_of_another_tokenizer_is_refused(exported, made: Place, tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS", str(made.runs))
    other = shutil.copytree(exported["untied"][0], tmp_path / "other")
    manifest = stage.read_manifest(other)
    stage.write_manifest(other, manifest | {"read": {"mini/tokenizer/spm.model": "0" * 64}})
    with pytest.raises(UserError, match="was trained with tokenizer 000000000000"):
        command("to-hf", made.config, tmp_path / "out", "--checkpoint", other)
    assert not (tmp_path / "out").exists()


def test_what_is_no_model_is_not_replaced(foreign, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    for beside in ([], ["config.py"], ["weights.pt", "manifest.json"]):
        for name in beside:
            (tmp_path / "mine" / name).write_text("something")
        with pytest.raises(UserError, match="which no conversion wrote"):
            command("from-hf", foreign, tmp_path / "mine", "--force")
    for out in (foreign, tmp_path):
        with pytest.raises(UserError, match="is what is converted, or holds it"):
            command("from-hf", foreign, out, "--force")
    with pytest.raises(UserError, match="is a file"):
        command("from-hf", foreign, tmp_path / "mine/thesis.txt")
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"


def test_a_failure_leaves_what_was_there(foreign, tmp_path, monkeypatch):
    command("from-hf", foreign, tmp_path / "out")
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    monkeypatch.setattr(stage, "versions", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command("from-hf", foreign, tmp_path / "out", "--force")
    assert before == {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert not list(tmp_path.glob(".*"))


def test_a_model_moved_aside_by_a_process_that_was_killed_comes_back(foreign, tmp_path):
    command("from-hf", foreign, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.old")
    with pytest.raises(UserError, match="out is not empty"):
        command("from-hf", foreign, tmp_path / "out")
    assert checkpoint.load_model(tmp_path / "out").config.vocab_size == 1024


def test_a_disk_that_fills_up_is_named(place: Place, foreign, exported):
    code = """
import resource, signal, sys, convert
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
parsed = convert.arguments().parse_args(sys.argv[1:])
convert.cli.run(parsed.command, parsed)
"""
    found = place.run("-c", code, "from-hf", foreign, place.path / "out", status=2)
    assert "weights.pt cannot be written" in found.stderr
    assert not (place.path / "out").exists()
    assert not list(place.path.glob(".out*"))


def test_more_layers_than_tensors_are_refused_before_they_are_made(foreign, tmp_path):
    with pytest.raises(UserError, match="has 1,000,000,000 layers, but the files only"):
        command("from-hf", edit(foreign, num_hidden_layers=10**9), tmp_path / "out")


def test_weights_that_are_not_finite_are_refused(foreign, tmp_path):
    weights = safetensors.torch.load_file(foreign / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    safetensors.torch.save_file(weights, foreign / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.norm\.weight has numbers that are not finite"):
        command("from-hf", foreign, tmp_path / "out")


def test_training_goes_on_from_imported_weights(place: Place, foreign):
    """With a learning rate of next to nothing, to a model next to the imported one."""
    place.run("convert.py", "from-hf", foreign, place.path / "out")
    config = place.path / "out/config.py"
    source = 'Files(paths=("text.jsonl",))'
    text = config.read_text().replace("PythonDocs()", source).replace("import PythonDocs", "import Files")
    assert "steps=1_000, batch_size=8, learning_rate=1e-4" in text
    settings = "steps=2, batch_size=2, learning_rate=1e-9, compile=False, eval_rows=2"
    config.write_text(text.replace("steps=1_000, batch_size=8, learning_rate=1e-4", settings))
    assert "training continues from the weights in" in place.run("train.py", config).stdout
    start = checkpoint.load_model(place.path / "out").state_dict()
    end = checkpoint.load_model(place.runs / "out/pretrain/final").state_dict()
    for name, weight in end.items():
        torch.testing.assert_close(weight, start[name], rtol=0, atol=1e-6)


def test_killed_half_way_nothing_is_half_written(place: Place, foreign):
    out = place.path / "out"
    code = f"""
import os, signal, sys, torch, convert
save = torch.save
def half(value, path):
    save(value, path)
    os.kill(os.getpid(), signal.{{}})
torch.save = half
parsed = convert.arguments().parse_args(["from-hf", {str(foreign)!r}, {str(out)!r}])
convert.cli.run(parsed.command, parsed)
"""
    place.run("-c", code.format("SIGKILL"), status=-signal.SIGKILL)
    assert not out.exists()
    place.run("-c", code.format("SIGTERM"), status=143)
    assert not out.exists()
    place.run("convert.py", "from-hf", foreign, out)
    assert sorted(p.name for p in out.iterdir()) == ["config.py", "manifest.json", "tokenizer", "weights.pt"]
    assert not list(place.path.glob(".out*"))


def test_an_experiment_says_when_its_imported_tokenizer_is_gone(foreign, tmp_path):
    command("from-hf", foreign, tmp_path / "out")
    experiment = configs.load(tmp_path / "out/config.py")
    assert experiment.trained("pretrain") == tmp_path / "out"
    assert experiment.load_tokenizer().vocab_size == 600
    shutil.rmtree(tmp_path / "out/tokenizer")
    with pytest.raises(UserError, match=r"make it with: python convert\.py from-hf DIR"):
        experiment.load_tokenizer()
