"""System shared memory: tensors that a process on this machine hands over in a file under /dev/shm.

Nothing is mapped. The client may write to its memory, or cut it, while the model reads: a map would show the model
changing numbers, and touching what was cut off kills the process. `pread` copies once and can only fail. What a request
needs is checked against the file as it is at that moment.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator

import msgspec

from nearcast.errors import Code, MeshError
from nearcast.transport.peer import peer_uid
from nearcast.transport.place import Place
from nearcast.transport.seam import Call

FOLDER = "/dev/shm"  # noqa: S108 - where shm_open keeps its objects
_KEY = re.compile(r"/?[^/\0]{1,254}")


class RegionLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of the regions of one process.

    Attributes:
        regions_max: registered at the same time, over all users.
        name_chars_max: of a region's name.
        region_bytes_max: of one region.
        tensor_bytes_max: of one tensor that is read; it is copied into this process.
    """

    regions_max: int = 256
    name_chars_max: int = 256
    region_bytes_max: int = 1024 * 1024 * 1024
    tensor_bytes_max: int = 64 * 1024 * 1024


REGION_LIMITS = RegionLimits()


class Region(msgspec.Struct, frozen=True, kw_only=True):
    """A window of `size_bytes` at `offset` of a shared memory object that is kept open."""

    name: str
    key: str
    offset: int
    size_bytes: int
    owner: int
    descriptor: int


class Regions:
    """The registered regions of one process. A region belongs to the user who registered it; others do not see it."""

    def __init__(self, limits: RegionLimits = REGION_LIMITS) -> None:
        self._limits = limits
        self._regions: dict[tuple[int, str], Region] = {}

    def register(self, call: Call, *, name: str, key: str, offset: int, size_bytes: int) -> None:
        """Open a shared memory object of the peer's own user.

        Args:
            call: who asks.
            name: how requests will name the region.
            key: what the client gave `shm_open`.
            offset: where the region begins, in bytes.
            size_bytes: of the region.

        Raises:
            MeshError: FORBIDDEN for peers that are not on a Unix socket and for another user's object, CONFLICT if the
                name is taken, OVERLOADED if too many are open, INVALID_REQUEST if there is no such object or it is too
                small.
        """
        owner = _require_local(call)
        limits = self._limits
        if not 0 < len(name) <= limits.name_chars_max:
            raise MeshError(Code.INVALID_REQUEST, f"A region's name has 1 to {limits.name_chars_max} characters.")
        if (owner, name) in self._regions:
            raise MeshError(Code.CONFLICT, f"The shared memory region '{name}' is registered already.")
        if len(self._regions) >= limits.regions_max:
            raise MeshError(
                Code.OVERLOADED, f"{limits.regions_max} shared memory regions are open; unregister one first."
            )
        if not 0 < size_bytes <= limits.region_bytes_max:
            raise MeshError(
                Code.INVALID_REQUEST,
                f"The shared memory region '{name}' must have 1 to {limits.region_bytes_max} bytes, not {size_bytes}.",
            )
        descriptor = _open(name, key, owner)
        try:
            region = Region(
                name=name, key=key, offset=offset, size_bytes=size_bytes, owner=owner, descriptor=descriptor
            )
            _require_size(region)
        except MeshError:
            os.close(descriptor)
            raise
        self._regions[owner, name] = region

    def unregister(self, call: Call, name: str) -> None:
        """Forget a region of the peer ("" = all of its regions); one that does not exist is no error."""
        for region in list(self._of(call)):
            if name in ("", region.name):
                del self._regions[region.owner, region.name]
                os.close(region.descriptor)

    def status(self, call: Call, name: str) -> list[Region]:
        """The peer's regions, or the one of a name.

        Raises:
            MeshError: INVALID_REQUEST if it has none of that name.
        """
        return [self._require(call, name)] if name else list(self._of(call))

    def read(self, call: Call, place: Place) -> bytes:
        """Copy the bytes of a tensor out of a region.

        Raises:
            MeshError: FORBIDDEN for peers that are not on a Unix socket, INVALID_REQUEST if the region does not hold
                them, TOO_LARGE if they are more than one tensor may have.
        """
        region = self._require_place(call, place)
        if place.size_bytes > self._limits.tensor_bytes_max:
            raise MeshError(
                Code.TOO_LARGE, f"A tensor in shared memory has at most {self._limits.tensor_bytes_max} bytes."
            )
        data = os.pread(region.descriptor, place.size_bytes, region.offset + place.offset)
        if len(data) != place.size_bytes:
            raise _too_small(region)
        return data

    def write(self, call: Call, place: Place, data: bytes | memoryview) -> None:
        """Copy a tensor into a region.

        Raises:
            MeshError: as `read`; INVALID_REQUEST if the place has too few bytes for it.
        """
        if len(data) > place.size_bytes:
            raise MeshError(
                Code.INVALID_REQUEST,
                f"The output has {len(data)} bytes; {place.size_bytes} were given for it in region '{place.region}'.",
            )
        region = self._require_place(call, place)
        if os.pwrite(region.descriptor, data, region.offset + place.offset) != len(data):
            raise _too_small(region)

    def close(self) -> None:
        """Forget every region."""
        while self._regions:
            os.close(self._regions.popitem()[1].descriptor)

    def _of(self, call: Call) -> Iterator[Region]:
        owner = peer_uid(call)
        return (region for region in self._regions.values() if region.owner == owner)

    def _require(self, call: Call, name: str) -> Region:
        region = self._regions.get((_require_local(call), name))
        if region is None:
            raise MeshError(Code.INVALID_REQUEST, f"Unable to find the shared memory region '{name[:256]}'.")
        return region

    def _require_place(self, call: Call, place: Place) -> Region:
        region = self._require(call, place.region)
        if place.size_bytes < 0 or place.offset < 0 or place.offset + place.size_bytes > region.size_bytes:
            raise MeshError(
                Code.INVALID_REQUEST,
                f"{place.size_bytes} bytes at offset {place.offset} are not within the {region.size_bytes} bytes of "
                f"the shared memory region '{region.name}'.",
            )
        _require_size(region)
        return region


def _require_local(call: Call) -> int:
    uid = peer_uid(call)
    if uid is None:
        raise MeshError(
            Code.FORBIDDEN, "Shared memory is for clients on this machine: connect over the server's Unix socket."
        )
    return uid


def _open(name: str, key: str, owner: int) -> int:
    """Open an object of /dev/shm: a plain file there and nothing else, of the peer's own user."""
    file = key.removeprefix("/")
    if _KEY.fullmatch(key) is None or file in (".", ".."):
        raise MeshError(Code.INVALID_REQUEST, f"The key of region '{name}' must be a '/' and one file name.")
    try:
        folder = os.open(FOLDER, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        finally:
            os.close(folder)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no valid name"
        raise MeshError(
            Code.INVALID_REQUEST, f"Unable to open the shared memory object of region '{name}': {reason}."
        ) from error
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != owner:
        os.close(descriptor)
        raise MeshError(Code.FORBIDDEN, f"The shared memory object of region '{name}' belongs to another user.")
    return descriptor


def _require_size(region: Region) -> None:
    if region.offset + region.size_bytes > os.fstat(region.descriptor).st_size:
        raise _too_small(region)


def _too_small(region: Region) -> MeshError:
    return MeshError(
        Code.INVALID_REQUEST,
        f"The shared memory object of region '{region.name}' ends before its {region.size_bytes} bytes at offset "
        f"{region.offset}.",
    )
