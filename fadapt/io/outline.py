"""What an adapter's file says of itself in its header: no values are read, and no model is needed.

A method that this process does not know is shown by its name and fields, as the file has them.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError, FadaptError
from ..method_json import method_from_json
from ..site import Site
from .adapters import site_from_json
from .tensors import TensorFile, TensorSpec, open_tensors


@dataclass(frozen=True)
class SiteOutline:
    """One site of a file.

    Attributes:
        site: where.
        method: as its repr.
        train, fixed: {leaf: shape and dtype}.
    """

    site: Site
    method: str
    train: dict[str, TensorSpec]
    fixed: dict[str, TensorSpec]


@dataclass(frozen=True)
class Outline:
    """An adapter's file.

    Attributes:
        sites: in the order of the file.
        config: as :meth:`fadapt.Config.to_dict` wrote it, or None.
        nbytes: of its values.
    """

    sites: tuple[SiteOutline, ...]
    config: dict[str, Any] | None
    nbytes: int

    @property
    def base_fingerprint(self) -> str:
        """32 hex digits over the names and fingerprints of the weights that are adapted."""
        digest = hashlib.sha256()
        for one in sorted(self.sites, key=lambda s: s.site.name):
            if not one.site.is_shared:
                line = f"{one.site.name} {one.site.fingerprint}\n"
                digest.update(line.encode(errors="surrogatepass"))
        return digest.hexdigest()[:32]


def outline(path: str | os.PathLike[str]) -> Outline:
    """The outline of a file that :func:`fadapt.save` wrote.

    Raises:
        CheckpointError: not such a file, or a damaged header. The values are not compared with the
            checksum, which takes reading them.
    """
    with open_tensors(path) as file:
        return outline_of(file)


def outline_of(file: TensorFile) -> Outline:
    """The outline of an open file; see :func:`outline`."""
    meta = file.meta
    if not isinstance(meta.get("sites"), dict):
        raise CheckpointError(f"{file.where} holds no adapter")
    try:
        sites = tuple(_site(file, name, record) for name, record in meta["sites"].items())
        config = meta["config"]
    except CheckpointError:
        raise
    except (FadaptError, LookupError, TypeError, ValueError, AttributeError) as error:
        why = str(error) if isinstance(error, FadaptError) else repr(error)
        raise CheckpointError(f"{file.where}: its metadata is damaged: {why}") from error
    if not (config is None or isinstance(config, dict)):
        raise CheckpointError(f"{file.where}: its config is a {type(config).__name__}")
    return Outline(sites, config, sum(spec.nbytes for spec in file.specs.values()))


def _site(file: TensorFile, name: str, record: dict[str, Any]) -> SiteOutline:
    site = site_from_json(record["site"])
    if site.name != name:
        raise CheckpointError(f"{file.where}: the record of {name} is that of {site.name}")
    parts = []
    for part in ("train", "fixed"):
        keys = {leaf: f"{name}|{part}|{leaf}" for leaf in record[part]}
        if missing := [key for key in keys.values() if key not in file.specs]:
            raise CheckpointError(f"{file.where} lacks the key {missing[0]}")
        parts.append({leaf: file.specs[key] for leaf, key in keys.items()})
    return SiteOutline(site, _method(record["method"]), *parts)


def _method(data: dict[str, Any]) -> str:
    try:
        return repr(method_from_json(data))
    except FadaptError:
        fields = ", ".join(f"{k}={v!r:.80}" for k, v in data["fields"].items())
        return f"{data['method']}({fields})"
