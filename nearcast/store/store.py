"""The folder that a node's versions live in.

```
<root>/<model>/<release>/manifest.json, files…    immutable once there
<root>/<model>/serving.json                       the pointer, replaced atomically
<root>/.staging/<model>/<release>/                what the agent is still fetching
<root>/.staging/.removed/                         what is being deleted
```
The model host and the router read; the sync agent alone writes. Every write is durable before it becomes visible.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from pathlib import Path

import msgspec

from nearcast.durable import make_folder, write_file
from nearcast.errors import Code, MeshError
from nearcast.store.manifest import MANIFEST_FILE, MANIFEST_SIZE_BYTES_MAX, Manifest, decode_manifest, is_model_name
from nearcast.store.pointer import Pointer

POINTER_FILE = "serving.json"
STAGING_FOLDER = ".staging"
POINTER_SIZE_BYTES_MAX = 64 * 1024
_REMOVED_FOLDER = ".removed"
_RELEASE_MAX = 2**53


class Store:
    """Versions and pointers below one folder. It holds no state but the path; any number may look at one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    # Read side: host and router.

    def models(self) -> tuple[str, ...]:
        """Names of the models that have a pointer or a version here, sorted."""
        names = (
            entry.name
            for entry in _entries(self.root)
            if is_model_name(entry.name) and entry.is_dir(follow_symlinks=False)
        )
        return tuple(sorted(name for name in names if self._is_model(name)))

    def releases(self, model: str) -> tuple[int, ...]:
        """Releases of a model that are committed here, ascending; empty for an unknown model."""
        folder = self._model_folder(model)
        found = (parse_release(entry.name) for entry in _entries(folder) if entry.is_dir(follow_symlinks=False))
        return tuple(
            sorted(release for release in found if release and (folder / str(release) / MANIFEST_FILE).is_file())
        )

    def folder(self, model: str, release: int) -> Path:
        """Where the files of one version lie (or would lie).

        Raises:
            MeshError: INVALID_REQUEST if the name or the number can name no version.
        """
        return self._model_folder(model) / _release_name(release)

    def manifest(self, model: str, release: int) -> Manifest:
        """The manifest of a committed version.

        Raises:
            MeshError: MODEL_NOT_FOUND if the version is not here, UNTRUSTED if its manifest is malformed or of another.
        """
        try:
            data = _read_bounded(self.folder(model, release) / MANIFEST_FILE, MANIFEST_SIZE_BYTES_MAX + 1)
        except (FileNotFoundError, NotADirectoryError):
            raise MeshError(Code.MODEL_NOT_FOUND, f"Release {release} of model {model} is not on this node.") from None
        except OSError as error:
            raise MeshError(
                Code.INTERNAL, f"The manifest of {model} release {release} cannot be read: {_reason(error)}."
            ) from error
        return _require_manifest(decode_manifest(data), model, release)

    def pointer(self, model: str) -> Pointer | None:
        """What the model serves; None if no pointer was ever written.

        Raises:
            MeshError: INTERNAL if the file is torn, corrupt or unreadable; keep serving what was served before.
        """
        try:
            data = _read_bounded(self._model_folder(model) / POINTER_FILE, POINTER_SIZE_BYTES_MAX + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise MeshError(
                Code.INTERNAL, f"{POINTER_FILE} of model {model} cannot be read: {_reason(error)}."
            ) from error
        if len(data) > POINTER_SIZE_BYTES_MAX:
            raise MeshError(
                Code.INTERNAL, f"{POINTER_FILE} of model {model} is larger than {POINTER_SIZE_BYTES_MAX} bytes."
            )
        try:
            return msgspec.json.decode(data, type=Pointer)
        except msgspec.DecodeError as error:
            raise MeshError(Code.INTERNAL, f"{POINTER_FILE} of model {model} is torn or malformed: {error}.") from error

    # Write side: the agent alone.

    def stage_folder(self, model: str, release: int) -> Path:
        """The folder to fetch a version into; what an interrupted attempt left there is still in it."""
        folder = self._staging / _model_name(model) / _release_name(release)
        for place in (self._staging, folder.parent, folder):
            make_folder(place)
        return folder

    def discard_staged(self, model: str, release: int) -> None:
        """Forget a staged version; nothing happens if there is none."""
        folder = self._staging / _model_name(model) / _release_name(release)
        if folder.is_dir():
            self._remove_tree(folder)

    def commit(self, model: str, release: int, staged: Path) -> Path:
        """Make a complete staged folder the version: files, then the folder, then the new name reach the disk.

        The folder holds `manifest.json` and exactly the files that it lists; digests are the caller's affair.
        Committing the same manifest twice is harmless.

        Raises:
            MeshError: UNTRUSTED if the folder does not fit its manifest, CONFLICT if this release has another manifest.
        """
        target = self.folder(model, release)
        try:
            data = _read_bounded(staged / MANIFEST_FILE, MANIFEST_SIZE_BYTES_MAX + 1)
        except FileNotFoundError:
            raise MeshError(
                Code.UNTRUSTED, f"The staged folder of {model} release {release} has no {MANIFEST_FILE}."
            ) from None
        manifest = _require_manifest(decode_manifest(data), model, release)
        _require_files(manifest, staged)
        if target.exists():
            return self._commit_again(manifest, data, staged, target)
        for name in (MANIFEST_FILE, *(entry.path for entry in manifest.files)):
            _sync(staged / name)
        _sync(staged)
        self._make_model_folder(model)
        try:
            staged.rename(target)
        except OSError as error:
            if error.errno in {errno.ENOTEMPTY, errno.EEXIST}:
                return self._commit_again(manifest, data, staged, target)
            raise
        _sync(target.parent)
        _sync(staged.parent)
        return target

    def write_pointer(self, model: str, pointer: Pointer) -> None:
        """Replace the pointer; a reader, and a node after a crash, sees the old one or the new one, never a mixture."""
        folder = self._make_model_folder(model)
        data = msgspec.json.format(msgspec.json.encode(pointer), indent=1) + b"\n"
        write_file(folder / POINTER_FILE, data)

    def remove_release(self, model: str, release: int) -> None:
        """Delete a version that nothing points to; nothing happens if it is not here.

        Raises:
            MeshError: CONFLICT if the pointer names it as stable, candidate or last good; INTERNAL if the pointer
                cannot be read, since then nothing is known to be unused.
        """
        folder = self.folder(model, release)
        pointer = self.pointer(model)
        if pointer is not None and release in (pointer.stable, pointer.candidate, pointer.last_good):
            raise MeshError(Code.CONFLICT, f"Release {release} of {model} is in use; point to another release first.")
        if folder.is_dir():
            self._remove_tree(folder)

    def clean(self) -> None:
        """Finish interrupted deletions and drop temporary pointer files. For the agent's start, before it writes."""
        for entry in _entries(self._staging / _REMOVED_FOLDER):
            shutil.rmtree(entry.path, ignore_errors=True)
        for model in self.models():
            for path in self._model_folder(model).glob(f".{POINTER_FILE}.*"):
                path.unlink(missing_ok=True)

    @property
    def _staging(self) -> Path:
        return self.root / STAGING_FOLDER

    def _model_folder(self, model: str) -> Path:
        return self.root / _model_name(model)

    def _is_model(self, model: str) -> bool:
        return (self.root / model / POINTER_FILE).exists() or bool(self.releases(model))

    def _make_model_folder(self, model: str) -> Path:
        folder = self._model_folder(model)
        for place in (self.root, folder):
            make_folder(place)
        return folder

    def _commit_again(self, manifest: Manifest, data: bytes, staged: Path, target: Path) -> Path:
        if (target / MANIFEST_FILE).read_bytes() != data:
            raise MeshError(
                Code.CONFLICT,
                f"Release {manifest.release} of {manifest.name} is here with another manifest; releases never change.",
            )
        self._remove_tree(staged)
        return target

    def _remove_tree(self, folder: Path) -> None:
        """Take the name away first, durably: a crash in the middle leaves rubbish, never half a version."""
        removed = self._staging / _REMOVED_FOLDER
        removed.mkdir(parents=True, exist_ok=True)
        grave = Path(tempfile.mkdtemp(prefix=f"{folder.parent.name}.{folder.name}.", dir=removed))
        folder.rename(grave / "version")
        _sync(folder.parent)
        shutil.rmtree(grave, ignore_errors=True)


def parse_release(text: str) -> int | None:
    """The release that a folder name or a wire version stands for; None unless it is one in canonical decimal."""
    if not (text.isascii() and text.isdigit() and len(text) <= 16) or text[0] == "0":
        return None
    release = int(text)
    return release if release <= _RELEASE_MAX else None


def _model_name(model: str) -> str:
    if not is_model_name(model):
        raise MeshError(
            Code.INVALID_REQUEST,
            f"{model[:80]!r} is no model name; use lower-case letters, digits, _ and -, at most 64 characters.",
        )
    return model


def _release_name(release: int) -> str:
    if isinstance(release, bool) or not isinstance(release, int) or not 1 <= release <= _RELEASE_MAX:
        raise MeshError(Code.INVALID_REQUEST, f"{release!r} is no release; releases are whole numbers from 1.")
    return str(release)


def _require_manifest(manifest: Manifest, model: str, release: int) -> Manifest:
    if manifest.name != model or manifest.release != release:
        raise MeshError(
            Code.UNTRUSTED,
            f"The manifest of {model} release {release} describes {manifest.name} release {manifest.release}.",
        )
    return manifest


def _require_files(manifest: Manifest, folder: Path) -> None:
    expected = {entry.path: entry.size_bytes for entry in manifest.files}
    if MANIFEST_FILE in expected:
        raise MeshError(Code.UNTRUSTED, f"A manifest may not list {MANIFEST_FILE} itself.")
    for entry in _entries(folder):
        status = entry.stat(follow_symlinks=False)
        if not stat.S_ISREG(status.st_mode) or (entry.name != MANIFEST_FILE and entry.name not in expected):
            raise MeshError(
                Code.UNTRUSTED, f"The staged folder holds {entry.name!r}, which the manifest does not list as a file."
            )
        if entry.name != MANIFEST_FILE and status.st_size != expected.pop(entry.name):
            raise MeshError(
                Code.UNTRUSTED, f"The staged file {entry.name} has {status.st_size} bytes, not what the manifest says."
            )
    if expected:
        raise MeshError(Code.UNTRUSTED, f"The staged folder lacks files: {', '.join(sorted(expected))}.")


def _read_bounded(path: Path, size_bytes: int) -> bytes:
    with path.open("rb") as file:
        # A read reserves all that it may return, and what is allocated next would lie behind those 4 MiB.
        return file.read(min(size_bytes, os.fstat(file.fileno()).st_size + 1))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: OSError) -> str:
    return (error.strerror or "input/output error").lower()
