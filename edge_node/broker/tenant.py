"""One tenant's authority over its devices: a CA of its own, the register, and the files the broker reads.

The folder belongs to one edge node. Its operator's commands work on it beside the running node, which sees what they
changed in the register.
"""

from __future__ import annotations

import fcntl
import os
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
LOCK_FILE: Final = "lock"


class TenantPlace(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Whose folder it is, and where its broker was last reached: `mqtts://host:port`."""

    tenant: str
    url: str


class TenantAuthority:
    """Issues and revokes the certificates of one tenant. Made by `create` or `open`; its methods block."""

    def __init__(self, folder: Path, place: TenantPlace, limits: ProvisioningLimits | None, clock: Clock) -> None:
        self.folder = folder
        self.place = place
        self.limits = limits or ProvisioningLimits()
        self._authority = CertificateAuthority.load(folder / "ca", clock=clock)
        self._registry = Registry(folder / "devices.sqlite", self.limits, clock.wall)

    @classmethod
    def create(
        cls, folder: Path, tenant: str, *, limits: ProvisioningLimits | None = None, clock: Clock = SYSTEM_CLOCK
    ) -> TenantAuthority:
        """Open the folder of a tenant, which is made if there is none. Whoever runs the broker says where with `move`.

        Raises:
            MeshError: INVALID_REQUEST for a bad name, UNAVAILABLE if the folder cannot be read.
        """
        require_id(tenant, "tenant")
        make_folder(folder)
        if not (folder / "ca" / CA_KEY_FILE).exists():
            CertificateAuthority.create(folder / "ca", common_name=f"nearcast tenant {tenant}", clock=clock)
        return cls(folder, TenantPlace(tenant=tenant, url=""), limits, clock)

    @classmethod
    def open(
        cls, folder: Path, *, limits: ProvisioningLimits | None = None, clock: Clock = SYSTEM_CLOCK
    ) -> TenantAuthority:
        """Open the folder of a tenant whose broker has run.

        Raises:
            MeshError: INVALID_REQUEST if there is none, UNAVAILABLE if it cannot be read.
        """
        return cls(folder, _read_place(folder), limits, clock)

    def move(self, url: str) -> None:
        """Say where the broker is; invitations name it."""
        self.place = TenantPlace(tenant=self.place.tenant, url=url)
        write_file(self.folder / PLACE_FILE, msgspec.json.encode(self.place))

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

    def files(self, label: str) -> TlsFiles:
        """Where `own_files` keeps a certificate of the node's own."""
        return TlsFiles(ca=self.ca, certificate=self.folder / f"{label}.pem", key=self.folder / f"{label}.key")

    def own_files(self, name: str, label: str, *, hosts: tuple[str, ...] = (), life_s: float = 0.0) -> TlsFiles:
        """Make a certificate of the node's own, which is in no register, as `label.pem` and `label.key`.

        Args:
            name: the Common Name.
            label: of the files.
            hosts: for the broker itself: what it is called.
            life_s: 0 = `own_life_s`.
        """
        files = self.files(label)
        assert files.certificate is not None
        assert files.key is not None
        if files.key.exists():  # a new key would not fit the former certificate while the two are replaced
            csr = sign_plain_csr(files.key.read_bytes())
        else:
            key, csr = make_plain_csr()
            write_file(files.key, key, mode=KEY_MODE)
        lifetime_s = life_s or self.limits.own_life_s
        certificate = self._authority.issue_plain(csr, name=name, lifetime_s=lifetime_s, hosts=hosts)
        write_file(files.certificate, certificate)
        return files

    def write_rights(self, rights: Rights) -> None:
        """Write the access file and the revocation list. The broker reads them when it is told to."""
        text = access_list(self.place.tenant, claims_max=self.limits.claims_max, readers=rights.readers)
        revoked = self._authority.revocation_list(rights.revoked)
        write_file(self.folder / REVOKED_FILE, revoked)
        write_file(self.folder / ACCESS_FILE, text.encode())


def tenant_folder(data_dir: Path, tenant: str) -> Path:
    """Where an edge node keeps what belongs to a tenant."""
    return data_dir / TENANTS_FOLDER / require_id(tenant, "tenant")


def hold(folder: Path) -> int:
    """Take a tenant's folder for a running node; returns the descriptor that, closed, gives it back.

    Raises:
        MeshError: CONFLICT if another node runs on it.
    """
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, KEY_MODE)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise MeshError(Code.CONFLICT, f"Another edge node runs on {folder}; stop it first.") from error
    return descriptor


def is_running(folder: Path) -> bool:
    """Whether a node runs on a tenant's folder."""
    try:
        os.close(hold(folder))
    except MeshError:
        return True
    return False


def _read_place(folder: Path) -> TenantPlace:
    try:
        return msgspec.json.decode((folder / PLACE_FILE).read_bytes(), type=TenantPlace)
    except (OSError, msgspec.DecodeError) as error:
        raise MeshError(
            Code.INVALID_REQUEST,
            f"{folder} belongs to no tenant; name the node with --config FILE, or name the tenant in its "
            "mqtt.tenant_brokers and start it once.",
        ) from error
