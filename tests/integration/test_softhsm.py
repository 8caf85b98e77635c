"""Root and team keys on PKCS#11 tokens: SoftHSM 2, with a token store of the test's own."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tuf.api.metadata import Metadata, Root

from model_sync.publisher import signers
from model_sync.publisher.key_ring import KeyRing
from model_sync.publisher.signers import find_key, open_signer
from nearcast.errors import Code, MeshError
from tests.integration.key_parts import Controller, run_command

LIBRARIES = (
    "/usr/lib/softhsm/libsofthsm2.so",
    "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/lib/aarch64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/local/lib/softhsm/libsofthsm2.so",
)
LIBRARY = next((path for path in LIBRARIES if Path(path).exists()), "")
PIN = "4711"
NOT_NOW = 75
HOLDERS = ("alice", "bob", "carol")

pytestmark = pytest.mark.skipif(
    not LIBRARY or not shutil.which("softhsm2-util"), reason="SoftHSM 2 is not installed: apt-get install softhsm2"
)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A token for each holder with an ECDSA key `root`; the library reads where they are when it is first loaded."""
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "store").mkdir()
    (folder / "softhsm2.conf").write_text(f"directories.tokendir = {folder / 'store'}\nlog.level = ERROR\n")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SOFTHSM2_CONF", str(folder / "softhsm2.conf"))
        environment.setenv(signers.LIBRARY_VARIABLE, LIBRARY)
        for holder in HOLDERS:
            words = ["--init-token", "--free", "--label", holder, "--so-pin", PIN, "--pin", PIN]
            subprocess.run(["softhsm2-util", *words], check=True, capture_output=True)
        for number, holder in enumerate(HOLDERS, start=2):
            make_token_key(holder, number)
        yield


def make_token_key(holder: str, number: int) -> None:
    import pkcs11
    from pkcs11.util.ec import encode_named_curve_parameters

    with pkcs11.lib(LIBRARY).get_token(token_label=holder).open(user_pin=PIN, rw=True) as session:
        curve = {pkcs11.Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")}
        parameters = session.create_domain_parameters(pkcs11.KeyType.EC, curve, local=True)
        parameters.generate_keypair(store=True, label="root", id=bytes([number]))


@pytest.fixture(autouse=True)
def pin(tokens: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(signers.PIN_VARIABLE, PIN)
    monkeypatch.setattr(signers, "_pins", {})


def test_a_token_signs_and_says_which_key_it_holds() -> None:
    place = find_key("pkcs11:token=alice;object=root")
    assert find_key("pkcs11:token=alice;id=%02").key.keyid == place.key.keyid
    assert find_key("pkcs11:token=bob;object=root").key.keyid != place.key.keyid
    assert place.key.scheme == "ecdsa-sha2-nistp256"
    signature = open_signer(place).sign(b"what is signed")
    place.key.verify_signature(signature, b"what is signed")


@pytest.mark.parametrize(
    ("uri", "code"),
    [
        ("pkcs11:token=nobody;object=root", Code.FORBIDDEN),
        ("pkcs11:token=alice;object=other", Code.FORBIDDEN),
        ("pkcs11:token=alice;id=%09", Code.FORBIDDEN),
    ],
)
def test_what_is_not_there_is_named(uri: str, code: Code) -> None:
    with pytest.raises(MeshError, match="cannot be used") as caught:
        find_key(uri)
    assert caught.value.code is code


def test_a_wrong_pin_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(signers.PIN_VARIABLE, "0000")
    with pytest.raises(MeshError, match="PinIncorrect") as caught:
        find_key("pkcs11:token=carol;object=root")
    assert caught.value.code is Code.FORBIDDEN


def test_a_pin_is_asked_for_once_where_there_is_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def answer(prompt: str) -> str:
        asked.append(prompt)
        return PIN

    monkeypatch.delenv(signers.PIN_VARIABLE)
    with pytest.raises(MeshError, match=signers.PIN_VARIABLE):
        find_key("pkcs11:token=alice;object=root")
    monkeypatch.setattr(signers.sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(signers.getpass, "getpass", answer)
    open_signer(find_key("pkcs11:token=alice;object=root")).sign(b"data")
    assert asked == ["PIN of token alice: "]


def test_a_company_begins_and_rotates_with_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    alice, bob, carol = (f"pkcs11:token={holder};object=root" for holder in HOLDERS)
    code, output = run_command(
        f"nearcast keys init --home mesh --root-threshold 2 --root-key '{alice}' --root-key '{bob}' "
        f"--targets-key '{alice}' --targets-key '{bob}'"
    )
    assert code == 0, output
    assert [path.name for path in Path("mesh/operator").glob("*.pem")] == ["models-core.pem"]
    root = Metadata[Root].from_file("mesh/operator/root.json")
    assert len(root.signatures) == 2
    controller = Controller(tmp_path / "mesh")
    try:
        # Bob's token is elsewhere: the present root wants two of alice and bob, so the change waits for him.
        bob_id = find_key(bob).key.keyid
        notes = Path("mesh/operator/keys.json")
        notes.write_text(notes.read_text().replace("token=bob", "token=away"))
        code, output = run_command(f"nearcast keys rotate root --old {bob_id[:8]} --key '{carol}' --home mesh")
        assert code == NOT_NOW, output
        assert bob_id[:8] in output
        code, output = run_command(f"nearcast keys sign mesh/draft --key '{bob}' --home bob")
        assert code == 0, output
        code, output = run_command("nearcast keys submit mesh/draft --home mesh")
        assert code == 0, output
        assert set(controller.keyids("root")) == {find_key(alice).key.keyid, find_key(carol).key.keyid}
    finally:
        controller.stop()


def test_the_ring_remembers_tokens(tmp_path: Path) -> None:
    place = find_key("pkcs11:token=alice;object=root")
    KeyRing(tmp_path).note(place)
    signer = KeyRing(tmp_path).signer(place.key)
    assert signer is not None
    place.key.verify_signature(signer.sign(b"x"), b"x")
    assert PIN not in (tmp_path / "keys.json").read_text()
    assert os.environ[signers.PIN_VARIABLE] == PIN
