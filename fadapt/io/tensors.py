"""The one file format: atomic, checksummed safetensors with JSON metadata; no pickle.

Adapters, statistics and checkpoints are all written and read here. A file is a safetensors file:
eight bytes with the length of the header, the header (JSON: each tensor's dtype, shape and place,
and under ``__metadata__`` the strings "fadapt", the metadata as JSON, and "sha256", over the
metadata and the tensors), then the values.

Reading goes from what is small to what is large: the header is checked against the size of the
file and handed to the caller, who compares it with what it expects, before any values are read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import stat
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError

FORMAT_VERSION = 1
MAX_HEADER = 100_000_000
"""Bytes of a header; the safetensors library accepts no more either."""

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names of the dtypes that a file may hold."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor that is not read yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """The size of its values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')}"


class TensorFile:
    """An open file whose header has been checked; see :func:`open_tensors`.

    Attributes:
        where: its path, for messages.
        meta: the JSON metadata that was given to :func:`write_tensors`.
        specs: {key: shape and dtype}, sorted by key.
    """

    def __init__(self, where: str, file: BufferedReader):
        self.where, self._file = where, file
        header, self._start, size = _header(where, file)
        metadata = header.pop("__metadata__", {})
        self.specs: dict[str, TensorSpec] = {}
        self._places: list[tuple[int, int, str]] = []
        for key in sorted(header):
            spec, begin, end = _entry(where, key, header[key])
            self.specs[key] = spec
            self._places.append((begin, end, key))
        self._places.sort()
        self._check_places(size - self._start)
        if not isinstance(metadata, dict) or "fadapt" not in metadata:
            raise CheckpointError(
                f"{where} was not written by fadapt (no metadata); its keys start with "
                f"{list(self.specs)[:3]}"
            )
        self._text, self._sum = metadata["fadapt"], metadata.get("sha256")
        self.meta = self._metadata()

    def read(self) -> dict[str, Tensor]:
        """The tensors, each with memory of its own, compared with the checksum.

        Raises:
            CheckpointError: the values do not match the checksum, or cannot be read.
        """
        tensors: dict[str, Tensor] = {}
        try:
            for begin, _, key in self._places:
                spec = self.specs[key]
                tensors[key] = torch.empty(spec.shape, dtype=spec.dtype, device="cpu")
                self._file.seek(self._start + begin)
                # Into the tensor: neither a copy nor a mapping, which would change with the file.
                if spec.nbytes and self._file.readinto(_bytes(tensors[key])) != spec.nbytes:
                    raise CheckpointError(f"{self.where} is truncated at {key}")
        except (OSError, MemoryError, RuntimeError) as error:
            raise CheckpointError(f"{self.where} could not be read: {error}") from error
        if _digest(self._text, tensors) != self._sum:
            raise CheckpointError(
                f"{self.where} is corrupted: its contents do not match its checksum"
            )
        return {key: tensors[key] for key in self.specs}

    def _check_places(self, body: int) -> None:
        at = 0
        for begin, end, key in self._places:
            if begin != at:
                raise CheckpointError(
                    f"{self.where} is not safetensors: {key} starts at byte {begin} of the values, "
                    f"where {at} is expected"
                )
            at = end
        if at != body:
            what = "is truncated" if at > body else "has bytes that belong to no tensor"
            raise CheckpointError(
                f"{self.where} {what}: its header tells of {at} bytes of values, it holds {body}"
            )

    def _metadata(self) -> dict[str, Any]:
        where = self.where
        try:
            meta = _json(self._text)
            version = meta["format_version"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{where}: its metadata is damaged: {error!r}") from error
        if type(version) is not int or version != FORMAT_VERSION:
            raise CheckpointError(
                f"{where} has format version {version!r}, this fadapt reads {FORMAT_VERSION}; "
                "update fadapt"
            )
        leaves = meta.get("leaves")
        if not isinstance(leaves, dict):
            raise CheckpointError(f"{where}: its metadata is damaged: it lists no leaves")
        if missing := sorted(leaves.keys() - self.specs.keys()):
            raise CheckpointError(f"{where} lacks the key {missing[0]} ({len(missing)} in all)")
        if extra := sorted(self.specs.keys() - leaves.keys()):
            raise CheckpointError(f"{where} has the unknown key {extra[0]} ({len(extra)} in all)")
        for key, expected in leaves.items():
            if (found := _leaf(self.specs[key])) != expected:
                raise CheckpointError(f"{where}: {key} is {found}, expected {expected}")
        return meta


@contextmanager
def open_tensors(path: str | os.PathLike[str]) -> Iterator[TensorFile]:
    """Opens what :func:`write_tensors` wrote and checks its header, without reading any values.

    Raises:
        CheckpointError: not a path, not a file, damaged, foreign or of another version.

    Example:
        >>> import tempfile, torch
        >>> path = tempfile.mkdtemp() + "/file"
        >>> write_tensors({"a": torch.ones(2)}, {"format_version": 1, "kind": "mine"}, path)
        >>> with open_tensors(path) as file:
        ...     print(file.meta["kind"], file.specs["a"])
        ...     tensors = file.read()
        mine [2] float32
    """
    where = as_path(path)
    try:
        if not os.path.isfile(where):
            raise CheckpointError(f"{where} is not a file")
        file = open(where, "rb")  # noqa: SIM115
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{where!r} cannot be opened: {error}") from error
    with file:
        yield TensorFile(where, file)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metadata and tensors of a file.

    Where something is expected of them, compare it before they are read: :func:`open_tensors`.

    Raises:
        CheckpointError: see :func:`open_tensors` and :meth:`TensorFile.read`.
    """
    with open_tensors(path) as file:
        return file.meta, file.read()


def write_tensors(
    tensors: Mapping[str, Tensor], meta: Mapping[str, Any], path: str | os.PathLike[str]
) -> None:
    """Writes tensors and JSON metadata, whole or not at all, with a checksum over both.

    The file is written beside its final name, flushed to the disk and renamed. Its mode follows the
    process's umask. Equal tensors and metadata give equal bytes.

    Args:
        tensors: dense tensors on any device; the order does not matter.
        meta: JSON data, with "format_version".
        path: of the file; a link stays a link, and the file that it names is written.

    Raises:
        CheckpointError: what cannot be saved, or a path, directory or disk that refuses. An earlier
            file is untouched.
    """
    where = as_path(path)
    host = {key: _on_host(key, tensors[key]) for key in sorted(tensors)}
    try:
        text = json.dumps(
            {**meta, "leaves": {k: _leaf(t) for k, t in host.items()}}, sort_keys=True
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: metadata that JSON cannot hold: {error}") from error
    header: dict[str, Any] = {"__metadata__": {"fadapt": text, "sha256": _digest(text, host)}}
    # Wide dtypes first, so that all values are aligned.
    order = sorted(host, key=lambda k: (-host[k].dtype.itemsize, k))
    at = 0
    for key in order:
        size = host[key].nbytes
        header[key] = {
            "dtype": NAMES[host[key].dtype],
            "shape": list(host[key].shape),
            "data_offsets": [at, at + size],
        }
        at += size
    start = json.dumps(header, separators=(",", ":")).encode()
    start += b" " * (-len(start) % 8)
    if len(start) > MAX_HEADER:
        raise CheckpointError(
            f"{where}: the names and metadata take {len(start)} bytes, more than {MAX_HEADER}; "
            "save in several files"
        )
    replace_file(
        where, [len(start).to_bytes(8, "little") + start, *(_bytes(host[k]) for k in order)]
    )


def as_path(path: Any) -> str:
    """A path as a str.

    Raises:
        CheckpointError: something else than a str or pathlib.Path, or no possible name.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise CheckpointError(
            f"expected a path, a str or pathlib.Path, got {type(path).__name__}: {path!r:.80}"
        )
    where = os.fspath(path)
    if not isinstance(where, str):
        raise CheckpointError(f"the path {where!r} is bytes; write os.fsdecode(path)")
    if not where or "\0" in where:
        raise CheckpointError(f"the path {where!r} is not the name of a file or directory")
    return where


def replace_file(where: str, parts: list[Any]) -> None:
    """Writes bytes to a file, whole or not at all; an earlier one is replaced.

    Raises:
        CheckpointError: a directory or disk that refuses; an earlier file is untouched.
    """
    temporary: Path | None = None
    try:
        # A link stays a link: the file that it names is the one written.
        target = Path(os.path.realpath(where))
        _check_target(where, target)
        temporary = target.parent / f".{target.name[:40]}.{uuid.uuid4().hex}.tmp"
        # Not tempfile, which makes files that only their owner can read.
        with open(temporary, "xb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _flush(target.parent)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"could not write {where!r}: {error}. The earlier file, if any, is untouched"
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError, ValueError):
                temporary.unlink()


def _check_target(where: str, target: Path) -> None:
    """Refuses to replace a directory or a device, whose own permissions may allow it."""
    try:
        mode = os.lstat(target).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "no regular file"
        raise CheckpointError(f"{where!r} is {kind}; give the name of a file")


def _on_host(key: Any, tensor: Any) -> Tensor:
    if not isinstance(key, str) or key == "__metadata__":
        raise CheckpointError(f"a file cannot hold the key {key!r}")
    if not isinstance(tensor, Tensor):
        raise CheckpointError(f"{key} is a {type(tensor).__name__}, not a tensor")
    if tensor.is_meta:
        raise CheckpointError(f"{key} is a meta tensor without values")
    if tensor.layout != torch.strided or tensor.dtype not in NAMES:
        raise CheckpointError(
            f"{key} is {tensor.dtype} with the layout {tensor.layout}, which a file cannot hold"
        )
    try:
        # A copy only where it is needed: the bytes are written before this returns.
        host = tensor.detach().cpu().contiguous()
        _bytes(host)
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(
            f"{key} holds no plain values ({error}); save outside torch.func transforms"
        ) from error
    return host


def _header(where: str, file: BufferedReader) -> tuple[dict[str, Any], int, int]:
    """The header, where the values start, and the size of the file."""
    try:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER):
            raise CheckpointError(
                f"{where} is truncated or not safetensors: {size} bytes, of which the header would "
                f"be {length}"
            )
        if file.read(1) != b"{":
            raise CheckpointError(f"{where} is not safetensors: its header is no JSON object")
        file.seek(8)
        data = bytearray(length)
        if file.readinto(data) != length:
            raise CheckpointError(f"{where} is truncated")
        header = _json(data.decode())
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{where} is truncated or not safetensors: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{where} is not safetensors: its header is no JSON object")
    return header, 8 + length, size


def _entry(where: str, key: str, entry: Any) -> tuple[TensorSpec, int, int]:
    try:
        dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
        spec = TensorSpec(tuple(shape), dtype)
        sound = all(type(n) is int and 0 <= n < 2**63 for n in numbers)
        sound = sound and isinstance(shape, list) and len(shape) <= 64
        if not sound or spec.nbytes != end - begin:
            raise ValueError(f"{spec} in the bytes {begin} to {end}")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: the header of {key} is damaged: {error!r}") from error
    return spec, begin, end


def _json(text: str) -> Any:
    """JSON without repeated names, of which the last would win."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            raise ValueError("a name occurs twice")
        return result

    return json.loads(text, object_pairs_hook=once)


def _leaf(spec: TensorSpec | Tensor) -> list[Any]:
    return [list(spec.shape), str(spec.dtype).removeprefix("torch.")]


def _bytes(tensor: Tensor) -> Any:
    """The memory of a contiguous CPU tensor."""
    flat = tensor.reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(_utf8(text))
    for key in sorted(tensors):
        digest.update(_utf8(key))
        digest.update(_bytes(tensors[key].contiguous()))
    return digest.hexdigest()


def _utf8(text: str) -> bytes:
    return text.encode(errors="surrogatepass")  # JSON may name halves of a character


def _flush(directory: Path) -> None:
    # The file is in place; some file systems only cannot flush a directory.
    with contextlib.suppress(OSError):
        fd = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
