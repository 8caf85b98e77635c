"""`nearcast config show`: the effective settings of an application and where each value came from."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import click
import msgspec

from nearcast.cli.listing import json_option, print_json, print_table
from nearcast.cli.process_options import settings_options
from nearcast.config import Row, load_config

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
@settings_options
@json_option
def show(app: str, path: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Print all settings of APP: defaults, file, environment (NEARCAST_SECTION__KEY) and --set, strongest last."""
    rows = load_config(_config_type(app), path=path, overrides=overrides).rows()
    if as_json:
        print_json([{"key": row.key, "value": _plain(row.value), "origin": row.origin} for row in rows])
    else:
        print_table(["key", "value", "origin"], [line for row in rows for line in _lines(row)])


def _config_type(app: str) -> type[msgspec.Struct]:
    module, name = APPS[app]
    type_ = getattr(import_module(module), name)
    if not isinstance(type_, type) or not issubclass(type_, msgspec.Struct):
        raise TypeError(f"{module}.{name} is no msgspec.Struct")
    return type_


def _lines(row: Row) -> Iterator[list[str]]:
    """One line; of tables such as `[[streams]]` one for each field, or every line were as wide as all of them."""
    tables = [each for each in row.value if isinstance(each, msgspec.Struct)] if isinstance(row.value, tuple) else []
    if not tables:
        yield [row.key, _text(row.value), row.origin]
    for index, table in enumerate(tables):
        for name, value in msgspec.structs.asdict(table).items():
            yield [f"{row.key}[{index}].{name}", _text(value), row.origin]


def _plain(value: object) -> object:
    return msgspec.to_builtins(value, enc_hook=str)


def _text(value: object) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(_plain(value)).decode()
