"""Trained rows of embeddings: what PEFT replaces by name of the token, and TrainableTokens moves.

PEFT's own format holds them (TRAINABLE_TOKENS), and files of LoRA do (``trainable_token_indices``).
Where a Hugging Face model ties its head to the input embedding, PEFT moves the rows of both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..base.weights import BaseWeight
from ..errors import CheckpointError
from ..hugging_face import config_of, input_embeddings
from ..methods.trainable_tokens import TrainableTokens
from ..params.adapter import Adapter
from .format import Read, Tensors, strength
from .places import EMBEDDING, LINEAR, PREFIX, Place, Places

FIELD = "trainable_token_indices"
DELTA = "trainable_tokens_delta"
WRAPPED = f"token_adapter.{DELTA}"

Fail = Callable[[str], CheckpointError]


def followed(places: Places, weight: BaseWeight) -> list[BaseWeight]:
    """The other uses of an embedding's tensor, whose rows PEFT moves with the embedding's own."""
    config = config_of(places.model)
    if weight.module is not input_embeddings(places.model):
        return []
    if not getattr(config, "tie_word_embeddings", False):
        return []
    return [w for w in places.weights if w is not weight and w.parameter is weight.parameter]


def check_tokens(value: Any, fail: Fail) -> tuple[int, ...]:
    """The tokens of a config."""
    known = isinstance(value, (list, tuple)) and all(type(t) is int and t >= 0 for t in value)
    if not known or not value or len(set(value)) < len(value):
        raise fail(f"the tokens {str(value)[:80]} are not distinct indices of at least 0")
    return tuple(value)


def row_count(place: Place) -> int:
    """The number of rows of an embedding, or of a head."""
    site = place.site
    return site.in_features if place.layer == EMBEDDING else site.out_features


def read_rows(place: Place, tokens: tuple[int, ...], rows: Tensor, fail: Fail) -> Read:
    """The method of rows that replace the weight's own."""
    if max(tokens) >= row_count(place):
        raise fail(f"{place.module} has {row_count(place)} rows, and a token is {max(tokens)}")
    _check_bias(place, fail)
    weight = place.weight.dense()
    exact = torch.promote_types(weight.dtype, torch.float32)
    index = torch.tensor(tokens, dtype=torch.int64, device=weight.device)
    moved = rows.to(weight.device, exact) - weight[index].to(exact)
    return Read(TrainableTokens(tokens), {"d": moved}, {_index_name(place): index})


def spread(
    places: Places, reads: Mapping[Place, Read], fail: Fail
) -> tuple[dict[Place, Read], list[Read]]:
    """Reads, and those of the uses that PEFT moves with them; and what these share."""
    found, banks = dict(reads), []
    here = {place.site.name for place in reads}
    for place, read in reads.items():
        others = [places.place(w) for w in followed(places, place.weight)]
        if not others or any(p.site.name in here for p in others):
            continue
        if any(r.method == read.method for p, r in reads.items() if p is not place):
            raise fail(f"the rows of {place.module} are tied, and other rows have the same tokens")
        (index,) = read.fixed.values()
        found[place] = Read(read.method, {}, read.fixed)
        for other in others:
            _check_bias(other, fail)
            found[other] = Read(read.method, {}, {_index_name(other): index})
        banks.append(Read(read.method, read.train, {}))
    return found, banks


@dataclass(frozen=True)
class Rows:
    """Rows of one module that a file has: their tokens, values, and the uses that follow them."""

    tokens: list[int]
    values: Tensor
    follow: list[Place]


def written_rows(places: Places, adapters: Mapping[Place, Adapter]) -> dict[Place, Rows]:
    """What a file has of these adapters, by the modules that lead."""
    found: dict[Place, Rows] = {}
    done: set[str] = set()
    for place in sorted(adapters, key=lambda p: p.layer != EMBEDDING):
        if place.site.name in done:
            continue
        adapter = adapters[place]
        method: Any = adapter.method
        _check_bias(place, CheckpointError)
        others = followed(places, place.weight)
        tied = {p: a for p, a in adapters.items() if any(p.weight is w for w in others)}
        same = [p for p, a in tied.items() if a.method == method and _alike(a, adapter)]
        if len(same) < len(others) and (len(tied) < len(others) or same):
            raise CheckpointError(
                f"{place.site.name} is tied to {place.site.tied}, whose rows PEFT moves with it: "
                "adapt all of them by one fadapt.TrainableTokens, or none"
            )
        for other in same:
            _check_bias(other, CheckpointError)
        done.update(p.site.name for p in same)
        tokens = method.token_indices or tuple(range(row_count(place)))
        found[place] = Rows(list(tokens), row_values(place, adapter, tokens), same)
    return found


def take_tokens(
    places: Places, rest: dict[str, Tensor], config: Mapping[str, Any], where: str
) -> tuple[dict[Place, Read], list[Read]]:
    """Takes the rows out of a file's other tensors; and what they share.

    Args:
        rest: {key without its prefix: tensor}.
    """

    def fail(message: str) -> CheckpointError:
        return CheckpointError(f"{where}: {FIELD}: {message}")

    named = config.get(FIELD)
    if not named:
        return {}, []
    reads: dict[Place, Read] = {}
    for key in [k for k in rest if k.endswith(f".{WRAPPED}")]:
        module = key.removesuffix(f".{WRAPPED}")
        weight = places.modules.get(module)
        place = None if weight is None else places.place(weight)
        if place is None or place.layer not in (EMBEDDING, LINEAR):
            raise fail(f"the key {PREFIX + key!r} belongs to no embedding of this model")
        lists = [named]
        if isinstance(named, dict):
            lists = [tokens for end, tokens in named.items() if module.endswith(str(end))]
        if len(lists) != 1:
            raise fail(f"{str(named)[:80]} has {len(lists)} lists of tokens for {module}")
        tokens, rows = check_tokens(lists[0], fail), rest.pop(key)
        if tuple(rows.shape) != (len(tokens), place.weight.shape[place.layer == LINEAR]):
            raise fail(f"{PREFIX + key} has shape {tuple(rows.shape)}, for {len(tokens)} tokens")
        reads[place] = read_rows(place, tokens, rows, fail)
    wanted = len(named) if isinstance(named, dict) else 1
    if not reads or len(reads) > wanted:
        raise fail(f"the file has the rows of {len(reads)} modules, for {str(named)[:80]}")
    return spread(places, reads, fail)


def split_tokens(
    adapters: Mapping[Place, Adapter],
) -> tuple[dict[Place, Adapter], dict[Place, Adapter]]:
    """The adapters that a format holds, and the rows beside them."""
    rows = {place: a for place, a in adapters.items() if type(a.method) is TrainableTokens}
    if len(rows) == len(adapters):
        return dict(adapters), {}
    return {place: a for place, a in adapters.items() if place not in rows}, rows


def written_tokens(
    places: Places, adapters: Mapping[Place, Adapter], others: Mapping[Place, Adapter]
) -> tuple[dict[str, Any], Tensors]:
    """Config fields and {key: tensor} of rows beside other adapters.

    Raises:
        CheckpointError: rows of a tensor that another adapter moves, too.
    """
    if not adapters:
        return {}, {}
    found = written_rows(places, adapters)
    for place in others:
        if any(place.weight is w for p in found for w in (p.weight, *followed(places, p.weight))):
            raise CheckpointError(f"{place.site.name} has other adapters than its trained rows")
    named = {place.module: rows.tokens for place, rows in found.items()}
    for end in named:
        if odd := [n for n in places.module_names if n.endswith(end) and n != end]:
            raise CheckpointError(f"PEFT's {FIELD} are ends of names: {end} means {odd[0]}, too")
    return {FIELD: named}, {
        f"{PREFIX}{place.key}.{WRAPPED}": rows.values for place, rows in found.items()
    }


def _index_name(place: Place) -> str:
    return "ids" if place.layer == EMBEDDING else "outputs"


def row_values(place: Place, adapter: Adapter, tokens: Sequence[int]) -> Tensor:
    """The rows that replace the weight's own."""
    weight = place.weight.dense()
    exact = torch.promote_types(weight.dtype, torch.float32)
    index = torch.tensor(tokens, dtype=torch.int64, device=weight.device)
    return weight[index].to(exact) + strength(adapter) * adapter.leaves["d"].to(exact)


def _alike(one: Adapter, other: Adapter) -> bool:
    return strength(one) == strength(other) and torch.equal(one.leaves["d"], other.leaves["d"])


def _check_bias(place: Place, fail: Fail | type[CheckpointError]) -> None:
    if place.site.bias is not None:
        raise fail(
            f"{place.site.name} has a bias, which PEFT leaves out where it replaces a head's rows"
        )
