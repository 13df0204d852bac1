"""LoRA by hand: a frozen matrix W and, trained beside it, the product of two thin ones (arXiv:2106.09685).

    y = W x + (alpha / rank) · B A dropout(x)         A: (rank, in), B: (out, rank)

A is drawn at random and B is zero, so that an adapter changes nothing until it is trained. Several adapters can stand
on one model, of which one, or none, is in use.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Transformer
from stage import check_types

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """The shape of an adapter. Raises TypeError or ValueError, naming the field, for what cannot be."""

    rank: int = 32
    """Rows of A, columns of B."""
    alpha: float = 64.0
    """B A is multiplied by alpha / rank."""
    dropout: float = 0.05
    """Share of the adapter's inputs that a training step sets to 0."""
    targets: tuple[str, ...] = TARGETS
    """The projections of every block that are adapted: of attention q, k, v, o, of the feed-forward gate, up, down."""

    def __post_init__(self):
        check_types(self)
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}; expected at least 1")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha is {self.alpha}; expected a positive number")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; expected at least 0, less than 1")
        if not self.targets or not set(self.targets) <= set(TARGETS) or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets are {self.targets}; expected one or more of {', '.join(TARGETS)}, each once")


class LoRALinear(nn.Linear):
    """A linear layer without bias, whose weight it takes over and freezes, with adapters beside it."""

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight.requires_grad_(False), None
        self.training = linear.training
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()  # by the adapter's name
        self.configs: dict[str, LoRAConfig] = {}
        self.active: str | None = None
        self.base: Tensor | None = None  # while an adapter is merged: the weight without it

    def add(self, name: str, config: LoRAConfig) -> None:
        """A new adapter, float32, drawn from torch's global generator as `nn.Linear` draws its weight; now in use."""
        a = self.weight.new_empty(config.rank, self.in_features, dtype=torch.float32)
        self.a[name] = nn.Parameter(nn.init.kaiming_uniform_(a, a=math.sqrt(5)))
        self.b[name] = nn.Parameter(self.weight.new_zeros(self.out_features, config.rank, dtype=torch.float32))
        self.configs[name], self.active = config, name

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in). Returns (..., out)."""
        y = F.linear(x, self.weight)
        if self.active is None or self.base is not None:
            return y
        config = self.configs[self.active]
        scale = config.alpha / config.rank
        if self.training and config.dropout:
            x, scale = dropped(x, config.dropout), scale / (1 - config.dropout)
        z = scale * F.linear(x, self.a[self.active]).flatten(0, -2)  # (N, rank): the narrowest place to scale
        return torch.addmm(y.flatten(0, -2), z, self.b[self.active].T).view(y.shape)

    def merge(self) -> None:
        """Puts the adapter in use into the weight. The weight without it is kept: to subtract would be to round."""
        if self.active is not None and self.base is None:
            config, self.base = self.configs[self.active], self.weight.data
            product = self.b[self.active].data @ self.a[self.active].data  # (out, in)
            self.weight.data = self.base + config.alpha / config.rank * product

    def unmerge(self) -> None:
        if self.base is not None:
            self.weight.data, self.base = self.base, None


def dropped(x: Tensor, p: float) -> Tensor:
    """Dropout without the division by 1 - p: elements are 0 with probability p, to the nearest 1/65,536.

    Drawn from 16 random bits an element: on a CPU a fifth of the time of PyTorch's, which would be a quarter of a step.
    """
    whole = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    bits = whole.view(torch.int16)[: x.numel()].view(x.shape)
    least = min(round(p * 65_536), 65_535) - 32_768  # int16 holds no bound that would drop all
    return torch.where(bits >= least, x, 0.0)


# ------------------------------------------------------------------------------------------------------ a whole model


def layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def attach(model: Transformer, config: LoRAConfig, name: str = "default") -> None:
    """Adds an adapter, which is then in use and alone is trained: everything else is frozen."""
    model.requires_grad_(False)
    for block in model.blocks:
        for target in config.targets:
            part = block.attn if hasattr(block.attn, target) else block.mlp
            if not isinstance(getattr(part, target), LoRALinear):
                setattr(part, target, LoRALinear(getattr(part, target)))
            getattr(part, target).add(name, config)
    use(model, name)


def use(model: nn.Module, name: str | None) -> None:
    """Which adapter a model uses; None: none, as if there were none. Raises KeyError for one that it does not have."""
    if name is not None and not any(name in layer.configs for layer in layers(model).values()):
        raise KeyError(f"the model has no adapter {name!r}")
    unmerge(model)
    for layer in layers(model).values():
        layer.active = name if name in layer.configs else None


@contextmanager
def without(model: nn.Module) -> Iterator[None]:
    """The model as it is without the adapter in use: for the length of a block, and without a second copy of it."""
    before = {layer: layer.active for layer in layers(model).values()}
    use(model, None)
    try:
        yield
    finally:
        for layer, name in before.items():
            layer.active = name


def merge(model: nn.Module) -> None:
    """Puts the adapter in use into the weights: the same outputs, but for rounding, at the cost of a plain model."""
    for layer in layers(model).values():
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Takes it out again: the weights are the base's, bit for bit."""
    for layer in layers(model).values():
        layer.unmerge()


def fold(model: Transformer) -> None:
    """Makes plain layers of the adapted ones, the adapter in use merged for good."""
    merge(model)
    for name, layer in layers(model).items():
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(layer.weight.data)
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, plain)
    model.requires_grad_(True)
