"""Greedy decoding on a CPU, beside its bare matrix products, transformers and llama.cpp with the same weights.

    python -m benchmarks.decoding [--quick]

It prints its results; `python -m benchmarks.cpu` runs it too, and writes them. All ways are timed in turn; results are
medians, and medians of rounds' ratios.
"""

import argparse
import copy
import importlib.util
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import cli
import configs
import convert_gguf
from benchmarks.common import interleaved, ratio
from generate import generate, to_int8
from model import Transformer

PROMPT = 32  # tokens
LONG = 512  # tokens of the prompt whose reading is timed
KINDS = ("f32", "f16", "q8_0")  # of llama.cpp's weights


def results(quick: bool = False) -> dict[str, dict]:
    """The results for 1 and 8 texts. quick: a small model, a few tokens and one round."""
    name, new, rounds = ("demo", 4, 1) if quick else ("tiny", 128, 5)
    return {f"decode_{name}_{texts}": decode(name, texts, new, rounds) for texts in (1, 8)}


def decode(name: str, texts: int, new: int, rounds: int) -> dict[str, float | str]:
    """Tokens/s of each way to continue so many prompts by `new` tokens; the time and rate of reading a prompt."""
    from tests.test_model import to_transformers

    torch.manual_seed(0)
    model = Transformer(configs.load(f"configs/{name}.py").model).eval()
    prompts = torch.randint(model.config.vocab_size, (texts, PROMPT))
    long = torch.randint(model.config.vocab_size, (min(LONG, model.config.context_length - 1),)).tolist()
    theirs = to_transformers(model)
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    variants = {"": model, "bfloat16_": copy.deepcopy(model).bfloat16(), "int8_": copy.deepcopy(model)}
    to_int8(variants["int8_"])
    ways = {"bare_": bare(model, texts, new), "transformers_": lambda: theirs.generate(prompts, **settings)}
    for variant, ours in variants.items():
        ways[variant] = lambda ours=ours: generate(ours, prompts.tolist(), new, temperature=0)
    about = {}
    with tempfile.TemporaryDirectory() as directory:
        if new < PROMPT:
            about["llama_cpp"] = "left out of quick runs"
        elif texts == 1 and importlib.util.find_spec("llama_cpp") and importlib.util.find_spec("gguf"):
            for kind in KINDS:
                ways[f"llama_cpp_{kind}_"] = llama_cpp(model, Path(directory), kind, prompts[0].tolist(), new)
        elif texts == 1:
            about["llama_cpp"] = "left out: pip install llama-cpp-python gguf"
        seconds = interleaved(rounds, ways)
    first = {"first": lambda: generate(model, prompts.tolist(), 1, temperature=0)}
    first["prompt"] = lambda: generate(model, long, 1, temperature=0)
    reading = interleaved(rounds, first)
    found = {f"{way}tokens_per_second": rate(texts * new, times) for way, times in seconds.items()}
    if "llama_cpp_q8_0_" in seconds:  # it reads the prompt as it writes: a token at a time
        found["llama_cpp_q8_0_tokens_per_second"] = rate(PROMPT + new, seconds["llama_cpp_q8_0_"])
    return found | {
        "of_bare_rate": ratio(seconds["bare_"], seconds[""]),
        "ratio_vs_transformers": ratio(seconds["transformers_"], seconds[""]),
        "first_token_seconds": round(statistics.median(reading["first"]), 4),
        "prompt_tokens_per_second": rate(len(long), reading["prompt"]),
        **about,
    }


def rate(tokens: int, seconds: list[float]) -> float:
    return round(tokens / statistics.median(seconds), 1)


def bare(model: Transformer, texts: int, new: int) -> Callable[[], None]:
    """The matrix products that decoding cannot do without, in float32, as the model's own layers hold the weights."""
    named = model.named_parameters()
    matrices = [w.detach().clone() for name, w in named if w.dim() == 2 and not name.startswith("embed")]
    inputs = {width: torch.randn(texts, width) for width in {w.shape[1] for w in matrices}}

    @torch.inference_mode()
    def products() -> None:
        for _ in range(new):
            for w in matrices:
                F.linear(inputs[w.shape[1]], w)

    return products


def llama_cpp(model: Transformer, directory: Path, kind: str, prompt: list[int], new: int) -> Callable[[], None]:
    """Greedy decoding of the exported model. Its vocabulary has no pieces: only ids are used."""
    import llama_cpp

    described = {
        "pre_tokenizer": {"type": "ByteLevel", "use_regex": True},
        "normalizer": None,
        "model": {"merges": ["a b"]},
    }
    spm = SimpleNamespace(content=json.dumps(described), vocab_size=0, control={}, added={}, bos=0, eos=1, opening=())
    path = directory / f"{kind}.gguf"
    convert_gguf.write(path, model, spm, None, kind)
    threads, length = torch.get_num_threads(), len(prompt) + new
    # llama.cpp 0.3.36 crashes on several tokens in 8 bits at once on a CPU with AMX.
    settings = {"n_ctx": length, "n_threads": threads, "n_threads_batch": threads, "verbose": False}
    llama = llama_cpp.Llama(str(path), n_batch=1 if kind == "q8_0" else 512, **settings)

    def decoded() -> None:
        llama.reset()
        llama.eval(prompt)
        for _ in range(new):
            llama.eval([llama.sample(temp=0.0, repeat_penalty=1.0)])

    return decoded


def main(arguments: argparse.Namespace) -> None:
    print(json.dumps(results(arguments.quick), indent=2))


if __name__ == "__main__":
    p = cli.parser(__doc__, config=False)
    p.add_argument("--quick", action="store_true", help="run everything once, on a small model, and write nothing")
    cli.run(main, p.parse_args())
