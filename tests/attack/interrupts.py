"""Ctrl-C at random moments: is the model the base again, at once, and does the next call work?

    python -m tests.attack.interrupts [--hits 2000] [--seed 0]

An alarm raises KeyboardInterrupt somewhere in a call. Then, before anything else of fadapt runs:

- adapted: the plain model gives other values, or holds other tensors, than the base;
- left: something still stands in a module's dict where its own value was (harmless by itself);
- flags: a module is not in the mode in which it was;
- stuck: the next call raises, or does not give its own value, within two seconds.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fadapt

KINDS = ("run", "backward", "apply", "stack", "bound", "observe", "sweep")


def base() -> nn.Sequential:
    """Many small layers: most of the time goes into what surrounds their products."""
    torch.manual_seed(0)
    layers = [nn.Linear(16, 16) for _ in range(24)]
    return nn.Sequential(*layers, nn.BatchNorm1d(16))


def mean_square(out: Any, _: Any) -> torch.Tensor:
    return out.square().mean()


class Attack:
    """A model, and the calls that are interrupted."""

    def __init__(self) -> None:
        self.model, self.x = base().eval(), torch.ones(2, 16)
        self.params = fadapt.init(self.model, fadapt.LoRA(r=2))
        with torch.no_grad():
            for leaf in fadapt.trainable(self.params):
                leaf.add_(0.1)
        self.members = fadapt.stack([self.params, self.params])
        self.attributes = [dict(vars(m)) for m in self.model.modules()]
        self.own = [dict(m._parameters) for m in self.model.modules()]
        self.plain = self.model(self.x)
        self.adapted = fadapt.apply(self.model, self.params, self.x)

    def run(self) -> None:
        fadapt.run(self.model, self.params, self.x, mean_square)

    def backward(self) -> None:
        fadapt.run(self.model, self.params, self.x, mean_square).backward()

    def apply(self) -> None:
        fadapt.apply(self.model, self.params, self.x)

    def stacked(self) -> None:
        fadapt.run(self.model, self.members, self.x, mean_square)

    def bound(self) -> None:
        with fadapt.bound(self.model, self.params):
            self.model(self.x)

    def observe(self) -> None:
        cfg = fadapt.EVA(r=2)
        fadapt.observe(self.model, cfg, [torch.randn(20, 16)], progress=False)

    def sweep(self) -> None:
        fadapt.sweep(
            self.model,
            [fadapt.Trial(fadapt.LoRA(r=2))],
            [self.x] * 2,
            loss_fn=mean_square,
            eval=[self.x],
            eval_every=1,
            progress=False,
        )

    def damage(self) -> list[str]:
        """What is wrong now; repaired, so that the next try starts anew."""
        found = set()
        for module, attributes, own in zip(
            self.model.modules(), self.attributes, self.own, strict=True
        ):
            if any(module._parameters[k] is not t for k, t in own.items()):
                found.add("adapted")
            if module.training is not attributes["training"]:
                found.add("flags")
            if any(v is not module.__dict__.get(k) for k, v in attributes.items()):
                found.add("left")
            if module.__dict__.keys() != attributes.keys():
                found.add("left")
        if not torch.equal(self.model(self.x), self.plain):
            found.add("adapted")
        if not self._works():
            found.add("stuck")
        for module, attributes in zip(self.model.modules(), self.attributes, strict=True):
            module.__dict__.clear()
            module.__dict__.update(attributes)
        return sorted(found)

    def _works(self) -> bool:
        results: list[bool] = []

        def call() -> None:
            out = fadapt.apply(self.model, self.params, self.x)
            results.append(torch.equal(out, self.adapted))

        for _ in range(2):  # in this thread, and in another one
            call()
            thread = threading.Thread(target=call, daemon=True)
            thread.start()
            thread.join(2.0)
        return results == [True] * 4


def attack(kind: str, hits: int, seed: int = 0) -> Counter[str]:
    """Interrupts calls of one kind until ``hits`` were hit.

    Returns:
        How many were hit, and how many of them left what behind.
    """
    target, rng, found = Attack(), random.Random(f"{kind} {seed}"), Counter({"hits": 0})
    call: Callable[[], None] = target.stacked if kind == "stack" else getattr(target, kind)
    call()
    usual = signal.getsignal(signal.SIGALRM)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, stop)
    longest = _seconds(call)
    try:
        while found["hits"] < hits:
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(2e-5, longest))
                call()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                found["hits"] += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            found.update(target.damage())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, usual)
    return found


def _seconds(call: Callable[[], None]) -> float:
    import time

    start = time.perf_counter()
    for _ in range(3):
        call()
    return (time.perf_counter() - start) / 3


COLUMNS = ("hits", "adapted", "left", "flags", "stuck")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hits", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'':10}" + "".join(f"{c:>9}" for c in COLUMNS))
    bad = 0
    for kind in KINDS:
        found = attack(kind, args.hits, args.seed)
        print(f"{kind:10}" + "".join(f"{found[c]:9}" for c in COLUMNS), flush=True)
        bad += sum(found.values()) - found["hits"]
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
