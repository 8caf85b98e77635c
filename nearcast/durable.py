"""Files that are either wholly there or not there at all, whatever happens to the power."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make `folder` and what it lies in, durably.

    One that is there may be the work of a process that was killed before its fsync, so its name is made durable again:
    that costs nothing if it already is.
    """
    missing = [place for place in (folder, *folder.parents) if not place.is_dir()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in missing or [folder]:
        sync_folder(place.parent)


def write_file(path: Path, data: bytes | Iterable[bytes], *, mode: int = 0o644) -> None:
    """Replace `path` by `data`: write beside it, fsync, rename, fsync the folder. Missing folders are made.

    Of pieces, `path` sees nothing if one of them raises.
    """
    if not path.parent.is_dir():
        make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        move_file(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def move_file(source: Path, target: Path) -> None:
    """Give a file, already synced, its final name."""
    source.replace(target)
    sync_folder(target.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove what writes cut short have left behind in `folder`."""
    for leftover in folder.rglob(".*.tmp"):
        leftover.unlink(missing_ok=True)
