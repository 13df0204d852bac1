"""The model against float64, against transformers, and against what must be true of any language model."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import configs
import model as lumi
from model import ModelConfig, Sampling, Transformer

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


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def compare(kernel, twin, inputs: list[torch.Tensor], layout: str, dtype: torch.dtype) -> None:
    """Kernel and twin against the twin in float64, forward and backward.

    The kernel's error is at most twice the twin's, plus a millionth; in half precision plus 0.004, because the
    interpreter truncates where a GPU rounds.
    """
    exact_inputs = [x.double().requires_grad_() for x in inputs]
    exact = twin(*exact_inputs)
    grad = torch.randn(exact.shape, dtype=torch.float64).to(dtype).to(device)
    exact.backward(grad.double())
    errors = []
    for function in (kernel, twin):
        given = [as_strided(x, layout if x.dim() > 1 else "").detach().requires_grad_() for x in inputs]
        before = [x.clone() for x in given]
        found = function(*given)
        found.backward(as_strided(grad, layout))
        assert found.dtype == dtype
        assert all(torch.equal(a, b) for a, b in zip(before, given, strict=True)), "an input was written to"
        pairs = [(found, exact), *((a.grad, b.grad) for a, b in zip(given, exact_inputs, strict=True))]
        errors.append([relative(a.detach(), b.detach()) for a, b in pairs])
    slack = 1e-6 if dtype == torch.float32 else 4e-3
    for kernel_error, twin_error in zip(*errors, strict=True):
        assert kernel_error <= 2 * twin_error + slack


SHAPES = [(1, 1), (3, 7), (5, 64), (2, 3, 97), (33, 128), (4, 257), (2, 8191), (3, 8192), (300, 5), (300, 2049)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_kernel(shape, layout):
    torch.manual_seed(0)
    x, weight = torch.randn(shape, device=device) * 3, torch.rand(shape[-1], device=device) + 0.5
    compare(
        lambda x, w: lumi.rms_norm(x, w, 1e-5, "triton"),
        lambda x, w: lumi.rms_norm_torch(x, w, 1e-5),
        [x, weight],
        layout,
        torch.float32,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu_kernel(shape, layout):
    torch.manual_seed(0)
    gate, up = torch.randn(shape, device=device) * 3, torch.randn(shape, device=device)
    compare(lambda g, u: lumi.swiglu(g, u, "triton"), lumi.swiglu_torch, [gate, up], layout, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernels_in_half_precision(dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(9, 130, device=device).to(dtype), torch.rand(130, device=device).to(dtype)
    compare(
        lambda x, w: lumi.rms_norm(x, w, 1e-5, "triton"),
        lambda x, w: lumi.rms_norm_torch(x, w, 1e-5),
        [x, weight],
        "contiguous",
        dtype,
    )
    gate, up = torch.randn(9, 130, device=device).to(dtype), torch.randn(9, 130, device=device).to(dtype)
    compare(lambda g, u: lumi.swiglu(g, u, "triton"), lumi.swiglu_torch, [gate, up], "contiguous", dtype)


def test_kernels_take_no_rows():
    x = torch.empty(0, 8, device=device, requires_grad=True)
    weight = torch.ones(8, device=device, requires_grad=True)
    lumi.rms_norm(x, weight, 1e-5, "triton").sum().backward()
    assert x.grad.shape == (0, 8)
    assert weight.grad.abs().sum() == 0
    gate = torch.empty(0, 8, device=device, requires_grad=True)
    assert lumi.swiglu(gate, gate, "triton").shape == (0, 8)


def test_twins_pass_gradcheck():
    torch.manual_seed(0)
    x, weight = torch.randn(3, 5, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, w: lumi.rms_norm_torch(x, w, 1e-5), (x.requires_grad_(), weight.requires_grad_())
    )
    gate, up = torch.randn(2, 3, 5, dtype=torch.float64).unbind(0)
    assert torch.autograd.gradcheck(lumi.swiglu_torch, (gate.requires_grad_(), up.requires_grad_()))


def test_whole_model_with_kernels_equals_the_twins():
    tokens = torch.randint(SMALL.vocab_size, (2, 17), device=device)
    losses, gradients = [], []
    for kernels in ("triton", "torch"):
        model = build(dataclasses.replace(SMALL, kernels=kernels)).to(device)
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert relative(gradients[0], gradients[1].double()) < 1e-5


# ---------------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("rows", [1, 256, 257, 700])
def test_loss_equals_cross_entropy_in_float64(rows):
    torch.manual_seed(0)
    x, weight, targets = torch.randn(rows, 16), torch.randn(53, 16), torch.randint(53, (rows,))
    exact_x, exact_w = x.double().requires_grad_(), weight.double().requires_grad_()
    exact = F.cross_entropy(F.linear(exact_x, exact_w), targets)
    (3 * exact).backward()
    x.requires_grad_(), weight.requires_grad_()
    loss = lumi.linear_cross_entropy(x, weight, targets)
    (3 * loss).backward()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    assert relative(x.grad, exact_x.grad) < 1e-6
    assert relative(weight.grad, exact_w.grad) < 1e-6


def test_loss_passes_gradcheck():
    torch.manual_seed(0)
    x, weight = torch.randn(5, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    targets = torch.randint(7, (5,))
    check = lambda x, w: lumi.linear_cross_entropy(x, w, targets)  # noqa: E731
    assert torch.autograd.gradcheck(check, (x.requires_grad_(), weight.requires_grad_()))


def test_loss_of_a_target_that_underflows_is_finite():
    x, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [500.0]])
    assert float(lumi.linear_cross_entropy(x, weight, torch.tensor([0]))) == 500.0


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
        )
    )
    names = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
    parts = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    parts |= {f"attn.{p}": f"self_attn.{p}_proj" for p in "qkvo"}
    parts |= {f"mlp.{p}": f"mlp.{p}_proj" for p in ("gate", "up", "down")}
    weights = {}
    for name, weight in model.state_dict().items():
        stem = name.removesuffix(".weight")
        if stem.startswith("blocks."):
            _, layer, part = stem.split(".", 2)
            weights[f"model.layers.{layer}.{parts[part]}.weight"] = weight
        else:
            weights[f"{names[stem]}.weight"] = weight
    other.load_state_dict(weights)
    return other.eval()


@pytest.mark.filterwarnings("ignore")  # of the other library
@pytest.mark.parametrize(
    "changes", [{}, {"n_kv_heads": None, "d_ff": None}, {"tie_embeddings": True, "rope_theta": 5e5}]
)
def test_agrees_with_transformers(changes):
    model = build(dataclasses.replace(SMALL, **changes), scale=3.0)
    tokens = torch.randint(SMALL.vocab_size, (3, SMALL.context_length))
    other = to_transformers(model)
    with torch.no_grad():
        ours, theirs = model(tokens), other(tokens).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    loss, their_loss = model(tokens[:, :-1], tokens[:, 1:]), other(tokens, labels=tokens).loss
    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-5)
    loss.backward(), their_loss.backward()
    first, their_first = model.blocks[0].attn.k, other.model.layers[0].self_attn.k_proj
    assert relative(first.weight.grad, their_first.weight.grad.double()) < 1e-4
    assert relative(model.embed.weight.grad, other.model.embed_tokens.weight.grad.double()) < 1e-4


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
    with pytest.raises(ValueError, match="context_length is 24"):
        build()(torch.zeros(1, 25, dtype=torch.long))


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


def test_greedy_generation_takes_the_likeliest_token_each_time():
    model, ids = build(), [5, 6, 7]
    found = model.generate(ids, 15, temperature=0)
    for token in found:
        with torch.no_grad():
            assert token == int(model(torch.tensor([ids]))[0, -1].argmax())
        ids.append(token)


def test_generation_goes_on_past_the_context():
    model = build()
    found = model.generate(list(range(60)), 3 * SMALL.context_length, temperature=0)
    assert len(found) == 3 * SMALL.context_length
    # The first new token is read after the last 24 ids; the next finds the context full and reads its later half again.
    seen = list(range(60))[-24:] + found[:1]
    with torch.no_grad():
        assert found[0] == int(model(torch.tensor([seen[:-1]]))[0, -1].argmax())
        assert found[1] == int(model(torch.tensor([seen[-12:]]))[0, -1].argmax())


def test_seeds_decide_the_draws():
    model = build(scale=3.0)
    a, b, c = (model.generate([1, 2], 20, seed=s) for s in (7, 7, 8))
    assert a == b != c
    assert [[(0, token)] for token in a] == list(model.stream([[1, 2]], 20, seed=7))


def test_stop_ends_the_text():
    model = build()
    free = model.generate([3], 12, temperature=0)
    stopped = model.generate([3], 12, temperature=0, stop=(free[5],))
    assert stopped == free[: free.index(free[5])]


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
        ([1], {"seed": -1}),
    ],
)
def test_impossible_requests_are_refused(ids, options):
    with pytest.raises(ValueError, match=next(iter(options), "id")):
        build().generate(ids, 3, **options)
