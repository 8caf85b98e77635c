"""The SDK: ask several nodes as if they were one.

async with AsyncClient(["10.0.0.5:8001", "10.0.0.6:8001"]) as client:
    answer = await client.infer("digits", {"x": image}, deadline_ms=50)
"""

from nearcast.client.answer import Answer, ClientCounts
from nearcast.client.asynchronous import AsyncClient
from nearcast.client.blocking import Client

__all__ = ["Answer", "AsyncClient", "Client", "ClientCounts"]
