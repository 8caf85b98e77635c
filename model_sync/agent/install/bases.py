"""What an installed release has already: the files that a delta may start from, or that are wanted again."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from model_sync.delta.index import Way
from nearcast.errors import Code, MeshError
from nearcast.store import Manifest, Store
from nearcast.store.manifest import File


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A file of an installed release."""

    manifest: Manifest
    entry: File
    path: Path

    def read(self) -> bytes:
        """Its bytes as they are on the disk.

        Raises:
            MeshError: UNTRUSTED if they are not the signed ones any more.
        """
        handle = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(handle, "rb") as file:
            data = file.read(self.entry.size_bytes + 1)
        if hashlib.sha256(data).hexdigest() != self.entry.sha256:
            raise MeshError(
                Code.UNTRUSTED, f"{self.entry.path} of release {self.manifest.release} is damaged on this disk."
            )
        return data


class Bases:
    """The files of the installed releases of one model, by digest; newest release first."""

    def __init__(self, store: Store, model: str) -> None:
        self._bases: dict[str, Base] = {}
        for release in reversed(store.releases(model)):
            try:
                manifest = store.manifest(model, release)
            except MeshError:
                continue
            for entry in manifest.files:
                path = store.folder(model, release) / entry.path
                self._bases.setdefault(entry.sha256, Base(manifest=manifest, entry=entry, path=path))

    def __contains__(self, sha256: object) -> bool:
        return sha256 in self._bases

    def __getitem__(self, sha256: str) -> Base:
        return self._bases[sha256]

    def digests(self, *, sealed: bool) -> frozenset[str]:
        """Digests of what a delta may start from: a plain version starts from plain files, and a sealed one from
        sealed ones.
        """
        return frozenset(one for one, base in self._bases.items() if (base.manifest.encryption is not None) is sealed)

    def of(self, way: Way) -> tuple[Base, ...]:
        """What a way starts from, all of it in a row. `chunks` looks for pieces in all files of the newest release
        that is plain.

        Raises:
            KeyError: if it is not here.
        """
        if way.codec != "chunks":
            return (self._bases[way.base],) if way.base is not None else ()
        plain = [base for base in self._bases.values() if base.manifest.encryption is None]
        newest = max((base.manifest.release for base in plain), default=0)
        return tuple(base for base in plain if base.manifest.release == newest)
