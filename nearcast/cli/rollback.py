"""`nearcast rollback`: one call to the controller, and nothing imported that it does not need."""

from __future__ import annotations

from pathlib import Path

import click

from nearcast.cli.listing import json_option, print_json
from nearcast.cli.operator_options import channel_option, operator_options, reason_option


@click.command()
@click.argument("model")
@click.option("--to", "release", type=int, required=True, metavar="VERSION", help="The release to return to.")
@channel_option
@reason_option
@operator_options
@json_option
def command(model: str, release: int, channel: str, reason: str, home: Path, control: str, as_json: bool) -> None:
    """Make an earlier release of MODEL the stable one again and end any trial."""
    from model_sync.publisher.control_client import connect

    with connect(home, control, keep_fresh=False) as client:
        wish = {"channel": channel, "model": model, "action": "rollback", "release": release, "reason": reason}
        answer = client.call("POST", "/v1/rollouts", wish)
    if as_json:
        print_json(answer)
    else:
        click.echo(f"{model} returns to {release} in channel {channel}, intent {answer['intent']}.")
