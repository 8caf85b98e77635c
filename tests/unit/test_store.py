"""The store: names never become paths, commits and pointers are all or nothing, torn files are errors."""

from __future__ import annotations

import hashlib
import os
import tracemalloc
from pathlib import Path

import pytest

from nearcast.errors import Code, MeshError
from nearcast.store import Pointer, Store
from nearcast.store.manifest import File, Manifest


def make_manifest(name: str = "digits", release: int = 1, data: bytes = b"weights", **changes: object) -> Manifest:
    digest = hashlib.sha256(data).hexdigest()
    fields: dict[str, object] = {
        "name": name,
        "release": release,
        "semver": f"1.0.{release}",
        "engine": "onnxruntime",
        "model_file": "model.onnx",
        "files": (File(path="model.onnx", size_bytes=len(data), sha256=digest, chunks=(digest,)),),
        "inputs": (),
        "outputs": (),
        "licence": "Apache-2.0",
    }
    return Manifest(**(fields | changes))  # type: ignore[arg-type]


def commit(store: Store, manifest: Manifest, data: bytes = b"weights") -> Path:
    staged = store.stage_folder(manifest.name, manifest.release)
    (staged / "model.onnx").write_bytes(data)
    (staged / "manifest.json").write_bytes(manifest.encode())
    return store.commit(manifest.name, manifest.release, staged)


def refused(code: Code) -> pytest.RaisesExc[MeshError]:
    return pytest.RaisesExc(MeshError, check=lambda error: error.code is code)


def test_commit_makes_a_version_visible_and_empties_the_staging(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.models() == ()
    folder = commit(store, make_manifest(release=2))
    commit(store, make_manifest(release=10))
    assert folder == store.folder("digits", 2)
    assert store.models() == ("digits",)
    assert store.releases("digits") == (2, 10)
    assert store.manifest("digits", 2) == make_manifest(release=2)
    assert not list((tmp_path / ".staging" / "digits").iterdir())


def test_to_read_a_short_file_takes_little_memory(tmp_path: Path) -> None:
    store = Store(tmp_path)
    commit(store, make_manifest())
    store.write_pointer("digits", Pointer(stable=1))
    tracemalloc.start()
    try:
        store.manifest("digits", 1)
        store.pointer("digits")
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 48 * 1024


def test_commit_syncs_files_before_the_name_and_the_parent_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, Path.rename

    def record_sync(handle: int) -> None:
        events.append(("sync", str(Path(f"/proc/self/fd/{handle}").readlink())))
        fsync(handle)

    def record_rename(path: Path, target: Path) -> Path:
        events.append(("rename", str(target)))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(Path, "rename", record_rename)
    target = commit(store, make_manifest())
    staged = tmp_path / ".staging" / "digits" / "1"
    renamed = events.index(("rename", str(target)))
    for path in (staged / "model.onnx", staged / "manifest.json", staged):
        assert events.index(("sync", str(path))) < renamed
    assert events.index(("sync", str(target.parent))) > renamed


def test_same_manifest_commits_twice_and_another_one_never(tmp_path: Path) -> None:
    store = Store(tmp_path)
    commit(store, make_manifest())
    commit(store, make_manifest())
    with refused(Code.CONFLICT):
        commit(store, make_manifest(data=b"changed"), b"changed")
    assert store.manifest("digits", 1) == make_manifest()


@pytest.mark.parametrize("fault", ["missing", "extra", "short", "link", "folder", "manifest", "name"])
def test_staged_folder_must_fit_its_manifest(tmp_path: Path, fault: str) -> None:
    store = Store(tmp_path / "store")
    staged = store.stage_folder("digits", 1)
    (staged / "model.onnx").write_bytes(b"weights")
    (staged / "manifest.json").write_bytes(make_manifest().encode())
    match fault:
        case "missing":
            (staged / "model.onnx").unlink()
        case "extra":
            (staged / "run.sh").write_bytes(b"")
        case "short":
            (staged / "model.onnx").write_bytes(b"weight")
        case "link":
            (tmp_path / "elsewhere").write_bytes(b"weights")
            (staged / "model.onnx").unlink()
            (staged / "model.onnx").symlink_to(tmp_path / "elsewhere")
        case "folder":
            (staged / "inner").mkdir()
        case "manifest":
            (staged / "manifest.json").unlink()
        case "name":
            (staged / "manifest.json").write_bytes(make_manifest(release=2).encode())
    with refused(Code.UNTRUSTED):
        store.commit("digits", 1, staged)
    assert store.releases("digits") == ()


@pytest.mark.parametrize("name", ["", "..", "a/b", "../a", ".staging", "A", "a" * 65, "a\n", "a\0"])
def test_names_never_become_paths(tmp_path: Path, name: str) -> None:
    store = Store(tmp_path)
    for use in (
        lambda: store.folder(name, 1),
        lambda: store.pointer(name),
        lambda: store.releases(name),
        lambda: store.stage_folder(name, 1),
        lambda: store.write_pointer(name, Pointer()),
        lambda: store.remove_release(name, 1),
    ):
        with refused(Code.INVALID_REQUEST):
            use()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("release", [0, -1, 2**53 + 1, True, "1"])
def test_releases_are_whole_positive_numbers(tmp_path: Path, release: object) -> None:
    with refused(Code.INVALID_REQUEST):
        Store(tmp_path).folder("digits", release)  # type: ignore[arg-type]


def test_pointer_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    assert store.pointer("digits") is None
    first, second = (
        Pointer(stable=1, intent=3),
        Pointer(stable=2, candidate=3, share=0.05, salt="s", last_good=1, intent=4),
    )
    store.write_pointer("digits", first)
    monkeypatch.setattr(Path, "replace", lambda self, to: (_ for _ in ()).throw(OSError("power cut")))
    with pytest.raises(OSError, match="power cut"):
        store.write_pointer("digits", second)
    assert store.pointer("digits") == first
    monkeypatch.undo()
    store.write_pointer("digits", second)
    assert store.pointer("digits") == second
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["serving.json"]
    assert store.models() == ("digits",)


@pytest.mark.parametrize(
    "data",
    [b"", b'{"stable": 1, "sha', b'{"stable": 0}', b'{"stable": 1, "extra": 2}', b"[]", b"\xff\xfe", b" " * 70_000],
)
def test_torn_pointer_is_an_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "serving.json").write_bytes(data)
    with refused(Code.INTERNAL) as caught:
        Store(tmp_path).pointer("digits")
    assert str(tmp_path) not in caught.value.message


def test_unreadable_pointer_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "digits" / "serving.json").mkdir(parents=True)
    with refused(Code.INTERNAL):
        Store(tmp_path).pointer("digits")


def test_remove_refuses_what_is_in_use(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for release in (1, 2, 3, 4):
        commit(store, make_manifest(release=release))
    store.write_pointer("digits", Pointer(stable=3, candidate=4, last_good=2))
    for release in (2, 3, 4):
        with refused(Code.CONFLICT):
            store.remove_release("digits", release)
    store.remove_release("digits", 1)
    store.remove_release("digits", 1)
    assert store.releases("digits") == (2, 3, 4)
    (tmp_path / "digits" / "serving.json").write_bytes(b"{")
    with refused(Code.INTERNAL):
        store.remove_release("digits", 2)


def test_strange_entries_are_no_versions(tmp_path: Path) -> None:
    store = Store(tmp_path)
    commit(store, make_manifest(release=7))
    for name in ("07", "1e3", "x", "-1", "9" * 30):
        (tmp_path / "digits" / name).mkdir()
    (tmp_path / "digits" / "8").mkdir()
    (tmp_path / "NOT A MODEL").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"")
    assert store.releases("digits") == (7,)
    assert store.models() == ("digits",)
    with refused(Code.MODEL_NOT_FOUND):
        store.manifest("digits", 8)


def test_staging_keeps_what_an_interrupted_fetch_left(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (store.stage_folder("digits", 1) / "model.onnx").write_bytes(b"wei")
    assert (Store(tmp_path).stage_folder("digits", 1) / "model.onnx").read_bytes() == b"wei"
    store.discard_staged("digits", 1)
    store.discard_staged("digits", 1)
    assert not list(store.stage_folder("digits", 1).iterdir())
    assert store.models() == ()


def test_clean_finishes_interrupted_deletions(tmp_path: Path) -> None:
    store = Store(tmp_path)
    commit(store, make_manifest())
    (tmp_path / ".staging" / ".removed" / "digits.9.x" / "version").mkdir(parents=True)
    (tmp_path / "digits" / ".serving.json.abc").write_bytes(b"{")
    store.clean()
    assert not list((tmp_path / ".staging" / ".removed").iterdir())
    assert sorted(path.name for path in (tmp_path / "digits").iterdir()) == ["1"]
