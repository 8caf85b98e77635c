"""The cloud core as one process. Its router knows the local host alone: it splits, and never sends requests on."""

from __future__ import annotations

from pathlib import Path

from cloud_core.config import CloudConfig
from nearcast import telemetry
from nearcast.runtime import ExitCode, Shutdown
from nearcast.runtime import run as run_process
from router.serving_node import ServingNode, load_or_join


def run(config: CloudConfig, *, token: str = "") -> int:
    """Run a cloud core to its end; returns the exit code."""
    return run_process(lambda shutdown: serve(config, shutdown, token=token), drain_s=config.drain_s + 2.0)


async def serve(config: CloudConfig, shutdown: Shutdown, *, token: str = "") -> int:
    """Serve until the shutdown is requested.

    Raises:
        MeshError: if the node cannot come up: an address, the token, the store.
    """
    identity = await load_or_join(Path(config.data_dir) / "identity", token, "cloud")
    observed = telemetry.start(config.name if identity is None else identity.name, config.telemetry)
    node = ServingNode(config, observed, role="cloud", tier="cloud", identity=identity, find_targets=False)
    try:
        await node.start()
        await node.serve(shutdown)
    finally:
        await node.drain()
    return ExitCode.OK
