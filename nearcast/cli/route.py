"""`nearcast route`: where a request would go now, and why; and what was decided, once more."""

from __future__ import annotations

import json
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import click

from nearcast.cli.listing import json_option, print_json, print_table, printable
from nearcast.cli.route_replay import command as replay
from nearcast.errors import Code, MeshError

TIMEOUT_S = 5.0
ANSWER_SIZE_BYTES_MAX = 1024 * 1024


@click.group(name="route")
def command() -> None:
    """Explain routing decisions."""


command.add_command(replay)


@command.command(short_help="Ask a router where a request would go now.")
@click.argument("model")
@click.option(
    "--address",
    default="http://127.0.0.1:8002",
    show_default=True,
    help="Metrics listener of a router or an edge node.",
)
@click.option("--version", "release", default="", help="The release that the request names.")
@click.option("--size", default=0, metavar="BYTES", help="Size of the request.")
@click.option("--deadline-ms", type=float, help="Time that the request has.")
@click.option("--principal", default="", help="Whose request it is; decides about a candidate.")
@json_option
def explain(
    model: str, address: str, release: str, size: int, deadline_ms: float | None, principal: str, as_json: bool
) -> None:
    """Ask a router where a request for MODEL would go now. Nothing is sent to the model."""
    query: dict[str, str] = {"model": model, "version": release, "size": str(size), "principal": principal}
    if deadline_ms is not None:
        query["deadline_ms"] = str(deadline_ms)
    answer = _ask(address, {name: value for name, value in query.items() if value})
    if as_json:
        print_json(answer)
    else:
        _print(answer)


def _ask(address: str, query: dict[str, str]) -> dict[str, Any]:
    base = address if "://" in address else f"http://{address}"
    if not base.startswith(("http://", "https://")):
        raise MeshError(Code.INVALID_REQUEST, f"{address!r} is no address; it looks like http://127.0.0.1:8002.")
    try:
        with urlopen(f"{base.rstrip('/')}/v2/nearcast/route?{urlencode(query)}", timeout=TIMEOUT_S) as reply:  # noqa: S310 - the scheme is checked above
            data = reply.read(ANSWER_SIZE_BYTES_MAX)
    except HTTPError as error:
        raise _said(error) from error
    except (URLError, OSError, HTTPException) as error:
        raise MeshError(
            Code.UNAVAILABLE, f"No metrics listener answers at {address}; `nearcast nodes list` shows where they are."
        ) from error
    try:
        answer: dict[str, Any] = json.loads(data)
    except ValueError as error:
        raise MeshError(Code.INVALID_REQUEST, f"What listens at {address} does not explain routes.") from error
    return answer


def _said(error: HTTPError) -> MeshError:
    try:
        answer = json.loads(error.read(ANSWER_SIZE_BYTES_MAX))
        return MeshError(Code(answer["code"]), str(answer["error"]))
    except (ValueError, KeyError, TypeError):
        return MeshError(
            Code.INVALID_REQUEST, "This listener does not explain routes; give --address of a metrics listener."
        )


def _print(answer: dict[str, Any]) -> None:
    if answer["decision"] == "send":
        hedge = answer["hedge_after_ms"]
        after = "no hedge" if hedge is None else f"hedge after {hedge:.1f} ms"
        release = answer["answers_as"] or "-"
        click.echo(f"{answer['model']} → {answer['target']} as release {release} ({answer['reason']}; {after})")
    else:
        click.echo(printable(f"{answer['model']} → refused: {answer['code']} {answer['message']}"))
    times = ("rtt", "transfer", "wait", "service", "t50", "t95", "cost")
    numbers = [*(f"{name} ms" for name in times), "load"]
    rows = [
        [
            *(row["target"], row["tier"], row["version"]),
            *(f"{row[name + '_ms']:.2f}" for name in times),
            *(f"{row['load']:.1f}", row["verdict"]),
        ]
        for row in answer["candidates"]
    ]
    if rows:
        print_table(["target", "tier", "release", *numbers, "verdict"], rows, right=["release", *numbers])
