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
        self.register_buffer("base", None, persistent=False)  # while an adapter is merged: the weight without it

    def add(self, name: str, config: LoRAConfig) -> None:
        """A new adapter, float32, drawn from torch's global generator as `nn.Linear` draws its weight; now in use."""
        a = self.weight.new_empty(config.rank, self.in_features, dtype=torch.float32)
        self.a[name] = nn.Parameter(nn.init.kaiming_uniform_(a, a=math.sqrt(5)))
        self.b[name] = nn.Parameter(self.weight.new_zeros(self.out_features, config.rank, dtype=torch.float32))
        self.configs[name], self.active = config, name

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in). Returns (..., out)."""
        y = F.linear(x, self.weight)
        if self.base is not None and self.training:
            raise RuntimeError("an adapter is merged into the weights; lora.unmerge the model before training goes on")
        if self.active is None or self.base is not None:
            return y
        config, a, b = self.configs[self.active], self.a[self.active], self.b[self.active]
        scale = config.alpha / config.rank
        if self.training and config.dropout:
            x, scale = dropped(x, config.dropout, a), scale / (1 - config.dropout)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(a.dtype)  # of a model in another dtype
        # Scaled last, as peft does it: elsewhere it would round otherwise.
        return y + (scale * F.linear(F.linear(x, a), b)).to(y.dtype)

    def merge(self) -> None:
        """Puts the adapter in use into the weight. The weight without it is kept: to subtract would be to round."""
        if self.active is not None and self.base is None:
            config, self.base = self.configs[self.active], self.weight.data
            product = self.b[self.active].data @ self.a[self.active].data  # (out, in)
            self.weight.data = (self.base + config.alpha / config.rank * product).to(self.base.dtype)

    def unmerge(self) -> None:
        if self.base is not None:
            self.weight.data, self.base = self.base, None

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.base is not None:  # merged weights beside the adapter would be the adapter twice
            destination[f"{prefix}weight"] = self.base


def dropped(x: Tensor, p: float, reader: Tensor | None = None) -> Tensor:
    """Dropout without the division by 1 - p: elements are 0 with probability p, to the nearest 1/65,536.

    reader: what reads the result, and tells one call from another: of equal ones torch.compile would make only one.
    Drawn from 16 random bits an element: on a CPU a fifth of the time of PyTorch's, which would be a quarter of a step.
    """
    return torch.where(_kept(x, p, reader), x, 0.0)


@torch.library.custom_op("lumi::kept", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _kept(x: Tensor, p: float, reader: Tensor | None) -> Tensor:
    """Which elements are kept: an operator that torch.compile leaves alone, for it cannot draw from all of int64."""
    whole = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    bits = whole.view(torch.int16)[: x.numel()].view(x.shape)
    return bits >= min(round(p * 65_536), 65_535) - 32_768  # int16 holds no bound that would drop all


@_kept.register_fake
def _(x, p, reader):
    return torch.empty_like(x, dtype=torch.bool)


# ------------------------------------------------------------------------------------------------------ a whole model


def layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def attach(model: Transformer, config: LoRAConfig, name: str = "default") -> None:
    """Adds an adapter, which is then in use and alone is trained: everything else is frozen. ValueError for a name that
    is taken or has a dot in it."""
    if "." in name or not name or any(name in layer.configs for layer in layers(model).values()):
        raise ValueError(f"the adapter's name is {name!r}; expected one without a dot that no other adapter has")
    unmerge(model)
    model.requires_grad_(False)
    for block in model.blocks:
        for target in config.targets:
            part = block.attn if hasattr(block.attn, target) else block.mlp
            if not isinstance(getattr(part, target), LoRALinear):
                setattr(part, target, LoRALinear(getattr(part, target)))
            getattr(part, target).add(name, config)
    use(model, name)


def use(model: nn.Module, name: str | None) -> None:
    """Which adapter a model uses, and trains; None: none, as if there were none. KeyError for one that it lacks."""
    if name is not None and not any(name in layer.configs for layer in layers(model).values()):
        raise KeyError(f"the model has no adapter {name!r}")
    unmerge(model)
    for layer in layers(model).values():
        layer.active = name if name in layer.configs else None
        for each in layer.configs if name else ():
            layer.a[each].requires_grad_(each == name)
            layer.b[each].requires_grad_(each == name)


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


def begin(model: Transformer, end: int, start: int, eos: int) -> None:
    """Gives a model that has never seen a template's control pieces an end that it can learn to use.

    Pieces that no text is spelt with have all been pushed the same way in the output projection, and while that is
    frozen they cannot be told apart: with LoRA alone the demo gave <|im_end|> a probability of 0.02 where every answer
    ends. Its row becomes that of the piece that ends a text, plus what tells two unseen pieces apart.
    """
    if end not in getattr(model, "begun", ()):  # else another adapter has needed it already
        with torch.no_grad():
            rows = model.head.weight
            rows[end] = rows[eos] + (rows[end] - rows[start])
        model.begun = {end}
