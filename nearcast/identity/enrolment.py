"""How a node becomes a member: it makes its own key, pins the CA and the TUF root of its token, and gets a certificate.

Nothing is trusted on first use. The CA certificate is fetched over an unverified connection and believed only if its
fingerprint is the token's; the secret travels only over a second connection that this CA vouches for.
"""

from __future__ import annotations

import hashlib
import http.client
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization

from nearcast.clock import SYSTEM_CLOCK, Clock
from nearcast.errors import CATALOGUE, Code, MeshError
from nearcast.identity.authority import fingerprint, make_csr, sign_csr
from nearcast.identity.files import KEY_MODE, make_folder, write_file
from nearcast.identity.node import (
    CA_FILE,
    CERTIFICATE_FILE,
    CONTROL_FILE,
    KEY_FILE,
    ROOT_FILE,
    Identity,
    certificate_identity,
    load_identity,
    read_certificate,
)
from nearcast.identity.tls import client_tls, require_role, tls_error
from nearcast.identity.token import INVITE_AGAIN, JoinToken

_OK: Final = 200
TIMEOUT_S: Final = 10.0
ANSWER_SIZE_BYTES_MAX: Final = 1024 * 1024
_REFUSED: Final = frozenset({400, 401, 403, 404, 409, 410, 412, 422})


class _Enrolled(msgspec.Struct, frozen=True):
    certificate: str
    ca: str
    root: str


class _Refusal(msgspec.Struct, frozen=True):
    error: str = ""
    code: str = ""


def join(token: str, folder: Path, *, clock: Clock = SYSTEM_CLOCK) -> Identity:
    """Join the mesh that `token` invites to and keep the identity in `folder`. Blocks; repeating it is harmless.

    Only the key, `node.key` (0600, kept if there is one), is written before the controller has answered. Then come
    `ca.pem`, `root.json` (the TUF root, its digest checked), `control` (the controller's URL) and, last, `node.pem`.

    Raises:
        MeshError: with what to do: a token that is damaged, used or expired asks for a new invitation; a controller
            that is not the token's is UNTRUSTED; a clock that is wrong is named.
    """
    invite = JoinToken.decode(token)
    if clock.wall() >= invite.expires_at:
        raise MeshError(
            Code.UNAUTHENTICATED, f"The join token has expired, or this machine's clock is ahead; {INVITE_AGAIN}."
        )
    make_folder(folder)
    key_pem, csr = _key_and_csr(folder, invite.name, invite.role)
    ca = _fetch_ca(invite)
    ca_pem = ca.public_bytes(serialization.Encoding.PEM)
    context = client_tls(None, ca=ca_pem, alpn=("http/1.1",))
    answer = _post(
        invite.control, "/v1/enrol", {"secret": invite.secret, "csr": csr.decode()}, context, refused=_refuse_token
    )
    if hashlib.sha256(answer.root.encode()).hexdigest() != invite.root_sha256:
        raise MeshError(Code.UNTRUSTED, f"{invite.control} sent another TUF root than the token names; {INVITE_AGAIN}.")
    certificate = _require_ours(answer.certificate, ca=ca, key_pem=key_pem, role=invite.role, name=invite.name)
    write_file(folder / CA_FILE, ca_pem)
    write_file(folder / ROOT_FILE, answer.root.encode())
    write_file(folder / CONTROL_FILE, invite.control.encode() + b"\n")
    write_file(folder / CERTIFICATE_FILE, certificate)
    return load_identity(folder)


def renew(folder: Path, *, control: str = "") -> Identity:
    """Replace the certificate in `folder` by a fresh one for the same key. Blocks.

    `control` is the controller's URL, if it is not the one that the folder names.

    Raises:
        MeshError: UNAVAILABLE if the controller cannot be reached (try again later), UNAUTHENTICATED if the present
            certificate has expired or the node was removed (join again).
    """
    identity = load_identity(folder)
    control = control or _read_control(folder)
    key_pem = identity.key.read_bytes()
    ca = read_certificate(identity.ca)
    context = client_tls(identity, ca=identity.ca, alpn=("http/1.1",))
    csr = sign_csr(key_pem, identity.name, identity.role)
    answer = _post(control, "/v1/renew", {"csr": csr.decode()}, context, refused=_refuse_renewal)
    certificate = _require_ours(answer.certificate, ca=ca, key_pem=key_pem, role=identity.role, name=identity.name)
    write_file(identity.certificate, certificate)
    return load_identity(folder)


def _key_and_csr(folder: Path, name: str, role: str) -> tuple[bytes, bytes]:
    path = folder / KEY_FILE
    if path.exists():
        key_pem = path.read_bytes()
        return key_pem, sign_csr(key_pem, name, role)
    key_pem, csr = make_csr(name, role)
    write_file(path, key_pem, mode=KEY_MODE)
    return key_pem, csr


def _fetch_ca(invite: JoinToken) -> x509.Certificate:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    status, body = _exchange(invite.control, "GET", "/v1/ca", None, context, check_peer=False)
    try:
        if status != _OK:
            raise ValueError(f"status {status}")
        ca = x509.load_pem_x509_certificate(body)
    except ValueError as error:
        raise MeshError(Code.UNTRUSTED, f"{invite.control} is no controller of a mesh; check the token.") from error
    if fingerprint(ca) != invite.ca_sha256:
        raise MeshError(
            Code.UNTRUSTED,
            f"{invite.control} is not the controller that the token names (its CA is another one); {INVITE_AGAIN}.",
        )
    return ca


def _post(
    control: str,
    path: str,
    body: dict[str, str],
    context: ssl.SSLContext,
    *,
    refused: Callable[[str, str], MeshError],
) -> _Enrolled:
    status, data = _exchange(control, "POST", path, msgspec.json.encode(body), context, check_peer=True)
    if status != _OK:
        said = _refusal(data)
        if status in _REFUSED:
            raise refused(control, said.error)
        raise MeshError(_code(status, said.code), f"{control} could not answer: {said.error or f'status {status}'}")
    try:
        return msgspec.json.decode(data, type=_Enrolled)
    except msgspec.DecodeError as error:
        raise MeshError(Code.INTERNAL, f"{control} answered something that is no certificate.") from error


def _exchange(
    control: str, method: str, path: str, body: bytes | None, context: ssl.SSLContext, *, check_peer: bool
) -> tuple[int, bytes]:
    """One HTTP exchange: (status, body). With `check_peer` nothing is sent to a peer that has not the role `sync`."""
    parts = urlsplit(control)
    try:
        connection = http.client.HTTPSConnection(
            parts.hostname or "", parts.port, timeout=TIMEOUT_S, context=context, blocksize=ANSWER_SIZE_BYTES_MAX
        )
    except (ValueError, http.client.HTTPException) as error:
        raise MeshError(Code.INVALID_REQUEST, f"{control} is no address of a controller; {INVITE_AGAIN}.") from error
    try:
        connection.connect()
        if check_peer:
            require_role(connection.sock.getpeercert(), ("sync",))
        connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
        response = connection.getresponse()
        data = response.read(ANSWER_SIZE_BYTES_MAX + 1)
    except (OSError, http.client.HTTPException) as error:
        raise tls_error(error, control) from error
    finally:
        connection.close()
    if len(data) > ANSWER_SIZE_BYTES_MAX:
        raise MeshError(Code.UNTRUSTED, f"{control} answered more than {ANSWER_SIZE_BYTES_MAX} bytes.")
    return response.status, data


def _require_ours(pem: str, *, ca: x509.Certificate, key_pem: bytes, role: str, name: str) -> bytes:
    """The certificate as bytes, if it is for our key and name and from our CA."""
    try:
        certificate = x509.load_pem_x509_certificate(pem.encode())
        key = serialization.load_pem_private_key(key_pem, password=None)
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise MeshError(
            Code.UNTRUSTED, "The controller sent a certificate that the mesh's CA has not signed."
        ) from error
    if certificate.public_key() != key.public_key() or certificate_identity(certificate) != (role, name):
        raise MeshError(Code.UNTRUSTED, "The controller sent a certificate for another node.")
    return certificate.public_bytes(serialization.Encoding.PEM)


def _read_control(folder: Path) -> str:
    try:
        return (folder / CONTROL_FILE).read_text().strip()
    except OSError as error:
        raise MeshError(Code.UNAVAILABLE, f"{folder} names no controller; join again.") from error


def _refuse_token(control: str, said: str) -> MeshError:
    reason = f" ({said.rstrip('.')})" if said else ""
    return MeshError(Code.UNAUTHENTICATED, f"{control} does not accept the join token{reason}; {INVITE_AGAIN}.")


def _refuse_renewal(control: str, said: str) -> MeshError:
    reason = f" ({said.rstrip('.')})" if said else ""
    return MeshError(Code.UNAUTHENTICATED, f"{control} does not renew this node{reason}; {INVITE_AGAIN}.")


def _refusal(data: bytes) -> _Refusal:
    try:
        said = msgspec.json.decode(data, type=_Refusal)
    except msgspec.DecodeError:
        return _Refusal()
    return _Refusal(said.error[:300], said.code)


def _code(status: int, code: str) -> Code:
    if code in Code.__members__:
        return Code(code)
    return next((known for known, entry in CATALOGUE.items() if entry.http == status), Code.UNAVAILABLE)
