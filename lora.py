"""LoRA by hand: train two thin matrices beside each frozen weight matrix (arXiv:2106.09685)."""

#     y = W x + (alpha / rank) · B A dropout(x)         W: (out, in), frozen; A: (rank, in); B: (out, rank)
#
# A starts random and B starts at zero, so a new adapter changes nothing until it is trained. A model can carry several
# adapters. One of them, or none, is active.

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cli import UserError
from model import Transformer
from stage import check_types

# Why the head (the output projection) too? The last norm fixes the size of its input, so frozen, it bounds the logits:
# in the demo no adapter of the blocks could bring the loss on short answers below 0.11, and sampled at temperature 1
# only 14 of 100 answers known by heart came out right. A large model's head is sharp enough; try BLOCKS there.
BLOCKS = ("q", "k", "v", "o", "gate", "up", "down")
TARGETS = (*BLOCKS, "head")


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """The shape of an adapter. Raises TypeError or ValueError, with the field's name, for an impossible value."""

    rank: int = 32  # rows of A and columns of B; try 4: an eighth of the parameters, and often nearly the same loss
    alpha: float = 64.0  # B A is multiplied by alpha / rank
    dropout: float = 0.05  # share of the adapter's inputs that is set to 0 in training
    # The linear layers, by name, that get an adapter. A head that is tied to the embedding is left out.
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self):
        check_types(self)
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}; expected at least 1")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha is {self.alpha}; expected a positive number")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; expected at least 0, less than 1")
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets are {self.targets}; expected one or more names of linear layers, each once")


class LoRALinear(nn.Linear):
    """Takes over the weight and bias of a linear layer and holds its adapters."""

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)  # not nn.Linear's: it would draw a weight for nothing
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.frozen, self.bias = linear.weight, linear.bias
        self.training = linear.training
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()  # by adapter name
        self.configs: dict[str, LoRAConfig] = {}
        self.active: str | None = None
        # `whole()` while an adapter is merged, else None. Only W and the adapter are saved.
        self.register_buffer("merged", None, persistent=False)

    def add(self, name: str, config: LoRAConfig) -> None:
        """Adds an adapter in float32, drawn from torch's global generator as `nn.Linear` draws its weight."""
        a = self.frozen.new_empty(config.rank, self.in_features, dtype=torch.float32)
        b = self.frozen.new_zeros(self.out_features, config.rank, dtype=torch.float32)
        # A must not be zero too: the gradient of each is a product with the other, so both would stay zero.
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        self.a[name] = nn.Parameter(a)
        self.b[name] = nn.Parameter(b)
        self.configs[name] = config

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in). Returns (..., out)."""
        if self.merged is not None:
            if self.training:
                raise RuntimeError("an adapter is merged into the weights; call lora.unmerge(model) first")
            return F.linear(x, self.merged, self.bias)
        y = F.linear(x, self.frozen, self.bias)  # (..., out)
        if self.active is None:
            return y
        config, a, b = self.configs[self.active], self.a[self.active], self.b[self.active]
        scale = config.alpha / config.rank
        if self.training and config.dropout:
            # Dropout is for the adapter's input only. It shrinks the mean to 1 - p; `scale` restores it.
            x = dropped(x, config.dropout, a)
            scale = scale / (1 - config.dropout)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(a.dtype)  # the base model may be in bfloat16
        delta = F.linear(F.linear(x, a), b)  # (..., in) -> (..., rank) -> (..., out); B A would be as large as W
        return y + (scale * delta).to(y.dtype)  # scaled last, as in peft: another order rounds differently

    def whole(self) -> Tensor:
        """W + (alpha / rank) · B A of the active adapter, (out, in); W if none is active."""
        if self.active is None:
            return self.frozen
        config, a, b = self.configs[self.active], self.a[self.active], self.b[self.active]
        with torch.autocast(a.device.type, enabled=False):
            return (self.frozen + config.alpha / config.rank * (b @ a)).to(self.frozen.dtype)


class LoRAHead(LoRALinear):
    """The output projection with adapters. The loss never calls it, but reads its weight: see `Transformer.forward`."""

    @property
    def weight(self) -> Tensor:
        # W + B A is as large as W, and costs little beside the logits. There is no input here to drop.
        return self.whole() if self.merged is None else self.merged

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in). Returns (..., out)."""
        return F.linear(x, self.weight, self.bias)


def dropped(x: Tensor, p: float, reader: Tensor | None = None) -> Tensor:
    """Dropout without the division by 1 - p. Sets elements to 0 with probability p, rounded to 1/65,536."""
    # reader: a tensor that no other call gets, because torch.compile merges calls with equal arguments into one.
    return torch.where(_kept(x, p, reader), x, 0.0)


# On a CPU, 16 random bits per element take a fifth of the time of F.dropout, which would be a quarter of a training
# step. torch.compile cannot trace `random_`. In a custom operator it is one node, so the graph does not break there.
@torch.library.custom_op("lumi::kept", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _kept(x: Tensor, p: float, reader: Tensor | None) -> Tensor:
    """True where an element of x is kept."""
    words = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64, device=x.device)
    words.random_(-(2**63), None)  # all 64 bits are random
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)
    # int16 starts at -32,768. The largest threshold still keeps 1 in 65,536.
    return bits >= min(round(p * 65_536), 65_535) - 32_768


@_kept.register_fake
def _(x, p, reader):
    return torch.empty_like(x, dtype=torch.bool)


# ------------------------------------------------------------------------------------------------------ a whole model


def layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def adapters(model: nn.Module) -> set[str]:
    """The names of the model's adapters."""
    return {name for layer in layers(model).values() for name in layer.configs}


def attach(model: Transformer, config: LoRAConfig, name: str = "default") -> None:
    """Adds an adapter and activates it. Only the adapter is trained; all other parameters are frozen."""
    # Raises UserError for targets that the model lacks, ValueError for a name that is taken or contains a dot.
    if not name or "." in name or name in adapters(model):
        raise ValueError(f"the adapter's name is {name!r}; expected one without a dot that no other adapter has")
    # By name, not by class: if you rewrite attention or the feed-forward network, their layers are found too.
    linear = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    names = list(dict.fromkeys(path.rpartition(".")[2] for path, _ in linear))  # q, k, v, …, head
    if missing := [target for target in config.targets if target not in names]:
        raise UserError(
            f"targets names {', '.join(map(repr, missing))}; the model has {', '.join(names)}: "
            f"set lora=LoRAConfig(targets={tuple(names)})"
        )
    unmerge(model)
    model.requires_grad_(False)
    # In the model's order, because the order of random draws is part of a run's result.
    for path, layer in linear:
        if path.rpartition(".")[2] not in config.targets or (path == "head" and model.config.tie_embeddings):
            continue
        if not isinstance(layer, LoRALinear):
            layer = LoRAHead(layer) if path == "head" else LoRALinear(layer)
            model.set_submodule(path, layer)
        layer.add(name, config)
    use(model, name)


def use(model: nn.Module, name: str | None) -> None:
    """Activates one adapter, the only one trained from then on. None: the plain model. KeyError for an unknown name."""
    if name is not None and name not in adapters(model):
        raise KeyError(f"the model has no adapter {name!r}")
    unmerge(model)
    for layer in layers(model).values():
        layer.active = name if name in layer.configs else None
        # None lasts only briefly (see `without`): requires_grad stays as it is.
        for adapter in layer.configs if name else ():
            layer.a[adapter].requires_grad_(adapter == name)
            layer.b[adapter].requires_grad_(adapter == name)


@contextmanager
def without(model: nn.Module) -> Iterator[None]:
    """Switches the adapter off inside a `with` block: DPO gets its reference model without a second copy."""
    before = {layer: layer.active for layer in layers(model).values()}
    use(model, None)
    try:
        yield
    finally:
        for layer, name in before.items():
            layer.active = name


def merge(model: nn.Module) -> None:
    """Adds the active adapter to the weights: the same outputs up to rounding, at the speed of a plain model."""
    for layer in layers(model).values():
        if layer.active is not None:
            layer.merged = layer.whole().detach()  # a copy: to subtract B A from W later would not be exact


def unmerge(model: nn.Module) -> None:
    """Returns to the base model's weights, bit for bit, with the adapter beside them."""
    for layer in layers(model).values():
        layer.merged = None


def fold(model: Transformer) -> None:
    """Merges the active adapter for good: all adapted layers become plain ones. Other adapters are lost."""
    for name, layer in layers(model).items():
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = layer.frozen if layer.active is None else nn.Parameter(layer.whole().detach())
        plain.bias = layer.bias
        model.set_submodule(name, plain)
    model.requires_grad_(True)


def init_end_piece(model: Transformer, end: int, start: int, eos: int) -> None:
    """Gives <|im_end|>, which pretraining never shows, a useful row in the output projection."""
    # Pretraining pushes the rows of all unseen pieces in the same direction, so <|im_end|> and <|im_start|> look alike:
    # in the demo, <|im_end|> had a probability of only 0.02 where answers end, with a frozen output projection.
    if getattr(model, "end_piece", None) == end:
        return  # done for another adapter on this model; a second time would move the row again
    model.end_piece = end
    with torch.no_grad():
        rows = model.head.frozen if isinstance(model.head, LoRAHead) else model.head.weight  # (V, D)
        rows[end] = rows[eos] + (rows[end] - rows[start])
