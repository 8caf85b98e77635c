"""Two tenants x two devices: what reaches another than it was for, how soon a revocation holds, what it costs the rest.

Mosquitto, the node's worker and paho as the devices. The check is checked: brokers without one of the rules that keep
devices apart must be found out.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar
from unittest.mock import patch

from benchmarks import isolation_house
from benchmarks.isolation_house import House, until
from benchmarks.isolation_player import files_of, is_greeted
from benchmarks.isolation_ways import CrossedError, leave, outlive_a_certificate, try_everything
from benchmarks.rows import Row
from edge_node.broker import process
from edge_node.broker.configuration import BrokerLimits, TlsListener, mosquitto_config
from edge_node.broker.provisioning import ProvisioningLimits

MUTANTS = ("acl_file", "use_username_as_clientid", "crlfile")
"""Lines of the brokers' configuration; without each of them something must be found."""
MUTANT_WAIT_S = 1.0
BRIEF_S = 3.0
"""The life of a certificate that ends during the run."""
TENANT = "acme"
R = TypeVar("R")


def run(*, quick: bool) -> list[Row]:
    """Measure."""
    rounds = 3 if quick else 20
    tally = asyncio.run(_in_house(try_everything))
    brief = replace(isolation_house.LIMITS, certificate_life_s=BRIEF_S)
    asyncio.run(_in_house(lambda house: outlive_a_certificate(house, tally, TENANT), brief))
    revocations = asyncio.run(_in_house(lambda house: _revoke(house, rounds)))
    connects_ms = asyncio.run(_in_house(lambda house: _connect(house, 10 * rounds)))
    missed = [mutant for mutant in MUTANTS if not _is_caught(mutant)]
    revoked_s, gap_s = zip(*revocations, strict=True)
    worst = f"worst of {rounds}"
    return [
        Row("isolation.ways", tally.ways, "ways", "to hear or to say what is another's, all tried"),
        Row("isolation.cross_deliveries", len(tally.crossed), "", "; ".join(tally.crossed)[:200]),
        Row("isolation.own_missing", len(tally.missing), "", "; ".join(tally.missing)[:200]),
        Row("isolation.mutants_caught", 1 - len(missed) / len(MUTANTS), "share", ", ".join(missed)),
        Row("isolation.revoked_s", max(revoked_s), "s", f"from the command until its session is gone, {worst}"),
        Row("isolation.gap_s", max(gap_s), "s", f"another device, from its cut until it could be back, {worst}"),
        Row("isolation.connect_ms", statistics.median(connects_ms), "ms", "TCP, TLS with two certificates, CONNACK"),
    ]


async def _in_house(measure: Callable[[House], Awaitable[R]], limits: ProvisioningLimits = isolation_house.LIMITS) -> R:
    with tempfile.TemporaryDirectory() as folder:
        async with House(Path(folder), limits) as house:
            return await measure(house)


async def _revoke(house: House, rounds: int) -> list[tuple[float, float]]:
    """Seconds until a revocation is done, and how long a device of the same tenant is without a broker for it."""
    broker, measured = house.brokers[TENANT], []
    files = files_of(house.identities[TENANT, "d1"])
    for number in range(rounds):
        name = f"passing-{number}"
        await house.invite(TENANT, name)
        bystander = await house.player(TENANT, "d1")
        began = time.monotonic()
        broker.authority.revoke(name)
        await until(bystander.lost.is_set)
        cut = time.monotonic()
        while not await asyncio.to_thread(is_greeted, files, broker.port):
            await asyncio.sleep(0.002)
        back = time.monotonic()
        await house.applied(TENANT)
        measured.append((time.monotonic() - began, back - cut))
        await leave(bystander)
    return measured


async def _connect(house: House, rounds: int) -> list[float]:
    files, port = files_of(house.identities[TENANT, "d1"]), house.brokers[TENANT].port

    def connect() -> float:
        began = time.perf_counter()
        if not is_greeted(files, port):
            raise RuntimeError("a device with a good certificate was not let in")
        return (time.perf_counter() - began) * 1e3

    return [await asyncio.to_thread(connect) for _ in range(rounds)]


def _is_caught(line: str) -> bool:
    """Whether a broker without this line is found out by what crosses."""

    def without(host: str, port: int, store: Path, limits: BrokerLimits, tls: TlsListener | None = None) -> str:
        text = mosquitto_config(host, port, store, limits, tls)
        return "".join(kept for kept in text.splitlines(keepends=True) if not kept.startswith(line))

    wait_s, isolation_house.WAIT_S = isolation_house.WAIT_S, MUTANT_WAIT_S
    try:
        with patch.object(process, "mosquitto_config", without):
            asyncio.run(_in_house(lambda house: try_everything(house, is_hasty=True)))
    except CrossedError:
        return True
    finally:
        isolation_house.WAIT_S = wait_s
    return False
