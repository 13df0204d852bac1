"""A fine-tuned model put to use: served, exported, looked at."""

import re

import pytest
import torch
import transformers

import checkpoint
import configs
import generate
from sft.conversations import Message
from sft.templates import render
from tests.conftest import CHATS, Place


def test_the_latest_model_answers_and_the_other_goes_on(fine_tuned: Place):
    options = ["--temperature", "0", "--max-tokens", "8"]
    answer = fine_tuned.run("serve.py", fine_tuned.config, "generate", "Say a in.", *options).stdout
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNS", str(fine_tuned.runs))
        spm = configs.load(fine_tuned.config).load_tokenizer()
    model = checkpoint.load_model(fine_tuned.runs / "mini/sft/final")
    ids = render("chatml", [Message("user", "Say a in.")], spm, ask=True)[0]
    new = generate.generate(model, ids, 8, temperature=0, stop=(spm.eos, *spm.control.values()))
    assert answer == spm.decode(new, begins=False) + "\n"
    plain = fine_tuned.runs / "mini/pretrain/final"
    text = fine_tuned.run("serve.py", fine_tuned.config, "--checkpoint", plain, "generate", "Say", *options).stdout
    assert text.startswith("Say")
    assert "end with a question" in fine_tuned.run("serve.py", fine_tuned.config, "generate", " \n", status=2).stderr


def test_exported_it_is_the_same_model_with_the_same_template(fine_tuned: Place, tmp_path):
    fine_tuned.run("convert.py", "to-hf", fine_tuned.config, tmp_path / "hf")
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNS", str(fine_tuned.runs))
        spm = configs.load(fine_tuned.config).load_tokenizer()
    messages = [Message("user", 'Say "a"\n(b).'), Message("assistant", '"a"\n(b)')]
    ids = render("chatml", messages, spm)[0]
    said = [{"role": message.role, "content": message.content} for message in messages]
    assert theirs.apply_chat_template(said, return_dict=False) == ids
    ours = checkpoint.load_model(fine_tuned.runs / "mini/sft/final")
    with torch.no_grad():
        torch.testing.assert_close(hf(torch.tensor([ids])).logits, ours(torch.tensor([ids])), rtol=0, atol=1e-4)


def test_inspect_shows_what_is_trained(fine_tuned: Place):
    out = fine_tuned.run("-m", "sft.inspect", fine_tuned.config, "--rows", 1000).stdout
    shown = re.findall(r"<\|im_start\|>user\n(.*?)<\|im_end\|>\n<\|im_start\|>assistant\n⟦(.*?)<\|im_end\|>⟧", out)
    pairs = {(chat["prompt"], chat["response"]) for chat in CHATS}
    assert set(shown) <= pairs
    assert len(set(shown)) == len(shown) == int(re.search(r"(\d+) conversations in", out)[1])
    used = float(re.search(r"([\d.]+)% of them used", out)[1])
    each = [float(share) for share in re.findall(r"tokens \(([\d.]+)%\)", out)]
    assert sum(each) / len(each) == pytest.approx(used, abs=0.1)
    error = fine_tuned.run("-m", "sft.inspect", fine_tuned.config, "--first", 1000, status=2).stderr
    assert "found --first 1,000" in error
