"""`python -m benchmarks.router_plain ADDRESS`: a router, full policy on, in front of one server without TLS."""

from __future__ import annotations

import asyncio
import sys

import uvloop

from benchmarks.router_node import NODE, report
from nearcast.runtime import announce, keep_pages
from nearcast.transport.grpc import make_channel, make_server
from nearcast.transport.oip import oip_methods
from nearcast.transport.remote import RemoteNode
from nearcast.transport.service import InferenceService
from router.policy import Policy, PolicyConfig
from router.router import Router

REPORT_S = 0.25


async def main() -> None:
    keep_pages()
    router = Router(Policy(PolicyConfig(), seed=1), node="bench-router")
    await router.start()
    router.attach(NODE, RemoteNode(make_channel("ngh2", sys.argv[1]), NODE), "peer")
    loop = asyncio.get_running_loop()
    router.policy.on_report(loop.time(), NODE, report())
    methods = oip_methods(InferenceService(router, router, server_name="bench"), trusted=False)
    server = make_server("ngh2", methods, address="127.0.0.1:0")
    await server.start()
    announce("router", address=server.address)
    while True:
        await asyncio.sleep(REPORT_S)
        router.policy.on_report(loop.time(), NODE, report())


if __name__ == "__main__":
    uvloop.run(main())
