"""Servers for the echo benchmark: `python -m benchmarks.echo_server ngh2|grpcio|peer`. `peer` is plain grpc.aio."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio
import uvloop

from nearcast.transport.grpc import make_server
from nearcast.transport.seam import Call, Methods, Reply

PATH = "/benchmark.Echo/Echo"


async def echo(message: bytes, call: Call) -> Reply:
    return Reply((message,))


async def start_peer() -> str:
    """A grpc.aio server with nothing of ours in it."""

    class Handlers(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> Any:
            async def answer(message: bytes, context: Any) -> bytes:
                return message

            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Handlers(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    globals()["_keep"] = server
    return f"127.0.0.1:{port}"


async def main(arguments: Sequence[str]) -> None:
    kind = arguments[0]
    if kind == "peer":
        address = await start_peer()
    else:
        server = make_server("ngh2" if kind == "ngh2" else "grpcio", Methods(unary={PATH: echo}), address="127.0.0.1:0")
        await server.start()
        address = server.address
    print(json.dumps({"address": address}), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1:]))
