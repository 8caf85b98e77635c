"""`nearcast export`: carry what a channel wants to where no network goes."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from nearcast.cli.listing import json_option, print_json, print_table
from nearcast.cli.operator_options import channel_option
from nearcast.cli.repository_options import from_option, identity_options, open_source, read_root, root_option

UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
SHORT_S = 86_400.0
"""A copy that holds for less gets a warning."""


class Duration(click.ParamType[float]):
    """`90s`, `15m`, `12h`, `3d`; seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """As `click.ParamType.convert`."""
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", value)
        if match is None:
            self.fail(f"{value!r} is no duration; write 12h, 3d, 90m", param, ctx)
        return float(match[1]) * UNITS_S[match[2]]


@click.command()
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@channel_option
@click.option("--model", "models", multiple=True, help="Only this model; repeatable. Default: all of the channel.")
@click.option("--for", "hold_s", type=Duration(), default=0.0, help="Refuse unless it holds this long, such as 3d.")
@click.option("--deltas/--no-deltas", default=True, show_default=True, help="Take the deltas too.")
@from_option
@root_option
@identity_options
@json_option
def command(
    out: Path,
    channel: str,
    models: tuple[str, ...],
    hold_s: float,
    deltas: bool,
    repository: str,
    root: Path | None,
    identity: Path | None,
    home: Path,
    as_json: bool,
) -> None:
    """Copy what a channel wants, verified, into the folder OUT: a repository for a stick or any web server.

    Run it again to bring the same folder up to date.
    """
    from model_sync.publisher.export import Export

    pinned = read_root(root, identity, home)
    source = open_source(repository, identity=identity, home=home)
    try:
        export = Export(source, pinned, out, channel=channel, now=time.time(), models=models, deltas=deltas)
        exported = export.run(hold_s=hold_s)
    finally:
        source.close()
    print_exported(exported, out, as_json=as_json)


def print_exported(exported: Any, out: Path, *, as_json: bool) -> None:
    """Say what is in the copy and how long it holds."""
    left_s = exported.holds_until - time.time()
    until = datetime.fromtimestamp(exported.holds_until, UTC).isoformat(timespec="minutes")
    role = next(iter(exported.expires))
    if as_json:
        print_json(
            {
                "out": str(out),
                "serial": exported.serial,
                "releases": exported.releases,
                "refused": exported.refused,
                "size_bytes": exported.size_bytes,
                "received_bytes": exported.received_bytes,
                "holds_until": until,
                "holds_s": round(left_s),
                "first_to_expire": role,
            }
        )
        return
    rows = [[model, ", ".join(map(str, releases))] for model, releases in sorted(exported.releases.items())]
    print_table(["model", "releases"], rows, empty="The channel names no model.")
    for model, reason in exported.refused.items():
        click.echo(f"{model}: left out. {reason}")
    click.echo(f"{exported.size_bytes / 1e6:.1f} MB in {out}, {exported.received_bytes / 1e6:.1f} MB of them new.")
    click.echo(f"Its signatures hold until {until} ({left_s / 3600:.1f} h; the {role} role is the first to expire).")
    if left_s < SHORT_S:
        click.echo("After that, nodes keep what they have and install nothing from it.", err=True)
