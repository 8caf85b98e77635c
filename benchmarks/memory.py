"""A folder in memory, where an fsync costs nothing."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MEMORY_FOLDER = Path("/dev/shm")


@contextmanager
def memory_folder() -> Iterator[Path]:
    """A new folder in memory; on the disk if there is none."""
    base = MEMORY_FOLDER if MEMORY_FOLDER.is_dir() else None
    home = Path(tempfile.mkdtemp(prefix="nearcast-crash-", dir=base))
    try:
        yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)
