"""Measuring versions beside the serving: in a child of the lowest priority, one after the other."""

from __future__ import annotations

import asyncio
import logging
from asyncio.subprocess import DEVNULL, PIPE, Process
from contextlib import suppress
from pathlib import Path

from nearcast.serving.gate_child import gate_environment
from nearcast.serving.profile import Setting
from nearcast.serving.tuning import Profiles, tune_command
from nearcast.store import Manifest, Store

_LOG = logging.getLogger(__name__)
TIMEOUT_S = 300.0
ERROR_CHARS_MAX = 500


class Tuner:
    """Knows the profiles of a node, and makes those that are missing. Lives on one loop.

    Args:
        store: where versions lie; the profiles lie beside it.
        concurrency: runs at the same time, as the node allows them.
        tenant_keys: folder of the keys that open sealed versions.
    """

    def __init__(self, store: Store, *, concurrency: int, tenant_keys: Path | None = None) -> None:
        self.profiles = Profiles.beside(store.root)
        self._store = store
        self._concurrency = concurrency
        self._tenant_keys = tenant_keys
        self._turn = asyncio.Lock()
        self._child: Process | None = None
        self._closed = False

    async def measure(self, manifest: Manifest) -> Setting | None:
        """What a new profile advises; None if there is one already, or the version could not be measured."""
        async with self._turn:
            if self._closed or self.profiles.find(manifest) is not None:
                return None
            command = tune_command(
                self._store.folder(manifest.name, manifest.release),
                self.profiles.folder,
                concurrency=self._concurrency,
                tenant_keys=self._tenant_keys,
            )
            self._child = await asyncio.create_subprocess_exec(
                *command, stdin=DEVNULL, stdout=DEVNULL, stderr=PIPE, env=gate_environment()
            )
            said = b""
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    _, said = await self._child.communicate()
            except TimeoutError:
                self._stop()
                await self._child.wait()
                said = b"it took too long"
            if self._child.returncode and not self._closed:
                text = said.decode("utf-8", "replace").strip()[-ERROR_CHARS_MAX:]
                _LOG.warning("%s release %d could not be measured: %s", manifest.name, manifest.release, text)
            return self.profiles.setting(manifest)

    def close(self) -> None:
        """End what is being measured."""
        self._closed = True
        self._stop()

    def _stop(self) -> None:
        if self._child is not None and self._child.returncode is None:
            with suppress(ProcessLookupError):
                self._child.kill()
