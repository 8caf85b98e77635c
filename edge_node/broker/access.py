"""Who may say and hear what at a tenant's broker, as Mosquitto's access file. Pure.

The Common Name of the certificate is the user, the client identifier and a level of the topic. Mosquitto applies no
pattern to a user whose name holds a `+`; so whoever is no device (`node+…`, `claim+…`, `reader+…`) has nothing but what
is listed under its name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal, TypeAlias

from nearcast.transport.mqtt.provisioning import answer_topic, certificate_filter, certificate_topic

Kind: TypeAlias = Literal["device", "reader"]
WORKER: Final = "node+worker"
REGISTRAR: Final = "node+registrar"
DOCTOR: Final = "node+doctor"


def holder_name(kind: Kind, name: str) -> str:
    """The Common Name of a device's or a reader's certificate."""
    return name if kind == "device" else f"reader+{name}"


def claim_names(claims_max: int) -> tuple[str, ...]:
    """The Common Names that claims have in turn. They are few, so that an invitation changes nothing at the broker."""
    return tuple(f"claim+{number}" for number in range(claims_max))


def is_device(name: str) -> bool:
    """Whether a Common Name is that of a device."""
    return "+" not in name


def access_list(tenant: str, *, claims_max: int, readers: Iterable[str]) -> str:
    """The access file of the tenant's broker; `readers` are the Common Names of those who hear results."""
    own = f"nc/v1/{tenant}/%u/"
    presence = f"nc/v1/{tenant}/node/+/state"
    lines = [
        f"pattern write {own}up/#",
        f"pattern readwrite {own}state",
        f"pattern read {own}down/#",
        f"pattern read {own}out/#",
        f"pattern read {presence}",
        *_user(WORKER, [f"readwrite nc/v1/{tenant}/#"]),
        *_user(DOCTOR, [f"readwrite nc/v1/{tenant}/node/#"]),
        *_user(
            REGISTRAR,
            [
                f"read {certificate_filter(tenant)}",
                f"write nc/v1/{tenant}/+/down/certificate",
                f"write nc/v1/{tenant}/+/state",
                f"write nc/v1/{tenant}/+/up/reported",
            ],
        ),
    ]
    for name in claim_names(claims_max):
        lines += _user(name, _asking(tenant, name))
    for name in sorted(readers):
        results = [f"nc/v1/{tenant}/+/out/#", f"nc/v1/{tenant}/+/state", presence]
        lines += _user(name, [*(f"read {topic}" for topic in results), *_asking(tenant, name)])
    return "\n".join(lines) + "\n"


def _asking(tenant: str, name: str) -> list[str]:
    return [f"write {certificate_topic(tenant, name)}", f"read {answer_topic(tenant, name)}"]


def _user(name: str, topics: Iterable[str]) -> list[str]:
    return ["", f"user {name}", *(f"topic {topic}" for topic in topics)]
