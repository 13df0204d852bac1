"""Sampling and decoding: one text, or many that share one cache."""

# The idea: ask the model for the logits of the next token, draw one, append it, repeat. `Sampling` says how to draw.
# `Decoder` continues many texts and keeps their keys and values in a cache. `generate` is the short way to use both.

import math
import sys
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import KVCache, Transformer

# ------------------------------------------------------------------------------------------------------------ sampling


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn. Raises ValueError, naming the field, for an impossible value."""

    # In this order: penalties change the logits, temperature divides them, top_k, top_p, min_p narrow the candidates.

    temperature: float = 1.0  # 0: the likeliest token; 1: the model's own distribution
    top_k: int | None = None  # sample among the k likeliest tokens
    top_p: float | None = None  # among the likeliest tokens whose probabilities add up to p (arXiv:1904.09751)
    min_p: float | None = None  # among tokens at least this fraction as likely as the likeliest (arXiv:2407.01082)
    repetition_penalty: float = 1.0  # makes tokens already in the text less likely (arXiv:1909.05858)
    no_repeat_ngram: int | None = None  # no run of this many tokens is written twice

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; expected 0 (greedy) or more")
        for name in ("top_k", "no_repeat_ngram"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; expected more than 0, at most 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; expected 0 to 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; expected more than 0")

    def draw(self, logits: Tensor, seen: Sequence[int], generator: torch.Generator) -> int:
        """Draws one id. logits: (V,) float32 on the CPU. seen: the text's ids so far."""
        logits = self.penalised(logits, seen)
        if self.temperature == 0:
            return int(logits.argmax())
        # Subtracting the highest logit avoids overflow. At temperatures below 1e-30 the differences would overflow too.
        p = torch.softmax((logits - logits.max()) / max(self.temperature, 1e-30), 0)  # (V,)
        ids = self.candidates(p)
        kept = p if ids is None else p[ids]
        # Draw a point on the cumulative sum. In float32, the smallest probabilities could vanish from the sum.
        ends = kept.cumsum(0, dtype=torch.float64)
        point = torch.rand((), dtype=torch.float64, generator=generator) * ends[-1]
        i = min(int(torch.searchsorted(ends, point, right=True)), len(ends) - 1)
        return i if ids is None else int(ids[i])

    def candidates(self, p: Tensor) -> Tensor | None:
        """The ids that top_k, top_p and min_p leave, the likeliest first; None: all of them. p: (V,) probabilities."""
        top_p = self.top_p or 1.0
        if self.top_k is None and self.min_p is None and top_p == 1:
            return None
        p = p.numpy()
        # Sorting 32,768 numbers can take longer than a step of the model, so first drop what cannot be chosen.
        floor = 0.0
        if self.top_k is not None:
            k = min(self.top_k, len(p))
            floor = np.partition(p, -k)[-k]  # the k-th highest
        elif top_p == 1:
            floor = self.min_p * p.max()
        elif p[p >= 1e-4].sum(dtype=np.float64) >= top_p * p.sum(dtype=np.float64):
            floor = 1e-4  # the tokens above it reach top_p already
        ids = np.flatnonzero(p >= floor)
        ids = ids[np.argsort(-p[ids], kind="stable")][: self.top_k]
        if top_p < 1:
            reached = p[ids].cumsum(dtype=np.float64)
            wanted = top_p * (p.sum(dtype=np.float64) if self.top_k is None else reached[-1])
            ids = ids[: int(np.searchsorted(reached, wanted)) + 1]  # keep the token that reaches p
        if self.min_p is not None:
            ids = ids[p[ids] >= self.min_p * p[ids[0]]]
        return torch.from_numpy(ids)

    def penalised(self, logits: Tensor, seen: Sequence[int]) -> Tensor:
        """The logits, (V,), with penalties for repeating the text."""
        if (penalty := self.repetition_penalty) != 1:
            ids = torch.tensor(sorted(set(seen)))
            old = logits[ids]
            # A negative logit has to be multiplied: dividing it would make the token likelier.
            logits = logits.index_put((ids,), torch.where(old > 0, old / penalty, old * penalty))
        if self.no_repeat_ngram is not None:
            before = self.no_repeat_ngram - 1
            last = seen[len(seen) - before :]  # the last n − 1 tokens
            # What came after these tokens earlier in the text.
            banned = {seen[i] for i in range(before, len(seen)) if seen[i - before : i] == last}
            if 0 < len(banned) < len(logits):
                logits = logits.index_fill(0, torch.tensor(sorted(banned)), -math.inf)
        return logits


GREEDY = Sampling(temperature=0)

# ----------------------------------------------------------------------------------------------------- the short way in


def generate(model: Transformer, ids: Sequence[int] | Sequence[Sequence[int]], max_new_tokens: int, **options) -> list:
    """The new ids after a prompt, or a list of them for each of several prompts. options: see `stream`."""
    if isinstance(ids, (Tensor, np.ndarray)):
        ids = ids.tolist()
    single = not ids or isinstance(ids[0], Integral)
    prompts = [ids] if single else ids
    new = [[] for _ in prompts]
    for step in stream(model, prompts, max_new_tokens, **options):
        for text, token in step:
            new[text].append(token)
    return new[0] if single else new


def stream(
    model: Transformer, prompts: Sequence, max_new_tokens: int, *, seed=None, stop: Collection[int] = (), **options
) -> Iterator[list[tuple[int, int]]]:
    """Continues several prompts together. Yields each step's pairs (number of the prompt, new id) until all end."""
    # seed: one for all texts, or one for each; None draws differently each time. stop: ids that end a text; they are
    # not yielded. options: fields of `Sampling`. Raises ValueError for impossible arguments.
    sampling = Sampling(**options)
    seeds = [seed] * len(prompts) if seed is None or isinstance(seed, Integral) else list(seed)
    longest = max(map(len, prompts), default=0)
    decoder = Decoder(model, len(prompts), min(model.config.context_length, longest + max_new_tokens))
    number: dict[Continuation, int] = {}
    for prompt, text_seed in zip(prompts, seeds, strict=True):
        text = Continuation(prompt, max_new_tokens, sampling, text_seed, stop)
        number[text] = len(number)
        decoder.add(text)
    while decoder:
        pairs = []
        for text, token in decoder.step():
            if text.error:
                raise text.error
            if token not in stop:
                pairs.append((number[text], token))
        yield pairs


# ----------------------------------------------------------------------------------------------------- many at once


class Continuation:
    """A text that a `Decoder` continues. Raises ValueError for impossible arguments."""

    # ids: the prompt; new tokens are appended. seed: None draws differently each time. stop: ids that end the text.
    # candidates: keep the log-probabilities of each new token and of this many likeliest tokens.

    def __init__(self, ids, max_new_tokens: int, sampling: Sampling, seed=None, stop=(), candidates=None):
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; expected 0 or more")
        if seed is not None and not 0 <= seed < 2**63:
            raise ValueError(f"seed is {seed}; expected 0 to 2^63 - 1")
        self.ids = list(map(int, ids))
        self.left, self.sampling, self.stop = max_new_tokens, sampling, stop  # left: tokens still to draw
        self.generator = torch.Generator()  # its own: other texts do not change its draws
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(int(seed))
        self.candidates = candidates
        # For each new token, before temperature and penalties: its log-probability; the likeliest ids with theirs.
        self.logprobs: list[tuple[float, list[tuple[int, float]]]] = []
        self.ended: str | None = None  # at the end "stop", "length" or "error"
        self.error: ValueError | None = None

    @property
    def needs_logits(self) -> bool:
        """True if `draw` needs the logits: for sampling, penalties or log-probabilities."""
        return self.sampling != GREEDY or self.candidates is not None

    def draw(self, logits: Tensor | None, likeliest: int, largest: float) -> int:
        """Draws the next id and appends it. If none can be drawn, sets `error` instead."""
        # logits: (V,) float32 on the CPU; None if not needed. likeliest: id of the largest logit, `largest`.
        token = likeliest
        try:
            if not math.isfinite(largest):  # a NaN counts as the largest
                raise ValueError("the logits are not finite; the weights are damaged, or their training diverged")
            if self.sampling != GREEDY:
                token = self.sampling.draw(logits, self.ids, self.generator)
        except ValueError as error:
            self.ended, self.error = "error", error
            return token
        if self.candidates is not None:
            p = torch.log_softmax(logits.double(), 0)
            top = p.topk(min(self.candidates, len(p)))
            pairs = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
            self.logprobs.append((float(p[token]), pairs))
        self.ids.append(token)
        self.left -= 1
        if token in self.stop:
            self.ended = "stop"
        elif not self.left:
            self.ended = "length"
        return token


AT_ONCE = 4096  # prompt tokens in one forward pass: more would only take more memory


class Decoder:
    """Continues texts together over one cache. Add or remove texts at any step: each gets what it would get alone."""

    # rows: texts at once; others wait, first come, first served. length: tokens of each text in the cache; None: the
    # context. chunk: prompt tokens read in one step, so that a long prompt does not delay other texts; None: no limit.
    # The model sees a text's last tokens that fit. When the cache is full, a text's later half is read again at once.

    def __init__(self, model: Transformer, rows: int, length: int | None = None, chunk: int | None = None):
        self.model, self.rows, self.chunk = model, rows, chunk or sys.maxsize
        self.cache = KVCache(model, rows, length or model.config.context_length)
        # texts[i] has row i of the cache: first the `ready` texts, then those with unread prompts, shortest first.
        self.texts: list[Continuation] = []
        self.ready = 0  # how many texts can draw their next token
        self.waiting: deque[Continuation] = deque()
        self.host: Tensor | None = None  # see `_to_host`

    def __len__(self) -> int:
        return len(self.texts) + len(self.waiting)

    def check(self, text: Continuation) -> None:
        """Raises ValueError if the text has no ids, or ids outside the vocabulary."""
        V = self.model.config.vocab_size
        if not text.ids or not all(0 <= i < V for i in text.ids):
            raise ValueError(f"expected at least one id, each in 0..{V - 1}; got {text.ids[:8]}")

    def add(self, text: Continuation) -> None:
        """Adds a text. Raises what `check` raises."""
        self.check(text)
        if text.left:
            self.waiting.append(text)
        else:
            text.ended = "length"

    def remove(self, text: Continuation) -> None:
        """Drops a text in any state."""
        if text in self.waiting:
            self.waiting.remove(text)
            return
        row = self.texts.index(text)
        self.cache.clear(row)
        if row < self.ready:  # the last ready text takes its row, so that ready texts stay side by side
            self.ready -= 1
            self._move(self.ready, row)
            row = self.ready
        for next_row in range(row + 1, len(self.texts)):  # later texts move up by one row
            self._move(next_row, next_row - 1)
        self.texts.pop()

    def _move(self, source: int, target: int) -> None:
        if source != target:
            self.cache.move(source, target)
            self.texts[target] = self.texts[source]

    @torch.inference_mode()
    def step(self) -> list[tuple[Continuation, int]]:
        """Draws one token for each ready text: pairs (text, id). Texts that have ended are dropped."""
        self._read_prompts()
        if not self.ready:
            return []
        for row, used in enumerate(self.cache.used[: self.ready].tolist()):
            if used == self.cache.length:  # full: start again with the later half of the text
                self.cache.used[row] = 0  # new keys overwrite the old ones
                later_half = self.texts[row].ids[-max(1, self.cache.length // 2) : -1]
                if later_half:
                    self._hidden(slice(row, row + 1), [later_half])
        texts = self.texts[: self.ready]
        hidden = self._hidden(slice(0, self.ready), [text.ids[-1:] for text in texts])  # (B, 1, D)
        logits = project(self.model.head, hidden[:, 0]).float()  # (B, V)
        largest, likeliest = logits.max(1)
        rows = [row for row, text in enumerate(texts) if text.needs_logits]
        needed = dict(zip(rows, self._to_host(logits[rows]), strict=True)) if rows else {}
        pairs = []
        for row, (value, token) in enumerate(zip(largest.tolist(), likeliest.tolist(), strict=True)):
            text = texts[row]
            pairs.append((text, text.draw(needed.get(row), token, value)))
        for text in texts:  # afterwards, because a removal moves rows
            if text.ended:
                self.remove(text)
        return pairs

    def _read_prompts(self) -> None:
        """Reads prompts into the cache without their last token, which `step` reads."""
        left = self.chunk
        while left > 0:
            if self.ready == len(self.texts) and not self._admit():
                return
            rows = slice(self.ready, len(self.texts))
            done = int(self.cache.used[self.ready])  # the same for all rows: shorter prompts are done
            prompts = [text.ids[-self._reach(text) : -1] for text in self.texts[rows]]
            T = min(len(prompts[-1]) - done, max(1, min(left, AT_ONCE) // len(prompts)))  # tokens of each prompt
            if T:
                ids = []
                for text, prompt in zip(self.texts[rows], prompts, strict=True):
                    # Shorter prompts are padded; later tokens overwrite the padding.
                    ids.append((prompt[done : done + T] + text.ids[-1:] * T)[:T])
                self._hidden(rows, ids)
                self.cache.used[rows] = torch.tensor([min(done + T, len(prompt)) for prompt in prompts])
            left -= T * len(prompts)
            for prompt in prompts:
                self.ready += len(prompt) <= done + T

    def _admit(self) -> bool:
        """Gives free rows to the first waiting texts, sorted by length. Returns False if none was added."""
        count = min(len(self.waiting), self.rows - len(self.texts))
        admitted = [self.waiting.popleft() for _ in range(count)]
        self.cache.used[len(self.texts) : len(self.texts) + count] = 0
        self.texts += sorted(admitted, key=self._reach)
        return count > 0

    def _reach(self, text: Continuation) -> int:
        """How many of the text's last tokens the model will see."""
        return min(len(text.ids), self.cache.length)

    def _to_host(self, logits: Tensor) -> Tensor:
        """Copies the logits to the CPU. The result is valid until the next call."""
        if not logits.is_cuda:
            return logits.cpu()
        # A GPU writes directly into pinned memory; for other memory the driver copies a second time. Allocated once.
        if self.host is None:
            self.host = torch.empty(self.rows, logits.shape[1], pin_memory=True)
        return self.host[: len(logits)].copy_(logits)  # waits for the GPU

    def _hidden(self, rows: slice, ids: list[list[int]]) -> Tensor:
        """Reads T new ids for each of these rows. Returns (B, T, D)."""
        tokens = torch.tensor(ids, device=self.model.embed.weight.device)
        return self.model.hidden(tokens, self.cache[rows])


def project(head: nn.Module, x: Tensor) -> Tensor:
    """head(x) of a few rows, x: (B, D). Returns (B, V)."""
    B, V = len(x), head.out_features
    if x.device.type != "cpu" or not 1 < B <= 16 or V % 512 or isinstance(head, Int8Linear):
        return head(x)
    # On a CPU, slices of the weight fit the processor's cache; MKL would first copy the whole weight. With
    # configs/tiny.py and 8 texts, a step takes a seventh less time.
    y = x @ head.weight.view(-1, 512, head.in_features).transpose(1, 2)  # (V / 512, B, 512)
    return y.transpose(0, 1).reshape(B, V)


# ------------------------------------------------------------------------------------------------ weights for decoding


class Int8Linear(nn.Module):
    """A linear layer with weights of 8 bits and one scale for each output. For bfloat16 inputs, without gradients."""

    # Decoding a token reads every weight once. A CPU reads a quarter of the bytes in less time. A GPU converts the
    # weights at every call: there, 8 bits save memory only.

    def __init__(self, weight: Tensor):
        """weight: (out, in), of any floating dtype."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        wide = weight.float()
        self.register_buffer("scale", (wide.abs().amax(1) / 127).clamp_min(1e-12).bfloat16())  # (out,)
        codes = (wide / self.scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        self.codes = nn.Parameter(codes, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)  # (N, in)
        # PyTorch's product with 8-bit weights reads past rows whose length 16 does not divide.
        if len(rows) <= 16 and x.device.type == "cpu" and self.in_features % 16 == 0:
            y = torch._weight_int8pack_mm(rows, self.codes, self.scale)
        else:  # many rows, a prompt: converting the weight is a small part of the work
            y = F.linear(rows, self.codes.to(x.dtype)) * self.scale
        return y.unflatten(0, x.shape[:-1])


@torch.no_grad()
def to_int8(model: Transformer) -> None:
    """Makes the linear layers `Int8Linear`, and all else bfloat16. The model can then only be used, not trained."""
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is nn.Linear:
                setattr(module, name, Int8Linear(layer.weight))
    for p in model.parameters():
        if p.is_floating_point():
            p.data = p.data.bfloat16()
