"""`nearcast doctor`: what is wrong between a node, its broker and its devices."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import click
import msgspec

from nearcast.cli.listing import json_option, print_json, print_table
from nearcast.cli.process_options import settings_options


@click.command()
@settings_options
@click.option("--url", default="", metavar="MQTT://HOST:PORT/TENANT", help="The broker; empty = the node's.")
@click.option("--tenant", default="local", show_default=True, help="One that has a broker of its own on this node.")
@click.option(
    "--identity",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Folder of a device's identity, to come as that device to a broker with certificates.",
)
@click.option(
    "--broker-config",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="The broker's mosquitto.conf, to see whether it really saves; empty = that of the node's own broker.",
)
@json_option
def command(
    path: Path | None,
    overrides: tuple[str, ...],
    url: str,
    tenant: str,
    identity: Path | None,
    broker_config: Path | None,
    as_json: bool,
) -> None:
    """Examine a node, its broker and the way between devices and both: what is granted, kept, delayed, expired.

    Everything is judged by what happens, not by what is configured. It takes as long as the broker waits until it
    saves, about six seconds with the node's own broker. Exit code: 0 = no line fails, 69 = there is no broker, 1 = a
    line fails.
    """
    from edge_node.config import EdgeConfig
    from edge_node.doctor.examine import examine
    from edge_node.doctor.findings import exit_code
    from edge_node.doctor.subject import find_subject
    from nearcast.config import load_config

    config = load_config(EdgeConfig, path=path, overrides=overrides).value
    subject = find_subject(config, url=url, tenant=tenant, identity=identity, broker_config=broker_config)
    findings = asyncio.run(examine(subject))
    if as_json:
        print_json({"findings": [msgspec.to_builtins(finding) for finding in findings]})
    else:
        print_table(
            ["check", "status", "finding"],
            [[one.check, one.status, f"{one.detail.rstrip('.')}. {one.advice}".rstrip()] for one in findings],
        )
    sys.exit(exit_code(findings))
