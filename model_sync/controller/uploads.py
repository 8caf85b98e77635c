"""Blobs on their way in: bounded, checked while they stream, visible only when whole and durable."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import secrets
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Protocol, TypeAlias

from model_sync.controller.config import SyncLimits
from model_sync.repository.layout import blob_path
from nearcast.durable import move_file
from nearcast.errors import Code, MeshError

SHA256 = re.compile(r"[0-9a-f]{64}")
RETRY_AFTER_MS = 1_000

Check: TypeAlias = Callable[[Path, str], None]


class Content(Protocol):
    """A request's body as it arrives."""

    async def readany(self) -> bytes:
        """The next bytes; empty at the end."""
        ...


class Uploads:
    """Receives blobs into a repository folder."""

    def __init__(self, folder: Path, limits: SyncLimits) -> None:
        self._folder = folder
        self._limits = limits
        self._running = 0

    async def receive(self, sha256: str, size_bytes: int | None, content: Content) -> None:
        """Take one blob.

        Raises:
            MeshError: TOO_LARGE, OVERLOADED, DEADLINE if it stalls, UNTRUSTED if its bytes are not what its name says.
        """
        if not SHA256.fullmatch(sha256):
            raise MeshError(Code.INVALID_REQUEST, "A blob is named by its SHA-256, 64 hexadecimal digits.")

        def check(_: Path, digest: str) -> None:
            if digest != sha256:
                raise MeshError(Code.UNTRUSTED, "The bytes of the blob do not have the digest that it is named by.")

        await self.store(self._folder / blob_path(sha256), size_bytes, content, self._limits.blob_size_bytes_max, check)

    async def store(
        self, target: Path, size_bytes: int | None, content: Content, size_bytes_max: int, check: Check
    ) -> None:
        """Take one file: it appears as `target`, durable, once `check` has looked at all of it.

        Args:
            target: its final place; missing folders are made.
            size_bytes: as announced, if it was.
            content: the body.
            size_bytes_max: more is refused, whatever was announced.
            check: raises for what must not appear; called in a thread with the path of the draft and its digest.

        Raises:
            MeshError: TOO_LARGE, OVERLOADED, DEADLINE if it stalls, whatever `check` raises.
        """
        if size_bytes is not None and size_bytes > size_bytes_max:
            raise _too_large(size_bytes_max)
        if self._running >= self._limits.uploads_max:
            raise MeshError(Code.OVERLOADED, "Too many uploads at once; try again.", retry_after_ms=RETRY_AFTER_MS)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
        self._running += 1
        try:
            digest = await self._write(temporary, content, size_bytes_max)
            await asyncio.to_thread(check, temporary, digest)
            await asyncio.to_thread(move_file, temporary, target)
        finally:
            self._running -= 1
            temporary.unlink(missing_ok=True)

    async def _write(self, temporary: Path, content: Content, size_bytes_max: int) -> str:
        digest, size_bytes = hashlib.sha256(), 0
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        with os.fdopen(descriptor, "wb") as file:
            async for piece in self._pieces(content):
                size_bytes += len(piece)
                if size_bytes > size_bytes_max:
                    raise _too_large(size_bytes_max)
                digest.update(piece)
                file.write(piece)
            file.flush()
            await asyncio.to_thread(os.fsync, file.fileno())
        return digest.hexdigest()

    async def _pieces(self, content: Content) -> AsyncIterator[bytes]:
        while True:
            try:
                async with asyncio.timeout(self._limits.upload_stall_s):
                    piece = await content.readany()
            except TimeoutError as error:
                raise MeshError(Code.DEADLINE, "The upload stalled; start it again.") from error
            if not piece:
                return
            yield piece


def _too_large(size_bytes_max: int) -> MeshError:
    return MeshError(Code.TOO_LARGE, f"The upload is larger than {size_bytes_max} bytes.")
