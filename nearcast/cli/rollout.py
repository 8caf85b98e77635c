"""`nearcast rollout`: start, watch and end a trial of a published release."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from nearcast.cli.listing import json_option, print_json, print_table
from nearcast.cli.operator_options import channel_option, operator_options, reason_option
from nearcast.errors import Code, MeshError

if TYPE_CHECKING:
    from model_sync.publisher.control_client import ControlClient

REFRESH_S = 1.0
PIPE_WIDTH = 250
SHARE = click.FloatRange(0, 1, min_open=True)


@click.group()
def command() -> None:
    """Start, watch, promote or stop the trial of a release."""


@command.command(short_help="Try a release on a share of the requests.")
@click.argument("model")
@click.option("--release", type=int, required=True, help="The published release to try.")
@channel_option
@click.option(
    "--share", type=SHARE, default=0.1, show_default=True, help="Share of the requests that the candidate answers."
)
@click.option("--wave", type=SHARE, default=1.0, show_default=True, help="Share of the nodes that install it.")
@click.option(
    "--disagreement-max",
    type=click.FloatRange(0, 1),
    default=None,
    help="Share of the shadowed inputs that it may answer otherwise than stable. Default: any.",
)
@reason_option
@operator_options
@json_option
def start(
    model: str,
    release: int,
    channel: str,
    share: float,
    wave: float,
    disagreement_max: float | None,
    reason: str,
    home: Path,
    control: str,
    as_json: bool,
) -> None:
    """Try a release on a share of the requests; repeat it with another --share to widen the trial."""
    answer = _change(
        home, control, channel=channel, model=model, action="candidate", release=release, share=share, wave=wave,
        disagreement_max=disagreement_max, reason=reason,
    )  # fmt: skip
    text = f"{model} {release} answers {share:.0%} of the requests in channel {channel}, intent {answer['intent']}."
    _print(answer, text, as_json)


@command.command()
@click.argument("model")
@channel_option
@reason_option
@operator_options
@json_option
def promote(model: str, channel: str, reason: str, home: Path, control: str, as_json: bool) -> None:
    """Make the candidate of MODEL the stable release."""
    answer = _change(home, control, channel=channel, model=model, action="promote", reason=reason)
    _print(answer, f"The candidate of {model} is stable in channel {channel}, intent {answer['intent']}.", as_json)


@command.command()
@click.argument("model")
@channel_option
@reason_option
@operator_options
@json_option
def stop(model: str, channel: str, reason: str, home: Path, control: str, as_json: bool) -> None:
    """End the trial of MODEL; the stable release answers everything."""
    answer = _change(home, control, channel=channel, model=model, action="stop", reason=reason)
    _print(answer, f"The trial of {model} in channel {channel} has ended, intent {answer['intent']}.", as_json)


@command.command()
@click.argument("model", default="")
@click.option("--watch", is_flag=True, help="Redraw every second until Ctrl-C.")
@channel_option
@operator_options
@json_option
def status(model: str, watch: bool, channel: str, home: Path, control: str, as_json: bool) -> None:
    """Show what a channel serves, all models or MODEL, what its nodes report, and how a trial stands."""
    from model_sync.publisher.control_client import connect

    with connect(home, control) as client:
        found = _fetch(client, channel, model)
        if not watch:
            _show(found, as_json)
            return
        with contextlib.suppress(KeyboardInterrupt):
            _watch(lambda: _fetch(client, channel, model), found, as_json)


@command.command()
@click.argument("model", default="")
@operator_options
@json_option
def history(model: str, home: Path, control: str, as_json: bool) -> None:
    """Show who changed MODEL (or all), when, from which training data, and what replaced what; the newest first."""
    from model_sync.publisher.control_client import connect

    with connect(home, control) as client:
        changes = client.call("GET", f"/v1/lineage?model={quote(model, safe='')}")["changes"]
    if as_json:
        print_json(changes)
        return
    rows = [
        [
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one["at"])), one["by"], one["model"],
            one["channel"] or "-", one["action"], _cell(one["release"]), _cell(one["replaced"]),
            (one["data_sha256"] or "-")[:12], one["reason"],
        ]
        for one in changes
    ]  # fmt: skip
    columns = ["when", "who", "model", "channel", "action", "release", "instead of", "data", "why"]
    print_table(columns, rows, empty="No changes yet.", right=["release", "instead of"])


def _cell(release: int | None) -> str:
    return "-" if release is None else str(release)


def _fetch(client: ControlClient, channel: str, model: str) -> dict[str, Any]:
    found = client.call("GET", f"/v1/channels/{quote(channel, safe='')}/status?model={quote(model, safe='')}")
    if model and not found["rollouts"]:
        raise MeshError(Code.MODEL_NOT_FOUND, f"Channel {channel} serves no {model}; see: nearcast rollout status.")
    nodes = client.call("GET", "/v1/nodes")["nodes"]
    for rollout in found["rollouts"]:
        # A node's own word, as it last gave it to the directory.
        releases = (str(release) for node in nodes for release in node["models"].get(rollout["model"], ()))
        rollout["loaded"] = dict(Counter(releases))
    return found


def _show(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    from rich.console import Console

    from nearcast.cli.rollout_view import view

    # Where nobody looks (a pipe), lines are as long as they are, so that `grep` finds whole values.
    console = Console()
    wide = Console(width=PIPE_WIDTH, no_color=True) if not console.is_terminal else console
    wide.print(view(found, time.time()), highlight=False)


def _watch(fetch: Callable[[], dict[str, Any]], found: dict[str, Any], as_json: bool) -> None:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    from nearcast.cli.rollout_view import view

    if as_json:
        while True:
            click.echo(json.dumps(found))
            time.sleep(REFRESH_S)
            found = fetch()
    trouble = ""
    with Live(view(found, time.time()), console=Console(), auto_refresh=False, screen=False) as live:
        while True:
            time.sleep(REFRESH_S)
            try:
                found, trouble = fetch(), ""
            except MeshError as error:
                trouble = f"{error.message} This is what it said last."
            shown = view(found, time.time())
            live.update(Group(shown, Text(trouble, "red")) if trouble else shown, refresh=True)


def _change(home: Path, control: str, **wish: Any) -> dict[str, Any]:
    from model_sync.publisher.control_client import connect

    with connect(home, control) as client:
        return client.call("POST", "/v1/rollouts", wish)


def _print(answer: dict[str, Any], text: str, as_json: bool) -> None:
    if as_json:
        print_json(answer)
    else:
        click.echo(text)
