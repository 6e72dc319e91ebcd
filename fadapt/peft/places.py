"""Where a file's tensors belong: the modules and parameters of a model, by PEFT's names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from ..base.roles import find_roles
from ..base.weights import BaseWeight, Kind, find_weights
from ..errors import CheckpointError
from ..site import Site
from ..targeting import site_of
from .matching import is_parameter_targeted

ROOT = "base_model."
PREFIX = f"{ROOT}model."
NESTED = ".base_layer"

LINEAR, CONV1D, QUANTIZED = "linear", "transposed linear", "quantized linear"
EMBEDDING, CONVOLUTION, PARAMETER = "embedding", "convolution", "parameter"
VECTOR, TIED = "vector", "tied"
UNKNOWN = "other"


@dataclass(frozen=True, eq=False)
class Place:
    """One weight of the model as PEFT addresses it.

    Attributes:
        module: the path of its module.
        weight: the frozen weight.
        site: its address, without a fingerprint.
        key: the path that the file's keys have before the tensor's own name.
        layer: what PEFT takes it for: "linear", "embedding", ..., "parameter", "vector", or "tied"
            to a place that leads.
    """

    module: str
    weight: BaseWeight
    site: Site
    key: str
    layer: str

    @property
    def name(self) -> str:
        """What PEFT's patterns are matched with."""
        return self.site.name if self.layer == PARAMETER else self.module


class Places:
    """The weights of one model that a file may name."""

    def __init__(self, model: nn.Module):
        every = find_weights(model)
        self.weights = [w for w in every if w.kind is not Kind.VECTOR]
        self.by_name = {name: w for w in every for name in w.names}
        self.biases = {w.bias for w in every}
        self._at: dict[str, Place | None] = {}
        self.model = model
        self.modules: dict[str, BaseWeight] = {}
        self.parameters: dict[str, BaseWeight] = {}
        for weight in self.weights:
            module, _, key = weight.name.rpartition(".")
            if key == "weight":
                self.modules[module] = weight
            for name in weight.names:
                self.parameters[name] = weight

    @cached_property
    def roles(self) -> dict[str, tuple[str, str]]:
        return find_roles(self.weights)

    @cached_property
    def module_names(self) -> list[str]:
        return [name for name, _ in self.model.named_modules()]

    @cached_property
    def attention(self) -> set[str]:
        """The torch attention modules, whose projections are not called as modules."""
        found = self.model.named_modules(remove_duplicate=False)
        return {name for name, m in found if isinstance(m, nn.MultiheadAttention)}

    @cached_property
    def named(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters(remove_duplicate=False))

    def site(self, weight: BaseWeight) -> Site:
        return site_of(weight, self.weights, self.roles)

    def at(self, path: str, config: Mapping[str, Any]) -> Place | None:
        """The place of a key's path, or None; for one config."""
        if path not in self._at:
            self._at[path] = self._find(path, config)
        return self._at[path]

    def _find(self, path: str, config: Mapping[str, Any]) -> Place | None:
        module = path
        while module.endswith(NESTED):
            module = module.removesuffix(NESTED)
        depth = (len(path) - len(module)) // len(NESTED)
        if config.get("target_parameters"):
            names = [w.name for w in self._of(module) if is_parameter_targeted(config, w.name)]
            if depth < len(names):
                weight = self.parameters[names[len(names) - 1 - depth]]
                return Place(module, weight, self.site(weight), path, PARAMETER)
        weight = self.modules.get(module)
        if weight is None or depth:
            return None
        return Place(module, weight, self.site(weight), path, self.layer(module, weight))

    def layer(self, module: str, weight: BaseWeight) -> str:
        """What PEFT takes a module's weight for."""
        if module in self.attention or module.rpartition(".")[0] in self.attention:
            return UNKNOWN
        if len(weight.names) > 1:
            # A module under two names: PEFT adapts one of them, fadapt the module.
            return UNKNOWN
        if weight.kind is Kind.VECTOR:
            # The biases of linear layers are trained in another way, as those of norms are not.
            return UNKNOWN if weight.name in self.biases else VECTOR
        if weight.kind is Kind.CONVOLUTION:
            # PEFT's own convolutions know no dilation, padding mode or groups.
            m: Any = weight.module
            plain = m.groups == 1 and set(m.dilation) == {1} and m.padding_mode == "zeros"
            return CONVOLUTION if plain and not weight.transposed else UNKNOWN
        if weight.kind is Kind.LINEAR:
            return CONV1D if weight.transposed else LINEAR
        return {Kind.QUANTIZED: QUANTIZED, Kind.EMBEDDING: EMBEDDING}.get(weight.kind, UNKNOWN)

    def place(self, weight: BaseWeight) -> Place:
        """The place of a module's weight."""
        module = weight.name.rpartition(".")[0]
        return Place(module, weight, self.site(weight), module, self.layer(module, weight))

    def in_order(self, places: Iterable[Place]) -> list[Place]:
        """Places in the order of the model's modules."""
        rank = {name: i for i, name in enumerate(self.module_names)}
        return sorted(places, key=lambda place: rank.get(place.module, len(rank)))

    def for_sites(self, sites: Iterable[Site]) -> dict[str, Place]:
        """{site name: place}, for writing; parameters of one module are nested in its order."""
        found: dict[str, Place] = {}
        nested: dict[str, list[BaseWeight]] = {}
        for site in sites:
            weight = self.by_name.get(site.name)
            what = "is missing" if weight is None else site.mismatch(weight)
            if weight is None or what:
                raise CheckpointError(
                    f"{site.name} {what} in this model: its adapter was made for another base"
                )
            module, _, key = weight.name.rpartition(".")
            layered = weight.kind not in (Kind.MATRIX, Kind.EXPERTS, Kind.TENSOR)
            if weight.kind is Kind.VECTOR or (key == "weight" and layered):
                found[site.name] = Place(module, weight, site, module, self.layer(module, weight))
            elif not module or module in self.attention:
                found[site.name] = Place(module, weight, site, module, UNKNOWN)
            else:
                nested.setdefault(module, []).append(weight)
                found[site.name] = Place(module, weight, site, module, PARAMETER)
        for module, weights in nested.items():
            order = [w.name for w in self._of(module)]
            weights.sort(key=lambda w: order.index(w.name))
            for depth, weight in enumerate(reversed(weights)):
                for name in weight.names:
                    if name in found:
                        old = found[name]
                        key = module + NESTED * depth
                        found[name] = Place(module, weight, old.site, key, PARAMETER)
        return found

    def _of(self, module: str) -> list[BaseWeight]:
        """The weights that a module itself holds, in its order."""
        return self._held.get(module, [])

    @cached_property
    def _held(self) -> dict[str, list[BaseWeight]]:
        held: dict[str, list[BaseWeight]] = {}
        for weight in self.weights:
            held.setdefault(weight.name.rpartition(".")[0], []).append(weight)
        return held
