"""How the TUF client writes its files is private to it; what we put in its place must stay in its place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tuf.ngclient.updater import Updater

from model_sync.agent.metadata import DurableUpdater
from model_sync.publisher.keys import init_keys


@pytest.mark.parametrize("method", ["_persist_file", "_update_root_symlink"])
def test_the_client_still_writes_by_these_methods(method: str) -> None:
    """Pinned: python-tuf offers no public way. If this fails after an upgrade, look at `DurableUpdater`."""
    assert callable(getattr(Updater, method))
    assert getattr(DurableUpdater, method) is not getattr(Updater, method)


def test_what_the_client_stores_is_synced_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init_keys(tmp_path / "home")
    root = (tmp_path / "home" / "operator" / "root.json").read_bytes()
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    history = tmp_path / "metadata" / "root_history"
    for _ in range(2):
        DurableUpdater(str(tmp_path / "metadata"), "http://127.0.0.1:9/", bootstrap=root)
    assert (history / "1.root.json").read_bytes() == root
    assert (tmp_path / "metadata" / "root.json").read_bytes() == root
    assert synced.count(str(history)) == 1, "the folder, after the rename; nothing is written when nothing is new"
    assert any(path.startswith(f"{history}/.1.root.json.") for path in synced)
