"""Threads over one frozen model: does each see what it asked for?

    python -m tests.attack.threads [--calls 100]

One row for each pair of what two threads do at the same time: how many calls of the second gave
another value than when it is alone, and how many raised.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fadapt


class Headed(nn.Module):
    """A trunk that other models share, and a head of its own."""

    def __init__(self, trunk: nn.Module):
        super().__init__()
        self.trunk, self.head = trunk, nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))


def filled(params: fadapt.Params, seed: int) -> fadapt.Params:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for leaf in fadapt.trainable(params):
            leaf += 0.3 * torch.randn(leaf.shape, generator=rng)
    return params


class Attack:
    """Two models over one trunk, adapters for both, and what may be called of them."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        trunk = nn.Sequential(*[nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(20)])
        self.model, self.other = Headed(trunk).eval(), Headed(trunk).eval()
        self.x = torch.randn(4, 16)
        self.one, self.two = (
            filled(fadapt.init(self.model, {"trunk": fadapt.LoRA(r=2)}), seed) for seed in (1, 2)
        )
        self.others = filled(fadapt.init(self.other, {"trunk": fadapt.DoRA(r=2)}), 3)
        self.stack = fadapt.stack([self.one, self.two])
        self.calls: dict[str, Callable[[], Tensor]] = {
            "plain": lambda: self.model(self.x),
            "plain gradient": self.plain_gradient,
            "apply": lambda: fadapt.apply(self.model, self.one, self.x),
            "apply two": lambda: fadapt.apply(self.model, self.two, self.x),
            "apply stack": lambda: fadapt.apply(self.model, self.stack, self.x),
            "run gradient": self.gradient,
            "bound": self.bound,
            "other model": lambda: fadapt.apply(self.other, self.others, self.x),
            "nested": self.nested,
            "merge": self.merge,
        }

    def plain_gradient(self) -> Tensor:
        """The base trained by somebody else: its gradients are not cut off."""
        weight = self.model.head.weight
        return torch.autograd.grad(self.model(self.x).square().sum(), weight)[0]

    def gradient(self) -> Tensor:
        loss = fadapt.run(self.model, self.one, self.x, lambda out, _: out.square().sum())
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, self.one.trainable())])

    def bound(self) -> Tensor:
        with fadapt.bound(self.model, self.two):
            return self.model(self.x)

    def nested(self) -> Tensor:
        """A model run from within a call of another one that shares its trunk."""
        found = []

        def hook(*_: Any) -> None:
            found.append(fadapt.apply(self.other, self.others, self.x))
            found.append(self.other(self.x))

        with fadapt.bound(self.model, self.two):
            hook()
            found.append(self.model(self.x))
        return torch.cat(found)

    def merge(self) -> Tensor:
        return torch.cat([w.flatten() for w in fadapt.merge(self.model, self.one).values()])


def attack(target: Attack, first: str, second: str, calls: int) -> tuple[int, list[str]]:
    """Calls ``second`` while another thread calls ``first`` all the time.

    Returns:
        The number of wrong values of both, and the errors.
    """
    stop, wrong, errors = threading.Event(), [0], []
    want = {name: target.calls[name]() for name in (first, second)}

    def once(name: str) -> None:
        try:
            wrong[0] += not torch.equal(target.calls[name](), want[name])
        except Exception as error:
            errors.append(f"{name}: {type(error).__name__}: {error}")

    def disturb() -> None:
        while not stop.is_set():
            once(first)

    thread = threading.Thread(target=disturb)
    thread.start()
    for _ in range(calls):
        once(second)
    stop.set()
    thread.join()
    return wrong[0], errors


PAIRS = [
    (first, second)
    for first in ("apply", "run gradient", "apply stack", "bound", "other model")
    for second in (
        *("plain", "plain gradient", "apply two", "apply stack", "run gradient", "bound"),
        *("other model", "nested", "merge"),
    )
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(1)
    target, bad = Attack(), 0
    own = dict(target.model.named_parameters())
    print(f"{'meanwhile':16}{'call':18}{'wrong':>7}{'errors':>8}  of {args.calls}")
    for first, second in PAIRS:
        wrong, errors = attack(target, first, second, args.calls)
        print(f"{first:16}{second:18}{wrong:7}{len(errors):8}  {' '.join(errors[:1])[:80]}")
        bad += wrong + len(errors)
    bad += any(p is not own[name] for name, p in target.model.named_parameters())
    bad += any(type(m._parameters) is not dict for m in target.model.modules())
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
