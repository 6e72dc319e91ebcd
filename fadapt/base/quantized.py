"""Bases that are not a plain weight: the 4-bit and 8-bit linear layers of bitsandbytes.

The frozen product y = x W̃ᵀ + b runs the layer's own kernel, so that its output is that of the
unadapted layer to the last bit. Its derivative is the dequantised matrix W̃, which lives for the
length of one product. Nothing of the layer is written to, although its own forward would cast the
bias in place and move its state about.

4-bit: y is affine in x up to the rounding of the compute dtype. 8-bit: in eval mode, and always on
CUDA, the kernel also quantises x, and with a threshold it picks outlier columns from the whole
batch; the derivative is that of the map without this rounding of x.
"""

from __future__ import annotations

import copy
import functools
import hashlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import TargetError
from .fingerprint import fingerprint
from .frozen_product import KERNEL, LINEAR, TRANSPOSE, product

BLOCK_ROWS = 32  # of the layout that bitsandbytes uses on CPUs with AVX512-BF16


@functools.cache
def _library() -> Any:
    """bitsandbytes, which a quantised layer has imported."""
    import bitsandbytes

    return bitsandbytes


class QuantizedMap:
    """A quantised linear layer as a frozen affine map (a ``LinearMap``).

    Args:
        module: the layer; its tensors are read at each use.
    """

    def __init__(self, module: nn.Module):
        self.module: Any = module

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features), whatever the packed storage."""
        return self.module.out_features, self.module.in_features

    @property
    def device(self) -> torch.device:
        return self.module.weight.device

    @property
    def is_meta(self) -> bool:
        return self.module.weight.is_meta

    @property
    def dtype(self) -> torch.dtype:
        """Of the layer's arithmetic, where the layer fixes it."""
        raise NotImplementedError

    @property
    def bias(self) -> Tensor | None:
        return self.module.bias

    def __call__(self, x: Tensor) -> Tensor:
        return product(x, self, KERNEL)

    def linear(self, z: Tensor) -> Tensor:
        return product(z, self, LINEAR)

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """A new dense matrix (out_features, in_features)."""
        if self.is_meta:
            return torch.empty(self.shape, dtype=dtype, device="meta")
        return self.dequantize(dtype)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """See :meth:`weight`."""
        raise NotImplementedError

    def kernel(self, x: Tensor) -> Tensor:
        """The layer's own product, bias included; no derivative."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """32 hex digits over the codes and scales; the same for either layout of them."""
        if self.is_meta:
            return "meta"
        codes, scales = self.codes(), self.scales()
        text = f"{type(self).__name__} {self.shape} {fingerprint(codes)} {fingerprint(scales)}"
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def codes(self) -> Tensor:
        """The packed integers in their stored order, flat."""
        raise NotImplementedError

    def scales(self) -> Tensor:
        """The scales of the codes, flat."""
        raise NotImplementedError

    def check(self, name: str) -> None:
        """Raises TargetError, naming the parameter, unless the layer is quantised (or on meta)."""
        raise NotImplementedError

    def part(self, x: Tensor, part: str) -> Tensor:
        """One of the three products that are each other's derivatives; itself without one."""
        if part == KERNEL:
            if x.dim() < 4:
                return self.kernel(x)
            return self.kernel(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        weight = self.weight(x.dtype)
        y = F.linear(x, weight if part == LINEAR else weight.mT)
        return y if y.dtype is x.dtype else y.to(x.dtype)  # under autocast


class FourBitMap(QuantizedMap):
    """bitsandbytes' Linear4bit: nf4 or fp4, with or without doubly quantised scales."""

    @property
    def state(self) -> Any:
        return getattr(self.module.weight, "quant_state", None) or self.module.quant_state

    @property
    def packed_for_cpu(self) -> bool:
        return getattr(self.state, "packing_format_for_cpu", False)

    @property
    def dtype(self) -> torch.dtype:
        return self.module.compute_dtype or self.state.dtype

    def kernel(self, x: Tensor) -> Tensor:
        dtype, bias = self._compute_dtype(x), self.module.bias
        if bias is not None:
            bias = bias.to(x.dtype).to(dtype)
        weight = self.module.weight
        state = getattr(weight, "quant_state", None) or self.module.quant_state
        y = _library().matmul_4bit(x.to(dtype), weight, bias=bias, quant_state=state)
        return y.to(x.dtype)

    def part(self, x: Tensor, part: str) -> Tensor:
        # The rounding of the layer's own backward.
        dtype = self._compute_dtype(x) if part == TRANSPOSE else x.dtype
        if dtype is x.dtype:
            return super().part(x, part)
        return super().part(x.to(dtype), part).to(x.dtype)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        state = self.state
        if self.packed_for_cpu:
            per_value = state.absmax.mT.repeat_interleave(state.blocksize, -1)
            return (state.code[self._unpack().long()] * per_value).to(dtype)
        if state.dtype is not dtype:
            state = copy.copy(state)
            state.dtype = dtype
        return _library().functional.dequantize_4bit(self.module.weight.data, state)

    def codes(self) -> Tensor:
        if not self.packed_for_cpu:
            return self.module.weight.data.view(torch.uint8).flatten()
        first, second = self._unpack().flatten().unflatten(0, (-1, 2)).unbind(-1)
        return first << 4 | second

    def scales(self) -> Tensor:
        # In bfloat16, as far as the CPU layout keeps them.
        state = self.state
        if self.packed_for_cpu:
            return state.absmax.mT.flatten()
        scales = state.absmax
        if state.nested:
            outer = state.state2
            blocks = outer.absmax.repeat_interleave(outer.blocksize)[: scales.numel()]
            scales = outer.code[scales.long()] * blocks + state.offset
        return scales.to(torch.bfloat16).flatten()

    def check(self, name: str) -> None:
        if self.is_meta:
            return
        if self.state is None:
            raise TargetError(
                f"{name} belongs to a Linear4bit that is not quantised yet; move the model to its "
                "device first, which quantises it: model.to('cpu') or model.to('cuda')"
            )
        if tuple(self.state.shape) != self.shape:
            raise TargetError(
                f"{name} was quantised from a matrix of shape {tuple(self.state.shape)}, but its "
                f"layer is {self.shape} (out, in); quantise the matrix in that orientation"
            )

    def _compute_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype that the layer would choose for x; it remembers its first choice, we do not."""
        module = self.module
        if not module.compute_type_is_set and x.dtype in (torch.float32, torch.bfloat16):
            return x.dtype
        return module.compute_dtype or x.dtype

    def _unpack(self) -> Tensor:
        """The codes (out, in) from the CPU layout.

        A byte of it holds two of 32 neighbouring rows: row b in its low half, b + 16 in its high.
        """
        half = self.shape[1] // 2
        packed = self.module.weight.data.view(torch.uint8).reshape(-1, half, BLOCK_ROWS)
        nibbles = torch.cat([packed & 15, packed >> 4], -1).unflatten(-1, (BLOCK_ROWS, 2))
        return nibbles.transpose(1, 2).reshape(self.shape)


class EightBitMap(QuantizedMap):
    """bitsandbytes' Linear8bitLt with int8 weights, one scale per row."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16 if self.module.bias is None else self.module.bias.dtype

    def kernel(self, x: Tensor) -> Tensor:
        # A copy, because the kernel notes its outlier columns there.
        state = copy.copy(self.module.state)
        state.is_training = self.module.training
        state.CB, state.SCB = self._values()
        bias = None if self.module.bias is None else self.module.bias.to(x.dtype)
        weight = self.module.weight
        return _library().matmul(x, weight, bias=bias, state=state)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        codes, scales = self._values()
        return codes.to(dtype).mul_(scales.unsqueeze(1).mul(1 / 127.0))

    def codes(self) -> Tensor:
        return self._values()[0].flatten()

    def scales(self) -> Tensor:
        return self._values()[1].flatten()

    def check(self, name: str) -> None:
        if self.is_meta:
            return
        if self.module.state.has_fp16_weights:
            raise TargetError(
                f"{name} belongs to a Linear8bitLt with has_fp16_weights=True, which quantises its "
                "floating weights anew at every call; build it with has_fp16_weights=False"
            )
        codes, scales = self._values()
        if codes is None or scales is None:
            raise TargetError(
                f"{name} belongs to a Linear8bitLt that is not quantised yet; move the model to "
                "its device first, which quantises it: model.to('cpu') or model.to('cuda')"
            )

    def _values(self) -> tuple[Any, Any]:
        """The codes and scales, which the layer's first forward moves from weight to state."""
        weight, state = self.module.weight, self.module.state
        held = weight if getattr(weight, "CB", None) is not None else state
        # A layer quantised on the CPU and moved since may have left them there.
        codes, scales = (v if v is None else v.to(weight.device) for v in (held.CB, held.SCB))
        return codes, scales


MAPS: dict[str, type[QuantizedMap]] = {"Linear4bit": FourBitMap, "Linear8bitLt": EightBitMap}


def quantized_map_class(module: nn.Module) -> type[QuantizedMap] | None:
    """The class of a quantised layer's map, if fadapt knows the layer; imports nothing."""
    cls = type(module)
    if cls is nn.Linear or not issubclass(cls, nn.Linear):
        return None
    for base in cls.__mro__:
        if base.__name__ in MAPS and base.__module__.startswith("bitsandbytes."):
            return MAPS[base.__name__]
    return None


def quantized_map(module: nn.Module) -> QuantizedMap | None:
    """The map of a quantised layer that fadapt knows, or None."""
    cls = quantized_map_class(module)
    return None if cls is None else cls(module)


def has_quantized(model: nn.Module) -> bool:
    """Whether any layer of the model is one of a :func:`quantized_map`."""
    return any(quantized_map_class(module) is not None for module in model.modules())
