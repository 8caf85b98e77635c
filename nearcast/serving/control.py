"""The host's control socket: one JSON object a line, for the agent and the operator on this machine.

```
{"op": "refresh", "model": "digits", "wait_s": 30}   -> {"ok": true, "model": "digits", "versions": [...]}
{"op": "stats", "model": "digits"}                   -> the same without refreshing
{"op": "load", "model": "digits"}                    -> the same, once it is in memory to stay; "unload" undoes it
{"op": "models"}                                     -> {"ok": true, "models": [{"model": ..., "versions": [...]}]}
anything else                                        -> {"ok": false, "error": "..."}
```
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import stat
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from nearcast.errors import Code, MeshError
from nearcast.serving.host import ModelHost

_LOG = logging.getLogger(__name__)
LINE_SIZE_BYTES_MAX = 64 * 1024
CONNECTIONS_MAX = 8
WAIT_S_MAX = 600.0


class ControlRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One line. After `wait_s` a refresh or load answers with what is still loading; the loading goes on."""

    op: Literal["refresh", "stats", "models", "load", "unload"]
    model: str = ""
    wait_s: Annotated[float, msgspec.Meta(ge=0, le=WAIT_S_MAX)] = 30.0


class ControlSocket:
    """A Unix socket that only this user may open."""

    def __init__(self, host: ModelHost, path: Path) -> None:
        self._host = host
        self._path = path
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        """Listen. A socket file that nobody answers on is replaced.

        Raises:
            MeshError: UNAVAILABLE if another process answers on it, INVALID_REQUEST if the path cannot be bound.
        """
        _require_free(self._path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # The mask is the process's: nothing may be awaited in between.
            mask = os.umask(0o177)
            try:
                listener.bind(str(self._path))
            finally:
                os.umask(mask)
            listener.settimeout(0.0)
            self._server = await asyncio.start_unix_server(self._serve, sock=listener, limit=LINE_SIZE_BYTES_MAX)
        except OSError as error:
            listener.close()
            raise MeshError(
                Code.INVALID_REQUEST, f"The control socket cannot be bound ({error}); use a shorter data directory."
            ) from error

    async def close(self) -> None:
        """Stop listening, drop the connections, remove the file."""
        if self._server is None:
            return
        self._server.close()
        for writer in list(self._open):
            writer.close()
        await self._server.wait_closed()
        self._server = None
        self._path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._open) >= CONNECTIONS_MAX:
            writer.write(_error("Too many control connections are open."))
            writer.close()
            return
        self._open.add(writer)
        try:
            while line := await _read_line(reader):
                writer.write(await self._answer(line))
                await writer.drain()
        except ValueError:
            writer.write(_error(f"A line may have at most {LINE_SIZE_BYTES_MAX} bytes."))
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._open.discard(writer)
            writer.close()

    async def _answer(self, line: bytes) -> bytes:
        try:
            request = msgspec.json.decode(line, type=ControlRequest)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            return _error(f"The line is no control request: {error}.")
        try:
            answer = await self._obey(request)
        except MeshError as error:
            return _error(error.message)
        except Exception:  # noqa: BLE001 - one bad request must not take the control socket away
            _LOG.exception("control request %s failed", request.op)
            return _error("The host failed to do this; its log says why.")
        return msgspec.json.encode({"ok": True, **answer}) + b"\n"

    async def _obey(self, request: ControlRequest) -> dict[str, Any]:
        host = self._host
        if request.op in ("refresh", "load"):
            doing = host.load(request.model) if request.op == "load" else host.refresh(request.model or None)
            try:
                async with asyncio.timeout(request.wait_s):
                    await doing
            except TimeoutError:
                _LOG.info("%s of %r still runs after %g s", request.op, request.model, request.wait_s)
        if request.op == "unload":
            await host.unload(request.model)
        if request.model and request.op != "models":
            return {"model": request.model, "versions": host.status(request.model)}
        return {"models": [{"model": name, "versions": host.status(name)} for name in host.models()]}


def ask(path: Path, request: ControlRequest, *, timeout_s: float = 35.0) -> dict[str, Any]:
    """Send one request to a control socket and return the answer. Blocks.

    Raises:
        MeshError: UNAVAILABLE if no host answers there, or what the host refused.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout_s)
            connection.connect(str(path))
            connection.sendall(msgspec.json.encode(request) + b"\n")
            with connection.makefile("rb") as lines:
                line = lines.readline(64 * LINE_SIZE_BYTES_MAX)
        answer = msgspec.json.decode(line, type=dict[str, Any])
    except (OSError, msgspec.DecodeError) as error:
        raise MeshError(
            Code.UNAVAILABLE, "No model host answers on this control socket; is the node running?"
        ) from error
    if not answer.get("ok"):
        raise MeshError(Code.INTERNAL, str(answer.get("error", "The host gave no reason.")))
    return answer


async def _read_line(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\n")
    except asyncio.IncompleteReadError as error:
        return error.partial
    except asyncio.LimitOverrunError as error:
        raise ValueError(str(error)) from error


def _error(text: str) -> bytes:
    return msgspec.json.encode({"ok": False, "error": text}) + b"\n"


def _require_free(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise MeshError(Code.INVALID_REQUEST, "The path of the control socket is taken by another file.")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)
            return
    raise MeshError(Code.UNAVAILABLE, "Another node runs on this data directory; stop it first.")
