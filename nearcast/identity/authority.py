"""The certificate authority of a mesh. Its key stays with the enrolling process; nodes get certificates for a week.

Keys are EC P-256: BoringSSL, which grpcio carries, does not accept Ed25519 certificates in TLS.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import ipaddress
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from nearcast.clock import SYSTEM_CLOCK, Clock
from nearcast.errors import Code, MeshError
from nearcast.identity.files import KEY_MODE, make_folder, write_file
from nearcast.identity.name import make_uri, require_name

CA_FILE: Final = "ca.pem"
CA_KEY_FILE: Final = "ca.key"
CA_LIFETIME_S: Final = 10 * 365 * 86_400
CERTIFICATE_LIFETIME_S: Final = 7 * 86_400
"""The longest a node certificate lives; nodes renew at two thirds."""
CLOCK_SKEW_S: Final = 300
"""How far the clock of a node may be behind that of the authority; for short lives a tenth of them."""
_SKEW_SHARE: Final = 0.1
CSR_SIZE_BYTES_MAX: Final = 16 * 1024
PLAIN_LIFETIME_S_MAX: Final = 365 * 86_400
COMMON_NAME_LENGTH_MAX: Final = 64


class CertificateAuthority:
    """Signs certificates for identities. The name and the role come from the caller, never from the request."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey, clock: Clock) -> None:
        self._certificate = certificate
        self._key = key
        self._clock = clock

    @classmethod
    def create(
        cls, folder: Path, *, common_name: str = "nearcast node CA", clock: Clock = SYSTEM_CLOCK
    ) -> CertificateAuthority:
        """Make a new authority in `folder` (`ca.pem`, and `ca.key` for its owner only).

        Raises:
            MeshError: CONFLICT if the folder holds one already.
        """
        if (folder / CA_KEY_FILE).exists():
            raise MeshError(Code.CONFLICT, f"{folder} holds a certificate authority already; it is not replaced.")
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        now = _utc(clock.wall())
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(seconds=CLOCK_SKEW_S))
            .not_valid_after(now + dt.timedelta(seconds=CA_LIFETIME_S))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(is_ca=True), critical=True)
            .add_extension(identifier, critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
            .sign(key, hashes.SHA256())
        )
        make_folder(folder)
        write_file(folder / CA_FILE, certificate.public_bytes(serialization.Encoding.PEM))
        write_file(folder / CA_KEY_FILE, encode_key(key), mode=KEY_MODE)
        return cls(certificate, key, clock)

    @classmethod
    def load(cls, folder: Path, *, clock: Clock = SYSTEM_CLOCK) -> CertificateAuthority:
        """Read the authority in `folder`.

        Raises:
            MeshError: UNAVAILABLE if there is none or it cannot be read.
        """
        try:
            certificate = x509.load_pem_x509_certificate((folder / CA_FILE).read_bytes())
            key = serialization.load_pem_private_key((folder / CA_KEY_FILE).read_bytes(), password=None)
        except (OSError, ValueError, TypeError) as error:
            raise MeshError(Code.UNAVAILABLE, f"{folder} holds no readable certificate authority: {error}.") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise MeshError(Code.UNAVAILABLE, f"The key of the certificate authority in {folder} is not its own.")
        return cls(certificate, key, clock)

    @property
    def certificate_pem(self) -> bytes:
        """The authority's own certificate; public."""
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the authority's certificate (DER), in hex. Join tokens pin it."""
        return fingerprint(self._certificate)

    def issue(self, csr_pem: bytes, *, name: str, role: str, lifetime_s: float = CERTIFICATE_LIFETIME_S) -> bytes:
        """Sign a certificate for the key of a request, as PEM.

        Args:
            csr_pem: the request; only its public key is used.
            name: the node, a DNS label.
            role: one of the mesh's roles; an operator gets a client certificate only.
            lifetime_s: seconds until it expires, at most `CERTIFICATE_LIFETIME_S`.

        Raises:
            MeshError: INVALID_REQUEST if anything about the request is wrong.
        """
        require_name(role, name)
        if not 0 < lifetime_s <= CERTIFICATE_LIFETIME_S:
            raise MeshError(Code.INVALID_REQUEST, f"A certificate lives at most {CERTIFICATE_LIFETIME_S} seconds.")
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
        if role != "operator":
            usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
        return self._sign(csr_pem, _subject(name, role), lifetime_s, usages, _alternative_names(name, role))

    def issue_plain(self, csr_pem: bytes, *, name: str, lifetime_s: float, hosts: Collection[str] = ()) -> bytes:
        """Sign a certificate that names its holder by its Common Name alone, as brokers understand it. PEM.

        Args:
            csr_pem: the request; only its public key is used.
            name: the Common Name, at most 64 characters.
            lifetime_s: seconds until it expires, at most `PLAIN_LIFETIME_S_MAX`.
            hosts: names and addresses of a server; without any it is a client's certificate.

        Raises:
            MeshError: INVALID_REQUEST if anything about the request is wrong.
        """
        if not 0 < lifetime_s <= PLAIN_LIFETIME_S_MAX:
            raise MeshError(Code.INVALID_REQUEST, f"This certificate lives at most {PLAIN_LIFETIME_S_MAX} seconds.")
        if not 0 < len(name) <= COMMON_NAME_LENGTH_MAX:
            raise MeshError(Code.INVALID_REQUEST, f"A Common Name has 1 to {COMMON_NAME_LENGTH_MAX} characters.")
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        usages = [ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH]
        alternatives = x509.SubjectAlternativeName([_general_name(host) for host in hosts]) if hosts else None
        return self._sign(csr_pem, subject, lifetime_s, usages, alternatives)

    def revocation_list(self, revoked: Mapping[int, float]) -> bytes:
        """The CRL, as PEM: serial number -> wall-clock second of its revocation.

        It does not expire before the authority does, because whoever holds it writes it anew itself.
        """
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._certificate.subject)
            .last_update(_utc(self._clock.wall() - CLOCK_SKEW_S))
            .next_update(self._certificate.not_valid_after_utc)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        for serial, at in revoked.items():
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(_utc(at)).build()
            builder = builder.add_revoked_certificate(entry)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def _sign(
        self,
        csr_pem: bytes,
        subject: x509.Name,
        lifetime_s: float,
        usages: Sequence[x509.ObjectIdentifier],
        alternatives: x509.SubjectAlternativeName | None,
    ) -> bytes:
        public_key = _read_csr(csr_pem)
        now = _utc(self._clock.wall())
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._certificate.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(seconds=min(CLOCK_SKEW_S, lifetime_s * _SKEW_SHARE)))
            .not_valid_after(now + dt.timedelta(seconds=lifetime_s))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(is_ca=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
        )
        if alternatives is not None:
            builder = builder.add_extension(alternatives, critical=False)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def make_csr(name: str, role: str) -> tuple[bytes, bytes]:
    """Make a key and a certificate request for it, both PEM: (key, csr)."""
    key_pem = encode_key(ec.generate_private_key(ec.SECP256R1()))
    return key_pem, sign_csr(key_pem, name, role)


def sign_csr(key_pem: bytes, name: str, role: str) -> bytes:
    """A certificate request for an existing key, as PEM.

    Raises:
        MeshError: INVALID_REQUEST if the key is no EC key, or the name or role is none.
    """
    require_name(role, name)
    key = _read_key(key_pem)
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(_subject(name, role))
        .add_extension(_alternative_names(name, role), critical=False)
        .sign(key, hashes.SHA256())
    )
    return request.public_bytes(serialization.Encoding.PEM)


def make_plain_csr() -> tuple[bytes, bytes]:
    """Make a key and a request that names nobody, both PEM: (key, csr). The signer knows who asks."""
    key_pem = encode_key(ec.generate_private_key(ec.SECP256R1()))
    return key_pem, sign_plain_csr(key_pem)


def sign_plain_csr(key_pem: bytes) -> bytes:
    """A request for an existing key that names nobody, as PEM.

    Raises:
        MeshError: INVALID_REQUEST if the key is no EC key.
    """
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return request.sign(_read_key(key_pem), hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def public_key_fingerprint(csr_pem: bytes) -> str:
    """SHA-256 of the public key of a request, in hex.

    Raises:
        MeshError: INVALID_REQUEST if it cannot be read.
    """
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(_read_csr(csr_pem).public_bytes(serialization.Encoding.DER, spki)).hexdigest()


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of a certificate (DER), in hex."""
    return hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).hexdigest()


def encode_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as unencrypted PKCS #8 PEM."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _read_key(key_pem: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(key_pem, password=None)
    except (ValueError, TypeError) as error:
        raise MeshError(Code.INVALID_REQUEST, "The node's key cannot be read; remove it and join again.") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise MeshError(Code.INVALID_REQUEST, "The node's key is no EC P-256 key; remove it and join again.")
    return key


def _read_csr(csr_pem: bytes) -> ec.EllipticCurvePublicKey:
    if len(csr_pem) > CSR_SIZE_BYTES_MAX:
        raise MeshError(Code.INVALID_REQUEST, f"The certificate request is larger than {CSR_SIZE_BYTES_MAX} bytes.")
    try:
        request = x509.load_pem_x509_csr(csr_pem)
        public_key = request.public_key()
        is_signed = request.is_signature_valid
    except (ValueError, TypeError, InvalidSignature) as error:
        raise MeshError(Code.INVALID_REQUEST, "The certificate request cannot be read.") from error
    if not is_signed:
        raise MeshError(Code.INVALID_REQUEST, "The certificate request is not signed by its own key.")
    if not isinstance(public_key, ec.EllipticCurvePublicKey) or not isinstance(public_key.curve, ec.SECP256R1):
        raise MeshError(Code.INVALID_REQUEST, "The certificate request holds no EC P-256 key.")
    return public_key


def _subject(name: str, role: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )


def _alternative_names(name: str, role: str) -> x509.SubjectAlternativeName:
    """The identity, and the names by which ordinary TLS clients reach a node on its own machine."""
    return x509.SubjectAlternativeName(
        [
            x509.UniformResourceIdentifier(make_uri(role, name)),
            x509.DNSName(name),
            x509.DNSName("localhost"),
            x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
            x509.IPAddress(ipaddress.ip_address("::1")),
        ]
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _key_usage(*, is_ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        encipher_only=False,
        decipher_only=False,
    )


def _utc(wall: float) -> dt.datetime:
    return dt.datetime.fromtimestamp(wall, tz=dt.UTC)
