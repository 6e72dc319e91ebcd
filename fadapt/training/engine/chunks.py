"""ChunkRunner: losses and gradients of flat params, in chunks that fit into memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...adapted_map import drops_input
from ...base.generators import others_seeded
from ...base.memory import is_out_of_memory
from ...base.sharded import local_of
from ...base.torch_private import pytree
from ...batch import arguments
from ...errors import ConfigError
from ...fold.run import one_by_one, run_in_turn
from ...params.adapter import Adapter
from ...params.params import Params, trainable_leaves
from ...params.stack import Stack, alone
from ...run import LossFn, apply, run
from ...seeds import number
from ..data import rows_of
from ..generators import Generators
from ..trial import Trial
from .compiler import Compiler
from .flat_params import FlatParams

T = TypeVar("T")

CPU_BYTES = 2**28
"""What one pass may keep for its gradient on a CPU. More is slower: the memory of every step is
given back and asked for again, and nothing stays in the caches."""


@dataclass(frozen=True)
class Chunk:
    """Rows ``low`` to ``high`` of the flat params, which run in one pass.

    Attributes:
        trials: their trial numbers.
        stack: their adapters, sharing the flat's memory.
        params: what is trained: the stack, or its only member.
        step: (batch, weights) -> losses; the flat params take the weighted gradients.
    """

    low: int
    high: int
    trials: list[int]
    stack: Stack
    params: Stack | Params
    step: Callable[[Any], Tensor]


class ChunkRunner:
    """Runs flat params chunk by chunk; a chunk that runs out of memory is halved and run again.

    Args:
        model: the frozen base.
        flat: the adapters.
        loss_fn: as for :func:`fadapt.run`.
        per_adapter: whether batches are (N, B, ...), with N all trials of the sweep.
        max_adapters: "auto" starts with all in one chunk, on a CPU with what is fast; an int is
            the largest chunk; None is one chunk that is never halved.
        verify: as for :func:`fadapt.sweep`.
        compiler: a :class:`Compiler`.
        accumulates: whether gradients add up over several batches.
        trials: {name: trial}, in the order of their numbers.
        chosen: the width that an earlier object of the same sweep had come to, or None.
        bounds: the rows of each chunk, where they are those of a sweep in one process.
        halves: whether a chunk that does not fit may be halved, by this process alone.

    Attributes:
        chosen: the width to hand on to a later object; None before :meth:`choose`.
        partial: whether the flat params have taken gradients for a step that is not done; who does
            it says so.
    """

    def __init__(
        self,
        model: nn.Module,
        flat: FlatParams,
        loss_fn: LossFn | None,
        per_adapter: bool,
        max_adapters: int | str | None,
        verify: bool,
        compiler: Compiler,
        accumulates: bool,
        trials: Mapping[str, Trial],
        chosen: int | None = None,
        bounds: Sequence[tuple[int, int]] | None = None,
        halves: bool = True,
    ):
        self.model, self.flat, self.loss_fn = model, flat, loss_fn
        self.per_adapter, self.compiler, self.verify = per_adapter, compiler, verify
        self.accumulates = accumulates
        self.halves = max_adapters is not None and halves
        self._names, self._trials = list(trials), list(trials.values())
        # Filled anew for each step, at one address, which a CUDA graph reads.
        self.draw = torch.zeros((), dtype=torch.int64, device=compiler.device)
        most = min(max_adapters, len(flat)) if isinstance(max_adapters, int) else len(flat)
        self.chosen = None if max_adapters == "auto" else most
        if chosen is not None and (self.halves or chosen == 1):
            self.chosen = min(chosen, most)
        self._split(self.chosen or len(flat), bounds)
        self.idle: frozenset[int] = frozenset()
        self.partial = False
        self._generators = Generators(compiler.device)
        self._at = 0

    @property
    def width(self) -> int:
        """The largest chunk at present."""
        return max(c.high - c.low for c in self.chunks)

    def gradients(self, batch: Any, weights: Sequence[float], step: int) -> Tensor:
        """Puts each trial's gradient, times its weight, into the flat; returns the (N,) losses.

        Args:
            batch: of this step.
            weights: one for each trial.
            step: the number of the batch, from which masks of dropout follow; see
                :func:`of_part` for a part of its rows.
        """
        device = self.compiler.device
        self.draw.fill_(step)
        self._at = step
        wide = torch.float32 if device.type == "mps" else torch.float64

        def work(chunk: Chunk) -> Tensor:
            # Made before the pass, which is not to wait for the device.
            seeds = torch.tensor(weights[chunk.low : chunk.high], dtype=wide, device=device)
            return chunk.step((self._part(batch, chunk), seeds))

        return self._join(self._each(work, "training"))

    def _step(self, params: Stack | Params, low: int, high: int) -> Any:
        """See :class:`Chunk`."""
        leaves = params.trainable()
        trained = [leaf for leaf in leaves if leaf.requires_grad]

        per_adapter = self.per_adapter and isinstance(params, Stack)

        def step(given: tuple[Any, Tensor]) -> Tensor:
            batch, weights = given
            losses = self.compiler.run(params)(
                self.model, params, batch, self.loss_fn, per_adapter=per_adapter, verify=False
            ).reshape(-1)
            if not losses.requires_grad:
                raise ConfigError(
                    "the loss does not depend on any adapter: loss_fn detaches it, or no adapted "
                    "layer takes part"
                )
            given_grads = torch.autograd.grad(
                losses, trained, weights.to(losses), allow_unused=True
            )
            if all(grad is None for grad in given_grads):
                raise ConfigError(
                    "the loss has a gradient, but not by any leaf of an adapter: loss_fn must use "
                    "the output that it is given, and only losses of that can train the adapters"
                )
            grads = iter(given_grads)
            found = [next(grads) if leaf.requires_grad else None for leaf in leaves]
            self.partial = self.accumulates
            self.flat.take_gradients(low, high, found, self.accumulates)
            # A copy: torch's own CUDA graphs use the same memory again in the next pass.
            return losses.detach().clone()

        return self.compiler.recorded(step)

    def one_by_one(self, batch: Any, step: int) -> str | None:
        """Why the adapters cannot share a pass on such batches; "" where they can.

        It is looked at once, and again at some numbers of steps.

        None where two of them do not fit into memory.
        """
        if self.width == 1 or not self.verify:
            return ""
        batch = rows_of(batch, self.flat.order) if self.per_adapter else batch
        whole = self.flat.part(0, len(self.flat))
        options = self.loss_fn, self.per_adapter, True
        try:
            return one_by_one(self.model, whole, batch, *options, passes=step)
        except RuntimeError as error:
            if not self.halves or not is_out_of_memory(error):
                raise
        return None

    def choose(self, batch: Any) -> None:
        """Settles the width of "auto", before the first pass; without effect later."""
        if self.chosen is not None:
            return
        width = len(self.flat)
        if self.compiler.device.type == "cpu" and width > 1:
            one = self._chunk(0, 1)
            _, each = self._attempt(lambda c: self._kept_bytes(c, batch), one, "training")
            assert each is not None
            while width > 1 and width * each > CPU_BYTES:
                width = -(-width // 2)
            self._split(width)
        self.chosen = width

    def _kept_bytes(self, chunk: Chunk, batch: Any) -> int:
        """Bytes that a forward keeps for its gradient."""
        tensors = [*map(local_of, self.model.parameters()), *pytree.tree_leaves(chunk.params)]
        known = {t.untyped_storage().data_ptr() for t in tensors}
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
            # Not the tensor itself: an output that its own node saves would keep the graph alive
            # through itself, in a circle that no collector sees.
            return tensor.detach()

        args, kwargs = arguments(self._part(batch, chunk))
        with (
            torch.random.fork_rng(devices=[]),
            torch.autograd.graph.saved_tensors_hooks(note, lambda t: t),
        ):
            # The output keeps the graph, and so the storages, until all are counted.
            _ = apply(self.model, chunk.params, *args, verify=False, **kwargs)
        return sum(kept.values())

    @torch.no_grad()
    def losses(self, batch: Any) -> Tensor:
        """The (N,) losses, without gradients, on a batch that all trials share."""

        def work(chunk: Chunk) -> Tensor:
            given = self.model, chunk.stack, batch, self.loss_fn, False
            folds = chunk.high - chunk.low > 1
            if self.verify and folds and one_by_one(*given, gradients=False):
                return run_in_turn(*given)
            return run(*given[:4], verify=False)

        return self._join(self._each(work, "evaluation"))

    @torch.no_grad()
    def scores(self, evaluate: Callable[[nn.Module, Stack], Any]) -> dict[str, Tensor]:
        """What the user's function returns for each chunk's stack, put together: (N,) each."""

        def work(chunk: Chunk) -> dict[str, Tensor]:
            return _scores(evaluate(self.model, chunk.stack), chunk.high - chunk.low)

        parts = self._each(work, "eval")
        found = [part for part in parts if part is not None]
        names = list(found[0])
        if other := next((list(part) for part in found if list(part) != names), None):
            raise ConfigError(
                f"eval(model, stack) returned the metrics {names} for some adapters and {other} "
                "for others; return the same ones in the same order"
            )
        return {k: self._join([None if p is None else p[k] for p in parts]) for k in names}

    def _part(self, batch: Any, chunk: Chunk) -> Any:
        if not self.per_adapter:
            return batch
        batch = rows_of(batch, chunk.trials)
        if isinstance(chunk.params, Stack):
            return batch
        return pytree.tree_map_only(Tensor, lambda t: t[0], batch)

    def _split(self, width: int, edges: Sequence[tuple[int, int]] | None = None) -> None:
        self.chunks = [self._chunk(*b) for b in edges or bounds(0, len(self.flat), width)]

    def _chunk(self, low: int, high: int) -> Chunk:
        stack = self.flat.part(low, high)
        params = stack if high - low > 1 else trainable_leaves(alone(stack))
        self._freeze(params, self.flat.order[low:high])
        if isinstance(params, Stack):
            params = params.map(lambda own: own.map(self._counted))
        else:
            params = params.map(self._counted)
        step = self._step(params, low, high)
        return Chunk(low, high, self.flat.order[low:high], stack, params, step)

    def _counted(self, adapter: Adapter) -> Adapter:
        """The adapter with masks of dropout that follow from the step, and not from a generator."""
        return replace(adapter, draw=self.draw) if drops_input(adapter.method) else adapter

    def _freeze(self, params: Stack | Params, trials: Sequence[int]) -> None:
        """Leaves that none of these trials trains get no gradient, which costs memory and time."""
        for tree in [g.params for g in params.groups] if isinstance(params, Stack) else [params]:
            for adapter in tree.values():
                for name, leaf in adapter.train.items():
                    leaf.requires_grad_(any(self._trials[t].ratio(name) for t in trials))

    def _each(self, work: Callable[[Chunk], T], what: str) -> list[T | None]:
        """``work`` on every chunk, None for chunks of idle trials only."""
        results: list[T | None] = []
        before = self._generators.state_dict()
        while len(results) < len(self.chunks):
            chunk = self.chunks[len(results)]
            if self.idle.issuperset(chunk.trials):
                results.append(None)
                continue
            if self.width == 1 and results:
                # What is random in the model (its dropout) is for each what it is alone.
                self._generators.load_state_dict(before)
            # Nor does what a forward draws from Python's or numpy's depend on who else is there, on
            # the data, or on where the sweep went on.
            with others_seeded(number("pass", torch.initial_seed(), self._at)):
                fits, result = self._attempt(work, chunk, what)
            if fits:
                results.append(result)
            else:
                self._halve(len(results))
        return results

    def _attempt(
        self, work: Callable[[Chunk], T], chunk: Chunk, what: str
    ) -> tuple[bool, T | None]:
        try:
            return True, work(chunk)
        except Exception as error:
            size = chunk.high - chunk.low
            if not is_out_of_memory(error):
                error.add_note(f"fadapt: {what} of {self._named(chunk)}")
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

    def _named(self, chunk: Chunk) -> str:
        names = [repr(self._names[t]) for t in chunk.trials]
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        return ", ".join(names[:8]) + more

    def _halve(self, first: int) -> None:
        """Splits this chunk and those after it; the ones before have done this step's work."""
        width = -(-(self.chunks[first].high - self.chunks[first].low) // 2)
        self.chosen = width
        later = self.chunks[first:]
        self.chunks = self.chunks[:first] + [
            self._chunk(*edges) for c in later for edges in bounds(c.low, c.high, width)
        ]

    def _join(self, parts: Sequence[Tensor | None]) -> Tensor:
        like = next(p for p in parts if p is not None)
        if len(parts) == 1:
            return like
        return torch.cat(
            [
                like.new_full((c.high - c.low,), torch.nan) if p is None else p.to(like.device)
                for c, p in zip(self.chunks, parts, strict=True)
            ]
        )


def _scores(found: Any, n: int) -> dict[str, Tensor]:
    """What an eval function returned for n adapters: (n,) float64 scores by metric."""
    result = {}
    for name, value in (found if isinstance(found, Mapping) else {"score": found}).items():
        # A name that is a number would come back from a checkpoint as a word.
        name = str(name) if type(name) is int else name
        if not isinstance(name, str) or not name or name in result:
            raise ConfigError(
                f"eval(model, stack) returned the metrics {list(found)}; they must be called by "
                "words, each once"
            )
        try:
            tensor = torch.as_tensor(value)
            shape, real = tuple(tensor.shape), not tensor.is_complex() and not tensor.is_meta
        except (TypeError, ValueError, RuntimeError):
            shape, real, tensor = (), False, torch.empty(0)
        if not real:
            raise ConfigError(
                f"eval(model, stack) returned {name!r} = {value!r:.80}; return one real number per "
                f"adapter, a tensor of shape ({n},)"
            )
        if shape != (n,):
            raise ConfigError(
                f"eval(model, stack) returned {name!r} of shape {shape} for a stack of {n}; return "
                "one number per adapter"
            )
        result[name] = tensor.detach().to(torch.float64)
    if not result:
        raise ConfigError("eval(model, stack) returned no scores")
    return result


def bounds(low: int, high: int, width: int) -> list[tuple[int, int]]:
    """Consecutive ranges of at most ``width``, as equal as can be: equal ones compile once."""
    count = -(-(high - low) // width)
    edges = [low + (high - low) * i // count for i in range(count + 1)]
    return list(itertools.pairwise(edges))
