"""The model of a forgetful disk: what it may lose, and what it may not."""

from __future__ import annotations

import itertools

from benchmarks.crash_disk import Disk, Image, digest_of
from benchmarks.crash_trace import Call

IMAGES = 400


def disk_after(*calls: Call) -> Disk:
    disk = Disk()
    for call in calls:
        disk.apply(call)
    return disk


def images_of(*calls: Call) -> list[Image]:
    return list(itertools.islice(disk_after(*calls).images(7), IMAGES))


def created(path: str, data: bytes = b"", *, synced: bool = True) -> list[Call]:
    calls = [Call(name="open", path=path, descriptor=3), Call(name="write", path=path, descriptor=3, data=data)]
    return [*calls, Call(name="sync", path=path)] if synced else calls


FOLDER = Call(name="sync", path="")


def test_a_synced_file_without_a_synced_name_may_be_gone_but_is_never_torn() -> None:
    found = {image.get("a") for image in images_of(*created("a", b"x" * 5000))}
    assert found == {None, b"x" * 5000}


def test_a_synced_name_without_synced_bytes_may_be_empty_torn_or_whole() -> None:
    data = bytes(range(256)) * 40
    found = {image["a"] for image in images_of(*created("a", data, synced=False), FOLDER)}
    assert {b"", data, data[:512], bytes(len(data))} <= found
    for content in found:
        assert isinstance(content, bytes)
        assert len(content) <= len(data)
        for at in range(0, len(content), 512):
            assert content[at : at + 512] in (data[at : at + 512][: len(content) - at], bytes(len(content[at:][:512])))


def test_replacing_is_atomic_and_keeps_the_old_until_the_folder_is_synced() -> None:
    calls = [*created("a", b"old"), FOLDER, *created("b", b"new"), Call(name="rename", path="b", other="a")]
    found = {(image.get("a"), image.get("b")) for image in images_of(*calls)}
    assert found == {(b"old", None), (b"old", b"new"), (b"new", None)}
    assert {image["a"] for image in images_of(*calls, FOLDER)} == {b"new"}


def test_what_moves_twice_is_in_one_place() -> None:
    calls = [
        *(Call(name="mkdir", path=name) for name in ("x", "y", "x/d")),
        FOLDER,
        Call(name="sync", path="x"),
        *created("x/d/file", b"1"),
        Call(name="sync", path="x/d"),
        Call(name="rename", path="x/d", other="y/d"),
        Call(name="rename", path="y/d", other="e"),
    ]
    for image in images_of(*calls):
        assert sum(place in image for place in ("x/d/file", "y/d/file", "e/file")) == 1
    assert all("e/file" in image for image in images_of(*calls, FOLDER)), "a change brings those that it needs"


def test_changes_of_different_names_survive_in_any_combination() -> None:
    calls = [call for name in "abc" for call in created(name)]
    combinations = {frozenset(image) - {""} for image in images_of(*calls)}
    assert len(combinations) == 8


def test_appended_and_positioned_writes_land_where_they_were_written() -> None:
    disk = disk_after(
        Call(name="open", path="log", descriptor=4, appends=True),
        Call(name="write", path="log", descriptor=4, data=b"one"),
        Call(name="write", path="log", descriptor=4, data=b"two"),
        Call(name="write", path="log", descriptor=5, data=b"X", offset=1),
        Call(name="truncate", path="log", offset=5),
    )
    assert disk.read("log") == b"oXetw"


def test_what_is_overwritten_in_place_keeps_its_size() -> None:
    old, new = b"a" * 3000, b"b" * 600
    write = Call(name="write", path="db", descriptor=3, data=new, offset=512)
    found = {image["db"] for image in images_of(*created("db", old), FOLDER, write)}
    assert len(found) >= 3
    for content in found:
        assert isinstance(content, bytes)
        assert len(content) == 3000
        assert (content[:512], content[1112:]) == (old[:512], old[1112:])
    cut = Call(name="truncate", path="db", offset=1000)
    sizes = {len(image["db"] or b"") for image in images_of(*created("db", old), FOLDER, cut, write)}
    assert min(sizes) == 1000


def test_equal_images_have_equal_digests() -> None:
    assert digest_of({"a": b"1", "b": None}) == digest_of({"a": b"1", "b": None})
    different: list[Image] = [{"a": b"1"}, {"a": "1"}, {"a": None}, {"a": b"2"}, {"b": b"1"}, {}]
    assert len({digest_of(image) for image in different}) == len(different)


def test_an_append_never_harms_what_was_durable() -> None:
    log = Call(name="open", path="log", descriptor=4, appends=True)
    old, new = b"a" * 1000, b"b" * 900
    calls = [log, Call(name="write", path="log", descriptor=4, data=old), Call(name="sync", path="log"), FOLDER]
    found = {image["log"] for image in images_of(*calls, Call(name="write", path="log", descriptor=4, data=new))}
    assert len(found) > 3
    assert all(isinstance(content, bytes) and content.startswith(old) for content in found)
