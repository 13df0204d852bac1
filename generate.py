"""Sampling and decoding: one text, or many that come and go over one cache.

generate(model, ids, max_new_tokens=50, temperature=0)      the new ids of one prompt, or of several
"""

import math
import sys
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch
from torch import Tensor, nn

from model import KVCache, Transformer


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn. Raises ValueError, naming the field, for what cannot be.

    In this order: the penalties change the logits, temperature divides them, then top_k, top_p and min_p each leave
    fewer candidates.
    """

    temperature: float = 1.0
    """0 takes the likeliest token, 1 samples the model's own distribution."""
    top_k: int | None = None
    """Sample among the k likeliest tokens."""
    top_p: float | None = None
    """Sample among the fewest tokens whose probabilities reach p (arXiv:1904.09751)."""
    min_p: float | None = None
    """Sample among tokens at least this fraction as likely as the likeliest (arXiv:2407.01082)."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens already in the text, and multiplies negative ones (arXiv:1909.05858)."""
    no_repeat_ngram: int | None = None
    """No run of so many tokens is written a second time."""

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
        """One id, from logits: (V,) float32 on the CPU, for a text whose ids so far are `seen`."""
        logits = self.penalised(logits, seen)
        if self.temperature == 0:
            return int(logits.argmax())
        highest = logits.max()
        if not highest.isfinite():
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; with it the logits are not finite")
        # A temperature under 1e-30 is none for float32.
        p = torch.softmax((logits - highest) / max(self.temperature, 1e-30), 0)
        falling = self._candidates(p.numpy())
        reached = (p if falling is None else torch.from_numpy(falling.copy())).cumsum(0, dtype=torch.float64).numpy()
        drawn = float(torch.rand((), dtype=torch.float64, generator=generator)) * reached[-1]
        i = min(int(np.searchsorted(reached, drawn, side="right")), len(reached) - 1)
        if falling is None:
            return i
        equal = np.flatnonzero(p.numpy() == falling[i])
        return int(equal[i - int((falling > falling[i]).sum())])

    def _candidates(self, p: np.ndarray) -> np.ndarray | None:
        """Those of the probabilities that top_k, top_p and min_p leave, in falling order; None: all of them."""
        top_p = 1.0 if self.top_p is None else self.top_p
        if self.top_k is None and self.min_p is None and top_p == 1:
            return None
        wanted = top_p * p.sum(dtype=np.float64)
        few = p[p >= 1e-4] if self.top_k is None and top_p < 1 else p  # most often enough, and soon sorted
        falling = np.sort(few if few.sum(dtype=np.float64) >= wanted else p)[::-1][: self.top_k]
        if top_p < 1:
            reached = falling.cumsum(dtype=np.float64)
            wanted = wanted if self.top_k is None else top_p * reached[-1]
            falling = falling[: int(np.searchsorted(reached, wanted)) + 1]  # the token that reaches it is kept
        if self.min_p is not None:
            falling = falling[falling >= self.min_p * falling[0]]
        return falling

    def penalised(self, logits: Tensor, seen: Sequence[int]) -> Tensor:
        """The logits, (V,), with what the text so far counts against them."""
        if self.repetition_penalty != 1:
            ids = torch.tensor(sorted(set(seen)))
            found = logits[ids]
            penalty = self.repetition_penalty
            logits = logits.index_put((ids,), torch.where(found > 0, found / penalty, found * penalty))
        if self.no_repeat_ngram is not None:
            n = self.no_repeat_ngram
            start = tuple(seen[len(seen) - n + 1 :]) if n > 1 else ()
            ends = {seen[i + n - 1] for i in range(len(seen) - n + 1) if tuple(seen[i : i + n - 1]) == start}
            if 0 < len(ends) < len(logits):
                logits = logits.index_fill(0, torch.tensor(sorted(ends)), -math.inf)
        return logits


class Continuation:
    """A text that a `Decoder` goes on with. Raises ValueError for impossible arguments.

    ids: the prompt, and behind it what has been drawn. seed: of the draws; None draws afresh. stop: ids that end the
    text. candidates: keep for each token drawn its log-probability, and those of so many likeliest tokens.
    """

    def __init__(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
        seed: int | None = None,
        stop: Collection[int] = (),
        candidates: int | None = None,
    ):
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; expected 0 or more")
        if seed is not None and not 0 <= seed < 2**63:
            raise ValueError(f"seed is {seed}; expected 0 to 2^63 - 1")
        self.ids, self.left, self.sampling, self.stop = list(map(int, ids)), max_new_tokens, sampling, stop
        self.generator = torch.Generator()
        self.generator.seed() if seed is None else self.generator.manual_seed(int(seed))
        self.candidates = candidates
        self.logprobs: list[tuple[float, list[tuple[int, float]]]] = []
        """Of each token drawn: its log-probability in nats, before temperature and penalties, and (id, the same) of the
        `candidates` likeliest."""
        self.ended: str | None = None
        """"stop", "length", or "error"."""
        self.error: ValueError | None = None

    def draw(self, logits: Tensor, likeliest: int) -> int:
        """Appends the next id, drawn from logits: (V,) float32 on the CPU, the largest of them at `likeliest`; or, if
        they are not finite, keeps the error."""
        token = likeliest
        try:
            if not logits[likeliest].isfinite():
                raise ValueError("the logits are not finite; the weights are damaged, or their training diverged")
            if self.sampling != Sampling(temperature=0):
                token = self.sampling.draw(logits, self.ids, self.generator)
        except ValueError as error:
            self.ended, self.error = "error", error
            return token
        if self.candidates is not None:
            p = torch.log_softmax(logits.double(), 0)
            top = p.topk(min(self.candidates, len(p)))
            self.logprobs.append((float(p[token]), list(zip(top.indices.tolist(), top.values.tolist(), strict=True))))
        self.ids.append(token)
        self.left -= 1
        self.ended = "stop" if token in self.stop else None if self.left else "length"
        return token


TOGETHER = 4096  # tokens of prompts in one forward pass


class Decoder:
    """Texts continued together over one cache. They may come and go at any step; each gets what it would get alone.

    rows: texts at once; others wait, and are taken in the order in which they came, as many as there is room for once
    those before them are read. length: tokens that the cache holds of each; None: the context. chunk: tokens of prompts
    read in a step, so that a long one does not keep the others waiting; None: all of them. The model sees of a text the
    last tokens that fit; when they have filled the cache, the later half of them is read again, whatever the chunk.
    """

    def __init__(self, model: Transformer, rows: int, length: int | None = None, chunk: int | None = None):
        self.model, self.rows, self.chunk = model, rows, chunk or sys.maxsize
        self.cache = KVCache(model, rows, length or model.config.context_length)
        # In the rows of the cache: those that are `ready` to be decoded, then those being read, shorter ones first.
        self.texts: list[Continuation] = []
        self.ready = 0
        self.waiting: deque[Continuation] = deque()

    def __len__(self) -> int:
        return len(self.texts) + len(self.waiting)

    def add(self, text: Continuation) -> None:
        """Takes a text in. Raises what `check` does."""
        self.check(text)
        if text.left:
            self.waiting.append(text)
        else:
            text.ended = "length"

    def check(self, text: Continuation) -> None:
        """ValueError for ids that the model has not, or none at all."""
        V = self.model.config.vocab_size
        if not text.ids or not all(0 <= i < V for i in text.ids):
            raise ValueError(f"expected at least one id, each in 0..{V - 1}; got {text.ids[:8]}")

    def remove(self, text: Continuation) -> None:
        """Lets a text go, wherever it stands."""
        if text in self.waiting:
            self.waiting.remove(text)
            return
        row = self.texts.index(text)
        self.cache.clear(row)
        if row < self.ready:  # the last one that is ready takes its place
            self.ready -= 1
            self._move(self.ready, row)
            row = self.ready
        for behind in range(row + 1, len(self.texts)):  # those that are being read stay in their order
            self._move(behind, behind - 1)
        self.texts.pop()

    def _move(self, source: int, target: int) -> None:
        if source != target:
            self.cache.move(source, target)
            self.texts[target] = self.texts[source]

    @torch.inference_mode()
    def step(self) -> list[tuple[Continuation, int]]:
        """Draws one token for each text that is ready: these, with their tokens. One that has ended, as it says itself,
        is let go."""
        self._read()
        if not self.ready:
            return []
        for row in range(self.ready):
            if self.cache.used[row] == self.cache.length:
                self.cache.used[row] = 0
                if later := self.texts[row].ids[-max(1, self.cache.length // 2) : -1]:
                    self._fill(slice(row, row + 1), [later])
        texts = self.texts[: self.ready]
        last = self._tokens([text.ids[-1:] for text in texts])
        hidden = self.model.hidden(last, self.cache[: self.ready])[:, 0]  # (B, D)
        logits = project(self.model.head, hidden).float().cpu()  # (B, V)
        likeliest = logits.max(1).indices.tolist()
        drawn = [(text, text.draw(logits[row], likeliest[row])) for row, text in enumerate(texts)]
        for text in texts:
            if text.ended:
                self.remove(text)
        return drawn

    def _read(self) -> None:
        """Fills the cache with what its texts have before their last token, which is read when the next is drawn."""
        left = self.chunk
        while left > 0:
            if self.ready == len(self.texts) and not self._begin():
                return
            rows, done = slice(self.ready, len(self.texts)), int(self.cache.used[self.ready])
            before = [text.ids[-self._reach(text) : -1] for text in self.texts[rows]]
            T = min(len(before[-1]) - done, max(1, min(left, TOGETHER) // len(before)))
            if T:  # a shorter text is filled up behind its end, with a token of its own, and written over there later
                filled = zip(self.texts[rows], before, strict=True)
                ids = [(own[done : done + T] + text.ids[-1:] * T)[:T] for text, own in filled]
                self._fill(rows, ids)
                self.cache.used[rows] = torch.tensor([min(done + T, len(own)) for own in before])
            left -= T * len(before)
            self.ready += sum(len(own) <= done + T for own in before)

    def _begin(self) -> bool:
        """Gives the free rows to those that wait, shorter ones first; whether there are any."""
        count = min(len(self.waiting), self.rows - len(self.texts))
        new = sorted((self.waiting.popleft() for _ in range(count)), key=self._reach)
        self.cache.used[len(self.texts) : len(self.texts) + count] = 0
        self.texts += new
        return count > 0

    def _reach(self, text: Continuation) -> int:
        """How many of its last tokens the model is to see."""
        return min(len(text.ids), self.cache.length)

    def _fill(self, rows: slice, ids: list[list[int]]) -> None:
        self.model.hidden(self._tokens(ids), self.cache[rows])

    def _tokens(self, ids: list[list[int]]) -> Tensor:
        return torch.tensor(ids, device=self.model.embed.weight.device)


def project(head: nn.Linear, x: Tensor) -> Tensor:
    """head(x) of a few rows, x: (B, D). Returns (B, V)."""
    B, V = len(x), head.out_features
    if x.is_cuda or not 1 < B <= 16 or V % 512:
        return head(x)
    # A CPU takes the weight in slices that stay in its cache. MKL would first copy the whole weight: a step of tiny
    # with 8 texts is a seventh shorter this way.
    y = x @ head.weight.view(-1, 512, head.in_features).transpose(1, 2)  # (V / 512, B, 512)
    return y.transpose(0, 1).reshape(B, V)


def stream(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    seed: int | Sequence[int] | None = None,
    stop: Collection[int] = (),
    **options,
) -> Iterator[list[tuple[int, int]]]:
    """Continues several texts together (`Decoder`). Yields for each step the (text, id) drawn in it, until all have
    ended.

    seed: of the draws, one for every text or one for each; None draws afresh. stop: ids that end a text, not
    yielded themselves. options: those of `Sampling`. Raises ValueError for impossible arguments.
    """
    sampling, longest = Sampling(**options), max(map(len, prompts), default=0)
    seeds = [seed] * len(prompts) if seed is None or isinstance(seed, Integral) else list(seed)
    if len(seeds) != len(prompts):
        raise ValueError(f"seed is {seed}; expected one for all or one for each of {len(prompts)}")
    texts = [Continuation(ids, max_new_tokens, sampling, seed, stop) for ids, seed in zip(prompts, seeds, strict=True)]
    decoder = Decoder(model, len(texts), min(model.config.context_length, longest + max_new_tokens))
    number = {text: i for i, text in enumerate(texts)}
    for text in texts:
        decoder.add(text)
    while decoder:
        drawn = decoder.step()
        for text, _ in drawn:
            if text.error:
                raise text.error
        yield [(number[text], token) for text, token in drawn if token not in stop]


def generate(model: Transformer, ids: Sequence[int] | Sequence[Sequence[int]], max_new_tokens: int, **options) -> list:
    """The new ids of `stream`: a list for one prompt, a list of lists for a list of prompts."""
    one = not ids or isinstance(ids[0], Integral)
    found = [[] for _ in ([ids] if one else ids)]
    for step in stream(model, [ids] if one else ids, max_new_tokens, **options):
        for text, token in step:
            found[text].append(token)
    return found[0] if one else found
