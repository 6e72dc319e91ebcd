"""Feed: the batches of a sweep, in an order that a restarted process can find again."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..arguments import is_many
from ..base.device import to_device
from ..base.torch_private import pytree
from ..errors import ConfigError, require
from ..seeds import generator
from .checkpoint import State, expect, expect_int, expect_keys, expect_like
from .fingerprints import batch_of

Order = Literal["shared", "own"]


class Feed:
    """One batch per step.

    A sequence of batches is read by index, again from the start after its end. Any other iterable
    (a DataLoader) is iterated once per epoch; its place is found again by restoring torch's
    generators as they were when the epoch began, and skipping. An iterator has one epoch.

    Args:
        batches: the batches.
        seeds: the data seed of each trial, by trial number.
        order: "shared", or "own" for one permutation per trial and epoch.
        per_adapter: whether a batch is (N, B, ...) tensors, or a list of N batches.
        device: where the batches are moved to.

    Raises:
        ConfigError: batches that are one batch, empty, or no sequence where trials have their own
            order.
    """

    def __init__(
        self,
        batches: Any,
        seeds: Sequence[int],
        order: Order,
        per_adapter: bool,
        device: torch.device,
    ):
        self.batches, self.seeds, self.device = batches, seeds, device
        self.indexed = hasattr(batches, "__getitem__") and hasattr(batches, "__len__")
        if order == "own":
            require(
                self.indexed and not per_adapter,
                "order='own' needs a sequence of batches to permute, such as a list, and "
                f"per_adapter=False; got {type(batches).__name__}, per_adapter={per_adapter}",
            )
        self.own, self.stacked = order == "own", per_adapter
        if self.own and isinstance(batches, list):
            _check_alike(batches, "order='own'")
        self.per_adapter = per_adapter or self.own
        self.step = 0
        self._index = 0
        self._iterator: Iterator[Any] | None = None
        self._epoch_start: list[Tensor] = []
        self._first: str | None = None
        self._watches = False

    def watch(self) -> None:
        """Takes a fingerprint of the first batch of each epoch, which a restart compares."""
        self._watches = not self.indexed

    def __next__(self) -> Any:
        batch = self._read()
        self.step += 1
        if self.stacked:
            batch = _stacked(batch, len(self.seeds))
        return to_device(batch, self.device)

    def _read(self) -> Any:
        if not self.indexed:
            return self._read_iterable()
        epoch, index = divmod(self.step, len(self.batches))
        if not self.own:
            return self.batches[index]
        length = len(self.batches)
        picks = [_permutation(seed, epoch, length)[index] for seed in self.seeds]
        return _join([self.batches[i] for i in picks], "a trial's own order")

    def _read_iterable(self) -> Any:
        for attempt in range(2):
            iterator = self._iterator
            if iterator is None:
                self._epoch_start = [g.get_state() for g in self._generators()]
                self._iterator = iterator = iter(self.batches)
                self._index = 0
            for batch in iterator:
                if self._watches and self._index == 0:
                    self._first = batch_of(batch)
                self._index += 1
                return batch
            if isinstance(self.batches, Iterator):
                raise ConfigError(
                    f"the batches ended after {self.step} steps: an iterator has one epoch. Pass a "
                    "list, a DataLoader or another iterable that can be iterated again"
                )
            require(attempt == 0, "the batches are empty")
            self._iterator = None
        raise AssertionError

    def _generators(self) -> list[torch.Generator]:
        """The global generator and those of a DataLoader, which decide an epoch's order."""
        owners = self.batches, getattr(self.batches, "sampler", None)
        found = [torch.default_generator, *(getattr(o, "generator", None) for o in owners)]
        return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())

    def state_dict(self) -> State:
        """The position, and the generators as the epoch found them."""
        tensors = {f"epoch {i}": state for i, state in enumerate(self._epoch_start)}
        return {"step": self.step, "index": self._index, "first": self._first, **tensors}

    def go_back(self, state: State) -> None:
        """Forgets a batch that was not trained on, for the next :meth:`state_dict`."""
        self.step, self._index, self._first = state["step"], state["index"], state["first"]
        self._epoch_start = [state[f"epoch {i}"] for i in range(len(state) - 3)]

    def load_state_dict(self, state: State, step: int, accept_other: bool = False) -> None:
        """Goes to a position that :meth:`state_dict` returned; changes the global generator.

        Args:
            state: that.
            step: after how many batches.
            accept_other: whether the batches may be others than they were.

        Raises:
            ConfigError: they are others.
        """
        moves = not self.indexed and step > 0
        expect_int(state["step"], step, step, "position.step")
        index = expect_int(state["index"], int(moves), step if moves else 0, "position.index")
        generators, first = self._generators() if moves else [], state["first"]
        keys = [f"epoch {i}" for i in range(len(generators))]
        expect_keys(state, ["step", "index", "first", *keys], "position")
        expect(isinstance(first, str) if moves else first is None, f"position.first is {first!r}")
        states = [
            expect_like(state[key], g.get_state(), f"position.{key}")
            for key, g in zip(keys, generators, strict=True)
        ]
        self.step, self._index = step, index
        if not moves:
            return
        for g, one in zip(generators, states, strict=True):
            g.set_state(one)
        self._epoch_start, self._first = states, first
        self._iterator = iter(self.batches)
        for skipped in range(index):
            batch = next(self._iterator, None)
            require(
                batch is not None,
                f"the batches have {skipped} of the {index} that the checkpoint has seen in this "
                "epoch; pass the same batches to go on",
            )
            if skipped == 0 and not accept_other and batch_of(batch) != first:
                raise ConfigError(
                    "the first batch of this epoch is not the one that the checkpoint has seen: "
                    "other data, or data made at random by other generators than torch's. Pass the "
                    "same batches, or Checkpoints(directory, resume='anyway') to go on with these"
                )


def check_batches(batches: Any) -> None:
    """Refuses what is one batch, not many.

    Raises:
        ConfigError: a dict, a tuple, a tensor, or something that is not iterable.
    """
    if isinstance(batches, Tensor):
        raise ConfigError(
            f"batches is a tensor of shape {tuple(batches.shape)}; write [batch] for one batch, or "
            "list(batches) where its first axis is of batches"
        )
    if isinstance(batches, (set, frozenset)):
        raise ConfigError("batches is a set, which has no order; write a list")
    if isinstance(batches, (Mapping, tuple)):
        raise ConfigError(
            f"batches is a {type(batches).__name__}, which is one batch; write [batch] for a list "
            "of batches"
        )
    if not is_many(batches):
        raise ConfigError(f"batches must be iterable, got {type(batches).__name__}")


def rows_of(batch: Any, positions: Sequence[int]) -> Any:
    """The parts of some adapters of a batch of (N, B, ...) tensors."""
    first, last = positions[0], positions[-1]
    if list(positions) == list(range(first, last + 1)):
        return pytree.tree_map_only(Tensor, lambda t: t[first : last + 1], batch)
    return pytree.tree_map_only(Tensor, lambda t: t[list(positions)], batch)


def _stacked(batch: Any, n: int) -> Any:
    if isinstance(batch, list):
        require(
            len(batch) == n,
            f"per_adapter=True: a batch is a list of {len(batch)} parts for {n} trials",
        )
        return _join(batch, "per_adapter=True")
    for path, leaf in pytree.tree_flatten_with_path(batch)[0]:
        if isinstance(leaf, Tensor) and (leaf.dim() < 2 or leaf.shape[0] != n):
            raise ConfigError(
                f"per_adapter=True needs (N, B, ...) tensors with N = {n} trials; "
                f"batch{pytree.keystr(path)} has shape {tuple(leaf.shape)}"
            )
    return batch


def _join(parts: list[Any], what: str) -> Any:
    _check_alike(parts, what)
    return pytree.tree_map(
        lambda *column: torch.stack(column) if isinstance(column[0], Tensor) else column[0], *parts
    )


def _check_alike(parts: list[Any], what: str) -> None:
    columns, specs = zip(*(pytree.tree_flatten(p) for p in parts), strict=True)
    require(len(set(map(str, specs))) == 1, f"{what}: the trials' batches differ in structure")
    for column in zip(*columns, strict=True):
        shapes = list(dict.fromkeys(tuple(getattr(t, "shape", ())) for t in column))
        require(
            len(shapes) == 1,
            f"{what}: the trials' batches have different shapes {shapes[:4]}; give every trial "
            "batches of one size (DataLoader(drop_last=True))",
        )


@functools.lru_cache(maxsize=4096)
def _permutation(seed: int, epoch: int, length: int) -> list[int]:
    return torch.randperm(length, generator=generator("order", seed, epoch)).tolist()
