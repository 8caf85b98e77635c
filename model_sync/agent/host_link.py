"""Talking to the model host over its Unix socket: one JSON object per line, one connection per question."""

from __future__ import annotations

import asyncio

import msgspec

from nearcast.errors import Code, MeshError

POLL_S = 0.02
"""Between two questions while a version is loading."""
UNREACHABLE_S = 3.0
"""How long a host may be away, because it restarts, before the activation is put off."""


class VersionState(msgspec.Struct, frozen=True, kw_only=True):
    """One version as the host reports it; unknown fields are ignored, since the host may be newer."""

    release: int
    state: str
    error: str = ""
    requests: int = 0
    errors: int = 0
    latency: dict[str, int] = {}
    compared: int = 0
    disagreed: int = 0


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    ok: bool
    error: str = ""
    versions: tuple[VersionState, ...] = ()


class HostLink:
    """The model host of this node; with an empty path there is none, and everything counts as loaded."""

    def __init__(self, path: str, *, answer_bytes_max: int) -> None:
        self._path = path
        self._answer_bytes_max = answer_bytes_max

    @property
    def present(self) -> bool:
        """Whether there is a host to tell."""
        return bool(self._path)

    async def ask(self, operation: str, model: str, *, timeout_s: float) -> dict[int, VersionState]:
        """One question; the versions by release.

        Raises:
            MeshError: UNAVAILABLE if the host is away, slow or does not understand.
        """
        try:
            async with asyncio.timeout(timeout_s):
                reader, writer = await asyncio.open_unix_connection(self._path, limit=self._answer_bytes_max)
                try:
                    writer.write(msgspec.json.encode({"op": operation, "model": model}) + b"\n")
                    await writer.drain()
                    line = await reader.readline()
                finally:
                    writer.close()
            answer = msgspec.json.decode(line, type=_Answer)
        except TimeoutError:
            raise MeshError(Code.UNAVAILABLE, f"The model host did not answer within {timeout_s:g} s.") from None
        except (OSError, ValueError) as error:
            raise MeshError(Code.UNAVAILABLE, f"The model host does not answer ({error}).") from error
        if not answer.ok:
            raise MeshError(Code.UNAVAILABLE, f"The model host refused: {answer.error}")
        return {version.release: version for version in answer.versions}

    async def follow_pointer(self, model: str, release: int | None, *, timeout_s: float) -> VersionState | None:
        """Make the host read the pointer and wait until `release` is hot; None if there is nothing to wait for.

        Raises:
            MeshError: UNTRUSTED if the host failed to load it, UNAVAILABLE if the host stays away.
        """
        if not self.present:
            return None
        operation, deadline = "refresh", asyncio.get_running_loop().time() + timeout_s
        away_until = asyncio.get_running_loop().time() + UNREACHABLE_S
        while True:
            now = asyncio.get_running_loop().time()
            try:
                versions = await self.ask(operation, model, timeout_s=max(0.1, deadline - now))
            except MeshError:
                if asyncio.get_running_loop().time() >= min(away_until, deadline):
                    raise
                operation = "refresh"
                await asyncio.sleep(5 * POLL_S)
                continue
            if release is None:
                return None
            operation, found = "stats", versions.get(release)
            if found is not None and found.state == "hot":
                return found
            if found is not None and found.state == "failed":
                raise MeshError(Code.UNTRUSTED, f"the model host could not load it: {found.error or 'no reason given'}")
            await asyncio.sleep(POLL_S)
