"""`nearcast rollout`: start, watch and end a trial of a published release."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nearcast.cli.operator_options import json_option, operator_options, print_json, print_table


@click.group()
def command() -> None:
    """Start, watch, promote or stop the trial of a release."""


@command.command()
@click.argument("model")
@click.option("--release", type=int, required=True, help="The published release to try.")
@click.option("--channel", default="stable", show_default=True)
@click.option("--share", type=click.FloatRange(0, 1, min_open=True), default=0.1, show_default=True)
@click.option("--wave", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option("--reason", default="")
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
@click.option("--channel", default="stable", show_default=True)
@click.option("--reason", default="")
@operator_options
@json_option
def promote(model: str, channel: str, reason: str, home: Path, control: str, as_json: bool) -> None:
    """Make the candidate of MODEL the stable release."""
    answer = _change(home, control, channel=channel, model=model, action="promote", reason=reason)
    _print(answer, f"The candidate of {model} is stable in channel {channel}, intent {answer['intent']}.", as_json)


@command.command()
@click.argument("model")
@click.option("--channel", default="stable", show_default=True)
@click.option("--reason", default="")
@operator_options
@json_option
def stop(model: str, channel: str, reason: str, home: Path, control: str, as_json: bool) -> None:
    """End the trial of MODEL; the stable release answers everything."""
    answer = _change(home, control, channel=channel, model=model, action="stop", reason=reason)
    _print(answer, f"The trial of {model} in channel {channel} has ended, intent {answer['intent']}.", as_json)


@command.command()
@click.option("--channel", default="stable", show_default=True)
@operator_options
@json_option
def status(channel: str, home: Path, control: str, as_json: bool) -> None:
    """Show what a channel serves and what the nodes say they have."""
    from model_sync.publisher.control_client import connect

    with connect(home, control) as client:
        document = client.call("GET", f"/v1/channels/{channel}")
        nodes = client.call("GET", "/v1/nodes")["nodes"]
    if as_json:
        print_json({"channel": document, "nodes": [{"name": n["name"], "models": n["models"]} for n in nodes]})
        return
    click.echo(f"channel {channel}, intent {document['intent']}")
    print_table(
        ["model", "stable", "candidate", "share", "wave", "note"],
        [_row(rollout) for rollout in document["rollouts"]],
        empty="No models yet.",
    )


def _row(rollout: dict[str, Any]) -> list[str]:
    candidate = rollout.get("candidate")
    notes = ["rolled back"] if rollout.get("rollback") else []
    notes += [rollout["reason"]] if rollout.get("reason") else []
    return [
        rollout["model"],
        str(rollout["stable"]["release"]),
        str(candidate["release"]) if candidate else "-",
        f"{rollout.get('share', 0.0):.0%}" if candidate else "-",
        f"{rollout.get('wave', 1.0):.0%}" if candidate else "-",
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
