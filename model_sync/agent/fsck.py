"""Is a node's store what it should be? Looks at every version, pointer, journal record, partial file and trusted role.

A file of a version that is damaged gets its bad chunks back, and only those, through the same verified fetch as ever;
what the agent makes anew by itself is taken away. Nothing is trusted by being there: a manifest counts if it is the one
that passed the gate, a file if its chunks hash as the manifest says.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from model_sync.agent.install.fetch import missing_chunks, verify_file
from model_sync.agent.install.lone_fetch import blob_of, fetch_file
from model_sync.agent.journal import decode_record, read_journal
from model_sync.agent.sources.source import Source
from model_sync.agent.trusted import Damage, find_damage
from model_sync.replica.state import Memory
from nearcast.durable import make_folder, move_file, write_file
from nearcast.errors import Code, MeshError
from nearcast.store import Manifest, Store, decode_manifest
from nearcast.store.manifest import MANIFEST_FILE, MANIFEST_SIZE_BYTES_MAX, File
from nearcast.store.store import POINTER_FILE, STAGING_FOLDER

REPAIR_FOLDER = ".repair"
"""Below the staging folder: files on their way back to being right."""


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """Something that is not as it should be. `repair`: what was done about it; "" = it is as it was."""

    path: str
    problem: str
    repair: str = ""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What one look found. `received_bytes` came over the network for repairs."""

    models: int
    releases: int
    files: int
    faults: tuple[Fault, ...]
    received_bytes: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether nothing wrong is left."""
        return all(fault.repair for fault in self.faults)


@contextmanager
def locked(store: Path) -> Iterator[None]:
    """Hold the store as an agent does.

    Raises:
        MeshError: CONFLICT if an agent has it.
    """
    with (store / ".agent" / "lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MeshError(
                Code.CONFLICT, f"The agent of {store} is at work; stop the node first, then check its store."
            ) from None
        yield


@dataclass(slots=True)
class _Counts:
    releases: int = 0
    files: int = 0
    received_bytes: int = 0


class Check:
    """One look at one store, which must be locked.

    Args:
        source: where repairs come from; None = look only.
    """

    def __init__(self, store: Store, *, source: Source | None = None) -> None:
        self._store = store
        self._agent = store.root / ".agent"
        self._source = source
        self._counts = _Counts()
        self._faults: list[Fault] = []
        self._memories = read_journal(self._agent / "journal")

    def run(self) -> Report:
        """Look at everything."""
        self._check_journal()
        for damage in find_damage(self._agent):
            self._found(damage.path, damage.problem, self._take_away(damage))
        models = sorted({*self._store.models(), *self._memories})
        for model in models:
            self._check_model(model)
        self._check_staging()
        return Report(
            models=len(models),
            releases=self._counts.releases,
            files=self._counts.files,
            faults=tuple(self._faults),
            received_bytes=self._counts.received_bytes,
        )

    def _found(self, path: Path, problem: str, repair: str = "") -> None:
        self._faults.append(Fault(path=str(path.relative_to(self._store.root)), problem=problem, repair=repair))

    # What the agent keeps for itself.

    def _check_journal(self) -> None:
        path = self._agent / "journal"
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        if torn := sum(1 for line in lines if line and decode_record(line) is None):
            # Whoever opens the journal next leaves them out, and what counts is what was written before.
            self._found(path, f"{torn} of its records are torn.", "left out from now on")

    def _take_away(self, damage: Damage) -> str:
        if self._source is None:
            return ""
        damage.path.unlink(missing_ok=True)
        return "taken away; the agent fetches it again"

    def _check_staging(self) -> None:
        staging = self._store.root / STAGING_FOLDER
        for path in sorted(staging.rglob("*")) if staging.is_dir() else ():
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                repair = ""
                if self._source is not None:
                    path.unlink()
                    repair = "removed"
                self._found(path, "It is no plain file.", repair)

    # Versions.

    def _check_model(self, model: str) -> None:
        releases = self._store.releases(model)
        memory = self._memories.get(model, Memory(model=model))
        self._check_pointer(model, releases)
        self._check_links(self._store.root / model)
        for release in sorted({*releases, *map(int, memory.gated)}):
            folder = self._store.folder(model, release)
            if folder.is_dir():
                self._counts.releases += 1
                self._check_release(model, release, folder, memory.gated.get(str(release)))

    def _check_pointer(self, model: str, releases: tuple[int, ...]) -> None:
        path = self._store.root / model / POINTER_FILE
        try:
            pointer = self._store.pointer(model)
        except MeshError as error:
            repair = ""
            if self._source is not None:
                path.unlink()
                repair = "taken away; the agent writes it again from its journal"
            self._found(path, error.message, repair)
            return
        named = (pointer.stable, pointer.candidate, pointer.last_good) if pointer is not None else ()
        for release in sorted({one for one in named if one is not None} - set(releases)):
            if self._memories.get(model):  # a stand-alone router's pointer names what others hold
                self._found(path, f"It names release {release}, which is not here; the agent fetches it again.")

    def _check_links(self, folder: Path) -> None:
        for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
            if not (stat.S_ISREG(mode := path.lstat().st_mode) or stat.S_ISDIR(mode)):
                self._found(path, "It is no plain file; remove it.")

    def _check_release(self, model: str, release: int, folder: Path, sha256: str | None) -> None:
        manifest = self._check_manifest(model, release, folder, sha256)
        if manifest is None:
            return
        wanted = {entry.path for entry in manifest.files} | {MANIFEST_FILE}
        for path in sorted(folder.iterdir()):
            if path.name not in wanted:
                repair = ""
                if self._source is not None and path.is_file():
                    path.unlink()
                    repair = "removed"
                self._found(path, "The manifest does not list it.", repair)
        for entry in manifest.files:
            self._counts.files += 1
            self._check_file(entry, folder / entry.path)

    def _check_manifest(self, model: str, release: int, folder: Path, sha256: str | None) -> Manifest | None:
        path = folder / MANIFEST_FILE
        data = b""
        with suppress(OSError):
            data = path.read_bytes()[: MANIFEST_SIZE_BYTES_MAX + 1]
        try:
            if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
                raise MeshError(Code.UNTRUSTED, "It is not the one that passed the gate here.")
            manifest = decode_manifest(data)
            if (manifest.name, manifest.release) != (model, release):
                raise MeshError(Code.UNTRUSTED, f"It describes {manifest.name} release {manifest.release}.")
        except MeshError as error:
            kept = self._kept_manifest(sha256)
            if kept is None or self._source is None:
                self._found(path, error.message)
                return None
            write_file(path, kept)
            self._found(path, error.message, "restored from the verified copy")
            return decode_manifest(kept)
        return manifest

    def _kept_manifest(self, sha256: str | None) -> bytes | None:
        with suppress(OSError):
            data = (self._agent / "targets" / f"{sha256}.json").read_bytes()
            if hashlib.sha256(data).hexdigest() == sha256:
                return data
        return None

    def _check_file(self, entry: File, path: Path) -> None:
        if path.is_symlink():
            return  # named already
        try:
            verify_file(entry, path)
        except FileNotFoundError:
            problem = "It is missing."
        except (MeshError, OSError):
            problem = _describe(entry, path)
        else:
            return
        if self._source is None:
            self._found(path, problem)
            return
        try:
            received = self._refetch(entry, path, self._source)
        except (MeshError, OSError) as error:
            reason = error.message if isinstance(error, MeshError) else error.strerror
            self._found(path, f"{problem} It could not be repaired: {reason}")
            return
        self._counts.received_bytes += received
        self._found(path, problem, f"{received} bytes fetched again")

    def _refetch(self, entry: File, path: Path, source: Source) -> int:
        """Complete a copy of the file, then put it in place: who has the damaged one open keeps it."""
        work = self._store.root / STAGING_FOLDER / REPAIR_FOLDER / entry.sha256
        make_folder(work.parent)
        if path.exists() and not work.exists():
            write_file(work, path.read_bytes()[: entry.size_bytes])
        received = fetch_file(source, blob_of(entry), work)
        verify_file(entry, work)
        move_file(work, path)
        with suppress(OSError):  # another repair may be unfinished
            work.parent.rmdir()
        return received


def _describe(entry: File, path: Path) -> str:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        return f"It cannot be read: {error.strerror}."
    try:
        size = os.fstat(handle).st_size
        bad = len(missing_chunks(entry.chunks, entry.size_bytes, handle))
    finally:
        os.close(handle)
    what = f"{bad} of its {len(entry.chunks)} chunks are not the signed ones" if bad else "It is longer than signed"
    return f"{what} ({size} bytes on disk, {entry.size_bytes} signed)."
