"""Optimizers and schedules beside hand-worked cases, float64 and torch.optim.Muon."""

import copy
import dataclasses
import io
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import optim
import trainer
from model import ModelConfig, Transformer
from optim import Muon, learning_rate, make_optimizers, orthogonalise
from trainer import TrainConfig

CONFIG = TrainConfig(steps=10, batch_size=4, learning_rate=1e-2, optimizer="muon")
SHAPE = ModelConfig(vocab_size=61, context_length=16, n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, d_ff=49)


def matrix(singular: Tensor, rows: int, cols: int) -> Tensor:
    """A float32 matrix of these singular values, with random singular vectors."""
    n, draw = len(singular), torch.Generator().manual_seed(rows * 1000 + cols)
    u, v = (
        torch.linalg.qr(torch.randn(size, n, dtype=torch.float64, generator=draw))[0][:, :n] for size in (rows, cols)
    )
    return (u * singular @ v.T).float()


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    draw = torch.Generator().manual_seed(step + 1)
    for p in params:
        p.grad = torch.randn(p.shape, generator=draw)


def rms(x: Tensor) -> float:
    return float(x.detach().square().mean().sqrt())


# ---------------------------------------------------------------------------------------------------------- schedules


def rates(steps: int, **changes) -> list[float]:
    config = TrainConfig(steps=steps, batch_size=1, learning_rate=1.0, min_lr=0.2, **changes)
    return [learning_rate(config, step, steps) for step in range(steps + 1)]


def test_cosine_by_hand():
    found = rates(12, warmup_steps=4)
    assert found[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert found[6] == pytest.approx(0.2 + 0.4 * (1 + 0.5**0.5))  # cos 45°
    assert found[8] == pytest.approx(0.6)
    assert found[12] == pytest.approx(0.2)


def test_linear_by_hand():
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]
    assert rates(12, warmup_steps=4, schedule="linear") == pytest.approx(expected)


def test_wsd_by_hand():
    expected = [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]
    assert rates(10, warmup_steps=2, schedule="wsd", decay_fraction=0.4) == pytest.approx(expected)


def test_wsd_that_falls_all_the_way_is_linear():
    assert rates(12, warmup_steps=4, schedule="wsd", decay_fraction=1.0) == rates(12, warmup_steps=4, schedule="linear")


def test_a_schedule_is_added_in_one_place(monkeypatch):
    with pytest.raises(ValueError, match="schedule is 'exponential'; expected one of cosine, linear, wsd"):
        rates(3, schedule="exponential")
    with pytest.raises(KeyError, match="exponential"):
        learning_rate(SimpleNamespace(schedule="exponential", warmup_steps=0), 1, 3)
    monkeypatch.setitem(optim.SCHEDULES, "exponential", lambda config, step, steps: 0.1 ** (step / steps))
    monkeypatch.setitem(trainer.CHOICES, "schedule", tuple(optim.SCHEDULES))
    assert rates(2, schedule="exponential") == pytest.approx([1.0, 0.2 + 0.8 * 0.1**0.5, 0.28])


@pytest.mark.parametrize("steps", [1, 2, 5, 8, 40])
@pytest.mark.parametrize("warmup_steps", [0, 1, 7, 8, 30])
@pytest.mark.parametrize("decay_fraction", [0.01, 0.2, 0.5, 1.0])
def test_wsd_of_a_short_run_rises_whole_and_then_only_falls(steps, warmup_steps, decay_fraction):
    found = rates(steps, warmup_steps=warmup_steps, schedule="wsd", decay_fraction=decay_fraction)
    rise, fall = found[:warmup_steps], found[warmup_steps:]
    assert rise == pytest.approx([(i + 1) / warmup_steps for i in range(len(rise))])
    assert all(0.2 <= value <= 1.0 for value in fall)
    assert all(a >= b for a, b in itertools.pairwise(fall))
    if steps > warmup_steps:
        assert fall[0] == 1.0
        assert fall[-1] == pytest.approx(0.2)


# ----------------------------------------------------------------------------------------------- orthogonalised updates


@pytest.mark.parametrize(("rows", "cols"), [(24, 24), (40, 24), (24, 40)])
@pytest.mark.parametrize("condition", [1, 10, 100])
def test_singular_values_become_about_one_and_vectors_stay(rows, cols, condition):
    x = matrix(torch.logspace(0, -torch.tensor(condition).log10(), 24, dtype=torch.float64), rows, cols)
    u, _, vt = torch.linalg.svd(x.double(), full_matrices=False)
    y = orthogonalise(x[None])[0].double()
    values = torch.linalg.svdvals(y)
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert torch.cosine_similarity(y.flatten(), (u @ vt).flatten(), dim=0) > 0.97
    between = u.T @ y @ vt.T  # diagonal where y has x's singular vectors
    assert (between - between.diag().diag()).abs().max() < 1e-4


def test_values_too_small_to_reach_one_rise_and_never_pass_it():
    singular = torch.logspace(0, -8, 24, dtype=torch.float64)
    values = torch.linalg.svdvals(orthogonalise(matrix(singular, 24, 40)[None])[0].double())
    assert values.max() < 1.3
    assert values.isfinite().all()
    expected = singular / singular.norm()
    for _ in range(5):
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
    torch.testing.assert_close(values, expected.sort(descending=True).values, rtol=0, atol=1e-4)


def test_a_random_matrix_in_bfloat16_is_near_its_float32_result():
    x = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0))
    narrow = orthogonalise(x.bfloat16())
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), orthogonalise(x), rtol=0, atol=0.02)


def test_scale_of_the_input_does_not_matter():
    x = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0))
    for scale in (1e-6, 1e6):
        torch.testing.assert_close(orthogonalise(x * scale), orthogonalise(x), rtol=1e-4, atol=1e-5)


def test_matrices_of_a_batch_do_not_mix():
    x = torch.randn(5, 12, 7, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 4, 5)[:, None, None]
    alone = torch.cat([orthogonalise(one[None]) for one in x])
    torch.testing.assert_close(orthogonalise(x), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1)])
def test_one_row_or_column_keeps_its_direction(shape):
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    y = orthogonalise(x)
    assert y.shape == x.shape
    assert 0.6 < float(y.norm()) < 1.3
    torch.testing.assert_close(y / y.norm(), x / x.norm())


def test_a_zero_matrix_stays_zero_beside_others():
    x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    x[0] = 0
    y = orthogonalise(x)
    assert not y[0].any()
    assert y.isfinite().all()


def test_a_tall_matrix_costs_what_the_wide_one_does():
    flops = []
    for shape in ((1, 64, 8), (1, 8, 64)):
        with FlopCounterMode(display=False) as counter:
            orthogonalise(torch.ones(shape))
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0


# ----------------------------------------------------------------------------------------------------------------- Muon

SHAPES = [(16, 16), (48, 16), (16, 48), (48, 16), (1, 12), (12, 1)]


@pytest.mark.parametrize("momentum", [0.0, 0.6, 0.95])
def test_muon_agrees_with_pytorchs(momentum):
    """Whose iterations are in bfloat16: each of five steps may differ by some percent of an update."""
    ours, lr = parameters(*SHAPES), 0.1
    theirs = copy.deepcopy(ours)
    ours_optimizer = Muon(ours, lr, momentum, weight_decay=0.3)
    theirs_optimizer = torch.optim.Muon(
        theirs, lr, 0.3, momentum, nesterov=True, eps=1e-7, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(5):
        before = [p.detach().clone() for p in ours]
        set_gradients(ours, step)
        set_gradients(theirs, step)
        ours_optimizer.step()
        theirs_optimizer.step()
        for p, q, old in zip(ours, theirs, before, strict=True):
            assert rms(p - q) < 0.02 * rms(p - old) * (step + 1)
            torch.testing.assert_close(
                ours_optimizer.state[p]["momentum"], theirs_optimizer.state[q]["momentum_buffer"], rtol=1e-6, atol=1e-7
            )


def test_an_update_by_hand():
    """Of 1×1 matrices, whose orthogonalised update is p⁵(±1) = ±s: the sign alone counts, not the size."""
    s = 1.0
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    (w,) = parameters((1, 1))
    optimizer, expected = Muon([w], lr=0.1, momentum=0.5, weight_decay=0.2), w.item()
    # m = 2, −0.5;  u = 3, −1.75 without a factor that the sign does not see. Heavy ball alone has u = m.
    for gradient, sign in ((4.0, 1), (-3.0, -1)):
        w.grad = torch.tensor([[gradient]])
        optimizer.step()
        expected = (1 - 0.1 * 0.2) * expected - 0.1 * 0.2 * s * sign
        assert w.item() == pytest.approx(expected, rel=1e-5)
    assert optimizer.state[w]["momentum"].item() == -0.5


def test_the_look_ahead_of_nesterov_can_turn_the_update():
    """After gradients 4 and −1: m = 0.5, where heavy ball goes on, but u = 0.25 − 0.5 < 0."""
    (w,) = parameters((1, 1))
    optimizer = Muon([w], lr=0.1, momentum=0.5, weight_decay=0.0)
    for gradient, rises in ((4.0, False), (-1.0, True)):
        before, w.grad = w.item(), torch.tensor([[gradient]])
        optimizer.step()
        assert (w.item() > before) is rises


def test_weight_decay_is_decoupled():
    """It multiplies the weight by 1 − η λ, and neither enters the momentum nor is scaled with the update."""
    (w,) = parameters((6, 24))
    optimizer, before = Muon([w], lr=0.1, weight_decay=0.3), w.detach().clone()
    for _ in range(2):
        w.grad = torch.zeros_like(w)
        optimizer.step()
    torch.testing.assert_close(w.detach(), before * (1 - 0.1 * 0.3) ** 2)
    assert not optimizer.state[w]["momentum"].any()


@pytest.mark.parametrize("shape", [(32, 32), (64, 16), (16, 64)])
def test_an_update_has_adamws_usual_size(shape):
    """Root mean square 0.2 (arXiv:2502.16982, section 2.2), whatever the shape."""
    (w,) = parameters(shape)
    before = w.detach().clone()
    set_gradients([w], 0)
    Muon([w], lr=1.0, weight_decay=0.0).step()
    assert 0.16 < rms(w - before) < 0.22


def test_what_has_no_gradient_is_left_alone():
    first, second = parameters((4, 6), (4, 6))
    optimizer = Muon([first, second], lr=0.1)
    set_gradients([first], 0)
    before = second.detach().clone()
    optimizer.step()
    assert torch.equal(second, before)
    assert second not in optimizer.state
    set_gradients([second], 1)
    first.grad, momentum = None, optimizer.state[first]["momentum"].clone()
    before = first.detach().clone()
    optimizer.step()
    assert torch.equal(first, before)
    assert torch.equal(optimizer.state[first]["momentum"], momentum)
    assert optimizer.state[second]["momentum"].any()


def test_muon_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match=r"matrices.*\(3,\)"):
        Muon(parameters((3,)), lr=0.1)


def test_saved_loaded_and_gone_on_with_equals_undisturbed():
    params = parameters(*SHAPES)
    optimizer = Muon(params, lr=0.1)

    def train(params: list[nn.Parameter], optimizer: Muon, steps: range) -> None:
        for step in steps:
            set_gradients(params, step)
            params[step % 3].grad = None
            optimizer.step()

    train(params, optimizer, range(3))
    file = io.BytesIO()
    torch.save([params, optimizer.state_dict()], file)
    train(params, optimizer, range(3, 6))
    file.seek(0)
    again, state = torch.load(file, weights_only=True)
    resumed = Muon(again, lr=9.0)
    resumed.load_state_dict(state)
    train(again, resumed, range(3, 6))
    for p, q in zip(params, again, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(optimizer.state[p]["momentum"], resumed.state[q]["momentum"])
        assert optimizer.state[p]["momentum"].dtype == torch.float32


# ------------------------------------------------------------------------------------------ which parameter goes where


def names(model: Transformer, params: list[nn.Parameter]) -> list[str]:
    known = {p: name for name, p in model.named_parameters()}
    return [known[p] for p in params]


def model_of(**changes) -> Transformer:
    torch.manual_seed(0)
    return Transformer(dataclasses.replace(SHAPE, **changes))


def test_adamw_decays_matrices_and_not_vectors():
    model = model_of(n_layers=1)
    (adamw,) = make_optimizers(model, dataclasses.replace(CONFIG, optimizer="adamw", weight_decay=0.3, beta1=0.8))
    matrices, vectors = adamw.param_groups
    assert isinstance(adamw, torch.optim.AdamW)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)
    assert (matrices["betas"], matrices["lr"], matrices["fused"]) == ((0.8, 0.95), 1e-2, True)
    assert names(model, vectors["params"]) == ["blocks.0.attn_norm.weight", "blocks.0.mlp_norm.weight", "norm.weight"]
    assert len(matrices["params"]) == 1 + 7 + 1


def test_muon_gets_the_matrices_of_the_blocks_in_the_models_order():
    model = model_of(n_layers=2)
    muon, adamw = make_optimizers(model, dataclasses.replace(CONFIG, momentum=0.9, weight_decay=0.3))
    inner = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
    assert isinstance(muon, Muon)
    (group,) = muon.param_groups
    assert names(model, group["params"]) == [f"blocks.{layer}.{name}.weight" for layer in (0, 1) for name in inner]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (1e-2, 0.9, 0.3)
    tables, vectors = adamw.param_groups
    assert names(model, tables["params"]) == ["embed.weight", "head.weight"]
    assert (tables["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)
    assert len(vectors["params"]) == 5


def test_a_tied_embedding_is_adamws_once():
    model = model_of(tie_embeddings=True)
    muon, adamw = make_optimizers(model, CONFIG)
    assert names(model, adamw.param_groups[0]["params"]) == ["embed.weight"]
    assert len(muon.param_groups[0]["params"]) == 14


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_is_frozen_goes_nowhere_and_leaves_nothing_empty(optimizer):
    """As for LoRA: only the matrices of one layer, or only a norm, are trained."""
    config = dataclasses.replace(CONFIG, optimizer=optimizer)
    model = model_of().requires_grad_(False)
    assert make_optimizers(model, config) == []
    model.norm.requires_grad_(True)
    (only,) = make_optimizers(model, config)
    assert [names(model, group["params"]) for group in only.param_groups] == [["norm.weight"]]
    assert only.param_groups[0]["weight_decay"] == 0.0
    model.norm.requires_grad_(False)
    model.blocks[1].mlp.up.requires_grad_(True)
    (only,) = make_optimizers(model, config)
    assert isinstance(only, Muon if optimizer == "muon" else torch.optim.AdamW)
    assert [names(model, group["params"]) for group in only.param_groups] == [["blocks.1.mlp.up.weight"]]


def test_every_trained_parameter_has_one_optimizer():
    model = model_of()
    given = [p for o in make_optimizers(model, CONFIG) for group in o.param_groups for p in group["params"]]
    assert len(given) == len(set(given)) == len(list(model.parameters()))


# ------------------------------------------------------------------------------------------------------------- training


def counting_loss(model: nn.Module, step: int, rank: slice = slice(None)) -> Tensor:
    """Of predicting the next number, 0 1 2 … modulo 61, in four rows drawn by the step; or in some of them."""
    draw = torch.Generator().manual_seed(step)
    numbers = (torch.randint(61, (4, 1), generator=draw) + torch.arange(17)) % 61
    return model(numbers[rank, :-1], numbers[rank, 1:])


def final_loss(optimizer: str) -> float:
    model, loss = model_of(n_layers=1), 0.0
    optimizers = make_optimizers(model, dataclasses.replace(CONFIG, optimizer=optimizer))
    for step in range(40):
        loss = counting_loss(model, step)
        loss.backward()
        for each in optimizers:
            each.step()
            each.zero_grad(set_to_none=True)
    return loss.item()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_model_learns_counting(optimizer):
    assert final_loss(optimizer) < 0.05  # from log 61 = 4.1


def regression_loss(optimizer: type, lr: float, **options) -> float:
    """After 100 steps towards an orthogonal matrix, seen through inputs whose covariance has condition 10⁴."""
    x = matrix(torch.logspace(1, -1, 24, dtype=torch.float64), 256, 24)
    target, w = matrix(torch.ones(24, dtype=torch.float64), 24, 24), nn.Parameter(torch.zeros(24, 24))
    made = optimizer([w], lr=lr, weight_decay=0.0, **options)
    for step in range(100):
        made.param_groups[0]["lr"] = lr * (1 - step / 100)
        made.zero_grad()
        loss = (x @ (w - target)).square().mean()
        loss.backward()
        made.step()
    return loss.item()


def test_muon_learns_an_ill_conditioned_regression_better_than_adamw():
    """Each with the best of its learning rates: Muon moves alike in all directions, also where the inputs are small."""
    rates = (0.01, 0.03, 0.1, 0.3, 1.0)
    muon = min(regression_loss(Muon, lr) for lr in rates)
    adamw = min(regression_loss(torch.optim.AdamW, lr, betas=(0.9, 0.95)) for lr in rates)
    assert muon < 0.1 * adamw


def three_steps(model: nn.Module, rank: slice = slice(None)) -> list[torch.optim.Optimizer]:
    optimizers = make_optimizers(model, CONFIG)
    for step in range(3):
        counting_loss(model, step, rank).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return optimizers


def sharded_process(rank: int, directory: str) -> None:
    """One of two: trains sharded on half of the rows, and the whole model on all of them; compares."""
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=2)
    whole = model_of()
    sharded = copy.deepcopy(whole)
    for block in sharded.blocks:
        fully_shard(block, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
    fully_shard(sharded, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
    expected, found = three_steps(whole), three_steps(sharded, slice(2 * rank, 2 * rank + 2))
    for p, q in zip(whole.parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(q.full_tensor(), p.data, rtol=1e-4, atol=1e-6)
        if p in expected[0].state:
            momentum = found[0].state[q]["momentum"]
            assert momentum.placements == q.placements
            assert momentum.to_local().shape == q.to_local().shape
            torch.testing.assert_close(momentum.full_tensor(), expected[0].state[p]["momentum"], rtol=1e-4, atol=1e-6)
    Path(directory, f"agreed{rank}").touch()
    torch.distributed.destroy_process_group()


def test_sharded_over_two_processes_it_makes_the_same_steps(tmp_path: Path):
    """49 hidden units do not divide by two: the shards are uneven."""
    torch.multiprocessing.spawn(sharded_process, (str(tmp_path),), nprocs=2)
    assert sorted(p.name for p in tmp_path.glob("agreed*")) == ["agreed0", "agreed1"]
