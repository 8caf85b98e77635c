"""`nearcast edge`: an edge node."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from nearcast.cli.process_options import join_option, quick_start, settings_options


@click.command()
@settings_options
@join_option
def command(path: Path | None, token: str, overrides: tuple[str, ...]) -> None:
    """Run an edge node: models, router and devices in one process.

    It joins the mesh once with --join; later starts use the identity in its data_dir. Without one it stands alone.
    When it is ready it prints one JSON line with its addresses.
    """
    with quick_start():
        from edge_node.app import run
        from edge_node.config import EdgeConfig
        from nearcast.config import load_config

        code = run(load_config(EdgeConfig, path=path, overrides=overrides).value, token=token)
    sys.exit(code)
