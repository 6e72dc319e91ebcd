"""The weights of a model that can be adapted, as places in its module tree."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]
from torch.nn.utils.parametrize import ParametrizationList

from .errors import TargetError
from .linear_map import DenseMap, LinearMap
from .quantized import QuantizedMap, quantized_map

LINEAR, QUANTIZED, EXPERTS = "linear", "quantized", "experts"
EMBEDDING, MATRIX, CONVOLUTION, TENSOR = "embedding", "matrix", "convolution", "tensor"
PARAMETRISED = "parametrised"
CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
LINEAR_KINDS = (LINEAR, QUANTIZED, EXPERTS)
"""What a broad rule means."""
STEP = "torch.compile(lambda params, batch: fadapt.run(model, params, batch))"


@dataclass(eq=False)
class Slot:
    """One parameter of one module: the place where an overlay goes.

    Attributes:
        name: as in ``named_parameters(remove_duplicate=False)``; the first, if a module is shared.
        names: all names of this place (a module used twice has several).
        kind: "linear"; "quantized" (a linear layer of bitsandbytes); "experts" (a 3-D stack of
            matrices); "embedding"; "matrix" (a bare 2-D parameter); "convolution"; "tensor" (a
            class token, say); or "parametrised" (the stored part of a weight that torch
            computes).
        transposed: whether the weight is stored (in, out).
        bias: the name of the bias parameter, or None.
    """

    name: str
    module: nn.Module
    key: str
    weight: Tensor
    kind: str
    transposed: bool
    bias: str | None
    names: list[str] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        if self.quantized is not None:
            return self.quantized.shape
        if self.kind == CONVOLUTION:
            rows, columns = self.weight.shape[0], self.weight[:1].numel()
        else:
            rows, columns = self.weight.shape[-2:]
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def quantized(self) -> QuantizedMap | None:
        """The map of a quantised layer."""
        return quantized_map(self.module) if self.kind == QUANTIZED else None

    @property
    def base(self) -> LinearMap:
        """The frozen map."""
        bias = getattr(self.module, self.bias.rsplit(".", 1)[-1]) if self.bias else None
        weight = self.weight.detach()
        if self.kind == CONVOLUTION:
            weight = weight.flatten(1)
        return self.quantized or DenseMap(weight, bias, self.transposed)

    @property
    def layer(self) -> int | None:
        """The first number in the name."""
        return next((int(part) for part in self.name.split(".") if part.isdigit()), None)


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """(name, module, key, parameter) of every parameter of every module, shared ones repeated."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        check_module(prefix, module)
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            yield (f"{prefix}.{key}" if prefix else key), module, key, parameter


def quantized_at(model: nn.Module, name: str) -> QuantizedMap | None:
    """The map of the quantised layer whose weight has this name, or None."""
    prefix, _, key = name.rpartition(".")
    try:
        return quantized_map(model.get_submodule(prefix)) if key == "weight" else None
    except AttributeError:
        return None


def find_slots(model: nn.Module) -> list[Slot]:
    """Every parameter with two or more dimensions, in the model's order, each place once."""
    slots: dict[tuple[int, str], Slot] = {}
    for name, module, key, weight in walk(model):
        slot = slots.get((id(module), key))
        if slot is None:
            if isinstance(weight, UninitializedTensorMixin):
                check_weight(name, module, weight)
            if weight.dim() < 2:
                continue
            kind, transposed, bias = _classify(module, key, weight)
            if bias is not None:
                bias = name.removesuffix(key) + bias
            slot = Slot(name, module, key, weight, kind, transposed, bias)
            slots[id(module), key] = slot
        slot.names.append(name)
    return list(slots.values())


def _classify(module: nn.Module, key: str, weight: Tensor) -> tuple[str, bool, str | None]:
    def has(bias: str) -> str | None:
        return bias if getattr(module, bias, None) is not None else None

    if key == "weight" and quantized_map(module) is not None:
        return QUANTIZED, False, has("bias")
    if weight.dim() == 2 and isinstance(module, ParametrizationList):
        return PARAMETRISED, False, None
    if isinstance(module, CONVOLUTIONS) and key == "weight":
        flipped = getattr(module, "transposed", False)
        return CONVOLUTION, flipped, None if flipped else has("bias")
    if weight.dim() > 2:
        stack = weight.dim() == 3 and min(weight.shape) > 1 and not hasattr(module, "kernel_size")
        return (EXPERTS if stack else TENSOR), getattr(module, "is_transposed", False), None
    if isinstance(module, nn.Linear) and key == "weight":
        return LINEAR, False, has("bias")
    # transformers' Conv1D, recognised without importing transformers.
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and key == "weight":
        return LINEAR, True, has("bias")
    if isinstance(module, nn.MultiheadAttention) and key.endswith("proj_weight"):
        return LINEAR, False, has("in_proj_bias") if key == "in_proj_weight" else None
    if isinstance(module, nn.Embedding):
        return EMBEDDING, True, None
    return MATRIX, False, None


def find_roles(slots: list[Slot]) -> dict[str, tuple[str, str]]:
    """The role of every linear map relative to the residual width, with a note where it is a guess.

    The width of a tower (the layers under one prefix) is the dimension that most of its maps have
    on either side; at a tie, the first map's input. A square map reads, unless it is the last
    linear map of a sublayer with several (the output projection of an attention).
    """
    slots = [s for s in slots if s.kind in (LINEAR, QUANTIZED)]
    towers: dict[str, list[Slot]] = {}
    for slot in slots:
        towers.setdefault(_tower(slot.name), []).append(slot)
    main = max(towers.values(), key=len, default=[])
    roles: dict[str, tuple[str, str]] = {}
    for name, members in towers.items():
        width = _width(members if name else main)
        sublayers: dict[str, list[Slot]] = {}
        for slot in members:
            sublayers.setdefault(_sublayer(slot.name), []).append(slot)
        for slot in members:
            d_out, d_in = slot.shape
            group = sublayers[_sublayer(slot.name)]
            if d_in == d_out == width:
                if len(group) == 1:
                    roles[slot.name] = "reader", f"square {width}, alone: taken as reader"
                else:
                    last = slot is group[-1]
                    role = "writer" if last else "reader"
                    where = _sublayer(slot.name).rsplit(".", 1)[-1]
                    roles[slot.name] = (
                        role,
                        f"square {width}, {'last' if last else 'not last'} of {where}",
                    )
            elif d_in == width:
                roles[slot.name] = "reader", ""
            elif d_out == width:
                roles[slot.name] = "writer", ""
            else:
                roles[slot.name] = "inner", ""
    return roles


def check_model(model: nn.Module) -> None:
    """Refuses wrappers whose parameters are not the ones that their forward uses."""
    if not isinstance(model, nn.Module):
        raise TargetError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if hasattr(model, "_orig_mod"):
        raise TargetError(
            "the model is already compiled: pass the model itself (model._orig_mod) and compile "
            f"the step: {STEP}"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise TargetError(
            "the model is a ScriptModule, whose weights cannot be replaced: pass "
            "the model that it was scripted or traced from"
        )


def check_module(name: str, module: nn.Module) -> None:
    """Refuses a part of the model whose forward does not use its parameters as they are."""
    if isinstance(module, nn.DataParallel):
        raise TargetError(
            f"{name or 'the model'} is an nn.DataParallel, which copies the parameters before its "
            "forward: pass model.module"
        )
    hook = module.__dict__.get("_hf_hook")
    for one in getattr(hook, "hooks", (hook,)):
        if getattr(one, "offload", False) or type(one).__name__ == "CpuOffload":
            raise TargetError(
                f"{name or 'the model'} carries an offloading hook of accelerate "
                f"({type(one).__name__}), which replaces the weights during the forward; load the "
                "model onto one device (without device_map or offload_folder), or quantised"
            )
    if module._compiled_call_impl is not None or "_orig_mod" in module._modules:
        raise TargetError(
            f"{name or 'the model'} is compiled on its own (module.compile() or torch.compile("
            f"module)); compile the step instead: {STEP}"
        )


def check_weight(name: str, module: nn.Module, weight: Tensor) -> None:
    """Refuses weights that are not plain floating tensors, naming them."""
    if isinstance(weight, UninitializedTensorMixin):
        raise TargetError(
            f"{name} is uninitialised (a lazy module); run the model once before fadapt"
        )
    if not weight.is_floating_point():
        raise TargetError(
            f"{name} holds {weight.dtype} of shape {tuple(weight.shape)} in a "
            f"{type(module).__name__}: fadapt does not know this quantised layer. Dequantise it, "
            "or quantise with bitsandbytes' Linear4bit or Linear8bitLt"
        )
    if type(weight) not in (Tensor, nn.Parameter):
        raise TargetError(
            f"{name} is a {type(weight).__name__} ({type(weight).__module__}): fadapt cannot read "
            "or multiply this kind of tensor. Use plain floating weights, or "
            "bitsandbytes' Linear4bit or Linear8bitLt"
        )


def _tower(name: str) -> str:
    parts = name.split(".")
    return next((".".join(parts[:i]) or "." for i, p in enumerate(parts) if p.isdigit()), "")


def _sublayer(name: str) -> str:
    match = re.match(r"(.*\.|^)\d+\.[^.]+", name)
    return match.group() if match else name.rsplit(".", 2)[0]


def _width(slots: list[Slot]) -> int:
    votes = Counter(d for s in slots for d in s.shape)
    most = max(votes.values(), default=0)
    best = [d for d, n in votes.items() if n == most]
    return slots[0].shape[1] if slots and slots[0].shape[1] in best else max(best, default=0)
