"""`nearcast config show`: the effective settings of an application and where each value came from."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import click
import msgspec

from nearcast.config import ConfigError, Row, load_config

APPS = {
    "edge": ("edge_node.config", "EdgeConfig"),
    "cloud": ("cloud_core.config", "CloudConfig"),
    "router": ("router.config", "RouterConfig"),
    "sync": ("model_sync.controller.config", "SyncConfig"),
}


@click.group()
def command() -> None:
    """Show settings and where they come from."""


@command.command()
@click.option("--app", type=click.Choice(sorted(APPS)), required=True, help="Whose settings.")
@click.option("--config", "path", type=click.Path(path_type=Path, dir_okay=False), help="A TOML file.")
@click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override one value; repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(app: str, path: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Print all settings of APP: defaults, file, environment (NEARCAST_SECTION__KEY) and --set, strongest last."""
    rows = load_config(_config_type(app), path=path, overrides=overrides).rows()
    if as_json:
        listing = [{"key": row.key, "value": _plain(row.value), "origin": row.origin} for row in rows]
        click.echo(msgspec.json.format(msgspec.json.encode(listing), indent=2).decode())
    else:
        _print_table(app, rows)


def _config_type(app: str) -> type[msgspec.Struct]:
    module, name = APPS[app]
    if find_spec(module.partition(".")[0]) is None or find_spec(module) is None:
        raise ConfigError(f"This installation has no {app}; install nearcast[{app}].")
    type_ = getattr(import_module(module), name)
    if not isinstance(type_, type) or not issubclass(type_, msgspec.Struct):
        raise TypeError(f"{module}.{name} is no msgspec.Struct")
    return type_


def _plain(value: object) -> object:
    return msgspec.to_builtins(value, enc_hook=str)


def _print_table(app: str, rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"Settings of {app}", title_justify="left")
    table.add_column("key", no_wrap=True)
    table.add_column("value", overflow="fold")
    table.add_column("origin", overflow="fold")
    for row in rows:
        value = row.value if isinstance(row.value, str) else msgspec.json.encode(_plain(row.value)).decode()
        style = "dim" if row.origin == "default" else ""
        table.add_row(row.key, Text(value), Text(row.origin), style=style)
    Console().print(table)
