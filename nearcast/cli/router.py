"""`nearcast router`: a stand-alone router."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command()
@click.option("--config", "path", type=click.Path(path_type=Path, dir_okay=False), help="A TOML file.")
@click.option("--join", "token", default="", metavar="TOKEN", help="Join the mesh; from `nearcast nodes invite`.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one setting; repeatable.")
def command(path: Path | None, token: str, overrides: tuple[str, ...]) -> None:
    """Run a stand-alone router: it holds no models and sends each request to the node that can answer in time.

    It finds nodes in the directory of the mesh that it joined, or in [[targets]] of its configuration.
    When it is ready it prints one JSON line with its addresses.
    """
    from router.__main__ import run_router

    sys.exit(run_router(config=path, overrides=overrides, token=token))
