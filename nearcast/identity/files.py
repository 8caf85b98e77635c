"""Small files that must be whole or absent, and keys that only their owner may read."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

KEY_MODE = 0o600
PUBLIC_MODE = 0o644
FOLDER_MODE = 0o700


def write_file(path: Path, data: bytes, *, mode: int = PUBLIC_MODE) -> None:
    """Replace a file atomically and durably; it never exists with a wider mode than `mode`, not even for an instant."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)  # the umask may have taken bits away
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def make_folder(path: Path) -> None:
    """Create a folder for keys, closed to others; an existing one keeps its mode."""
    path.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
