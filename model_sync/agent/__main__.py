"""`python -m model_sync.agent --config FILE [--set section.key=value]...`."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from contextlib import suppress
from pathlib import Path

from model_sync.agent.config import AgentConfig
from nearcast.config import load_config
from nearcast.errors import MeshError
from nearcast.runtime import Shutdown, announce, run
from nearcast.runtime.exit import ExitCode, exit_code

NICENESS = 10
"""Serving goes first."""
PARENT_POLL_S = 1.0
SPARED_PACKAGES = ("azure", "boto3", "botocore", "google.cloud", "hvac", "pkcs11", "rich")
"""Loaded by our libraries wherever they are installed, and of no use here: interfaces to key stores (a node signs no
metadata) and what colours a traceback. Some take 10 MB.
"""


async def serve(config: AgentConfig, shutdown: Shutdown) -> int:
    """Run the agent until the process is to end."""
    from model_sync.agent.app import Agent

    agent, parent = Agent(config), os.getppid()
    watch = asyncio.create_task(_end_with_parent(shutdown, parent))
    try:
        await agent.start()
        announce("agent", node=config.node, status=str(agent.status_path))
        await shutdown.wait()
    finally:
        watch.cancel()
        # A node that died may have died of the version on trial: only its living word makes this end an orderly one.
        await agent.close(orderly=os.getppid() == parent)
    return ExitCode.OK


async def _end_with_parent(shutdown: Shutdown, parent: int) -> None:
    """The node that started this agent is gone: its successor brings its own."""
    while os.getppid() == parent:  # noqa: ASYNC110 (nothing tells a process that its parent has gone)
        await asyncio.sleep(PARENT_POLL_S)
    shutdown.request()


def main() -> int:
    """Parse the command line and run; returns the exit code."""
    for name in SPARED_PACKAGES:
        sys.modules[name] = None  # type: ignore[assignment]  # as if it were not installed
    from nearcast.telemetry import TelemetryConfig, start

    parser = argparse.ArgumentParser(prog="python -m model_sync.agent", description="Keep a node's models in sync.")
    parser.add_argument("--config", type=Path, default=None, help="TOML file of an AgentConfig")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting")
    arguments = parser.parse_args()
    try:
        config = load_config(AgentConfig, path=arguments.config, overrides=arguments.set).value
    except MeshError as error:
        print(error.message, file=sys.stderr)
        return exit_code(error)
    start("agent", TelemetryConfig(level=config.log_level))
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, max(NICENESS, os.getpriority(os.PRIO_PROCESS, 0)))
    return run(lambda shutdown: serve(config, shutdown))


if __name__ == "__main__":
    sys.exit(main())
