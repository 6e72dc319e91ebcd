"""RankBudget: AdaLoRA's ranks, spread over all sites by the importance of their triplets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_int
from ..errors import ConfigError, require
from ..fields import check_fields
from ..methods.adalora import AdaLoRA
from ..params.adapter import Adapter
from ..params.params import Params, is_made

State = Mapping[str, Mapping[str, Tensor]]
LEAVES = ("A", "B", "E")
MEAN, SPREAD = "mean", "spread"


@dataclass(frozen=True)
class RankBudget:
    """The schedule by which AdaLoRA's triplets are cut, and the importance that chooses them.

    With I = |w dL/dw| for every entry w of A, B and E, smoothed as is its deviation,

        Ī <- beta1 Ī + (1 - beta1) I,   Ū <- beta2 Ū + (1 - beta2) |I - Ī|,

    a triplet is as important as its E plus the mean over its row of A plus that over its column of
    B, each Ī Ū. Of all triplets of all sites the budget keeps the most important ones, and the E of
    the others is set to 0. It falls from all to ``target_r`` a site, cubically, between ``tinit``
    and ``total_step - tfinal``, from where on the choice stays. Zhang et al. 2023, arXiv
    2303.10512, eq. 8 to 12.

    A state is a plain tree of tensors, and every function but :meth:`cut` is pure. Call it between
    steps, in a loop of one's own:

        loss.backward(); optimizer.step()
        state = budget.update(state, params, step)
        budget.cut(params, state, step)
        optimizer.zero_grad()

    Args:
        total_step: of the training.
        target_r: the ranks that are left, on average over the sites; at least 1.
        tinit: the steps before anything is cut.
        tfinal: the steps at the end, in which the choice stays.
        deltaT: how often the budget cuts, in steps.
        beta1: how slowly importance moves, between 0 and 1.
        beta2: the same for its deviation.

    Example:
        >>> params = fadapt.init(model, fadapt.AdaLoRA(r=3))
        >>> budget = fadapt.RankBudget(total_step=4, target_r=2)
        >>> optimizer = torch.optim.AdamW(fadapt.trainable(params), lr=1e-2)
        >>> state = None
        >>> for step in range(1, 5):
        ...     optimizer.zero_grad()
        ...     fadapt.run(model, params, x, loss_fn).backward()
        ...     optimizer.step()
        ...     state = budget.update(state, params, step)
        ...     _ = budget.cut(params, state, step)
        >>> sum(int((a.train["E"] != 0).sum()) for a in params.values())
        4
    """

    total_step: int
    target_r: int = 8
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1  # noqa: N815
    beta1: float = 0.85
    beta2: float = 0.85

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.target_r >= 1, f"target_r must be at least 1, got {self.target_r}")
        require(self.deltaT >= 1, f"deltaT must be at least 1, got {self.deltaT}")
        require(
            self.tinit >= 0 and self.tfinal >= 0 and self.tinit + self.tfinal < self.total_step,
            f"tinit={self.tinit} and tfinal={self.tfinal} must be at least 0 and leave steps "
            f"between them, of total_step={self.total_step}",
        )
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 < value < 1, f"{name} must be between 0 and 1, got {value}")

    @property
    def settled(self) -> int:
        """The step from which on the choice stays."""
        return self.total_step - self.tfinal

    def update(
        self,
        state: State | None,
        params: Params,
        step: int,
        grads: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> State:
        """The state after one more gradient.

        Args:
            state: of the step before; None at first.
            params: with the values after the optimizer's step.
            step: of the optimizer, counted from 1.
            grads: a tree such as torch.func.grad gives for ``fadapt.split(params)[0]``; by default
                the leaves' ``grad``.

        Raises:
            ConfigError: no AdaLoRA among ``params``, or leaves without a gradient.
        """
        adapters = _adapters(params)
        check_int("step", step, 0)
        if state is not None:
            _check_state(state, adapters)
        if grads is not None and not isinstance(grads, Mapping):
            raise ConfigError(
                f"grads must be {{site: {{leaf: tensor}}}}, got {grads!r:.80}; write "
                "torch.func.grad(loss)(fadapt.split(params)[0]), or leave it out after backward"
            )
        if state is not None and step >= self.settled:
            return state
        return {
            name: self._smoothed(None if state is None else state[name], adapter,
                                 {k: _grad(name, adapter, k, grads) for k in LEAVES})
            for name, adapter in adapters.items()
        }  # fmt: skip

    def importance(self, state: State) -> dict[str, Tensor]:
        """{site: (r,)}, of every triplet; of a stack of experts (experts, r)."""
        _check_state(state)
        found = {}
        for name, own in state.items():
            a, b, e = (own[f"{k}.{MEAN}"] * own[f"{k}.{SPREAD}"] for k in LEAVES)
            found[name] = e + a.mean(-1) + b.mean(-2)
        return found

    def budget(self, step: int, start: int, target: int) -> int:
        """The number of triplets at a step, of which there are ``start`` at first."""
        check_int("step", step, 0)
        check_int("start", start, 0)
        check_int("target", target, 0)
        if step <= self.tinit:
            return start
        left = 1 - min(1.0, (step - self.tinit) / (self.settled - self.tinit))
        return int((start - target) * left**3 + target)

    def kept(self, state: State, step: int) -> dict[str, Tensor]:
        """{site: which triplets the budget of this step keeps}, as masks like E."""
        check_int("step", step, 0)
        scores = self.importance(state)
        every = torch.cat([s.flatten() for s in scores.values()])
        sizes = [s.numel() for s in scores.values()]
        target = sum(min(self.target_r, s.shape[-1]) * s[..., 0].numel() for s in scores.values())
        order = every.argsort(descending=True, stable=True)
        mask = torch.zeros_like(every, dtype=torch.bool)
        mask[order[: self.budget(step, len(every), target)]] = True
        parts = zip(scores.items(), mask.split(sizes), strict=True)
        return {name: part.view_as(score) for (name, score), part in parts}

    def cut(self, params: Params, state: State, step: int) -> Params:
        """Sets the E of the other triplets to 0, in place, as :func:`fadapt.project` writes.

        Between the steps that are multiples of ``deltaT`` nothing is done, before ``tinit`` also.

        Raises:
            ConfigError: no AdaLoRA among ``params``, or leaves that a graph made.
        """
        adapters = _adapters(params)
        check_int("step", step, 0)
        _check_state(state, adapters)
        if any(is_made(a.train["E"]) for a in adapters.values()):
            raise ConfigError(
                "cut writes to the leaves of an optimizer; these were computed from other tensors. "
                "Multiply E by RankBudget.kept(state, step) instead"
            )
        if step <= self.tinit or (step % self.deltaT and step < self.settled):
            return params
        with torch.no_grad():
            for name, mask in self.kept(state, step).items():
                adapters[name].train["E"].masked_fill_(~mask, 0)
        return params

    def _smoothed(
        self, before: Mapping[str, Tensor] | None, adapter: Adapter, grads: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        new = {}
        for k, grad in grads.items():
            wide = torch.promote_types(grad.dtype, torch.float32)
            now = (adapter.train[k].detach().to(wide) * grad.detach().to(wide)).abs()
            mean, spread = (before[f"{k}.{w}"] if before else 0 * now for w in (MEAN, SPREAD))
            mean = self.beta1 * mean + (1 - self.beta1) * now
            spread = self.beta2 * spread + (1 - self.beta2) * (now - mean).abs()
            new |= {f"{k}.{MEAN}": mean, f"{k}.{SPREAD}": spread}
        return new


def _adapters(params: Any) -> dict[str, Adapter]:
    if not isinstance(params, Params):
        raise ConfigError(
            f"RankBudget takes Params, got {type(params).__name__}; of a stack, its members one by "
            "one: fadapt.unstack(stack)"
        )
    params.check_one()
    found = {n: a for n, a in params.items() if isinstance(a.method, AdaLoRA)}
    if not found:
        methods = sorted({type(a.method).__name__ for a in params.values()})
        raise ConfigError(f"RankBudget cuts triplets of AdaLoRA, and params hold {methods}")
    return found


def _check_state(state: Any, adapters: Mapping[str, Adapter] | None = None) -> None:
    """Refuses what :meth:`RankBudget.update` did not return, or did for other params."""
    whole = isinstance(state, Mapping) and bool(state)
    keys = [f"{leaf}.{what}" for leaf in LEAVES for what in (MEAN, SPREAD)]
    for own in state.values() if whole else ():
        held = isinstance(own, Mapping) and all(isinstance(own.get(k), Tensor) for k in keys)
        whole = whole and held
    if not whole:
        raise ConfigError(
            f"state must be what RankBudget.update returned, got {state!r:.80}; write state = "
            "budget.update(state, params, step), from None at first"
        )
    for name, adapter in (adapters or {}).items():
        for leaf in LEAVES:
            mine = state[name][f"{leaf}.{MEAN}"].shape if name in state else None
            if mine != adapter.train[leaf].shape:
                raise ConfigError(
                    f"state is of other params: {name}: {leaf} has the shape "
                    f"{list(adapter.train[leaf].shape)} here and {mine and list(mine)} there; "
                    "begin with None"
                )
    if adapters is not None and (more := sorted(state.keys() - adapters.keys())):
        raise ConfigError(f"state is of other params: {more[:3]} are not among these; begin anew")


def _grad(name: str, adapter: Adapter, leaf: str, grads: Any) -> Tensor:
    own = adapter.train[leaf]
    held = None if grads is None else grads.get(name)
    given = held.get(leaf) if isinstance(held, Mapping) else None
    grad = own.grad if grads is None else given
    if grad is None:
        raise ConfigError(
            f"{name}: {leaf} has no gradient; call update after backward and before zero_grad, or "
            "pass grads"
        )
    if not isinstance(grad, Tensor) or grad.shape != own.shape:
        raise ConfigError(f"{name}: the gradient of {leaf} is {grad!r:.80}, not like the leaf")
    return grad
