"""`nearcast demo`: the whole mesh on this machine, real models, real traffic."""

from __future__ import annotations

import os
from pathlib import Path

import click


@click.command("demo")
@click.option(
    "--once", is_flag=True, help="Check every step, print the result, end; the exit code says whether all held."
)
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where bundles, keys, node data and logs go; kept afterwards. Default: a temporary folder.",
)
def command(*, once: bool, data_dir: Path | None) -> None:
    """Run the whole mesh on this machine, with real models and real traffic.

    A broker, the sync process, a cloud core, two edge nodes and a router: no root, loopback only. Without --once it
    stays up, prints addresses to try by hand, and ends with Ctrl-C.
    """
    # Before gRPC is imported: its C core would warn at every command that we start.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    from nearcast.cli.demo.show import run

    raise SystemExit(run(once=once, data_dir=data_dir))
