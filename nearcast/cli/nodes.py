"""`nearcast nodes`: who is in the mesh."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

import click

from nearcast.cli.listing import json_option, print_json, print_table
from nearcast.cli.operator_options import operator_options


@click.group()
def command() -> None:
    """List, invite and remove nodes."""


@command.command("list", short_help="Show every enrolled node.")
@operator_options
@json_option
def list_nodes(home: Path, control: str, as_json: bool) -> None:
    """Show every enrolled node, its addresses and when it was last heard of."""
    from model_sync.publisher.control_client import connect

    with connect(home, control) as client:
        nodes = client.call("GET", "/v1/nodes?all=1")["nodes"]
    if as_json:
        print_json({"nodes": nodes})
        return
    print_table(
        ["name", "role", "seen", "addresses", "models"],
        [_row(node) for node in nodes],
        empty="No nodes yet; invite one: nearcast nodes invite NAME --role edge",
    )


@command.command(short_help="Print a token with which a node can join once.")
@click.argument("name")
@click.option("--role", type=click.Choice(["edge", "cloud", "router", "operator"]), default="edge", show_default=True)
@click.option("--ttl-s", type=float, default=3600.0, show_default=True, help="How long the token holds.")
@operator_options
@json_option
def invite(name: str, role: str, ttl_s: float, home: Path, control: str, as_json: bool) -> None:
    """Print a token with which NAME can join once."""
    from model_sync.publisher.control_client import connect

    with connect(home, control) as client:
        answer = client.call("POST", "/v1/invites", {"name": name, "role": role, "ttl_s": ttl_s})
    if as_json:
        print_json(answer)
    else:
        click.echo(answer["token"])


@command.command(short_help="Revoke what a node was given.")
@click.argument("name")
@operator_options
@json_option
def remove(name: str, home: Path, control: str, as_json: bool) -> None:
    """Revoke what NAME was given: its certificates and its open invitation. The name is free again.

    The controller refuses it at once, other nodes when they next hear from the controller.
    """
    from model_sync.publisher.control_client import connect

    with connect(home, control) as client:
        answer = client.call("DELETE", f"/v1/nodes/{quote(name, safe='')}")
    if as_json:
        print_json(answer)
    else:
        click.echo(f"{name} is removed: the controller refuses it now, other nodes within seconds.")


def _row(node: dict[str, Any]) -> list[str]:
    seen = node["seen_s_ago"]
    return [
        node["name"],
        node["role"],
        "-" if seen is None else f"{seen:.0f} s ago",
        "  ".join(f"{kind}={address}" for kind, address in sorted(node["addresses"].items())),
        "  ".join(sorted(node["models"])),
    ]
