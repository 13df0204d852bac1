"""Learning-rate schedules and optimizers: AdamW, and Muon for the matrices of the blocks."""

import math

import torch
from torch import Tensor, nn

import parallel
from model import Transformer

# After the warm-up a schedule falls from 1 (peak) to 0 (min_lr). config: TrainConfig. Add your own to SCHEDULES.


def cosine(config, step: int, steps: int) -> float:  # arXiv:1608.03983
    return (1 + math.cos(math.pi * share_done(step, config.warmup_steps, steps))) / 2


def linear(config, step: int, steps: int) -> float:  # arXiv:2310.07831: often at least as good as cosine
    return 1 - share_done(step, config.warmup_steps, steps)


def wsd(config, step: int, steps: int) -> float:  # warmup-stable-decay, arXiv:2404.06395
    return 1 - share_done(step, decay_start(config, steps), steps)


SCHEDULES = {"cosine": cosine, "linear": linear, "wsd": wsd}


def learning_rate(config, step: int, steps: int) -> float:
    """The learning rate of a step, counted from 0, in a run of `steps` steps."""
    # Warm-up: Adam's averages are noise at first, and a full step along noise can ruin the model.
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    return config.min_lr + (config.learning_rate - config.min_lr) * SCHEDULES[config.schedule](config, step, steps)


def share_done(step: int, start: int, steps: int) -> float:
    """The share of the steps from `start` to the end that is done, 0 to 1."""
    return min(1.0, max(0.0, (step - start) / max(1, steps - start)))


def decay_start(config, steps: int) -> int:
    """The step at which "wsd" starts to fall, at the earliest after the warm-up."""
    return max(config.warmup_steps, steps - max(1, round(config.decay_fraction * steps)))


def orthogonalise(x: Tensor) -> Tensor:
    """Brings all but tiny singular values near 1: U S Vᵀ becomes nearly U Vᵀ. x: (B, rows, cols), any float dtype."""
    # Newton-Schulz (Jordan 2024, kellerjordan.github.io/posts/muon) applies p(s) = a s + b s³ + c s⁵ to each singular
    # value s without an SVD, which is slow on a GPU. The large slope, a, makes small values grow fast.
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[-2] > x.shape[-1]
    y = x.mT if tall else x  # then y yᵀ is the smaller Gram matrix
    norm = torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    norm = norm.clamp(min=1e-7)  # a zero matrix stays zero
    y = y / norm.to(y.dtype)  # now no singular value exceeds 1, and p stays bounded
    for _ in range(5):
        gram = torch.bmm(y, y.mT)  # (B, n, n), n = min(rows, cols)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        y = torch.baddbmm(y, polynomial, y, beta=a)
    return y.mT if tall else y


AT_ONCE = 2**26  # numbers that Muon orthogonalises in one batch: they fill a GPU and take 128 MiB in bfloat16


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates, for matrices (Jordan 2024; Liu et al. 2025, arXiv:2502.16982)."""

    #     m ← μ m + (1 − μ) g                                     momentum
    #     u ← μ m + (1 − μ) g                                     Nesterov: look one step ahead
    #     w ← (1 − η λ) w − η · 0.2 √max(rows, cols) · NS(u)      decoupled weight decay, then the update
    # The factor 0.2 √max(rows, cols) gives updates AdamW's usual size, so one learning rate suits both.

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.1):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """Updates every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape = {}  # matrices of one shape are one batch: far faster on a GPU than one after another
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for params in by_shape.values():
                size = max(1, AT_ONCE // params[0].numel())
                for start in range(0, len(params), size):
                    self._update(params[start : start + size], group)

    def _update(self, params: list[nn.Parameter], group: dict) -> None:
        """Updates B parameters of one shape."""
        lr, momentum = group["lr"], group["momentum"]
        grads, averages = [], []
        for p in params:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            grads.append(p.grad)
            averages.append(self.state[p]["momentum"])
        torch._foreach_lerp_(averages, grads, 1 - momentum)
        ahead = torch._foreach_mul(averages, momentum)
        torch._foreach_add_(ahead, grads, alpha=1 - momentum)

        batch = torch.stack(ahead)  # (B, rows, cols)
        # The iteration tolerates rounding, so use bfloat16 on a GPU that has it in hardware.
        if batch.is_cuda and torch.cuda.get_device_capability(batch.device) >= (8, 0):
            batch = batch.bfloat16()
        # FSDP splits matrices by rows, but the iteration needs whole ones: each process gathers and computes all, then
        # keeps its own rows.
        like = params[0]
        if hasattr(batch, "full_tensor"):
            updates = orthogonalise(batch.full_tensor()).to(like.dtype)
            updates = [parallel.part(update, like) for update in updates]
        else:
            updates = list(orthogonalise(batch).to(like.dtype))
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(params, updates, alpha=-lr * 0.2 * math.sqrt(max(like.shape)))


def make_optimizers(model: Transformer, config) -> list[torch.optim.Optimizer]:
    """AdamW for the trained parameters; or Muon for the matrices of the blocks, and AdamW for the rest."""
    # Add your own here, and its name to CHOICES in trainer.py. Muon leaves out the tables of tokens: most steps give a
    # rare token's row almost no gradient, and Muon would move it as far as the others.
    tables = {model.embed.weight, model.head.weight} if config.optimizer == "muon" else set()
    inner, decayed, vectors = [], [], []
    for p in model.parameters():
        if not p.requires_grad:
            continue
        if p.dim() < 2:
            vectors.append(p)
        elif config.optimizer == "muon" and p not in tables:
            inner.append(p)
        else:
            decayed.append(p)
    # Weight decay pulls towards 0: good for a matrix, but a norm's gain should stay near 1.
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    lr, betas = config.learning_rate, (config.beta1, config.beta2)
    optimizers = []
    if inner:
        optimizers.append(Muon(inner, lr, config.momentum, config.weight_decay))
    if groups:
        optimizers.append(torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True))
    return optimizers
