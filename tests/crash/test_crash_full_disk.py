"""A file system that is really full: the node serves on, and goes on by itself once there is room."""

from __future__ import annotations

import signal
import subprocess
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from benchmarks.crash_scenario import Stage, stage
from model_sync.agent.install.steps import installed_releases
from nearcast.store import Store
from tests.integration.agent_parts import MODEL

DISK_BYTES = 4 * 1024 * 1024
MOUNT = f'mount -t tmpfs -o size={DISK_BYTES} none "$0" && exec "$@"'


def may_mount() -> bool:
    try:
        command = ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"]
        return subprocess.run(command, capture_output=True, timeout=10, check=False).returncode == 0
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return False


@pytest.mark.skipif(not may_mount(), reason="no mount namespace may be made here")
def test_a_full_disk_stops_nothing_and_room_brings_the_release(tmp_path: Path) -> None:
    with stage(tmp_path / "full") as scene:
        scene.push(padding=0)
        scene.publisher.roll(1)
        store = start_on_small_disk(scene)
        scene.agent.rests(1)
        ballast = store.parent / "ballast"

        def fill(handler: BaseHTTPRequestHandler, path: str, data: bytes) -> bool:
            if "/blobs/" in path and len(data) > 1_000_000:
                scene.origin.fault = None
                fill_disk(ballast)
            return False

        scene.origin.fault = fill
        scene.publisher.roll(scene.push(padding=1_500_000))
        scene.agent.until("it finds the disk full", lambda model: "full" in model.error)
        require_serving(store, 1)
        time.sleep(0.5)
        require_serving(store, 1)
        ballast.unlink()
        scene.agent.rests(2)
        require_serving(store, 2)
        scene.agent.end(signal.SIGTERM)


def start_on_small_disk(scene: Stage) -> Path:
    """The agent's store is on a tmpfs that only it sees; returns the store as seen through its process."""
    disk = scene.home / "disk"
    scene.start(traced=False, prefix=("unshare", "-m", "sh", "-c", MOUNT, str(disk)))
    seen = Path(f"/proc/{scene.agent.process.pid}/root{disk}/store")
    scene.agent.store = seen
    return seen


def fill_disk(ballast: Path) -> None:
    with ballast.open("wb", buffering=0) as file:
        for size in (65536, 4096, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue


def require_serving(root: Path, release: int) -> None:
    store = Store(root)
    pointer = store.pointer(MODEL)
    assert pointer is not None
    assert pointer.stable == release
    assert release in installed_releases(store, MODEL)
