"""The steps of an installation that touch the network and the disk, one function each, run in a worker thread."""

from __future__ import annotations

import errno
import hashlib
import shutil
import threading
from pathlib import Path

from model_sync.agent.config import AgentLimits
from model_sync.agent.fetch import Download, Pace, Patience, Remote, Supply, verify_file
from model_sync.repository.layout import blob_path
from model_sync.trust.vouching import require_digest
from nearcast.durable import write_file
from nearcast.errors import Code, MeshError
from nearcast.store import Manifest, Store, decode_manifest
from nearcast.store.manifest import MANIFEST_FILE


class DiskFullError(MeshError):
    """No room: by quota, by the reserve that must stay free, or because the file system says so."""

    def __init__(self, message: str) -> None:
        super().__init__(Code.UNAVAILABLE, message)


class Installer:
    """Brings the files of one release into the store.

    Args:
        data: bytes of the verified manifest.
        supply: whom to ask for its files.
        stop: set from another thread to give up within one chunk.
    """

    def __init__(
        self, store: Store, data: bytes, supply: Supply, *, pace: Pace, limits: AgentLimits, stop: threading.Event
    ) -> None:
        self._store = store
        self._data = data
        self._manifest: Manifest = decode_manifest(data)
        self._supply = supply
        self._pace = pace
        self._limits = limits
        self._stop = stop

    @property
    def folder(self) -> Path:
        """The folder of the installed version."""
        return self._store.folder(self._manifest.name, self._manifest.release)

    @property
    def is_installed(self) -> bool:
        """Whether the version, by this very manifest, is in the store."""
        try:
            return (self.folder / MANIFEST_FILE).read_bytes() == self._data
        except FileNotFoundError:
            return False

    def plan(self) -> None:
        """Check that there is room for what is still missing, before anything is fetched.

        Raises:
            DiskFullError: saying how much is missing.
        """
        staged = self._staged()
        missing = 0
        for entry in self._manifest.files:
            path = staged / entry.path
            present = path.stat().st_size if path.is_file() else 0
            missing += max(0, entry.size_bytes - present)
        used = folder_size_bytes(self._store.root)
        if used + missing > self._limits.quota_bytes:
            raise DiskFullError(
                f"Not enough quota for {self._what()}: it needs {_mb(missing)} more, and {_mb(used)} of "
                f"{_mb(self._limits.quota_bytes)} are in use; raise `limits.quota_bytes`. The node serves on."
            )
        free = shutil.disk_usage(self._store.root).free
        if free - missing < self._limits.free_bytes_min:
            raise DiskFullError(
                f"The disk is too full for {self._what()}: it needs {_mb(missing)} and {_mb(free)} are free; "
                "make room. The node serves on."
            )

    def fetch(self) -> int:
        """Fetch what is missing into the staging folder; returns the bytes that came over the network.

        Raises:
            MeshError: as `Download.run`; DiskFullError if the disk is full.
        """
        staged = self._staged()
        received = 0
        try:
            for entry in self._manifest.files:
                remote = Remote(
                    path=blob_path(entry.sha256), size_bytes=entry.size_bytes, sha256=entry.sha256, chunks=entry.chunks
                )
                received += self._download(remote, staged / entry.path)
        except OSError as error:
            raise self._full(error) from error
        return received

    def _download(self, remote: Remote, path: Path) -> int:
        limits = self._limits
        patience = Patience(chunk_timeout_s=limits.chunk_timeout_s, rate_bytes_per_s_min=limits.source_bytes_per_s_min)
        download = Download(remote, path, self._supply, pace=self._pace, patience=patience, stop=self._stop)
        download.run()
        return download.received_bytes

    def verify(self) -> None:
        """Hash every file that is to be served.

        Raises:
            MeshError: UNTRUSTED if one is not the signed content; a staged one is removed then.
        """
        folder = self.folder if self.is_installed else self._staged()
        for entry in self._manifest.files:
            try:
                verify_file(entry, folder / entry.path)
            except FileNotFoundError:
                raise MeshError(Code.UNTRUSTED, f"{entry.path} of {self._what()} is missing on disk.") from None
            except MeshError:
                if not self.is_installed:
                    (folder / entry.path).unlink(missing_ok=True)
                raise

    def stage(self) -> None:
        """Give the complete folder its final name, durably.

        Raises:
            MeshError: CONFLICT or UNTRUSTED as `Store.commit`; DiskFullError if the disk is full.
        """
        if self.is_installed:
            return
        staged = self._staged()
        try:
            wanted = {entry.path for entry in self._manifest.files}
            for path in staged.iterdir():
                if path.name not in wanted:
                    path.unlink()
            write_file(staged / MANIFEST_FILE, self._data)
            self._store.commit(self._manifest.name, self._manifest.release, staged)
        except OSError as error:
            raise self._full(error) from error

    def _staged(self) -> Path:
        try:
            return self._store.stage_folder(self._manifest.name, self._manifest.release)
        except OSError as error:
            raise self._full(error) from error

    def _what(self) -> str:
        return f"{self._manifest.name} release {self._manifest.release}"

    def _full(self, error: OSError) -> MeshError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return DiskFullError(
                f"The disk is full: {self._what()} could not be installed and its partial files were removed; "
                "make room. The node serves on."
            )
        return MeshError(Code.UNAVAILABLE, f"{self._what()} could not be written: {error.strerror or error}.")


def installed_releases(store: Store, model: str) -> dict[int, str]:
    """Manifest digests of the releases whose every file is what its manifest says; damaged ones are left out."""
    found = {}
    for release in store.releases(model):
        folder = store.folder(model, release)
        try:
            data = (folder / MANIFEST_FILE).read_bytes()
            manifest = decode_manifest(data)
            for entry in manifest.files:
                verify_file(entry, folder / entry.path)
        except (OSError, MeshError):
            continue
        if manifest.name == model and manifest.release == release:
            found[release] = hashlib.sha256(data).hexdigest()
    return found


def read_manifest(store: Store, model: str, release: int, sha256: str) -> bytes | None:
    """The manifest of an installed release if it is the one of that digest."""
    try:
        data = (store.folder(model, release) / MANIFEST_FILE).read_bytes()
        require_digest("the installed manifest", data, sha256)
    except (OSError, MeshError):
        return None
    return data


def folder_size_bytes(folder: Path) -> int:
    """Sizes of all files below `folder`."""
    total = 0
    for path in folder.rglob("*"):
        try:
            if path.is_file() and not path.is_symlink():
                total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB"
