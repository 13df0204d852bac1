"""The model against float64, against transformers, and against what must hold for any language model."""

import dataclasses
import math
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import configs
import convert
import model as lumi
from model import KVCache, ModelConfig, Transformer
from tests.conftest import AsOnGPU

SMALL = ModelConfig(vocab_size=97, context_length=24, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48)
UNGROUPED = dataclasses.replace(SMALL, n_kv_heads=None, d_ff=None)
TIED = dataclasses.replace(SMALL, tie_embeddings=True, rope_theta=5e5, rms_norm_eps=1e-6, context_length=256)
device = "cuda" if torch.cuda.is_available() else "cpu"


def build(config: ModelConfig = SMALL, seed: int = 0, scale: float = 10.0) -> Transformer:
    """A model whose weights are large enough for attention and norms to matter."""
    torch.manual_seed(seed)
    model = Transformer(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale) if p.dim() == 2 else p.uniform_(0.5, 1.5)
    return model


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(SMALL.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def relative(x: torch.Tensor, exact: torch.Tensor) -> float:
    """The norm of the error over the norm of the exact tensor."""
    x, exact = x.detach().double(), exact.detach().double()
    return float((x - exact).norm() / exact.norm().clamp_min(1e-30))


# --------------------------------------------------------------------------------------------------------------- shape


@pytest.mark.parametrize(
    ("name", "count"), [("micro", 9_438_336), ("tiny", 23_072_000), ("small", 83_898_880), ("base", 276_861_696)]
)
def test_number_of_parameters(name, count):
    config = configs.load(f"configs/{name}.py").model
    with torch.device("meta"):
        assert Transformer(config).num_parameters() == count
        tied = Transformer(dataclasses.replace(config, tie_embeddings=True))
    assert tied.num_parameters() == count - config.vocab_size * config.d_model


def test_initial_weights():
    torch.manual_seed(0)
    model = Transformer(dataclasses.replace(SMALL, d_model=128, n_layers=8, vocab_size=997))
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            assert (weight == 1).all(), name
            continue
        expected = 0.02 / math.sqrt(16) if name.endswith((".o.weight", ".down.weight")) else 0.02
        assert float(weight.detach().std()) == pytest.approx(expected, rel=0.05), name
        assert abs(float(weight.detach().mean())) < expected / 10, name


IMPOSSIBLE = [("n_layers", 0), ("n_heads", 3), ("n_kv_heads", 3), ("rope_theta", math.nan), ("kernels", "cuda")]
IMPOSSIBLE += [("d_model", 36)]  # a head dimension of 9
IMPOSSIBLE = [(*wrong, ValueError) for wrong in IMPOSSIBLE]
IMPOSSIBLE += [("n_layers", "2", TypeError), ("n_layers", True, TypeError), ("d_ff", 4.0, TypeError)]


@pytest.mark.parametrize(("field", "value", "error"), IMPOSSIBLE)
def test_impossible_configs_are_refused(field, value, error):
    with pytest.raises(error, match=field):
        dataclasses.replace(SMALL, **{field: value})


# ------------------------------------------------------------------------------------------------------------- kernels
# On a CPU, Triton's interpreter runs the kernels.


def rearranged(x: torch.Tensor, memory: str) -> torch.Tensor:
    """The same numbers with other strides: a column slice, a transpose, or every other row."""
    if memory == "columns":
        return torch.cat((x, x), -1)[..., : x.shape[-1]]
    if memory == "transposed":
        return x.mT.contiguous().mT
    if memory == "rows":
        return torch.stack((x, x), -2).flatten(-3, -2)[..., ::2, :]
    return x.clone()


# Allowed beside twice the plain function's own error. In half precision the interpreter truncates where a GPU rounds.
SLACK = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
CASES = [((1, 1), "contiguous"), ((3, 7), "columns"), ((2, 3, 97), "rows"), ((33, 128), "transposed")]
CASES += [((4, 257), "rows"), ((3, 8192), "columns"), ((300, 5), "transposed"), ((20, 2049), "contiguous")]
CASES = [(shape, memory, torch.float32) for shape, memory in CASES]
CASES += [((9, 130), "contiguous", torch.float16), ((257, 64), "contiguous", torch.bfloat16)]


def assert_kernel_agrees(kernel, plain, inputs: list[torch.Tensor], memory: str) -> None:
    """Outputs and gradients of the kernel and the plain function, both compared with the plain function in float64."""
    exact_inputs = [x.double().requires_grad_() for x in inputs]
    exact = plain(*exact_inputs)
    upstream = torch.randn_like(exact)
    exact.backward(upstream)
    errors = []
    for function in (kernel, plain):
        given = [rearranged(x, memory if x.dim() > 1 else "").detach().requires_grad_() for x in inputs]
        before = [x.clone() for x in given]
        y = function(*given)
        y.backward(rearranged(upstream.to(y.dtype), memory))
        assert y.dtype == inputs[0].dtype
        for x, original in zip(given, before, strict=True):
            assert torch.equal(x, original), "an input was written to"
        pairs = [(y, exact), *((a.grad, b.grad) for a, b in zip(given, exact_inputs, strict=True))]
        errors.append([relative(a, b) for a, b in pairs])
    for kernel_error, plain_error in zip(*errors, strict=True):
        assert kernel_error <= 2 * plain_error + SLACK[inputs[0].dtype]


@pytest.mark.parametrize(("shape", "memory", "dtype"), CASES)
@pytest.mark.parametrize(("name", "programs"), [("rms_norm", 512), ("rms_norm", 2), ("swiglu", 512)])
def test_kernel(shape, memory, dtype, name, programs, monkeypatch):
    """With two programs, each sums the gradient of RMSNorm's gains over several tiles."""
    monkeypatch.setattr(lumi, "PROGRAMS", programs)
    torch.manual_seed(0)
    inputs, options = (3 * torch.randn(2, *shape)).to(device, dtype), ()
    x, other = inputs.unbind(0)
    if name == "rms_norm":
        other, options = (torch.rand(shape[-1]) + 0.5).to(device, dtype), (1e-5,)
    functions = []
    for kernels in ("triton", "torch"):
        functions.append(lambda a, b, kernels=kernels: getattr(lumi, name)(a, b, *options, kernels))
    assert_kernel_agrees(*functions, [x, other], memory)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_cross_entropy_masks_ignored_rows(kernels):
    """As on a GPU, where ignored rows are not dropped. One logit is so small that its probability underflows."""
    torch.manual_seed(0)
    logits = torch.randn(5, 8191, device=device)
    logits[0, 3] = -500.0
    targets = torch.tensor([[3, 1], [-100, 2], [0, 3], [-100, 4], [8190, 5]], device=device)[:, 0]  # not contiguous
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none")
    expected.sum().backward()
    losses = lumi.cross_entropy(logits, targets, kernels)
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_cross_entropy_kernel_past_2_to_the_31_elements():
    """Only the pages that are touched take memory."""
    torch.manual_seed(0)
    memory = torch.empty(3 * 2**30 + 64, dtype=torch.float16, device=device)
    logits, targets = memory.as_strided((3, 64), (2**30 + 1, 1)).normal_(), torch.tensor([5, 0, 63], device=device)
    near = logits.clone()
    losses = lumi.cross_entropy(logits, targets, "triton")
    assert torch.equal(losses, lumi.cross_entropy(near, targets, "triton"))
    assert torch.equal(logits, near)


def loss_and_gradient(model, inputs, targets, positions=None, run=None) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    loss = (run or model)(inputs, targets, positions=positions)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.filterwarnings("ignore")  # from torch's compiler
def test_compiled_blocks_are_one_graph_and_agree_with_the_kernels(autocast):
    """Compiled blocks use the plain functions."""
    config = dataclasses.replace(SMALL, kernels="triton")
    model, compiled = build(config).to(device), build(config).to(device)
    tokens = random_tokens(2, 17).to(device)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    for block in compiled.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        results = [loss_and_gradient(each, tokens[:, :-1], tokens[:, 1:]) for each in (compiled, model)]
    (loss, gradient), (expected, expected_gradient) = results
    assert loss == pytest.approx(expected, rel=1e-2 if autocast else 1e-6)
    assert relative(gradient, expected_gradient) < (5e-2 if autocast else 1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # all blocks share it


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_gradient_checkpointing_gives_the_same_gradients_in_less_memory(kernels):
    model = build(dataclasses.replace(SMALL, kernels=kernels, n_layers=3)).to(device)
    tokens, gradients, kept = random_tokens(2, 17).to(device), [], []
    for model.gradient_checkpointing in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=sizes: to.append(t.numel()) or t, lambda t: t):
            gradients.append(loss_and_gradient(model, tokens[:, :-1], tokens[:, 1:]))
        kept.append(sum(sizes))
    assert gradients[0][0] == gradients[1][0]
    assert torch.equal(gradients[0][1], gradients[1][1])
    assert kept[1] < kept[0] / 2


# ---------------------------------------------------------------------------------------------------------------- loss


def loss_case(rows: int, pieces: int = 53, ignored: float = 0.0) -> list[torch.Tensor]:
    """x, weight, targets, and a factor for each target's loss: some are negative, every third is 0."""
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 16, device=device), torch.randn(pieces, 16, device=device)
    targets, factors = torch.randint(pieces, (rows,), device=device), 3 * torch.randn(rows, device=device)
    targets[torch.rand(rows, device=device) < ignored] = -100
    factors[2::3] = 0
    return [x.requires_grad_(), weight.requires_grad_(), targets, factors]


LOSSES = [(530, 97, 0.4, "torch"), (3, 8191, 0, "torch"), (0, 53, 0, "torch"), (4, 53, 1, "torch")]
LOSSES += [(1, 53, 0, "triton"), (40, 2, 0.6, "triton"), (3, 8191, 0, "triton"), (4, 53, 1, "triton")]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("rows", "pieces", "ignored", "kernels"), LOSSES)
def test_loss_equals_cross_entropy_in_float64(rows, pieces, ignored, kernels, reduction, monkeypatch):
    # 384 of the 530 rows are computed, in three chunks, of blocks of 64 rows.
    monkeypatch.setattr(lumi, "CHUNK", 4 * 97 * 150)
    monkeypatch.setattr(lumi, "BLOCK", 4 * 97 * 64)
    x, weight, targets, factors = loss_case(rows, pieces, ignored)
    factors = torch.tensor(3.0, device=device) if reduction == "mean" else factors
    exact_x, exact_w = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = F.cross_entropy(F.linear(exact_x, exact_w), targets, reduction=reduction)
    if reduction == "mean" and not (targets != -100).any():
        exact = (exact_x.sum() + exact_w.sum()) * 0  # where cross_entropy gives NaN
    exact.backward(factors.double())
    for place in {"cpu", device}:  # of the targets: ignored rows are dropped on a CPU, and masked on a GPU
        x.grad = weight.grad = None
        loss = lumi.linear_cross_entropy(x, weight, targets.to(place), kernels=kernels, reduction=reduction)
        loss.backward(factors)
        assert (loss.shape, loss.dtype) == (exact.shape, torch.float32)
        assert relative(loss, exact) < 1e-6
        assert relative(x.grad, exact_x.grad) < 2e-6  # it sums over up to 8,191 pieces
        assert relative(weight.grad, exact_w.grad) < 1e-6


@pytest.mark.skipif(device != "cpu", reason="a GPU masks ignored rows")
def test_the_number_of_trained_tokens_has_few_shapes():
    """oneDNN keeps up to 22 MiB for each shape that it has multiplied: fine-tuning grew by gigabytes."""
    x, weight, targets, _ = loss_case(1000)
    shapes = set()

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket == torch.ops.aten.mm:
                shapes.add(tuple(matrix.shape for matrix in args))
            return function(*args, **(kwargs or {}))

    for trained in range(1, 1000, 13):
        with Shapes():
            lumi.linear_cross_entropy(x, weight, targets.where(torch.arange(1000) < trained, -100))
    assert len(shapes) == 3 * 8  # the logits and two gradients; multiples of 128, and all 1,000


@pytest.mark.parametrize("chunk", [2**28, 2 * 97 * 5])
def test_bfloat16_gradients_are_as_exact_as_those_of_plain_pytorch(chunk, monkeypatch):
    monkeypatch.setattr(lumi, "CHUNK", chunk)
    x, weight, targets, _ = loss_case(530, 97, 0.02)
    exact = torch.autograd.grad(F.cross_entropy(F.linear(x.double(), weight.double()), targets), (x, weight))
    with torch.autocast(device, torch.bfloat16):
        plain = F.cross_entropy(F.linear(x, weight), targets)
        ours = lumi.linear_cross_entropy(x, weight, targets)
    for gradient, usual, value in zip(
        torch.autograd.grad(ours, (x, weight)), torch.autograd.grad(plain, (x, weight)), exact, strict=True
    ):
        assert relative(gradient, value) < 1.5 * relative(usual, value)


def test_the_gradient_of_the_head_does_not_overflow_in_float16():
    x, weight = torch.zeros(4096, 16, device=device), torch.zeros(64, 16, device=device, requires_grad=True)
    x[:, 0], targets = 20.0, torch.zeros(4096, dtype=torch.int64, device=device)
    with torch.autocast(device, torch.float16):
        loss = lumi.linear_cross_entropy(x, weight, targets)
    loss.backward()
    assert weight.grad[0, 0].item() == pytest.approx(-20 * 63 / 64, rel=1e-3)  # before the division: past 65,504


def test_threads_compute_losses_at_once(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    weight, targets = torch.randn(513, 32), torch.arange(512)
    inputs = [torch.randn(512, 32) for _ in range(2)]
    loss = lambda x: float(lumi.linear_cross_entropy(x, weight, targets))  # noqa: E731
    alone = [loss(x) for x in inputs]
    barrier, cross_entropy = threading.Barrier(2, timeout=10), lumi.cross_entropy
    # Both have written their logits before either reads them.
    monkeypatch.setattr(lumi, "cross_entropy", lambda *args: (barrier.wait(), cross_entropy(*args))[1])
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(loss, inputs)) == alone


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_loss_passes_gradcheck_and_frozen_inputs_get_no_gradient(reduction):
    torch.manual_seed(0)
    x, weight = torch.randn(5, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    targets = torch.tensor([3, 6, -100, 0, 1])
    loss = lambda x, w: lumi.linear_cross_entropy(x, w, targets, reduction=reduction)  # noqa: E731
    for learn_x, learn_weight in ((True, True), (True, False), (False, True)):
        assert torch.autograd.gradcheck(loss, (x.requires_grad_(learn_x), weight.requires_grad_(learn_weight)))
    assert not loss(x.requires_grad_(False), weight.requires_grad_(False)).requires_grad
    with pytest.raises(RuntimeError, match="once only"):
        torch.autograd.grad(loss(x.requires_grad_(), weight).sum() ** 2, x, create_graph=True)


@pytest.mark.parametrize("target", [-1, 53])
def test_a_target_outside_the_vocabulary_is_noticed(target):
    x, weight, targets, _ = loss_case(3)
    targets[1] = target
    if device == "cpu":
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            lumi.linear_cross_entropy(x, weight, targets, kernels="torch")
    assert math.isnan(lumi.linear_cross_entropy(x, weight, targets, kernels="triton").item())


# --------------------------------------------------------------------------------------------------------- the network


def to_transformers(model: Transformer):
    """The same weights in transformers' own LLaMA."""
    from transformers import LlamaConfig, LlamaForCausalLM

    described = convert.llama_config(model.config, types.SimpleNamespace(bos=None, eos=None))
    other = LlamaForCausalLM(LlamaConfig(**described))
    other.load_state_dict({convert.theirs(name): weight for name, weight in model.state_dict().items()})
    return other.eval()


@pytest.mark.filterwarnings("ignore")  # from transformers
@pytest.mark.parametrize("config", [SMALL, UNGROUPED, TIED, configs.load("configs/micro.py").model])
def test_agrees_with_transformers(config):
    """Logits within 1e-5 and every gradient within 1e-4, relative to their norms."""
    model = build(config, scale=3.0)
    tokens = torch.randint(config.vocab_size, (2, min(config.context_length, 100)))
    other = to_transformers(model)
    with torch.no_grad():
        assert relative(model(tokens), other(tokens).logits) < 1e-5
    loss, expected = model(tokens[:, :-1], tokens[:, 1:]), other(tokens, labels=tokens).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward(), expected.backward()
    theirs = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        assert relative(parameter.grad, theirs[convert.theirs(name)].grad) < 1e-4


def test_no_position_sees_a_later_one():
    model, tokens = build(), random_tokens(1, 20)
    changed = tokens.clone()
    changed[0, 13] = (changed[0, 13] + 1) % SMALL.vocab_size
    with torch.no_grad():
        a, b = model(tokens), model(changed)
    assert torch.equal(a[:, :13], b[:, :13])
    assert not torch.allclose(a[:, 13:], b[:, 13:])


def test_a_rule_that_shows_later_keys_is_refused(monkeypatch):
    assert lumi.is_causal(131_072)  # without a matrix of its square
    monkeypatch.setattr(lumi, "sees", lambda query, key: (key <= query) | (key < 8))
    with pytest.raises(ValueError, match="lets a query see a later key"):
        build()


def test_too_many_tokens_are_refused():
    model, tokens = build(), torch.zeros(1, 25, dtype=torch.long)
    for options in ({}, {"positions": torch.arange(25)[None]}, {"cache": KVCache(model, 1, 99)}):
        with pytest.raises(ValueError, match="25 tokens; context_length is 24"):
            model(tokens, **options)
    cache = KVCache(model, 1, 99)
    model(tokens[:, :20], cache=cache)
    with pytest.raises(ValueError, match="the cache and the context hold 24"):
        model(tokens[:, :5], cache=cache)
    with pytest.raises(ValueError, match="reduction is 'sum'"):
        model(tokens[:, :4], tokens[:, :4], reduction="sum")


# --------------------------------------------------------------------------------------------------------- packed rows

ROWS = st.lists(  # for each row its texts: a length, and for each other ending where it branches off and its length
    st.lists(
        st.tuples(st.integers(1, 12), st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), max_size=3)),
        min_size=1,
        max_size=3,
    ),
    min_size=1,
    max_size=3,
)


def pack(rows: list, seed: int) -> tuple[torch.Tensor, torch.Tensor, list]:
    """Tokens and positions, (B, T) each; and for each text its row, its place there, and all its tokens (1, length)."""
    draw, packed, texts = torch.Generator().manual_seed(seed), [], []
    for row in rows:
        tokens, positions = [], []
        for length, endings in row:
            base = torch.randint(SMALL.vocab_size, (length,), generator=draw)
            for shared, count in [(0, length), *endings]:
                shared = min(shared, length)
                if shared and shared == positions[-1] + 1:  # continues the text before it, so it is not another ending
                    continue
                ending = torch.randint(SMALL.vocab_size, (count,), generator=draw) if shared else base
                text = torch.cat([base[:shared], ending])
                texts.append((len(packed), slice(len(tokens), len(tokens) + count), text[None]))
                tokens += ending.tolist()
                positions += range(shared, shared + count)
        packed.append((tokens, positions))
    longest = max(len(tokens) for tokens, _ in packed)
    for tokens, positions in packed:  # texts of one token fill the rows
        positions += [0] * (longest - len(tokens))
        tokens += [1] * (longest - len(tokens))
    return torch.tensor([row[0] for row in packed]), torch.tensor([row[1] for row in packed]), texts


@pytest.mark.parametrize(("config", "recomputed"), [(UNGROUPED, False), (SMALL, True)])
@given(rows=ROWS, seed=st.integers(0, 9))
def test_texts_in_packed_rows_get_the_losses_and_gradients_they_get_alone(config, recomputed, rows, seed):
    """A text whose beginning others share has the sum of their gradients."""
    model = build(config, scale=3.0).double()
    tokens, positions, texts = pack(rows, seed)
    draw = torch.Generator().manual_seed(seed)
    targets = torch.randint(SMALL.vocab_size, tokens.shape, generator=draw)
    targets[torch.rand(tokens.shape, generator=draw) < 0.3] = -100
    targets[:, 0] = 5  # each row has a target
    factors = torch.randn(tokens.shape, dtype=torch.float64, generator=draw)
    counted, alone = torch.zeros_like(factors), 0.0
    for row, place, text in texts:
        count = place.stop - place.start
        counted[row, place] = 1
        padded = F.pad(targets[row, place], (text.shape[1] - count, 0), value=-100)[None]
        losses = model(text, padded, reduction="none")[0, -count:]
        alone = alone + (losses * factors[row, place]).sum()
    model.gradient_checkpointing = recomputed
    together = (model(tokens, targets, positions=positions, reduction="none") * factors * counted).sum()
    assert together.item() == pytest.approx(alone.item(), rel=1e-10, abs=1e-10)
    ours, theirs = (torch.autograd.grad(loss, list(model.parameters())) for loss in (together, alone))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "wrong",
    [
        [0, 1, 2, 4, 5, 6],  # branches off after 4 tokens of 3
        [0, 1, 2, 1, 5, 6],
        [0, 1, 0, 2, 3, 4],  # the last text that starts at 0 has two tokens
        [0, 1, 2, -1, 0, 1],
        [1, 2, 3, 1, 2, 3],
    ],
)
def test_impossible_positions_are_refused(wrong):
    good = list(range(6))
    for rows in ([wrong], [good, wrong], [wrong, good]):
        with pytest.raises(ValueError, match="do not count from 0 in each text"):
            build()(torch.zeros(len(rows), 6).long(), positions=torch.tensor(rows))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.skipif(device == "cuda", reason="pretends to be a GPU, on a CPU")
def test_attention_asks_a_gpu_for_kernels_that_it_has(half):
    """cuDNN only for rows of one shape; float32 and masks without shared heads; and the result stays the same."""
    model = build(dataclasses.replace(SMALL, kernels="torch"), scale=3.0).eval()
    for p in model.parameters():
        p.data = p.data.to(torch.bfloat16 if half else torch.float32)
    tokens, positions, _ = pack([[(7, [(3, 4)]), (5, [])]], 0)

    def read(name: str) -> torch.Tensor:
        cache = KVCache(model, 1, 20)
        if name == "plain":
            return model(tokens)
        if name == "packed":
            return model(tokens, positions=positions)
        return torch.cat([model(part, cache=cache) for part in tokens.split([9, 6, 1], 1)], 1)  # of the 6, with a mask

    shared, copied = (SMALL.n_kv_heads, True), (SMALL.n_heads, False)
    expected = {"plain": [shared], "packed": [shared] * 3, "cached": [shared, copied, shared]}
    with torch.no_grad():
        for name, heads in expected.items():
            with AsOnGPU() as gpu:
                logits = read(name)
            cudnn = name == "plain"
            assert set(gpu.attention) == {(*kind, cudnn) for kind in (heads if half else [copied])}, name
            assert relative(logits, read(name)) < (2e-2 if half else 1e-6)
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_packed_rows_are_copied_to_a_gpu_without_waiting():
    _, positions, _ = pack([[(7, [(3, 4)]), (5, [])]], 0)
    with AsOnGPU() as gpu:
        lumi.Packed(build(), positions, torch.device("cuda"))
    assert len(gpu.copied) == 3
    assert all(copied is pinned for copied, pinned in zip(gpu.copied, gpu.pinned, strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # from torch's compiler
def test_compiled_blocks_take_packed_rows():
    """The lengths of the texts change from batch to batch."""
    torch.compiler.reset()
    model, compiled = build(scale=3.0), build(scale=3.0)
    for block in compiled.blocks:
        block.compile()
    for lengths in ([9, 4, 3], [16], [1, 1, 7, 7]):
        tokens, positions, _ = pack([[(length, []) for length in lengths]], 0)
        loss, gradient = loss_and_gradient(compiled, tokens, tokens, positions)
        expected, expected_gradient = loss_and_gradient(model, tokens, tokens, positions)
        assert loss == pytest.approx(expected, rel=1e-5)
        assert relative(gradient, expected_gradient) < 1e-5
