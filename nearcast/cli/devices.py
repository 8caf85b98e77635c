"""`nearcast devices`: who may come to a tenant's broker."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from nearcast.cli.listing import json_option, print_json, print_table
from nearcast.cli.process_options import settings_options

if TYPE_CHECKING:
    from edge_node.broker.registry import Row
    from edge_node.broker.tenant import TenantAuthority
    from nearcast.identity.device import DeviceIdentity

F = TypeVar("F", bound=Callable[..., Any])
APPLY_TIMEOUT_S = 10.0
APPLY_POLL_S = 0.05
DAY_S = 86_400.0
HOUR_S = 3600.0


@click.group()
def command() -> None:
    """Invite, list and revoke the devices of a tenant; join and renew as a device.

    invite, list and revoke work where the edge node keeps its data_dir, beside the node; join and renew on the device.
    """


def tenant_options(function: F) -> F:
    """Add what names a tenant of a node."""
    tenant = click.option("--tenant", required=True, help="Whose devices: one of mqtt.tenant_brokers.")
    return tenant(settings_options(function))


@command.command(short_help="Write a claim, with which a device can join.")
@click.argument("name", required=False, default="")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder for the claim: bring it to the device, and keep it from others.",
)
@click.option("--reader", is_flag=True, help="For somebody who hears all results of the tenant and asks nothing.")
@click.option("--uses", type=click.IntRange(1), default=1, show_default=True, help="Devices it makes, without NAME.")
@click.option(
    "--ttl-h", type=click.FloatRange(0, min_open=True), default=24.0, show_default=True, help="Hours it holds."
)
@tenant_options
@json_option
def invite(
    name: str,
    output: Path,
    reader: bool,
    uses: int,
    ttl_h: float,
    path: Path | None,
    overrides: tuple[str, ...],
    tenant: str,
    as_json: bool,
) -> None:
    """Write a claim for the device NAME; without NAME the device says who it is. It makes one device, unless --uses.

    The device joins with `nearcast devices join`, or as the document on MQTT says.
    """
    authority = _open(path, overrides, tenant)
    try:
        claim = authority.invite(
            output, name=name, kind="reader" if reader else "device", uses=uses, life_s=ttl_h * HOUR_S
        )
    finally:
        authority.close()
    if as_json:
        print_json({"claim": claim.place.name, "for": name, "url": claim.place.url, "folder": str(output)})
        return
    click.echo(f"{output} holds {claim.place.name} for {name or f'{uses} device(s)'} at {claim.place.url}")
    click.echo(f"On the device: nearcast devices join {output} FOLDER{'' if name else ' --name NAME'}")


@command.command("list", short_help="Show claims, devices and readers.")
@tenant_options
@json_option
def list_devices(path: Path | None, overrides: tuple[str, ...], tenant: str, as_json: bool) -> None:
    """Show claims, devices and readers with the state of their certificates."""
    authority = _open(path, overrides, tenant)
    try:
        rows = authority.listing()
    finally:
        authority.close()
    if as_json:
        print_json({"devices": [_as_json(row) for row in rows]})
        return
    print_table(
        ["name", "state", "issued", "until", "for"],
        [[row.name, row.state, _day(row.issued_at), _day(row.expires_at), _target(row)] for row in rows],
        empty="No devices yet; invite one: nearcast devices invite NAME --tenant TENANT --output FOLDER",
    )


@command.command(short_help="Take the certificates of a device away.")
@click.argument("name")
@tenant_options
@json_option
def revoke(name: str, path: Path | None, overrides: tuple[str, ...], tenant: str, as_json: bool) -> None:
    """Revoke every certificate of NAME, as `list` shows it, and end its session, also while it is away.

    The running node has its broker restarted for it: the other devices of the tenant reconnect.
    """
    from edge_node.broker.tenant import is_running

    authority = _open(path, overrides, tenant)
    try:
        count = authority.revoke(name)
        if is_running(authority.folder):
            click.echo("The running node restarts its broker; this takes seconds.", err=True)
        applied = _wait_applied(authority)
    finally:
        authority.close()
    if as_json:
        print_json({"name": name, "revoked": count, "applied": applied})
        return
    when = "the broker refuses it now" if applied else "the broker refuses it from the node's next start on"
    click.echo(f"{name}: {count} certificate(s) revoked; {when}.")


@command.command(short_help="On a device: turn a claim into an identity.")
@click.argument("claim", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--name", default="", help="What to be called, where the claim leaves it open.")
@json_option
def join(claim: Path, folder: Path, name: str, as_json: bool) -> None:
    """Turn CLAIM into an identity of this device in FOLDER. Its key is made here and stays here.

    Afterwards the claim is of no use; delete it.
    """
    from nearcast.client.provisioning import join as join_tenant

    _tell(asyncio.run(join_tenant(claim, folder, device=name)), as_json)


@command.command(short_help="On a device: replace the certificate by a fresh one.")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option("--if-due", is_flag=True, help="Only after two thirds of its life; for a timer.")
@json_option
def renew(folder: Path, if_due: bool, as_json: bool) -> None:
    """Replace the certificate in FOLDER by a fresh one for the same key. Its device reconnects meanwhile."""
    from nearcast.client.provisioning import renew as renew_certificate
    from nearcast.identity.device import DeviceIdentity

    if if_due and time.time() < (held := DeviceIdentity.load(folder)).validity().renew_at:
        if as_json:
            _tell(held, as_json)
        else:
            click.echo("Not due yet.")
        return
    _tell(asyncio.run(renew_certificate(folder)), as_json)


def _open(path: Path | None, overrides: tuple[str, ...], tenant: str) -> TenantAuthority:
    from edge_node.broker.tenant import TenantAuthority, tenant_folder
    from edge_node.config import EdgeConfig
    from nearcast.config import load_config

    config = load_config(EdgeConfig, path=path, overrides=overrides).value
    return TenantAuthority.open(tenant_folder(Path(config.data_dir), tenant))


def _wait_applied(authority: TenantAuthority) -> bool:
    """Whether a running node has told the broker."""
    from edge_node.broker.tenant import is_running

    revision, deadline = authority.registry.revision(), time.monotonic() + APPLY_TIMEOUT_S
    while is_running(authority.folder) and time.monotonic() < deadline:
        if authority.registry.applied() >= revision:
            return True
        time.sleep(APPLY_POLL_S)
    return False


def _tell(identity: DeviceIdentity, as_json: bool) -> None:
    if as_json:
        place, validity = identity.place, identity.validity()
        shown = {"name": place.name, "tenant": place.tenant, "url": place.url, "folder": str(identity.folder)}
        print_json({**shown, "ends_at": validity.ends_at, "renew_at": validity.renew_at})
        return
    click.echo(f"{identity.folder}: {identity.place.name} of {identity.place.tenant} at {identity.place.url}")
    click.echo(f"Valid until {_day(identity.validity().ends_at)}; renew from {_day(identity.validity().renew_at)} on.")


def _as_json(row: Row) -> dict[str, Any]:
    shown = {"name": row.name, "state": row.state, "issued_at": row.issued_at, "expires_at": row.expires_at}
    return shown if row.uses_left is None else {**shown, "uses_left": row.uses_left, "for": row.holder}


def _target(row: Row) -> str:
    if row.uses_left is None:
        return ""
    return row.holder or (f"{row.uses_left} more" if row.uses_left else "")


def _day(wall: float) -> str:
    return datetime.fromtimestamp(wall, tz=UTC).strftime("%Y-%m-%d %H:%M")
