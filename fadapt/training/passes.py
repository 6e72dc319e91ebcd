"""Passes: losses and gradients of an arena, in chunks that fit into memory, compiled or not."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ..errors import ConfigError
from ..run import LossFn, run
from ..stack import Stack
from ..tree import Params
from .arena import Arena, alone
from .feed import rows_of

T = TypeVar("T")


@dataclass(frozen=True)
class Chunk:
    """Rows ``low`` to ``high`` of the arena, which run in one pass.

    Attributes:
        trials: their trial numbers.
        stack: their adapters, sharing the arena's memory.
        params: what is trained: the stack, or its only member.
        leaves: the trainable leaves of ``params``.
        grads: where the arena keeps the gradients of ``leaves``.
    """

    low: int
    high: int
    trials: list[int]
    stack: Stack
    params: Stack | Params
    leaves: list[Tensor]
    grads: list[Tensor]


class Passes:
    """Runs an arena chunk by chunk; a chunk that runs out of memory is halved and run again.

    Args:
        model: the frozen base.
        arena: the adapters.
        loss_fn: as for :func:`fadapt.run`.
        per_adapter: whether batches are (N, B, ...), with N all trials of the sweep.
        max_adapters: "auto" starts with all in one chunk; an int is the largest chunk; None is one
            chunk that is never halved.
        compiler: a :class:`Compiler`, or ``eager``.
    """

    def __init__(
        self,
        model: nn.Module,
        arena: Arena,
        loss_fn: LossFn | None,
        per_adapter: bool,
        max_adapters: int | str | None,
        compiler: Callable[[Stack | Params], Callable[..., Tensor]],
    ):
        self.model, self.arena, self.loss_fn = model, arena, loss_fn
        self.per_adapter, self.halves, self.compiler = (
            per_adapter,
            max_adapters is not None,
            compiler,
        )
        width = max_adapters if isinstance(max_adapters, int) else len(arena)
        self.chunks = [self._chunk(*b) for b in _bounds(0, len(arena), width)]
        self.idle: frozenset[int] = frozenset()

    @property
    def width(self) -> int:
        """The largest chunk at present."""
        return max(c.high - c.low for c in self.chunks)

    def gradients(self, batch: Any, weights: Sequence[float]) -> Tensor:
        """Adds each trial's gradient, times its weight, to the arena; returns the (N,) losses."""

        def work(chunk: Chunk) -> Tensor:
            losses = self.compiler(chunk.params)(
                self.model, chunk.params, self._part(batch, chunk), self.loss_fn,
                per_adapter=self.per_adapter,
            ).reshape(-1)  # fmt: skip
            if not losses.requires_grad:
                raise ConfigError(
                    "the loss does not depend on any adapter: loss_fn detaches it, or no adapted "
                    "layer takes part"
                )
            seeds = losses.new_tensor(weights[chunk.low : chunk.high])
            found = torch.autograd.grad(losses, chunk.leaves, seeds, allow_unused=True)
            # After the whole backward: a chunk counts entirely or, out of memory, not at all.
            for total, new in zip(chunk.grads, found, strict=True):
                if new is not None:
                    total.add_(new)
            # A copy: CUDA graphs use the same memory again in the next step.
            return losses.detach().clone()

        return self._join(self._each(work))

    @torch.no_grad()
    def losses(self, batch: Any) -> Tensor:
        """The (N,) losses, without gradients, on a batch that all trials share."""
        return self._join(self._each(lambda c: run(self.model, c.stack, batch, self.loss_fn)))

    @torch.no_grad()
    def scores(self, evaluate: Callable[[nn.Module, Stack], Any]) -> dict[str, Tensor]:
        """What the user's function returns for each chunk's stack, put together: (N,) each."""

        def work(chunk: Chunk) -> dict[str, Tensor]:
            found = evaluate(self.model, chunk.stack)
            named = found if isinstance(found, Mapping) else {"score": found}
            n = chunk.high - chunk.low
            result = {}
            for name, value in named.items():
                value = torch.as_tensor(value)
                if value.shape != (n,):
                    raise ConfigError(
                        f"eval(model, stack) returned {name!r} of shape {tuple(value.shape)} for a "
                        f"stack of {n}; return one number per adapter"
                    )
                result[name] = value.detach().to(torch.float64)
            if not result:
                raise ConfigError("eval(model, stack) returned no scores")
            return result

        parts = self._each(work)
        names = next(part for part in parts if part is not None)
        return {k: self._join([None if p is None else p[k] for p in parts]) for k in names}

    def _part(self, batch: Any, chunk: Chunk) -> Any:
        if not self.per_adapter:
            return batch
        batch = rows_of(batch, chunk.trials)
        if isinstance(chunk.params, Stack):
            return batch
        return pytree.tree_map_only(Tensor, lambda t: t[0], batch)

    def _chunk(self, low: int, high: int) -> Chunk:
        stack, grads = self.arena.part(low, high)
        trials = self.arena.order[low:high]
        if high - low > 1:
            return Chunk(low, high, trials, stack, stack, stack.trainable(), grads)
        params = alone(stack)
        return Chunk(low, high, trials, stack, params, params.trainable(), [g[0] for g in grads])

    def _each(self, work: Callable[[Chunk], T]) -> list[T | None]:
        """``work`` on every chunk, None for chunks of idle trials only."""
        results: list[T | None] = []
        while len(results) < len(self.chunks):
            chunk = self.chunks[len(results)]
            if self.idle.issuperset(chunk.trials):
                results.append(None)
                continue
            fits, result = self._attempt(work, chunk)
            if fits:
                results.append(result)
            else:
                self._halve(len(results))
        return results

    def _attempt(self, work: Callable[[Chunk], T], chunk: Chunk) -> tuple[bool, T | None]:
        try:
            return True, work(chunk)
        except RuntimeError as error:
            size = chunk.high - chunk.low
            if not _out_of_memory(error):
                raise
            if not self.halves or size == 1:
                error.add_note(
                    f"fadapt: {size} adapter(s) in one pass do not fit; use smaller batches with "
                    "accumulate=, gradient checkpointing, or max_adapters='auto'"
                )
                raise
        # Only here, where the exception no longer keeps the pass's tensors alive.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return False, None

    def _halve(self, first: int) -> None:
        """Splits this chunk and those after it; the ones before have done this step's work."""
        width = -(-(self.chunks[first].high - self.chunks[first].low) // 2)
        later = self.chunks[first:]
        self.chunks = self.chunks[:first] + [
            self._chunk(*bounds) for c in later for bounds in _bounds(c.low, c.high, width)
        ]

    def _join(self, parts: Sequence[Tensor | None]) -> Tensor:
        like = next(p for p in parts if p is not None)
        return torch.cat(
            [
                like.new_full((c.high - c.low,), torch.nan) if p is None else p.to(like.device)
                for c, p in zip(self.chunks, parts, strict=True)
            ]
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; every module's own flag is restored."""
    flags = [(m, m.training) for m in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def _bounds(low: int, high: int, width: int) -> list[tuple[int, int]]:
    """Consecutive ranges of at most ``width``, as equal as can be: equal ones compile once."""
    count = -(-(high - low) // width)
    edges = [low + (high - low) * i // count for i in range(count + 1)]
    return list(itertools.pairwise(edges))


def _out_of_memory(error: RuntimeError) -> bool:
    signs = "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED"
    return isinstance(error, torch.OutOfMemoryError) or any(s in str(error) for s in signs)
