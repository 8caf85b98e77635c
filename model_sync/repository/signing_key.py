"""A signing key in a file of its own, which only its owner can read."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]

from nearcast.durable import write_file
from nearcast.errors import Code, MeshError

KEY_MODE = 0o600


def write_key(path: Path, signer: CryptoSigner) -> None:
    """Keep a signing key in a file of its own that only its owner can read."""
    write_file(path, signer.private_bytes, mode=KEY_MODE)


def load_key(path: Path) -> CryptoSigner:
    """Read a signing key.

    Raises:
        MeshError: FORBIDDEN if the file is missing, readable by others, or no Ed25519 key.
    """
    try:
        if path.stat().st_mode & 0o077:
            raise MeshError(Code.FORBIDDEN, f"The key {path.name} can be read by others; run: chmod 600 {path}")
        return CryptoSigner(load_pem_private_key(path.read_bytes(), password=None))
    except FileNotFoundError as error:
        raise MeshError(Code.FORBIDDEN, f"The key {path.name} is not here; it is needed to sign.") from error
    except (OSError, ValueError, TypeError) as error:
        raise MeshError(Code.FORBIDDEN, f"The key {path.name} cannot be read as a private key.") from error
