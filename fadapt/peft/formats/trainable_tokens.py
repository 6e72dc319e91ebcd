"""TRAINABLE_TOKENS: rows of embeddings that replace the model's.

Files. ``trainable_tokens_delta`` (n, width), the rows themselves, of each embedding; once more for
a head that a Hugging Face model ties to it. One list of tokens for all modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ...errors import CheckpointError
from ...methods.trainable_tokens import TrainableTokens
from ...params.adapter import Adapter
from ..format import Format, Read, Settings, Shared, Taken, Tensors, common
from ..places import EMBEDDING, LINEAR, TIED, Place, Places
from ..tokens import DELTA, check_tokens, followed, read_rows, row_values, spread, written_rows


class TrainableTokensFormat(Format):
    """Rows of embeddings, and of heads."""

    peft_type = "TRAINABLE_TOKENS"
    methods = (TrainableTokens,)
    suffixes = (DELTA,)
    layers = frozenset({EMBEDDING, LINEAR, TIED})
    fields = frozenset({"token_indices"})
    saves_modules = False

    def place(
        self, places: Places, path: str, suffix: str, config: Mapping[str, Any]
    ) -> Place | None:
        place = places.at(path, config)
        if place is None or place.layer != LINEAR:
            return place
        leads = [w for w in places.weights if any(o is place.weight for o in followed(places, w))]
        return replace(place, layer=TIED) if leads else place

    def read(self, settings: Settings, place: Place, tensors: Taken) -> Read:
        tokens = check_tokens(settings.config.get("token_indices"), settings.fail)
        width = place.weight.shape[place.layer != EMBEDDING]
        rows = tensors.take(DELTA, len(tokens), width)
        return read_rows(place, tokens, rows, settings.fail)

    def read_shared(
        self, settings: Settings, reads: Mapping[Place, Read], tensors: Shared
    ) -> tuple[Mapping[Place, Read], Sequence[Read]]:
        own = {place: read for place, read in reads.items() if place.layer != TIED}
        found, banks = spread(tensors.places, own, settings.fail)
        known = {id(place.weight.parameter): read.train["d"] for place, read in own.items()}
        for place in reads.keys() - own.keys():
            lead = known.get(id(place.weight.parameter))
            if lead is None or not torch.equal(reads[place].train["d"], lead):
                raise settings.fail(
                    f"{place.module} is tied to the embedding, and its rows are not the embedding's"
                )
        return found, banks

    def arrange(self, places: Places, adapters: Mapping[Place, Adapter]) -> Mapping[Place, Adapter]:
        tied = {p for rows in written_rows(places, adapters).values() for p in rows.follow}
        return {
            replace(place, layer=TIED) if place in tied else place: adapter
            for place, adapter in adapters.items()
        }

    def settings(self, adapters: Mapping[Place, Adapter]) -> dict[str, Any]:
        methods: dict[Place, Any] = {place: a.method for place, a in adapters.items()}
        tokens = common([(p, m.token_indices) for p, m in methods.items()], "list of tokens")
        if tokens is None:
            place = next(iter(adapters))
            raise CheckpointError(
                f"{place.site.name}: PEFT's TRAINABLE_TOKENS names its tokens, and this one trains "
                "all: write token_indices=(...), or fadapt.Full() beside another adapter"
            )
        return {"token_indices": list(tokens), "init_weights": True}

    def write(self, place: Place, adapter: Adapter, settings: Mapping[str, Any]) -> Tensors:
        return {DELTA: row_values(place, adapter, settings["token_indices"])}
