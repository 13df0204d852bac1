"""to-gguf: what is in the file, by the library gguf; and what llama.cpp makes of it."""

import json

import numpy as np
import pytest
import torch

import checkpoint
import configs
import convert_gguf
import generate
from cli import UserError
from tests.conftest import Place
from tests.test_convert import command
from tests.test_imported import foreign, imported, smollm2  # noqa: F401 - fixtures
from tokenizer.huggingface import HuggingFace

gguf = pytest.importorskip("gguf", reason="needs: pip install gguf")


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_the_file_holds_the_model(imported, tmp_path, capsys, kind):  # noqa: F811
    command("to-gguf", imported / "config.py", tmp_path / "m.gguf", "--type", kind)
    printed = capsys.readouterr().out
    assert 'FROM ./m.gguf\nPARAMETER stop "</s>"\nPARAMETER stop "<|im_end|>"' in printed
    file, model = gguf.GGUFReader(tmp_path / "m.gguf"), checkpoint.load_model(imported)
    fields = {name: field.contents() for name, field in file.fields.items()}
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["llama.rope.freq_base"] == 500_000.0
    assert len(fields["tokenizer.ggml.tokens"]) == model.config.vocab_size
    tensors = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in file.tensors}
    assert len(tensors) == len(model.state_dict()) - 1 + 1  # one without the tied head, one more with rope_freqs
    step = {"f32": 0, "f16": 1e-3, "q8_0": 1e-2}[kind]  # of the largest weight
    for name, ours in (("blk.1.ffn_down", model.blocks[1].mlp.down), ("token_embd", model.embed)):
        weight = ours.weight.detach().numpy()
        assert np.abs(tensors[f"{name}.weight"] - weight).max() <= step * weight.max()
    with pytest.raises(UserError, match=r"exists; name another file, or replace a GGUF file: --force"):
        command("to-gguf", imported / "config.py", tmp_path / "m.gguf")


def test_only_a_gguf_file_is_replaced(imported, tmp_path):  # noqa: F811
    for name in ("weights.pt", "directory"):
        path = tmp_path / name
        path.mkdir() if name == "directory" else path.write_bytes(b"years of work")
        with pytest.raises(UserError, match="exists; name another file"):
            command("to-gguf", imported / "config.py", path, "--force")
    command("to-gguf", imported / "config.py", tmp_path / "new/m.gguf")
    command("to-gguf", imported / "config.py", tmp_path / "new/m.gguf", "--force")


def test_added_tokens_and_gaps_are_kept(imported, tmp_path):  # noqa: F811
    described = json.loads((imported / "tokenizer/tokenizer.json").read_text())
    described["added_tokens"].append(described["added_tokens"][0] | {"id": 600, "content": "<think>", "special": False})
    described["model"]["vocab"]["qqqq"] = 605
    settings = json.loads((imported / "tokenizer/tokenizer_config.json").read_text())
    spm = HuggingFace(json.dumps(described).encode(), "", settings)
    assert spm.vocab_size == 606
    think = spm.encode("<think>")[0]
    convert_gguf.write(tmp_path / "m.gguf", checkpoint.load_model(imported), spm, "imported", "f32")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    types = fields["tokenizer.ggml.token_type"].contents()
    assert types[think] == gguf.TokenType.USER_DEFINED
    assert types[604] == gguf.TokenType.UNUSED
    described["model"]["ignore_merges"] = True
    spm = HuggingFace(json.dumps(described).encode(), "", settings)
    with pytest.raises(UserError, match="GGUF has no name for the way in which the tokenizer splits text"):
        convert_gguf.write(tmp_path / "m.gguf", checkpoint.load_model(imported), spm, "imported", "f32")


def same_in_llama_cpp(directory, spm, path, texts: list[str]) -> None:
    """Compares ids and greedy tokens with llama.cpp's, in float32."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs: pip install llama-cpp-python")
    model = checkpoint.load_model(directory)
    float32 = {"type_k": 0, "type_v": 0, "flash_attn": False}  # of the cache
    context = min(512, model.config.context_length)
    theirs = llama_cpp.Llama(str(path), n_ctx=context, n_threads=1, logits_all=True, verbose=False, **float32)
    for text in texts:
        ids, others = spm.encode(text), theirs.tokenize(text.encode(), add_bos=False, special=False)
        if ids != others:  # equally likely: "----" as "-" and "---", or as "---" and "-"
            assert sorted(ids) == sorted(others)
    for text in texts[:: max(1, len(texts) // 10)]:
        ids = [*spm.opening, *spm.encode(text)][: context // 4]
        ours = generate.generate(model, ids, min(64, context // 2), temperature=0, stop=())
        theirs.reset()
        theirs.eval(ids)
        for number, id in enumerate(ours):
            logits = theirs.scores[theirs.n_tokens - 1]
            if logits.argmax() != id:  # a tie, or nearly
                with torch.inference_mode():
                    own = model(torch.tensor([ids + ours[:number]]))[0, -1]
                assert own[id] - own[int(logits.argmax())] < 1e-4
                break
            theirs.eval([id])
    theirs.close()


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_llama_cpp_opens_our_models(trained: Place, text, algorithm):
    trained.edit(('algorithm="bpe"', f"algorithm={algorithm!r}"))
    trained.run("pipeline.py", trained.config, "tokenizer", "pack", "pretrain", "--force")
    path = trained.path / "mini.gguf"
    trained.run("convert.py", "to-gguf", trained.config, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNS", str(trained.runs))
        experiment = configs.load(trained.config)
        texts = [part for part in text if algorithm == "bpe" or part.isascii()]  # the other has no bytes there
        same_in_llama_cpp(experiment.trained("pretrain"), experiment.load_tokenizer(), path, texts)


def test_llama_cpp_opens_imported_models(imported, tmp_path, text):  # noqa: F811
    command("to-gguf", imported / "config.py", tmp_path / "m.gguf")
    spm = configs.load(imported / "config.py").load_tokenizer(imported)
    same_in_llama_cpp(imported, spm, tmp_path / "m.gguf", text)


@pytest.mark.slow
def test_llama_cpp_opens_smollm2(smollm2, tmp_path, text):  # noqa: F811
    command("from-hf", smollm2, tmp_path / "ours", "--context-length", 512)
    command("to-gguf", tmp_path / "ours/config.py", tmp_path / "m.gguf")
    spm = configs.load(tmp_path / "ours/config.py").load_tokenizer(tmp_path / "ours")
    same_in_llama_cpp(tmp_path / "ours", spm, tmp_path / "m.gguf", text)
