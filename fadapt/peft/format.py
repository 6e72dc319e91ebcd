"""Format: how PEFT's files hold one family of methods; what the file of a family defines."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..dropout import dropout_key
from ..errors import CheckpointError, ConfigError
from ..method import DROPOUT_KEY, STRENGTH, Leaves, Method
from ..params.adapter import Adapter
from .files import is_number
from .matching import exact_pattern, pattern_value, targets_for
from .places import CONV1D, LINEAR, PARAMETER, QUANTIZED, ROOT, TIED, Place, Places

Tensors = dict[str, Tensor]
Find = Callable[[Mapping[str, Any], str], tuple[str, Any] | None]
"""The pattern that matches a name, and its value."""
PRODUCTS = (LINEAR, CONV1D, QUANTIZED)
"""The layers whose input PEFT drops parts of."""


@dataclass(frozen=True)
class Read:
    """What a file says of one place: a method and its leaves."""

    method: Method
    train: Leaves
    fixed: Leaves


class Settings:
    """A config whose values are checked as they are read.

    Args:
        config: from adapter_config.json.
        where: the file, for errors.
    """

    def __init__(self, config: Mapping[str, Any], where: str):
        self.config, self.where = config, where
        self.used: dict[str, set[str]] = {}

    def fail(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {message}")

    def integer(self, field: str, default: int, least: int = 1) -> int:
        return self._integer(field, self._get(field, default), least)

    def number(self, field: str, default: float) -> float:
        return self._number(field, self._get(field, default))

    def flag(self, field: str, default: bool) -> bool:
        value = self._get(field, default)
        if not isinstance(value, bool):
            raise self.fail(f"{field} is {value!r}, not true or false")
        return value

    def text(self, field: str, default: str) -> str:
        value = self._get(field, default)
        if not isinstance(value, str):
            raise self.fail(f"{field} is {value!r}, not a string")
        return value

    def integer_at(
        self, place: Place, field: str, default: int, patterns: str, find: Find = pattern_value
    ) -> int:
        """``field``, or what the patterns say for this place, as ``find`` matches them."""
        found = self._pattern(place, patterns, find)
        return self.integer(field, default) if found is None else self._integer(patterns, found, 1)

    def number_at(self, place: Place, field: str, default: float, patterns: str) -> float:
        """``field``, or what the patterns say for this place."""
        found = self._pattern(place, patterns)
        return self.number(field, default) if found is None else self._number(patterns, found)

    def _pattern(self, place: Place, field: str, find: Find = pattern_value) -> Any:
        patterns = self.patterns(field)
        found = find(patterns, place.name)
        if found is None:
            return None
        self.used.setdefault(field, set()).add(found[0])
        return found[1]

    def patterns(self, field: str) -> dict[str, Any]:
        value = self.config.get(field) or {}
        if not isinstance(value, dict):
            raise self.fail(f"{field} is {value!r}, not an object")
        return value

    def _get(self, field: str, default: Any) -> Any:
        value = self.config.get(field)
        return default if value is None else value

    def _integer(self, field: str, value: Any, least: int) -> int:
        if type(value) is not int or not least <= value < 2**31:
            raise self.fail(f"{field} is {value!r}, not an integer of at least {least}")
        return value

    def _number(self, field: str, value: Any) -> float:
        if not is_number(value):
            raise self.fail(f"{field} is {value!r}, not a finite number")
        return float(value)


class Taken:
    """The tensors of one place, each checked against the shape that its layer needs."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        place: Place,
        where: str,
        initial: Taken | None = None,
    ):
        self._tensors, self._place, self._where = dict(tensors), place, where
        self.initial = initial
        """Those of the same adapter before training, if they are given."""

    def __contains__(self, suffix: str) -> bool:
        return suffix in self._tensors

    def take(self, suffix: str, *shape: int) -> Tensor:
        """A tensor of this shape, where -1 stands for any positive size."""
        tensor = self._tensors.get(suffix)
        key = f"{self._place.key}.{suffix}"
        if tensor is None:
            raise CheckpointError(
                f"{self._where} lacks {key}; of this module it has {sorted(self._tensors)}"
            )
        site = self._place.site
        needed_by = f"{site.name} (outputs, inputs) = {site.matrix_shape} needs"
        return _of_shape(tensor, shape, f"{self._where}: {key}", needed_by)


def _of_shape(tensor: Tensor, shape: Sequence[int], what: str, needed_by: str) -> Tensor:
    found = tuple(tensor.shape)
    if len(found) != len(shape) or any(
        n != m and (n != -1 or m < 1) for n, m in zip(shape, found, strict=True)
    ):
        raise CheckpointError(
            f"{what} has shape {found}, and {needed_by} {tuple(shape)}: the file was made for "
            "another base"
        )
    return tensor


class Shared:
    """The tensors of a file that belong to no module; and the model's ``places``."""

    def __init__(self, tensors: Mapping[str, Tensor], where: str, places: Places):
        self._tensors, self._where, self.places = dict(tensors), where, places

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def take(self, name: str, *shape: int) -> Tensor:
        """A tensor of this shape, where -1 stands for any positive size."""
        tensor, key = self._tensors.get(name), f"{ROOT}{name}"
        if tensor is None:
            raise CheckpointError(f"{self._where} lacks {key}")
        return _of_shape(tensor, shape, f"{self._where}: {key}", "the file's modules need")


class Format:
    """One ``peft_type``. A subclass is one file of this package; see the package's docstring."""

    peft_type: ClassVar[str]
    methods: ClassVar[tuple[type[Method], ...]]
    """The classes that it writes. A subclass counts if its increment is inherited."""
    suffixes: ClassVar[tuple[str, ...]]
    """The names of a module's tensors."""
    layers: ClassVar[frozenset[str]] = frozenset({LINEAR})
    """What PEFT applies it to; names of :mod:`fadapt.peft.places`."""
    fields: ClassVar[frozenset[str]] = frozenset()
    """The config fields of its own that it reads, or may leave unread."""
    refused: ClassVar[Mapping[str, str]] = {}
    """{field: why a file that sets it cannot be read}."""
    patterns: ClassVar[tuple[str, ...]] = ()
    """The fields that map patterns of names to values."""
    dropout: ClassVar[str] = ""
    """The field that holds the dropout of the adapter's input."""
    shared: ClassVar[tuple[str, ...]] = ()
    """The names of tensors that belong to the file and no module: their keys are
    ``base_model.<name>`` or, of several, ``base_model.<name>.<index>``."""
    saves_modules: ClassVar[bool] = True
    """Whether its config has ``modules_to_save``."""
    bias_only: ClassVar[str] = ""
    """The value of ``bias`` that saves the biases of the adapted modules."""

    def place(
        self, places: Places, path: str, suffix: str, config: Mapping[str, Any]
    ) -> Place | None:
        """What a key means, or None."""
        return places.at(path, config)

    def modules(self, places: Places) -> Iterable[str]:
        """The modules that ``target_modules`` may mean."""
        return places.modules

    def read(self, settings: Settings, place: Place, tensors: Taken) -> Read:
        """The method and leaves of one place."""
        raise NotImplementedError

    def read_shared(
        self, settings: Settings, reads: Mapping[Place, Read], tensors: Shared
    ) -> tuple[Mapping[Place, Read], Sequence[Read]]:
        """What the tensors of :attr:`shared` add, after all places have been read.

        Args:
            reads: what :meth:`read` returned, in the model's order.
            tensors: those of the file.

        Returns:
            ``reads``, with the leaves that each place has of its own; and the leaves that the
            places of one method share (``Method.shared``), as a Read of each such method.
        """
        return reads, ()

    def write_shared(
        self, adapters: Mapping[Place, Adapter], settings: Mapping[str, Any]
    ) -> Tensors:
        """{name, or name.index: tensor} of :attr:`shared`.

        Args:
            adapters: in the model's order; what they share is among their ``leaves``.
        """
        return {}

    def read_bias(self, settings: Settings, place: Place, tensors: Taken) -> Tensor | None:
        """The increment of the bias that is a part of the adapter, or None."""
        return None

    def own_bias(self, place: Place, adapter: Adapter, d: Tensor) -> tuple[str, Tensor] | None:
        """(suffix, tensor) of such an increment; None where the format has none."""
        return None

    def arrange(self, places: Places, adapters: Mapping[Place, Adapter]) -> Mapping[Place, Adapter]:
        """The adapters at what a file has for them; or what it cannot hold of this model."""
        return adapters

    def settings(self, adapters: Mapping[Place, Adapter]) -> dict[str, Any]:
        """The config fields that hold for all adapters of a file."""
        raise NotImplementedError

    def write(self, place: Place, adapter: Adapter, settings: Mapping[str, Any]) -> Tensors:
        """{suffix: tensor} of one place."""
        raise NotImplementedError

    def with_dropout(self, settings: Settings, place: Place, read: Read) -> Read:
        """What was read, with the dropout of its input, which PEFT knows of products alone."""
        share = settings.number(self.dropout, 0.0) if self.dropout else 0.0
        if not share or place.layer not in PRODUCTS:
            return read
        key = dropout_key("dropout", 0, place.site.name).to(place.weight.device)
        method = dataclasses.replace(read.method, dropout=share)
        return Read(method, read.train, {**read.fixed, DROPOUT_KEY: key})

    def written_dropout(self, adapters: Mapping[Place, Adapter]) -> dict[str, float]:
        """The field of the dropout that all adapters have."""
        shares = [(p, a.method.dropout) for p, a in adapters.items() if p.layer in PRODUCTS]
        share = common(shares, "dropout") if shares else 0.0
        if share and not self.dropout:
            raise CheckpointError(
                f"PEFT's {self.peft_type} has no dropout of the input, and {shares[0][0].site.name}"
                f" has {share}; it acts in training alone, so dropout=0.0 is the same map"
            )
        return {self.dropout: share} if self.dropout else {}

    def targets(self, adapters: Mapping[Place, Adapter], modules: Sequence[str]) -> list[str] | str:
        """``target_modules`` for these places, of all modules of the model."""
        wanted = [p.module for p in adapters if p.layer not in (PARAMETER, TIED)]
        return targets_for(wanted, modules) if wanted else []

    def finish(self, settings: Settings) -> None:
        """Refuses patterns that no place has used."""
        for field in self.patterns:
            for pattern in settings.patterns(field).keys() - settings.used.get(field, set()):
                raise settings.fail(
                    f"{field}: {pattern!r} matches no adapted module, or an earlier pattern "
                    "takes all that it matches"
                )

    def writes(self, method: Method) -> bool:
        """Whether a method is one of its own, with the increment that its class defines."""
        cls = type(method)
        for known in self.methods:
            if isinstance(method, known):
                return all(
                    getattr(cls, part) is getattr(known, part) for part in ("shift", "delta")
                )
        return False


def strength(adapter: Adapter) -> float:
    """The runtime strength of an adapter; 1 by default."""
    value = adapter.leaves.get(STRENGTH)
    return 1.0 if value is None else float(value)


def refuse_strength(place: Place, adapter: Adapter) -> None:
    """Refuses a strength other than 1, where a file has no room for it."""
    c = strength(adapter)
    if c != 1:
        raise CheckpointError(
            f"{place.site.name}: PEFT's format has no strength, and the increment of "
            f"{adapter.method!r} is at strength {c:g}. Write fadapt.scale(params, 1.0), or save "
            "fadapt.as_lora(model, params, r=...), which folds it in"
        )


def common(values: Iterable[tuple[Place, Any]], what: str) -> Any:
    """The one value of all places, or an error that names two of them."""
    found: dict[Any, Place] = {}
    for place, value in values:
        found.setdefault(value, place)
    if len(found) > 1:
        (a, first), (b, second) = list(found.items())[:2]
        raise CheckpointError(
            f"PEFT's format has one {what} for all modules, and {first.site.name} has {a!r} where "
            f"{second.site.name} has {b!r}: save them apart, or convert them: fadapt.as_lora"
        )
    return next(iter(found))


def majority(values: Mapping[Place, Any], default: Any = None) -> tuple[Any, dict[str, Any]]:
    """(the default or the most frequent value, {pattern: value} of the places with others)."""
    if default is None:
        count = Counter(values.values())
        default = max(count, key=lambda v: count[v])
    return default, {exact_pattern(p.name): v for p, v in values.items() if v != default}


def wide(tensor: Tensor) -> Tensor:
    """In float32 or better."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def build(make: Any, where: str) -> Any:
    """``make()``, with a ConfigError of a method as an error of the file."""
    try:
        return make()
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error
