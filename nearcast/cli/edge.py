"""`nearcast edge`: an edge node."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command()
@click.option("--config", "path", type=click.Path(path_type=Path, dir_okay=False), help="A TOML file.")
@click.option("--join", "token", default="", metavar="TOKEN", help="Join the mesh; from `nearcast nodes invite`.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one setting; repeatable.")
def command(path: Path | None, token: str, overrides: tuple[str, ...]) -> None:
    """Run an edge node: models, router and devices in one process.

    It joins the mesh once with --join; later starts use the identity in its data_dir. Without one it stands alone.
    When it is ready it prints one JSON line with its addresses.
    """
    from edge_node.app import run
    from edge_node.config import EdgeConfig
    from router.serving_node import read_config

    sys.exit(run(read_config(EdgeConfig, path, overrides), token=token))
