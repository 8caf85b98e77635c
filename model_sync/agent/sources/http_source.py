"""Blocking downloads from one origin over one kept connection, bounded in time from the first byte to the last.

Used in worker threads. Nothing here is trusted: who asks checks every byte against signed digests.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from model_sync.agent.sources.source import Source, StatusError
from nearcast.errors import Code, MeshError
from nearcast.identity import require_role, tls_error

READ_SIZE_BYTES = 64 * 1024
KEPT_SIZE_BYTES_MAX = 16 * 1024
"""A file up to this size that may change is asked for by its ETag the next time: an idle poll is mostly that."""
ETAG_SIZE_BYTES_MAX = 128
USER_AGENT = "nearcast-agent"


class HttpSource(Source):
    """One origin such as `https://sync:9443/repository`. One request at a time; `abort` may come from any thread.

    Args:
        url: scheme, host and a path that all requests begin with.
        tls: makes the context of a new connection; used for https alone.
        connect_timeout_s: for the connection and its handshake.
        roles: mesh roles of which the server's certificate must name one; () = a server outside the mesh.
    """

    def __init__(
        self,
        url: str,
        *,
        tls: Callable[[], ssl.SSLContext] | None,
        connect_timeout_s: float,
        roles: tuple[str, ...] = ("sync",),
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise MeshError(Code.INVALID_REQUEST, f"{url!r} is no http or https address of a repository.")
        if parts.scheme == "https" and tls is None:
            raise MeshError(Code.UNAUTHENTICATED, f"{url} needs the mesh CA: set `identity` to the node's folder.")
        self.url = url.rstrip("/")
        self._secure = parts.scheme == "https"
        self._host, self._port = parts.hostname, parts.port or (443 if self._secure else 80)
        self._prefix = parts.path.rstrip("/")
        self._tls = tls
        self._roles = roles
        self._connect_timeout_s = connect_timeout_s
        self._connection: http.client.HTTPConnection | None = None
        self._socket: socket.socket | None = None
        self._aborted = threading.Event()
        self._kept = _Kept()

    def get(
        self, path: str, *, start: int = 0, end: int | None = None, timeout_s: float
    ) -> tuple[int, Iterator[bytes]]:
        """As `Source.get`."""
        self._aborted.clear()
        headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity"}
        if start or end is not None:
            headers["Range"] = f"bytes={start}-" if end is None else f"bytes={start}-{end - 1}"
        elif path == self._kept.path:
            headers["If-None-Match"] = self._kept.etag
        response = self._request(f"{self._prefix}/{path.lstrip('/')}", headers, timeout_s)
        if response.status == 304 and "If-None-Match" in headers:
            self._finish(response)
            return 0, iter((self._kept.data,))
        if response.status not in (200, 206):
            retry_s = _retry_after_s(response.getheader("Retry-After", ""))
            self._finish(response)
            raise StatusError(f"{self.url}/{path.lstrip('/')}", response.status, retry_s=retry_s)
        begin = start if response.status == 206 else 0
        if response.status == 206 and not response.getheader("Content-Range", "").startswith(f"bytes {start}-"):
            self.close()
            raise MeshError(Code.UNAVAILABLE, f"{self.url} answered with another range than the one asked for.")
        pieces = self._pieces(response, timeout_s)
        return begin, self._keep(path, response, pieces) if response.status == 200 else pieces

    def abort(self) -> None:
        """As `Source.abort`; the next request connects anew."""
        self._aborted.set()
        sock = self._socket
        if sock is not None:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """As `Source.close`."""
        connection, self._connection, self._socket = self._connection, None, None
        if connection is not None:
            connection.close()

    def _request(self, target: str, headers: dict[str, str], timeout_s: float) -> http.client.HTTPResponse:
        kept = self._connection is not None
        try:
            return self._send(target, headers, timeout_s)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            # A kept connection may have been closed by the server meanwhile: that says nothing about the server.
            stale = isinstance(error, (http.client.RemoteDisconnected, ConnectionError, http.client.CannotSendRequest))
            if kept and stale and not self._aborted.is_set():
                with self._explained():
                    return self._send(target, headers, timeout_s)
            raise self._explain(error) from error

    def _send(self, target: str, headers: dict[str, str], timeout_s: float) -> http.client.HTTPResponse:
        connection = self._connection or self._connect()
        assert self._socket is not None
        self._socket.settimeout(timeout_s)
        connection.request("GET", target, headers=headers)
        return connection.getresponse()

    def _connect(self) -> http.client.HTTPConnection:
        timeout = self._connect_timeout_s
        if self._secure:
            assert self._tls is not None
            secure = http.client.HTTPSConnection(self._host, self._port, timeout=timeout, context=self._tls())
            try:
                secure.connect()
                if self._roles:
                    require_role(secure.sock.getpeercert(), self._roles)
            except BaseException:
                secure.close()
                raise
            self._connection = secure
        else:
            self._connection = http.client.HTTPConnection(self._host, self._port, timeout=timeout)
            self._connection.connect()
        self._socket = self._connection.sock
        return self._connection

    def _pieces(self, response: http.client.HTTPResponse, timeout_s: float) -> Iterator[bytes]:
        connection, complete = self._connection, False
        try:
            with self._explained():
                while True:
                    if self._socket is not None:
                        self._socket.settimeout(timeout_s)
                    piece = response.read1(READ_SIZE_BYTES)
                    if not piece:
                        break
                    yield piece
                if response.length:
                    raise http.client.IncompleteRead(b"", response.length)
                complete = True
        finally:
            if complete and not response.will_close:
                response.close()
            elif connection is self._connection:
                self.close()
            elif connection is not None:
                connection.close()  # given up long ago and only now collected: by now there is another one

    def _keep(self, path: str, response: http.client.HTTPResponse, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """Pass the pieces on, and remember them if the file is small, whole and may be asked for again."""
        etag, control = response.getheader("ETag", ""), response.getheader("Cache-Control", "")
        fits = response.length is not None and response.length <= KEPT_SIZE_BYTES_MAX
        if not fits or "immutable" in control or not 0 < len(etag) <= ETAG_SIZE_BYTES_MAX or not etag.isprintable():
            yield from pieces
            return
        data = bytearray()
        for piece in pieces:
            data += piece
            yield piece
        self._kept = _Kept(path, etag, bytes(data))

    def _finish(self, response: http.client.HTTPResponse) -> None:
        """Keep the connection after a refusal if its body is short, as a 404 of every check is."""
        if response.length is not None and response.length <= READ_SIZE_BYTES and not response.will_close:
            with suppress(OSError, http.client.HTTPException):
                response.read()
                return
        self.close()

    def _explained(self) -> _Explained:
        return _Explained(self)

    def _explain(self, error: Exception) -> MeshError:
        if self._aborted.is_set():
            return MeshError(Code.CANCELLED, "The download was stopped.")
        if isinstance(error, MeshError):
            return error
        if isinstance(error, TimeoutError):
            return MeshError(Code.UNAVAILABLE, f"{self.url} is too slow: nothing came within the timeout.")
        if isinstance(error, http.client.HTTPException):
            return MeshError(Code.UNAVAILABLE, f"{self.url} broke the connection in the middle of an answer.")
        return tls_error(error, self.url)


@dataclass(frozen=True, slots=True)
class _Kept:
    """The last small file that may change. Who says that it has not can only delay, as by sending it again."""

    path: str = ""
    etag: str = ""
    data: bytes = b""


class _Explained:
    """Turns what sockets raise into one sentence, and drops the connection that raised it."""

    def __init__(self, source: HttpSource) -> None:
        self._source = source

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (OSError, http.client.HTTPException, ValueError)):
            self._source.close()
            raise self._source._explain(error) from error  # noqa: SLF001 (one idea in two classes)


def _retry_after_s(header: str) -> float:
    """Seconds of a `Retry-After` header, which holds seconds or a date; 0 if it says nothing usable."""
    if header.isascii() and header.isdecimal() and len(header) < 10:
        return float(header)
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0
