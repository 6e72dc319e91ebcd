"""The weights of a model: what each is to its layer, and how it is stored."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from ..errors import TargetError
from ..hugging_face import experts_transposed, heads_side, is_conv1d, speaks_of_experts
from .checks import check_module, check_weight, refuse_quantized_shard
from .experts import Layout, layouts
from .fingerprint import fingerprint
from .linear_map import DenseMap, GatheredMap, LinearMap
from .quantized import QuantizedMap, quantized_map
from .sharded import compute_device, full, full_rows, is_dtensor, reshard


class Kind(StrEnum):
    """What a parameter is to its layer."""

    LINEAR = "linear"
    QUANTIZED = "quantized"
    """A linear layer of bitsandbytes."""
    EXPERTS = "experts"
    """A 3-D stack of matrices, one for each expert."""
    EMBEDDING = "embedding"
    MATRIX = "matrix"
    """A bare 2-D parameter."""
    CONVOLUTION = "convolution"
    HEADS = "heads"
    """A linear map with one side split into heads: (d, heads, head width)."""
    TENSOR = "tensor"
    """Three or more axes that are none of the above: a class token, say."""
    PARAMETRIZED = "parametrized"
    """The stored part of a weight that torch computes."""
    VECTOR = "vector"
    """One axis or none: a bias, a norm's gain."""
    SHARED = "shared"
    """No parameter: the place of leaves that several sites share."""


LINEAR_KINDS = (Kind.LINEAR, Kind.QUANTIZED, Kind.EXPERTS, Kind.HEADS)
"""What a broad rule means."""

CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


@dataclass(eq=False)
class BaseWeight:
    """One parameter of one module of the frozen model; the one place that knows its storage.

    Attributes:
        name: as in ``named_parameters(remove_duplicate=False)``; the first, if a module is shared.
        module: the layer that holds it.
        key: its name in the layer.
        parameter: as stored: packed in a quantised layer, (in, out) in GPT-2's Conv1D, 3-D in a
            stack of experts, with its kernel's axes in a convolution.
        kind: what it is to the layer.
        transposed: whether it is stored (in, out).
        bias: the name of the layer's bias parameter, or None.
        names: all names of this place (a module used twice has several).
        experts: the number of matrices in a stack; 0 for a single one.
    """

    name: str
    module: nn.Module
    key: str
    parameter: Tensor
    kind: Kind
    transposed: bool
    bias: str | None
    names: list[str] = field(default_factory=list)
    experts: int = 0

    @property
    def quantized(self) -> QuantizedMap | None:
        """The map of a quantised layer, else None.

        Raises:
            TargetError: one that FSDP2 shards.
        """
        if self.kind is not Kind.QUANTIZED:
            return None
        if is_dtensor(self.parameter):
            refuse_quantized_shard(self.name)
        return quantized_map(self.module)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of the parameter; (out_features, in_features) of a quantised layer."""
        return tuple(self.parameter.shape) if self.quantized is None else self.quantized.shape

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of the matrix, or of each in a stack.

        A vector of n values is the matrix (n, 1) of a map from one number, which is always 1.
        """
        if self.kernel:
            rows, columns = self.parameter.shape[0], self.parameter[:1].numel()
        elif self.kind is Kind.VECTOR:
            rows, columns = self.parameter.numel(), 1
        else:
            rows, columns = self.stored_shape[-2:]
            rows //= self.experts if self.flat else 1
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def flat(self) -> bool:
        """Whether a stack is stored as one matrix, the rows of one expert after the other's."""
        return bool(self.experts) and self.parameter.dim() == 2

    @property
    def kernel(self) -> tuple[int, ...]:
        """Of a convolution or of heads, the axes of the parameter after the first; else ()."""
        flattened = self.kind in (Kind.CONVOLUTION, Kind.HEADS)
        return tuple(self.parameter.shape[1:]) if flattened else ()

    @property
    def dtype(self) -> torch.dtype:
        """Of the layer's arithmetic."""
        return self.parameter.dtype if self.quantized is None else self.quantized.dtype

    @property
    def size(self) -> int:
        """The number of its values, packed or not."""
        return math.prod(self.stored_shape)

    @property
    def device(self) -> torch.device:
        """Where it is multiplied."""
        return compute_device(self.parameter)

    @property
    def is_meta(self) -> bool:
        """Whether it has no values."""
        return self.parameter.is_meta

    @property
    def is_sharded(self) -> bool:
        """Whether it is a DTensor with values, which a process has to gather."""
        return is_dtensor(self.parameter) and not self.is_meta

    @property
    def map(self) -> LinearMap:
        """The frozen affine map of a single matrix; a sharded one is gathered at each use."""
        if self.quantized is not None:
            return self.quantized
        bias = getattr(self.module, self.bias.rsplit(".", 1)[-1]) if self.bias else None
        if self.kind is Kind.VECTOR:
            bias = None
        if not self.is_sharded:
            return self._dense_map(None if bias is None else full(bias))
        return GatheredMap(self._dense_map, None if bias is None else functools.partial(full, bias))

    def _dense_map(self, bias: Tensor | None) -> DenseMap:
        weight = self.dense()
        if self.kind is Kind.VECTOR:
            return DenseMap(weight.reshape(-1, 1))
        return DenseMap(weight.flatten(1) if self.kernel else weight, bias, self.transposed)

    @property
    def maps(self) -> list[LinearMap]:
        """The frozen maps of a stack of experts; of a single matrix, that one.

        Of a sharded stack each use gathers its own matrix alone.
        """
        if not self.experts:
            return [self.map]
        if self.is_sharded:
            return [
                GatheredMap(functools.partial(self._expert_map, e)) for e in range(self.experts)
            ]
        stack = self.dense()
        stack = stack.unflatten(0, (self.experts, -1)) if self.flat else stack
        return [DenseMap(weight, None, self.transposed) for weight in stack]

    def _expert_map(self, expert: int, bias: Tensor | None) -> DenseMap:
        rows = self.parameter.shape[0] // self.experts
        weight = full_rows(self.parameter.detach(), expert * rows, (expert + 1) * rows)
        return DenseMap(weight if self.flat else weight[0], bias, self.transposed)

    def dense(self) -> Tensor:
        """The values in the stored shape: the parameter itself, or a new dequantised matrix."""
        quantized = self.quantized
        return full(self.parameter.detach()) if quantized is None else quantized.weight()

    def scales(self) -> Tensor:
        """What is finite where all values are: the parameter, or the scales of its codes."""
        return self.parameter.detach() if self.quantized is None else self.quantized.scales()

    def fingerprint(self) -> str:
        """32 hex digits over shape, dtype and values; "meta" without values."""
        return (
            fingerprint(self.parameter) if self.quantized is None else self.quantized.fingerprint()
        )

    def check(self) -> None:
        """Raises TargetError unless it is a plain floating tensor or a known quantised layer."""
        if self.quantized is None:
            check_weight(self.name, self.module, self.parameter)
        else:
            self.quantized.check(self.name)


def find_weights(model: nn.Module) -> list[BaseWeight]:
    """Every parameter, in the model's order, each place once.

    Raises:
        TargetError: an uninitialised parameter, or a wrapper that does not use its own weights.
    """
    if not isinstance(model, nn.Module):
        raise TargetError(f"expected a torch.nn.Module, got {type(model).__name__}")
    found: dict[tuple[int, str], BaseWeight] = {}
    reshard(model)
    for name, module, key, parameter in _walk(model):
        weight = found.get((id(module), key))
        if weight is None:
            if isinstance(parameter, nn.UninitializedParameter):
                check_weight(name, module, parameter)
            kind, transposed, bias = _classify(module, key, parameter)
            if bias is not None:
                bias = name.removesuffix(key) + bias
            weight = BaseWeight(name, module, key, parameter, kind, transposed, bias)
            found[id(module), key] = weight
        weight.names.append(name)
    _find_experts(model, list(found.values()))
    return list(found.values())


def _find_experts(model: nn.Module, weights: list[BaseWeight]) -> None:
    """Tells the stacks of expert matrices among bare parameters, and how they are stored."""
    modules: dict[str, nn.Module] | None = None
    known: dict[Any, dict[str, Layout]] = {}
    for weight in weights:
        bare = weight.kind is Kind.TENSOR and weight.parameter.dim() == 3
        if not (bare or weight.kind is Kind.MATRIX) or hasattr(weight.module, "kernel_size"):
            continue
        path = weight.name.rpartition(".")[0]
        if not speaks_of_experts(weight.module, path):
            continue
        modules = modules or dict(model.named_modules(remove_duplicate=False))
        layout = _layout(weight, path, modules, known)
        if layout is not None:
            weight.kind, weight.experts = Kind.EXPERTS, layout.experts
            weight.transposed = layout.transposed


def _layout(
    weight: BaseWeight,
    path: str,
    modules: Mapping[str, nn.Module],
    known: dict[Any, dict[str, Layout]],
) -> Layout | None:
    """How a bare parameter is used: by the forward of its module, or of one around it."""
    key, shape, root = weight.key, weight.parameter.shape, path
    while root in modules and speaks_of_experts(modules[root], root.rpartition(".")[2]):
        module = modules[root]
        shapes = ((n, p.shape) for n, p in module.named_parameters(remove_duplicate=False))
        which = type(module), module.training, tuple(shapes)
        if which not in known:
            known[which] = layouts(module)
        if key in known[which]:
            return known[which][key]
        if not root:
            break
        root, _, last = root.rpartition(".")
        key = f"{last}.{key}"
    if len(shape) == 2 or min(shape) < 2:
        return None  # some other matrix of the layer
    declared = experts_transposed(weight.module)
    if declared is None:
        bias = getattr(weight.module, f"{weight.key}_bias", None)
        outs = bias.shape[-1] if isinstance(bias, Tensor) and bias.dim() == 2 else None
        declared = outs == shape[2] and outs != shape[1]
    return Layout(len(weight.parameter), declared)


def weights_by_name(model: nn.Module) -> dict[str, BaseWeight]:
    """{name: weight} of every parameter, under each of its names; as :func:`find_weights`."""
    return {name: weight for weight in find_weights(model) for name in weight.names}


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """(name, module, key, parameter) of every parameter of every module, shared ones repeated."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        check_module(prefix, module)
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            yield (f"{prefix}.{key}" if prefix else key), module, key, parameter


def _classify(module: nn.Module, key: str, weight: Tensor) -> tuple[Kind, bool, str | None]:
    def has(bias: str) -> str | None:
        return bias if getattr(module, bias, None) is not None else None

    if key == "weight" and quantized_map(module) is not None:
        return Kind.QUANTIZED, False, has("bias")
    if weight.dim() < 2:
        return Kind.VECTOR, False, None
    if isinstance(module, ParametrizationList):
        return Kind.PARAMETRIZED, False, None
    if isinstance(module, CONVOLUTIONS) and key == "weight":
        flipped = getattr(module, "transposed", False)
        return Kind.CONVOLUTION, flipped, None if flipped else has("bias")
    if weight.dim() > 2:
        side = heads_side(module, key, weight) if weight.dim() == 3 else None
        return (Kind.HEADS if side else Kind.TENSOR), side == "out", None
    if isinstance(module, nn.Linear) and key == "weight":
        return Kind.LINEAR, False, has("bias")
    if is_conv1d(module) and key == "weight":
        return Kind.LINEAR, True, has("bias")
    if isinstance(module, nn.MultiheadAttention) and key.endswith("proj_weight"):
        return Kind.LINEAR, False, has("in_proj_bias") if key == "in_proj_weight" else None
    if isinstance(module, nn.Embedding):
        return Kind.EMBEDDING, True, None
    return Kind.MATRIX, False, None
