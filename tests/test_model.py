"""The model against float64, against transformers, and against what must be true of any language model."""

import dataclasses
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import configs
import convert
import generate
import model as lumi
from generate import Continuation, Decoder, Sampling
from model import ModelConfig, Transformer
from tests.conftest import ROOT

SMALL = ModelConfig(vocab_size=97, context_length=24, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48)
device = "cuda" if torch.cuda.is_available() else "cpu"


def build(config: ModelConfig = SMALL, seed: int = 0, scale: float = 10.0) -> Transformer:
    """A model whose weights are large enough for attention and norms to matter."""
    torch.manual_seed(seed)
    model = Transformer(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale) if p.dim() == 2 else p.uniform_(0.5, 1.5)
    return model


# --------------------------------------------------------------------------------------------------------------- shape


@pytest.mark.parametrize(
    ("name", "count"), [("micro", 9_438_336), ("tiny", 23_072_000), ("small", 83_898_880), ("base", 276_861_696)]
)
def test_counts_its_parameters(name, count):
    with torch.device("meta"):
        assert Transformer(configs.load(f"configs/{name}.py").model).num_parameters() == count


def test_tied_embeddings_count_once():
    tied = Transformer(dataclasses.replace(SMALL, tie_embeddings=True))
    assert Transformer(SMALL).num_parameters() - tied.num_parameters() == SMALL.vocab_size * SMALL.d_model


@pytest.mark.parametrize("name", ["demo", "micro", "tiny", "small"])
def test_first_loss_is_that_of_a_uniform_guess(name):
    config = configs.load(f"configs/{name}.py").model
    torch.manual_seed(0)
    tokens = torch.randint(config.vocab_size, (2, 129))
    with torch.no_grad():
        loss = Transformer(config)(tokens[:, :-1], tokens[:, 1:])
    assert float(loss) == pytest.approx(math.log(config.vocab_size), rel=0.02)


def test_weights_are_drawn_as_the_rule_says():
    torch.manual_seed(0)
    model = Transformer(dataclasses.replace(SMALL, d_model=128, n_layers=8, vocab_size=997))
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            assert (weight == 1).all(), name
            continue
        residual = name.endswith((".o.weight", ".down.weight"))
        expected = 0.02 / math.sqrt(16) if residual else 0.02
        assert float(weight.detach().std()) == pytest.approx(expected, rel=0.05), name
        assert abs(float(weight.detach().mean())) < expected / 10, name


@pytest.mark.parametrize(
    "changes",
    [
        {"n_layers": 0},
        {"n_heads": 3},
        {"d_model": 36},  # head dimension 9: odd
        {"n_kv_heads": 3},
        {"rope_theta": math.nan},
        {"rms_norm_eps": -1.0},
        {"kernels": "cuda"},
    ],
)
def test_impossible_shapes_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        dataclasses.replace(SMALL, **changes)


@pytest.mark.skipif(device == "cuda", reason="there is a GPU")
def test_triton_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="needs the package triton and a GPU"):
        dataclasses.replace(SMALL, kernels="triton")


def test_wrong_types_are_refused():
    for changes in ({"n_layers": "2"}, {"n_layers": True}, {"d_ff": 4.0}, {"tie_embeddings": 1}):
        with pytest.raises(TypeError, match=next(iter(changes))):
            dataclasses.replace(SMALL, **changes)


# ------------------------------------------------------------------------------------------------------------- kernels


def as_strided(x: torch.Tensor, how: str) -> torch.Tensor:
    """The same values in another layout: a column slice, a transpose, every other row, or one row expanded."""
    if how == "columns":
        return torch.cat((x, x), -1)[..., : x.shape[-1]]
    if how == "transposed":
        return x.mT.contiguous().mT
    if how == "every other row":
        return torch.stack((x, x), -2).flatten(-3, -2)[..., ::2, :]
    return x.clone()


LAYOUTS = ["contiguous", "columns", "transposed", "every other row"]
SHAPES = [(1, 1), (3, 7), (5, 64), (2, 3, 97), (33, 128), (4, 257), (3, 1021), (2, 8191), (3, 8192), (300, 5)]
SHAPES += [(20, 2049), (1031, 4)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Beside twice the twin's own error. In half precision the interpreter truncates where a GPU rounds.
SLACK = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
if device == "cuda":
    SLACK |= {torch.float16: 1e-4, torch.bfloat16: 1e-3}


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def compare(kernel, twin, inputs: list[torch.Tensor], layout: str = "contiguous") -> None:
    """Kernel and twin against the twin in float64, forward and backward, as flash-attention's tests do.

    The error of each output and gradient, relative to its norm, is at most twice the twin's plus SLACK.
    """
    outputs = lambda found: found if isinstance(found, tuple) else (found,)  # noqa: E731
    exact_inputs = [x.double().requires_grad_() for x in inputs]
    exact = outputs(twin(*exact_inputs))
    dtypes = [found.dtype for found in outputs(twin(*inputs))]
    upstream = [
        torch.randn(y.shape, dtype=torch.float64, device=device).to(d) for y, d in zip(exact, dtypes, strict=True)
    ]
    torch.autograd.backward(exact, [g.double() for g in upstream])
    errors = []
    for function in (kernel, twin):
        given = [as_strided(x, layout if x.dim() > 1 else "").detach().requires_grad_() for x in inputs]
        before = [x.clone() for x in given]
        found = outputs(function(*given))
        torch.autograd.backward(found, [as_strided(g, layout) for g in upstream])
        assert [y.dtype for y in found] == dtypes
        assert [x.grad.dtype for x in given] == [x.dtype for x in inputs]
        assert all(torch.equal(a, b) for a, b in zip(before, given, strict=True)), "an input was written to"
        pairs = [*zip(found, exact, strict=True), *((a.grad, b.grad) for a, b in zip(given, exact_inputs, strict=True))]
        errors.append([relative(a.detach(), b.detach()) for a, b in pairs])
    slack = max(SLACK[x.dtype] for x in inputs)
    for kernel_error, twin_error in zip(*errors, strict=True):
        assert kernel_error <= 2 * twin_error + slack


def norm_inputs(shape: tuple, *dtypes: torch.dtype) -> list[torch.Tensor]:
    """As many tensors of a shape as there are dtypes, and a weight in the first of them."""
    torch.manual_seed(0)
    xs = [(3 * torch.randn(shape, device=device)).to(dtype) for dtype in dtypes]
    return [*xs, (torch.rand(shape[-1], device=device) + 0.5).to(dtypes[0])]


def plain_rms_norm(x, weight):
    return lumi.rms_norm(x, weight, 1e-5, "torch")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_kernel(shape, layout):
    kernel = lambda x, w: lumi.rms_norm(x, w, 1e-5, "triton")  # noqa: E731
    compare(kernel, plain_rms_norm, norm_inputs(shape, torch.float32), layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu_kernel(shape, layout):
    torch.manual_seed(0)
    gate, up = torch.randn(shape, device=device) * 3, torch.randn(shape, device=device)
    compare(lambda g, u: lumi.swiglu(g, u, "triton"), lumi.swiglu_torch, [gate, up], layout)


@pytest.mark.parametrize("shape", [(9, 130), (3, 8191), (257, 64)])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_kernels_in_half_precision(dtype, shape):
    kernel = lambda x, w: lumi.rms_norm(x, w, 1e-5, "triton")  # noqa: E731
    compare(kernel, plain_rms_norm, norm_inputs(shape, dtype))
    gate, up, _ = norm_inputs(shape, dtype, dtype)
    compare(lambda g, u: lumi.swiglu(g, u, "triton"), lumi.swiglu_torch, [gate, up])


def far_apart(rows: int, columns: int) -> torch.Tensor:
    """Rows whose offsets pass 2³¹ elements; only the pages that are touched take memory."""
    x = torch.empty(rows * 2**30 + columns, dtype=torch.float16, device=device)
    return x.as_strided((rows, columns), (2**30 + 1, 1)).normal_()


def test_cross_entropy_reaches_past_2_to_the_31_elements():
    torch.manual_seed(0)
    logits, targets = far_apart(3, 64), torch.tensor([5, 0, 63], device=device)
    near = logits.clone()
    losses = lumi.cross_entropy(logits, targets, -100, "triton")
    assert torch.equal(losses, lumi.cross_entropy(near, targets, -100, "triton"))
    assert torch.equal(logits, near)


def test_kernels_take_no_rows():
    x = torch.empty(0, 8, device=device, requires_grad=True)
    weight = torch.ones(8, device=device, requires_grad=True)
    lumi.rms_norm(x, weight, 1e-5, "triton").sum().backward()
    assert x.grad.shape == (0, 8)
    assert weight.grad.abs().sum() == 0
    gate = torch.empty(0, 8, device=device, requires_grad=True)
    assert lumi.swiglu(gate, gate, "triton").shape == (0, 8)


def test_rms_norm_backward_where_a_program_takes_several_tiles():
    kernel = lambda x, w: lumi.rms_norm(x, w, 1e-5, "triton")  # noqa: E731
    compare(kernel, plain_rms_norm, norm_inputs((600, 4096), torch.float32))


# Compiles every kernel for an H100 (no GPU is needed for that), in a process where Triton is not interpreted.
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import model
sizes = dict.fromkeys("DRC", "constexpr")
norm = {"x": "*bf16", "weight": "*fp32", "scale": "*fp32", "rows": "i32"} | sizes
swiglu = dict.fromkeys(("gate", "up", "y", "dy", "dgate", "dup"), "*bf16") | {"n": "i32"} | sizes
tile = {"D": 768, "R": 4, "C": 1024}
cases = [
    (model.rms_norm_forward_kernel, norm | {"y": "*bf16", "eps": "fp32"}, tile),
    (model.rms_norm_backward_kernel, norm | {"dy": "*bf16", "dx": "*bf16", "dw": "*fp32"}, tile),
    (model.swiglu_forward_kernel, swiglu, {"C": 1024}),
    (model.swiglu_backward_kernel, swiglu, {"C": 1024}),
    (model.cross_entropy_kernel, {"logits": "*bf16", "targets": "*i64", "losses": "*fp32", "stride": "i32", "V": "i32",
     "ignore_index": "i32", "C": "constexpr"}, {"C": 4096}),
]
for kernel, types, constants in cases:
    types = {name: types[name] for name in kernel.arg_names}
    compiled = triton.compile(ASTSource(kernel, types, constants), target=GPUTarget("cuda", 90, 32))
    print(kernel.__name__, len(compiled.asm["cubin"]))
"""


def test_kernels_compile_for_a_gpu():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("_kernel") == 5


def test_twins_pass_gradcheck():
    torch.manual_seed(0)
    x, delta = torch.randn(2, 3, 5, dtype=torch.float64).unbind(0)
    weight = torch.rand(5, dtype=torch.float64).requires_grad_()
    x.requires_grad_(), delta.requires_grad_()
    assert torch.autograd.gradcheck(plain_rms_norm, (x, weight))
    assert torch.autograd.gradcheck(lumi.swiglu_torch, (x, delta))


def loss_and_gradient(model, run, tokens, autocast=False) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        loss = run(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


def test_whole_model_with_kernels_equals_the_twins():
    tokens = torch.randint(SMALL.vocab_size, (2, 17), device=device)
    models = [build(dataclasses.replace(SMALL, kernels=kernels)).to(device) for kernels in ("triton", "torch")]
    (a, da), (b, db) = (loss_and_gradient(model, model, tokens) for model in models)
    assert a == pytest.approx(b, rel=1e-6)
    assert relative(da, db.double()) < 1e-5


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.filterwarnings("ignore")  # of torch's own compiler
def test_compiled_blocks_are_one_graph(kernels, autocast):
    model = build(dataclasses.replace(SMALL, kernels=kernels)).to(device)
    compiled = build(dataclasses.replace(SMALL, kernels=kernels)).to(device)
    tokens = torch.randint(SMALL.vocab_size, (2, 17), device=device)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    for block in compiled.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    (a, da), (b, db) = (loss_and_gradient(run, run, tokens, autocast) for run in (model, compiled))
    assert a == pytest.approx(b, rel=1e-2 if autocast else 1e-6)
    assert relative(da, db.double()) < (5e-2 if autocast else 1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # all blocks share one


# ---------------------------------------------------------------------------------------------------------------- loss


def loss_case(rows: int, pieces: int = 53) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 16, device=device), torch.randn(pieces, 16, device=device)
    return x.requires_grad_(), weight.requires_grad_(), torch.randint(pieces, (rows,), device=device)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize(("rows", "pieces"), [(1, 53), (512, 53), (513, 2), (1100, 97), (3, 8191)])
@pytest.mark.parametrize("ignored", [0.0, 0.6])
def test_loss_equals_cross_entropy_in_float64(rows, pieces, ignored, kernels):
    x, weight, targets = loss_case(rows, pieces)
    targets[torch.rand(rows, device=device) < ignored] = -100
    targets[0] = 1  # one is left
    exact_x, exact_w = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = F.cross_entropy(F.linear(exact_x, exact_w), targets)
    (3 * exact).backward()
    places = {"cpu", device}  # of the targets: ignored rows are dropped on a CPU, and masked on a GPU
    for place in places:
        x.grad = weight.grad = None
        loss = lumi.linear_cross_entropy(x, weight, targets.to(place), kernels=kernels)
        (3 * loss).backward()
        assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
        assert relative(x.grad, exact_x.grad) < 1e-6
        assert relative(weight.grad, exact_w.grad) < 1e-6


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_cross_entropy_masks_what_it_is_told_to_ignore(kernels):
    """As on a GPU, where ignored rows are not dropped."""
    logits = torch.randn(5, 37, device=device)
    targets = torch.tensor([[3, 1], [-1, 2], [0, 3], [-1, 4], [36, 5]], device=device)[:, 0]  # not contiguous
    exact = logits.double().requires_grad_()
    each = F.cross_entropy(exact, targets, ignore_index=-1, reduction="none")
    each.sum().backward()
    losses = lumi.cross_entropy(logits, targets, -1, kernels)
    torch.testing.assert_close(losses.double(), each.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_ignored_rows_are_never_projected():
    x, weight, targets = loss_case(6)
    targets = targets.cpu()
    targets[[1, 4]] = 7
    with torch.no_grad():
        x[[1, 4]] = math.nan
    loss = lumi.linear_cross_entropy(x, weight, targets, ignore_index=7)
    loss.backward()
    assert math.isfinite(loss.item())
    assert x.grad[[1, 4]].abs().sum() == 0
    assert torch.isfinite(weight.grad).all()


def test_a_loss_of_nothing_is_zero():
    x, weight, targets = loss_case(4)
    loss = lumi.linear_cross_entropy(x, weight, targets.fill_(-100))
    loss.backward()
    assert loss == 0
    assert x.grad.abs().sum() == weight.grad.abs().sum() == 0


def test_what_is_frozen_gets_no_gradient():
    x, weight, targets = loss_case(20)
    lumi.linear_cross_entropy(x, weight, targets).backward()
    whole_x, whole_w = x.grad, weight.grad
    for frozen, learning, whole in ((weight, x, whole_x), (x, weight, whole_w)):
        x.grad = weight.grad = None
        frozen.requires_grad_(False)
        lumi.linear_cross_entropy(x, weight, targets).backward()
        assert frozen.grad is None
        assert torch.equal(learning.grad, whole)
        frozen.requires_grad_(True)


def test_a_second_derivative_is_refused():
    x, weight, targets = loss_case(5)
    with pytest.raises(RuntimeError, match="once only"):
        torch.autograd.grad(lumi.linear_cross_entropy(x, weight, targets) ** 2, x, create_graph=True)


@pytest.mark.parametrize("targets", [torch.zeros(4, dtype=torch.long), torch.zeros(3), torch.zeros(3, 1).long()])
def test_targets_that_do_not_fit_are_refused(targets):
    x, weight, _ = loss_case(3)
    with pytest.raises(ValueError, match=r"expected \(N, D\) and \(N,\) int64"):
        lumi.linear_cross_entropy(x, weight, targets)


def test_kernels_refuse_shapes_that_do_not_fit():
    x, weight = norm_inputs((4, 33), torch.float32)
    with pytest.raises(ValueError, match="do not fit"):
        lumi.rms_norm(x, weight[:7], 1e-5, "triton")
    with pytest.raises(ValueError, match="one shape"):
        lumi.swiglu(x, x[:1], "triton")


def test_loss_passes_gradcheck():
    torch.manual_seed(0)
    x, weight = torch.randn(5, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    targets = torch.tensor([3, 6, -100, 0, 1])
    check = lambda x, w: lumi.linear_cross_entropy(x, w, targets)  # noqa: E731
    assert torch.autograd.gradcheck(check, (x.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_loss_of_a_target_that_underflows_is_finite(kernels):
    x, weight = torch.tensor([[1.0]], device=device), torch.tensor([[0.0], [500.0]], device=device)
    assert float(lumi.linear_cross_entropy(x, weight, torch.tensor([0]), kernels=kernels)) == 500.0


@pytest.mark.parametrize("target", [-1, 53])
def test_a_target_that_is_no_piece_is_never_taken_silently(target):
    x, weight, targets = loss_case(3)
    targets[1] = target
    if device == "cpu":
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            lumi.linear_cross_entropy(x, weight, targets, kernels="torch")
    assert math.isnan(lumi.linear_cross_entropy(x, weight, targets, kernels="triton").item())


@pytest.mark.parametrize(
    ("rows", "pieces", "kernels"),
    [
        *((rows, pieces, "torch") for rows, pieces in [(1, 53), (512, 53), (513, 2), (1100, 97), (3, 8191)]),
        *((rows, pieces, "triton") for rows, pieces in [(1, 53), (40, 97), (3, 8191)]),
        pytest.param(1100, 97, "triton", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("ignored", [0.0, 0.6])
def test_each_loss_equals_that_of_cross_entropy_in_float64(rows, pieces, ignored, kernels):
    """And the gradients, where every term counts by another factor: negative, 0, or large."""
    x, weight, targets = loss_case(rows, pieces)
    targets[torch.rand(rows, device=device) < ignored] = -100
    targets[0] = 1  # one is left
    factors = 3 * torch.randn(rows, device=device)
    factors[2::3] = 0
    exact_x, exact_w = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = F.cross_entropy(F.linear(exact_x, exact_w), targets, reduction="none")
    exact.backward(factors.double())
    for place in {"cpu", device}:  # of the targets
        x.grad = weight.grad = None
        losses = lumi.linear_cross_entropy(x, weight, targets.to(place), kernels=kernels, reduction="none")
        losses.backward(factors)
        assert losses.shape == (rows,)
        assert losses.dtype == torch.float32
        assert relative(losses.detach(), exact.detach()) < 1e-6
        assert losses[targets == -100].abs().sum() == 0
        assert relative(x.grad, exact_x.grad) < 1e-6
        assert relative(weight.grad, exact_w.grad) < 1e-6


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 700), ignored=st.floats(0, 1), at=st.integers(0, 3), seed=st.integers(0, 9))
def test_each_loss_in_float64(rows, ignored, at, seed):
    """To the last digits; what is ignored may be any number, and of the two inputs any may be frozen."""
    draw = torch.Generator().manual_seed(seed)
    x, weight, factors = (
        torch.randn(*shape, dtype=torch.float64, generator=draw) for shape in ((rows, 7), (19, 7), (rows,))
    )
    targets = torch.randint(19, (rows,), generator=draw)
    targets[torch.rand(rows, generator=draw) < ignored] = -7
    learning = [tensor.requires_grad_() for i, tensor in enumerate((x, weight)) if at in (i, 2)]
    found = lumi.linear_cross_entropy(x, weight, targets, ignore_index=-7, reduction="none")
    exact = F.cross_entropy(F.linear(x, weight), targets, ignore_index=-7, reduction="none")
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
    assert found.requires_grad == bool(learning)
    if learning:
        ours, theirs = (torch.autograd.grad(losses, learning, factors) for losses in (found, exact))
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_each_loss_passes_gradcheck():
    torch.manual_seed(0)
    x, weight = torch.randn(5, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    targets = torch.tensor([3, 6, -100, 0, 1])
    check = lambda x, w: lumi.linear_cross_entropy(x, w, targets, reduction="none")  # noqa: E731
    assert torch.autograd.gradcheck(check, (x.requires_grad_(), weight.requires_grad_()))


def test_the_mean_is_that_of_each_loss():
    x, weight, targets = loss_case(700)
    targets[5:400] = -100
    mean = lumi.linear_cross_entropy(x, weight, targets)
    each = lumi.linear_cross_entropy(x, weight, targets, reduction="none").sum() / 305
    assert mean.item() == pytest.approx(each.item(), rel=1e-6)
    for ours, theirs in zip(
        torch.autograd.grad(mean, (x, weight)), torch.autograd.grad(each, (x, weight)), strict=True
    ):
        assert relative(ours, theirs.double()) < 1e-6


def test_each_loss_of_rows_that_are_ignored_or_not_there():
    x, weight, targets = loss_case(6)
    targets = targets.cpu()
    targets[[1, 4]] = 7
    with torch.no_grad():
        x[[1, 4]] = math.nan
    losses = lumi.linear_cross_entropy(x, weight, targets, ignore_index=7, reduction="none")
    losses.sum().backward()
    assert losses.isfinite().all()
    assert (losses != 0).tolist() == (targets != 7).tolist()
    assert x.grad[[1, 4]].abs().sum() == 0
    assert torch.isfinite(weight.grad).all()
    for rows in (0, 4):
        x, weight, targets = loss_case(rows)
        losses = lumi.linear_cross_entropy(x, weight, targets.fill_(-100), reduction="none")
        losses.sum().backward()
        assert torch.equal(losses, losses.new_zeros(rows))
        assert x.grad.shape == x.shape
        assert x.grad.abs().sum() == weight.grad.abs().sum() == 0


def test_a_second_derivative_of_each_loss_is_refused():
    x, weight, targets = loss_case(5)
    losses = lumi.linear_cross_entropy(x, weight, targets, reduction="none")
    with pytest.raises(RuntimeError, match="once only"):
        torch.autograd.grad(losses.sum() ** 2, x, create_graph=True)


def test_each_loss_of_a_model_is_that_of_its_logits():
    model, tokens = build(scale=3.0).double(), torch.randint(SMALL.vocab_size, (3, 21))
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[torch.rand(targets.shape) < 0.4] = -100
    factors = torch.randn(targets.shape, dtype=torch.float64)
    found = model(inputs, targets, reduction="none")
    exact = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="none").view(3, 20)
    assert found.shape == (3, 20)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
    assert (found == 0).tolist() == (targets == -100).tolist()
    parameters = list(model.parameters())
    ours, theirs = (torch.autograd.grad(losses, parameters, factors) for losses in (found, exact))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_another_reduction_is_refused():
    x, weight, targets = loss_case(3)
    with pytest.raises(ValueError, match=r'^reduction is .sum.; expected "mean" or "none"$'):
        lumi.linear_cross_entropy(x, weight, targets, reduction="sum")
    with pytest.raises(ValueError, match=r"^reduction is 'sum'"):
        build()(torch.zeros(1, 4).long(), torch.zeros(1, 4).long(), reduction="sum")


# --------------------------------------------------------------------------------------------------------- the network


def to_transformers(model: Transformer):
    """The same weights in transformers' own LLaMA."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    other = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.d_model,
            intermediate_size=c.d_ff or 4 * c.d_model,
            num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads,
            num_key_value_heads=c.n_kv_heads or c.n_heads,
            max_position_embeddings=c.context_length,
            rms_norm_eps=c.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
            tie_word_embeddings=c.tie_embeddings,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    weights = {convert.theirs(name): weight for name, weight in model.state_dict().items()}
    other.load_state_dict(weights)
    return other.eval()


GROUPED = dataclasses.replace(SMALL, tie_embeddings=True, rope_theta=5e5, rms_norm_eps=1e-6, context_length=256)


@pytest.mark.filterwarnings("ignore")  # of the other library
@pytest.mark.parametrize("name", ["micro", "tiny", "grouped, tied", "grouped", "wide"])
def test_agrees_with_transformers(name):
    """Logits within 1e-5 and every gradient within 1e-4, relative to their norms."""
    others = {
        "grouped, tied": GROUPED,
        "grouped": SMALL,
        "wide": dataclasses.replace(SMALL, n_kv_heads=None, d_ff=None),
    }
    config = others[name] if name in others else configs.load(f"configs/{name}.py").model
    model = build(config, scale=3.0)
    tokens = torch.randint(config.vocab_size, (2, min(config.context_length, 200)))
    other = to_transformers(model)
    with torch.no_grad():
        assert relative(model(tokens), other(tokens).logits.double()) < 1e-5
    loss, their_loss = model(tokens[:, :-1], tokens[:, 1:]), other(tokens, labels=tokens).loss
    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-5)
    loss.backward(), their_loss.backward()
    theirs = dict(other.named_parameters())
    for ours, parameter in model.named_parameters():
        assert relative(parameter.grad, theirs[convert.theirs(ours)].grad.double()) < 1e-4


def test_no_position_sees_a_later_one():
    model = build()
    tokens = torch.randint(SMALL.vocab_size, (1, 20))
    changed = tokens.clone()
    changed[0, 13] = (changed[0, 13] + 1) % SMALL.vocab_size
    with torch.no_grad():
        a, b = model(tokens), model(changed)
    assert torch.equal(a[:, :13], b[:, :13])
    assert not torch.allclose(a[:, 13:], b[:, 13:])


def test_rotation_makes_attention_depend_on_distance_alone():
    model = build()
    q, k = torch.randn(2, 1, 1, 1, SMALL.head_dim).unbind(0)
    turn = lambda x, at: lumi.rotate(x, model.cos[at : at + 1], model.sin[at : at + 1])  # noqa: E731
    products = [float((turn(q, 5 + shift) * turn(k, shift)).sum()) for shift in range(10)]
    assert products == pytest.approx([products[0]] * 10, abs=1e-4)
    assert float((turn(q, 9) * turn(k, 0)).sum()) != pytest.approx(products[0], abs=1e-3)


def test_more_tokens_than_the_context_are_refused():
    model, tokens = build(), torch.zeros(1, 25, dtype=torch.long)
    with pytest.raises(ValueError, match="context_length is 24"):
        model(tokens)
    with pytest.raises(ValueError, match="context_length is 24"):
        model(tokens, positions=torch.arange(25)[None])
    with pytest.raises(ValueError, match="25 tokens; context_length is 24"):
        model(tokens, cache=lumi.KVCache(model, 1, 99))
    cache = lumi.KVCache(model, 1, 99)
    model(tokens[:, :20], cache=cache)
    with pytest.raises(ValueError, match="the cache and the context hold 24"):
        model(tokens[:, :5], cache=cache)


def test_arguments_that_do_not_go_together_are_refused():
    model, tokens = build(), torch.zeros(1, 4, dtype=torch.long)
    for options in ({"cache": lumi.KVCache(model, 1, 9), "positions": torch.arange(4)[None]}, {"mask": tokens > 0}):
        with pytest.raises(ValueError, match="a mask goes with positions only"):
            model.hidden(tokens, **options)


def test_a_rule_that_shows_later_keys_is_refused(monkeypatch):
    monkeypatch.setattr(lumi, "sees", lambda query, key: (key <= query) | (key < 8))
    with pytest.raises(ValueError, match="lets a query see a later key"):
        build()


def test_a_long_context_is_recognised_as_causal_without_its_square():
    assert lumi.is_causal(131_072)


# -------------------------------------------------------------------------------------------------------- packed rows


def packed_row(lengths: list[int], seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Texts of these lengths; the row that holds them, and its positions, (1, T) each."""
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randint(SMALL.vocab_size, (1, n), generator=generator) for n in lengths]
    return texts, torch.cat(texts, 1), torch.cat([torch.arange(n) for n in lengths])[None]


HEADS = {"one a query": dataclasses.replace(SMALL, n_kv_heads=None), "grouped": SMALL}


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.lists(st.integers(1, 24), min_size=1, max_size=6), min_size=1, max_size=3))
def test_a_text_in_a_packed_row_gets_the_logits_it_gets_alone(heads, dtype, near, lengths):
    """Rows may be longer than the context; several of them are filled up to one length with a text more."""
    model, longest = build(HEADS[heads], scale=3.0).to(dtype), max(map(sum, lengths))
    rows = [packed_row([*row, *[1] * (longest - sum(row))], seed) for seed, row in enumerate(lengths)]
    with torch.no_grad():
        found = model(torch.cat([row[1] for row in rows]), positions=torch.cat([row[2] for row in rows]))
        for logits, (texts, _, _) in zip(found, rows, strict=True):
            alone = torch.cat([model(text)[0] for text in texts])
            assert float((logits - alone).abs().max()) < near * float(alone.abs().max())


def test_positions_that_count_through_change_nothing():
    model, (_, tokens, positions) = build(), packed_row([20])
    assert relative(model(tokens, positions=positions).detach(), model(tokens).detach().double()) < 1e-6


def conversations(lengths: list[int], seed: int = 0, trained: float = 0.6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets of texts, (1, T) each, of which a part is trained: their last target at least."""
    generator, found = torch.Generator().manual_seed(seed), []
    for n in lengths:
        tokens = torch.randint(SMALL.vocab_size, (1, n + 1), generator=generator)
        targets = tokens[:, 1:].clone()
        targets[:, :-1][torch.rand(1, n - 1, generator=generator) > trained] = -100
        found.append((tokens[:, :-1], targets))
    return found


def together(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The row that holds conversations: inputs, targets, positions."""
    inputs, targets = (torch.cat(column, 1) for column in zip(*parts, strict=True))
    return inputs, targets, torch.cat([torch.arange(part.shape[1]) for part, _ in parts])[None]


def gradients(model: Transformer, inputs, targets, positions=None) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    loss = model(inputs, targets, positions=positions)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("heads", HEADS)
def test_the_loss_of_a_packed_batch_is_that_of_its_conversations_by_tokens(heads, kernels, recomputed):
    """And its gradient, with a block's activations kept or computed again."""
    model = build(dataclasses.replace(HEADS[heads], kernels=kernels), scale=3.0).to(device)
    model.gradient_checkpointing = recomputed
    rows = [conversations([9, 1, 6, 7], 1), conversations([23], 2), conversations([2, 18, 1, 1, 1], 3)]
    batch = [torch.cat(column) for column in zip(*map(together, rows), strict=True)]
    loss, gradient = gradients(model, batch[0].to(device), *batch[1:])
    model.gradient_checkpointing, total, mean, expected = False, 0, 0.0, 0.0
    for inputs, targets in (part for row in rows for part in row):
        count = int((targets != -100).sum())
        alone, own = gradients(model, inputs.to(device), targets)
        total, mean, expected = total + count, mean + count * alone, expected + count * own.double()
    assert total < 23 * 3  # something is masked
    assert loss == pytest.approx(mean / total, rel=1e-5)
    assert relative(gradient, expected / total) < 1e-5


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=2, max_size=7), data=st.data())
def test_the_order_of_conversations_in_a_row_changes_nothing(lengths, data):
    model, parts = build(scale=3.0).double(), conversations(lengths)
    order = data.draw(st.permutations(range(len(parts))))
    loss, gradient = gradients(model, *together(parts))
    other, other_gradient = gradients(model, *together([parts[i] for i in order]))
    assert other == pytest.approx(loss, rel=1e-12)
    assert relative(other_gradient, gradient) < 1e-12


def test_no_conversation_learns_from_another():
    """The loss of one has no gradient at all with respect to the tokens of the others, and one for each of its own."""
    model, lengths = build(), [5, 1, 8, 5, 3]
    parts = conversations(lengths)
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    for which, (end, length) in enumerate(zip(ends, lengths, strict=True)):
        masked = [(inputs, targets if i == which else targets.new_full(targets.shape, -100))
                  for i, (inputs, targets) in enumerate(parts)]  # fmt: skip
        inputs, targets, positions = together(masked)
        embedded = model.embed(inputs).detach().requires_grad_()
        handle = model.embed.register_forward_hook(lambda *_, embedded=embedded: embedded)
        (gradient,) = torch.autograd.grad(model(inputs, targets, positions=positions), embedded)
        handle.remove()
        own = slice(end - length, end)
        assert gradient[0, own].abs().sum(-1).all()
        gradient[0, own] = 0
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize(("at", "wrong"), [(0, 1), (0, 7), (2, 7), (5, 3)])
def test_positions_that_are_not_those_of_whole_texts_are_refused(at, wrong):
    _, tokens, positions = packed_row([4, 5])
    broken = positions.clone()
    broken[0, at] = wrong
    with pytest.raises(ValueError, match="do not count from 0 in each text"):
        build()(torch.cat((tokens, tokens)), positions=torch.cat((positions, broken)))


ENDED = st.lists(  # of each row its texts: their length, and of each ending where it parts and how long it is
    st.lists(
        st.tuples(st.integers(1, 12), st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), max_size=3)),
        min_size=1,
        max_size=3,
    ),
    min_size=1,
    max_size=3,
)


def ended_rows(layout: list, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, list]:
    """Tokens and positions, (B, T) each, of rows whose texts have other endings; and of each text and ending the row,
    the places of what is its own there, and the whole of it, (1, length)."""
    draw, rows, found = torch.Generator().manual_seed(seed), [], []
    ids = lambda n: torch.randint(SMALL.vocab_size, (n,), generator=draw)  # noqa: E731
    for number, texts in enumerate(layout):
        tokens, positions = [], []
        for length, endings in texts:
            text = ids(length)
            for p, n in [(0, length), *endings]:
                p = min(p, length)
                if p and p == positions[-1] + 1:  # goes on with what stands before it, and is none
                    continue
                whole = torch.cat([text[:p], ids(n)]) if p else text
                found.append((number, slice(len(tokens), len(tokens) + n), whole[None]))
                tokens += whole[p:].tolist()
                positions += range(p, p + n)
        rows.append((tokens, positions))
    longest = max(len(tokens) for tokens, _ in rows)
    for tokens, positions in rows:
        positions += [0] * (longest - len(tokens))
        tokens += [1] * (longest - len(tokens))
    return torch.tensor([row[0] for row in rows]), torch.tensor([row[1] for row in rows]), found


@pytest.mark.parametrize("heads", HEADS)
@settings(max_examples=40, deadline=None)
@given(layout=ENDED, seed=st.integers(0, 9))
def test_a_text_with_another_ending_is_to_it_the_text_it_is_alone(heads, layout, seed):
    """Its hidden states, and those of the text whose beginning it shares."""
    model = build(HEADS[heads], scale=3.0).double()
    tokens, positions, texts = ended_rows(layout, seed)
    with torch.no_grad():
        found = model.hidden(tokens, positions=positions)
        for row, own, whole in texts:
            alone = model.hidden(whole)[0, own.start - own.stop :]
            torch.testing.assert_close(found[row, own], alone, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("heads", HEADS)
@settings(max_examples=15, deadline=None)
@given(layout=ENDED, seed=st.integers(0, 9))
def test_what_endings_share_learns_from_all_of_them(heads, recomputed, layout, seed):
    """The gradient is the sum of that of every text alone, of which the part counts that stands in the row."""
    model = build(HEADS[heads], scale=3.0).double()
    tokens, positions, texts = ended_rows(layout, seed)
    draw = torch.Generator().manual_seed(seed)
    targets = torch.randint(SMALL.vocab_size, tokens.shape, generator=draw)
    targets[torch.rand(tokens.shape, generator=draw) < 0.3] = -100
    targets[:, 0] = 5  # one is left
    factors = torch.randn(tokens.shape, dtype=torch.float64, generator=draw)
    parameters, total = list(model.parameters()), 0.0
    for row, own, whole in texts:
        alone = model(whole, F.pad(targets[row, own], (whole.shape[1] - (own.stop - own.start), 0), value=-100)[None],
                      reduction="none")  # fmt: skip
        total = total + (alone[0, own.start - own.stop :] * factors[row, own]).sum()
    own = torch.zeros(tokens.shape)
    for row, places, _ in texts:
        own[row, places] = 1
    model.gradient_checkpointing = recomputed
    together = (model(tokens, targets, positions=positions, reduction="none") * factors * own).sum()
    assert together.item() == pytest.approx(total.item(), rel=1e-10, abs=1e-10)
    ours, theirs = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]) for loss in (together, total)
    )
    assert relative(ours, theirs) < 1e-10


@pytest.mark.filterwarnings("ignore")  # of the other library
def test_texts_with_other_endings_agree_with_transformers():
    """Given the same positions and a mask, by hand: 0 1 2 3 | 2' 3' 4' | 0'' 1'' | 1'."""
    model = build(scale=3.0)
    tokens = torch.randint(SMALL.vocab_size, (1, 10))
    positions = torch.tensor([[0, 1, 2, 3, 2, 3, 4, 0, 1, 1]])
    seen = torch.zeros(10, 10, dtype=torch.bool)
    for query, keys in enumerate([[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [0, 1, 4, 5], [0, 1, 4, 5, 6],
                                  [7], [7, 8], [7, 9]]):  # fmt: skip
        seen[query, keys] = True
    mask = torch.zeros(1, 1, 10, 10).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.no_grad():
        ours = model(tokens, positions=positions)
        theirs = to_transformers(model)(tokens, position_ids=positions, attention_mask=mask).logits
    assert relative(ours, theirs.double()) < 1e-5


@pytest.mark.parametrize(
    "wrong",
    [
        [0, 1, 2, 4, 5, 6],  # parts after 4 tokens of 3
        [0, 1, 2, 1, 5, 6],
        [0, 1, 0, 2, 3, 4],  # the last whole text has one token
        [0, 1, 2, -1, 0, 1],
        [1, 2, 3, 1, 2, 3],
        [2, 0, 1, 2, 3, 4],
    ],
)
def test_endings_of_more_than_their_text_are_refused(wrong):
    good = list(range(6))
    for rows in ([wrong], [good, wrong], [wrong, good]):
        with pytest.raises(ValueError, match="do not count from 0 in each text"):
            build()(torch.zeros(len(rows), 6).long(), positions=torch.tensor(rows))


@pytest.mark.filterwarnings("ignore")  # of the other library
@pytest.mark.parametrize("heads", HEADS)
def test_a_packed_row_agrees_with_transformers(heads):
    """Given the same positions and a mask that shows each query the keys of its own text up to itself."""
    model = build(HEADS[heads], scale=3.0)
    _, tokens, positions = packed_row([7, 1, 11, 4])
    text = (positions[0] == 0).cumsum(0)
    seen = (text[:, None] == text[None]) & torch.ones(23, 23).tril().bool()
    mask = torch.zeros(1, 1, 23, 23).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.no_grad():
        ours = model(tokens, positions=positions)
        theirs = to_transformers(model)(tokens, position_ids=positions, attention_mask=mask).logits
        assert relative(ours, theirs.double()) < 1e-5
        masked = model.head(model.hidden(tokens, positions=positions, mask=seen[None, None]))
        assert relative(masked, ours.double()) < 1e-5
        assert relative(model(tokens), ours.double()) > 1e-2  # as one text it is another


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's own compiler
def test_compiled_blocks_take_packed_rows():
    """Of changing make-up, as batches have it."""
    torch.compiler.reset()
    model, compiled = build(scale=3.0), build(scale=3.0)
    for block in compiled.blocks:
        block.compile()
    for lengths in ([9, 4, 3], [16], [1, 1, 7, 7]):
        row = together(conversations(lengths))
        (a, da), (b, db) = gradients(model, *row), gradients(compiled, *row)
        assert b == pytest.approx(a, rel=1e-5)
        assert relative(db, da.double()) < 1e-5


# ---------------------------------------------------------------------------------------------------------- generation


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_cached_logits_equal_uncached(cuts, seed):
    model, torch_seed = build(), torch.Generator().manual_seed(seed)
    cuts = list(np.minimum(np.cumsum(cuts), SMALL.context_length))
    tokens = torch.randint(SMALL.vocab_size, (2, int(cuts[-1])), generator=torch_seed)
    cache = lumi.KVCache(model, 2, SMALL.context_length)
    with torch.no_grad():
        whole = model(tokens)
        for start, end in zip([0, *cuts], cuts, strict=False):
            if end > start:
                part = model(tokens[:, start:end], cache=cache)
                torch.testing.assert_close(part, whole[:, start:end], rtol=1e-4, atol=1e-4)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    temperature=st.sampled_from([0, 1.0]),
    seed=st.integers(0, 99),
)
def test_a_batch_gives_each_prompt_what_it_gets_alone(lengths, temperature, seed):
    """Prompts of different lengths, past the context too, some of which stop before others."""
    model, generator = build(seed=seed, scale=3.0).double(), torch.Generator().manual_seed(seed)
    prompts = [torch.randint(SMALL.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    options = {"temperature": temperature, "stop": range(0, SMALL.vocab_size, 9)}
    seeds = [seed + i for i in range(len(prompts))]
    together = generate.generate(model, prompts, 30, seed=seeds, **options)
    assert together == [generate.generate(model, p, 30, seed=s, **options) for p, s in zip(prompts, seeds, strict=True)]


def test_one_seed_for_a_batch_is_that_seed_for_each():
    model = build(scale=3.0)
    a, b, c = generate.generate(model, [[1, 2], [1, 2], [3]], 12, seed=5)
    assert a == b == generate.generate(model, [1, 2], 12, seed=5)
    assert c == generate.generate(model, [3], 12, seed=5)


def test_a_stream_yields_each_step_as_it_is_made():
    model = build()
    stream = generate.stream(model, [[1], [2, 3]], 9, temperature=0)
    steps = [next(stream) for _ in range(4)]
    whole = generate.generate(model, [[1], [2, 3]], 9, temperature=0)
    assert steps == [[(0, a), (1, b)] for a, b in zip(*whole, strict=True)][:4]


def test_texts_of_a_batch_may_continue_each_at_its_own_place():
    """One cached step for texts of different lengths gives the logits of each without a cache."""
    model, texts = build(), [[1, 2, 3, 4, 5, 6], [7, 8], [9, 10, 11, 12]]
    cache = lumi.KVCache(model, 3, SMALL.context_length)
    with torch.no_grad():
        for i, ids in enumerate(texts):
            model(torch.tensor([ids[:-1]]), cache=cache[i : i + 1])
        step = model(torch.tensor([[ids[-1]] for ids in texts]), cache=cache)[:, 0]
        for logits, ids in zip(step, texts, strict=True):
            torch.testing.assert_close(logits, model(torch.tensor([ids]))[0, -1], rtol=1e-4, atol=1e-4)
    assert cache.used.tolist() == [len(ids) for ids in texts]


@pytest.mark.filterwarnings("ignore")  # of the other library
@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({}, {}),
        ({"repetition_penalty": 1.7}, {"repetition_penalty": 1.7}),
        ({"no_repeat_ngram": 2}, {"no_repeat_ngram_size": 2}),
        ({"no_repeat_ngram": 1}, {"no_repeat_ngram_size": 1}),
        ({"repetition_penalty": 1.2, "no_repeat_ngram": 3}, {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3}),
    ],
)
def test_greedy_generation_equals_that_of_transformers(options, theirs):
    model = build(GROUPED, scale=3.0)
    prompt = [5, 6, 7, 5, 6]
    settings = {"max_new_tokens": 60, "min_new_tokens": 60, "do_sample": False, "pad_token_id": 0}
    found = to_transformers(model).generate(torch.tensor([prompt]), **settings, **theirs)[0].tolist()
    assert generate.generate(model, prompt, 60, temperature=0, **options) == found[len(prompt) :]


@pytest.mark.parametrize(
    "options", [{"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 9, "top_p": 0.9, "min_p": 0.1}]
)
def test_sampling_keeps_the_candidates_that_transformers_keeps(options):
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    theirs = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(30, generator=generator)
    scores = TemperatureLogitsWarper(0.8)(None, logits[None])
    for name, value in options.items():
        scores = theirs[name](value)(None, scores)
    expected = torch.softmax(scores[0], 0)
    sampling = Sampling(temperature=0.8, **options)
    draws = torch.tensor([sampling.draw(logits, [0], generator) for _ in range(3000)])
    found = torch.bincount(draws, minlength=30) / 3000
    assert set(draws.tolist()) <= set(expected.nonzero().flatten().tolist())
    torch.testing.assert_close(found, expected, rtol=0, atol=0.035)


def test_greedy_generation_takes_the_likeliest_token_each_time():
    model, ids = build(), [5, 6, 7]
    found = generate.generate(model, ids, 15, temperature=0)
    for token in found:
        with torch.no_grad():
            assert token == int(model(torch.tensor([ids]))[0, -1].argmax())
        ids.append(token)


def test_generation_goes_on_past_the_context():
    model = build()
    found = generate.generate(model, list(range(60)), 3 * SMALL.context_length, temperature=0)
    assert len(found) == 3 * SMALL.context_length
    # The first new token is read after the last 24 ids; the next finds the context full and reads its later half again.
    seen = list(range(60))[-24:] + found[:1]
    with torch.no_grad():
        assert found[0] == int(model(torch.tensor([seen[:-1]]))[0, -1].argmax())
        assert found[1] == int(model(torch.tensor([seen[-12:]]))[0, -1].argmax())


def test_a_broken_model_says_so():
    model = build()
    with torch.no_grad():
        model.norm.weight[3] = math.nan
    for temperature in (0, 1.0):
        with pytest.raises(ValueError, match="not finite"):
            generate.generate(model, [1], 3, temperature=temperature)


def test_seeds_decide_the_draws():
    model = build(scale=3.0)
    a, b, c = (generate.generate(model, [1, 2], 20, seed=s) for s in (7, 7, 8))
    assert a == b != c
    assert [[(0, token)] for token in a] == list(generate.stream(model, [[1, 2]], 20, seed=7))


def test_stop_ends_the_text():
    model = build()
    free = generate.generate(model, [3], 12, temperature=0)
    stopped = generate.generate(model, [3], 12, temperature=0, stop=(free[5],))
    assert stopped == free[: free.index(free[5])]


def test_penalties_by_hand():
    logits = torch.tensor([2.0, -2.0, 1.0, -1.0])
    found = Sampling(repetition_penalty=2.0).penalised(logits, [0, 1, 1])
    assert found.tolist() == [1.0, -4.0, 1.0, -1.0]  # both less likely; the others as they were
    found = Sampling(no_repeat_ngram=2).penalised(logits, [3, 0, 2, 3])
    assert found.tolist() == [-math.inf, -2.0, 1.0, -1.0]  # 3 was followed by 0


def test_sampling_follows_the_distribution():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    generator = torch.Generator().manual_seed(0)

    def frequencies(**options):
        sampling = Sampling(**options)
        draws = [sampling.draw(logits, [0], generator) for _ in range(4000)]
        return [draws.count(i) / 4000 for i in range(4)]

    assert frequencies() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert frequencies(temperature=0.5) == pytest.approx([0.685, 0.247, 0.062, 0.007], abs=0.03)  # p² normalised
    assert frequencies(top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert frequencies(top_p=0.7) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert frequencies(top_p=0.81) == pytest.approx([0.526, 0.316, 0.158, 0], abs=0.03)
    assert frequencies(top_p=0.01) == [1, 0, 0, 0]
    assert frequencies(min_p=0.4) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert frequencies(temperature=1e-3) == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("ids", "options"),
    [
        ([], {}),
        ([-1], {}),
        ([97], {}),
        ([1], {"temperature": -1}),
        ([1], {"temperature": math.nan}),
        ([1], {"top_p": 0}),
        ([1], {"top_k": 0}),
        ([1], {"min_p": 1.5}),
        ([1], {"repetition_penalty": 0.0}),
        ([1], {"no_repeat_ngram": 0}),
        ([1], {"seed": [1, 2]}),
        ([1], {"repetition_penalty": 1e-300, "seed": 1}),
        ([1], {"seed": -1}),
    ],
)
def test_impossible_requests_are_refused(ids, options):
    with pytest.raises(ValueError, match=next(iter(options), "id")):
        generate.generate(build(), ids, 3, **options)


# ------------------------------------------------------------------------------------------- texts that come and go

GREEDY = Sampling(temperature=0)


def finish(decoder: Decoder) -> None:
    """Steps until all have ended, of which there may only be so many."""
    for _ in range(1000):
        if not decoder:
            return
        decoder.step()
    raise AssertionError("texts that never end")


VISITS = st.fixed_dictionaries(
    {
        "length": st.integers(1, 40),  # the context has 24
        "most": st.integers(0, 30),
        "temperature": st.sampled_from([0, 1.0]),
        "comes": st.integers(0, 25),
        "leaves": st.none() | st.integers(0, 40),
    }
)


@settings(max_examples=25, deadline=None)
@given(
    visits=st.lists(VISITS, min_size=1, max_size=8),
    rows=st.integers(1, 4),
    chunk=st.none() | st.integers(1, 30),
    seed=st.integers(0, 99),
)
def test_texts_that_come_and_go_at_any_step_get_what_they_get_alone(visits, rows, chunk, seed):
    model, generator = build(seed=seed, scale=3.0).double(), torch.Generator().manual_seed(seed)
    decoder, stop, open_ = Decoder(model, rows, chunk=chunk), range(0, SMALL.vocab_size, 19), {}
    prompts = [torch.randint(SMALL.vocab_size, (v["length"],), generator=generator).tolist() for v in visits]
    texts, drawn = {}, [[] for _ in visits]
    for step in range(1000):
        for i, visit in enumerate(visits):
            if visit["comes"] == step:
                sampling = Sampling(temperature=visit["temperature"])
                texts[i] = open_[i] = Continuation(prompts[i], visit["most"], sampling, seed + i, stop)
                decoder.add(texts[i])
            if i in open_ and visit["leaves"] is not None and visit["leaves"] <= step and not texts[i].ended:
                decoder.remove(open_.pop(i))
        assert len(decoder.texts) <= rows
        now = decoder.step()
        assert len({id(text) for text, _ in now}) == len(now)
        for text, token in now:
            [i] = (i for i, other in open_.items() if other is text)
            drawn[i].append(token)
        open_ = {i: text for i, text in open_.items() if not text.ended}
        assert len(decoder) == len(open_)
        if len(texts) == len(visits) and not open_:
            break
    else:
        raise AssertionError("texts that never end")
    for i, visit in enumerate(visits):
        expected = generate.generate(
            model, prompts[i], visit["most"], temperature=visit["temperature"], seed=seed + i, stop=stop
        )
        assert texts[i].ids == prompts[i] + drawn[i]
        found = drawn[i][: len(expected)]
        if texts[i].ended:
            stopped = len(expected) < visit["most"]
            assert found == expected
            assert texts[i].ended == ("stop" if stopped else "length")
            assert len(drawn[i]) == len(expected) + stopped
            assert not stopped or drawn[i][-1] in stop
        else:  # it was sent away
            assert drawn[i] == expected[: len(drawn[i])]
    assert not decoder
    assert not decoder.ready


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_text_whose_logits_are_not_finite_ends_alone(rows):
    """One token has a damaged embedding: what it leaves in the cache harms nobody, not those who take its place."""
    model = build(scale=3.0).double()
    with torch.no_grad():
        model.embed.weight[96] = math.nan
        model.head.weight[96] = 0  # so that it is nowhere the likeliest
    prompts = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [5, 96, 7, 8], [4, 96], [9, 8], [7], [3, 96, 1, 1, 1, 2], [2, 1, 2]]
    expected = [generate.generate(model, ids, 14, temperature=0) for ids in prompts if 96 not in ids]
    decoder = Decoder(model, rows, chunk=3)
    texts = [Continuation(ids, 14, GREEDY) for ids in prompts]
    for text in texts:
        decoder.add(text)
    finish(decoder)
    good = [text for text, ids in zip(texts, prompts, strict=True) if 96 not in ids]
    assert [text.ended for text in texts] == ["error" if 96 in ids else "length" for ids in prompts]
    assert [text.ids[-14:] for text in good] == expected
    assert all("not finite" in str(text.error) for text in texts if text.ended == "error")


def test_a_damaged_text_that_leaves_while_it_is_read_harms_nobody():
    model = build(scale=3.0).double()
    expected = (
        generate.generate(model, [7, 8], 6, temperature=0),
        generate.generate(model, list(range(12)), 12, temperature=0),
    )
    with torch.no_grad():
        model.embed.weight[96] = math.nan
    decoder = Decoder(model, 2, chunk=4)
    long, damaged = Continuation(range(12), 12, GREEDY), Continuation([96] * 20, 12, GREEDY)
    decoder.add(long)
    decoder.add(damaged)
    while damaged not in decoder.texts:
        decoder.step()
    decoder.step()
    decoder.remove(damaged)
    decoder.add(short := Continuation([7, 8], 6, GREEDY))
    finish(decoder)
    assert (short.ids[2:], long.ids[12:]) == expected


@pytest.mark.parametrize("temperature", [0, 1.3])
def test_log_probabilities_are_those_of_a_forward_pass(temperature):
    model = build(scale=3.0).double()
    decoder = Decoder(model, 2, chunk=4)
    sampling = Sampling(temperature=temperature, top_p=0.9, repetition_penalty=1.2)
    texts = [Continuation(ids, 12, sampling, 3, (), 4) for ids in ([1, 2, 3, 4, 5, 6], [7])]
    for text in texts:
        decoder.add(text)
    finish(decoder)
    for text in texts:
        with torch.no_grad():
            p = model(torch.tensor([text.ids[:-1]]))[0, -12:].log_softmax(-1)
        for expected, token, (own, candidates) in zip(p, text.ids[-12:], text.logprobs, strict=True):
            assert own == pytest.approx(float(expected[token]), abs=1e-5)  # logits are rounded to float32
            assert [i for i, _ in candidates] == expected.topk(4).indices.tolist()
            assert [value for _, value in candidates] == pytest.approx(expected.topk(4).values.tolist(), abs=1e-5)


@pytest.mark.parametrize("span", [0.1, 3, 9, 30, 300])
@pytest.mark.parametrize("top_p", [0.02, 0.5, 0.9, 0.999, 1.0])
def test_top_p_draws_what_a_full_sort_draws(span, top_p):
    """From flat distributions, where most of 3,000 tokens are wanted, to peaked ones, where a few are."""
    logits = torch.linspace(0, span, 3000)[torch.randperm(3000, generator=torch.Generator().manual_seed(1))]
    p = np.exp(logits.double().numpy() - span)
    p /= p.sum()
    order = np.argsort(-p) if top_p < 1 else np.arange(3000)  # which needs no sorting
    kept = order[: int(np.searchsorted(np.cumsum(p[order]), top_p * (1 - 1e-15))) + 1]
    reached = np.cumsum(p[kept])
    sampling = Sampling(top_p=top_p)
    for seed in range(20):
        drawn = float(torch.rand((), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))) * reached[-1]
        found = sampling.draw(logits, [0], torch.Generator().manual_seed(seed))
        assert found == kept[np.searchsorted(reached, drawn, side="right")]


@pytest.mark.parametrize("ids", [[], [-1], [97], [1, 2**40]])
def test_a_decoder_refuses_ids_that_the_model_has_not(ids):
    decoder = Decoder(build(), 2)
    with pytest.raises(ValueError, match=r"at least one id, each in 0\.\.96"):
        decoder.add(Continuation(ids, 3, GREEDY))
    assert not decoder
