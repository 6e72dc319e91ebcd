"""as_module: an adapter as an nn.Module, for trainers that want one."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .base.checks import check_model
from .base.eval_mode import evaluating, training
from .batch import call_arguments
from .errors import CheckpointError, ConfigError, FadaptError
from .hugging_face import (
    CALLS_FORWARD,
    CHECKPOINTING_SWITCHES,
    MODEL_FACTS,
    fact_of,
    may_checkpoint,
)
from .method import STRENGTH, Leaves
from .overlay.call import call
from .params.adapter import Adapter
from .params.params import Params, is_made
from .params.stack import Stack
from .targeting import check_fits


class AdapterModule(nn.Module):
    """What :func:`as_module` returns; its class is one for each class of base.

    Attributes:
        model: the frozen base, which is no submodule: not in ``parameters()``, ``state_dict()``,
            ``children()`` or a copy.
        params: the adapter as Params, over the module's own leaves: what an optimizer does to them
            is seen at once. The same object until a leaf is replaced.
    """

    def __init__(self, model: nn.Module, params: Params):
        super().__init__()
        # In a tuple, since nn.Module would make a module of its own attributes a submodule.
        self._holder = (model,)
        self._bare = params.map(lambda a: replace(a, train={}, fixed={}, bank={}))
        self._keys: dict[str, tuple[dict[str, str], dict[str, str]]] = {}
        self._whole: Params | None = None
        self._register(params)
        self.register_load_state_dict_pre_hook(_check_state)

    @property
    def model(self) -> nn.Module:
        return self._holder[0]

    @property
    def params(self) -> Params:
        def leaves(keys: Mapping[str, str]) -> Leaves:
            return {leaf: getattr(self, key) for leaf, key in keys.items()}

        found = {
            name: (leaves(train), leaves(fixed)) for name, (train, fixed) in self._keys.items()
        }
        if (
            torch.compiler.is_compiling()
            or self._whole is None
            or any(
                own[leaf] is not tensor
                for name, parts in found.items()
                for own, part in zip(_parts(self._whole[name]), parts, strict=True)
                for leaf, tensor in part.items()
            )
        ):
            adapters = {name: a.replace(*found[name]) for name, a in self._bare.items()}
            whole = Params(adapters, self._bare.config, self._bare.coverage)
            if torch.compiler.is_compiling():
                return whole
            self._whole = whole
        return self._whole

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The adapted model's own output, as :func:`fadapt.apply` has it."""
        return self._call("forward", *args, **kwargs)

    def extra_repr(self) -> str:
        return f"{type(self.model).__name__}, {self.params!r}"

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_holder" not in self.__dict__:  # while a copy is made
                raise
            if name in MODEL_FACTS:
                return fact_of(self.model, name)
            if name in CHECKPOINTING_SWITCHES:
                return getattr(self.model, name)
            if name in CALLS_FORWARD and callable(getattr(self.model, name, None)):
                return functools.partial(self._call, name)
            # Not all that the base has: a method of it would run without the adapter.
            if hasattr(self.model, name):
                raise AttributeError(
                    f"{type(self).__name__} has no {name!r}, which the base model has: "
                    f"module.model.{name} is the base's own, without the adapter; with it, call "
                    f"fadapt.apply(module.model, module.params, ..., method={name!r})"
                ) from None
            raise

    def __deepcopy__(self, memo: dict[int, Any]) -> AdapterModule:
        # The base is shared, unless it is part of what is copied.
        memo.setdefault(id(self.model), self.model)
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        state = {k: v for k, v in self.__dict__.items() if k != "_whole"}
        new.__dict__.update(copy.deepcopy(state, memo), _whole=None)
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty, (type(self.model),), {**self.__dict__, "_whole": None}

    def _register(self, params: Params) -> None:
        keys: dict[int, str] = {}
        copies: dict[int, Tensor] = {}
        for site, adapter in params.items():
            self._keys[site] = ({}, {})
            for part, leaves in zip(self._keys[site], _parts(adapter), strict=True):
                for leaf, tensor in leaves.items():
                    if id(tensor) not in keys:  # a shared leaf is one parameter
                        key = keys[id(tensor)] = _key(site, leaf)
                        copies[id(tensor)] = _own(f"{site}: {leaf}", tensor)
                        if tensor.requires_grad or part is self._keys[site][0]:
                            own = nn.Parameter(copies[id(tensor)], tensor.requires_grad)
                            self.register_parameter(key, own)
                        else:
                            self.register_buffer(key, copies[id(tensor)])
                    part[leaf] = keys[id(tensor)]

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = call_arguments(args, kwargs)
        params = self.params
        with self._mode():
            return call(self.model, params, method, args, kwargs, owner=params)

    def _mode(self) -> AbstractContextManager[Any]:
        """The base in this module's mode, for the time of a call."""
        if torch.compiler.is_compiling() or self.model.training == self.training:
            return nullcontext()
        if not self.training:
            return evaluating(self.model)
        if torch.is_grad_enabled() and any(map(may_checkpoint, self.model.modules())):
            raise FadaptError(
                "gradient checkpointing recomputes the forward when the call is over and the base "
                "is in its own mode again, which is eval, so dropout would differ; write "
                "module.model.train() before the training"
            )
        return training(self.model)

    def _apply(self, fn: Any, recurse: bool = True) -> AdapterModule:
        # What to(), cuda(), half() and those of a module around this one have in common.
        exact = {
            key: getattr(self, key)
            for site, (_, fixed) in self._keys.items()
            for leaf, key in fixed.items()
            if leaf in self._bare[site].method.keep_fp32 | {STRENGTH}
        }
        super()._apply(fn, recurse)
        for key, before in exact.items():  # as Params.to: these keep their dtype
            after = getattr(self, key)
            if after.dtype != before.dtype and isinstance(after, nn.Parameter):
                after.data = before.detach().to(after.device)
            elif after.dtype != before.dtype:
                setattr(self, key, before.to(after.device))
        device = next((t.device for t in self._leaves()), None)
        here = device is None or device.type == "meta"
        if not here and any(t.device != device for t in self.model.parameters()):
            self.model.to(device)
        return self

    def _leaves(self) -> Iterator[Tensor]:
        yield from self.parameters()
        yield from self.buffers()


def as_module(model: nn.Module, params: Params) -> AdapterModule:
    """The adapted model as an nn.Module whose only parameters and state are the adapter's leaves.

    For transformers' Trainer, Accelerate, Lightning, and whatever else wants a module. Calling it
    is ``fadapt.apply(model, params, ...)``; its parameters are copies of the trainable leaves, its
    buffers of the fixed ones, and ``module.params`` gives Params back, for ``fadapt.save``,
    ``merge`` and the rest. Names of parameters hold no dots: a leaf ``A`` of
    ``layers.0.q_proj.weight`` is called ``layers/0/q_proj/weight|A`` (and a ``/``, ``|`` or ``%``
    of a name itself is written as %2F, %7C or %25).

    What is asked of it and what follows:

    - ``state_dict`` and so a checkpoint hold the adapter alone; ``load_state_dict`` takes all of it
      or refuses (also with ``strict=False``, which trainers pass).
    - ``train()`` and ``eval()`` set the module's own flag; the base is in that mode for the time of
      a call, and otherwise as it was.
    - ``to(device)`` takes the base along; a dtype is the adapter's alone.
    - ``copy.deepcopy`` copies the adapter and shares the base.
    - ``forward`` has the signature of the base's forward, and ``config``, ``main_input_name`` and
      what else Trainer asks of a model are the base's; ``generate`` runs adapted. Other attributes
      of the base are at ``module.model``.
    - Constraints of a method are kept by ``fadapt.project(module.params)`` after a step.

    Args:
        model: the frozen base. Its parameters need not be frozen: no gradient reaches them.
        params: from :func:`fadapt.init`, trained or not; not changed.

    Returns:
        The module, in the mode that the model is in.

    Raises:
        ConfigError: a stack, or leaves that a graph made, which a parameter cannot hold.
        TargetError: not a model whose weights can be replaced.
        CheckpointError: from ``load_state_dict``: missing or unknown keys, another shape or dtype.

    Example:
        >>> params = fadapt.init(model, fadapt.LoRA(r=2))
        >>> module = fadapt.as_module(model, params)
        >>> list(module.state_dict())
        ['0/weight|A', '0/weight|B', '2/weight|A', '2/weight|B']
        >>> optimizer = torch.optim.AdamW(module.parameters())
        >>> nn.functional.cross_entropy(module(x), labels).backward()
        >>> optimizer.step()
        >>> fadapt.save(module.params, "adapter.safetensors")
    """
    check_model(model)
    if isinstance(params, Stack):
        raise ConfigError(
            f"as_module takes one adapter, and this is a stack of {len(params)}, whose members "
            "have a loss each: train them with fadapt.fit or fadapt.sweep, or make a module of "
            "each: [fadapt.as_module(model, p) for p in fadapt.unstack(stack)]"
        )
    if not isinstance(params, Params):
        raise ConfigError(f"params must come from fadapt.init, load or join; got {type(params)}")
    params.check_one()
    check_fits(model, [a.site for a in params.at_sites().values()])
    module = _class_for(type(model))(model, params)
    return module.train(model.training)


@functools.cache
def _class_for(base: type[nn.Module]) -> type[AdapterModule]:
    """The class of the modules over such a base, which has its forward's signature.

    Trainers ask the class for its forward's arguments and labels, and for its name.
    """

    def forward(self: AdapterModule, *args: Any, **kwargs: Any) -> Any:
        return self._call("forward", *args, **kwargs)

    forward.__doc__ = AdapterModule.forward.__doc__
    with contextlib.suppress(ValueError):  # a builtin, which tells nothing
        forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    return type(f"Adapted{base.__name__}", (AdapterModule,), {"forward": forward})


def _empty(base: type[nn.Module]) -> AdapterModule:
    cls = _class_for(base)
    return cls.__new__(cls)


def _key(site: str, leaf: str) -> str:
    return "|".join(_without_dots(part) for part in (site, leaf))


def _without_dots(name: str) -> str:
    for character in "%/|":
        name = name.replace(character, f"%{ord(character):02X}")
    return name.replace(".", "/")


def _parts(adapter: Adapter) -> tuple[Leaves, Leaves]:
    return adapter.train, adapter.fixed


def _own(what: str, leaf: Tensor) -> Tensor:
    if is_made(leaf):
        raise ConfigError(
            f"{what} was computed from other tensors, whose gradients a module of its own leaves "
            "would lose; train those with fadapt.run, or detach the leaves first"
        )
    return leaf.detach().clone()


def _check_state(module: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Refuses a state that is not the whole of this module's.

    Raises:
        CheckpointError: names the key.
    """
    own = {prefix + key: t for key, t in module.state_dict().items()}
    given = {key: t for key, t in state.items() if key.startswith(prefix)}
    missing, extra = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    if missing or extra:
        raise CheckpointError(
            f"load_state_dict: the state lacks the keys {_some(missing)} and has the unknown keys "
            f"{_some(extra)}; it is another adapter's, or not an adapter's. Make the module with "
            "the params that the state was saved from: as_module(model, fadapt.init(model, cfg))"
        )
    for key, tensor in own.items():
        new = given[key]
        if not isinstance(new, Tensor):
            raise CheckpointError(f"load_state_dict: {key} is a {type(new).__name__}, not a tensor")
        if (new.shape, new.dtype) != (tensor.shape, tensor.dtype):
            raise CheckpointError(
                f"load_state_dict: {key} is {list(new.shape)} {new.dtype} in the state and "
                f"{list(tensor.shape)} {tensor.dtype} in the module; make the params with the same "
                "config, or move the module first: module.to(dtype)"
            )


def _some(keys: list[str]) -> str:
    return f"{keys[:3]}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
