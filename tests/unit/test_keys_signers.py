"""Where keys come from: files, public halves, URIs; and what the ring of an operator remembers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from model_sync.publisher.key_ring import KeyRing
from model_sync.publisher.keys import FOLDERS, RoleKeys, init_keys, new_key, public_path
from model_sync.publisher.signers import LIBRARY_VARIABLE, find_key, open_signer, parse_pkcs11
from nearcast.errors import Code, MeshError


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "alice.pem"
    new_key(path)
    return path


def test_a_file_holds_a_private_key_or_a_public_one(key: Path) -> None:
    private, public = find_key(str(key)), find_key(str(public_path(key)))
    assert private.key.keyid == public.key.keyid
    assert key.stat().st_mode & 0o777 == 0o600
    public.key.verify_signature(open_signer(private).sign(b"data"), b"data")
    with pytest.raises(MeshError, match="only the public half") as caught:
        open_signer(public)
    assert caught.value.code is Code.FORBIDDEN
    with pytest.raises(MeshError, match="never overwritten"):
        new_key(key)


def test_a_signer_of_the_registry_is_named_by_uri_and_public_key(key: Path) -> None:
    place = find_key(f"file2:{key}#{public_path(key)}")
    assert place.uri == f"file2:{key}"
    place.key.verify_signature(open_signer(place).sign(b"data"), b"data")
    with pytest.raises(MeshError, match="needs its public key"):
        find_key(f"file2:{key}")
    key.unlink()
    with pytest.raises(MeshError, match="cannot be used") as caught:
        open_signer(place)
    assert caught.value.code is Code.FORBIDDEN


def test_what_is_no_key_is_refused(tmp_path: Path, key: Path) -> None:
    (tmp_path / "text").write_text("nothing")
    for text in (str(tmp_path / "absent"), str(tmp_path / "text"), "unknown:key"):
        with pytest.raises(MeshError) as caught:
            find_key(text)
        assert caught.value.code is Code.INVALID_REQUEST
    key.chmod(0o644)
    with pytest.raises(MeshError, match="chmod 600"):
        find_key(str(key))


@pytest.mark.parametrize(
    "uri",
    [
        "pkcs11:token=a",
        "pkcs11:object=b",
        "pkcs11:token=a;object=b;id=%01",
        "pkcs11:token=a;object=b?pin-value=1234",
        "pkcs11:token=a;object=b;pin-value=1234",
        "pkcs11:token=a;serial=b",
    ],
)
def test_a_token_uri_has_token_and_object_and_never_a_pin(uri: str) -> None:
    with pytest.raises(MeshError, match="PKCS11_PIN") as caught:
        parse_pkcs11(uri)
    assert caught.value.code is Code.INVALID_REQUEST
    assert "?" not in caught.value.message


def test_a_token_needs_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LIBRARY_VARIABLE, raising=False)
    with pytest.raises(MeshError, match=LIBRARY_VARIABLE):
        find_key("pkcs11:token=a;object=b")


def test_the_ring_finds_files_by_key_and_notes_the_rest(tmp_path: Path, key: Path) -> None:
    operator = tmp_path / "operator"
    operator.mkdir()
    outside, place = find_key(str(key)), find_key(str(key))
    assert KeyRing(operator).signer(outside.key) is None
    assert KeyRing(operator, [str(key)]).signer(outside.key) is not None, "named by the command"
    assert KeyRing(operator).has(place.key.keyid), "and remembered"
    key.rename(operator / "models-core.pem")
    ring = KeyRing(operator)
    assert ring.signer(place.key) is not None
    # A copied folder signs with what it holds, not with what lies where it was copied from.
    copy = tmp_path / "copy"
    shutil.copytree(operator, copy)
    (copy / "models-core.pem").unlink()
    assert KeyRing(copy).signer(place.key) is None
    assert not KeyRing(copy).has(place.key.keyid)
    (operator / "keys.json").write_text("{")
    with pytest.raises(MeshError, match=r"keys\.json"):
        KeyRing(operator)


def test_a_new_key_takes_the_place_of_the_one_that_counts_no_more(tmp_path: Path) -> None:
    old, new = new_key(tmp_path / "root.pem"), new_key(tmp_path / "root.new.pem")
    for path in tmp_path.glob("*.pub.pem"):
        path.unlink()
    ring = KeyRing(tmp_path)
    ring.settle("root", [old.keyid])
    assert ring.files()[new.keyid].name == "root.new.pem", "nothing has changed yet"
    ring.settle("root", [new.keyid])
    assert ring.files() == {new.keyid: tmp_path / "root.pem"}
    assert [path.stem for path in (tmp_path / "retired").iterdir()] == [f"root-{old.keyid[:8]}"]


def test_first_keys_in_several_hands(tmp_path: Path) -> None:
    for name in ("alice", "bob", "carol"):
        new_key(tmp_path / f"{name}.pem")
    here = [str(tmp_path / name) for name in ("alice.pem", "bob.pub.pem", "carol.pub.pem")]
    for wanted, code in (
        (RoleKeys(keys=tuple(here), threshold=2), Code.FORBIDDEN),
        (RoleKeys(keys=tuple(here), threshold=4), Code.INVALID_REQUEST),
        (RoleKeys(threshold=2), Code.INVALID_REQUEST),
    ):
        with pytest.raises(MeshError) as caught:
            init_keys(tmp_path / "home", roles={"root": wanted})
        assert caught.value.code is code
        assert not any((tmp_path / "home" / name).exists() for name in FOLDERS)
    init_keys(tmp_path / "home", roles={"root": RoleKeys(keys=tuple(here))})
    assert not (tmp_path / "home" / "backup").exists()
    assert {path.name for path in (tmp_path / "home" / "operator").glob("*.pem")} == {"models-core.pem", "targets.pem"}
