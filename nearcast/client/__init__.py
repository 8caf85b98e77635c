"""The SDK: ask the nodes of a mesh as if they were one.

In a program of coroutines:

    async with AsyncClient("10.0.0.5:8001") as client:
        answer = await client.infer("digits", {"x": image}, deadline_ms=50)

Anywhere else, a notebook included:

    Client("10.0.0.5:8001").infer("digits", {"x": image}).outputs["scores"]

One address, of a router or of any node, is enough: there the client learns where to send what (`lease.proto`), and
calls those nodes directly. A list of addresses means those nodes alone.
"""

from nearcast.client.answer import Answer, ClientCounts
from nearcast.client.asynchronous import AsyncClient
from nearcast.client.blocking import Client
from nearcast.client.limits import ClientLimits
from nearcast.errors import Code, MeshError

__all__ = ["Answer", "AsyncClient", "Client", "ClientCounts", "ClientLimits", "Code", "MeshError"]
