"""A node's own identity on disk: `node.pem`, `node.key` (0600) and the pinned `ca.pem` in one folder."""

from __future__ import annotations

import datetime as dt
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar
from weakref import WeakKeyDictionary

import msgspec

from nearcast.errors import Code, MeshError
from nearcast.identity.name import URI_PREFIX, make_uri, parse_uri

if TYPE_CHECKING:
    from cryptography import x509

CERTIFICATE_FILE: Final = "node.pem"
KEY_FILE: Final = "node.key"
CA_FILE: Final = "ca.pem"
ROOT_FILE: Final = "root.json"
CONTROL_FILE: Final = "control"
RENEW_AT: Final = 2 / 3
"""The share of a certificate's life after which its node renews it."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this process is, and the files that prove it.

    It remembers who shows the certificate, as long as they live, so that a renewed one reaches them all: TLS contexts
    made from an identity, and grpcio's credentials and channels.
    """

    name: str
    role: str
    certificate: Path
    key: Path
    ca: Path
    _users: WeakKeyDictionary[Any, Callable[[Any], None]] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False, compare=False
    )

    @property
    def uri(self) -> str:
        """The identity as in the certificate's URI SAN."""
        return make_uri(self.role, self.name)

    def on_reload(self, user: T, reload: Callable[[T], None]) -> None:
        """Have `reload(user)` called at each `reload` for as long as `user` lives. `reload` must not hold `user`."""
        self._users[user] = reload

    def reload(self) -> None:
        """Show the certificate that is on disk now to every new peer; open connections stay as they are.

        Raises:
            MeshError: UNAUTHENTICATED if its files cannot be used; who had not reloaded them shows the former one.
        """
        for user, reload in list(self._users.items()):
            reload(user)

    def validity(self) -> Validity:
        """When the certificate on disk is valid.

        Raises:
            MeshError: UNAUTHENTICATED if it cannot be read.
        """
        certificate = read_certificate(self.certificate)
        return Validity(certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp())


class Validity(msgspec.Struct, frozen=True):
    """The life of a certificate, in wall-clock seconds since 1970."""

    starts_at: float
    ends_at: float

    @property
    def renew_at(self) -> float:
        """The wall-clock second at which to renew."""
        return self.starts_at + (self.ends_at - self.starts_at) * RENEW_AT

    def require(self, now: float) -> None:
        """Refuse a certificate that is not valid at the wall-clock second `now`.

        Loading an identity does not call this: a node whose clock is wrong, or that was switched off for a month, still
        serves its own clients.

        Raises:
            MeshError: UNAUTHENTICATED; it names the clock where the clock may be the reason.
        """
        if now < self.starts_at:
            raise MeshError(
                Code.UNAUTHENTICATED,
                f"The certificate is not valid before {_day(self.starts_at)},"
                f" and this machine's clock says {_day(now)}; set the clock.",
            )
        if now >= self.ends_at:
            raise MeshError(
                Code.UNAUTHENTICATED,
                f"The certificate expired on {_day(self.ends_at)} (this machine's clock says {_day(now)});"
                " run `nearcast nodes invite` and join again.",
            )


def load_identity(folder: Path) -> Identity:
    """Read the identity in `folder`. An expired certificate still loads; see `Validity.require`.

    Raises:
        MeshError: UNAUTHENTICATED if there is none, a file is damaged, or others can read the key.
    """
    from cryptography.hazmat.primitives import serialization

    identity_files = [folder / name for name in (CERTIFICATE_FILE, KEY_FILE, CA_FILE)]
    certificate_path, key_path, ca_path = identity_files
    if missing := [path.name for path in identity_files if not path.is_file()]:
        raise MeshError(
            Code.UNAUTHENTICATED,
            f"{folder} holds no identity ({', '.join(missing)} missing); run `nearcast nodes invite` and join.",
        )
    if key_path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise MeshError(Code.UNAUTHENTICATED, f"Others can read {key_path}; run `chmod 600 {key_path}`.")
    certificate = read_certificate(certificate_path)
    read_certificate(ca_path)
    try:
        key = serialization.load_pem_private_key(key_path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise MeshError(Code.UNAUTHENTICATED, f"{key_path} is no readable private key; join again.") from error
    if key.public_key() != certificate.public_key():
        raise MeshError(Code.UNAUTHENTICATED, f"{key_path} is not the key of {certificate_path}; join again.")
    role, name = certificate_identity(certificate)
    return Identity(name, role, certificate_path, key_path, ca_path)


def read_certificate(path: Path) -> x509.Certificate:
    """Parse a PEM file.

    Raises:
        MeshError: UNAUTHENTICATED if it cannot be read.
    """
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise MeshError(Code.UNAUTHENTICATED, f"{path} is no readable certificate; join again.") from error


def certificate_identity(certificate: x509.Certificate) -> tuple[str, str]:
    """The (role, name) of a certificate.

    Raises:
        MeshError: UNAUTHENTICATED unless it names exactly one identity of this mesh.
    """
    from cryptography import x509

    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError) as error:
        raise MeshError(Code.UNAUTHENTICATED, "The certificate names no identity of this mesh.") from error
    uris = [uri for uri in names.get_values_for_type(x509.UniformResourceIdentifier) if uri.startswith(URI_PREFIX)]
    if len(uris) != 1:
        raise MeshError(Code.UNAUTHENTICATED, "The certificate must name exactly one identity of this mesh.")
    return parse_uri(uris[0])


def _day(wall: float) -> str:
    return dt.datetime.fromtimestamp(wall, tz=dt.UTC).strftime("%Y-%m-%d %H:%M UTC")
