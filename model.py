"""The LLaMA, whole: configuration, kernels, layers, loss and cached generation. Imports nothing from the project.

A decoder-only Transformer (Touvron et al. 2023, arXiv:2302.13971): token embedding, `n_layers` blocks, RMSNorm, output
projection. A block adds two things to the residual stream, each reading a normalised copy of it: causal attention with
rotary positions, and a SwiGLU feed-forward network. There are no biases and no dropout.

In shapes: B batch, T tokens, D d_model, H heads, K key-value heads, E head dimension, F d_ff, V vocabulary.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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
    """RMSNorm and SwiGLU by "triton" or "torch"; "auto" is Triton on a GPU, PyTorch elsewhere."""

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

    @property
    def head_dim(self) -> int:
        """E, the width of one head."""
        return self.d_model // self.n_heads


# ----------------------------------------------------------------------------------------------------------- kernels
#
# Each kernel has a plain-PyTorch twin that says what it computes. The kernels read and write what they are given, in
# float32, float16 or bfloat16, and compute in float32. Offsets are int64: a tensor may hold more than 2³¹ elements.


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = x / sqrt(mean(x²) + eps) · weight over the last axis, in float32 at least (arXiv:1910.07467).

    x: (..., D) of any floating dtype, weight: (D,). Returns (..., D) in x's dtype.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight).to(x.dtype)


def swiglu_torch(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, elementwise (arXiv:2002.05202). gate, up: (..., F) of one dtype; returns the same."""
    return F.silu(gate) * up


if triton is not None:

    @triton.jit
    def _rms_norm_forward(x, weight, y, scale, rows, x_stride, eps, D: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
        """R rows a program, C ≥ D columns (a power of two). Keeps each row's 1/rms in `scale` for the backward pass."""
        row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
        col = tl.arange(0, C)
        live = (row < rows)[:, None] & (col < D)[None, :]
        wide = tl.load(x + row[:, None] * x_stride + col[None, :], mask=live, other=0.0).to(tl.float32)
        s = 1.0 / tl.sqrt(tl.sum(wide * wide, 1) / D + eps)
        w = tl.load(weight + col, mask=col < D, other=0.0).to(tl.float32)
        out = wide * s[:, None] * w[None, :]
        tl.store(y + row[:, None] * D + col[None, :], out.to(y.dtype.element_ty), mask=live)
        tl.store(scale + row, s, mask=row < rows)

    @triton.jit
    def _rms_norm_backward(
        x, weight, scale, dy, dx, dw, rows, x_stride, dy_stride, D: tl.constexpr, R: tl.constexpr, C: tl.constexpr
    ):
        """With x̂ = x · s:  dx = s · (w·dy − x̂ · mean(w·dy·x̂)),  dw = Σ_rows dy · x̂.

        A fixed number of programs strides over the rows; each sums its share of dw in float32 into its own row of
        `dw`, and the caller adds those rows up, so the result does not depend on the order programs run in.
        """
        program = tl.program_id(0).to(tl.int64)
        col = tl.arange(0, C)
        w = tl.load(weight + col, mask=col < D, other=0.0).to(tl.float32)
        dw_sum = tl.zeros((C,), tl.float32)
        for first in range(program * R, rows, tl.num_programs(0) * R):
            row = first + tl.arange(0, R)
            live = (row < rows)[:, None] & (col < D)[None, :]
            s = tl.load(scale + row, mask=row < rows, other=0.0)[:, None]
            x_hat = tl.load(x + row[:, None] * x_stride + col[None, :], mask=live, other=0.0).to(tl.float32) * s
            g = tl.load(dy + row[:, None] * dy_stride + col[None, :], mask=live, other=0.0).to(tl.float32)
            wg = g * w[None, :]
            d = s * (wg - x_hat * (tl.sum(wg * x_hat, 1) / D)[:, None])
            tl.store(dx + row[:, None] * D + col[None, :], d.to(dx.dtype.element_ty), mask=live)
            dw_sum += tl.sum(g * x_hat, 0)
        tl.store(dw + program * D + col, dw_sum, mask=col < D)

    @triton.jit
    def _swiglu_forward(gate, up, y, n, C: tl.constexpr):
        i = tl.program_id(0).to(tl.int64) * C + tl.arange(0, C)
        g = tl.load(gate + i, mask=i < n, other=0.0).to(tl.float32)
        u = tl.load(up + i, mask=i < n, other=0.0).to(tl.float32)
        tl.store(y + i, (g / (1.0 + tl.exp(-g)) * u).to(y.dtype.element_ty), mask=i < n)

    @triton.jit
    def _swiglu_backward(gate, up, dy, dgate, dup, n, C: tl.constexpr):
        """With σ = sigmoid(gate):  dup = dy · gate · σ,  dgate = dy · up · σ · (1 + gate · (1 − σ))."""
        i = tl.program_id(0).to(tl.int64) * C + tl.arange(0, C)
        g = tl.load(gate + i, mask=i < n, other=0.0).to(tl.float32)
        u = tl.load(up + i, mask=i < n, other=0.0).to(tl.float32)
        d = tl.load(dy + i, mask=i < n, other=0.0).to(tl.float32)
        sigma = 1.0 / (1.0 + tl.exp(-g))
        tl.store(dgate + i, (d * u * sigma * (1.0 + g * (1.0 - sigma))).to(dgate.dtype.element_ty), mask=i < n)
        tl.store(dup + i, (d * g * sigma).to(dup.dtype.element_ty), mask=i < n)


def _rows(x: Tensor) -> Tensor:
    """x as (rows, D) whose last axis is contiguous: a view where there is one, else a copy."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _tile(d: int) -> tuple[int, int]:
    """Rows and columns of one program's tile: about 4,096 elements, both powers of two."""
    columns = triton.next_power_of_2(d)
    return max(1, 4096 // columns), columns


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        flat = _rows(x)
        rows, d = flat.shape
        y = torch.empty_like(flat, memory_format=torch.contiguous_format)
        scale = torch.empty(rows, dtype=torch.float32, device=x.device)
        r, c = _tile(d)
        if rows:
            _rms_norm_forward[(triton.cdiv(rows, r),)](
                flat, weight.contiguous(), y, scale, rows, flat.stride(0), eps, D=d, R=r, C=c
            )
        ctx.save_for_backward(flat, weight, scale)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, weight, scale = ctx.saved_tensors
        rows, d = x.shape
        flat = _rows(dy)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        r, c = _tile(d)
        programs = min(256, triton.cdiv(rows, r))
        dw = torch.zeros(programs, d, dtype=torch.float32, device=x.device)
        if rows:
            _rms_norm_backward[(programs,)](
                x, weight.contiguous(), scale, flat, dx, dw, rows, x.stride(0), flat.stride(0), D=d, R=r, C=c
            )
        return dx.view(dy.shape), dw.sum(0).to(weight.dtype), None


class _SwiGLU(torch.autograd.Function):
    BLOCK = 1024

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        y = torch.empty_like(gate)
        if n := gate.numel():
            _swiglu_forward[(triton.cdiv(n, _SwiGLU.BLOCK),)](gate, up, y, n, C=_SwiGLU.BLOCK)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        if n := gate.numel():
            _swiglu_backward[(triton.cdiv(n, _SwiGLU.BLOCK),)](
                gate, up, dy.contiguous(), dgate, dup, n, C=_SwiGLU.BLOCK
            )
        return dgate, dup


def _use_triton(kernels: str, x: Tensor) -> bool:
    return kernels == "triton" or (kernels == "auto" and x.is_cuda and triton is not None)


def rms_norm(x: Tensor, weight: Tensor, eps: float, kernels: str = "auto") -> Tensor:
    """`rms_norm_torch`, or the Triton kernel for the same."""
    return _RMSNorm.apply(x, weight, eps) if _use_triton(kernels, x) else rms_norm_torch(x, weight, eps)


def swiglu(gate: Tensor, up: Tensor, kernels: str = "auto") -> Tensor:
    """`swiglu_torch`, or the Triton kernel for the same."""
    return _SwiGLU.apply(gate, up) if _use_triton(kernels, gate) else swiglu_torch(gate, up)


# -------------------------------------------------------------------------------------------------------------- loss


class _LinearCrossEntropy(torch.autograd.Function):
    """Σ_t −log softmax(x_t · Wᵀ)[target_t] without ever holding all N × V logits.

    A chunk of rows at a time: logits, loss, and at once the gradient (softmax − onehot) that these logits have, carried
    on to x and W. The buffers are reused: at 32,768 pieces, fresh memory costs more in page faults than in arithmetic.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        w, chunk = weight.to(dtype), 256 if device == "cpu" else 4096
        wide = torch.promote_types(dtype, torch.float32)
        logits = torch.empty(chunk, len(w), dtype=dtype, device=x.device)
        log_p = torch.empty(chunk, len(w), dtype=wide, device=x.device)
        loss = torch.zeros((), dtype=wide, device=x.device)
        learn = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        dx = torch.empty_like(x, memory_format=torch.contiguous_format) if learn else None
        dw = torch.zeros_like(weight, dtype=wide) if learn else None
        for first in range(0, len(x), chunk):
            rows = slice(first, min(first + chunk, len(x)))
            xc, tc = x[rows].to(dtype), targets[rows, None]
            lc, pc = logits[: len(xc)], log_p[: len(xc)]
            torch.mm(xc, w.T, out=lc)
            torch.log_softmax(lc, 1, dtype=wide, out=pc)
            loss -= pc.gather(1, tc).sum()
            if learn:
                g = pc.exp_().scatter_add_(1, tc, pc.new_full(tc.shape, -1.0)).to(dtype)
                dx[rows] = g @ w
                dw += g.T @ xc
        ctx.save_for_backward(dx, dw)
        ctx.dtype = weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor):
        dx, dw = ctx.saved_tensors
        return dx * dloss.to(dx.dtype), (dw * dloss).to(ctx.dtype), None


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, of `F.linear(x, weight)` against `targets`.

    x: (N, D), weight: (V, D), targets: (N,) int64 in [0, V). Returns a scalar, float32 or wider.
    """
    return _LinearCrossEntropy.apply(x, weight, targets) / len(x)


# ------------------------------------------------------------------------------------------------------------ layers


class KVCache:
    """Keys and values of the tokens seen so far, in memory set aside once for `length` tokens.

    k, v: (n_layers, B, K, length, E). `used` counts the tokens held.
    """

    def __init__(self, model: "Transformer", batch_size: int, length: int):
        c = model.config
        shape = (c.n_layers, batch_size, c.n_kv_heads or c.n_heads, length, c.head_dim)
        self.k = torch.empty(shape, dtype=model.embed.weight.dtype, device=model.embed.weight.device)
        self.v = torch.empty_like(self.k)
        self.used = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k, v: (B, K, T, E) after the tokens held; returns all of the layer's, (B, K, used + T, E)."""
        end = self.used + k.shape[2]
        self.k[layer, :, :, self.used : end] = k
        self.v[layer, :, :, self.used : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


class RMSNorm(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.eps, self.kernels = config.rms_norm_eps, config.kernels

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.kernels)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding: turns the pairs (x_i, x_{i + E/2}) by an angle that grows with the position.

    x: (B, T, H, E); cos, sin: (T, 1, E/2). Returns x's shape and dtype. After it, q · k depends on the positions only
    through their difference (arXiv:2104.09864). The halves are paired as in the Hugging Face layout.
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        B, T, _ = x.shape
        q = rotate(self.q(x).view(B, T, self.n_heads, self.head_dim), cos, sin).transpose(1, 2)  # (B, H, T, E)
        k = rotate(self.k(x).view(B, T, self.n_kv_heads, self.head_dim), cos, sin).transpose(1, 2)  # (B, K, T, E)
        v = self.v(x).view(B, T, self.n_kv_heads, self.head_dim).transpose(1, 2)  # (B, K, T, E)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        if self.n_kv_heads < self.n_heads:
            k, v = (t.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1) for t in (k, v))
        # A query sees the keys up to its own position: the last T of S keys are the queries' own.
        S = k.shape[2]
        mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T) if 1 < T < S else None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=T == S)  # (B, H, T, E)
        return self.o(y.transpose(1, 2).reshape(B, T, -1))


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
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(config), Attention(config, layer)
        self.mlp_norm, self.mlp = RMSNorm(config), SwiGLU(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        x = x + self.attn(self.attn_norm(x), cos, sin, cache)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """The model. Weights are float32, drawn from torch's global generator: normal with deviation 0.02, and for the two
    projections that write into the residual stream 0.02 / √(2 · n_layers), so that its variance at the last block does
    not grow with depth (GPT-2's rule)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        frequency = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)
        angle = torch.outer(torch.arange(config.context_length, dtype=torch.float64), frequency)[:, None]  # (T, 1, E/2)
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                residual = name.endswith(("attn.o.weight", "mlp.down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config.n_layers) if residual else 0.02)

    def num_parameters(self) -> int:
        """Every trained number once, embeddings included."""
        return sum(p.numel() for p in self.parameters())

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """What the output projection reads, (B, T, D), for tokens: (B, T) int64. The rest as in `forward`."""
        past = cache.used if cache is not None else 0
        end = past + tokens.shape[1]
        if end > self.config.context_length:
            raise ValueError(f"{end} tokens; context_length is {self.config.context_length}")
        cos, sin = self.cos[past:end], self.sin[past:end]
        x = self.embed(tokens)  # (B, T, D)
        for block in self.blocks:
            x = block(x, cos, sin, cache)
        if cache is not None:
            cache.used = end
        return self.norm(x)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Logits, or with `targets` the mean loss.

        tokens: (B, T) int64, T ≤ context_length. targets: (B, T) int64, the token that follows each of `tokens`: the
        caller shifts, once; nothing is shifted here. cache: keys and values of earlier tokens, extended by these.
        Returns logits (B, T, V), or a scalar: mean cross-entropy in nats. Raises ValueError past the context.
        """
        x = self.hidden(tokens, cache)
        if targets is None:
            return self.head(x)  # (B, T, V)
        return linear_cross_entropy(x.flatten(0, 1), self.head.weight, targets.flatten())

    # ----------------------------------------------------------------------------------------------------- generation

    @torch.inference_mode()
    def stream(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Collection[int] = (),
    ) -> Iterator[int]:
        """Yields up to `max_new_tokens` ids that continue `ids`, each as soon as it is drawn.

        temperature: 0 takes the likeliest token, 1 samples the model's own distribution. top_k, top_p: sample only
        among the k likeliest tokens, or the fewest whose probabilities reach p (arXiv:1904.09751). seed: of the draws;
        None draws afresh. stop: ids that end the text, not yielded themselves. The model sees the last tokens that fit
        its context: when it is full, the later half of it is read again. Raises ValueError for impossible arguments.
        """
        context = self.config.context_length
        if not ids or not all(0 <= i < self.config.vocab_size for i in ids):
            raise ValueError(f"expected at least one id, each in 0..{self.config.vocab_size - 1}; got {list(ids)[:8]}")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature is {temperature}; expected 0 (greedy) or more")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k is {top_k}; expected at least 1")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p is {top_p}; expected more than 0, at most 1")
        if seed is not None and not 0 <= seed < 2**63:
            raise ValueError(f"seed is {seed}; expected 0 to 2^63 - 1")
        generator = torch.Generator()
        generator.seed() if seed is None else generator.manual_seed(seed)
        seen = list(ids)[-context:]
        cache, fresh = KVCache(self, 1, context), seen
        for _ in range(max_new_tokens):
            if cache.used + len(fresh) > context:
                cache.used, fresh = 0, seen[-max(1, context // 2) :]
            logits = self(torch.tensor([fresh], device=self.embed.weight.device), cache=cache)[0, -1]
            token = sample(logits.float().cpu(), temperature, top_k, top_p, generator)
            if token in stop:
                return
            yield token
            seen.append(token)
            fresh = [token]

    def generate(self, ids: Sequence[int], max_new_tokens: int, **options) -> list[int]:
        """The new ids of `stream`, as a list."""
        return list(self.stream(ids, max_new_tokens, **options))


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> int:
    """One id drawn from logits: (V,) float32. Temperature first, then top_k, then top_p on what is left."""
    if temperature == 0:
        return int(logits.argmax())
    order = logits.sort(descending=True, stable=True)
    p = torch.softmax((order.values - order.values[0]).double() / temperature, 0)
    if top_k is not None:
        p[top_k:] = 0
    if top_p is not None:
        p = p / p.sum()
        p[p.cumsum(0) - p >= top_p] = 0  # the token that reaches top_p is the last one kept
    return int(order.indices[torch.multinomial(p, 1, generator=generator)])
