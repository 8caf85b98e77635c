"""The steps of an installation that touch the network and the disk, one function each, run in a worker thread."""

from __future__ import annotations

import errno
import hashlib
import shutil
import threading
import time
from collections.abc import Generator, Iterable, Mapping
from contextlib import closing, suppress
from pathlib import Path

from model_sync.agent.config import AgentLimits
from model_sync.agent.install.bases import Bases
from model_sync.agent.install.fetch import Download, Patience, Remote, Supply, missing_chunks, runs, verify_file
from model_sync.agent.install.patch_child import PatchChild
from model_sync.agent.install.shorter_ways import DeltaError, ShorterWay, find_way, range_reader, read_index
from model_sync.agent.peers.download import Peers
from model_sync.agent.sources.meter import Meter
from model_sync.agent.sources.mirrors import Mirrors
from model_sync.agent.sources.source import StatusError
from model_sync.delta.index import DeltaIndex
from model_sync.delta.limits import ReadRange
from model_sync.repository.layout import blob_path
from model_sync.trust.vouching import require_digest
from nearcast.durable import write_file
from nearcast.errors import Code, MeshError
from nearcast.store import Manifest, Store, decode_manifest
from nearcast.store.manifest import MANIFEST_FILE, File
from nearcast.store.store import STAGING_FOLDER, parse_release

PARTIAL_AGE_S = 3600.0
"""A partial download of another model that nobody has written to for this long is given up when room is short."""


class DiskFullError(MeshError):
    """No room: by quota, by the reserve that must stay free, or because the file system says so."""

    def __init__(self, message: str) -> None:
        super().__init__(Code.UNAVAILABLE, message)


class Installer:
    """Brings the files of one release into the store, step by step; each step begins with what is on the disk.

    Args:
        data: bytes of the verified manifest.
        mirrors: whom to ask about deltas.
        supply: whom to ask for chunks.
        tenant_keys: folder of the tenants' keys that are on this node.
        metered: rather wait than fetch a full file because nobody says whether there is a delta.
        peers: other nodes, to be asked first; None = nobody.
    """

    def __init__(
        self,
        store: Store,
        data: bytes,
        mirrors: Mirrors,
        *,
        supply: Supply,
        meter: Meter,
        limits: AgentLimits,
        tenant_keys: Path | None = None,
        metered: bool = False,
        peers: Peers | None = None,
    ) -> None:
        self.received_bytes = 0
        self._store = store
        self._data = data
        self._manifest: Manifest = decode_manifest(data)
        self._mirrors = mirrors
        self._supply = supply
        self._meter = meter
        self._limits = limits
        self._tenant_keys = tenant_keys
        self._metered = metered
        self._peers = peers
        self._shorter: dict[str, ShorterWay] = {}

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

    def plan(self, stop: threading.Event, *, deltas: bool) -> None:
        """Find the cheapest way to each file, and check that there is room and allowance, before anything large is
        fetched.

        Raises:
            DeltaError: if a payload that was needed to know is not there, or not what the index says.
            DiskFullError: saying how much is missing.
            MeshError: UNAVAILABLE if no source answers, or no more may be downloaded today; CANCELLED.
        """
        self._shorter.clear()
        if self.is_installed:
            return
        staged = self._staged()
        missing = {entry.path: _missing_bytes(entry, staged / entry.path) for entry in self._manifest.files}
        if deltas:
            self._find_ways(missing, stop)
        ways = self._shorter
        payloads = sum(one.size_bytes for one in ways.values())
        self._require_room(sum(entry.size_bytes for entry in self._manifest.files) + payloads + len(self._data), staged)
        full = sum(size for path, size in missing.items() if path not in ways)
        self._meter.require(full + payloads, self._what())

    def _find_ways(self, missing: Mapping[str, int], stop: threading.Event) -> None:
        bases = Bases(self._store, self._manifest.name)
        for entry in self._manifest.files:
            way = find_way(
                self._manifest,
                entry,
                bases,
                missing_bytes=missing[entry.path],
                ask=self._ask_for_index,
                measure=lambda shorter: self._measure(shorter, bases, stop),
            )
            if way is not None:
                self._shorter[entry.path] = way

    def _ask_for_index(self, sha256: str) -> DeltaIndex | None:
        """As `read_index`; whoever hides or garbles the hint must not hold the node back, or make it pay unasked."""
        try:
            return read_index(self._mirrors, sha256, timeout_s=self._limits.chunk_timeout_s)
        except MeshError as error:
            if error.code is Code.CANCELLED or self._metered:
                raise
            return None

    def _measure(self, shorter: ShorterWay, bases: Bases, stop: threading.Event) -> tuple[tuple[int, int], ...] | None:
        """What `chunks` lacks; its payload stays for `fetch`. That it does not pay is no failure."""
        staged = self._staged()
        assert shorter.remote is not None
        assert shorter.way is not None
        try:
            self._fetch_payload(shorter.remote, staged / shorter.payload_name, stop)
            # Half of the time, so that a slow link does not look like a slow process: with what came it goes on later.
            deadline = time.monotonic() + self._limits.plan_s / 2
            return self._patch_child(stop).measure(shorter, bases.of(shorter.way), deadline=deadline)
        except OSError as error:
            raise self._full(error) from error
        except DeltaError as error:
            if error.code in (Code.UNSUPPORTED, Code.TOO_LARGE):
                return None
            raise

    def _patch_child(self, stop: threading.Event) -> PatchChild:
        return PatchChild(self._store.root, self._manifest, self._staged(), tenant_keys=self._tenant_keys, stop=stop)

    def _require_room(self, size_bytes: int, staged: Path) -> None:
        """Full files, payloads and manifest with a tenth in reserve must fit beside what is kept."""
        needed = size_bytes + size_bytes // 10
        if self._used_bytes(staged) + needed > self._limits.quota_bytes:
            discard_partials(self._store, staged)
        used = self._used_bytes(staged)
        if used + needed > self._limits.quota_bytes:
            raise DiskFullError(
                f"Not enough quota for {self._what()}: it needs {_mb(needed)}, and {_mb(used)} of "
                f"{_mb(self._limits.quota_bytes)} are in use; raise `limits.quota_bytes`. The node serves on."
            )
        free = shutil.disk_usage(self._store.root).free + folder_size_bytes(staged)
        if free - needed < self._limits.free_bytes_min:
            raise DiskFullError(
                f"The disk is too full for {self._what()}: it needs {_mb(needed)} and {_mb(free)} are free; "
                "make room. The node serves on."
            )

    def _used_bytes(self, staged: Path) -> int:
        return folder_size_bytes(self._store.root) - folder_size_bytes(staged)

    def fetch(self, stop: threading.Event) -> None:
        """Fetch payloads and files into the staging folder. `stop`, from another thread, ends it within one chunk.

        Raises:
            DeltaError: if a payload is not there, or not what the index says, or a part of the full file is not given.
            MeshError: as `Download.run`; UNAVAILABLE on a metered link if a part is not given; DiskFullError.
        """
        staged = self._staged()
        try:
            for entry in self._manifest.files:
                shorter = self._shorter.get(entry.path)
                if shorter is None:
                    self._download(_blob(entry), staged / entry.path, stop)
                elif shorter.remote is not None:
                    self._fetch_payload(shorter.remote, staged / shorter.payload_name, stop)
                    self._fetch_parts(shorter, staged / shorter.parts_name, stop)
        except OSError as error:
            raise self._full(error) from error
        finally:
            with suppress(OSError):
                self._meter.save()

    def _fetch_payload(self, remote: Remote, path: Path, stop: threading.Event) -> None:
        try:
            self._download(remote, path, stop)
            if self._peers is not None:
                self._peers.keep(remote, path)
        except StatusError as error:
            raise DeltaError(error.code, error.message) from error
        except MeshError as error:
            if error.code is Code.UNTRUSTED:
                raise DeltaError(error.code, error.message) from error
            raise

    def _download(self, remote: Remote, path: Path, stop: threading.Event) -> None:
        limits = self._limits
        if self._peers is not None:
            self.received_bytes += self._peers.fetch(remote, path, pace=self._meter, stop=stop)
        patience = Patience(chunk_timeout_s=limits.chunk_timeout_s, rate_bytes_per_s_min=limits.source_bytes_per_s_min)
        download = Download(remote, path, self._supply, pace=self._meter, patience=patience, stop=stop)
        try:
            download.run()
        finally:
            self.received_bytes += download.received_bytes

    def _fetch_parts(self, shorter: ShorterWay, path: Path, stop: threading.Event) -> None:
        """Nothing says what a part must hash to, so after a power cut all of them come again."""
        if not shorter.lacking:
            return
        read_range = self._range_reader(shorter.entry, stop)
        with path.open("wb") as file:
            file.writelines(read_range(start, size_bytes) for start, size_bytes in shorter.lacking)

    def patch(self, stop: threading.Event) -> None:
        """Make the files for which a shorter way was fetched, from what is on this disk.

        Raises:
            DeltaError: if a way does not lead to the signed file, or not in time.
            MeshError: CANCELLED once `stop` is set; DiskFullError.
        """
        if not self._shorter:
            return
        staged = self._staged()
        # The machine's own deadline comes a little later: the process is killed here, with its reason.
        deadline = time.monotonic() + self._limits.patch_s * 0.95
        bases = Bases(self._store, self._manifest.name)
        for shorter in self._shorter.values():
            fetched = [staged / name for name in (shorter.payload_name, shorter.parts_name) if shorter.way is not None]
            try:
                with closing(self._walk(shorter, bases, stop, deadline)) as pieces:  # a full disk ends the process too
                    write_file(staged / shorter.entry.path, pieces)
            except OSError as error:
                raise self._full(error) from error
            except DeltaError:
                _remove(fetched)
                raise
            _remove(fetched)  # only now: after a power cut payload or file is whole
        self._shorter.clear()

    def _walk(self, shorter: ShorterWay, bases: Bases, stop: threading.Event, deadline: float) -> Generator[bytes]:
        """The pieces of one file."""
        try:
            if shorter.way is not None:
                yield from self._patch_child(stop).make(shorter, bases.of(shorter.way), deadline=deadline)
                return
            data = bases[shorter.entry.sha256].read()
        except KeyError as error:
            raise DeltaError(Code.UNTRUSTED, f"The base of {shorter.entry.path} is not here any more.") from error
        except MeshError as error:
            if error.code is Code.UNTRUSTED:
                raise DeltaError(error.code, error.message) from error
            raise
        yield data

    def _range_reader(self, entry: File, stop: threading.Event) -> ReadRange:
        read_range = range_reader(self._mirrors, entry, timeout_s=self._limits.chunk_timeout_s)

        def read(start: int, size_bytes: int) -> bytes:
            if stop.is_set():
                raise MeshError(Code.CANCELLED, "The download was stopped.")
            try:
                data = read_range(start, size_bytes)
            except MeshError as error:
                if error.code is Code.CANCELLED or self._metered:
                    raise
                raise DeltaError(error.code, error.message) from error
            self.received_bytes += size_bytes
            self._meter.take(size_bytes, stop)
            return data

        return read

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


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _blob(entry: File) -> Remote:
    return Remote(path=blob_path(entry.sha256), size_bytes=entry.size_bytes, sha256=entry.sha256, chunks=entry.chunks)


def _missing_bytes(entry: File, path: Path) -> int:
    """What is not yet on the disk of a staged file, in whole chunks."""
    try:
        with path.open("rb") as file:
            missing = missing_chunks(entry.chunks, entry.size_bytes, file.fileno())
    except FileNotFoundError:
        return entry.size_bytes
    spans = [_blob(entry).span(run) for run in runs(missing)]
    return sum(end - start for start, end in spans)


def discard_partials(store: Store, kept: Path) -> None:
    """Remove what interrupted installations left: of the same model at once, of others when it has not been touched for
    `PARTIAL_AGE_S`. `kept` is the staging folder of the release that is being installed.
    """
    for folder in (store.root / STAGING_FOLDER).glob("[!.]*/*"):
        release = parse_release(folder.name)
        if folder == kept or release is None or not folder.is_dir():
            continue
        touched = max((path.stat().st_mtime for path in folder.iterdir()), default=0.0)
        if folder.parent == kept.parent or time.time() - touched > PARTIAL_AGE_S:
            store.discard_staged(folder.parent.name, release)


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
