"""`nearcast rollout`: start, watch and end a trial of a published release."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click

from nearcast.cli.listing import json_option, print_json, print_table
from nearcast.cli.operator_options import channel_option, operator_options, reason_option
from nearcast.errors import Code, MeshError

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
@reason_option
@operator_options
@json_option
def start(
    model: str,
    release: int,
    channel: str,
    share: float,
    wave: float,
    reason: str,
    home: Path,
    control: str,
    as_json: bool,
) -> None:
    """Try a release on a share of the requests; repeat it with another --share to widen the trial."""
    answer = _change(
        home, control, channel=channel, model=model, action="candidate", release=release, share=share, wave=wave,
        reason=reason,
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
@channel_option
@operator_options
@json_option
def status(model: str, channel: str, home: Path, control: str, as_json: bool) -> None:
    """Show what a channel serves, all models or MODEL, and how many nodes say they have it."""
    from model_sync.publisher.control_client import connect

    with connect(home, control) as client:
        document = client.call("GET", f"/v1/channels/{quote(channel, safe='')}")
        nodes = client.call("GET", "/v1/nodes")["nodes"]
    if model:
        document["rollouts"] = [rollout for rollout in document["rollouts"] if rollout["model"] == model]
        if not document["rollouts"]:
            raise MeshError(Code.MODEL_NOT_FOUND, f"Channel {channel} serves no {model}; see: nearcast rollout status.")
    if as_json:
        print_json({"channel": document, "nodes": [_holding(node, model) for node in nodes]})
        return
    click.echo(f"channel {channel}, intent {document['intent']}")
    print_table(
        ["model", "stable", "candidate", "share", "wave", "nodes", "note"],
        [_row(rollout, nodes) for rollout in document["rollouts"]],
        empty="No models yet.",
        right=["stable", "candidate", "share", "wave"],
    )


def _holding(node: dict[str, Any], model: str) -> dict[str, Any]:
    models = {name: releases for name, releases in node["models"].items() if model in ("", name)}
    return {"name": node["name"], "models": models}


def _row(rollout: dict[str, Any], nodes: list[dict[str, Any]]) -> list[str]:
    candidate = rollout.get("candidate")
    notes = ["rolled back"] if rollout.get("rollback") else []
    notes += [rollout["reason"]] if rollout.get("reason") else []
    # A node's own word, as it last gave it.
    loaded = Counter(str(release) for node in nodes for release in node["models"].get(rollout["model"], ()))
    return [
        rollout["model"],
        str(rollout["stable"]["release"]),
        str(candidate["release"]) if candidate else "-",
        f"{rollout.get('share', 0.0):.0%}" if candidate else "-",
        f"{rollout.get('wave', 1.0):.0%}" if candidate else "-",
        ", ".join(f"{release}: {count}" for release, count in sorted(loaded.items())) or "-",
        "; ".join(notes),
    ]


def _change(home: Path, control: str, **wish: Any) -> dict[str, Any]:
    from model_sync.publisher.control_client import connect

    with connect(home, control) as client:
        return client.call("POST", "/v1/rollouts", wish)


def _print(answer: dict[str, Any], text: str, as_json: bool) -> None:
    if as_json:
        print_json(answer)
    else:
        click.echo(text)
