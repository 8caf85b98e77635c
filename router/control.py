"""A node's side of the control API: asks who is there, says who we are. Never in the way of a request."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from nearcast.errors import Code, MeshError
from nearcast.identity import Identity, client_tls, require_role, tls_error

if TYPE_CHECKING:
    import aiohttp

TIMEOUT_S = 5.0
ANSWER_SIZE_BYTES_MAX = 4 * 1024 * 1024
CONTROL_FILE = "control"


class Control(Protocol):
    """What the directory needs of the control API."""

    async def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """One JSON request."""
        ...


class ControlLink:
    """mTLS connections to the sync process. Made on demand; lives on one event loop.

    The controller looks at the certificate with which a connection was opened. So a renewed one needs new connections;
    the former are closed at the renewal after that, when nothing can be in flight on them any more.
    """

    def __init__(self, url: str, identity: Identity) -> None:
        self._url = url.rstrip("/")
        self._identity = identity
        self._session: aiohttp.ClientSession | None = None
        self._former: aiohttp.ClientSession | None = None
        self._is_stale = False
        identity.on_reload(self, ControlLink._mark_stale)

    async def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send a JSON request; answers the JSON object of the reply.

        Raises:
            MeshError: what the controller said; UNAVAILABLE if it cannot be reached.
        """
        import aiohttp

        session = await self._open()
        try:
            async with session.request(method, self._url + path, json=body, allow_redirects=False) as response:
                data = await response.content.read(ANSWER_SIZE_BYTES_MAX + 1)
                while not response.content.at_eof() and len(data) <= ANSWER_SIZE_BYTES_MAX:
                    data += await response.content.read(ANSWER_SIZE_BYTES_MAX)
                status = response.status
        except aiohttp.ClientConnectorCertificateError as error:
            told = tls_error(error.certificate_error, self._url)  # a wrong clock is named, which mends it
            raise MeshError(Code.UNAVAILABLE, told.message) from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            reason = str(error) or type(error).__name__
            raise MeshError(Code.UNAVAILABLE, f"The controller at {self._url} cannot be reached: {reason}.") from error
        return _decode(status, data)

    async def close(self) -> None:
        """Close the connections."""
        sessions, self._session, self._former = (self._session, self._former), None, None
        for session in sessions:
            if session is not None:
                await session.close()

    def _mark_stale(self) -> None:
        self._is_stale = True

    async def _open(self) -> aiohttp.ClientSession:
        import aiohttp

        if self._is_stale:
            self._is_stale = False
            last, self._former, self._session = self._former, self._session, None
            if last is not None:
                await last.close()
        if self._session is None:
            tls = client_tls(self._identity, ca=self._identity.ca, alpn=("http/1.1",))
            self._session = aiohttp.ClientSession(
                connector=_connector(tls), timeout=aiohttp.ClientTimeout(total=TIMEOUT_S)
            )
        return self._session


def find_control(identity: Path, control: str = "") -> str:
    """The controller's URL: the one given, else the one that the identity's folder names; "" if neither is there."""
    if control:
        return control
    try:
        return (identity / CONTROL_FILE).read_text().strip()
    except OSError:
        return ""


def _connector(tls: ssl.SSLContext) -> aiohttp.TCPConnector:
    import aiohttp
    from aiohttp.connector import Connection

    class SyncOnly(aiohttp.TCPConnector):
        """Speaks to the role `sync` only: any node has a certificate of the mesh, but only one is the controller."""

        async def connect(self, *args: Any, **options: Any) -> Connection:
            connection = await super().connect(*args, **options)
            transport = connection.transport
            try:
                require_role(None if transport is None else transport.get_extra_info("peercert"), ("sync",))
            except MeshError as error:
                connection.close()
                raise OSError(error.message) from error
            return connection

    return SyncOnly(ssl=tls, limit=4)


def _decode(status: int, data: bytes) -> dict[str, Any]:
    if len(data) > ANSWER_SIZE_BYTES_MAX:
        raise MeshError(Code.TOO_LARGE, f"The controller answered more than {ANSWER_SIZE_BYTES_MAX} bytes.")
    try:
        answer = msgspec.json.decode(data, type=dict[str, Any]) if data else {}
    except msgspec.DecodeError as error:
        raise MeshError(Code.UNAVAILABLE, "The controller's answer is no JSON object.") from error
    if status >= 400:
        code = str(answer.get("code", ""))
        known = Code(code) if code in Code.__members__ else Code.UNAVAILABLE
        raise MeshError(known, str(answer.get("error") or f"The controller answered with status {status}."))
    return answer
