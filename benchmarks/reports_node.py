"""Many mesh listeners in one process: `python -m benchmarks.reports_node IDENTITY COUNT polled|idle|busy`."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

from nearcast.identity import load_identity
from nearcast.load import NodeReport, VersionReport
from nearcast.runtime import Shutdown, run
from nearcast.transport.grpc import make_server
from nearcast.transport.mesh import mesh_methods
from nearcast.transport.seam import Methods

MODELS = 5


def reporter(name: str, *, busy: bool) -> Callable[[], NodeReport]:
    """What one node says; a busy one something else each time it is asked."""
    draw = random.Random(name)

    def report() -> NodeReport:
        load = draw.randrange(8) if busy else 0
        times = 1000.0 + (draw.random() if busy else 0.0)
        versions = tuple(
            VersionReport(model=f"model-{i}", version="7", service_p50_us=times, service_p95_us=2.0 * times)
            for i in range(MODELS)
        )
        return NodeReport(node=name, role="edge", slots=4, in_flight=load, versions=versions)

    return report


async def serve(shutdown: Shutdown) -> int:
    """Listen until told to end."""
    folder, count, kind = sys.argv[1:]
    identity = load_identity(Path(folder))
    addresses = {}
    servers = []
    for i in range(int(count)):
        name = f"node-{i}"
        methods = mesh_methods(reporter(name, busy=kind == "busy"))
        if kind == "polled":
            methods = Methods(unary=methods.unary)
        server = make_server("ngh2", methods, address="127.0.0.1:0", identity=identity, require_client=True)
        await server.start()
        servers.append(server)
        addresses[name] = server.address
    sys.stdout.write(json.dumps(addresses) + "\n")
    sys.stdout.flush()
    await shutdown.wait()
    for server in servers:
        await server.drain(0.0)
    return 0


if __name__ == "__main__":
    sys.exit(run(serve, drain_s=30.0))
