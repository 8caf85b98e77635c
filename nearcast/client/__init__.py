"""The SDK: ask the nodes of a mesh as if they were one.

In a program of coroutines:

    async with AsyncClient("10.0.0.5:8001") as client:
        answer = await client.infer("digits", {"x": image}, deadline_ms=50)

Anywhere else, a notebook included:

    Client("10.0.0.5:8001").infer("digits", {"x": image}).outputs["scores"]

One address, of a router or of any node, is enough: there the client learns where to send what (`lease.proto`), and
calls those nodes directly. A list of addresses means those nodes alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nearcast.errors import Code, MeshError

if TYPE_CHECKING:
    from nearcast.client.answer import Answer, ClientCounts
    from nearcast.client.asynchronous import AsyncClient
    from nearcast.client.blocking import Client
    from nearcast.client.limits import ClientLimits

__all__ = ["Answer", "AsyncClient", "Client", "ClientCounts", "ClientLimits", "Code", "MeshError"]

_MODULES = {
    "Answer": "answer",
    "AsyncClient": "asynchronous",
    "Client": "blocking",
    "ClientCounts": "answer",
    "ClientLimits": "limits",
}


def __getattr__(name: str) -> Any:
    """Import a client only when asked for: a device takes `nearcast.client.mqtt` and has no use for gRPC."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
