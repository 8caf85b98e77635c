"""`nearcast keys`: the signing keys of a mesh."""

from __future__ import annotations

from pathlib import Path

import click

from nearcast.cli.operator_options import home_option, operator_options


@click.group()
def command() -> None:
    """Make and renew the keys of a mesh."""


@command.command(short_help="Make all keys of a new mesh.")
@home_option
@click.option("--team", default="core", show_default=True, help="The team that may publish models.")
def init(home: Path, team: str) -> None:
    """Make all keys of a new mesh: HOME/operator (offline keys) and HOME/sync (what the controller needs)."""
    from model_sync.publisher.keys import init_keys

    init_keys(home, team)
    click.echo(f"{home / 'operator'}  root, targets and models-{team} keys: keep them offline, and keep a copy")
    click.echo(f"{home / 'sync'}  online key, certificate authorities and an empty repository")
    click.echo(f"Next: nearcast sync --home {home / 'sync'}")


@command.command(short_help="Replace an operator's expired certificate.")
@home_option
def renew(home: Path) -> None:
    """Give the operator of HOME a new certificate after the old one expired; needs HOME/sync on this machine."""
    from model_sync.publisher.keys import renew_operator

    identity = renew_operator(home)
    click.echo(f"{identity.uri} has a new certificate for 7 days; commands renew it while it holds.")


@command.command(short_help="Sign the offline roles for another term.")
@operator_options
def extend(home: Path, control: str) -> None:
    """Sign root, targets and models roles for another term; due before 90 days without a push are over."""
    from model_sync.publisher.control_client import connect
    from model_sync.publisher.renewal import renew_roles

    with connect(home, control) as client:
        expiries = renew_roles(client, home / "operator")
    for role, expires in expiries.items():
        click.echo(f"{role} holds until {expires:%Y-%m-%d}")
