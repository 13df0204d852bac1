"""Draws the pictures of the tour into docs/tour/. Needs matplotlib; takes half a minute.

To run it from the root of the repository: python -m docs.tour.pictures
"""

import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle

from model import ModelConfig, Transformer, rotary_tables, rotate, sees

TOUR = Path(__file__).resolve().parent
STORIES = (TOUR / "text.txt").read_text(encoding="utf-8").splitlines()
SHOWN = STORIES[0]  # its names, its colour and its thing recur
MARKED = [(8, 1), (16, 14), (23, 1)], [(11, 5)]  # (query, key) that the chapter explains, in head 0 and head 1
STEPS, ROWS, LENGTH = 600, 16, 64


def words(story: str) -> list[str]:
    """The words and marks of a story, after the end token. In this picture each of them is one token."""
    return ["</s>", *re.findall(r"\w+|[^\w\s]", story)]


def train_model(ids: dict[str, int]) -> Transformer:
    """A model of two layers with two heads each, trained on all stories but the shown one."""
    torch.manual_seed(0)
    tokens = []
    for story in STORIES:
        if story != SHOWN:
            tokens += [ids[word] for word in words(story)]
    tokens = torch.tensor(tokens)
    model = Transformer(ModelConfig(vocab_size=len(ids), context_length=LENGTH, n_layers=2, d_model=64, n_heads=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(STEPS):
        starts = torch.randint(len(tokens) - LENGTH - 1, (ROWS, 1))
        rows = tokens[starts + torch.arange(LENGTH + 1)]  # (B, T + 1)
        loss = model(rows[:, :-1], rows[:, 1:])
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / STEPS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"loss of the last step: {loss.item():.2f} nats per word")
    return model


@torch.no_grad()
def attention_weights(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    """The weights of every layer and head for one text, (n_layers, H, T, T), by the formula of `softmax_attention`."""
    layout, x, weights = model.layout(tokens, None, None, None), model.embed(tokens), []
    at = torch.arange(tokens.shape[1])
    for block in model.blocks:
        attn, normed = block.attn, block.attn_norm(x)
        shape = (*tokens.shape, attn.n_heads, attn.head_dim)
        q = rotate(attn.q(normed).view(shape), layout.cos, layout.sin).transpose(1, 2)  # (1, H, T, E)
        k = rotate(attn.k(normed).view(shape), layout.cos, layout.sin).transpose(1, 2)
        scores = q @ k.mT / math.sqrt(attn.head_dim)
        weights.append(F.softmax(scores.masked_fill(~sees(at[:, None], at), -math.inf), -1)[0])
        x = block(x, layout)
    return torch.stack(weights)


def draw_attention(path: Path) -> None:
    """The attention weights of the first layer of a trained model on a story that it has not seen."""
    ids = {}
    for story in STORIES:
        for word in words(story):
            ids.setdefault(word, len(ids))
    names = words(SHOWN)
    model, tokens = train_model(ids), torch.tensor([[ids[name] for name in names]])
    weights = attention_weights(model, tokens)
    figure = Figure(figsize=(13, 6.9), layout="constrained")
    for head, axis in enumerate(figure.subplots(1, 2)):
        axis.imshow(weights[0, head], cmap="Blues", vmin=0, vmax=1)
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=11)
        axis.set_yticks(range(len(names)), names, fontsize=11)
        axis.set_title(f"layer 0, head {head}")
        for query, key in MARKED[head]:
            axis.add_patch(Rectangle((key - 0.5, query - 0.5), 1, 1, fill=False, color="orangered", linewidth=2))
    figure.savefig(path, dpi=60)


def draw_rotary(path: Path) -> None:
    """How far each pair of a head's dimensions is turned at the first positions."""
    config = ModelConfig(vocab_size=1, context_length=64, n_layers=1, d_model=64, n_heads=1)
    cos, sin = rotary_tables(config)
    positions, pairs = (0, 1, 2, 3, 8, 32), (0, 2, 4, 8, 16)
    figure = Figure(figsize=(6.2, 5.4), layout="constrained")
    axes = figure.subplots(len(pairs), len(positions))
    for row, pair in zip(axes, pairs, strict=True):
        for axis, position in zip(row, positions, strict=True):
            axis.add_patch(Circle((0, 0), 1, fill=False, color="lightgrey"))
            x, y = float(cos[position, 0, pair]), float(sin[position, 0, pair + 32])
            axis.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0})
            axis.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), aspect="equal", xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        row[0].set_ylabel(f"pair {pair}", rotation=0, ha="right", va="center")
    for axis, position in zip(axes[0], positions, strict=True):
        axis.set_title(f"position {position}", fontsize=10)
    figure.savefig(path, dpi=70)


if __name__ == "__main__":
    draw_rotary(TOUR / "04_rope.png")
    draw_attention(TOUR / "05_attention.png")
