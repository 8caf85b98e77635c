"""Verified downloads outside a running agent: for a copy of the repository, and for a repair."""

from __future__ import annotations

import threading
from pathlib import Path

from model_sync.agent.install.fetch import Download, Patience, Remote
from model_sync.agent.sources.meter import Meter
from model_sync.agent.sources.mirrors import Mirrors, SharedHealth
from model_sync.agent.sources.source import Source
from model_sync.repository.layout import blob_path
from nearcast.clock import SYSTEM_CLOCK
from nearcast.durable import make_folder
from nearcast.store.manifest import File

CHUNK_TIMEOUT_S = 30.0


def fetch_file(source: Source, remote: Remote, path: Path) -> int:
    """Complete `path` to the content that `remote` describes; returns the bytes that were received.

    Chunks that are there and right are not asked for again.

    Raises:
        MeshError: as `Download.run`.
    """
    make_folder(path.parent)
    meter = Meter(path, SYSTEM_CLOCK, bytes_per_s_max=0.0, bytes_per_day_max=0)  # unlimited, so it keeps no file
    download = Download(
        remote,
        path,
        Mirrors([source], SharedHealth(1)),
        pace=meter,
        patience=Patience(chunk_timeout_s=CHUNK_TIMEOUT_S),
        stop=threading.Event(),
    )
    download.run()
    return download.received_bytes


def blob_of(entry: File) -> Remote:
    """A file of a manifest as it lies in the repository."""
    return Remote(path=blob_path(entry.sha256), size_bytes=entry.size_bytes, sha256=entry.sha256, chunks=entry.chunks)
