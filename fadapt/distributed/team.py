"""Team: the processes of a sweep, what they tell each other, and how they fail together."""

from __future__ import annotations

import atexit
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..base.sharded import (
    compute_device,
    groups_of,
    is_sharded,
    split_by_tensor_parallelism,
)
from ..base.torch_private import pytree, timeout_of_default_group
from ..errors import ConfigError, FadaptError

NAMES = "sweep", "shard"
TOLD_WITHIN = 20.0
"""Seconds that a failing process waits for those that share its base to listen."""


class Team:
    """The processes of a sweep: trials over some of them, the rows of each batch over others.

    What they tell each other goes through the host (gloo), apart from the tensors of training. A
    process that fails tells the others at the next occasion, so that none waits for it.

    Attributes:
        size: into how many shares the trials are split.
        place: which of the shares is this process's.
        shards: over how many processes the rows of a batch are split.
        shard: which of the row parts is this process's.
        rank: among all processes.
    """

    def __init__(self, mesh: Any = None):
        self.size, self.place, self.shards, self.shard, self.rank, self.world = 1, 0, 1, 0, 0, 1
        self._control: Any = None
        self.shard_group: Any = None
        self._places: list[tuple[int, int]] = [(0, 0)]
        if mesh is not None and not hasattr(mesh, "mesh_dim_names"):
            raise ConfigError(
                f"mesh must be a torch.distributed.device_mesh.DeviceMesh, got {mesh!r:.80}"
            )
        _join_torchrun()
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            if mesh is not None and mesh.size() > 1:
                raise ConfigError("mesh= needs several processes; start the script with torchrun")
            return
        _settle_at_exit()
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.size, self.place = self.world, self.rank
        if mesh is not None:
            self._take(mesh)
        self._control = _control_group()
        sizes = self._exchange((self.size, self.shards))
        if len(set(sizes)) > 1:
            raise ConfigError(
                f"the processes have meshes of other sizes (sweep, shard): {sizes}; pass the same "
                "mesh= in all"
            )
        self._places = self._exchange((self.place, self.shard))

    def _take(self, mesh: Any) -> None:
        names = tuple(mesh.mesh_dim_names or ())
        if not names or not set(names) <= set(NAMES) or mesh.size() != self.world:
            raise ConfigError(
                f"mesh has the dimensions {names} over {mesh.size()} processes of {self.world}; "
                "write init_device_mesh(device, (s, d), mesh_dim_names=('sweep', 'shard')), s * d "
                "being all processes"
            )
        self.size, self.place = 1, 0
        if "sweep" in names:
            self.size, self.place = mesh["sweep"].size(), mesh.get_local_rank("sweep")
        if "shard" in names:
            self.shards, self.shard = mesh["shard"].size(), mesh.get_local_rank("shard")
            self.shard_group = mesh.get_group("shard")

    @property
    def several(self) -> bool:
        """Whether there is more than one process."""
        return self.world > 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def check(self, model: nn.Module, compiles: bool) -> None:
        """Refuses a base that is spread over processes in a way that a sweep does not know.

        Raises:
            ConfigError: with what to write.
        """
        self._check_devices(model)
        if not is_sharded(model):
            return
        if name := split_by_tensor_parallelism(model):
            raise ConfigError(
                f"{name} is split by tensor parallelism, whose processes have to see the same "
                "rows, and a sweep gives each its own; fully_shard the base instead, or train in "
                "a loop of your own: fadapt.run(model, stack, batch).sum().backward()"
            )
        if self.shards == 1 and self.several:
            raise ConfigError(
                "the base is spread over processes, which have to see the same trials: write "
                "mesh=init_device_mesh(device, (s, d), mesh_dim_names=('sweep', 'shard')), with d "
                "the number of processes over which it was fully_shard'ed"
            )
        for group in groups_of(model) if self.several else ():
            spread = dist.get_process_group_ranks(group)
            own = dist.get_process_group_ranks(self.shard_group)
            if not set(spread) <= set(own):
                raise ConfigError(
                    f"the base is spread over the processes {spread}, and mesh splits the rows "
                    f"over {own}: the others train other trials. Write fully_shard(layer, "
                    'mesh=mesh["shard"])'
                )
        if compiles:
            raise ConfigError(
                "compile= traces the whole model into one graph (and may record CUDA graphs), and "
                "the hooks with which FSDP2 gathers its weights cannot be part of it; leave it out"
            )

    def _check_devices(self, model: nn.Module) -> None:
        """Refuses processes that compute on one GPU."""
        device = next((compute_device(p) for p in model.parameters()), torch.device("cpu"))
        if not self.several:
            return
        mine = None
        if device.type == "cuda":  # not by its index, which depends on what the process sees
            uuid = torch.cuda.get_device_properties(device).uuid
            mine = f"{uuid} of {socket.gethostname()}"
        everyone = self._exchange(mine)
        for rank, place in enumerate(everyone):
            if place is not None and place in everyone[:rank]:
                raise ConfigError(
                    f"the processes {everyone.index(place)} and {rank} have their models on one "
                    f"GPU, {place}: write torch.cuda.set_device(int(os.environ['LOCAL_RANK'])) "
                    "before the model goes to 'cuda'"
                )

    def gather(self, value: Any) -> list[Any]:
        """What each share's first process gives, in all processes.

        Raises:
            FadaptError: another process failed, or ended.
        """
        if not self.several:
            return [value]
        everyone = self._exchange(value if self.shard == 0 else None)
        found: list[Any] = [None] * self.size
        for (place, shard), one in zip(self._places, everyone, strict=True):
            if shard == 0:
                found[place] = one
        return found

    def of_peers(self, value: Any) -> list[Any]:
        """What each of the processes gives that train this one's trials."""
        everyone = self._exchange(value)
        pairs = zip(self._places, everyone, strict=True)
        return [one for (place, _), one in pairs if place == self.place]

    def to_first(self, value: Any, of_all: bool = False) -> list[Any]:
        """What each share's first process gives, in the first process; elsewhere nothing.

        For much: as :meth:`gather`, each process would hold what all give.

        Args:
            of_all: what each process gives instead.
        """
        if not self.several:
            return [value]
        self._exchange(None)  # none has failed
        everyone: list[Any] | None = [None] * self.world if self.first else None
        mine = _on_host(value) if of_all or self.shard == 0 else None
        self._reach(lambda: dist.gather_object(mine, everyone, 0, self._control))
        pairs = zip(self._places, everyone or [], strict=False)
        return [one for (_, shard), one in pairs if of_all or shard == 0]

    def of_first(self, value: Any) -> Any:
        """What the first process gives."""
        if not self.several:
            return value
        self._exchange(None)
        box = [_on_host(value) if self.first else None]
        self._reach(lambda: dist.broadcast_object_list(box, 0, self._control))
        return box[0]

    def check_same(self, what: str, mine: Mapping[str, Any]) -> None:
        """Refuses processes that are about to do different things.

        Raises:
            ConfigError: in all processes, naming the first difference.
        """
        if not self.several:
            return
        everyone = self._exchange(dict(mine))
        for rank, other in enumerate(everyone):
            for key in sorted(everyone[0].keys() | other.keys(), reverse=True):
                if everyone[0].get(key) != other.get(key):
                    raise ConfigError(
                        f"process {rank} has another {what} than process 0; {key}: "
                        f"{other.get(key)!r:.300} there, {everyone[0].get(key)!r:.300} in process "
                        "0. All processes run the same script on the same model, trials and data"
                    )

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block whose error the other processes learn of, and raise one of their own."""
        try:
            yield
        except Exception as error:
            if not self.several or self._control is None or isinstance(error, PeerError):
                raise
            if _is_of_exchange(error):
                new = PeerError(self._unreachable(error))
                new.report = getattr(error, "report", None)
                raise new from error
            self._tell(f"{type(error).__name__}: {error}", error)
            raise

    def _tell(self, text: str, error: Exception) -> None:
        def tell() -> None:
            try:
                self._exchange_raw((False, text))
            except Exception as other:
                error.add_note(f"fadapt: the other processes could not be told: {other}")

        if self.shards == 1:
            tell()
            return
        # Those that share a base may wait in one of its gathers, where they cannot listen: this
        # process is to end then, which frees them.
        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        thread.join(TOLD_WITHIN)

    def _exchange(self, value: Any) -> list[Any]:
        everyone = self._exchange_raw((True, _on_host(value)))
        failed = [(rank, text) for rank, (whole, text) in enumerate(everyone) if not whole]
        if failed:
            rank, text = failed[0]
            raise PeerError(
                f"process {rank} of {self.world} failed, so the sweep ends in all: {text}"
            )
        return [one for _, one in everyone]

    def _exchange_raw(self, value: Any) -> list[Any]:
        everyone: list[Any] = [None] * self.world
        self._reach(lambda: dist.all_gather_object(everyone, value, self._control))
        return everyone

    def _reach(self, exchange: Callable[[], Any]) -> None:
        try:
            exchange()
        except RuntimeError as error:
            raise PeerError(self._unreachable(error)) from error

    def _unreachable(self, error: Exception) -> str:
        return (
            f"process {self.rank} of {self.world} cannot reach the others: one was killed or "
            "failed, or did not answer within the timeout of the process group. The same command "
            f"goes on from the last checkpoint, on any number of processes ({error})"
        )


def _on_host(tree: Any) -> Any:
    """A tensor would arrive on the sender's device."""
    return pytree.tree_map_only(Tensor, lambda t: t.cpu(), tree)


def _is_of_exchange(error: Exception) -> bool:
    """Whether an error comes from an exchange between processes, which a peer did not take part in.

    gloo's are plain RuntimeErrors, which name its source file.
    """
    known = dist.DistBackendError, dist.DistNetworkError
    return isinstance(error, known) or "gloo/" in str(error)


_control: dict[int, tuple[Any, Any]] = {}


def _control_group() -> Any:
    """A group of all processes on which nothing of training is in flight; one for all sweeps."""
    whole = dist.group.WORLD
    known = _control.get(id(whole))
    if known is None:
        group = dist.new_group(backend="gloo", timeout=timeout_of_default_group())
        if not _control:
            # Its threads must have ended before the interpreter does.
            atexit.register(_control.clear)
        _control.clear()
        known = _control[id(whole)] = whole, group
    return known[1]


def _join_torchrun() -> None:
    """Under torchrun, joins the other processes, unless the script has done so.

    Trials that are split over processes exchange next to nothing, for which gloo is enough.
    """
    if not dist.is_available() or dist.is_initialized() or not dist.is_torchelastic_launched():
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
        atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


class PeerError(FadaptError):
    """Another process of the sweep failed or ended.

    Attributes:
        report: the outcome so far, once training had begun, with this process's weights.
    """

    report: Any = None


@cache
def _settle_at_exit() -> None:
    """Lets the exchanges over gloo come to rest before the interpreter ends.

    gloo's thread frees the tensors of its last exchange a moment after the exchange is seen as
    done, and takes the interpreter's lock for that. An interpreter that is ending answers by
    ending the thread, and C++ aborts the process ("terminate called without an active exception"),
    in one of ten runs whose last act is an exchange.
    """
    atexit.register(time.sleep, 0.1)
