"""The files of one version as they are loaded: read once, hashed from the very bytes that are used, opened in memory.

Between a check and a use by name the file could be another one; here nothing is ever read by name twice.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING

from nearcast.errors import Code, MeshError
from nearcast.store.manifest import Manifest

if TYPE_CHECKING:
    from nearcast.store.sealing import TenantKeys

_NO_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO}


class Contents:
    """Plain bytes by file name. What was read stays in memory as long as this object.

    Args:
        manifest: signed; every byte is measured by it.
        folder: holds the files that it names.
        tenant_keys: folder with the tenants' keys, for a sealed version.
    """

    def __init__(self, manifest: Manifest, folder: Path, *, tenant_keys: Path | None = None) -> None:
        self.manifest = manifest
        self.folder = folder
        self._tenant_keys = tenant_keys
        self._keys: TenantKeys | None = None
        self._plain: dict[str, bytes] = {}

    def of_model(self) -> Contents:
        """The same files under the manifest as the model file sees it; what one has read, the other has too."""
        view = copy(self)
        view.manifest = self.manifest.of_model()
        return view

    def read(self, path: str) -> bytes:
        """The plain bytes of one file.

        Raises:
            MeshError: UNTRUSTED if it is missing, no regular file, or not what the manifest says; UNAUTHENTICATED if
                it is sealed and the key is not here; UNAVAILABLE if the disk does not give it.
        """
        if path not in self._plain:
            data = self._read_verified(path)
            self._plain[path] = data if self.manifest.encryption is None else self._open(path, data)
        return self._plain[path]

    def _open(self, path: str, sealed: bytes) -> bytes:
        # Here, because cryptography is 10 MB that a node without sealed versions need not hold.
        from nearcast.store.sealing import TenantKeys, open_file

        if self._keys is None:
            self._keys = TenantKeys.load(self._tenant_keys)
        return open_file(self.manifest, path, sealed, self._keys)

    def _read_verified(self, path: str) -> bytes:
        entry = self.manifest.file(path)
        data = _read_itself(self.folder / path, entry.size_bytes + 1)
        if data is None:
            raise MeshError(Code.UNTRUSTED, f"The file {path} is missing or no regular file.")
        if len(data) != entry.size_bytes:
            raise MeshError(Code.UNTRUSTED, f"The file {path} has not the size that the manifest says.")
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise MeshError(Code.UNTRUSTED, f"The file {path} has other bytes than its manifest says.")
        return data


def _read_itself(path: Path, size_bytes: int) -> bytes | None:
    """The beginning of a regular file; None for anything else: no link is followed, no pipe waited for."""
    try:
        with open(path, "rb", opener=_open_itself) as file:
            return file.read(size_bytes) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else None
    except OSError as error:
        if error.errno in _NO_FILE:
            return None
        raise MeshError(Code.UNAVAILABLE, f"The file {path.name} cannot be read: {error.strerror}.") from error


def _open_itself(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
