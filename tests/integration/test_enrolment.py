"""`join` and `renew` against a small controller over real TLS: who is believed, what is sent, what is written."""

from __future__ import annotations

import hashlib
import http.server
import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from nearcast.clock import SYSTEM_CLOCK, ManualClock
from nearcast.errors import Code, MeshError
from nearcast.identity import (
    CertificateAuthority,
    Identity,
    JoinToken,
    join,
    load_identity,
    make_csr,
    parse_uri,
    peer_uri,
    renew,
    server_tls,
)
from nearcast.identity.files import write_file

DAY_S = 86_400
ROOT = '{"signed": {"version": 1}}\n'
SECRET = "a-secret-of-the-invitation"


@dataclass
class Controller:
    """A controller with one invitation. `received` is what ever reached it; the switches make it lie."""

    authority: CertificateAuthority
    address: str = ""
    ca_pem: bytes = b""
    root: str = ROOT
    certified_name: str = ""
    foreign_authority: CertificateAuthority | None = None
    used: bool = False
    received: list[dict[str, Any]] = field(default_factory=list)

    def answer(self, path: str, body: dict[str, str], peer: str) -> tuple[int, dict[str, str]]:
        self.received.append({"path": path, **body})
        if path == "/v1/enrol" and (self.used or body["secret"] != SECRET):
            return 401, {"error": "The invitation is used up.", "code": "UNAUTHENTICATED"}
        if path == "/v1/renew" and not peer:
            return 401, {"error": "Who are you?", "code": "UNAUTHENTICATED"}
        self.used = True
        role, name = parse_uri(peer) if peer else ("edge", "edge-1")
        authority = self.foreign_authority or self.authority
        pem = authority.issue(body["csr"].encode(), name=self.certified_name or name, role=role, lifetime_s=DAY_S)
        return 200, {"certificate": pem.decode(), "ca": self.ca_pem.decode(), "root": self.root}

    def token(self, **changes: Any) -> str:
        values: dict[str, Any] = {
            "control": f"https://{self.address}",
            "ca_sha256": self.authority.fingerprint,
            "root_sha256": hashlib.sha256(ROOT.encode()).hexdigest(),
            "name": "edge-1",
            "role": "edge",
            "secret": SECRET,
            "expires_at": SYSTEM_CLOCK.wall() + 600,
        }
        return JoinToken(**values | changes).encode()


def certify(authority: CertificateAuthority, folder: Path, role: str) -> Identity:
    folder.mkdir()
    key, csr = make_csr("controller", role)
    write_file(folder / "node.key", key, mode=0o600)
    write_file(folder / "node.pem", authority.issue(csr, name="controller", role=role, lifetime_s=DAY_S))
    write_file(folder / "ca.pem", authority.certificate_pem)
    return load_identity(folder)


@contextmanager
def serve(controller: Controller, identity: Identity) -> Iterator[Controller]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def send(self, status: int, data: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            controller.received.append({"path": self.path})
            self.send(200, controller.ca_pem)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert isinstance(self.connection, ssl.SSLSocket)
            status, answer = controller.answer(self.path, body, peer_uri(self.connection))
            self.send(status, json.dumps(answer).encode())

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # a client that refuses our certificate hangs up; that is what these tests are about

    server = Server(("127.0.0.1", 0), Handler)
    context = server_tls(identity, require_client=False, alpn=())
    server.socket = context.wrap_socket(server.socket, server_side=True)
    controller.address = f"127.0.0.1:{server.server_address[1]}"
    controller.ca_pem = controller.ca_pem or controller.authority.certificate_pem
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield controller
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[Controller]:
    authority = CertificateAuthority.create(tmp_path / "ca")
    with serve(Controller(authority), certify(authority, tmp_path / "controller", "sync")) as running:
        yield running


def test_a_node_joins_and_renews(controller: Controller, tmp_path: Path) -> None:
    folder = tmp_path / "deep/identity"
    identity = join(controller.token(), folder)
    assert identity.uri == "spiffe://nearcast/edge/edge-1"
    assert sorted(path.name for path in folder.iterdir()) == ["ca.pem", "control", "node.key", "node.pem", "root.json"]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert identity.key.stat().st_mode & 0o777 == 0o600
    assert (folder / "root.json").read_text() == ROOT
    assert (folder / "control").read_text().strip() == f"https://{controller.address}"
    before = identity.certificate.read_bytes(), identity.key.read_bytes()
    assert renew(folder) == identity
    assert identity.certificate.read_bytes() != before[0]
    assert identity.key.read_bytes() == before[1]


def test_a_used_token_asks_for_a_new_invitation_and_harms_nothing(controller: Controller, tmp_path: Path) -> None:
    identity = join(controller.token(), tmp_path / "n")
    certificate = identity.certificate.read_bytes()
    with pytest.raises(MeshError, match=r"invitation is used up.*nearcast nodes invite") as caught:
        join(controller.token(), tmp_path / "n")
    assert caught.value.code is Code.UNAUTHENTICATED
    assert load_identity(tmp_path / "n").certificate.read_bytes() == certificate


def test_an_expired_token_is_not_even_sent(controller: Controller, tmp_path: Path) -> None:
    with pytest.raises(MeshError, match="has expired, or this machine's clock is ahead.*nodes invite"):
        join(controller.token(expires_at=1_000.0), tmp_path / "n")
    with pytest.raises(MeshError, match="clock"):
        join(controller.token(), tmp_path / "n", clock=ManualClock(wall=5e9))
    assert controller.received == []


def test_a_controller_with_another_ca_never_hears_the_secret(controller: Controller, tmp_path: Path) -> None:
    with pytest.raises(MeshError, match="not the controller that the token names") as caught:
        join(controller.token(ca_sha256="0" * 64), tmp_path / "n")
    assert caught.value.code is Code.UNTRUSTED
    assert controller.received == [{"path": "/v1/ca"}]


def test_showing_the_right_ca_without_its_key_is_not_enough(tmp_path: Path) -> None:
    """A man in the middle can copy the CA certificate, it is public; he cannot show a certificate that it signed."""
    authority = CertificateAuthority.create(tmp_path / "ca")
    rogue = CertificateAuthority.create(tmp_path / "rogue")
    with serve(Controller(authority), certify(rogue, tmp_path / "controller", "sync")) as controller:
        with pytest.raises(MeshError, match="not from this mesh"):
            join(controller.token(), tmp_path / "n")
        assert controller.received == [{"path": "/v1/ca"}]


def test_a_node_of_the_mesh_cannot_pose_as_its_controller(tmp_path: Path) -> None:
    authority = CertificateAuthority.create(tmp_path / "ca")
    with serve(Controller(authority), certify(authority, tmp_path / "controller", "edge")) as controller:
        with pytest.raises(MeshError) as caught:
            join(controller.token(), tmp_path / "n")
        assert caught.value.code is Code.FORBIDDEN
        assert controller.received == [{"path": "/v1/ca"}]


def test_another_tuf_root_is_refused_and_not_kept(controller: Controller, tmp_path: Path) -> None:
    controller.root = ROOT.replace("1", "2")
    with pytest.raises(MeshError, match="another TUF root") as caught:
        join(controller.token(), tmp_path / "n")
    assert caught.value.code is Code.UNTRUSTED
    assert [path.name for path in (tmp_path / "n").iterdir()] == ["node.key"]


@pytest.mark.parametrize("lie", ["name", "authority"])
def test_a_certificate_that_is_not_ours_is_refused(controller: Controller, tmp_path: Path, lie: str) -> None:
    if lie == "name":
        controller.certified_name = "edge-2"
    else:
        controller.foreign_authority = CertificateAuthority.create(tmp_path / "foreign")
    with pytest.raises(MeshError) as caught:
        join(controller.token(), tmp_path / "n")
    assert caught.value.code is Code.UNTRUSTED
    assert not (tmp_path / "n/node.pem").exists()


def test_an_absent_controller_is_unavailable(controller: Controller, tmp_path: Path) -> None:
    with pytest.raises(MeshError, match="cannot be reached") as caught:
        join(controller.token(control="https://127.0.0.1:1"), tmp_path / "n")
    assert caught.value.code is Code.UNAVAILABLE


def test_a_controller_that_answers_nonsense_is_refused(controller: Controller, tmp_path: Path) -> None:
    controller.ca_pem = b"<html>"
    with pytest.raises(MeshError, match="no controller of a mesh"):
        join(controller.token(), tmp_path / "n")
