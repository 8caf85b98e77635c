"""The operator's side of the control API: blocking, one connection, light enough for a rollback in a hurry."""

from __future__ import annotations

import http.client
import io
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeAlias
from urllib.parse import urlsplit

from nearcast.errors import Code, MeshError
from nearcast.identity import client_tls, load_identity, renew, require_role, tls_error

TIMEOUT_S = 30.0
ANSWER_SIZE_BYTES_MAX = 16 * 1024 * 1024
BLOCK_SIZE_BYTES = 256 * 1024

Progress: TypeAlias = Callable[[int], None]
"""Called with the number of bytes just sent."""


class ControlClient:
    """One operator's connection to the sync process. Close it, or use it in a `with` statement."""

    def __init__(self, control: str, identity: Path) -> None:
        parts = urlsplit(control)
        if parts.scheme != "https" or not parts.hostname:
            raise MeshError(
                Code.INVALID_REQUEST, f"{control!r} is no control address; it looks like https://host:port."
            )
        self.control = control.rstrip("/")
        self._identity = load_identity(identity)
        context = client_tls(self._identity, ca=self._identity.ca, alpn=("http/1.1",))
        self._connection = http.client.HTTPSConnection(
            parts.hostname, parts.port, timeout=TIMEOUT_S, context=context, blocksize=BLOCK_SIZE_BYTES
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Send a JSON request; answers the JSON object of the reply.

        Raises:
            MeshError: what the controller said, UNAVAILABLE if it cannot be reached.
        """
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} if data is not None else {}
        status, answer = self._exchange(method, path, data, headers)
        decoded = _decode(answer)
        if status >= http.client.BAD_REQUEST:
            raise _said(status, decoded)
        return decoded

    def get_bytes(self, path: str) -> tuple[int, bytes]:
        """Status and body of a GET."""
        return self._exchange("GET", path, None, {})

    def has(self, path: str, size_bytes: int) -> bool:
        """Whether the repository holds a file of that size."""
        self._connect()
        response = self._begin("HEAD", path, None, {})
        response.read()
        return response.status == http.client.OK and response.getheader("Content-Length") == str(size_bytes)

    def get_file(self, path: str, file: Path, size_bytes: int) -> None:
        """Download a file of exactly that size; what it holds is for the caller to check.

        Raises:
            MeshError: UNAVAILABLE if it is not there or of another size.
        """
        self._connect()
        response = self._begin("GET", path, None, {})
        if response.status != http.client.OK or response.getheader("Content-Length") != str(size_bytes):
            self.close()
            raise MeshError(Code.UNAVAILABLE, f"The repository has no {path} of {size_bytes} bytes.")
        try:
            with file.open("wb") as opened:
                shutil.copyfileobj(response, opened, BLOCK_SIZE_BYTES)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise MeshError(Code.UNAVAILABLE, f"The download of {path} broke off ({error}).") from error

    def put_file(self, path: str, file: Path, progress: Progress) -> None:
        """Upload one file.

        Raises:
            MeshError: what the controller said about it.
        """
        with file.open("rb") as opened:
            self._put(path, opened, file.stat().st_size, progress)

    def put_bytes(self, path: str, data: bytes, progress: Progress) -> None:
        """Upload what is in memory.

        Raises:
            MeshError: what the controller said about it.
        """
        self._put(path, io.BytesIO(data), len(data), progress)

    def _put(self, path: str, content: BinaryIO, size_bytes: int, progress: Progress) -> None:
        headers = {"Content-Length": str(size_bytes), "Content-Type": "application/octet-stream"}
        status, answer = self._exchange("PUT", path, _Counted(content, progress), headers)
        if status >= http.client.BAD_REQUEST:
            raise _said(status, _decode(answer))

    def _exchange(self, method: str, path: str, body: Any, headers: Mapping[str, str]) -> tuple[int, bytes]:
        self._connect()
        response = self._begin(method, path, body, headers)
        data = response.read(ANSWER_SIZE_BYTES_MAX + 1)
        if len(data) > ANSWER_SIZE_BYTES_MAX:
            self.close()
            raise MeshError(Code.TOO_LARGE, f"The controller answered more than {ANSWER_SIZE_BYTES_MAX} bytes.")
        return response.status, data

    def _connect(self) -> None:
        if self._connection.sock is not None:
            return
        try:
            self._connection.connect()
        except OSError as error:
            self._identity.validity().require(time.time())
            raise tls_error(error, self.control) from error
        require_role(self._connection.sock.getpeercert(), ("sync",))  # type: ignore[attr-defined]

    def _begin(self, method: str, path: str, body: Any, headers: Mapping[str, str]) -> http.client.HTTPResponse:
        try:
            self._connection.request(method, path, body, headers)
            return self._connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            self.close()
            self._identity.validity().require(time.time())
            raise MeshError(
                Code.UNAVAILABLE, f"The controller at {self.control} broke the connection ({error}).", sent=True
            ) from error


class _Counted:
    """A file that reports what was read from it."""

    def __init__(self, file: BinaryIO, progress: Progress) -> None:
        self._file = file
        self._progress = progress

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._progress(len(data))
        return data


def find_control(operator: Path, control: str = "") -> str:
    """The controller's address: the one given, else the one that the operator's folder names.

    Raises:
        MeshError: UNAVAILABLE if neither is there.
    """
    if control:
        return control
    try:
        return (operator / "control").read_text().strip()
    except OSError as error:
        raise MeshError(
            Code.UNAVAILABLE,
            f"{operator} names no controller. Start `nearcast sync` once on this machine, or give --control URL; "
            "keys come from `nearcast keys init`.",
        ) from error


def connect(home: Path, control: str = "", *, keep_fresh: bool = True) -> ControlClient:
    """A client for the operator of `home`. `keep_fresh` renews a certificate of which two thirds are over."""
    operator = home / "operator"
    folder = operator / "identity"
    if not folder.is_dir():
        raise MeshError(
            Code.UNAUTHENTICATED, f"{home} holds no operator; give --home DIR, or make one: nearcast keys init."
        )
    address = find_control(operator, control)
    if keep_fresh and load_identity(folder).validity().renew_at < time.time() and (folder / "control").exists():
        try:
            renew(folder)
        except MeshError:
            # The present certificate may still do; if it does not, the call itself says so.
            return ControlClient(address, folder)
    return ControlClient(address, folder)


def _decode(data: bytes) -> dict[str, Any]:
    try:
        decoded = json.loads(data) if data else {}
    except ValueError:
        return {}
    return decoded if isinstance(decoded, dict) else {}


def _said(status: int, answer: Mapping[str, Any]) -> MeshError:
    code = str(answer.get("code", ""))
    known = Code(code) if code in Code.__members__ else Code.UNAVAILABLE
    return MeshError(known, str(answer.get("error") or f"The controller answered with status {status}."))
