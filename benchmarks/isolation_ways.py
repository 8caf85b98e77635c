"""All ways by which a device could hear or say what belongs to another; what happens is judged by delivery.

Each part tries what must not work and beside it what must: silence alone would prove nothing.
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, field

import numpy as np

from benchmarks.isolation_house import DEVICES, PAIRS, READER, TENANTS, House, own, until
from benchmarks.isolation_player import Player, files_of, is_greeted
from nearcast.identity.device import DeviceIdentity

X = np.array([[1.0, 2.0]], dtype=np.float32).tobytes()
FORGED = b"forged"


class CrossedError(Exception):
    """Something reached another than it was for."""


@dataclass(slots=True)
class Tally:
    """What was tried and what came of it.

    Attributes:
        ways: how many ways to reach what belongs to another were tried.
        crossed: what reached somebody it was not for.
        missing: what did not reach the one that it was for, or was refused to its owner.
        is_hasty: give up at the first thing that crossed.
    """

    ways: int = 0
    crossed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    is_hasty: bool = False

    def forbid(self, happened: object, what: str) -> None:
        """Count a way; `happened` = it worked."""
        self.ways += 1
        if happened:
            self.crossed.append(f"{what}: {happened}")
            if self.is_hasty:
                raise CrossedError(self.crossed[-1])

    def require(self, happened: object, what: str) -> None:
        """Note what should have worked and did not."""
        if not happened:
            self.missing.append(what)


async def try_everything(house: House, *, is_hasty: bool = False) -> Tally:
    """All ways, in turn; the last one revokes devices.

    Raises:
        CrossedError: if `is_hasty`, at the first thing that crossed.
    """
    tally = Tally(is_hasty=is_hasty)
    await hear_and_forge(house, tally)
    await asyncio.gather(*(answer_and_die_elsewhere(house, tally, tenant) for tenant in TENANTS))
    await asyncio.gather(*(take_a_session(house, tally, tenant) for tenant in TENANTS))
    await use_another_tenant(house, tally)
    await misuse_a_claim(house, tally, "acme")
    tally.forbid(house.handler.executed, "a request that was not its device's was run")
    for tenant in TENANTS:
        await ask_without_rights(house, tally, tenant)
    await asyncio.gather(*(come_back_revoked(house, tally, tenant) for tenant in TENANTS))
    return tally


async def hear_and_forge(house: House, tally: Tally) -> None:
    """Publish, subscribe, retained messages and shared subscriptions: each device against each other."""
    everyone = {pair: await house.player(*pair) for pair in PAIRS}
    readers = {tenant: await house.player(tenant, READER, "#", own(tenant, "d1", "down/#")) for tenant in TENANTS}
    for pair, victim in itertools.permutations(PAIRS, 2):
        filters, topics = eavesdropping(*victim), forgeries(*victim)
        tally.ways += len(filters) + 2 * len(topics)
        await asyncio.to_thread(everyone[pair].subscribe, *filters)
        for topic in topics:
            await asyncio.to_thread(everyone[pair].say, topic, FORGED)
            await asyncio.to_thread(everyone[pair].say, topic, FORGED + b", retained", retain=True)
    meant = ("down/desired", "out/s", "down/last")
    for (tenant, device), player in everyone.items():
        await asyncio.to_thread(player.subscribe, own(tenant, device, "down/#"))
        await asyncio.to_thread(player.say, own(tenant, device, "out/s"), FORGED)  # events are the node's to say
        for rest in meant:
            house.say(tenant, device, rest, f"{rest} {tenant}/{device}".encode(), retain=rest == "down/desired")
    for (tenant, device), player in everyone.items():
        await _judge(tally, player, tenant, {f"{rest} {tenant}/{device}".encode() for rest in meant})
    for tenant, reader in readers.items():
        await _judge(tally, reader, tenant, {f"out/s {tenant}/{device}".encode() for device in DEVICES})
    await leave(*everyone.values(), *readers.values())


async def answer_and_die_elsewhere(house: House, tally: Tally, tenant: str) -> None:
    """Response Topics and wills that name another."""
    reader = await house.player(tenant, READER, "#")
    victim = await house.player(tenant, "d2", own(tenant, "d2", "down/#"), own(tenant, "d2", "state"))
    device = await house.player(tenant, "d1", own(tenant, "d1", "down/#"))
    elsewhere = ["down/reply/x", "state", "out/s"]
    for rest in elsewhere:
        topic = own(tenant, "d2", rest)
        await asyncio.to_thread(device.say, own(tenant, "d1", "up/infer/double"), X, response_topic=topic)
    await until(lambda: len(device.statuses) == len(elsewhere))
    tally.require(device.statuses == ["403"] * len(elsewhere), f"{tenant}/d1 is told that it may not")
    await leave(device)
    for rest in ("down/x", "state", "out/s"):
        dying = await house.player(tenant, "d1", will=(own(tenant, "d2", rest), FORGED))
        await asyncio.to_thread(dying.vanish)
    dying = await house.player(tenant, "d1", will=(own(tenant, "d1", "state"), b"gone"))
    await asyncio.to_thread(dying.vanish)
    tally.require(await until(lambda: b"gone" in reader.payloads), f"the will of {tenant}/d1")
    house.say(tenant, "d2", "down/r", b"for d2")
    tally.require(await until(lambda: b"for d2" in victim.payloads), f"{tenant}/d2")
    tally.ways += 2 * len(elsewhere)
    tally.forbid(_beyond(victim, tenant, {b"for d2", *RETAINED}), f"{tenant}/d2 heard")
    tally.forbid(FORGED in reader.payloads, f"{tenant}'s reader heard a forged will")
    await leave(victim, reader)


async def take_a_session(house: House, tally: Tally, tenant: str) -> None:
    """What waits for a device that is away, and a client identifier that is its own."""
    victim = await house.player(tenant, "d2", own(tenant, "d2", "down/#"), is_durable=True)
    await leave(victim)
    house.say(tenant, "d2", "down/r", b"waits for d2")
    filters = (own(tenant, "d2", "down/#"), own(tenant, "d1", "down/#"))
    thief = await house.player(tenant, "d1", *filters, client_id="d2", is_durable=True)
    tally.forbid(thief.session_present, f"{tenant}/d1 has the session of d2")
    house.say(tenant, "d1", "down/r", b"for d1")
    tally.require(await until(lambda: b"for d1" in thief.payloads), f"{tenant}/d1")
    tally.forbid(_beyond(thief, tenant, {b"for d1", *RETAINED}), f"{tenant}/d1 heard")
    victim = await house.player(tenant, "d2", client_id="d1", is_durable=True)
    tally.require(await until(lambda: b"waits for d2" in victim.payloads), f"what waited for {tenant}/d2")
    tally.forbid(thief.lost.is_set(), f"{tenant}/d2 pushed d1 out")
    await leave(victim, thief)


async def use_another_tenant(house: House, tally: Tally) -> None:
    """A certificate at the broker of another tenant, which knows a device of that name."""
    for tenant, stranger in itertools.permutations(TENANTS):
        for device in DEVICES:
            ca, certificate, key = files_of(house.identities[tenant, device])
            at_home, abroad = house.brokers[tenant].port, house.brokers[stranger].port
            greeted = await asyncio.to_thread(is_greeted, (ca, certificate, key), at_home)
            tally.require(greeted, f"{tenant}/{device} at its own broker")
            for trusted in (ca, house.brokers[stranger].authority.ca):  # the second: who would talk to anybody
                greeted = await asyncio.to_thread(is_greeted, (trusted, certificate, key), abroad)
                tally.forbid(greeted, f"{tenant}/{device} at the broker of {stranger}")
        greeted = await asyncio.to_thread(is_greeted, (house.brokers[stranger].authority.ca, None, None), abroad)
        tally.forbid(greeted, f"somebody without a certificate at the broker of {stranger}")


async def misuse_a_claim(house: House, tally: Tally, tenant: str) -> None:
    """A claim for anything but its question."""
    claim = house.folder / f"claim-{tenant}-open"
    house.brokers[tenant].authority.invite(claim, name="", kind="device", uses=1, life_s=600)
    invited = DeviceIdentity.load(claim)
    level = invited.place.name.replace("+", ".")
    reader = await house.player(tenant, READER, "#")
    player = await asyncio.to_thread(Player, files_of(invited), house.brokers[tenant].port)
    filters = ("#", own(tenant, "d1", "down/#"), own(tenant, level, "down/#"))
    await asyncio.to_thread(player.subscribe, *filters)
    for device, rest in itertools.product(("d1", level), ("up/infer/double", "state", "out/s", "down/certificate")):
        tally.ways += 1
        await asyncio.to_thread(player.say, own(tenant, device, rest), FORGED)
    house.say(tenant, "d1", "down/r", b"for d1")
    house.say(tenant, "d1", "out/s", b"event")
    await asyncio.to_thread(player.say, own(tenant, level, "up/certificate"), b"no question")
    answered = await until(lambda: set(player.statuses) == {"400"} and b"event" in reader.payloads)
    tally.require(answered, "the claim's answer")
    strangers = [topic for topic, _ in player.heard if topic != own(tenant, level, "down/certificate")]
    tally.forbid(strangers, "the claim heard")
    tally.forbid([payload for payload in reader.payloads if payload.startswith(FORGED)], "the reader heard a claim")
    await leave(player, reader)


async def ask_without_rights(house: House, tally: Tally, tenant: str) -> None:
    """A device that loses its rights while its request runs, and asks again before it is cut."""
    players = {device: await house.player(tenant, device, own(tenant, device, "down/reply/#")) for device in DEVICES}
    before, house.handler.delay_s = house.handler.executed, 0.05

    async def ask(device: str) -> None:
        topic, reply = own(tenant, device, "up/infer/double"), own(tenant, device, "down/reply/x")
        await asyncio.to_thread(players[device].say, topic, X, response_topic=reply)

    await ask("d1")
    await until(lambda: house.handler.executed == before + 1)
    house.workers[tenant].deny(frozenset({"d1"}))
    await ask("d1")
    await ask("d2")
    tally.require(await until(lambda: players["d2"].statuses == ["200"]), f"the answer to {tenant}/d2")
    tally.forbid(players["d1"].heard, f"{tenant}/d1 heard without rights")
    tally.forbid(house.handler.executed != before + 2, f"{tenant}/d1 asked without rights")
    house.workers[tenant].deny(frozenset())
    await leave(*players.values())


async def outlive_a_certificate(house: House, tally: Tally, tenant: str) -> None:
    """A device that stays connected beyond the life of its certificate, in a house where that is short."""
    await house.invite(tenant, "brief")
    house.identities[tenant, "brief"] = DeviceIdentity.load(house.folder / f"identity-{tenant}-brief")
    device = await house.player(tenant, "brief", own(tenant, "brief", "down/#"), is_durable=True)
    tally.require(not device.refused, f"{tenant}/brief is let in")
    tally.forbid(not await until(device.lost.is_set), f"{tenant}/brief stays without a certificate that holds")
    house.say(tenant, "brief", "down/r", b"too late")
    back = await house.player(tenant, "brief", is_durable=True)
    tally.forbid(back.heard or not back.refused, f"{tenant}/brief comes back without a certificate that holds")
    await leave(device, back)


async def come_back_revoked(house: House, tally: Tally, tenant: str) -> None:
    """A device that is revoked while it is away, the next one of its name, and one that is revoked while it is here."""
    broker = house.brokers[tenant]
    old = await house.player(tenant, "d2", own(tenant, "d2", "down/#"), is_durable=True)
    await asyncio.to_thread(old.say, own(tenant, "d2", "state"), b"online", retain=True)
    await leave(old)
    for number in range(5):
        house.say(tenant, "d2", "down/r", b"secret %d" % number)
    live = await house.player(tenant, "d1", own(tenant, "d1", "down/#"), is_durable=True)
    broker.authority.revoke("d2")
    await house.applied(tenant)
    back = await house.player(tenant, "d2", is_durable=True)
    tally.forbid(not back.refused, f"{tenant}/d2 came back")
    tally.forbid(back.heard, f"{tenant}/d2 heard after its revocation")
    await leave(back)
    await until(live.lost.is_set)
    live = await house.player(tenant, "d1", is_durable=True)
    tally.require(live.session_present, f"the session of {tenant}/d1 outlives the restart")

    house.identities[tenant, "d2"] = await house.invite(tenant, "d2", label="d2-again")
    new = await house.player(tenant, "d2", is_durable=True)
    tally.forbid(new.session_present, f"the new {tenant}/d2 has the session of the old one")
    await asyncio.to_thread(new.subscribe, own(tenant, "d2", "down/#"), own(tenant, "d2", "state"))
    house.say(tenant, "d2", "down/r", b"for the new one")
    tally.require(await until(lambda: b"for the new one" in new.payloads), f"the new {tenant}/d2")
    meant = {b"for the new one", f"down/desired {tenant}/d2".encode()}  # wishes are for whoever has the name
    tally.forbid(_beyond(new, tenant, meant), f"the new {tenant}/d2 heard")
    broker.authority.revoke("d1")
    tally.forbid(not await until(live.lost.is_set), f"{tenant}/d1 stayed connected")
    await house.applied(tenant)
    await leave(new, live)


RETAINED = frozenset(f"down/desired {tenant}/{device}".encode() for tenant, device in PAIRS)
"""What the first part left at the brokers. Who hears that of another has been found there."""


def eavesdropping(tenant: str, other: str) -> list[str]:
    """Filters by which a device could try to hear another."""
    down = own(tenant, other, "down/#")
    parts = [own(tenant, other, each) for each in ("up/#", "state", "out/#")]
    shares = [f"$share/g/{down}", "$share/h/#"]
    return ["#", "+/+/+/+/down/#", "nc/v1/#", "$SYS/#", own(tenant, "node", "#"), down, *parts, *shares]


def forgeries(tenant: str, other: str) -> list[str]:
    """Topics by which a device could try to speak to another, or as another."""
    rest = ["down/reply/x", "down/desired", "up/infer/double", "up/data/s", "out/s", "state", "up/certificate"]
    return [*(own(tenant, other, each) for each in rest), own(tenant, "node", "n1/state"), own(tenant, "dlq", "n1")]


async def leave(*players: Player) -> None:
    """Disconnect."""
    await asyncio.gather(*(asyncio.to_thread(player.leave) for player in players))


async def _judge(tally: Tally, player: Player, tenant: str, meant: set[bytes]) -> None:
    """Hear everything that is meant for a player, and nothing else."""
    tally.require(await until(lambda: meant <= set(player.payloads)), f"{meant} in {tenant}")
    tally.forbid(_beyond(player, tenant, meant), f"who hears {meant} in {tenant} heard")


def _beyond(player: Player, tenant: str, meant: set[bytes]) -> list[tuple[str, bytes]]:
    """What it heard beside what is meant for it and the presence of the node."""
    presence = own(tenant, "node", "n1/state")
    return [
        (topic, said) for topic, said in player.heard if said not in meant and (topic != presence or said == FORGED)
    ]
