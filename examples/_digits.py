"""What the examples share: handwritten digits, a small transformer that reads them, its training.

scikit-learn's 8 x 8 digits are rotated by 90 degrees and inverted: data that the frozen base has
never seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fadapt

TARGETS = "_proj"  # a regex: the linear maps of attention and MLP
BATCH = 64

# A few numbers a site, which start at zero, take larger steps than the factors of a matrix.
FEW = ("AntiPaSTO", "AntiPaSTOASVD", "AntiPaSTOAblate", "AntiPaSTOCorDA", "AntiPaSTORotation",
       "IA3", "IA3FF", "LNTuning", "LoRAXS", "RoAd", "TinyLoRA", "VeRA")  # fmt: skip
# An increment that is divided by the width, or relative to the weight, takes larger ones still.
LEARNING_RATE = {**dict.fromkeys(FEW, 0.1), "C3A": 0.3, "FourierFT": 1.0, "HiRA": 0.1}
DEFAULT_LEARNING_RATE = 0.01


class Layer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.up_proj, self.down_proj = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        x = self.norm1(h)
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = h + self.o_proj(mixed)
        return h + self.down_proj(F.gelu(self.up_proj(self.norm2(h))))


class Reader(nn.Module):
    """Images (batch, 8, 8) -> logits (batch, 10). Each row of an image is a token."""

    def __init__(self, width: int = 32, heads: int = 2, depth: int = 2):
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.position = nn.Parameter(0.02 * torch.randn(8, width))
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        h = self.embed(images) + self.position
        for layer in self.layers:
            h = layer(h)
        return self.head(self.norm(h).mean(1))


@dataclass
class Digits:
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    def batches(self, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Random batches, the same each time."""
        rng = torch.Generator().manual_seed(0)
        for _ in range(steps):
            i = torch.randint(len(self.train_x), (BATCH,), generator=rng)
            yield self.train_x[i], self.train_y[i]

    def shifted(self) -> Digits:
        """The same digits, lying on their side, white on black."""

        def shift(x: Tensor) -> Tensor:
            return 1 - x.rot90(dims=(1, 2))

        return Digits(shift(self.train_x), self.train_y, shift(self.test_x), self.test_y)


def load() -> Digits:
    data = load_digits()
    x, y = torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[500:], order[:500]
    return Digits(x[train], y[train], x[test], y[test])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(-1) == labels).float().mean().item()


def train_base(digits: Digits, steps: int = 300) -> Reader:
    torch.manual_seed(0)
    model = Reader()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for x, y in digits.batches(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


class Labelled(nn.Module):
    """Takes a batch with its labels, which only the loss reads."""

    def __init__(self, reader: Reader):
        super().__init__()
        self.reader = reader

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.reader(images)


Batch = dict[str, Tensor]


def loss_fn(logits: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(logits, batch["labels"])


def make_batches(digits: Digits, steps: int, size: int) -> list[Batch]:
    """Random batches, the same each time."""
    rng = torch.Generator().manual_seed(0)
    picks = torch.randint(len(digits.train_x), (steps, size), generator=rng)
    return [{"images": digits.train_x[i], "labels": digits.train_y[i]} for i in picks]


def accuracy_on(images: Tensor, labels: Tensor):
    """An evaluation of all adapters in one forward."""

    def evaluate(model: Labelled, stack: fadapt.Stack) -> dict[str, Tensor]:
        logits = fadapt.apply(model, stack, images, labels)  # (adapters, images, classes)
        return {"accuracy": (logits.argmax(-1) == labels).double().mean(-1)}

    return evaluate
