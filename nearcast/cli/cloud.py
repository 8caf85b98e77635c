"""`nearcast cloud`: a cloud core."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from nearcast.cli.process_options import join_option, quick_start, settings_options


@click.command()
@settings_options
@join_option
def command(path: Path | None, token: str, overrides: tuple[str, ...]) -> None:
    """Run a cloud core: models for routers and edge nodes.

    It joins the mesh once with --join; later starts use the identity in its data_dir. Without one it stands alone.
    When it is ready it prints one JSON line with its addresses.
    """
    with quick_start():
        from cloud_core.app import run
        from cloud_core.config import CloudConfig
        from nearcast.config import load_config

        code = run(load_config(CloudConfig, path=path, overrides=overrides).value, token=token)
    sys.exit(code)
