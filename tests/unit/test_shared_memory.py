"""Shared memory: a region gives exactly its bytes or an error, to the user it belongs to, whatever is asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from nearcast.errors import Code, MeshError
from nearcast.transport.place import Place
from nearcast.transport.seam import Call
from nearcast.transport.shared_memory import FOLDER, RegionLimits, Regions

ME = Call(method="/", peer=f"unix:{os.geteuid()}")
ANOTHER = Call(method="/", peer=f"unix:{os.geteuid() + 1}")
REMOTE = Call(method="/", peer="127.0.0.1:5000")
SIZE = 64
EDGES = st.one_of(st.integers(-2, SIZE + 2), st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64 - 1, -(2**63)]))


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture(scope="module")
def key() -> Iterator[str]:
    path = Path(FOLDER) / f"nc-unit-{os.getpid()}"
    path.write_bytes(bytes(range(SIZE)))
    yield f"/{path.name}"
    path.unlink()


@pytest.fixture
def regions() -> Iterator[Regions]:
    regions = Regions(RegionLimits(regions_max=4))
    yield regions
    regions.close()


@given(start=st.integers(0, SIZE), length=st.integers(1, SIZE), offset=EDGES, size=EDGES)
@example(start=0, length=SIZE, offset=2**64 - 1, size=1)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_reads_are_exact_or_refused(key: str, start: int, length: int, offset: int, size: int) -> None:
    regions = Regions()
    try:
        if start + length > SIZE:
            with pytest.raises(MeshError):
                regions.register(ME, name="r", key=key, offset=start, size_bytes=length)
            return
        regions.register(ME, name="r", key=key, offset=start, size_bytes=length)
        place = Place(region="r", offset=offset, size_bytes=size)
        if offset >= 0 and size >= 0 and offset + size <= length:
            assert regions.read(ME, place) == bytes(range(SIZE))[start + offset :][:size]
        else:
            for use in (lambda: regions.read(ME, place), lambda: regions.write(ME, place, b"")):
                with pytest.raises(MeshError) as caught:
                    use()
                assert caught.value.code is Code.INVALID_REQUEST
    finally:
        regions.close()
    assert (Path(FOLDER) / key[1:]).read_bytes() == bytes(range(SIZE))


def test_regions_belong_to_the_user_who_registered_them(key: str, regions: Regions) -> None:
    regions.register(ME, name="r", key=key, offset=0, size_bytes=8)
    for caller, code in ((ANOTHER, Code.INVALID_REQUEST), (REMOTE, Code.FORBIDDEN)):
        with pytest.raises(MeshError) as caught:
            regions.read(caller, Place(region="r", size_bytes=1))
        assert caught.value.code is code
        assert regions.status(caller, "") == []
        regions.unregister(caller, "r")
    # The object is not theirs, so they cannot have the server open it for them either.
    with pytest.raises(MeshError) as caught:
        regions.register(ANOTHER, name="mine", key=key, offset=0, size_bytes=8)
    assert caught.value.code is Code.FORBIDDEN
    assert [region.name for region in regions.status(ME, "")] == ["r"]


def test_only_plain_objects_are_opened_and_none_stays_open_after_a_refusal(regions: Regions) -> None:
    before = open_files()
    fifo, folder = (Path(FOLDER) / f"nc-unit-{kind}-{os.getpid()}" for kind in ("fifo", "folder"))
    os.mkfifo(fifo)
    folder.mkdir()
    try:
        for name in (
            fifo.name,
            folder.name,
            "..",
            ".",
            "/",
            "",
            "a\0b",
            "x" * 300,
            f"../shm/{fifo.name}",
            "grün\ud800",
        ):
            with pytest.raises(MeshError):
                regions.register(ME, name="r", key=name, offset=0, size_bytes=1)
    finally:
        fifo.unlink()
        folder.rmdir()
    assert open_files() == before


def test_regions_are_bounded_and_give_their_files_back(key: str, regions: Regions) -> None:
    before = open_files()
    for number in range(4):
        regions.register(ME, name=str(number), key=key, offset=0, size_bytes=8)
    with pytest.raises(MeshError) as caught:
        regions.register(ME, name="5", key=key, offset=0, size_bytes=8)
    assert caught.value.code is Code.OVERLOADED
    regions.unregister(ME, "")
    assert open_files() == before
