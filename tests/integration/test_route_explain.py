"""`nearcast route explain` against the route of a router that listens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from click.testing import CliRunner, Result

from nearcast.cli.route import command
from nearcast.clock import SYSTEM_CLOCK
from nearcast.errors import Code, MeshError
from nearcast.load import NodeReport, VersionReport
from router.explain import explain, explain_routes
from router.policy import Policy, PolicyConfig
from router.router import Router


@pytest.fixture
def router() -> Router:
    made = Router(Policy(PolicyConfig(), seed=1), node="r")
    for name, us, price, quality in (("near", 2000.0, 4.0, 0.9), ("far", 20_000.0, 1.0, 0.6)):
        made.attach(name, None, "peer" if name == "near" else "cloud")  # type: ignore[arg-type]
        version = VersionReport(
            model="m", version="3", service_p50_us=us, service_p95_us=us, price=price, quality=quality
        )
        report = NodeReport(node=name, role="edge", slots=2, in_flight=1, versions=(version,))
        made.policy.on_report(SYSTEM_CLOCK.monotonic(), name, report)
    return made


@pytest.fixture
async def url(router: Router) -> AsyncIterator[str]:
    app = web.Application()
    for path, answer in explain_routes(router).items():
        app.router.add_get(path, answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


async def ask(*arguments: str) -> Result:
    return await asyncio.to_thread(CliRunner().invoke, command, ["explain", *arguments])


async def test_every_term_and_the_choice(url: str) -> None:
    result = await ask("m", "--url", url, "--deadline-ms", "500", "--size", "1000")
    assert result.exit_code == 0, result.output
    head, columns, *rows = result.output.splitlines()
    assert head.startswith("m → near as release 3 (best; hedge after ")
    assert columns.split()[:3] == ["target", "tier", "release"]
    near, far = (next(row for row in rows if name in row.split()[:2]) for name in ("near", "far"))
    assert near.split()[0] == "→"
    assert near.split()[-1] == "chosen"
    assert far.split()[-1] == "feasible"
    assert "chosen: the request goes here" in rows


async def test_json_holds_what_the_table_holds(url: str) -> None:
    told = json.loads((await ask("m", "--url", url, "--json", "--deadline-ms", "500")).output)
    near, far = told["candidates"]
    assert (told["decision"], told["target"], told["reason"]) == ("send", "near", "best")
    assert (near["price"], near["quality"], near["slots"], near["in_flight"]) == (4.0, 0.9, 2, 0)
    assert far["t95_ms"] >= far["t50_ms"] >= far["service_ms"] >= 20.0
    assert near["report_age_ms"] < 60_000
    assert set(told["meanings"]) == {"best", "chosen", "feasible"}


async def test_a_request_in_a_file_says_its_model_and_size(url: str, tmp_path: Path) -> None:
    path = tmp_path / "request.json"
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 1000], "data": [0.5] * 1000}
    path.write_text(json.dumps({"model_name": "m", "inputs": [tensor], "parameters": {"priority": 2}}))
    small = json.loads((await ask("m", "--url", url, "--json")).output)
    large = json.loads((await ask(str(path), "--url", url, "--json")).output)
    assert large["model"] == "m"
    transfers = [told["candidates"][0]["transfer_ms"] for told in (small, large)]
    assert transfers[0] == 0.0
    assert transfers[1] == pytest.approx(4020 / PolicyConfig().bytes_per_s_seed * 1e3, rel=0.02)
    path.write_text(json.dumps({"inputs": [tensor]}))
    assert (await ask(str(path), "--url", url)).exit_code != 0
    assert json.loads((await ask(str(path), "--model", "m", "--url", url, "--json")).output)["target"] == "near"


async def test_refusals_say_why(url: str) -> None:
    short = await ask("m", "--url", url, "--deadline-ms", "0.5")
    assert "m → refused: DEADLINE" in short.output
    assert "(deadline_too_short)" in short.output
    unknown = await ask("cats", "--url", url)
    assert "known models: m" in unknown.output


@pytest.mark.parametrize(
    "query",
    [
        {"deadline_ms": "x"},
        {"deadline_ms": "nan"},
        {"size": "-1"},
        {"colour": "red"},
        {"quality_min": "2"},
        {"model": ""},
    ],
)
async def test_a_query_that_makes_no_sense(router: Router, query: dict[str, str]) -> None:
    with pytest.raises(MeshError) as caught:
        explain(router, {"model": "m"} | query)
    assert caught.value.code is Code.INVALID_REQUEST


async def test_nobody_there(tmp_path: Path) -> None:
    result = await ask("m", "--url", "127.0.0.1:9")
    assert isinstance(result.exception, MeshError)
    assert "No metrics listener answers" in result.exception.message
