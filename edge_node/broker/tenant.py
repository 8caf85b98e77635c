"""One tenant's authority over its devices: a CA of its own, the register, and the files the broker reads.

The folder belongs to one edge node. Its operator's commands work on it beside the running node, which sees what they
changed in the register.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from edge_node.broker.access import Kind, access_list, holder_name
from edge_node.broker.provisioning import ProvisioningLimits, require_holder
from edge_node.broker.registry import Registry, Rights, Row
from nearcast.clock import SYSTEM_CLOCK, Clock
from nearcast.errors import Code, MeshError
from nearcast.identity import CertificateAuthority
from nearcast.identity.authority import CA_FILE, CA_KEY_FILE, make_plain_csr, public_key_fingerprint, sign_plain_csr
from nearcast.identity.device import DeviceIdentity, Place
from nearcast.identity.files import KEY_MODE, make_folder, write_file
from nearcast.transport.mqtt.tls import TlsFiles
from nearcast.transport.mqtt.topics import require_id

TENANTS_FOLDER: Final = "tenants"
PLACE_FILE: Final = "place.json"
ACCESS_FILE: Final = "access"
REVOKED_FILE: Final = "revoked.pem"


class TenantPlace(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Whose folder it is, and where its broker was last reached: `mqtts://host:port`."""

    tenant: str
    url: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantAuthority:
    """Issues and revokes the certificates of one tenant. Made by `open`; its methods block."""

    folder: Path
    place: TenantPlace
    limits: ProvisioningLimits
    _authority: CertificateAuthority
    _registry: Registry

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        place: TenantPlace | None = None,
        limits: ProvisioningLimits | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> TenantAuthority:
        """Open the folder of a tenant; with a `place` it is made, or its broker has moved there.

        Raises:
            MeshError: INVALID_REQUEST if there is none, UNAVAILABLE if it cannot be read.
        """
        limits = limits or ProvisioningLimits()
        if place is None:
            place = _read_place(folder)
        else:
            require_id(place.tenant, "tenant")
            make_folder(folder)
            if not (folder / "ca" / CA_KEY_FILE).exists():
                CertificateAuthority.create(folder / "ca", common_name=f"nearcast tenant {place.tenant}", clock=clock)
            write_file(folder / PLACE_FILE, msgspec.json.encode(place))
        authority = CertificateAuthority.load(folder / "ca", clock=clock)
        registry = Registry(folder / "devices.sqlite", limits, clock.wall)
        return cls(folder=folder, place=place, limits=limits, _authority=authority, _registry=registry)

    @property
    def ca(self) -> Path:
        """The tenant's CA certificate."""
        return self.folder / "ca" / CA_FILE

    @property
    def ca_pem(self) -> bytes:
        """The same as PEM."""
        return self._authority.certificate_pem

    @property
    def registry(self) -> Registry:
        """What is known of claims and certificates."""
        return self._registry

    def close(self) -> None:
        """Close the register."""
        self._registry.close()

    def invite(self, folder: Path, *, name: str, kind: Kind, uses: int, life_s: float) -> DeviceIdentity:
        """Make a claim and write it to `folder`, for the device to be.

        Args:
            folder: gets the claim's certificate and key; who has it can become that device.
            name: of the device or reader; "" = the device says it.
            kind: which of the two.
            uses: how many devices it makes.
            life_s: seconds until it expires.

        Raises:
            MeshError: INVALID_REQUEST, CONFLICT if the folder is in use, OVERLOADED.
        """
        if (folder / PLACE_FILE).exists() or (folder.exists() and any(folder.iterdir())):
            raise MeshError(Code.CONFLICT, f"{folder} is not empty; name another folder for the claim.")
        holder = holder_name(kind, require_holder(name, kind)) if name else ""
        key, csr = make_plain_csr()
        claim, certificate = self._registry.invite(
            kind,
            holder,
            uses=uses,
            life_s=life_s,
            key=public_key_fingerprint(csr),
            sign=lambda common_name: self._authority.issue_plain(csr, name=common_name, lifetime_s=life_s),
        )
        place = Place(url=self.place.url, tenant=self.place.tenant, name=claim.name)
        return DeviceIdentity.write(folder, place, ca=self.ca_pem, certificate=certificate, key=key)

    def issue(self, asker: str, wanted: str, csr: bytes) -> tuple[str, bytes]:
        """Grant a certificate to whoever the broker says asks; returns its Common Name and the PEM.

        Raises:
            MeshError: where nothing is granted.
        """
        life_s = self.limits.certificate_life_s
        return self._registry.issue(
            asker,
            wanted,
            public_key_fingerprint(csr),
            lambda name: self._authority.issue_plain(csr, name=name, lifetime_s=life_s),
        )

    def revoke(self, name: str) -> int:
        """Revoke all certificates of a device, `reader+…` or `claim+…`; returns how many there were.

        Raises:
            MeshError: INVALID_REQUEST if there was none.
        """
        count = self._registry.revoke(name)
        if not count:
            raise MeshError(Code.INVALID_REQUEST, f"{name!r} holds no certificate of the tenant {self.place.tenant!r}.")
        return count

    def listing(self) -> list[Row]:
        """Claims, devices and readers."""
        return self._registry.listing()

    def own_files(self, name: str, label: str, *, hosts: tuple[str, ...] = (), life_s: float = 0.0) -> TlsFiles:
        """Make a certificate of the node's own, which is in no register, as `label.pem` and `label.key`.

        Args:
            name: the Common Name.
            label: of the files.
            hosts: for the broker itself: what it is called.
            life_s: 0 = `own_life_s`.
        """
        certificate_path, key_path = self.folder / f"{label}.pem", self.folder / f"{label}.key"
        if key_path.exists():  # a new key would not fit the former certificate while the two are replaced
            csr = sign_plain_csr(key_path.read_bytes())
        else:
            key, csr = make_plain_csr()
            write_file(key_path, key, mode=KEY_MODE)
        lifetime_s = life_s or self.limits.own_life_s
        certificate = self._authority.issue_plain(csr, name=name, lifetime_s=lifetime_s, hosts=hosts)
        write_file(certificate_path, certificate)
        return TlsFiles(ca=self.ca, certificate=certificate_path, key=key_path)

    def write_rights(self, rights: Rights) -> None:
        """Write the access file and the revocation list. The broker reads them when it is told to."""
        text = access_list(self.place.tenant, claims_max=self.limits.claims_max, readers=rights.readers)
        revoked = self._authority.revocation_list(rights.revoked, updated_at=rights.crl_at)
        write_file(self.folder / REVOKED_FILE, revoked)
        write_file(self.folder / ACCESS_FILE, text.encode())


def tenant_folder(data_dir: Path, tenant: str) -> Path:
    """Where an edge node keeps what belongs to a tenant."""
    return data_dir / TENANTS_FOLDER / require_id(tenant, "tenant")


def _read_place(folder: Path) -> TenantPlace:
    try:
        return msgspec.json.decode((folder / PLACE_FILE).read_bytes(), type=TenantPlace)
    except (OSError, msgspec.DecodeError) as error:
        raise MeshError(
            Code.INVALID_REQUEST,
            f"{folder} belongs to no tenant; name it in mqtt.tenant_brokers and start the edge node once.",
        ) from error
