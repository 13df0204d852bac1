"""The LLaMA, whole: configuration, kernels, layers, loss and cached generation. Imports nothing from the project.

A decoder-only Transformer (Touvron et al. 2023, arXiv:2302.13971): token embedding, `n_layers` blocks, RMSNorm, output
projection. A block adds two things to the residual stream, each reading a normalised copy of it: causal attention with
rotary positions, and a SwiGLU feed-forward network. There are no biases and no dropout.

In shapes: B batch, T tokens, S keys seen, N = B · T rows, D d_model, H heads, K key-value heads, E head dimension,
V vocabulary.
"""

import math
import os
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

try:
    import triton
    import triton.language as tl
except ImportError:  # not on Linux: the plain-PyTorch twins serve
    triton = None


# ----------------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a model. Raises TypeError or ValueError, naming the field, for what no model can have."""

    vocab_size: int
    """Rows of the embedding: the tokenizer's pieces."""
    context_length: int = 1_024
    """The most tokens a forward pass may see, and the reach of attention."""
    n_layers: int
    """Blocks."""
    d_model: int
    """Width of the residual stream."""
    n_heads: int
    """Query heads; each is d_model / n_heads wide."""
    n_kv_heads: int | None = None
    """Key-value heads, each shared by n_heads / n_kv_heads query heads (arXiv:2305.13245). None: n_heads."""
    d_ff: int | None = None
    """Width of the feed-forward network. None: 4 × d_model."""
    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths (arXiv:2104.09864)."""
    rms_norm_eps: float = 1e-5
    """Added to the mean square before its root."""
    tie_embeddings: bool = False
    """Use the embedding matrix as the output projection too."""
    kernels: str = "auto"
    """Norms, SwiGLU and cross-entropy by "triton" or "torch"; "auto" is Triton on a GPU, where torch.compile does not
    fuse PyTorch's operations instead, and PyTorch elsewhere."""

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            allowed = (int, float) if field.type is float else field.type
            if not isinstance(value, allowed) or (isinstance(value, bool) and field.type is not bool):
                expected = getattr(field.type, "__name__", field.type)
                raise TypeError(f"{field.name} is {value!r} ({type(value).__name__}); expected {expected}")
            if field.name not in ("tie_embeddings", "kernels") and value is not None and not 0 < value < math.inf:
                raise ValueError(f"{field.name} is {value}; expected a positive number")
        if self.d_model % (2 * self.n_heads):
            raise ValueError(
                f"d_model is {self.d_model} and n_heads {self.n_heads}; d_model / n_heads must be a whole, even "
                "number, because rotary embedding turns pairs of dimensions"
            )
        if self.n_kv_heads is not None and self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads is {self.n_kv_heads}; it must divide n_heads, which is {self.n_heads}")
        if self.kernels not in ("auto", "triton", "torch"):
            raise ValueError(f'kernels is {self.kernels!r}; expected "auto", "triton" or "torch"')
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if self.kernels == "triton" and (triton is None or not (interpreted or torch.cuda.is_available())):
            raise ValueError('kernels is "triton", which needs the package triton and a GPU; expected "auto" here')

    @property
    def head_dim(self) -> int:
        """E, the width of one head."""
        return self.d_model // self.n_heads

    def flops_per_token(self, T: int) -> int:
        """Of a training step on rows of T tokens, as PaLM counts them (arXiv:2204.02311, appendix B).

        A linear layer multiplies and adds once a weight: 2 FLOPs forward, 4 backward, for the gradients of input and
        weight. Attention does so twice with T keys a query, d_model wide: 12 · T · d_model a block. Embedding rows are
        looked up, not multiplied; masked keys count.
        """
        attention = 2 * self.d_model * self.head_dim * (self.n_heads + (self.n_kv_heads or self.n_heads))  # q, o; k, v
        block = attention + 3 * self.d_model * (self.d_ff or 4 * self.d_model)
        weights = self.n_layers * block + self.vocab_size * self.d_model
        return 6 * weights + 12 * self.n_layers * self.d_model * T


# ------------------------------------------------------------------------------------------------------------ layers


class KVCache:
    """Keys and values of the tokens seen so far, in memory set aside once: `length` tokens for each of B texts.

    k, v: (n_layers, B, K, length, E). used: (B,) int64 on the CPU, the tokens held of each text. `cache[a:b]` is a view
    of texts a to b − 1.
    """

    def __init__(self, model: "Transformer", batch_size: int, length: int):
        c = model.config
        shape = (c.n_layers, batch_size, c.n_kv_heads or c.n_heads, length, c.head_dim)
        # Zeros: where one text is shorter than another, what lies behind it is weighted with 0, which has to give 0.
        self.k = torch.zeros(shape, dtype=model.embed.weight.dtype, device=model.embed.weight.device)
        self.v = torch.zeros_like(self.k)
        self.used = torch.zeros(batch_size, dtype=torch.int64)

    def __getitem__(self, texts: slice) -> "KVCache":
        view = object.__new__(KVCache)
        view.k, view.v, view.used = self.k[:, texts], self.v[:, texts], self.used[texts]
        return view

    @property
    def length(self) -> int:
        return self.k.shape[3]

    def append(self, layer: int, k: Tensor, v: Tensor, places: Tensor | None) -> tuple[Tensor, Tensor]:
        """Writes k, v: (B, K, T, E) after the tokens held; returns the layer's, (B, K, max(used) + T, E).

        places: `self.places(T)`, found once for all layers.
        """
        end = int(self.used.max()) + k.shape[2]
        for held, new in ((self.k[layer], k), (self.v[layer], v)):
            if places is None:
                held[:, :, end - k.shape[2] : end] = new
            else:
                held.view(-1, held.shape[-1]).index_copy_(0, places, new.flatten(0, 2))
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def places(self, T: int) -> Tensor | None:
        """Where the next T tokens of each text go, (B · K · T,) int64, in the B · K · length of a layer. None: behind
        equally many of each."""
        if self.used.min() == self.used.max():
            return None
        row = self.length * torch.arange(self.k.shape[1] * self.k.shape[2]).view(self.k.shape[1], -1, 1)  # (B, K, 1)
        return (row + self.used[:, None, None] + torch.arange(T)).flatten().to(self.k.device)

    def move(self, source: int, target: int) -> None:
        """Takes what is held of one text to the place of another, which must be clear."""
        used = int(self.used[source])
        self.k[:, target, :, :used] = self.k[:, source, :, :used]
        self.v[:, target, :, :used] = self.v[:, source, :, :used]
        self.clear(source)
        self.used[target] = used

    def clear(self, text: int) -> None:
        """Lets a text go. Of one whose keys or values are not finite nothing may stay: times 0, it would not be 0."""
        self.k[:, text] = 0
        self.v[:, text] = 0
        self.used[text] = 0


class Texts:
    """Where the texts of packed rows lie, for attention that keeps each to itself.

    Texts of similar length are one batch: padded at their ends, which a causal query never sees, they need no mask, and
    so keep the fast kernels; nor is anything computed for pairs of texts, which would be most of a row's square.

    positions: (B, T) int64 on the CPU, from 0 in each text. Where they fall back to p > 0, another ending begins: a
    text that shares the first p tokens of the last one that began at 0. Raises ValueError for others.
    """

    def __init__(self, positions: Tensor, device: torch.device):
        flat = positions.flatten()
        starts = torch.cat([torch.tensor([True]), flat.diff() != 1]).nonzero()[:, 0]
        counts = torch.cat([starts, torch.tensor([len(flat)])]).diff()
        shared, whole = flat[starts], flat[starts] == 0
        text = whole.cumsum(0) - 1  # which whole text each is an ending of
        if positions[:, 0].any() or (shared > counts[whole][text]).any() or (shared < 0).any():
            raise ValueError(
                "positions of a row do not count from 0 in each text, or in another ending from a place in the text; "
                "expected those of whole texts"
            )
        texts = zip(*(x.tolist() for x in (shared + counts, shared, starts, starts[whole][text])), strict=True)
        groups: list[list[tuple[int, ...]]] = []
        for each in sorted(texts, reverse=True):
            if not groups or each[0] < 0.8 * groups[-1][0][0]:
                groups.append([])
            groups[-1].append(each)
        # index: which of the B · T tokens stands in each place of the groups, (places,) int64; a shorter text is filled
        # up with its last token. places: (B · T,) int64, in which of them each token stands. shapes: texts, longest.
        index, self.places, self.shapes, before = [], torch.empty(positions.numel(), dtype=torch.int64), [], 0
        for group in groups:
            lengths, shared, start, first = torch.tensor(group).T[..., None]  # (texts, 1)
            at = torch.arange(group[0][0])  # (longest,)
            inside = at.minimum(lengths - 1)
            own, real = inside + torch.where(inside < shared, first, start - shared), (at >= shared) & (at < lengths)
            self.places[own[real]] = before + real.flatten().nonzero()[:, 0]
            index.append(own.flatten())
            self.shapes.append(own.shape)
            before += own.numel()
        self.index = torch.cat(index).to(device, non_blocking=True)
        self.places = self.places.to(device, non_blocking=True)

    @torch.compiler.disable  # shapes differ from one batch to the next
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention in each text. q: (B, H, T, E), k and v: (B, K, T, E). Returns (B, T, H, E)."""
        sizes, found = [n * longest for n, longest in self.shapes], []
        rows = [x.transpose(1, 2).flatten(0, 1).index_select(0, self.index).split(sizes) for x in (q, k, v)]
        for shape, *own in zip(self.shapes, *rows, strict=True):
            own = (x.view(*shape, *x.shape[1:]).transpose(1, 2) for x in own)  # (texts, H or K, longest, E)
            y = F.scaled_dot_product_attention(*own, is_causal=True, enable_gqa=k.shape[1] < q.shape[1])
            found.append(y.transpose(1, 2).flatten(0, 1))
        return torch.cat(found).index_select(0, self.places).view(q.transpose(1, 2).shape)


class RMSNorm(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.eps, self.kernels = config.rms_norm_eps, config.kernels

    def forward(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """The residual stream with what a layer adds to it, and its normalised copy, which the next layer reads."""
        if delta is None:
            return x, rms_norm(x, self.weight, self.eps, self.kernels)
        return add_rms_norm(x, delta, self.weight, self.eps, self.kernels)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding: turns the pairs (x_i, x_{i + E/2}) by an angle that grows with the position.

    x: (B, T, H, E); cos, sin: (T, 1, E) or (B, T, 1, E), the sines of the first half negated. Returns x's shape and
    dtype. After it, q · k depends on the positions only through their difference (arXiv:2104.09864). The halves are
    paired as in the Hugging Face layout.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention, with fewer key-value heads than query heads where the config says so."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads or config.n_heads
        self.head_dim = config.head_dim
        self.q = nn.Linear(config.d_model, self.n_heads * self.head_dim, bias=False)
        self.k = nn.Linear(config.d_model, self.n_kv_heads * self.head_dim, bias=False)
        self.v = nn.Linear(config.d_model, self.n_kv_heads * self.head_dim, bias=False)
        self.o = nn.Linear(self.n_heads * self.head_dim, config.d_model, bias=False)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache | None = None,
        places: Tensor | None = None,
        mask: Tensor | None = None,
        texts: Texts | None = None,
    ) -> Tensor:
        B, T, _ = x.shape
        q = rotate(self.q(x).view(B, T, self.n_heads, self.head_dim), cos, sin).transpose(1, 2)  # (B, H, T, E)
        k = rotate(self.k(x).view(B, T, self.n_kv_heads, self.head_dim), cos, sin).transpose(1, 2)  # (B, K, T, E)
        v = self.v(x).view(B, T, self.n_kv_heads, self.head_dim).transpose(1, 2)  # (B, K, T, E)
        if cache is not None:
            k, v = cache.append(self.layer, k, v, places)  # (B, K, S, E)
        shared = self.n_kv_heads < self.n_heads
        if texts is not None:
            return self.o(texts.attend(q, k, v).reshape(B, T, -1))
        causal = mask is None and k.shape[2] == T
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=shared)
        return self.o(y.transpose(1, 2).reshape(B, T, -1))  # from (B, H, T, E)


class SwiGLU(nn.Module):
    """The feed-forward network: down(silu(gate(x)) · up(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d_ff = config.d_ff or 4 * config.d_model
        self.gate = nn.Linear(config.d_model, d_ff, bias=False)
        self.up = nn.Linear(config.d_model, d_ff, bias=False)
        self.down = nn.Linear(d_ff, config.d_model, bias=False)
        self.kernels = config.kernels

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.gate(x), self.up(x), self.kernels))


class Block(nn.Module):
    """Attention, then the feed-forward network. What a layer adds to the residual stream travels beside it until the
    next norm, which does the addition: so the stream is read and written once a layer."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(config), Attention(config, layer)
        self.mlp_norm, self.mlp = RMSNorm(config), SwiGLU(config)

    def forward(
        self,
        x: Tensor,
        delta: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache | None = None,
        places: Tensor | None = None,
        mask: Tensor | None = None,
        texts: Texts | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x: the stream, (B, T, D); delta: what the block before adds to it. Returns both for the block behind."""
        x, y = self.attn_norm(x, delta)
        x, y = self.mlp_norm(x, self.attn(y, cos, sin, cache, places, mask, texts))
        return x, self.mlp(y)


class Projection(nn.Linear):
    """From the residual stream to the vocabulary."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (…, D). Returns (…, V).

        A CPU that decodes a few texts together takes the weight in slices that stay in its cache: MKL would copy all of
        it first. A step of tiny with 8 texts is a seventh shorter for it.
        """
        rows = x.flatten(0, -2)
        if torch.is_grad_enabled() or x.is_cuda or not 1 < len(rows) <= 16 or self.out_features % 512:
            return super().forward(x)
        y = rows @ self.weight.view(-1, 512, self.in_features).transpose(1, 2)  # (V / 512, N, 512)
        return y.transpose(0, 1).reshape(*x.shape[:-1], self.out_features)


class Transformer(nn.Module):
    """The model. Weights are float32, drawn from torch's global generator: normal with deviation 0.02, and for the two
    projections that write into the residual stream 0.02 / √(2 · n_layers), so that its variance at the last block does
    not grow with depth (GPT-2's rule)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # keep a block's input only, and compute the rest again when it is due
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config)
        self.head = Projection(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        frequency = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)
        angle = torch.outer(torch.arange(config.context_length, dtype=torch.float64), frequency)[:, None]  # (T, 1, E/2)
        self.register_buffer("cos", torch.cat((angle.cos(), angle.cos()), -1).float(), persistent=False)  # (T, 1, E)
        self.register_buffer("sin", torch.cat((-angle.sin(), angle.sin()), -1).float(), persistent=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                residual = name.endswith(("attn.o.weight", "mlp.down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config.n_layers) if residual else 0.02)

    def num_parameters(self) -> int:
        """Every trained number once, embeddings included."""
        return sum(p.numel() for p in self.parameters())

    def hidden(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """What the output projection reads, (B, T, D), for tokens: (B, T) int64. The rest as in `forward`.

        positions: (B, T) int64, for rows that are more than one text. Alone, they count from 0 in each of several texts
        that stand one after another, and no text sees another; where they fall back to p > 0, another ending of the
        last text from 0 begins, after its first p tokens. They have to be on the CPU. With a mask, (B, 1, T, T), True
        where a query sees a key, they may be any; without a cache, a row may then be longer than context_length.
        No position may.
        """
        T = tokens.shape[1]
        used = [0] if cache is None else cache.used.tolist()
        room = self.config.context_length if cache is None else cache.length
        if positions is None and max(used) + T > room:
            raise ValueError(f"{max(used) + T} tokens; context_length is {room}")
        # Where every text holds as many tokens, their positions are the same, and one new token may see all of them.
        cos, sin, texts = self.cos[used[0] : used[0] + T], self.sin[used[0] : used[0] + T], None
        if positions is not None:
            if mask is None and cache is not None:
                raise ValueError("positions without a mask are those of whole texts; a cache holds earlier tokens")
            texts = Texts(positions.cpu(), tokens.device) if mask is None else None
            positions = positions.to(tokens.device, non_blocking=True)
            cos, sin = self.cos[positions], self.sin[positions]  # (B, T, 1, E)
        elif min(used) < max(used) or (T > 1 and used[0] > 0):
            at = (cache.used[:, None] + torch.arange(T)).to(tokens.device)  # (B, T)
            cos, sin = self.cos[at], self.sin[at]  # (B, T, 1, E)
            # A query sees the keys up to its own position.
            mask = torch.arange(max(used) + T, device=tokens.device) <= at[:, None, :, None]  # (B, 1, T, S)
        places = None if cache is None else cache.places(T)
        x, delta = self.embed(tokens), None  # (B, T, D)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, delta = checkpoint(block, x, delta, cos, sin, cache, places, mask, texts, use_reentrant=False)
            else:
                x, delta = block(x, delta, cos, sin, cache, places, mask, texts)
        if cache is not None:
            cache.used += T
        return self.norm(x, delta)[1]

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """Logits, or with `targets` the loss.

        tokens: (B, T) int64, T ≤ context_length. targets: (B, T) int64, the token that follows each of `tokens`, or
        −100 to ignore the position: the caller shifts, once; nothing is shifted here. cache: keys and values of earlier
        tokens, extended by these. positions: (B, T) int64 on the CPU, where a row is several texts: from 0 in each, and
        no text sees another (more in `hidden`). Returns logits (B, T, V), or a scalar: mean cross-entropy in nats,
        without the logits ever being there at once; or, with the reduction "none", that of each target, (B, T), 0 where
        it is ignored. Raises ValueError past the context.
        """
        x = self.hidden(tokens, cache, positions)
        if targets is None:
            return self.head(x)  # (B, T, V)
        options = {"kernels": self.config.kernels, "reduction": reduction}
        loss = linear_cross_entropy(x.flatten(0, 1), self.head.weight, targets.flatten(), **options)
        return loss if reduction == "mean" else loss.view(targets.shape).clone()  # FSDP warns of a view


# -------------------------------------------------------------------------------------------------------------- loss


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int, kernels: str = "auto") -> Tensor:
    """`cross_entropy_torch`, or the Triton kernel for the same. logits: with contiguous rows."""
    if not _use_triton(kernels, logits):
        return cross_entropy_torch(logits, targets, ignore_index)
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    columns = min(4096, triton.next_power_of_2(logits.shape[1]))
    sizes = logits.stride(0), logits.shape[1], ignore_index
    warps = max(1, min(8, columns // 128))
    _launch(
        _cross_entropy_kernel, (len(logits),), logits, targets.contiguous(), losses, *sizes, C=columns, num_warps=warps
    )
    return losses


@torch.library.custom_op("lumi::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    dtype: torch.dtype,
    each: bool,
    factors: Tensor | None,
    learn_x: bool,
    learn_weight: bool,
    kernels: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ_t −log softmax(x_t · Wᵀ)[target_t], or with `each` its terms; and its gradients, without ever holding all N × V
    logits.

    A chunk of rows at a time: logits, loss, at once the gradient that these logits have, carried on to x and W. One
    buffer serves all chunks: at 32,768 pieces, fresh memory costs a CPU more in page faults than in arithmetic.
    factors: (N,), of the terms in the sum whose gradients these are.
    """
    wide = torch.promote_types(dtype, torch.float32)
    n, w, keep = len(x), weight.to(dtype), None
    if targets.device.type == "cpu":  # a GPU would have to be waited for, to know how many are left
        live = targets != ignore_index
        if not live.all():
            keep = live.nonzero()[:, 0]
            targets, keep = targets[keep], keep.to(x.device, non_blocking=True)
            x, factors = x[keep], None if factors is None else factors[keep]
        targets = targets.to(x.device, non_blocking=True)
    chunk = 512 if x.device.type == "cpu" else 4096
    buffer = x.new_empty(min(chunk, len(x)), len(w), dtype=dtype)
    settings = ignore_index, dtype, each, factors, learn_x, learn_weight, kernels
    loss, dx, dw = _linear_cross_entropy_fake(x, weight, targets, *settings)
    loss.zero_()
    if len(x) == 0:
        dw.zero_()
    for first in range(0, len(x), chunk):
        rows = slice(first, min(first + chunk, len(x)))
        xc, logits = x[rows].to(dtype), buffer[: rows.stop - first]
        torch.mm(xc, w.T, out=logits)
        losses = cross_entropy(logits, targets[rows], ignore_index, kernels)
        if each:
            loss[rows] = losses
        else:
            loss += losses.sum()
        if factors is not None:
            logits *= factors[rows, None]
        if learn_x:
            dx[rows] = logits @ w
        if learn_weight and not each:
            if x.is_cuda and dtype != wide:
                product = torch.mm(logits.T, xc, out_dtype=wide)
                dw = dw.add_(product) if first else product
            else:
                dw.addmm_(logits.T.to(wide), xc.to(wide), beta=float(first > 0))
    if learn_x and keep is not None:
        dx = dx.new_zeros(n, dx.shape[1]).index_copy_(0, keep, dx)
    if each and keep is not None:
        loss = loss.new_zeros(n).index_copy_(0, keep, loss)
    return loss, dx, dw


@_linear_cross_entropy.register_fake
def _linear_cross_entropy_fake(x, weight, targets, ignore_index, dtype, each, factors, learn_x, learn_weight, kernels):
    wide = torch.promote_types(dtype, torch.float32)
    dx = x.new_empty(x.shape if learn_x else 0)
    dw = weight.new_empty(weight.shape if learn_weight and not each else 0, dtype=wide)
    return x.new_empty(len(x) if each else (), dtype=wide), dx, dw


def _linear_cross_entropy_setup(ctx, inputs, output):
    x, weight, targets, *settings, ctx.learn_x, ctx.learn_weight, ctx.kernels = inputs
    ctx.ignore_index, ctx.matmul_dtype, ctx.each, _ = settings
    again = ctx.each and ctx.learn_weight
    ctx.save_for_backward(*output[1:], *((x, weight, targets) if again else ()))
    ctx.dtype = weight.dtype
    ctx.set_materialize_grads(False)


def _linear_cross_entropy_gradients(ctx, dloss, *_):
    if torch.is_grad_enabled():  # create_graph: dx and dw would pass for constants
        raise RuntimeError("linear_cross_entropy can be differentiated once only")
    if dloss is None:
        return (None,) * 10
    dx, dw, *inputs = ctx.saved_tensors
    if ctx.learn_x:
        dx = (dx.to(dloss.dtype) * (dloss[:, None] if ctx.each else dloss)).to(dx.dtype)
    if inputs:  # a term's share in dw is only now known: the logits are made again
        options = ctx.ignore_index, ctx.matmul_dtype, False, dloss, False, True, ctx.kernels
        dw = _linear_cross_entropy(*inputs, *options)[2].to(ctx.dtype)
    elif ctx.learn_weight:
        dw = (dw * dloss).to(ctx.dtype)
    return dx if ctx.learn_x else None, dw if ctx.learn_weight else None, *[None] * 8


_linear_cross_entropy.register_autograd(_linear_cross_entropy_gradients, setup_context=_linear_cross_entropy_setup)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    kernels: str = "auto",
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy, in nats, of `F.linear(x, weight)` against those `targets` that are not `ignore_index`.

    x: (N, D), weight: (V, D), targets: (N,) int64 in [0, V) or `ignore_index`. Ignored rows are dropped before the
    projection if `targets` is on the CPU, wherever x is; targets on a GPU are masked, because to count them there
    would be to wait for it. Returns the mean, a scalar, float32 or wider: 0 if nothing is left; with the reduction
    "none" the losses themselves, (N,), 0 where ignored: if the weight is learnt, their logits are made once more for
    its gradient. It can be differentiated once, in reverse mode. Raises ValueError for targets of another length or
    type, and for another reduction.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction is {reduction!r}; expected "mean" or "none"')
    if x.dim() != 2 or targets.shape != x.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"x is {tuple(x.shape)} and targets {tuple(targets.shape)} {targets.dtype}; expected (N, D) and (N,) int64"
        )
    learn = [torch.is_grad_enabled() and t.requires_grad for t in (x, weight)]
    settings = ignore_index, _matmul_dtype(x), reduction == "none", None, *learn, kernels
    loss = _linear_cross_entropy(x, weight, targets, *settings)[0]
    return loss if reduction == "none" else loss / (targets != ignore_index).sum().clamp_min(1)


# ----------------------------------------------------------------------------------------------------------- kernels
#
# Each kernel has a plain-PyTorch twin that says what it computes. The kernels read and write float32, float16 or
# bfloat16 and compute in float32. Offsets are int64: a tensor may reach over more than 2³¹ elements. They are custom
# operators, which torch.compile takes as they are; the twins it fuses with what stands around them.


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """y = x / sqrt(mean(x²) + eps) · weight over the last axis, in float32 at least (arXiv:1910.07467).

    x: (..., D) of any floating dtype, weight: (D,). Returns (..., D) in `dtype`, by default x's.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight).to(dtype or x.dtype)


def swiglu_torch(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, elementwise (arXiv:2002.05202). gate, up: (..., d_ff) of one dtype; returns the same."""
    return F.silu(gate) * up


def cross_entropy_torch(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """−log softmax(logits)[target] of each row, (N,) in float32 at least; 0 where the target is `ignore_index`.

    logits: (N, V), overwritten by the gradient that the sum of these losses has with respect to them, softmax − onehot.
    targets: (N,) int64.
    """
    live = targets != ignore_index
    at = targets.where(live, 0)[:, None]
    p = logits.to(torch.promote_types(logits.dtype, torch.float32))
    top, hit = p.amax(1, keepdim=True), p.gather(1, at)
    torch.softmax(p, 1, out=p)
    # log Σ exp is the largest logit minus the log of its probability, which is at least 1/V: nothing underflows.
    loss = (top - p.amax(1, keepdim=True).log() - hit)[:, 0]
    logits.copy_(p.scatter_add_(1, at, p.new_full(at.shape, -1.0)))
    if logits.is_cuda or not live.all():  # asked on a CPU only: a GPU would have to be waited for
        logits.mul_(live[:, None])
        loss = loss.where(live, 0.0)
    return loss


if triton is not None:

    @triton.jit
    def _rms_norm_forward_kernel(
        x, delta, weight, total, y, scale, rows, x_stride, delta_stride, eps,
        ADD: tl.constexpr, D: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    ):  # fmt: skip
        """R rows a program, C ≥ D columns (a power of two). Keeps each row's 1/rms in `scale` for the backward pass.

        With ADD it is the sum of x and delta that is kept in `total` and normalised.
        """
        row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
        col = tl.arange(0, C)
        live = (row < rows)[:, None] & (col < D)[None, :]
        here = row[:, None] * D + col[None, :]
        wide = tl.load(x + row[:, None] * x_stride + col[None, :], mask=live, other=0.0).to(tl.float32)
        if ADD:
            wide += tl.load(delta + row[:, None] * delta_stride + col[None, :], mask=live, other=0.0).to(tl.float32)
            kept = wide.to(total.dtype.element_ty)
            tl.store(total + here, kept, mask=live)
            wide = kept.to(tl.float32)
        s = 1.0 / tl.sqrt(tl.sum(wide * wide, 1) / D + eps)
        w = tl.load(weight + col, mask=col < D, other=0.0).to(tl.float32)
        tl.store(y + here, (wide * s[:, None] * w[None, :]).to(y.dtype.element_ty), mask=live)
        tl.store(scale + row, s, mask=row < rows)

    @triton.jit
    def _rms_norm_backward_kernel(
        x, weight, scale, dy, dtotal, dx, ddelta, dw, rows, x_stride, dy_stride, dtotal_stride,
        ADD: tl.constexpr, NARROW: tl.constexpr, D: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    ):  # fmt: skip
        """With x̂ = x · s:  dx = s · (w·dy − x̂ · mean(w·dy·x̂)),  dw = Σ_rows dy · x̂.

        With ADD, `dtotal` comes to dx along the residual stream; with NARROW dx is stored a second time, in the dtype
        of what was added. A fixed number of programs strides over the rows; each sums its share of dw in float32 into
        its own row of `dw`, and the caller adds those up, so that the result does not depend on who runs first.
        """
        program = tl.program_id(0).to(tl.int64)
        col = tl.arange(0, C)
        w = tl.load(weight + col, mask=col < D, other=0.0).to(tl.float32)
        dw_sum = tl.zeros((C,), tl.float32)
        for first in range(program * R, rows, tl.num_programs(0) * R):
            row = (first + tl.arange(0, R)).to(tl.int64)
            live = (row < rows)[:, None] & (col < D)[None, :]
            here = row[:, None] * D + col[None, :]
            s = tl.load(scale + row, mask=row < rows, other=0.0)[:, None]
            x_hat = tl.load(x + row[:, None] * x_stride + col[None, :], mask=live, other=0.0).to(tl.float32) * s
            g = tl.load(dy + row[:, None] * dy_stride + col[None, :], mask=live, other=0.0).to(tl.float32)
            wg = g * w[None, :]
            d = s * (wg - x_hat * (tl.sum(wg * x_hat, 1) / D)[:, None])
            if ADD:
                d += tl.load(dtotal + row[:, None] * dtotal_stride + col[None, :], mask=live, other=0.0).to(tl.float32)
            tl.store(dx + here, d.to(dx.dtype.element_ty), mask=live)
            if NARROW:
                tl.store(ddelta + here, d.to(ddelta.dtype.element_ty), mask=live)
            dw_sum += tl.sum(g * x_hat, 0)
        tl.store(dw + program * D + col, dw_sum, mask=col < D)

    @triton.jit
    def _swiglu_forward_kernel(gate, up, y, rows, gate_stride, up_stride, D, R: tl.constexpr, C: tl.constexpr):
        row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
        col = (tl.program_id(1) * C + tl.arange(0, C))[None, :]
        live = (row < rows) & (col < D)
        g = tl.load(gate + row * gate_stride + col, mask=live, other=0.0).to(tl.float32)
        u = tl.load(up + row * up_stride + col, mask=live, other=0.0).to(tl.float32)
        tl.store(y + row * D + col, (g / (1.0 + tl.exp(-g)) * u).to(y.dtype.element_ty), mask=live)

    @triton.jit
    def _swiglu_backward_kernel(
        gate, up, dy, dgate, dup, rows, gate_stride, up_stride, dy_stride, D, R: tl.constexpr, C: tl.constexpr
    ):
        """With σ = sigmoid(gate):  dup = dy · gate · σ,  dgate = dy · up · σ · (1 + gate · (1 − σ))."""
        row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
        col = (tl.program_id(1) * C + tl.arange(0, C))[None, :]
        live = (row < rows) & (col < D)
        g = tl.load(gate + row * gate_stride + col, mask=live, other=0.0).to(tl.float32)
        u = tl.load(up + row * up_stride + col, mask=live, other=0.0).to(tl.float32)
        d = tl.load(dy + row * dy_stride + col, mask=live, other=0.0).to(tl.float32)
        sigma = 1.0 / (1.0 + tl.exp(-g))
        dg = d * u * sigma * (1.0 + g * (1.0 - sigma))
        tl.store(dgate + row * D + col, dg.to(dgate.dtype.element_ty), mask=live)
        tl.store(dup + row * D + col, (d * g * sigma).to(dup.dtype.element_ty), mask=live)

    @triton.jit
    def _cross_entropy_kernel(logits, targets, loss, stride, V, ignore_index, C: tl.constexpr):
        """A row a program, in two passes: the running maximum and sum of exponentials, then the gradient in place.
        A target outside 0 … V − 1 gives NaN."""
        row = tl.program_id(0).to(tl.int64)
        target = tl.load(targets + row)
        logits += row * stride
        top, total, hit = -float("inf"), 0.0, 0.0
        for first in range(0, V, C):
            col = first + tl.arange(0, C)
            wide = tl.load(logits + col, mask=col < V, other=-float("inf")).to(tl.float32)
            higher = tl.maximum(top, tl.max(wide, 0))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(wide - higher), 0)
            hit += tl.sum(tl.where(col == target, wide, 0.0), 0)
            top = higher
        log_sum = top + tl.log(total)
        live = target != ignore_index
        hit = tl.where((target >= 0) & (target < V), hit, float("nan"))
        tl.store(loss + row, tl.where(live, log_sum - hit, 0.0))
        for first in range(0, V, C):
            col = first + tl.arange(0, C)
            wide = tl.load(logits + col, mask=col < V, other=-float("inf")).to(tl.float32)
            d = tl.where(live, tl.exp(wide - log_sum) - tl.where(col == target, 1.0, 0.0), 0.0)
            tl.store(logits + col, d.to(logits.dtype.element_ty), mask=col < V)


def _rows(x: Tensor) -> Tensor:
    """x as (rows, D) whose last axis is contiguous: a view where there is one, else a copy."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _launch(kernel, grid: tuple[int, ...], *arguments, **options) -> None:
    """Runs a Triton kernel on the device of its first argument."""
    with torch.cuda.device_of(arguments[0]):  # of a CPU's tensor: no change
        kernel[grid](*arguments, **options)


def _tile(d: int) -> dict[str, int]:
    """One program's tile: R rows of C ≥ d columns, powers of two, about 4,096 elements; and its warps."""
    columns = triton.next_power_of_2(d)
    rows = max(1, 4096 // columns)
    return {"R": rows, "C": columns, "num_warps": min(16, max(4, rows * columns // 1024))}


@torch.library.custom_op("lumi::rms_norm", mutates_args=())
def _rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum x + delta, its normalised copy in `dtype`, and 1/rms of each row.

    Without a delta x itself is normalised, and the sum left empty: an operator must not return its input.
    """
    total, y, scale = _rms_norm_fake(x, delta, weight, eps, dtype)
    if x.numel():
        flat, added, tile = _rows(x), None if delta is None else _rows(delta), _tile(x.shape[-1])
        strides = flat.stride(0), 0 if delta is None else added.stride(0)
        tensors = flat, added, weight.contiguous(), total, y, scale
        tile |= {"ADD": delta is not None, "D": x.shape[-1]}
        _launch(
            _rms_norm_forward_kernel, (triton.cdiv(len(flat), tile["R"]),), *tensors, len(flat), *strides, eps, **tile
        )
    return total, y, scale


@_rms_norm.register_fake
def _rms_norm_fake(x, delta, weight, eps, dtype):
    if weight.shape != x.shape[-1:] or (delta is not None and delta.shape != x.shape):
        added = "" if delta is None else f", delta {tuple(delta.shape)}"
        raise ValueError(f"x is {tuple(x.shape)}{added}, weight {tuple(weight.shape)}; they do not fit")
    total = x.new_empty(0 if delta is None else x.shape)
    return total, x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("lumi::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    x: Tensor, weight: Tensor, scale: Tensor, dy: Tensor, dtotal: Tensor | None, narrow: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, of what was added to it if that is of another dtype, `narrow`, and of the weight."""
    dx, ddelta, dw = _rms_norm_backward_fake(x, weight, scale, dy, dtotal, narrow)
    if not x.numel():
        return dx, ddelta, dw.zero_()
    flat, dy, tile = _rows(x), _rows(dy), _tile(x.shape[-1])
    dtotal = None if dtotal is None else _rows(dtotal)
    strides = flat.stride(0), dy.stride(0), 0 if dtotal is None else dtotal.stride(0)
    programs = min(512, triton.cdiv(len(flat), tile["R"]))
    parts = x.new_empty(programs, x.shape[-1], dtype=torch.float32)
    tensors = flat, weight.contiguous(), scale, dy, dtotal, dx, ddelta, parts
    tile |= {"ADD": dtotal is not None, "NARROW": narrow is not None, "D": x.shape[-1]}
    _launch(_rms_norm_backward_kernel, (programs,), *tensors, len(flat), *strides, **tile)
    return dx, ddelta, dw.copy_(parts.sum(0))


@_rms_norm_backward.register_fake
def _rms_norm_backward_fake(x, weight, scale, dy, dtotal, narrow):
    ddelta = x.new_empty(x.shape if narrow else 0, dtype=narrow or x.dtype)
    return x.new_empty(x.shape), ddelta, weight.new_empty(weight.shape)


def _rms_norm_setup(ctx, inputs, output):
    x, delta, weight, _, _ = inputs
    total, _, scale = output
    ctx.save_for_backward(x if delta is None else total, weight, scale)
    ctx.added = None if delta is None else delta.dtype
    ctx.set_materialize_grads(False)


def _rms_norm_gradients(ctx, dtotal, dy, _):
    x, weight, scale = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dtotal = dtotal if ctx.added else None
    narrow = None if ctx.added == x.dtype else ctx.added
    dx, ddelta, dw = torch.ops.lumi.rms_norm_backward(x, weight, scale, dy, dtotal, narrow)
    if ctx.added is None:
        ddelta = None
    elif narrow is None:
        ddelta = dx
    return dx, ddelta, dw, None, None


_rms_norm.register_autograd(_rms_norm_gradients, setup_context=_rms_norm_setup)


def _swiglu_launch(kernel, inputs: list[Tensor], outputs: list[Tensor]) -> None:
    """Runs a kernel over the inputs' rows, in tiles of about 1,024 elements."""
    if inputs[0].numel():
        flat = [_rows(x) for x in inputs]
        rows, d = flat[0].shape
        c = min(1024, triton.next_power_of_2(d))
        r = 1024 // c
        grid = triton.cdiv(rows, r), triton.cdiv(d, c)
        _launch(kernel, grid, *flat, *outputs, rows, *(x.stride(0) for x in flat), d, R=r, C=c)


@torch.library.custom_op("lumi::swiglu", mutates_args=())
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    y = _swiglu_fake(gate, up)
    _swiglu_launch(_swiglu_forward_kernel, [gate, up], [y])
    return y


@torch.library.custom_op("lumi::swiglu_backward", mutates_args=())
def _swiglu_backward(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    _swiglu_launch(_swiglu_backward_kernel, [gate, up, dy], [dgate, dup])
    return dgate, dup


@_swiglu.register_fake
def _swiglu_fake(gate, up):
    if gate.shape != up.shape:
        raise ValueError(f"gate is {tuple(gate.shape)} and up {tuple(up.shape)}; expected one shape")
    return gate.new_empty(gate.shape)


_swiglu_backward.register_fake(lambda gate, up, dy: (gate.new_empty(gate.shape), gate.new_empty(gate.shape)))
_swiglu.register_autograd(
    lambda ctx, dy: torch.ops.lumi.swiglu_backward(*ctx.saved_tensors, dy),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def _use_triton(kernels: str, x: Tensor) -> bool:
    """ "auto" leaves to torch.compile what it can fuse with the operations around it, and float64 to PyTorch."""
    if kernels != "auto":
        return kernels == "triton"
    return x.is_cuda and x.dtype != torch.float64 and triton is not None and not torch.compiler.is_compiling()


def _matmul_dtype(x: Tensor) -> torch.dtype:
    """What a linear layer computes x in here: autocast's dtype, or its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float, kernels: str = "auto") -> Tensor:
    """`rms_norm_torch`, or the Triton kernel for the same, in the dtype that the next linear layer computes in."""
    if _use_triton(kernels, x):
        return _rms_norm(x, None, weight, eps, _matmul_dtype(x))[1]
    return rms_norm_torch(x, weight, eps, _matmul_dtype(x))


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float, kernels: str = "auto") -> tuple[Tensor, Tensor]:
    """x + delta in x's dtype, and `rms_norm` of it: read once. delta: of x's shape and any floating dtype."""
    if _use_triton(kernels, x):
        return _rms_norm(x, delta, weight, eps, _matmul_dtype(x))[:2]
    total = (x + delta).to(x.dtype)
    return total, rms_norm_torch(total, weight, eps, _matmul_dtype(x))


def swiglu(gate: Tensor, up: Tensor, kernels: str = "auto") -> Tensor:
    """`swiglu_torch`, or the Triton kernel for the same."""
    return _swiglu(gate, up) if _use_triton(kernels, gate) else swiglu_torch(gate, up)
