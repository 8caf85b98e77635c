"""Versions at rest: files sealed per tenant, opened in memory only.

One file = one AES-256-GCM seal (nonce 12 bytes, tag 16 bytes at the end) with the version's data key. The data key is
random per version, so the nonce is the file's place in the manifest: sealing the same bytes again gives the same
bytes, which is how a node that applied a delta to plain bytes proves to hold the signed, sealed file.
Tenant, model, release and file name are bound in as associated data.
"""

from __future__ import annotations

import base64
import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from nearcast.errors import Code, MeshError
from nearcast.store.manifest import Encryption, Manifest

KEY_SIZE_BYTES = 32
SEAL_SIZE_BYTES = 16
SEALED_FILE_SIZE_BYTES_MAX = 64 * 1024 * 1024
"""AES-GCM opens a file as one piece in memory; larger ones are refused when the bundle is made."""
_NONCE_SIZE_BYTES = 12


class TenantKeys:
    """The tenants' keys (key-encryption keys) that this process may use: 32 bytes each, in files of mode 0600."""

    def __init__(self, keys: Mapping[str, bytes] | None = None) -> None:
        self._keys = dict(keys or {})

    @classmethod
    def load(cls, folder: Path | None) -> TenantKeys:
        """Every `*.key` of a folder; none without a folder.

        Raises:
            MeshError: UNAUTHENTICATED if a key is unreadable, of another size, or readable by others.
        """
        keys: dict[str, bytes] = {}
        for path in sorted(folder.glob("*.key")) if folder else ():
            try:
                mode, key = path.stat().st_mode, path.read_bytes()
            except OSError as error:
                raise MeshError(
                    Code.UNAUTHENTICATED, f"The tenant key {path} cannot be read: {error.strerror}."
                ) from error
            if len(key) != KEY_SIZE_BYTES or mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise MeshError(
                    Code.UNAUTHENTICATED,
                    f"The tenant key {path} must be {KEY_SIZE_BYTES} bytes, readable by you alone.",
                )
            keys[key_id(key)] = key
        return cls(keys)

    def wrap(self, data_key: bytes, tenant: str, identifier: str) -> Encryption:
        """Seal a data key for the manifest.

        Raises:
            MeshError: UNAUTHENTICATED if that tenant key is not here.
        """
        nonce = os.urandom(_NONCE_SIZE_BYTES)
        sealed = AESGCM(self._key(identifier)).encrypt(nonce, data_key, tenant.encode())
        return Encryption(tenant=tenant, key_id=identifier, wrapped_key=base64.b64encode(nonce + sealed).decode())

    def unwrap(self, encryption: Encryption) -> bytes:
        """The data key of a version.

        Raises:
            MeshError: UNAUTHENTICATED if that tenant key is not here, UNTRUSTED if the wrapped key is not genuine.
        """
        key = self._key(encryption.key_id)
        try:
            wrapped = base64.b64decode(encryption.wrapped_key, validate=True)
            return AESGCM(key).decrypt(
                wrapped[:_NONCE_SIZE_BYTES], wrapped[_NONCE_SIZE_BYTES:], encryption.tenant.encode()
            )
        except (ValueError, InvalidTag) as error:
            raise MeshError(Code.UNTRUSTED, f"The wrapped key of tenant {encryption.tenant} is not genuine.") from error

    def _key(self, identifier: str) -> bytes:
        key = self._keys.get(identifier)
        if key is None:
            raise MeshError(
                Code.UNAUTHENTICATED,
                f"The tenant key {identifier} is not on this node; put its file into the folder of tenant keys.",
            )
        return key


def key_id(key: bytes) -> str:
    """How manifests name a tenant key."""
    return hashlib.sha256(key).hexdigest()[:16]


def seal_file(manifest: Manifest, index: int, path: str, plain: bytes, data_key: bytes) -> bytes:
    """The sealed bytes of the file at place `index` of the manifest.

    Raises:
        MeshError: TOO_LARGE beyond `SEALED_FILE_SIZE_BYTES_MAX`.
    """
    if len(plain) > SEALED_FILE_SIZE_BYTES_MAX:
        raise MeshError(
            Code.TOO_LARGE, f"{path} is too large to be sealed: {SEALED_FILE_SIZE_BYTES_MAX} bytes at most."
        )
    return AESGCM(data_key).encrypt(_nonce(index), plain, _bound(manifest, path))


def open_file(manifest: Manifest, path: str, sealed: bytes, keys: TenantKeys) -> bytes:
    """The plain bytes of a file of a version; those of a plain version as they are.

    Raises:
        MeshError: UNAUTHENTICATED without the tenant's key, UNTRUSTED if the bytes are not genuine.
    """
    if manifest.encryption is None:
        return sealed
    index = [entry.path for entry in manifest.files].index(path)
    try:
        return AESGCM(keys.unwrap(manifest.encryption)).decrypt(_nonce(index), sealed, _bound(manifest, path))
    except InvalidTag as error:
        raise MeshError(Code.UNTRUSTED, f"The sealed file {path} of {manifest.name} is not genuine.") from error


def _nonce(index: int) -> bytes:
    return index.to_bytes(_NONCE_SIZE_BYTES, "big")


def _bound(manifest: Manifest, path: str) -> bytes:
    tenant = manifest.encryption.tenant if manifest.encryption else ""
    return "\0".join((tenant, manifest.name, str(manifest.release), path)).encode()
