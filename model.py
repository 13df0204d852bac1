"""The LLaMA, from the config to the loss, to be read from top to bottom. Imports nothing from the project."""

# A decoder-only Transformer (Touvron et al. 2023, arXiv:2302.13971). Each token becomes a vector of width D, its
# residual stream. Every block adds to the stream twice: attention moves information between positions, then the
# feed-forward network works on each position alone. The last norm and the output projection turn the stream into one
# score (logit) for each piece of the vocabulary. There are no biases and no dropout.
#
# Letters in shape comments: B batch, T tokens, S keys, N = B · T rows, D d_model, H query heads, K key-value heads,
# E head dimension, V vocabulary.

import copy
import functools
import itertools
import math
import threading
from contextlib import nullcontext
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this system: use the plain PyTorch functions
    triton = None

# -------------------------------------------------------------------------------------------------------------- config


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How a model that was trained on short texts turns its positions in longer ones."""

    # Without original_context every pair of dimensions turns `factor` times as slowly (arXiv:2306.15595). With it, as
    # in Llama 3.1 and later, only pairs that make few turns in the original context do. Pairs with at least
    # high_freq_factor turns stay as they are; below low_freq_factor the whole factor counts; between, a part of it.
    factor: float
    original_context: int | None = None  # tokens
    low_freq_factor: float = 1.0  # turns
    high_freq_factor: float = 4.0

    def slowed(self, frequency: Tensor) -> Tensor:
        """The scaled frequencies. frequency: (E/2,), in radians for each position."""
        kept = torch.zeros_like(frequency)  # the share of a pair that is not slowed
        if self.original_context is not None:
            turns = self.original_context * frequency / (2 * math.pi)
            kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = kept.clamp(0, 1)
        return frequency * (kept + (1 - kept) / self.factor)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a model. Raises TypeError or ValueError, naming the field, for an impossible shape."""

    vocab_size: int  # rows of the embedding, one for each piece of the tokenizer
    context_length: int = 1_024  # the most tokens that the model can see at once
    n_layers: int  # number of blocks
    d_model: int  # width of the residual stream
    n_heads: int  # query heads, d_model / n_heads wide each
    n_kv_heads: int | None = None  # key-value heads, shared by the query heads (arXiv:2305.13245); None: n_heads
    d_ff: int | None = None  # width of the feed-forward network; None: 4 × d_model
    rope_theta: float = 10_000.0  # base of the rotary wavelengths (arXiv:2104.09864)
    rope_scaling: RopeScaling | None = None  # of imported models whose context was extended
    rms_norm_eps: float = 1e-5  # added to the mean square, so that a row of zeros is not divided by 0
    tie_embeddings: bool = False  # use the embedding matrix as the output projection too
    # What computes RMSNorm, SwiGLU and cross-entropy: "triton" or "torch"; "auto" is Triton on a GPU, else PyTorch.
    # Compiled blocks always use PyTorch's operations, because torch.compile can fuse those but not our kernels.
    kernels: str = "auto"

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            allowed = (int, float) if field.type is float else field.type
            is_bool = isinstance(value, bool)
            if not isinstance(value, allowed) or (is_bool and field.type is not bool):
                expected = getattr(field.type, "__name__", field.type)
                raise TypeError(f"{field.name} is {value!r} ({type(value).__name__}); expected {expected}")
            if isinstance(value, (int, float)) and not is_bool and not 0 < value < math.inf:
                raise ValueError(f"{field.name} is {value}; expected a positive number")
        if self.d_model % (2 * self.n_heads):
            shape = f"d_model is {self.d_model} and n_heads {self.n_heads}"
            raise ValueError(f"{shape}; d_model / n_heads must be a whole, even number: RoPE turns pairs of dimensions")
        if self.n_kv_heads is not None and self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads is {self.n_kv_heads}; it must divide n_heads, which is {self.n_heads}")
        if self.kernels not in ("auto", "triton", "torch"):
            raise ValueError(f'kernels is {self.kernels!r}; expected "auto", "triton" or "torch"')

    @property
    def head_dim(self) -> int:
        """E, the width of one head."""
        return self.d_model // self.n_heads

    def flops_per_token(self, T: int) -> int:
        """`Transformer.flops_per_token`, computed without memory for the weights."""
        with torch.device("meta"):
            return Transformer(self).flops_per_token(T)


class RMSNorm(nn.Module):
    """Scales each position's vector to a root mean square of 1, then each dimension by a learnt gain."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))  # the gains
        self.eps, self.kernels = config.rms_norm_eps, config.kernels

    def forward(self, x: Tensor) -> Tensor:
        # The stream grows from block to block; the norm keeps every layer's input at the same size. LayerNorm also
        # subtracts the mean and adds a bias: models are as good without these two, and a little faster.
        return rms_norm(x, self.weight, self.eps, self.kernels)  # (B, T, D)


# ---------------------------------------------------------------------------------------------------------------- RoPE


def rotary_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, (context_length, 1, E) float32 each, as `rotate` wants them."""
    # Pair i turns by position / theta^(2i/E): the first pair makes a turn in about 6 tokens, the last one hardly moves
    # over the whole context. Fast pairs measure near distances, slow pairs far ones.
    even = torch.arange(0, config.head_dim, 2, dtype=torch.float64)
    frequency = config.rope_theta ** (-even / config.head_dim)  # (E/2,)
    if config.rope_scaling:
        frequency = config.rope_scaling.slowed(frequency)
    position = torch.arange(config.context_length, dtype=torch.float64)  # in float32 large angles are inexact
    angle = torch.outer(position, frequency)[:, None]  # (T, 1, E/2)
    cos, sin = angle.cos(), angle.sin()
    cos = torch.cat((cos, cos), -1)
    sin = torch.cat((-sin, sin), -1)  # minus in the first half: see `rotate`
    return cos.float(), sin.float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding: turns the pairs (x_i, x_{i + E/2}) by an angle that grows with the position."""
    # x: (B, T, H, E). cos, sin: (T, 1, E) or (B, T, 1, E). Returns x's shape and dtype (arXiv:2104.09864).
    #
    # A rotated q times a rotated k depends only on the distance between their positions: attention can look for
    # "three tokens back" without knowing "token 517". Hugging Face pairs the dimensions in the same way.
    other_half = x.roll(x.shape[-1] // 2, -1)  # x_{i + E/2} in the first half, x_i in the second
    return torch.addcmul(x * cos, other_half, sin).to(x.dtype)  # x_i cos − x_{i + E/2} sin, x_{i + E/2} cos + x_i sin


# ----------------------------------------------------------------------------------------------------------- attention


def sees(query: Tensor, key: Tensor) -> Tensor:
    """True where a query sees a key. Both are positions in their text: int64, in shapes that broadcast."""
    # One rule for training, decoding, packed rows and evaluation. Try a window of 64 keys: docs/changing.md.
    # Causal: a position must not see later tokens, because those are what the model must learn to predict.
    return key <= query


class Layout:
    """Where the keys of a forward pass lie, and which of them each query sees."""

    # This class attends within whole rows. `Cached`, below, adds earlier keys; `Packed` regroups rows by text.

    def __init__(self, cos: Tensor, sin: Tensor, mask: Tensor | None):
        self.cos, self.sin = cos, sin  # at each token's position: (T, 1, E) or (B, T, 1, E)
        # (B or 1, 1, T, S), True where a query sees a key; `Cached` has floats: 0 there, −∞ elsewhere. None: no mask.
        self.mask = mask

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: (B, H, T, E), k and v: (B, K, T, E), rotated. Returns (B, H, T, E)."""
        return softmax_attention(q, k, v, self.mask, causal=self.mask is None, same_shape=True)


# The attention kernels that PyTorch may use on a GPU when shapes change from call to call. cuDNN, which PyTorch prefers
# on newer GPUs, is left out: it prepares a plan for every new shape, which takes long.
ANY_SHAPE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, same_shape=False) -> Tensor:
    """softmax(q kᵀ / √E) v over the keys that each query sees. Shapes as in `Layout.attend`."""
    # PyTorch's fused operator never holds all T × S scores (flash attention, arXiv:2205.14135). Its fastest kernels
    # know the causal pattern, but take no mask: that is why `mask` is None wherever the pattern is plain causal.
    # same_shape: most calls have the same shapes, as in pretraining. Then PyTorch may use cuDNN.
    grouped = k.shape[1] < q.shape[1]  # several query heads share one key-value head
    if grouped and q.is_cuda and (q.dtype == torch.float32 or mask is not None):
        # On a GPU only flash attention and an unfused kernel share heads. Flash attention takes neither float32 nor
        # masks, and the unfused kernel holds all scores. With copies of the heads PyTorch uses another fused kernel.
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)  # (B, H, S, E)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        grouped = False
    with sdpa_kernel(ANY_SHAPE) if q.is_cuda and not same_shape else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


class Attention(nn.Module):
    """Self-attention: the query (q) of a position scores the keys (k) that it sees, and mixes their values (v)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads or config.n_heads
        self.head_dim = config.head_dim
        self.q = nn.Linear(config.d_model, self.n_heads * self.head_dim, bias=False)
        self.k = nn.Linear(config.d_model, self.n_kv_heads * self.head_dim, bias=False)
        self.v = nn.Linear(config.d_model, self.n_kv_heads * self.head_dim, bias=False)
        self.o = nn.Linear(self.n_heads * self.head_dim, config.d_model, bias=False)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        B, T, _ = x.shape
        q = self.q(x).view(B, T, self.n_heads, self.head_dim)  # (B, T, H, E)
        k = self.k(x).view(B, T, self.n_kv_heads, self.head_dim)  # (B, T, K, E)
        v = self.v(x).view(B, T, self.n_kv_heads, self.head_dim)  # (B, T, K, E)
        # Only q and k are rotated: positions affect the scores, not the values.
        q = rotate(q, layout.cos, layout.sin)
        k = rotate(k, layout.cos, layout.sin)
        y = layout.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # (B, H, T, E)
        return self.o(y.transpose(1, 2).reshape(B, T, -1))  # join the heads, then mix them: (B, T, D)


class SwiGLU(nn.Module):
    """The feed-forward network: down(silu(gate(x)) · up(x)) (arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d_ff = config.d_ff or 4 * config.d_model
        self.gate = nn.Linear(config.d_model, d_ff, bias=False)
        self.up = nn.Linear(config.d_model, d_ff, bias=False)
        self.down = nn.Linear(d_ff, config.d_model, bias=False)
        self.kernels = config.kernels

    def forward(self, x: Tensor) -> Tensor:
        # `gate` says how much of each of `up`'s d_ff features passes. Try F.gelu without a gate: docs/changing.md.
        return self.down(swiglu(self.gate(x), self.up(x), self.kernels))  # (B, T, D)


class Block(nn.Module):
    """One layer of the model: attention, then the feed-forward network."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attn_norm = RMSNorm(config)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        # Each half reads a normalised copy and adds its result to the stream. The stream itself meets only the last
        # norm, so gradients reach every block directly: deep models stay trainable.
        x = x + self.attn(self.attn_norm(x), layout)
        x = x + self.mlp(self.mlp_norm(x))
        return x  # (B, T, D)


class Transformer(nn.Module):
    """The model. Its weights are float32, drawn from torch's global generator."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # keep only each block's input; compute the rest again in the backward pass
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        cos, sin = rotary_tables(config)
        self.register_buffer("cos", cos, persistent=False)  # computed, so not part of a checkpoint
        self.register_buffer("sin", sin, persistent=False)
        self.causal = is_causal(config.context_length)
        self.initialise()

    def initialise(self) -> None:
        """Draws the matrices from N(0, 0.02²), `o` and `down` with a smaller deviation. Gains start at 1."""
        # The logits of a new model are then near 0, so its first loss is near log V, that of a uniform guess.
        for name, weight in self.named_parameters():
            if weight.dim() != 2:
                continue
            std = 0.02
            if name.endswith(("attn.o.weight", "mlp.down.weight")):
                # 2 · n_layers projections add to the stream. GPT-2's factor keeps its size the same at any depth.
                std = 0.02 / math.sqrt(2 * self.config.n_layers)
            nn.init.normal_(weight, std=std)

    def num_parameters(self) -> int:
        """The number of parameters, embeddings included, tied ones once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T: int) -> int:
        """Floating-point operations of one training step for each token, on rows of T tokens."""
        # Counted as PaLM does (arXiv:2204.02311, appendix B). Forward, a linear layer's weight takes 2 (multiply, add),
        # attention 4 · H · E for each key, even a masked one (scores, mixing). Backward takes twice that.
        flops = 0
        for module in self.modules():
            if isinstance(module, nn.Linear):
                flops += 6 * module.weight.numel()
            elif isinstance(module, Attention):
                flops += 12 * module.n_heads * module.head_dim * T
        return flops

    def hidden(self, tokens: Tensor, cache=None, positions=None, mask=None) -> Tensor:
        """The normalised stream after the last block, (B, T, D), which the output projection reads."""
        # tokens: (B, T) int64. The other arguments: see `layout`.
        layout = self.layout(tokens, cache, positions, mask)
        x = self.embed(tokens)  # (B, T, D)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, layout, use_reentrant=False)
            else:
                x = block(x, layout)
        if cache is not None:
            cache.used += tokens.shape[1]
        return self.norm(x)

    def layout(self, tokens: Tensor, cache: "KVCache | None", positions: Tensor | None, mask: Tensor | None) -> Layout:
        """The layout of a forward pass. ValueError for more tokens than the context, or the cache, holds."""
        # Only tokens given: every row is one text. cache: the tokens continue the texts in it. positions, (B, T) int64
        # on the CPU: each row holds several texts, see `Packed`. With a mask too, (B, 1, T, T), True where a query may
        # see a key: any arrangement of texts. With positions, only these must be below the context length.
        T, context = tokens.shape[1], self.config.context_length
        longest = T if positions is None else int(positions.max()) + 1
        if longest > context:
            raise ValueError(f"{longest} tokens; context_length is {context}")
        if cache is not None:
            return Cached(self, cache, T)
        if positions is None:
            if not self.causal:
                at = torch.arange(T, device=tokens.device)
                mask = sees(at[:, None], at)[None, None]
            return Layout(self.cos[:T], self.sin[:T], mask)
        if mask is None:
            return Packed(self, positions, tokens.device)
        at = send(positions, tokens.device)
        mask = mask & sees(at[:, None, :, None], at[:, None, None, :])  # the mask separates texts, `sees` adds its rule
        return Layout(self.cos[at], self.sin[at], mask)

    def forward(self, tokens: Tensor, targets=None, cache=None, positions=None, reduction="mean") -> Tensor:
        """Logits (B, T, V), or with `targets` the loss in nats."""
        # tokens: (B, T) int64. targets: (B, T) int64, for each token the next token, or −100 where there is nothing to
        # learn. The caller shifts them; nothing is shifted here. reduction: "mean" gives a scalar, "none" the loss of
        # each target, (B, T), 0 where ignored. cache, positions: see `layout`.
        x = self.hidden(tokens, cache, positions)
        if targets is None:
            return self.head(x)
        # cross-entropy(head(x), targets), in chunks of rows: all N × V logits at once often take the most memory.
        kernels = self.config.kernels
        loss = linear_cross_entropy(x.flatten(0, 1), self.head.weight, targets.flatten(), kernels, reduction)
        return loss if reduction == "mean" else loss.view(targets.shape).clone()  # a copy: FSDP warns of views


# ======================================================================================================================
# Fast paths: skip these at first reading. They give the same results in less time or memory.

# ----------------------------------------------------------------------------------------------- cache and packed rows


def is_causal(length: int) -> bool:
    """True if `sees` is the plain causal rule: PyTorch's causal kernels then replace the mask."""
    # 512 queries from the first to the last are enough to tell: all of them would take 17 GB at 131,072 positions.
    with torch.device("cpu"):  # a model may be made on the device "meta", which has no numbers
        keys = torch.arange(length)
        queries = torch.linspace(0, length - 1, min(length, 512)).long()[:, None]
        seen = sees(queries, keys)
    if (seen & (keys > queries)).any():
        raise ValueError("`sees` lets a query see a later key; expected none: a cache holds no later keys")
    return torch.equal(seen, keys <= queries)


class KVCache:
    """Keys and values of the tokens seen so far, so that each step of decoding computes only the new ones."""

    # Allocated once: `length` tokens for each of B texts. k, v: (n_layers, B, length, K, E). used: (B,) int64 on the
    # CPU, each text's number of tokens. `cache[a:b]` is a view of texts a to b − 1.

    def __init__(self, model: Transformer, batch_size: int, length: int):
        c, self.length = model.config, length
        shape = (c.n_layers, batch_size, length, c.n_kv_heads or c.n_heads, c.head_dim)
        self.k = model.embed.weight.new_zeros(shape)  # see `clear`
        self.v = model.embed.weight.new_zeros(shape)
        self.used = torch.zeros(batch_size, dtype=torch.int64)

    def __getitem__(self, texts: slice) -> "KVCache":
        view = copy.copy(self)
        view.k = self.k[:, texts]
        view.v = self.v[:, texts]
        view.used = self.used[texts]
        return view

    def move(self, source: int, target: int) -> None:
        """Moves a text to another row, which must be clear."""
        self.k[:, target] = self.k[:, source]
        self.v[:, target] = self.v[:, source]
        self.used[target] = self.used[source]
        self.clear(source)

    def clear(self, text: int) -> None:
        """Forgets a text. Its slots become 0: a NaN there would survive masking, because 0 × NaN is NaN."""
        self.k[:, text] = 0
        self.v[:, text] = 0
        self.used[text] = 0


class Cached(Layout):
    """Keys in a cache: T new tokens of each text follow its earlier ones. ValueError if they do not fit."""

    def __init__(self, model: Transformer, cache: KVCache, T: int):
        device = cache.k.device
        positions = cache.used[:, None] + torch.arange(T)  # of the new tokens, (B, T)
        end = int(positions.max()) + 1
        room = min(cache.length, model.config.context_length)
        if end > room:
            raise ValueError(f"{end} tokens; the cache and the context hold {room}")
        at, mask = positions.to(device), None
        equally_long = cache.used.min() == cache.used.max()
        if not (model.causal and equally_long and T in (1, end)):  # one new token sees its whole text
            # A float mask whose rows start at multiples of 16 in memory: from another mask every layer makes a copy.
            keys = torch.arange(-(-end // 16) * 16, device=device)
            seen = sees(at[:, None, :, None], keys)
            mask = torch.zeros(seen.shape, dtype=cache.k.dtype, device=device).masked_fill_(~seen, -math.inf)
            mask = mask[..., :end]  # (B, 1, T, S)
        super().__init__(model.cos[at], model.sin[at], mask)
        self.causal = mask is None and end == T
        self.end = end
        first_slots = torch.arange(len(at), device=device) * cache.length
        self.slots = (first_slots[:, None] + at).flatten()  # of the new tokens, (B · T,)
        self.cache, self.layer = cache, 0  # blocks call `attend` in order, once each

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.cache.k[self.layer], self.cache.v[self.layer]  # (B, length, K, E)
        self.layer += 1
        keys.view(-1, *keys.shape[2:]).index_copy_(0, self.slots, k.transpose(1, 2).flatten(0, 1))
        values.view(-1, *values.shape[2:]).index_copy_(0, self.slots, v.transpose(1, 2).flatten(0, 1))
        keys = keys[:, : self.end].transpose(1, 2)  # (B, K, S, E)
        values = values[:, : self.end].transpose(1, 2)
        return softmax_attention(q, keys, values, self.mask, self.causal)


class Packed(Layout):
    """Rows that hold several texts one after another, as fine-tuning packs them. No text sees another."""

    # positions: (B, T) int64 on the CPU, counting from 0 in each text. A text that starts at p > 0 branches off the
    # last text that starts at 0, its base: it shares the base's first p tokens, as two answers to a prompt do.
    # Texts of similar length form a batch, padded at their ends. Causal queries never see the padding: no mask, fast
    # kernels, and no scores between texts, which would be most of T × T.

    def __init__(self, model: Transformer, positions: Tensor, device: torch.device):
        at = send(positions, device)
        super().__init__(model.cos[at], model.sin[at], None)
        self.causal = model.causal
        batches: list[list[tuple[int, int, int, int]]] = []
        for text in sorted(texts_in(positions), reverse=True):  # the longest first
            if not batches or text[0] < 0.8 * batches[-1][0][0]:
                batches.append([])
            batches[-1].append(text)
        # A batch has texts × longest places, numbered from 0 over all batches. `tokens`: the token in each place.
        # `places`: the place of each of the B · T tokens. `shapes`: (texts, longest) of each batch.
        tokens, self.shapes, start_of_batch = [], [], 0
        self.places = torch.empty(positions.numel(), dtype=torch.int64)
        for batch in batches:
            length, shared, start, base_start = torch.tensor(batch).T[..., None]  # (texts, 1) each
            place = torch.arange(batch[0][0])  # (longest,)
            inside = place.minimum(length - 1)  # padding repeats the last token
            token = inside + torch.where(inside < shared, base_start, start - shared)  # (texts, longest)
            real = (place >= shared) & (place < length)  # neither padding nor copied from the base
            self.places[token[real]] = start_of_batch + real.flatten().nonzero()[:, 0]
            tokens.append(token.flatten())
            self.shapes.append(token.shape)
            start_of_batch += token.numel()
        self.tokens = send(torch.cat(tokens), device)
        self.places = send(self.places, device)

    # Shapes differ from batch to batch. Like torch.compiler.disable, but imports the compiler (1.3 s) only when used.
    @torch._disable_dynamo
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q_batches, k_batches, v_batches = self.batches(q), self.batches(k), self.batches(v)
        outputs = []
        for q_batch, k_batch, v_batch in zip(q_batches, k_batches, v_batches, strict=True):
            mask = None
            if not self.causal:
                place = torch.arange(q_batch.shape[2], device=q.device)
                mask = sees(place[:, None], place)
            y = softmax_attention(q_batch, k_batch, v_batch, mask, self.causal)  # (texts, H, longest, E)
            outputs.append(y.transpose(1, 2).flatten(0, 1))
        y = torch.cat(outputs).index_select(0, self.places)  # (B · T, H, E)
        return y.view_as(q.transpose(1, 2)).transpose(1, 2)

    def batches(self, x: Tensor) -> list[Tensor]:
        """x (B, H, T, E) as batches of texts, (texts, H, longest, E) each."""
        rows = x.transpose(1, 2).flatten(0, 1).index_select(0, self.tokens)  # (places, H, E)
        parts = rows.split([texts * longest for texts, longest in self.shapes])
        return [part.unflatten(0, shape).transpose(1, 2) for part, shape in zip(parts, self.shapes, strict=True)]


def send(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on the CPU as a tensor on the device, without waiting for the GPU."""
    # A GPU copies pinned memory while it computes. A copy from other memory waits until the GPU has finished its work.
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def texts_in(positions: Tensor) -> list[tuple[int, int, int, int]]:
    """The texts of packed rows, from their positions (B, T), as (length, shared, start, base_start)."""
    # shared: tokens in common with its base. start and base_start: the numbers, over all rows, of the first token of
    # its own and of its base's first token.
    flat = positions.flatten()
    continues = flat.diff() == 1  # True where the next token continues the text
    begins = [0, *((~continues).nonzero()[:, 0] + 1).tolist()]
    valid = not positions[:, 0].any()
    texts, base_start, base_length = [], 0, 0
    for start, end in itertools.pairwise([*begins, len(flat)]):
        shared = int(flat[start])
        if shared == 0:
            base_start, base_length = start, end - start
        valid = valid and 0 <= shared <= base_length
        texts.append((shared + end - start, shared, start, base_start))
    if not valid:
        raise ValueError("positions do not count from 0 in each text; only another ending of a text starts inside it")
    return texts


# -------------------------------------------------------------------------------------------------------- chunked loss


IGNORED = -100  # the target of a token that is not trained; F.cross_entropy ignores it too
CHUNK = 2**28  # bytes: the most logits in memory at once
BLOCK = 2**21  # bytes of logits that fit into a CPU's cache


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, kernels="auto", reduction="mean") -> Tensor:
    """Cross-entropy, in nats, of `F.linear(x, weight)` against the `targets` that are not IGNORED."""
    # x: (N, D), weight: (V, D), targets: (N,) int64 in [0, V) or IGNORED. Gives the mean in float32 or wider, 0
    # without targets; with the reduction "none" the losses, (N,), 0 where ignored. It can be differentiated once.
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction is {reduction!r}; expected "mean" or "none"')
    options = matmul_dtype(x), kernels, reduction == "none"
    loss = LinearCrossEntropy.apply(x, weight, targets, options, torch.is_grad_enabled())
    return loss if reduction == "none" else loss / (targets != IGNORED).sum().clamp_min(1)


class LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients with the loss, chunk by chunk, so that the logits are never kept."""

    @staticmethod
    def forward(ctx, x, weight, targets, options, learn):
        ctx.options = options
        ctx.per_target = options[2]
        learn_x, learn_weight = (learn and needed for needed in ctx.needs_input_grad[:2])
        # With one loss per target, dw needs `dloss`, so backward computes the logits again.
        again = (x, weight, targets) if learn_weight and ctx.per_target else ()
        loss, dx, dw = loss_and_gradients(x, weight, targets, options, None, learn_x, learn_weight and not again)
        ctx.save_for_backward(dx, dw, *again)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        if torch.is_grad_enabled():  # create_graph=True: to autograd, dx and dw are constants
            raise RuntimeError("linear_cross_entropy can be differentiated once only")
        dx, dw, *again = ctx.saved_tensors
        if dx is not None:
            dx = dx.to(dloss.dtype) * (dloss[:, None] if ctx.per_target else dloss)
        if again:
            _, _, dw = loss_and_gradients(*again, ctx.options, dloss, False, True)
        elif dw is not None:
            dw = dw * dloss
        return dx, dw, None, None, None  # autograd casts them to the dtypes of x and weight


def loss_and_gradients(x, weight, targets, options, factors, learn_x, learn_weight):
    """Σ_t −log softmax(x_t · Wᵀ)[target_t], or with `per_target` its terms; and the gradients of x and W, or None."""
    # options: dtype of the products, kernels, per_target. factors: (N,), weights of the terms' gradients; None: 1.
    dtype, kernels, per_target = options
    wide = torch.promote_types(dtype, torch.float32)
    n, w, keep = len(x), weight.to(dtype), None
    if targets.device.type == "cpu":  # drop ignored rows; on a GPU they are masked, since counting would wait for it
        trained = int((targets != IGNORED).sum())
        count = trained + -trained % 128  # oneDNN keeps megabytes for each number of rows that it multiplies
        if count < n:
            keep = (targets == IGNORED).argsort(stable=True)[:count]  # the trained rows in order, then ignored ones
            targets = targets[keep]
            keep = send(keep, x.device)
            x, factors = x[keep], None if factors is None else factors[keep]
        targets = send(targets, x.device)
    loss = x.new_zeros(len(x) if per_target else (), dtype=wide)
    dx = x.new_empty(x.shape) if learn_x else None
    dw = None
    chunk = max(1, CHUNK // (len(w) * w.element_size()))
    buffer = logits_buffer(chunk, len(w), dtype, x.device, threading.get_ident())
    with torch.autocast(x.device.type, enabled=False):
        for first in range(0, len(x), chunk):
            rows = slice(first, min(first + chunk, len(x)))
            x_chunk, logits = x[rows].to(dtype), buffer[: rows.stop - first]
            torch.mm(x_chunk, w.T, out=logits)
            losses = cross_entropy(logits, targets[rows], kernels)  # logits become their gradient
            if per_target:
                loss[rows] = losses
            else:
                loss += losses.sum()
            if factors is not None:
                logits *= factors[rows, None]
            if learn_x:
                dx[rows] = logits @ w
            if learn_weight:
                # A CPU rounds each chunk's product to dtype, as PyTorch's own backward pass rounds that of all rows.
                factors_of_dw, dtypes = (logits.T, x_chunk), {"out_dtype": wide} if x.is_cuda else {}
                if dtype == torch.float16 and not x.is_cuda:  # a sum past 65,504 would overflow
                    factors_of_dw = logits.T.to(wide), x_chunk.to(wide)
                product = torch.mm(*factors_of_dw, **dtypes).to(wide)
                dw = product if dw is None else dw.add_(product)
    if learn_weight and dw is None:  # no rows
        dw = weight.new_zeros(weight.shape, dtype=wide)
    if keep is not None:  # the ignored rows have a loss and a gradient of 0
        loss = loss.new_zeros(n).index_copy_(0, keep, loss) if per_target else loss
        dx = dx.new_zeros(n, dx.shape[1]).index_copy_(0, keep, dx) if learn_x else None
    return loss, dx, dw


@functools.lru_cache(1)
@torch.inference_mode(False)  # else training could not use a buffer that inference has made
def logits_buffer(rows: int, pieces: int, dtype: torch.dtype, device: torch.device, thread: int) -> Tensor:
    """A thread's memory for logits, kept between calls: on a CPU, new memory costs more time than the arithmetic."""
    return torch.empty(rows, pieces, dtype=dtype, device=device)


def cross_entropy(logits: Tensor, targets: Tensor, kernels: str = "auto") -> Tensor:
    """−log softmax(logits)[target] of each row, (N,) in float32 or wider; 0 where the target is IGNORED."""
    # logits: (N, V) with contiguous rows, overwritten by the gradient of the losses' sum, softmax − onehot. targets:
    # (N,) int64.
    if use_triton(kernels, logits):
        losses = logits.new_empty(len(logits), dtype=torch.float32)
        columns = min(4096, triton.next_power_of_2(logits.shape[1]))
        warps = max(1, min(8, columns // 128))
        sizes = logits.stride(0), logits.shape[1], columns
        cross_entropy_kernel[(len(logits),)](logits, targets.contiguous(), losses, *sizes, num_warps=warps)
        return losses
    wide = torch.promote_types(logits.dtype, torch.float32)
    live = (targets != IGNORED)[:, None]
    at = targets[:, None].where(live, 0)
    weight = live.to(wide)  # 0 for an ignored row
    losses = logits.new_empty(len(logits), 1, dtype=wide)
    # On a CPU, a block of rows stays in the processor's cache from operation to operation. That halves the time.
    block = max(1, (BLOCK if logits.device.type == "cpu" else CHUNK) // (logits.shape[1] * wide.itemsize))
    parts = (tensor.split(block) for tensor in (logits, at, weight, losses))
    for logits_part, at_part, weight_part, losses_part in zip(*parts, strict=True):
        p = logits_part.to(wide)  # a copy, unless it has this dtype already
        p -= p.amax(1, keepdim=True)  # no overflow; Σ exp is at least 1, so its log is finite
        torch.neg(p.gather(1, at_part), out=losses_part)
        total = p.exp_().sum(1, keepdim=True)
        losses_part += total.log()
        p.mul_(weight_part / total).scatter_add_(1, at_part, -weight_part)
        logits_part.copy_(p)
    return losses.where(live, 0.0)[:, 0]


# ------------------------------------------------------------------------------------------------------ Triton kernels
# Each kernel gives the plain operations' result, computed in float32, for float32, float16 and bfloat16. A tile has C
# numbers, or R rows and C columns, all powers of two. Offsets are int64: a tensor may have more than 2³¹ elements.


def use_triton(kernels: str, x: Tensor) -> bool:
    """True if an operation on x runs as a Triton kernel; not under torch.compile, which fuses the plain operations."""
    if triton is None or torch.compiler.is_compiling():
        return False
    if kernels == "auto":
        return x.is_cuda and x.dtype != torch.float64 and not triton_error(x.device)
    return kernels == "triton"


@functools.cache
def triton_error(device: torch.device) -> str:
    """The reason why Triton cannot run on this GPU, or "". The first call compiles, which needs a C compiler."""
    if triton is None:
        return "the package triton is not installed"
    try:
        one = torch.ones(1, device=device)
        TritonSwiGLU.apply(one, one)
    except Exception as error:  # no compiler, no Python headers, a GPU that is too old: many types
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return ""


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer computes on x: autocast's, or x's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float, kernels: str = "auto") -> Tensor:
    """y = x / sqrt(mean(x²) + eps) · weight over the last axis, in float32 or wider (arXiv:1910.07467)."""
    # x: (..., D) of any floating dtype, weight: (D,). The result has the dtype in which the next linear layer computes.
    dtype = matmul_dtype(x)
    if use_triton(kernels, x):
        return TritonRMSNorm.apply(x, weight, eps, dtype)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight).to(dtype)


def swiglu(gate: Tensor, up: Tensor, kernels: str = "auto") -> Tensor:
    """silu(gate) · up, elementwise. gate, up: (..., d_ff) of one dtype; returns the same."""
    return TritonSwiGLU.apply(gate, up) if use_triton(kernels, gate) else F.silu(gate) * up


PROGRAMS = 512  # at most, of RMSNorm's backward pass; each sums its rows' gradients of the gains


class TritonRMSNorm(torch.autograd.Function):
    """Keeps each row's 1/rms for the backward pass."""

    @staticmethod
    def forward(ctx, x, weight, eps, dtype):
        x, weight = x.contiguous(), weight.contiguous()
        y = torch.empty_like(x, dtype=dtype)
        scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(x, weight, scale)
        rows, D = scale.numel(), len(weight)
        R, C, warps = tile(D, 4096, 32)
        rms_norm_forward_kernel[(triton.cdiv(rows, R),)](x, weight, y, scale, rows, eps, D, R, C, num_warps=warps)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, scale = ctx.saved_tensors
        dx, dy = torch.empty_like(x), dy.contiguous()
        rows, D = scale.numel(), len(weight)
        R, C, warps = tile(D, 2048, 8)
        programs = min(PROGRAMS, triton.cdiv(rows, R))
        dw = x.new_empty(programs, D, dtype=torch.float32)
        rms_norm_backward_kernel[(programs,)](x, weight, scale, dy, dx, dw, rows, D, R, C, num_warps=warps)
        return dx, dw.sum(0).to(weight.dtype), None, None


def tile(columns: int, numbers: int, per_thread: int) -> tuple[int, int, int]:
    """R, C and warps of a tile of about `numbers` numbers, or of one whole row; C ≥ `columns`."""
    # per_thread: numbers that a thread holds, unless 4 to 16 warps are too many or too few. A thread keeps a few values
    # for each in registers. An SM has 65,536 registers and runs up to 2,048 threads. If a thread needs more than 64,
    # fewer than half of these threads fit: too few to hide the latency of memory.
    # `python -m benchmarks.gpu_rehearsal` shows the registers of each kernel; it needs no GPU.
    C = triton.next_power_of_2(columns)
    R = max(1, numbers // C)
    return R, C, min(16, max(4, R * C // (32 * per_thread)))


class TritonSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        y = torch.empty_like(gate)
        swiglu_forward_kernel[(triton.cdiv(y.numel(), 1024),)](gate, up, y, y.numel(), 1024)
        return y

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        dgate, dup, dy = torch.empty_like(gate), torch.empty_like(up), dy.contiguous()
        programs = triton.cdiv(dy.numel(), 1024)
        swiglu_backward_kernel[(programs,)](gate, up, dy, dgate, dup, dy.numel(), 1024)
        return dgate, dup


if triton is not None:

    @triton.jit
    def load(tensor, at, live, other=0.0):
        """The numbers at these offsets in float32; `other` where they lie past the tensor."""
        return tl.load(tensor + at, mask=live, other=other).to(tl.float32)

    @triton.jit(do_not_specialize=["rows"])  # or it would be compiled again for 1 row, and for a multiple of 16
    def rms_norm_forward_kernel(x, weight, y, scale, rows, eps, D: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
        row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
        col = tl.arange(0, C)
        at = row[:, None] * D + col[None, :]
        live = (row < rows)[:, None] & (col < D)[None, :]
        x_tile = load(x, at, live)
        w = load(weight, col, col < D)
        mean_square = tl.sum(x_tile * x_tile, 1) / D
        s = 1.0 / tl.sqrt(mean_square + eps)
        y_tile = x_tile * s[:, None] * w[None, :]
        tl.store(y + at, y_tile, mask=live)
        tl.store(scale + row, s, mask=row < rows)

    @triton.jit(do_not_specialize=["rows"])
    def rms_norm_backward_kernel(x, weight, scale, dy, dx, dw, rows, D: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
        """With x̂ = x · s:  dx = s · (w·dy − x̂ · mean(w·dy·x̂)),  dw = Σ_rows dy · x̂."""
        # Each program sums dw over its rows into a float32 row of its own; the caller adds these in a fixed order.
        # The R rows of a tile are added up once, after the loop: this sum makes the warps wait for each other.
        program = tl.program_id(0).to(tl.int64)
        col = tl.arange(0, C)
        w = load(weight, col, col < D)[None, :]
        dw_tile = tl.zeros((R, C), tl.float32)
        for first in range(program * R, rows, tl.num_programs(0) * R):
            row = (first + tl.arange(0, R)).to(tl.int64)
            at = row[:, None] * D + col[None, :]
            live = (row < rows)[:, None] & (col < D)[None, :]
            s = load(scale, row, row < rows)[:, None]
            x_hat = load(x, at, live) * s
            g = load(dy, at, live)
            wg = w * g
            mean = tl.sum(wg * x_hat, 1) / D
            dx_tile = s * (wg - x_hat * mean[:, None])
            tl.store(dx + at, dx_tile, mask=live)
            dw_tile += g * x_hat
        tl.store(dw + program * D + col, tl.sum(dw_tile, 0), mask=col < D)

    # Triton compiles separate code for an n that is a multiple of 16, as a multiple of d_ff nearly always is. Only this
    # code loads several numbers per instruction under a mask.
    @triton.jit
    def swiglu_forward_kernel(gate, up, y, n, C: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * C + tl.arange(0, C)
        live = at < n
        g = load(gate, at, live)
        u = load(up, at, live)
        tl.store(y + at, g * tl.sigmoid(g) * u, mask=live)

    @triton.jit
    def swiglu_backward_kernel(gate, up, dy, dgate, dup, n, C: tl.constexpr):
        """With σ = sigmoid(gate):  dup = dy · gate · σ,  dgate = dy · up · σ · (1 + gate · (1 − σ))."""
        at = tl.program_id(0).to(tl.int64) * C + tl.arange(0, C)
        live = at < n
        g = load(gate, at, live)
        u = load(up, at, live)
        d = load(dy, at, live)
        sigma = tl.sigmoid(g)
        slope = sigma * (1.0 + g * (1.0 - sigma))  # of silu
        tl.store(dgate + at, d * u * slope, mask=live)
        tl.store(dup + at, d * g * sigma, mask=live)

    @triton.jit
    def cross_entropy_kernel(logits, targets, losses, stride, V, C: tl.constexpr):
        """One row per program, read twice: for log Σ exp, then to write the gradient over the logits."""
        # A target outside 0 … V − 1, if not ignored, gives NaN.
        row = tl.program_id(0).to(tl.int64)
        target = tl.load(targets + row)
        logits += row * stride
        largest = -float("inf")
        total = 0.0
        target_logit = tl.where((target >= 0) & (target < V), 0.0, float("nan"))
        for first in range(0, V, C):
            col = first + tl.arange(0, C)
            x = load(logits, col, col < V, -float("inf"))
            new = tl.maximum(largest, tl.max(x, 0))
            # The sum so far is relative to the largest logit so far: rescale it when a larger one turns up.
            total *= tl.exp(largest - new)
            total += tl.sum(tl.exp(x - new), 0)
            target_logit += tl.sum(tl.where(col == target, x, 0.0), 0)
            largest = new
        log_sum = largest + tl.log(total)
        live = target != -100  # IGNORED
        tl.store(losses + row, tl.where(live, log_sum - target_logit, 0.0))
        for first in range(0, V, C):
            col = first + tl.arange(0, C)
            x = load(logits, col, col < V, -float("inf"))
            onehot = tl.where(col == target, 1.0, 0.0)
            gradient = tl.exp(x - log_sum) - onehot
            tl.store(logits + col, tl.where(live, gradient, 0.0), mask=col < V)
