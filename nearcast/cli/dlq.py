"""`nearcast dlq`: what a node gave up, and why."""

from __future__ import annotations

import sys
from base64 import b64encode
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click
import msgspec

from nearcast.cli.listing import json_option, print_json, print_table
from nearcast.cli.process_options import settings_options
from nearcast.runtime.exit import ExitCode

if TYPE_CHECKING:
    from edge_node.mqtt.ledger.records import Letter

F = TypeVar("F", bound=Callable[..., Any])
LOCAL = "local"
SHOWN_BYTES = 256
"""Of a payload, unless it goes to a file."""
NAMED_MAX = 8


@click.group()
def command() -> None:
    """List what a node gave up, look at it, have it tried again.

    The letters lie in the node's data_dir; the node may run meanwhile, or be down.
    """


def ledger_options(function: F) -> F:
    """Add what names a node's ledger."""
    tenant = click.option("--tenant", default=LOCAL, show_default=True, help="Whose devices.")
    return tenant(settings_options(function))


@command.command("list", short_help="Show what was given up.")
@ledger_options
@json_option
def list_dead(path: Path | None, overrides: tuple[str, ...], tenant: str, as_json: bool) -> None:
    """Show what was given up, oldest first, with the reason."""
    from edge_node.mqtt.ledger.letters import list_letters

    letters = list_letters(_ledger(path, overrides, tenant))
    if as_json:
        print_json({"letters": [msgspec.to_builtins(letter) for letter in letters]})
        return
    print_table(
        ["id", "when", "kind", "from", "for", "bytes", "crashes", "replay", "reason"],
        [_row(letter) for letter in letters],
        empty="No dead letters.",
        right=("id", "bytes", "crashes"),
    )


@command.command(short_help="Show one letter and what the device sent.")
@click.argument("letter_id", type=int, metavar="ID")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the payload to this file.")
@ledger_options
@json_option
def show(
    letter_id: int, output: Path | None, path: Path | None, overrides: tuple[str, ...], tenant: str, as_json: bool
) -> None:
    """Show the letter ID and what the device sent."""
    from edge_node.mqtt.ledger.letters import read_letter

    found = read_letter(_ledger(path, overrides, tenant), letter_id)
    if found is None:
        _refuse([letter_id])
    letter, payload = found
    if output is not None:
        output.write_bytes(payload)
    if as_json:
        print_json({**msgspec.to_builtins(letter), "payload": b64encode(payload).decode()})
        return
    shown = payload[:SHOWN_BYTES]
    rows = [[name, str(value)] for name, value in {**msgspec.to_builtins(letter), "at": _when(letter)}.items()]
    rows.append(["payload", repr(shown) + (" …" if len(payload) > len(shown) else "")])
    print_table(["field", "value"], rows)


@command.command(short_help="Have letters tried again.")
@click.argument("letter_ids", type=int, nargs=-1, metavar="[ID]...")
@click.option("--all", "is_all", is_flag=True, help="All of them.")
@ledger_options
@json_option
def replay(
    letter_ids: tuple[int, ...],
    is_all: bool,
    path: Path | None,
    overrides: tuple[str, ...],
    tenant: str,
    as_json: bool,
) -> None:
    """Have the letters with these IDs tried again: by the running node within seconds, else when it starts.

    Whoever asked first has long had an answer; the new one goes to the same reply topic.
    """
    from edge_node.mqtt.ledger.letters import list_letters, mark_for_replay

    if bool(letter_ids) is is_all:
        raise click.UsageError("Give either IDs or --all.")
    ledger = _ledger(path, overrides, tenant)
    wanted = [letter.id for letter in list_letters(ledger)] if is_all else list(letter_ids)
    marked = mark_for_replay(ledger, wanted)
    if as_json:
        print_json({"replay": marked})
    else:
        click.echo(f"{len(marked)} to be tried again: the running node does so now, another when it starts.")
    if missing := sorted(set(wanted) - set(marked)):
        _refuse(missing)


def _ledger(path: Path | None, overrides: tuple[str, ...], tenant: str) -> Path:
    from edge_node.config import EdgeConfig
    from nearcast.config import load_config

    return load_config(EdgeConfig, path=path, overrides=overrides).value.ledger_path(tenant)


def _refuse(ids: list[int]) -> NoReturn:
    named = ", ".join(map(str, ids[:NAMED_MAX]))
    click.echo(f"nearcast: There is no dead letter {named}; see `nearcast dlq list`.", err=True)
    sys.exit(ExitCode.NOT_FOUND)


def _row(letter: Letter) -> list[str]:
    return [
        str(letter.id),
        _when(letter),
        letter.kind,
        letter.device or "-",
        letter.name,
        str(letter.size_bytes),
        str(letter.attempts),
        "yes" if letter.replay else "",
        letter.reason,
    ]


def _when(letter: Letter) -> str:
    return datetime.fromtimestamp(letter.at, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
