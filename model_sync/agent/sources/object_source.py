"""A repository in an object store such as S3. Needs the extra `s3`; the store's library is imported on first use.

Credentials and endpoint come from the environment, as for every client of such a store: AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from model_sync.agent.sources.source import Source, StatusError
from nearcast.errors import Code, MeshError

if TYPE_CHECKING:
    from obstore.store import S3Store

PIECE_SIZE_BYTES = 256 * 1024
"""Asked for at once: one chunk, so that a newer intent never waits for more."""


class ObjectSource(Source):
    """The objects below `s3://bucket/prefix`.

    Args:
        url: bucket and prefix.
        timeout_s: for one request of at most `PIECE_SIZE_BYTES`.

    Raises:
        MeshError: INVALID_REQUEST if the address or the environment is of no use, UNSUPPORTED without the extra.
    """

    def __init__(self, url: str, *, connect_timeout_s: float, timeout_s: float) -> None:
        self.url = url.rstrip("/")
        self._aborted = False
        self._store = _open_store(self.url, connect_timeout_s=connect_timeout_s, timeout_s=timeout_s)

    def get(
        self, path: str, *, start: int = 0, end: int | None = None, timeout_s: float
    ) -> tuple[int, Iterator[bytes]]:
        """As `Source.get`; the timeout is that of the constructor."""
        del timeout_s
        self._aborted = False
        name = unquote(path.lstrip("/"))
        size = int(self._ask("head", name)["size"])
        return start, self._pieces(name, start, size if end is None else min(end, size))

    def abort(self) -> None:
        """As `Source.abort`; it takes effect at the next piece."""
        self._aborted = True

    def close(self) -> None:
        """As `Source.close`; the library keeps its own connections."""

    def _pieces(self, name: str, start: int, end: int) -> Iterator[bytes]:
        for offset in range(start, end, PIECE_SIZE_BYTES):
            if self._aborted:
                raise MeshError(Code.CANCELLED, "The download was stopped.")
            yield bytes(self._ask("get_range", name, start=offset, end=min(end, offset + PIECE_SIZE_BYTES)))

    def _ask(self, verb: str, name: str, **options: int) -> Any:
        from obstore import exceptions

        try:
            return getattr(self._store, verb)(name, **options)
        except FileNotFoundError:
            raise StatusError(f"{self.url}/{name}", 404) from None
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError):
            raise StatusError(f"{self.url}/{name}", 403) from None
        except (exceptions.BaseError, OSError, ValueError) as error:
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise MeshError(Code.UNAVAILABLE, f"{self.url} cannot be read: {reason}.") from error


def _open_store(url: str, *, connect_timeout_s: float, timeout_s: float) -> S3Store:
    parts = urlsplit(url)
    if parts.scheme != "s3" or not parts.netloc:
        raise MeshError(Code.INVALID_REQUEST, f"{url!r} is no address of a bucket: s3://<bucket>/<prefix>.")
    try:
        from obstore import exceptions
        from obstore.store import S3Store
    except ImportError as error:
        raise MeshError(
            Code.UNSUPPORTED, f'{url} needs the package obstore; install it with: pip install "nearcast[s3]".'
        ) from error
    try:
        return S3Store(
            parts.netloc,
            prefix=parts.path.strip("/") or None,
            client_options={
                "allow_http": True,
                "connect_timeout": timedelta(seconds=connect_timeout_s),
                "timeout": timedelta(seconds=timeout_s),
            },
            retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=timeout_s)},
        )
    except (exceptions.BaseError, ValueError) as error:
        raise MeshError(Code.INVALID_REQUEST, f"{url} cannot be used: {error}.") from error
