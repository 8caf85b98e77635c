"""`nearcast route`: where a request would go now, and why; and what was decided, once more."""

from __future__ import annotations

import json
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import click

from nearcast.cli.listing import json_option, print_json, print_table, printable
from nearcast.cli.operator_options import operator_options
from nearcast.cli.route_replay import replay
from nearcast.errors import Code, MeshError

TIMEOUT_S = 5.0
ANSWER_SIZE_BYTES_MAX = 1024 * 1024
REQUEST_SIZE_BYTES_MAX = 64 * 1024 * 1024
METRICS_URL = "http://127.0.0.1:8002"
CHOSEN = "→"


@click.group(name="route")
def command() -> None:
    """Explain routing decisions."""


command.add_command(replay)


@command.command(short_help="Ask a router where a request would go now.")
@click.argument("request_", metavar="REQUEST")
@click.option("--url", "--address", "url", default="", help=f"Its metrics listener. Default: {METRICS_URL}.")
@click.option("--node", default="", metavar="NAME", help="The router or edge node to ask; the controller says where.")
@click.option("--model", default="", help="The model, where REQUEST is a file that does not name it.")
@click.option("--version", default="", help="The release that the request names.")
@click.option("--size", type=click.IntRange(min=0), metavar="BYTES", help="Size of the request. Default: the file's.")
@click.option("--deadline-ms", type=click.FloatRange(min=0), help="Time that the request has.")
@click.option("--priority", type=click.IntRange(min=0), help="0 = default, 1 = highest, larger is lower.")
@click.option("--tenant", default="", help="Whose request it is.")
@click.option("--principal", default="", help="Who sends it; decides about a candidate.")
@click.option("--sequence", default="", help="The sequence that it continues.")
@click.option("--quality-min", type=click.FloatRange(0, 1), help="An answer of less quality is worth nothing.")
@click.option("--price-max", type=click.FloatRange(min=0), help="A target that asks more for 1000 answers is none.")
@operator_options
@json_option
def explain(
    request_: str, url: str, node: str, model: str, home: Path, control: str, as_json: bool, **options: Any
) -> None:
    """Ask a router where a request would go now. Nothing is sent to the model.

    REQUEST is the name of a model, or a file with a request in the protocol's JSON, which says its size, model_name,
    model_version, priority and sequence itself unless the options do.
    """
    told = _read_file(Path(request_), model) if request_.endswith(".json") else {"model": request_}
    query = told | {name: value for name, value in options.items() if value not in (None, "")}
    answer = _ask(_find(node, home, control) if node else url or METRICS_URL, query)
    if as_json:
        print_json(answer)
    else:
        _print(answer)


def _read_file(path: Path, model: str) -> dict[str, Any]:
    """What a request in the protocol's JSON says about itself."""
    from nearcast.transport.json_tensors import decode_request

    try:
        with path.open("rb") as file:
            body = file.read(REQUEST_SIZE_BYTES_MAX)
        named = json.loads(body)
        model = model or str(named.get("model_name", ""))
    except (OSError, ValueError, AttributeError) as error:
        raise MeshError(Code.INVALID_REQUEST, f"{path} is no request in JSON: {error}.") from error
    if not model:
        raise MeshError(Code.INVALID_REQUEST, f"{path} names no model; say --model NAME.")
    request, _ = decode_request(model, str(named.get("model_version", "")), body, len(body))
    told = {
        "model": model,
        "version": request.version,
        "size": len(request.encode()),
        "priority": request.parameters.get("priority", 0),
        "sequence": request.sequence_id,
    }
    return {name: value for name, value in told.items() if value}


def _find(node: str, home: Path, control: str) -> str:
    """The metrics listener of a node, by the controller's directory."""
    from model_sync.publisher.control_client import connect

    with connect(home, control) as client:
        nodes = {entry["name"]: entry for entry in client.call("GET", "/v1/nodes?all=1")["nodes"]}
    if node not in nodes:
        raise MeshError(Code.INVALID_REQUEST, f"No node is called {node!r}; `nearcast nodes list` shows all.")
    address = nodes[node]["addresses"].get("metrics", "")
    if not address:
        raise MeshError(Code.UNAVAILABLE, f"{node} has announced no metrics listener; say --url.")
    return str(address)


def _ask(address: str, query: dict[str, Any]) -> dict[str, Any]:
    base = address if "://" in address else f"http://{address}"
    if not base.startswith(("http://", "https://")):
        raise MeshError(Code.INVALID_REQUEST, f"{address!r} is no address; it looks like {METRICS_URL}.")
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
            Code.INVALID_REQUEST, "This listener does not explain routes; give --url of a metrics listener."
        )


def _print(answer: dict[str, Any]) -> None:
    if answer["decision"] == "send":
        hedge = answer["hedge_after_ms"]
        after = "no hedge" if hedge is None else f"hedge after {hedge:.1f} ms"
        release = answer["answers_as"] or "-"
        model = f"{answer['stand_in']} in its place" if answer["stand_in"] else ""
        what = " ".join(filter(None, (model, f"as release {release}")))
        head = f"{answer['model']} → {answer['target']} {what} ({answer['reason']}; {after})"
    else:
        retry = answer["retry_after_ms"]
        again = "" if retry is None else f" Try again in {retry} ms."
        head = f"{answer['model']} → refused: {answer['code']} {answer['message']}{again} ({answer['reason']})"
    click.secho(printable(head), bold=True)
    times = ("rtt", "transfer", "wait", "service", "t50", "t95", "cost")
    numbers = [*(f"{name} ms" for name in times), "load", "own", "slots", "errors", "price", "quality", "report age s"]
    if answer["candidates"]:
        print_table(
            ["", "target", "tier", "release", *numbers, "verdict"],
            [_row(row, times) for row in answer["candidates"]],
            right=["release", *numbers],
        )
    for code, meaning in answer["meanings"].items():
        click.echo(printable(f"{code}: {meaning}"))


def _row(row: dict[str, Any], times: tuple[str, ...]) -> list[str]:
    age_ms = row["report_age_ms"]
    return [
        *(CHOSEN if row["verdict"] == "chosen" else "", row["target"], row["tier"], row["version"]),
        *(f"{row[name + '_ms']:.2f}" for name in times),
        *(f"{row['load']:.1f}", str(row["in_flight"]), str(row["slots"]), f"{row['error']:.2f}"),
        *(f"{row['price']:g}", f"{row['quality']:g}", "-" if age_ms is None else f"{age_ms / 1e3:.1f}"),
        row["verdict"],
    ]
