"""Versions at rest: files sealed per tenant, opened in memory only.

One file = one AES-256-GCM seal (tag of 16 bytes at the end) with the version's data key; the nonce is the file's place
in the manifest; tenant, model, release and file name are bound in as associated data. The data key is derived (HKDF,
RFC 5869) from the tenant's key and all plain contents of the version, so that the same inputs give the same bundle,
and other bytes never meet the same key and nonce. It is wrapped with AES-SIV (RFC 5297), which is made to wrap keys
without a nonce. Sealing the same bytes again gives the same bytes: a node that applied a delta to plain bytes proves
that way to hold the signed, sealed file.

What it does not hide: sizes, file names, the manifest, and that two bundles of one tenant are the same version.
"""

from __future__ import annotations

import base64
import hashlib
import os
import secrets
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, AESSIV
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from nearcast.errors import Code, MeshError
from nearcast.store.manifest import Encryption, Manifest

KEY_SIZE_BYTES = 32
KEY_SUFFIX = ".key"
SEAL_SIZE_BYTES = 16
SEALED_FILE_SIZE_BYTES_MAX = 64 * 1024 * 1024
"""AES-GCM opens a file as one piece in memory; larger ones are refused when the bundle is made."""
KEYS_MAX = 256
"""Keys that one process reads from its folder."""
_NONCE_SIZE_BYTES = 12
_WRAP_KEY_SIZE_BYTES = 64


class TenantKeys:
    """The tenants' keys (key-encryption keys) that this process may use, by `key_id`: 32 random bytes each."""

    def __init__(self, keys: Mapping[str, bytes] | None = None, *, fault: str = "") -> None:
        self._keys = dict(keys or {})
        self._fault = fault

    @classmethod
    def load(cls, folder: Path | None) -> TenantKeys:
        """Every `*.key` of a folder; none without a folder. Read anew for each version, so that a new key counts.

        A key that cannot be used harms nothing but what it would open: what is wrong with it is said there.
        """
        keys: dict[str, bytes] = {}
        fault = ""
        for path in sorted(folder.glob(f"*{KEY_SUFFIX}"))[:KEYS_MAX] if folder else ():
            try:
                key = read_key(path)
            except MeshError as error:
                fault = f" {error.message}"
            else:
                keys[key_id(key)] = key
        return cls(keys, fault=fault)

    def wrap(self, data_key: bytes, tenant: str, identifier: str) -> Encryption:
        """Seal a data key for the manifest, always the same way.

        Raises:
            MeshError: UNAUTHENTICATED if that tenant key is not here.
        """
        wrapped = self._wrapper(identifier).encrypt(data_key, [tenant.encode(), identifier.encode()])
        return Encryption(tenant=tenant, key_id=identifier, wrapped_key=base64.b64encode(wrapped).decode())

    def unwrap(self, encryption: Encryption) -> bytes:
        """The data key of a version.

        Raises:
            MeshError: UNAUTHENTICATED if that tenant key is not here, UNTRUSTED if the wrapped key is not genuine.
        """
        wrapper = self._wrapper(encryption.key_id)
        try:
            wrapped = base64.b64decode(encryption.wrapped_key, validate=True)
            key = wrapper.decrypt(wrapped, [encryption.tenant.encode(), encryption.key_id.encode()])
        except (ValueError, InvalidTag) as error:
            raise MeshError(Code.UNTRUSTED, f"The wrapped key of tenant {encryption.tenant} is not genuine.") from error
        if len(key) != KEY_SIZE_BYTES:
            raise MeshError(Code.UNTRUSTED, f"The wrapped key of tenant {encryption.tenant} has a wrong size.")
        return key

    def _wrapper(self, identifier: str) -> AESSIV:
        key = self._keys.get(identifier)
        if key is None:
            raise MeshError(
                Code.UNAUTHENTICATED,
                f"The tenant key {identifier} is not on this node; put its file into the folder of tenant keys."
                f"{self._fault}",
            )
        return AESSIV(_expand(key, b"wrap", _WRAP_KEY_SIZE_BYTES))


def read_key(path: Path) -> bytes:
    """One tenant key.

    Raises:
        MeshError: UNAUTHENTICATED if it is unreadable, of another size, or readable by others.
    """
    try:
        with path.open("rb") as file:
            mode, key = os.fstat(file.fileno()).st_mode, file.read(KEY_SIZE_BYTES + 1)
    except OSError as error:
        raise MeshError(Code.UNAUTHENTICATED, f"The tenant key {path} cannot be read: {error.strerror}.") from error
    if len(key) != KEY_SIZE_BYTES or mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise MeshError(
            Code.UNAUTHENTICATED, f"The tenant key {path} must be {KEY_SIZE_BYTES} bytes, readable by you alone."
        )
    return key


def make_key(path: Path) -> str:
    """Write a new tenant key for its owner alone; answers its `key_id`.

    Raises:
        MeshError: CONFLICT if the file exists, INVALID_REQUEST if its name or place does not do.
    """
    if path.suffix != KEY_SUFFIX:
        raise MeshError(Code.INVALID_REQUEST, f"Name the key {path.stem}{KEY_SUFFIX}; nodes read *{KEY_SUFFIX}.")
    key = secrets.token_bytes(KEY_SIZE_BYTES)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        raise MeshError(Code.CONFLICT, f"{path} exists already; a key is never overwritten.") from None
    except OSError as error:
        raise MeshError(Code.INVALID_REQUEST, f"{path} cannot be written: {error.strerror}.") from error
    with os.fdopen(handle, "wb") as file:
        file.write(key)
        file.flush()
        os.fsync(file.fileno())
    return key_id(key)


def key_id(key: bytes) -> str:
    """How manifests name a tenant key."""
    return hashlib.sha256(key).hexdigest()[:16]


def derive_data_key(key: bytes, tenant: str, manifest: Manifest, plain_sha256: Sequence[tuple[str, str]]) -> bytes:
    """The data key of a version: another one for any other tenant, model, release, file name, order or content.

    Args:
        key: the tenant's.
        tenant: whose it is.
        manifest: names model and release.
        plain_sha256: path and digest of the plain bytes of each file, in the manifest's order.
    """
    bound = msgspec.json.encode((tenant, manifest.name, manifest.release, list(plain_sha256)))
    return _expand(key, b"data\0" + hashlib.sha256(bound).digest(), KEY_SIZE_BYTES)


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


def seal_payload(purpose: str, plain: bytes, data_key: bytes) -> bytes:
    """Seal what is made of plain bytes but is no file of the version, such as a delta: nonce, then the seal.

    `purpose` says what it is; only the same words open it. The key is another one than that of the files.
    """
    nonce = os.urandom(_NONCE_SIZE_BYTES)
    return nonce + AESGCM(_expand(data_key, b"payload", KEY_SIZE_BYTES)).encrypt(nonce, plain, purpose.encode())


def open_payload(purpose: str, sealed: bytes, data_key: bytes) -> bytes:
    """The plain bytes of a payload.

    Raises:
        MeshError: UNTRUSTED if the bytes are not genuine, or sealed for another purpose.
    """
    nonce, seal = sealed[:_NONCE_SIZE_BYTES], sealed[_NONCE_SIZE_BYTES:]
    try:
        return AESGCM(_expand(data_key, b"payload", KEY_SIZE_BYTES)).decrypt(nonce, seal, purpose.encode())
    except (InvalidTag, ValueError) as error:
        raise MeshError(Code.UNTRUSTED, f"The sealed payload ({purpose[:128]}) is not genuine.") from error


def _expand(key: bytes, purpose: bytes, size_bytes: int) -> bytes:
    """A key for one purpose, made of another that is random already."""
    return HKDF(SHA256(), size_bytes, None, b"nearcast seal v1\0" + purpose).derive(key)


def _nonce(index: int) -> bytes:
    return index.to_bytes(_NONCE_SIZE_BYTES, "big")


def _bound(manifest: Manifest, path: str) -> bytes:
    tenant = manifest.encryption.tenant if manifest.encryption else ""
    return "\0".join((tenant, manifest.name, str(manifest.release), path)).encode()
