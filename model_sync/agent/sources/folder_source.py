"""A repository in a folder: a USB stick, a network drive, what `nearcast export` wrote."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from model_sync.agent.sources.source import Source, StatusError
from nearcast.errors import Code, MeshError

READ_SIZE_BYTES = 256 * 1024


class FolderSource(Source):
    """The files below `folder`; never one outside, whatever a path says. A file system that hangs cannot be timed."""

    def __init__(self, folder: Path) -> None:
        self.url = folder.absolute().as_uri()
        self._folder = folder
        self._aborted = False

    def get(
        self, path: str, *, start: int = 0, end: int | None = None, timeout_s: float
    ) -> tuple[int, Iterator[bytes]]:
        """As `Source.get`; an absent file is status 404, one that is no file or may not be read 403."""
        del timeout_s
        self._aborted = False
        try:
            handle = self._open(path)
        except (FileNotFoundError, NotADirectoryError):
            raise StatusError(f"{self.url}/{path}", 404) from None
        except (PermissionError, IsADirectoryError, ValueError):
            raise StatusError(f"{self.url}/{path}", 403) from None
        except OSError as error:
            raise self._unreadable(error) from error
        return start, self._pieces(handle, start, end)

    def abort(self) -> None:
        """As `Source.abort`; it takes effect at the next piece."""
        self._aborted = True

    def close(self) -> None:
        """As `Source.close`; there is no connection."""

    def _open(self, path: str) -> int:
        """Paths are percent-encoded, as those of a web server are: `unquote` gives back the one name of each part."""
        parts = [unquote(part) for part in path.lstrip("/").split("/")]
        if any(part in ("", ".", "..") or "/" in part or "\0" in part for part in parts):
            raise FileNotFoundError(path)
        # A pipe must not hold us up before we see that it is none of ours.
        handle = os.open(self._folder.joinpath(*parts), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise IsADirectoryError(path)
        return handle

    def _pieces(self, handle: int, start: int, end: int | None) -> Iterator[bytes]:
        with os.fdopen(handle, "rb") as file:
            try:
                file.seek(start)
                left = os.fstat(handle).st_size - start if end is None else end - start
                while left > 0 and (piece := file.read(min(READ_SIZE_BYTES, left))):
                    if self._aborted:
                        raise MeshError(Code.CANCELLED, "The download was stopped.")
                    left -= len(piece)
                    yield piece
            except OSError as error:
                raise self._unreadable(error) from error

    def _unreadable(self, error: OSError) -> MeshError:
        return MeshError(Code.UNAVAILABLE, f"{self.url} cannot be read: {error.strerror or error}.")
