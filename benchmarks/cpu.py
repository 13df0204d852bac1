"""Training and generation on a CPU, beside transformers' LLaMA with the same weights and beside bare matrix products.

    python -m benchmarks.cpu [--quick]   ->  benchmarks/results/cpu.json

Everything that is compared is timed in turn, round by round, so a slow minute slows all of it. Results are medians, and
medians of the rounds' ratios.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

import cli
import configs
import machine
from benchmarks import decoding
from benchmarks.common import in_turn, interleaved, once, peak_mib, ratio, training_step, write
from model import Transformer, linear_cross_entropy
from optim import make_optimizers

PROBE = 2048  # the machine's rate is that of a product of two PROBE × PROBE matrices

# ------------------------------------------------------------------------------------------------------------ training

# Ours as train.py trains. Transformers' model as it is by default, then with freed memory kept as ours keeps it, then
# compiled too. All use fused AdamW and clip the gradient.
WAYS = ("ours", "default", "kept", "compiled")


def trainer(way: str, config: str, precision: str, rows: int, length: int) -> Callable[[], dict[str, float]]:
    """A function that makes an optimizer step of one of WAYS on `rows` rows of `length` random tokens."""
    # It returns the step's seconds, the process's peak memory in MiB, and for ours the seconds of bare products.
    torch.manual_seed(0)
    experiment = configs.load(f"configs/{config}.py")
    model = Transformer(experiment.model)
    tokens = torch.randint(experiment.model.vocab_size, (rows, length + 1))
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    if way != "default":
        machine.keep_freed_memory()
    if way == "ours":
        if experiment.pretrain.compile:
            machine.compile_blocks(model, torch.device("cpu"))
        optimizers, loss = make_optimizers(model, experiment.pretrain), lambda: model(x, y)
    else:
        from tests.test_model import to_transformers

        model = to_transformers(model).train()
        optimizers = [torch.optim.AdamW(model.parameters(), fused=True)]
        forward = torch.compile(model) if way == "compiled" else model
        loss = lambda: F.cross_entropy(forward(x, use_cache=False).logits.flatten(0, 1), y.flatten())  # noqa: E731
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")

    def mean_loss() -> torch.Tensor:
        with autocast:
            return loss()

    step = training_step(model, optimizers, mean_loss)
    step(), step()  # compiles
    products, dtype = [], getattr(torch, precision)
    if way == "ours":
        products = [torch.randn(PROBE, PROBE).to(dtype) for _ in range(2)]

    def measured() -> dict[str, float]:
        started = time.perf_counter()
        step()
        found = {"seconds": time.perf_counter() - started, "peak_mib": peak_mib()}
        started = time.perf_counter()
        for _ in range(5 if products else 0):
            torch.mm(*products)
        return found | {"product": (time.perf_counter() - started) / 5}

    return measured


def training(config: str, precision: str, rows: int, length: int, rounds: int, ways=WAYS) -> dict[str, float]:
    """Tokens/s and memory of each way, a step in turn, and the share of the bare product's rate that ours reaches."""
    makers = {way: lambda way=way: trainer(way, config, precision, rows, length) for way in ways}
    answers = in_turn(rounds, makers)
    seconds = {way: [answer["seconds"] for answer in answers[way]] for way in ways}
    peak = {way: round(answers[way][-1]["peak_mib"]) for way in ways}
    tokens, median = rows * length, {way: statistics.median(times) for way, times in seconds.items()}
    shape = configs.load(f"configs/{config}.py").model
    # The keys that a causal query cannot see are half of attention's arithmetic: not counted here.
    flops = tokens * (shape.flops_per_token(length) - 6 * shape.n_layers * shape.d_model * length)
    rates = [flops / s for s in seconds["ours"]]
    products = [2 * PROBE**3 / answer["product"] for answer in answers["ours"]]
    found = {"tokens_per_second": round(tokens / median["ours"]), "peak_mib": peak["ours"]}
    found |= {"of_product_rate": ratio(rates, products), "product_gflops": round(statistics.median(products) / 1e9)}
    others = [way for way in ways if way != "ours"]
    for way in others:
        found[f"transformers_{way}_tokens_per_second"] = round(tokens / median[way])
        found[f"transformers_{way}_peak_mib"] = peak[way]
        found[f"ratio_vs_transformers_{way}"] = ratio(seconds[way], seconds["ours"])
    best = min(others, key=median.get)
    found["ratio_vs_transformers_best"] = found[f"ratio_vs_transformers_{best}"]
    found["memory_ratio"] = round(peak["ours"] / min(peak[way] for way in others), 3)
    return found


def loss(d_model: int, vocabulary: int, rows: int, precision: str, rounds: int) -> dict[str, float]:
    """Milliseconds of projection and cross-entropy, forward and backward: chunked, and with all logits at once."""
    x = torch.randn(rows, d_model, requires_grad=True)
    weight = (0.02 * torch.randn(vocabulary, d_model)).requires_grad_()
    targets = torch.randint(vocabulary, (rows,))

    def step(function: Callable) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            value = function()
        value.backward()

    ways = {
        "chunked": lambda: step(lambda: linear_cross_entropy(x, weight, targets)),
        "plain": lambda: step(lambda: F.cross_entropy(F.linear(x, weight), targets)),
    }
    seconds = interleaved(rounds, ways)
    found = {f"{name}_ms": round(1e3 * statistics.median(s), 1) for name, s in seconds.items()}
    return found | {"ratio_vs_plain": ratio(seconds["plain"], seconds["chunked"])}


def main(arguments: argparse.Namespace) -> None:
    quick = arguments.quick
    if quick:
        found = {"train_demo_float32": training("demo", "float32", 2, 16, 1, ways=("ours", "default"))}
        found["loss_1024_float32"] = loss(16, 1_024, 64, "float32", 1)
        return write("cpu", "python -m benchmarks.cpu", found, quick)
    found = {}
    for precision in ("bfloat16", "float32"):  # each in a process of its own: this one forks, so it must not compute
        found[f"train_tiny_{precision}"] = once("tiny", training, "tiny", precision, 4, 1_024, 7)
        found[f"train_demo_{precision}"] = once("demo", training, "demo", precision, 4, 256, 15)
        found[f"loss_32768_{precision}"] = once("loss", loss, 256, 32_768, 4_096, precision, 9)
        cli.log.info(f"{precision}: done")
    found |= once("decoding", decoding.results)
    write("cpu", "python -m benchmarks.cpu", found)


if __name__ == "__main__":
    p = cli.parser(__doc__, config=False)
    p.add_argument("--quick", action="store_true", help="tiny shapes, once: shows that it runs; writes nothing")
    cli.run(main, p.parse_args())
