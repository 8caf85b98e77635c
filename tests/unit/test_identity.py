from __future__ import annotations

import hashlib
import os
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from nearcast.clock import SYSTEM_CLOCK, ManualClock
from nearcast.errors import Code, MeshError
from nearcast.identity import (
    CERTIFICATE_LIFETIME_S,
    CertificateAuthority,
    Identity,
    JoinToken,
    client_tls,
    load_identity,
    make_csr,
    make_uri,
    parse_uri,
    peer_uri,
    read_token,
    reload_certificate,
    require_role,
    server_tls,
    tls_error,
)
from nearcast.identity.files import write_file

DAY_S = 86_400


def enrol(authority: CertificateAuthority, folder: Path, name: str, role: str, lifetime_s: float = DAY_S) -> Identity:
    folder.mkdir(parents=True)
    key, csr = make_csr(name, role)
    write_file(folder / "node.key", key, mode=0o600)
    write_file(folder / "node.pem", authority.issue(csr, name=name, role=role, lifetime_s=lifetime_s))
    write_file(folder / "ca.pem", authority.certificate_pem)
    return load_identity(folder)


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """A TLS handshake in memory: (server's side, client's side), or the error of the side that refuses."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = (server.wrap_bio(to_server, to_client, server_side=True), client.wrap_bio(to_client, to_server))
    for _ in range(4):
        for side in reversed(sides):
            try:
                side.do_handshake()
                side.read(1)  # a TLS 1.3 client is told only afterwards that its certificate is refused
            except ssl.SSLWantReadError:
                pass
    return sides


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> CertificateAuthority:
    return CertificateAuthority.create(tmp_path_factory.mktemp("ca"))


def test_an_authority_keeps_its_key_to_itself_and_is_never_replaced(tmp_path: Path) -> None:
    created = CertificateAuthority.create(tmp_path / "ca")
    assert (tmp_path / "ca/ca.key").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "ca").stat().st_mode & 0o777 == 0o700
    with pytest.raises(MeshError, match="not replaced"):
        CertificateAuthority.create(tmp_path / "ca")
    loaded = CertificateAuthority.load(tmp_path / "ca")
    der = ssl.PEM_cert_to_DER_cert((tmp_path / "ca/ca.pem").read_text())
    assert created.fingerprint == loaded.fingerprint == hashlib.sha256(der).hexdigest()


def test_an_authority_with_a_foreign_key_does_not_load(tmp_path: Path) -> None:
    for name in ("a", "b"):
        CertificateAuthority.create(tmp_path / name)
    (tmp_path / "a/ca.key").replace(tmp_path / "b/ca.key")
    with pytest.raises(MeshError, match="not its own"):
        CertificateAuthority.load(tmp_path / "b")


def test_a_certificate_names_what_the_authority_says_not_what_the_request_asks(authority: CertificateAuthority) -> None:
    _, csr = make_csr("cloud-1", "cloud")
    certificate = x509.load_pem_x509_certificate(authority.issue(csr, name="edge-1", role="edge", lifetime_s=DAY_S))
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://nearcast/edge/edge-1"]
    assert names.get_values_for_type(x509.DNSName) == ["edge-1", "localhost"]
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


@pytest.mark.parametrize(
    ("name", "role", "lifetime_s"),
    [
        ("edge-1", "edge", CERTIFICATE_LIFETIME_S + 1),
        ("edge-1", "edge", 0),
        ("edge-1", "admin", DAY_S),
        ("Edge", "edge", DAY_S),
        ("a/b", "edge", DAY_S),
        ("a" * 64, "edge", DAY_S),
        ("", "edge", DAY_S),
    ],
)
def test_the_authority_refuses_what_it_must_not_sign(
    authority: CertificateAuthority, name: str, role: str, lifetime_s: float
) -> None:
    _, csr = make_csr("edge-1", "edge")
    with pytest.raises(MeshError) as caught:
        authority.issue(csr, name=name, role=role, lifetime_s=lifetime_s)
    assert caught.value.code is Code.INVALID_REQUEST


def rsa_csr() -> bytes:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "edge-1")])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def forged_csr() -> bytes:
    _, csr = make_csr("edge-1", "edge")
    der = bytearray(x509.load_pem_x509_csr(csr).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    return x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize("csr", [b"", b"garbage", b"x" * 20_000, rsa_csr(), forged_csr()])
def test_a_bad_request_is_refused(authority: CertificateAuthority, csr: bytes) -> None:
    with pytest.raises(MeshError) as caught:
        authority.issue(csr, name="edge-1", role="edge", lifetime_s=DAY_S)
    assert caught.value.code is Code.INVALID_REQUEST


def test_an_identity_loads_and_says_when_to_renew(authority: CertificateAuthority, tmp_path: Path) -> None:
    identity = enrol(authority, tmp_path / "n", "edge-1", "edge", lifetime_s=3 * DAY_S)
    assert (identity.name, identity.role, identity.uri) == ("edge-1", "edge", "spiffe://nearcast/edge/edge-1")
    validity = identity.validity()
    assert 1.99 * DAY_S < validity.renew_at - SYSTEM_CLOCK.wall() < 2 * DAY_S
    validity.require(SYSTEM_CLOCK.wall())
    with pytest.raises(MeshError, match=r"clock says 1970-01-01 .*set the clock"):
        validity.require(60.0)
    with pytest.raises(MeshError, match="expired on .*nodes invite"):
        validity.require(validity.ends_at)


def test_a_damaged_identity_is_refused_with_a_reason(authority: CertificateAuthority, tmp_path: Path) -> None:
    identity = enrol(authority, tmp_path / "n", "edge-1", "edge")
    other = enrol(authority, tmp_path / "o", "edge-2", "edge")
    identity.key.chmod(0o640)
    with pytest.raises(MeshError, match="chmod 600"):
        load_identity(tmp_path / "n")
    identity.key.chmod(0o600)
    identity.certificate.write_bytes(other.certificate.read_bytes())
    with pytest.raises(MeshError, match="is not the key of"):
        load_identity(tmp_path / "n")
    identity.certificate.unlink()
    with pytest.raises(MeshError, match=r"node\.pem missing.*nodes invite"):
        load_identity(tmp_path / "n")
    other.certificate.write_text("garbage")
    with pytest.raises(MeshError, match="no readable certificate"):
        load_identity(tmp_path / "o")


def test_peers_know_each_other_by_uri(authority: CertificateAuthority, tmp_path: Path) -> None:
    edge = enrol(authority, tmp_path / "e", "edge-1", "edge")
    cloud = enrol(authority, tmp_path / "c", "cloud-1", "cloud")
    server, client = shake_hands(
        server_tls(cloud, require_client=True, alpn=("h2",)), client_tls(edge, ca=edge.ca, alpn=("h2",))
    )
    assert peer_uri(server) == edge.uri
    assert peer_uri(client) == cloud.uri
    assert (client.version(), client.selected_alpn_protocol()) == ("TLSv1.3", "h2")
    assert require_role(client.getpeercert(), ("cloud",)) == ("cloud", "cloud-1")
    with pytest.raises(MeshError) as caught:
        require_role(client.getpeercert(), ("sync",))
    assert caught.value.code is Code.FORBIDDEN


def test_a_client_without_certificate_is_refused_or_anonymous(authority: CertificateAuthority, tmp_path: Path) -> None:
    cloud = enrol(authority, tmp_path / "c", "cloud-1", "cloud")
    anonymous = client_tls(None, ca=authority.certificate_pem, alpn=())
    with pytest.raises(ssl.SSLError):
        shake_hands(server_tls(cloud, require_client=True, alpn=()), anonymous)
    server, _ = shake_hands(server_tls(cloud, require_client=False, alpn=()), anonymous)
    assert peer_uri(server) == ""
    with pytest.raises(MeshError) as caught:
        require_role(server.getpeercert(), ("edge",))
    assert caught.value.code is Code.UNAUTHENTICATED


@pytest.mark.parametrize("require_client", [True, False])
def test_certificates_of_another_mesh_are_refused_in_both_directions(
    authority: CertificateAuthority, tmp_path: Path, require_client: bool
) -> None:
    rogue_authority = CertificateAuthority.create(tmp_path / "rogue-ca")
    rogue = enrol(rogue_authority, tmp_path / "rogue", "edge-1", "edge")
    cloud = enrol(authority, tmp_path / "c", "cloud-1", "cloud")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(server_tls(cloud, require_client=require_client, alpn=()), client_tls(rogue, ca=cloud.ca, alpn=()))
    with pytest.raises(ssl.SSLCertVerificationError) as caught:
        shake_hands(server_tls(cloud, require_client=False, alpn=()), client_tls(None, ca=rogue.ca, alpn=()))
    assert "not from this mesh" in tls_error(caught.value, "c:1").message


def test_an_operator_cannot_pose_as_a_server(authority: CertificateAuthority, tmp_path: Path) -> None:
    operator = enrol(authority, tmp_path / "o", "alice", "operator")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(server_tls(operator, require_client=False, alpn=()), client_tls(None, ca=operator.ca, alpn=()))


def test_older_tls_is_refused(authority: CertificateAuthority, tmp_path: Path) -> None:
    cloud = enrol(authority, tmp_path / "c", "cloud-1", "cloud")
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match=r"(?i)protocol"):
        shake_hands(server_tls(cloud, require_client=False, alpn=()), old)


@pytest.mark.parametrize(
    ("offset_s", "text"), [(-30 * DAY_S, "has expired"), (30 * DAY_S, "not yet valid: this machine's clock is behind")]
)
def test_an_error_of_time_names_the_clock(
    authority: CertificateAuthority, tmp_path: Path, offset_s: float, text: str
) -> None:
    clock = ManualClock(wall=SYSTEM_CLOCK.wall() + offset_s)
    shifted = CertificateAuthority.create(tmp_path / "ca", clock=clock)
    node = enrol(shifted, tmp_path / "n", "cloud-1", "cloud")
    with pytest.raises(ssl.SSLCertVerificationError) as caught:
        shake_hands(server_tls(node, require_client=False, alpn=()), client_tls(None, ca=node.ca, alpn=()))
    message = tls_error(caught.value, "cloud-1:8001").message
    assert text in message
    assert "clock" in message
    assert "cloud-1:8001" in message


def test_a_renewed_certificate_is_shown_without_a_new_context(authority: CertificateAuthority, tmp_path: Path) -> None:
    identity = enrol(authority, tmp_path / "n", "cloud-1", "cloud")
    context = server_tls(identity, require_client=False, alpn=())
    other = enrol(authority, tmp_path / "m", "cloud-2", "cloud")
    reload_certificate(context, other)
    _, client = shake_hands(context, client_tls(None, ca=identity.ca, alpn=()))
    assert peer_uri(client) == other.uri


def test_a_reload_reaches_every_context_that_lives(authority: CertificateAuthority, tmp_path: Path) -> None:
    identity = enrol(authority, tmp_path / "n", "cloud-1", "cloud")
    server = server_tls(identity, require_client=True, alpn=())
    client = client_tls(identity, ca=identity.ca, alpn=())
    gone = server_tls(identity, require_client=True, alpn=())
    reloaded: list[str] = []
    identity.on_reload(gone, lambda _: reloaded.append("gone"))
    del gone
    other = enrol(authority, tmp_path / "m", "cloud-2", "cloud")
    for name in ("node.key", "node.pem"):
        (tmp_path / "m" / name).replace(tmp_path / "n" / name)
    identity.reload()
    assert [peer_uri(side) for side in shake_hands(server, client)] == [other.uri, other.uri]
    assert reloaded == []


def test_a_short_life_is_not_over_before_it_begins(authority: CertificateAuthority, tmp_path: Path) -> None:
    before = SYSTEM_CLOCK.wall()
    validity = enrol(authority, tmp_path / "n", "edge-1", "edge", lifetime_s=60).validity()
    assert before < validity.renew_at < validity.ends_at
    long_lived = enrol(authority, tmp_path / "m", "edge-2", "edge", lifetime_s=CERTIFICATE_LIFETIME_S).validity()
    assert before - long_lived.starts_at > 290


@given(st.text(max_size=60))
def test_no_other_text_is_an_identity(text: str) -> None:
    for uri in (text, f"spiffe://nearcast/{text}", f"spiffe://nearcast/edge/{text}"):
        try:
            role, name = parse_uri(uri)
        except MeshError as error:
            assert error.code is Code.UNAUTHENTICATED
        else:
            assert make_uri(role, name) == uri


TOKEN = JoinToken(
    control="https://127.0.0.1:8443",
    ca_sha256="0" * 64,
    root_sha256="f" * 64,
    name="edge-1",
    role="edge",
    secret="s" * 32,
    expires_at=1_800_000_000.0,
)


def test_a_token_survives_the_round_trip_and_the_newline_of_a_paste() -> None:
    text = TOKEN.encode()
    assert set(text) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")
    assert JoinToken.decode(f" {text}\n") == TOKEN


def test_a_token_is_read_from_where_the_command_line_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = TOKEN.encode()
    (tmp_path / "token").write_text(f"{text}\n")
    assert read_token(text) == text
    assert read_token(f"@{tmp_path}/token") == text
    for typed in (f"{text}\nnot read", text):
        reader, writer = os.pipe()
        os.write(writer, typed.encode())
        os.close(writer)
        monkeypatch.setattr("nearcast.identity.token._STANDARD_INPUT", reader)
        assert read_token("-") == text
        os.close(reader)


def test_a_token_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    reader, writer = os.pipe()
    os.close(writer)
    monkeypatch.setattr("nearcast.identity.token._STANDARD_INPUT", reader)
    for named, told in (("@nowhere", "nowhere"), (f"@{tmp_path}/empty", "nodes invite"), ("-", "Standard input")):
        with pytest.raises(MeshError, match=told) as caught:
            read_token(named)
        assert caught.value.code is Code.INVALID_REQUEST
    with pytest.raises(MeshError, match="cannot be read"):
        read_token(f"@{tmp_path}/binary")
    os.close(reader)


@given(st.one_of(st.text(max_size=80), st.integers(1, len(TOKEN.encode()) - 1).map(lambda n: TOKEN.encode()[:n])))
def test_a_garbled_token_says_to_invite_again(text: str) -> None:
    with pytest.raises(MeshError, match="nearcast nodes invite"):
        JoinToken.decode(text)


@pytest.mark.parametrize(
    "change",
    [{"control": "http://127.0.0.1:8443"}, {"ca_sha256": "0" * 63}, {"secret": ""}, {"control": "https://a/b"}],
)
def test_a_token_that_would_weaken_trust_is_refused(change: dict[str, str]) -> None:
    import msgspec

    with pytest.raises(MeshError, match="nearcast nodes invite"):
        JoinToken.decode(msgspec.structs.replace(TOKEN, **change).encode())
