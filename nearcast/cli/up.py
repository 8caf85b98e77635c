"""`nearcast up`: a whole mesh on this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nearcast.cli.listing import json_option, print_json, print_table
from nearcast.cli.process_options import settings_options

if TYPE_CHECKING:
    from nearcast.cli.processes import Mesh, MeshConfig
    from nearcast.runtime import Shutdown

STOP_S = 25.0


@click.command()
@settings_options
@json_option
def command(path: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Run a whole mesh: controller, broker, cloud cores, edge nodes, routers, as one tree of processes.

    Keys, models and logs lie in its data_dir and are used again at the next start. The first edge node takes the
    ports 8000 to 8002; with --set first_ports=false it takes free ones, too. When all is ready the addresses are
    printed. Ctrl-C ends all of it.
    """
    from nearcast.cli.processes import MeshConfig
    from nearcast.config import load_config
    from nearcast.runtime import run

    config = load_config(MeshConfig, path=path, overrides=overrides).value
    sys.exit(run(lambda shutdown: _serve(config, shutdown, as_json=as_json), drain_s=STOP_S))


async def _serve(config: MeshConfig, shutdown: Shutdown, *, as_json: bool) -> int:
    import asyncio

    from nearcast.cli.processes import Mesh
    from nearcast.runtime import ExitCode

    mesh = await Mesh.start(Path(config.data_dir), config=config)
    try:
        _show(mesh, as_json=as_json)
        watch = asyncio.ensure_future(mesh.wait())
        end = asyncio.ensure_future(shutdown.wait())
        await asyncio.wait({watch, end}, return_when=asyncio.FIRST_COMPLETED)
        failed = watch.result() if watch.done() else ""
        for task in (watch, end):
            task.cancel()
        await asyncio.gather(watch, end, return_exceptions=True)
    finally:
        await mesh.stop()
    if failed and not shutdown.requested:
        click.echo(f"{failed} ended by itself; its log is {mesh.logs / failed}.log", err=True)
        return ExitCode.FAILED
    return ExitCode.OK


def _show(mesh: Mesh, *, as_json: bool) -> None:
    if as_json:
        print_json({"home": str(mesh.operator_home), "addresses": mesh.addresses})
        sys.stdout.flush()
        return
    rows = [[name, "  ".join(f"{k}={v}" for k, v in sorted(places.items()))] for name, places in mesh.addresses.items()]
    print_table(["process", "addresses"], rows)
    click.echo(
        f"\nOperate it:  export NEARCAST_HOME={mesh.operator_home}\nLogs:        {mesh.logs}\nCtrl-C ends all of it."
    )
