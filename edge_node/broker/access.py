"""Who may say and hear what at a tenant's broker, as Mosquitto's access file. Pure.

The Common Name of the certificate is the user, the client identifier and a level of the topic. Mosquitto applies no
pattern to a user whose name holds a `+`; so whoever is no device (`node+…`, `claim+…`, `reader+…`) has nothing but what
is listed under its name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal, TypeAlias

from nearcast.transport.mqtt.provisioning import certificate_filter, certificate_topic, holder_level
from nearcast.transport.mqtt.topics import down_prefix

Kind: TypeAlias = Literal["device", "reader"]
WORKER: Final = "node+worker"
REGISTRAR: Final = "node+registrar"
DOCTOR: Final = "node+doctor"
DISCOVERY_PREFIX: Final = "homeassistant/"


def holder_name(kind: Kind, name: str) -> str:
    """The Common Name of a device's or a reader's certificate."""
    return name if kind == "device" else f"reader+{name}"


def claim_name(claim: str) -> str:
    """The Common Name of a claim's certificate."""
    return f"claim+{claim}"


def is_device(name: str) -> bool:
    """Whether a Common Name is that of a device."""
    return "+" not in name


def access_list(tenant: str, *, claims: Iterable[str], readers: Iterable[str], denied: Iterable[str]) -> str:
    """The access file.

    Args:
        tenant: whose broker it is.
        claims: Common Names of claims that hold now.
        readers: those of readers.
        denied: devices whose certificates were all revoked; some may be connected still, or have a session.
    """
    own = f"nc/v1/{tenant}/%u/"
    presence = f"nc/v1/{tenant}/node/+/state"
    lines = [
        f"pattern write {own}up/#",
        f"pattern write {own}state",
        f"pattern read {own}state",
        f"pattern read {own}down/#",
        f"pattern read {own}out/#",
        f"pattern read {presence}",
        *_user(WORKER, [f"readwrite nc/v1/{tenant}/#", f"readwrite {DISCOVERY_PREFIX}#"]),
        *_user(DOCTOR, [f"readwrite nc/v1/{tenant}/node/#"]),
        *_user(REGISTRAR, [f"read {certificate_filter(tenant)}", f"write nc/v1/{tenant}/+/down/certificate"]),
    ]
    for name in sorted(claims):
        topics = [f"write {certificate_topic(tenant, name)}", f"read {down_prefix(tenant, holder_level(name))}#"]
        lines += _user(name, topics)
    for name in sorted(readers):
        topics = [f"read nc/v1/{tenant}/+/out/#", f"read nc/v1/{tenant}/+/state", f"read {presence}"]
        topics += [f"write {certificate_topic(tenant, name)}", f"read {down_prefix(tenant, holder_level(name))}#"]
        lines += _user(name, [*topics, f"read {DISCOVERY_PREFIX}#"])
    for name in sorted(denied):
        lines += _user(name, ["deny #"])
    return "\n".join(lines) + "\n"


def _user(name: str, topics: Iterable[str]) -> list[str]:
    return ["", f"user {name}", *(f"topic {topic}" for topic in topics)]
