"""A device's identity on disk: three PEM files that any MQTT client can use, and where its broker is."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import NameOID

from nearcast.errors import Code, MeshError
from nearcast.identity.files import KEY_MODE, make_folder, write_file
from nearcast.identity.node import Validity, read_certificate

CA_FILE: Final = "ca.pem"
CERTIFICATE_FILE: Final = "device.pem"
KEY_FILE: Final = "device.key"
PLACE_FILE: Final = "broker.json"
_INVITE_AGAIN: Final = "run `nearcast devices invite` on the node and join again"


class Place(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where a certificate is good for something.

    Attributes:
        url: `mqtts://host:port` of the tenant's broker.
        tenant: the tenant.
        name: the certificate's Common Name: the device, or `claim+…`, `reader+…`.
    """

    url: str
    tenant: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceIdentity:
    """Who a device is; made by `load` and `write`."""

    folder: Path
    place: Place

    @property
    def ca(self) -> Path:
        """Whom the broker's certificate must come from."""
        return self.folder / CA_FILE

    @property
    def certificate(self) -> Path:
        """The device's certificate."""
        return self.folder / CERTIFICATE_FILE

    @property
    def key(self) -> Path:
        """Its private key, which never leaves the device."""
        return self.folder / KEY_FILE

    def validity(self) -> Validity:
        """When the certificate on disk is valid, and when to renew it.

        Raises:
            MeshError: UNAUTHENTICATED if it cannot be read.
        """
        certificate = read_certificate(self.certificate)
        return Validity(certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp())

    @classmethod
    def load(cls, folder: Path) -> DeviceIdentity:
        """Read the identity in `folder`. One that has expired still loads.

        Raises:
            MeshError: UNAUTHENTICATED if there is none, a file is damaged, or others can read the key.
        """
        try:
            place = msgspec.json.decode((folder / PLACE_FILE).read_bytes(), type=Place)
            mode = (folder / KEY_FILE).stat().st_mode
        except (OSError, msgspec.DecodeError) as error:
            raise MeshError(
                Code.UNAUTHENTICATED, f"{folder} holds no identity of a device ({error}); {_INVITE_AGAIN}."
            ) from error
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise MeshError(Code.UNAUTHENTICATED, f"Others can read {folder / KEY_FILE}; run `chmod 600` on it.")
        identity = cls(folder=folder, place=place)
        ca = read_certificate(identity.ca).public_bytes(serialization.Encoding.PEM)
        require_certificate(identity.certificate.read_bytes(), ca=ca, key=identity.key.read_bytes(), name=place.name)
        return identity

    @classmethod
    def write(cls, folder: Path, place: Place, *, ca: bytes, certificate: bytes, key: bytes) -> DeviceIdentity:
        """Keep an identity in `folder`, its certificate last: what has one is whole.

        Raises:
            MeshError: UNTRUSTED if the certificate is not for this key and name, or not from this authority.
        """
        require_certificate(certificate, ca=ca, key=key, name=place.name)
        make_folder(folder)
        write_file(folder / KEY_FILE, key, mode=KEY_MODE)
        write_file(folder / CA_FILE, ca)
        write_file(folder / PLACE_FILE, msgspec.json.encode(place))
        write_file(folder / CERTIFICATE_FILE, certificate)
        return cls(folder=folder, place=place)


def require_certificate(certificate: bytes, *, ca: bytes, key: bytes, name: str) -> x509.Certificate:
    """The certificate, if it is for this key and this Common Name and from this authority. All are PEM.

    Raises:
        MeshError: UNTRUSTED.
    """
    try:
        parsed = x509.load_pem_x509_certificate(certificate)
        parsed.verify_directly_issued_by(x509.load_pem_x509_certificate(ca))
        own = serialization.load_pem_private_key(key, password=None)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise MeshError(Code.UNTRUSTED, "The certificate is not signed by this tenant's authority.") from error
    named = [attribute.value for attribute in parsed.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if parsed.public_key() != own.public_key() or named != [name]:
        raise MeshError(Code.UNTRUSTED, f"The certificate is not for {name!r} and the key that lies beside it.")
    return parsed
