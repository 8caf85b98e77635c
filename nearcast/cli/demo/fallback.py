"""Scene 4: what only the cloud holds, what cannot be in time, and a node that dies in full flight."""

from __future__ import annotations

import asyncio
import signal
import time
import urllib.error
import urllib.request

import msgspec

from nearcast.cli.demo import file_types
from nearcast.cli.demo.asking import DigitsThroughRouter
from nearcast.cli.demo.samples import FILES, load_digits
from nearcast.cli.demo.stage import Stage
from nearcast.cli.demo.traffic import Answer, Traffic
from nearcast.client import AsyncClient
from nearcast.errors import MeshError
from nearcast.wire.status import DEADLINE_MS

VICTIM = "edge-2"
RATE_PER_S = 100.0
IN_FLIGHT_MIN = 8
BURST = 16
FAILED_MAX = 3
HOPELESS_MS = 2
REFUSAL_MS_MAX = 100.0


async def play(stage: Stage) -> None:
    """Cloud only, hopeless deadline, SIGKILL."""
    stage.title(4, "Fallback: to the cloud, to an early refusal, away from a dead node")
    await ask_cloud_only(stage)
    await asyncio.to_thread(ask_hopeless, stage)
    await kill_in_flight(stage)


async def ask_cloud_only(stage: Stage) -> None:
    """A model that no edge node holds."""
    digits = load_digits()
    async with AsyncClient([stage.mesh.addresses["edge-1"]["grpc"]]) as client:
        answer = await client.infer("digits_large", {"image": digits.images}, deadline_ms=2000)
    right = answer.outputs["probabilities"].argmax(axis=1).tolist() == list(range(10))
    stage.check(
        "an edge node forwards digits_large, which only the cloud core holds",
        ok=right and answer.served_by.startswith("cloud"),
        detail=f"served by {answer.served_by} in {answer.latency_ms:.1f} ms",
    )


def ask_hopeless(stage: Stage) -> None:
    """A deadline that no target can meet is refused before anything runs."""
    features = file_types.extract_features(next(iter(FILES.values()))[0])
    body = {"inputs": [{"name": "bytes", "datatype": "INT32", "shape": [1, 2048], "data": features[0].tolist()}]}
    request = urllib.request.Request(
        f"http://{stage.mesh.addresses['router-1']['http']}/v2/models/magika/infer",
        msgspec.json.encode(body),
        {"content-type": "application/json", DEADLINE_MS: str(HOPELESS_MS)},
    )
    began = time.monotonic()
    status, text = 200, ""
    try:
        urllib.request.urlopen(request, timeout=5).close()
    except urllib.error.HTTPError as error:
        status, text = error.code, msgspec.json.decode(error.read())["error"]
    took_ms = (time.monotonic() - began) * 1e3
    stage.check(
        f"a deadline of {HOPELESS_MS} ms for a 10 ms model is refused early",
        ok=status in (429, 504) and took_ms <= REFUSAL_MS_MAX,
        detail=f"{status} after {took_ms:.1f} ms: {text}",
    )


async def kill_in_flight(stage: Stage) -> None:
    """SIGKILL one edge node while it works on at least eight requests; every client counts its own failures."""
    digits = load_digits()
    features = file_types.extract_features(next(iter(FILES.values()))[0])
    victim = stage.mesh.addresses[VICTIM]["grpc"]
    async with (
        AsyncClient(stage.edge_addresses()) as client,
        DigitsThroughRouter(stage, digits.images[:1]) as router,
    ):

        async def ask_client() -> Answer:
            answer = await client.infer("digits", {"image": digits.images[:1]}, deadline_ms=1000)
            says = str(int(answer.outputs["probabilities"].argmax()))
            return Answer(model="digits", version=answer.version, served_by=answer.served_by, says=says)

        async def ask_slow() -> str:
            """The burst that is in flight on the victim: a model of about 10 ms."""
            try:
                await client.infer("magika", {"bytes": features}, deadline_ms=1000)
            except MeshError as error:
                return str(error)
            return ""

        async with (
            Traffic("nearcast", ask_client, rate_per_s=RATE_PER_S) as mine,
            Traffic("grpc.aio", router, rate_per_s=RATE_PER_S) as theirs,
        ):
            await asyncio.sleep(1.0)
            in_flight, burst = 0, set[asyncio.Task[str]]()
            deadline = time.monotonic() + 5.0
            while in_flight < IN_FLIGHT_MIN and time.monotonic() < deadline:
                burst |= {asyncio.create_task(ask_slow()) for _ in range(BURST)}
                await asyncio.sleep(0.005)
                in_flight = client.in_flight.get(victim, 0)
            killed_at = time.monotonic()
            stage.mesh.kill(VICTIM, signal.SIGKILL)
            outcomes = await asyncio.gather(*burst)
            await asyncio.sleep(1.0)
    lost = [error for error in outcomes if error]
    stage.check(
        f"{VICTIM} is killed with SIGKILL while requests are in flight on it",
        ok=in_flight >= IN_FLIGHT_MIN,
        detail=f"{in_flight} from our client alone",
    )
    for name, failures, total in (
        ("nearcast.client", [*(s.error for s in mine.failures), *lost], len(mine.samples) + len(outcomes)),
        ("grpc.aio through the router", [s.error for s in theirs.failures], len(theirs.samples)),
    ):
        stage.check(
            f"{name}: at most {FAILED_MAX} failures",
            ok=len(failures) <= FAILED_MAX,
            detail=f"{len(failures)} of {total}" + (f", first: {failures[0]}" if failures else ""),
        )
    after = mine.served_by(since=killed_at + 0.1)
    stage.check(
        "its traffic goes to the other node or the cloud",
        ok=bool(after) and VICTIM not in after,
        detail=", ".join(f"{node} {count}" for node, count in after.most_common()),
    )
    stage.observe(mine)
    stage.observe(theirs)
    began = time.monotonic()
    await stage.mesh.restart(VICTIM)
    await stage.until(lambda: stage.is_ready(VICTIM, "digits"), timeout_s=20.0, what=f"The return of {VICTIM}")
    stage.check(
        f"{VICTIM} comes back with its own identity and its models on disk",
        ok=True,
        detail=f"{time.monotonic() - began:.1f} s",
    )
