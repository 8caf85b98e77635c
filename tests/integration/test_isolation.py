"""Two tenants with two devices each, of the same names: nothing of one is ever heard by another. Judged by delivery.

Each test also shows that what is meant for a device arrives: silence alone would prove nothing.
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np
import pytest

from edge_node.broker.process import mosquitto_path
from edge_node.broker.provisioning import ProvisioningLimits
from edge_node.broker.tenant_broker import TenantBroker
from edge_node.mqtt.limits import MqttLimits
from edge_node.mqtt.worker import MqttWorker
from nearcast.client.provisioning import join
from nearcast.identity.device import DeviceIdentity
from nearcast.transport.mqtt.message import Message


def _parts(name):
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


isolation = _parts("isolation_parts")
Doubler = _parts("mqtt_parts").Doubler
Player, files_of, is_greeted, until = isolation.Player, isolation.files_of, isolation.is_greeted, isolation.until
pytestmark = pytest.mark.skipif(mosquitto_path() is None, reason="mosquitto is not installed")

TENANTS, DEVICES = ("acme", "umbrella"), ("d1", "d2")
LIMITS = ProvisioningLimits(watch_interval_s=0.02, restart_interval_s=0.0, reuse_after_s=0.0, claims_max=8)
FAST = MqttLimits(reconnect_base_s=0.02, reconnect_max_s=0.1, will_delay_s=0)
X = np.array([[1.0, 2.0]], dtype=np.float32).tobytes()


class House:
    """Two tenants with their brokers and workers, and the identities of their devices."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.brokers: dict[str, TenantBroker] = {}
        self.workers: dict[str, MqttWorker] = {}
        self.identities: dict[tuple[str, str], DeviceIdentity] = {}
        self.handler = Doubler()

    async def open(self, stack: AsyncExitStack, tenants) -> None:
        for tenant in tenants:
            broker = await TenantBroker.start(self.folder / tenant, tenant=tenant, limits=LIMITS)
            stack.push_async_callback(broker.stop)
            self.brokers[tenant] = broker
            worker = MqttWorker(
                self.handler,
                self.handler,
                node="n1",
                host=broker.host,
                port=broker.port,
                inbox=self.folder / tenant / "inbox.sqlite",
                tenants=(tenant,),
                limits=FAST,
                tls=broker.tls,
            )
            self.workers[tenant] = worker
            broker.on_denied(worker.deny)
            await worker.start()
            stack.push_async_callback(worker.drain, 1.0)
            await broker.registrar.listening.wait()
            for device in DEVICES:
                self.identities[tenant, device] = await self.invite(tenant, device)
            self.identities[tenant, "dash"] = await self.invite(tenant, "dash", kind="reader")
        for tenant in tenants:
            await self.applied(tenant)

    async def invite(self, tenant: str, name: str, *, label: str = "", kind: str = "device") -> DeviceIdentity:
        claim = self.folder / f"claim-{tenant}-{label or name}"
        self.brokers[tenant].authority.invite(claim, name=name, kind=kind, uses=1, life_s=600)
        return await join(claim, self.folder / f"identity-{tenant}-{label or name}")

    def port(self, tenant: str) -> int:
        return self.brokers[tenant].port

    async def player(self, tenant: str, name: str, **options) -> Player:
        files = files_of(self.identities[tenant, name])
        return await asyncio.to_thread(lambda: Player(files, self.port(tenant), **options))

    def say(self, tenant: str, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Say something as the node's worker."""
        connection = self.workers[tenant]._epoch.connection
        connection.publish(Message(topic=topic, payload=payload, retain=retain))

    async def applied(self, tenant: str) -> None:
        """Until the broker knows what is in the register, and the worker is back."""
        registry = self.brokers[tenant].authority.registry
        revision = registry.revision()
        await until(lambda: registry.applied() >= revision)
        await until(lambda: self.workers[tenant].connected)


@pytest.fixture
async def house(tmp_path):
    async with AsyncExitStack() as stack:
        house = House(tmp_path)
        await house.open(stack, TENANTS)
        yield house


@pytest.fixture
async def single(tmp_path):
    async with AsyncExitStack() as stack:
        house = House(tmp_path)
        await house.open(stack, TENANTS[:1])
        yield house


def own(tenant, device, rest):
    return f"nc/v1/{tenant}/{device}/{rest}"


def eavesdropping(tenant, other):
    """Filters by which a device could try to hear another."""
    down = own(tenant, other, "down/#")
    parts = [own(tenant, other, each) for each in ("up/#", "state", "out/#")]
    shares = [f"$share/g/{down}", "$share/h/#"]
    return ["#", "+/+/+/+/down/#", "nc/v1/#", "$SYS/#", own(tenant, "node", "#"), down, *parts, *shares]


def forgeries(tenant, other):
    """Topics by which a device could try to speak to another, or as another."""
    rest = ["down/reply/x", "down/desired", "up/infer/double", "up/data/s", "out/s", "state", "up/certificate"]
    return [*(own(tenant, other, each) for each in rest), own(tenant, "node", "n1/state"), f"nc/v1/{tenant}/dlq/n1"]


PAIRS = tuple(itertools.product(TENANTS, DEVICES))


async def test_no_device_hears_or_forges_anything_of_another(house):
    ways = 0
    everyone = {pair: await house.player(*pair) for pair in PAIRS}
    readers = {tenant: await house.player(tenant, "dash") for tenant in TENANTS}
    for tenant, reader in readers.items():
        await asyncio.to_thread(reader.subscribe, "#", own(tenant, "d1", "down/#"))
    for pair, victim in itertools.permutations(PAIRS, 2):
        filters, topics = eavesdropping(*victim), forgeries(*victim)
        ways += len(filters) + 2 * len(topics)
        await asyncio.to_thread(everyone[pair].subscribe, *filters)
        for topic in topics:
            await asyncio.to_thread(everyone[pair].say, topic, b"forged")
            await asyncio.to_thread(everyone[pair].say, topic, b"forged and retained", retain=True)
    for (tenant, device), player in everyone.items():
        await asyncio.to_thread(player.subscribe, own(tenant, device, "down/#"))
        await asyncio.to_thread(player.say, own(tenant, device, "out/s"), b"forged event")
        for rest in ("down/desired", "out/s", "down/last"):
            house.say(
                tenant, own(tenant, device, rest), f"{rest} {tenant}/{device}".encode(), retain=rest == "down/desired"
            )
    for (tenant, device), player in everyone.items():
        mine = {f"{rest} {tenant}/{device}".encode() for rest in ("down/desired", "out/s", "down/last")}
        await until(lambda player=player, mine=mine: mine <= set(player.payloads))
    for (tenant, device), player in everyone.items():
        heard = {payload for topic, payload in player.heard if not topic.startswith(own(tenant, "node", ""))}
        assert {payload.split(b" ")[-1].decode() for payload in heard} == {f"{tenant}/{device}"}, player.heard
    for tenant, reader in readers.items():
        said = {payload for topic, payload in reader.heard if not topic.startswith(own(tenant, "node", ""))}
        assert said == {f"out/s {tenant}/{device}".encode() for device in DEVICES}, reader.heard
    assert house.handler.executed == []  # no forged request was run
    assert ways > 300
    for player in [*everyone.values(), *readers.values()]:
        await asyncio.to_thread(player.leave)


async def test_neither_response_topic_nor_will_reaches_another(single):
    tenant = "acme"
    reader, d2 = await single.player(tenant, "dash"), await single.player(tenant, "d2")
    await asyncio.to_thread(reader.subscribe, "#")
    await asyncio.to_thread(d2.subscribe, own(tenant, "d2", "down/#"), own(tenant, "d2", "state"))
    d1 = await single.player(tenant, "d1")
    await asyncio.to_thread(d1.subscribe, own(tenant, "d1", "down/#"))
    for topic in (own(tenant, "d2", "down/reply/x"), own(tenant, "d2", "state"), own("umbrella", "d1", "down/reply/x")):
        await asyncio.to_thread(d1.say, own(tenant, "d1", "up/infer/double"), X, response_topic=topic)
    await until(lambda: len(d1.heard) == 3)
    assert {topic for topic, _ in d1.heard} == {own(tenant, "d1", "down/reply/double")}
    assert d1.statuses == ["403"] * 3
    assert single.handler.executed == []
    await asyncio.to_thread(d1.leave)
    for topic in (own(tenant, "d2", "down/x"), own(tenant, "d2", "state"), own(tenant, "node", "n1/state")):
        dying = await single.player(tenant, "d1", will=(topic, b"forged will"))
        await asyncio.to_thread(dying.vanish)
    dying = await single.player(tenant, "d1", will=(own(tenant, "d1", "state"), b"gone"))
    await asyncio.to_thread(dying.vanish)
    await until(lambda: b"gone" in reader.payloads)
    single.say(tenant, own(tenant, "d2", "down/r"), b"for d2")
    await until(lambda: b"for d2" in d2.payloads)
    assert d2.payloads == [b"for d2"]
    assert b"forged will" not in reader.payloads
    for player in (d2, reader):
        await asyncio.to_thread(player.leave)


async def test_the_worker_neither_hears_nor_answers_who_has_no_rights_any_more(single):
    tenant, worker = "acme", single.workers["acme"]
    players = {device: await single.player(tenant, device) for device in DEVICES}
    for device, player in players.items():
        await asyncio.to_thread(player.subscribe, own(tenant, device, "down/#"))
    single.handler.delay_s = 0.05
    ask = {device: (own(tenant, device, "up/infer/double"), X) for device in DEVICES}
    reply = {device: own(tenant, device, "down/reply/x") for device in DEVICES}
    await asyncio.to_thread(players["d1"].say, *ask["d1"], response_topic=reply["d1"])
    worker.deny(frozenset({"d1"}))  # while its request runs
    await asyncio.to_thread(players["d1"].say, *ask["d1"], response_topic=reply["d1"])
    await asyncio.to_thread(players["d2"].say, *ask["d2"], response_topic=reply["d2"])
    await until(lambda: players["d2"].statuses == ["200"])
    assert len(single.handler.executed) == 2
    assert players["d1"].heard == []
    for player in players.values():
        await asyncio.to_thread(player.leave)


async def test_no_client_identifier_gives_the_session_of_another(single):
    tenant = "acme"
    d2 = await single.player(tenant, "d2", session_s=600, clean=False)
    await asyncio.to_thread(d2.subscribe, own(tenant, "d2", "down/#"))
    await asyncio.to_thread(d2.leave)
    single.say(tenant, own(tenant, "d2", "down/r"), b"waits for d2")
    thief = await single.player(tenant, "d1", client_id="d2", clean=False, session_s=600)
    assert not thief.session_present
    await asyncio.to_thread(thief.subscribe, own(tenant, "d2", "down/#"), own(tenant, "d1", "down/#"))
    single.say(tenant, own(tenant, "d1", "down/r"), b"for d1")
    await until(lambda: b"for d1" in thief.payloads)
    d2 = await single.player(tenant, "d2", client_id="d1", session_s=600, clean=False)
    assert d2.session_present
    await until(lambda: d2.payloads == [b"waits for d2"])
    assert thief.payloads == [b"for d1"]
    assert not thief.lost.is_set()
    for player in (d2, thief):
        await asyncio.to_thread(player.leave)


async def test_a_certificate_is_worth_nothing_at_another_tenant_and_a_claim_nothing_but_a_question(house):
    for tenant, stranger in itertools.permutations(TENANTS):
        for device in DEVICES:
            ca, *own_files = files_of(house.identities[tenant, device])
            assert await asyncio.to_thread(is_greeted, (ca, *own_files), house.port(tenant))
            for trusted in (ca, house.brokers[stranger].authority.ca):  # the second: who would talk to anybody
                assert not await asyncio.to_thread(is_greeted, (trusted, *own_files), house.port(stranger))
    claim = house.folder / "claim-open"
    house.brokers["acme"].authority.invite(claim, name="", kind="device", uses=1, life_s=600)
    invited = DeviceIdentity.load(claim)
    level = invited.place.name.replace("+", ".")
    reader, player = (
        await house.player("acme", "dash"),
        await asyncio.to_thread(Player, files_of(invited), house.port("acme")),
    )
    await asyncio.to_thread(reader.subscribe, "#")
    await asyncio.to_thread(player.subscribe, "#", own("acme", "d1", "down/#"), own("acme", level, "down/#"))
    for device, rest in itertools.product(("d1", level), ("up/infer/double", "state", "out/s", "down/certificate")):
        await asyncio.to_thread(player.say, own("acme", device, rest), b"forged")
    house.say("acme", own("acme", "d1", "down/r"), b"for d1")
    house.say("acme", own("acme", "d1", "out/s"), b"event")
    await asyncio.to_thread(player.say, own("acme", level, "up/certificate"), b"no question")
    await until(lambda: player.heard and b"event" in reader.payloads)
    assert {topic for topic, _ in player.heard} == {own("acme", level, "down/certificate")}
    assert b'"status":400' in player.payloads[0]
    assert b"forged" not in reader.payloads
    assert house.handler.executed == []
    for each in (player, reader):
        await asyncio.to_thread(each.leave)


async def test_who_is_revoked_while_away_is_gone_and_its_name_starts_anew(single):
    tenant, broker = "acme", single.brokers["acme"]
    old = await single.player(tenant, "d2", session_s=3600, clean=False)
    await asyncio.to_thread(old.subscribe, own(tenant, "d2", "down/#"))
    await asyncio.to_thread(old.say, own(tenant, "d2", "state"), b"online", retain=True)
    await asyncio.to_thread(old.leave)
    for number in range(5):
        single.say(tenant, own(tenant, "d2", "down/r"), b"secret %d" % number)
    live = await single.player(tenant, "d1", session_s=3600, clean=False)
    await asyncio.to_thread(live.subscribe, own(tenant, "d1", "down/#"))
    broker.authority.revoke("d2")
    await single.applied(tenant)
    assert broker.denied == {"d2"}
    back = await single.player(tenant, "d2", session_s=3600, clean=False)
    assert back.refused
    assert back.heard == []
    back.client.loop_stop()
    await until(live.lost.is_set)
    live = await single.player(tenant, "d1", session_s=3600, clean=False)
    assert live.session_present  # the others keep their sessions through the restart

    single.identities[tenant, "d2"] = await single.invite(tenant, "d2", label="d2-again")
    new = await single.player(tenant, "d2", session_s=3600, clean=False)
    assert not new.session_present
    await asyncio.to_thread(new.subscribe, own(tenant, "d2", "down/#"), own(tenant, "d2", "state"))
    single.say(tenant, own(tenant, "d2", "down/r"), b"for the new one")
    await until(lambda: new.payloads == [b"for the new one"])
    await until(lambda: broker.denied == frozenset())

    broker.authority.revoke("d1")  # and who is there is cut
    await until(live.lost.is_set)
    await single.applied(tenant)
    assert broker.denied == {"d1"}
    await asyncio.to_thread(new.leave)
