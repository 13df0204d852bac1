"""Optimizers and schedules: hand-worked cases, float64 and torch.optim.Muon."""

import copy
import dataclasses
import itertools

import pytest
import torch
from torch import Tensor, nn

from model import ModelConfig, Transformer
from optim import Muon, learning_rate, make_optimizers, orthogonalise
from trainer import TrainConfig

CONFIG = TrainConfig(steps=10, batch_size=4, learning_rate=1e-2, optimizer="muon")
SHAPE = ModelConfig(vocab_size=61, context_length=16, n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, d_ff=49)


def random_matrices(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    return [nn.Parameter(random_matrices(*shape)) for shape in shapes]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    draw = torch.Generator().manual_seed(step + 1)
    for p in params:
        p.grad = torch.randn(p.shape, generator=draw)


def rms(x: Tensor) -> float:
    return float(x.detach().square().mean().sqrt())


def rates(steps: int, **changes) -> list[float]:
    config = TrainConfig(steps=steps, batch_size=1, learning_rate=1.0, min_lr=0.2, **changes)
    return [learning_rate(config, step, steps) for step in range(steps + 1)]


def test_schedules_by_hand():
    cosine = rates(12, warmup_steps=4)
    assert cosine[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert cosine[6] == pytest.approx(0.2 + 0.4 * (1 + 0.5**0.5))  # cos 45°
    assert (cosine[8], cosine[12]) == (pytest.approx(0.6), pytest.approx(0.2))
    linear = [0.25, 0.5, 0.75, 1.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]
    assert rates(12, warmup_steps=4, schedule="linear") == pytest.approx(linear)
    assert rates(12, warmup_steps=4, schedule="wsd", decay_fraction=1.0) == pytest.approx(linear)
    wsd = [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]
    assert rates(10, warmup_steps=2, schedule="wsd", decay_fraction=0.4) == pytest.approx(wsd)


@pytest.mark.parametrize("steps", [1, 5, 8, 40])
@pytest.mark.parametrize("warmup_steps", [0, 7, 30])
@pytest.mark.parametrize("decay_fraction", [0.01, 0.5])
def test_wsd_in_a_short_run_rises_to_the_peak_and_then_only_falls(steps, warmup_steps, decay_fraction):
    values = rates(steps, warmup_steps=warmup_steps, schedule="wsd", decay_fraction=decay_fraction)
    rise, fall = values[:warmup_steps], values[warmup_steps:]
    assert rise == pytest.approx([(i + 1) / warmup_steps for i in range(len(rise))])
    assert all(a >= b for a, b in itertools.pairwise(fall))
    if steps > warmup_steps:
        assert (fall[0], fall[-1]) == (1.0, pytest.approx(0.2))


@pytest.mark.parametrize(("rows", "cols"), [(24, 24), (40, 24), (24, 40)])
def test_singular_values_follow_the_polynomial_and_singular_vectors_stay(rows, cols):
    """Values within a factor of 100 come near 1; tiny values rise and never pass 1.3."""
    x = random_matrices(rows, cols).double()
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    for smallest in (0, -2, -8):
        singular = torch.logspace(0, smallest, 24, dtype=torch.float64)
        y = orthogonalise((u * singular @ vt).float()[None])[0].double()
        expected = singular / singular.norm()
        for _ in range(5):
            expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
        torch.testing.assert_close(u.T @ y @ vt.T, expected.diag(), rtol=0, atol=2e-4)
        assert expected.max() < 1.3
        assert expected.min() > 0.6 or smallest == -8


def test_orthogonalising_depends_on_neither_scale_nor_batch_nor_much_on_precision():
    x = random_matrices(5, 12, 7) * torch.logspace(-4, 4, 5)[:, None, None]
    x[2] = 0  # a zero matrix stays zero
    y = orthogonalise(x)
    assert not y[2].any()
    for matrix, expected in zip(x, y, strict=True):
        torch.testing.assert_close(orthogonalise(1e3 * matrix[None])[0], expected, rtol=1e-4, atol=1e-5)
    narrow = orthogonalise(x.bfloat16())
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), y, rtol=0, atol=0.03)


SHAPES = [(16, 16), (48, 16), (16, 48), (48, 16), (1, 12), (12, 1)]


@pytest.mark.parametrize("momentum", [0.0, 0.95])
def test_muon_agrees_with_pytorchs(momentum):
    """PyTorch iterates in bfloat16: each of five steps may differ by some percent of an update."""
    ours, lr = parameters(*SHAPES), 0.1
    theirs = copy.deepcopy(ours)
    our_muon = Muon(ours, lr, momentum, weight_decay=0.3)
    options = {"nesterov": True, "eps": 1e-7, "adjust_lr_fn": "match_rms_adamw"}
    their_muon = torch.optim.Muon(theirs, lr, 0.3, momentum, **options)
    for step in range(5):
        before = [p.detach().clone() for p in ours]
        for params, optimizer in ((ours, our_muon), (theirs, their_muon)):
            set_gradients(params, step)
            optimizer.step()
        for p, q, old in zip(ours, theirs, before, strict=True):
            assert rms(p - q) < 0.02 * rms(p - old) * (step + 1)
            momentums = our_muon.state[p]["momentum"], their_muon.state[q]["momentum_buffer"]
            torch.testing.assert_close(*momentums, rtol=1e-6, atol=1e-7)


def model_of(**changes) -> Transformer:
    torch.manual_seed(0)
    return Transformer(dataclasses.replace(SHAPE, **changes))


def names(model: Transformer, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """The parameters of each group."""
    known = {p: name for name, p in model.named_parameters()}
    return [[known[p] for p in group["params"]] for group in optimizer.param_groups]


def test_adamw_decays_matrices_and_not_vectors():
    model = model_of(n_layers=1)
    config = dataclasses.replace(CONFIG, optimizer="adamw", weight_decay=0.3, beta1=0.8, beta2=0.97)
    (adamw,) = make_optimizers(model, config)
    matrices, vectors = adamw.param_groups
    assert isinstance(adamw, torch.optim.AdamW)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)
    assert (matrices["betas"], matrices["lr"], matrices["fused"]) == ((0.8, 0.97), 1e-2, True)
    assert names(model, adamw)[1] == ["blocks.0.attn_norm.weight", "blocks.0.mlp_norm.weight", "norm.weight"]
    assert len(matrices["params"]) == 1 + 7 + 1


@pytest.mark.parametrize("tied", [False, True])
def test_muon_gets_the_matrices_of_the_blocks(tied):
    model = model_of(tie_embeddings=tied)
    muon, adamw = make_optimizers(model, dataclasses.replace(CONFIG, momentum=0.9, weight_decay=0.3))
    inner = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
    assert isinstance(muon, Muon)
    assert names(model, muon) == [[f"blocks.{layer}.{name}.weight" for layer in (0, 1) for name in inner]]
    (group,) = muon.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (1e-2, 0.9, 0.3)
    tables, vectors = names(model, adamw)
    assert tables == (["embed.weight"] if tied else ["embed.weight", "head.weight"])
    assert len(vectors) == 5
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.3, 0.0]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_frozen_parameters_are_left_out(optimizer):
    config, model = dataclasses.replace(CONFIG, optimizer=optimizer), model_of().requires_grad_(False)
    assert make_optimizers(model, config) == []
    model.norm.requires_grad_(True)
    (only,) = make_optimizers(model, config)
    assert names(model, only) == [["norm.weight"]]
    assert only.param_groups[0]["weight_decay"] == 0.0
    model.norm.requires_grad_(False)
    model.blocks[1].mlp.up.requires_grad_(True)
    (only,) = make_optimizers(model, config)
    assert isinstance(only, Muon if optimizer == "muon" else torch.optim.AdamW)
    assert names(model, only) == [["blocks.1.mlp.up.weight"]]
