"""Files of a Hugging Face Hub repository, by its id, through huggingface_hub and its local cache.

A path that exists is never taken for an id; nor is one with a "." or ".." in it, an absolute one,
one whose first folder is here, or one that ends in .safetensors and names no file in a repository.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

ADAPTER = "adapter.safetensors"
"""What an adapter is called in a repository of its own."""

NOT_OURS = ("adapter_model.safetensors", "model.safetensors")
"""PEFT's and transformers' own names."""

_WORD = r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?"
_ID = re.compile(rf"({_WORD}/{_WORD})((?:/{_WORD})*)(?:@({_WORD}(?:/{_WORD})*))?", re.ASCII)


@dataclass(frozen=True)
class HubId:
    """``owner/name``, ``owner/name/file`` or either with ``@revision``."""

    repo: str
    file: str
    revision: str | None

    @classmethod
    def read(cls, path: Any) -> HubId | None:
        """The id that a text is, or None where it is the path of something local."""
        if not isinstance(path, str) or os.path.lexists(path):
            return None
        match = _ID.fullmatch(path)
        if match is None or os.path.lexists(path.partition("/")[0]):
            return None
        repo, file = match[1], match[2].lstrip("/")
        if not file and repo.endswith((".safetensors", ".bin", ".pt", ".json")):
            return None
        return None if ".." in path or "--" in repo else cls(repo, file, match[3])

    def fetch(self, names: Iterable[str]) -> dict[str, Path]:
        """{name: local path} of those of the files that the repository has.

        From the cache where they are in it and the Hub is not asked (``HF_HUB_OFFLINE=1``).

        Raises:
            CheckpointError: huggingface_hub is not installed, or none of them can be had.
        """
        try:
            import huggingface_hub
        except ImportError as error:
            raise CheckpointError(
                f"{self} is no path here; as a repository on the Hugging Face Hub it needs "
                "huggingface_hub: pip install 'fadapt[hub]'"
            ) from error
        found: dict[str, Path] = {}
        reasons: list[str] = []
        for name in names:
            try:
                local = huggingface_hub.hf_hub_download(self.repo, name, revision=self.revision)
                found[name] = Path(local)
            # Of the many kinds: no such repository or file, no access, no network, nothing cached.
            except Exception as error:
                reasons.append(f"{name}: {' '.join(str(error).split())[:200]}")
        if not found:
            raise CheckpointError(
                f"{self} is no path here, and as a repository on the Hugging Face Hub it gives no "
                f"{' or '.join(n for n in names)} ({reasons[0]})"
            )
        return found

    def names(self) -> list[str]:
        """The names of the repository's files, as the Hub or else the cache knows them."""
        for listed in (self._listed, self._cached):
            with contextlib.suppress(Exception):
                return listed()
        return []

    def _listed(self) -> list[str]:
        import huggingface_hub

        return sorted(huggingface_hub.list_repo_files(self.repo, revision=self.revision))

    def _cached(self) -> list[str]:
        import huggingface_hub

        root = huggingface_hub.snapshot_download(
            self.repo, revision=self.revision, local_files_only=True
        )
        return sorted(p.relative_to(root).as_posix() for p in Path(root).rglob("*") if p.is_file())

    def __str__(self) -> str:
        file = f"/{self.file}" if self.file else ""
        return f"{self.repo}{file}" + (f"@{self.revision}" if self.revision else "")


def local_adapter(path: Any) -> Any:
    """The path of a file that :func:`fadapt.save` wrote: as it is, or that of a repository's.

    Raises:
        CheckpointError: a repository that cannot be had, or has no such file.
    """
    hub = HubId.read(path)
    if hub is None:
        return path
    if hub.file:
        return hub.fetch([hub.file])[hub.file]
    try:
        return hub.fetch([ADAPTER])[ADAPTER]
    except CheckpointError as error:
        # Under another name it is the one file of its kind, or has to be named.
        files = [n for n in hub.names() if n.endswith(".safetensors") and n not in NOT_OURS]
        if len(files) == 1:
            return hub.fetch(files)[files[0]]
        if files:
            raise CheckpointError(
                f'{error}; it has {files}: write "{hub.repo}/{files[0]}"'
            ) from error
        raise


def upload_advice(path: str) -> str | None:
    """What to write instead of saving to an id; None where a text is none."""
    hub = HubId.read(path)
    if hub is None or hub.file or hub.revision:
        return None
    return (
        f"there is no directory {path.partition('/')[0]!r} here. If {path} is a repository on the "
        f'Hugging Face Hub, write fadapt.save(params, "{ADAPTER}") and '
        f'huggingface_hub.upload_file(path_or_fileobj="{ADAPTER}", path_in_repo="{ADAPTER}", '
        f'repo_id="{path}"); fadapt.load("{path}", model) reads it back'
    )
