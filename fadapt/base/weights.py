"""The weights of a model that can be adapted, as places in its module tree."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]
from torch.nn.utils.parametrize import ParametrizationList

from .checks import check_module, check_weight
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
