"""Optimizers and learning-rate schedules: AdamW for tokens and gains, Muon for the matrices between hidden spaces."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from model import Transformer

if TYPE_CHECKING:
    from trainer import TrainConfig


def learning_rate(config: "TrainConfig", step: int, steps: int) -> float:
    """Of a step counted from 0: a linear rise over the warm-up, then a fall from learning_rate to min_lr.

    The fall of "cosine" and "linear" begins where the warm-up ends. That of "wsd" takes the last `decay_fraction` of
    the steps, or less in a run so short that the warm-up reaches into them: the rise is always whole.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    start = fall_begins(config, steps)
    done = min(1.0, max(0.0, (step - start) / max(1, steps - start)))
    left = (1 + math.cos(math.pi * done)) / 2 if config.schedule == "cosine" else 1 - done
    return config.min_lr + (config.learning_rate - config.min_lr) * left


def fall_begins(config: "TrainConfig", steps: int) -> int:
    """The first step, counted from 0, of the fall of the learning rate."""
    if config.schedule == "wsd":
        return max(config.warmup_steps, steps - max(1, round(config.decay_fraction * steps)))
    return config.warmup_steps


def orthogonalise(x: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: U S Vᵀ becomes U S' Vᵀ with S' around 1, between 0.68 and 1.21.

    x: (B, rows, cols), floating; returns the same shape and dtype. Five Newton-Schulz iterations of an odd polynomial,
    p(x) = a x + b x³ + c x⁵, which acts on the singular values alone. Its slope at 0 is large, so that small ones rise
    fast; for that it gives up settling at 1 (Jordan 2024, kellerjordan.github.io/posts/muon). What is smaller than
    0.002 of a matrix's Frobenius norm is still on its way up after five. A zero matrix stays zero.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[-2] > x.shape[-1]
    y = x.mT if tall else x  # the Gram matrix below is then the smaller one of the two
    norm = torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    y = y / norm.clamp(min=1e-7).to(y.dtype)  # no singular value exceeds the Frobenius norm
    for _ in range(5):
        gram = torch.bmm(y, y.mT)  # (B, n, n), n = min(rows, cols)
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.mT if tall else y


AT_ONCE = 2**26  # numbers that Muon orthogonalises together: a GPU is busy with fewer, and its memory with more


class Muon(torch.optim.Optimizer):
    """Momentum whose every update is orthogonalised, for matrices (Jordan 2024; Liu et al. 2025, arXiv:2502.16982).

        m ← μ m + (1 − μ) g                                       momentum
        u ← μ m + (1 − μ) g                                       Nesterov's look ahead
        w ← (1 − η λ) w − η · 0.2 √max(rows, cols) · NS(u)        decoupled weight decay, then the update

    The factor gives the update the root mean square that AdamW's usually has, so that both take the same learning rate
    and weight decay. The state is m, of the parameter's shape and dtype, in training float32.

    Matrices of one shape are orthogonalised as one batch: in bfloat16 on a GPU that multiplies it natively, else in
    float32. A parameter may be a DTensor (fully_shard). Its momentum is then sharded like it; every process gathers the
    whole batch, orthogonalises it, and keeps its shard. Raises ValueError for a parameter that is no matrix.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.1):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for p in group["params"]:
                if p.dim() != 2:
                    raise ValueError(f"Muon is for matrices; got a parameter of shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self) -> None:
        """Updates every parameter that has a gradient; the others and their momentum stay as they are."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault(p.shape, []).append(p)
            for params in alike.values():
                at_once = max(1, AT_ONCE // params[0].numel())
                for i in range(0, len(params), at_once):
                    self._step(params[i : i + at_once], group["lr"], group["momentum"], group["weight_decay"])

    def _step(self, params: list[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        """Updates B parameters of one shape."""
        for p in params:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        grads, means = [p.grad for p in params], [self.state[p]["momentum"] for p in params]
        torch._foreach_lerp_(means, grads, 1 - momentum)
        ahead = torch._foreach_mul(means, momentum)
        torch._foreach_add_(ahead, grads, alpha=1 - momentum)

        batch = torch.stack(ahead)  # (B, rows, cols)
        sharded = hasattr(batch, "full_tensor")  # a DTensor
        if batch.is_cuda and torch.cuda.get_device_capability(batch.device) >= (8, 0):
            batch = batch.bfloat16()  # before it is gathered: half the bytes to send
        updates = list(orthogonalise(batch.full_tensor() if sharded else batch).to(params[0].dtype))
        if sharded:  # every process has all updates: none is sent
            from torch.distributed.tensor import distribute_tensor  # here: it takes most of a second

            mesh, placements = params[0].device_mesh, params[0].placements
            updates = [distribute_tensor(update, mesh, placements, src_data_rank=None) for update in updates]
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        torch._foreach_add_(params, updates, alpha=-lr * 0.2 * math.sqrt(max(params[0].shape)))


def make_optimizers(model: Transformer, config: "TrainConfig") -> list[torch.optim.Optimizer]:
    """Over the trained parameters, in the model's order: AdamW, or Muon and AdamW where each has something to do.

    Matrices are decayed; vectors, which here are the gains of norms, are not.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    maps = set()
    if config.optimizer == "muon":
        # A row of these two stands for a token. They are tables of vectors, not maps from one hidden space to another:
        # only a few rows have a gradient in a step, and to orthogonalise would be to move the others as far.
        maps = {p for p in trained if p.dim() == 2} - {model.embed.weight, model.head.weight}
    muon, rest = [p for p in trained if p in maps], [p for p in trained if p not in maps]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizers: list[torch.optim.Optimizer] = []
    if muon:
        optimizers.append(Muon(muon, config.learning_rate, config.momentum, config.weight_decay))
    if groups:
        betas = config.beta1, config.beta2
        optimizers.append(torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True))
    return optimizers
