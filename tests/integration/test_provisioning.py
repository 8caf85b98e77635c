"""From a claim to a certificate, to a fresh one, to none: the device's side, the node's, and the commands between."""

from __future__ import annotations

import asyncio
import io
import json
import ssl
import time
from contextlib import asynccontextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace

import pytest
from cryptography import x509

from edge_node.broker.process import mosquitto_path
from edge_node.broker.provisioning import ProvisioningLimits
from edge_node.broker.tenant import tenant_folder
from edge_node.broker.tenant_broker import TenantBroker
from nearcast.cli import main
from nearcast.client.provisioning import device_url, identity_tls, join, keep_renewed, renew
from nearcast.errors import Code, MeshError
from nearcast.identity.device import DeviceIdentity
from nearcast.transport.mqtt.connection import Connection, ConnectionSettings
from nearcast.transport.mqtt.message import Message
from nearcast.transport.mqtt.provisioning import CertificateRequest, answer_topic, read_answer, request_message

pytestmark = pytest.mark.skipif(mosquitto_path() is None, reason="mosquitto is not installed")
LIMITS = ProvisioningLimits(watch_interval_s=0.02, restart_interval_s=0.0)
DAY_S = 86_400.0


class Shifted:
    """The machine's clock, moved."""

    def __init__(self, shift_s: float) -> None:
        self.shift_s = shift_s

    def wall(self) -> float:
        return time.time() + self.shift_s

    def monotonic(self) -> float:
        return time.monotonic()


@asynccontextmanager
async def tenant_broker(folder, *, limits=LIMITS, **options):
    broker = await TenantBroker.start(tenant_folder(folder, "acme"), tenant="acme", limits=limits, **options)
    try:
        async with asyncio.timeout(10):
            await broker.registrar.listening.wait()
        yield broker
    finally:
        await broker.stop()


async def until(condition, timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def connected(identity, port, received):
    settings = ConnectionSettings(host="127.0.0.1", port=port, client_id="x", tls=identity_tls(identity))
    connection = Connection(settings, on_message=received.append)
    await connection.open()
    try:
        yield connection
    finally:
        await connection.close()


def nearcast(*arguments, code=0):
    """Run `nearcast devices …`; returns what it prints."""
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said), pytest.raises(SystemExit) as ended:
        main(["devices", *map(str, arguments)])
    assert ended.value.code == code, said.getvalue()
    return said.getvalue()


async def refusal(awaited) -> Code:
    with pytest.raises(MeshError) as refused:
        await awaited
    return refused.value.code


async def test_a_claim_makes_as_many_devices_as_it_says_and_their_keys_never_leave_them(tmp_path):
    async with tenant_broker(tmp_path, limits=replace(LIMITS, question_burst=6)) as broker:
        claim = tmp_path / "claim"
        broker.authority.invite(claim, name="", kind="device", uses=2, life_s=600)
        first = await join(claim, tmp_path / "a", device="a")
        again = await join(claim, tmp_path / "a", device="a")  # as if the first answer had been lost
        assert device_url(first) == f"mqtts://127.0.0.1:{broker.port}/acme/a"
        assert first.key.read_bytes() == again.key.read_bytes()
        assert first.certificate.read_bytes() != (claim / "device.pem").read_bytes()
        assert first.key.stat().st_mode & 0o777 == 0o600
        assert await refusal(join(claim, tmp_path / "thief", device="a")) is Code.CONFLICT
        with pytest.raises(MeshError, match="leaves the name open"):
            await join(claim, tmp_path / "thief")
        with pytest.raises(MeshError, match="holds a claim"):
            device_url(DeviceIdentity.load(claim))
        await join(claim, tmp_path / "b", device="b")
        assert await refusal(join(claim, tmp_path / "c", device="c")) is Code.FORBIDDEN
        assert await refusal(join(claim, tmp_path / "c", device="c")) is Code.OVERLOADED  # at once, not after a silence
        fresh = await renew(tmp_path / "a")
        assert fresh.key.read_bytes() == first.key.read_bytes()
        nodes_own = [path for path in broker.authority.folder.rglob("*") if path.is_file()]
        assert not [path for path in nodes_own if first.key.read_bytes() in path.read_bytes()]


async def test_who_asks_too_often_is_told_so_and_nonsense_has_a_status(tmp_path):
    async with tenant_broker(tmp_path) as broker:
        invited = broker.authority.invite(tmp_path / "claim", name="a", kind="device", uses=1, life_s=600)
        heard: list[Message] = []
        async with connected(invited, broker.port, heard) as connection:
            await connection.subscribe(answer_topic("acme", invited.place.name))
            question = request_message("acme", invited.place.name, CertificateRequest(csr="no request", id="7"))
            for _ in range(LIMITS.question_burst + 2):
                connection.publish(question)
            await until(lambda: len(heard) == LIMITS.question_burst + 2)
        answers = [read_answer(message.payload) for message in heard]
        assert [answer.status for answer in answers] == [400] * LIMITS.question_burst + [429] * 2
        assert {message.correlation for message in heard} == {b"7"}
        assert {message.user["status"] for message in heard} == {"400", "429"}


async def test_a_device_renews_at_two_thirds_without_losing_what_waits_for_it(tmp_path):
    async with tenant_broker(tmp_path) as broker:
        broker.authority.invite(tmp_path / "claim", name="a", kind="device", uses=1, life_s=600)
        identity = await join(tmp_path / "claim", tmp_path / "a")
        settings = ConnectionSettings(
            host="127.0.0.1", port=broker.port, client_id="a", session_expiry_s=600, tls=identity_tls(identity)
        )
        away = Connection(settings, on_message=lambda _message: None)
        await away.open()
        await away.subscribe("nc/v1/acme/a/down/#")
        await away.close()
        node: list[Message] = []
        worker = Connection(
            ConnectionSettings(host="127.0.0.1", port=broker.port, client_id="w", tls=broker.tls),
            on_message=node.append,
        )
        await worker.open()
        worker.publish(Message(topic="nc/v1/acme/a/down/reply/x", payload=b"waits"))
        clock = Shifted(LIMITS.certificate_life_s * 0.6)
        renewed: list[DeviceIdentity] = []

        def note(fresh):
            renewed.append(fresh)
            clock.shift_s = 0.0

        before = identity.certificate.read_bytes()
        task = asyncio.create_task(keep_renewed(tmp_path / "a", clock=clock, on_renewed=note))
        await asyncio.sleep(0.05)
        task.cancel()
        assert renewed == []  # it is not due before two thirds
        clock.shift_s = LIMITS.certificate_life_s * 0.67
        task = asyncio.create_task(keep_renewed(tmp_path / "a", clock=clock, on_renewed=note))
        await until(lambda: renewed)
        assert identity.certificate.read_bytes() != before
        task.cancel()
        heard: list[Message] = []
        back = Connection(settings, on_message=heard.append)
        await back.open()
        assert back.session_present
        # Beside it may come the certificate once more: `down/#` overlaps with the topic of the exchange.
        await until(lambda: [message.payload for message in heard if "/reply/" in message.topic] == [b"waits"])
        await back.close()
        await worker.close()


async def test_the_node_renews_its_own_certificates_and_the_broker_shows_them(tmp_path):
    clock = Shifted(-5 * DAY_S)

    def shown():
        pem = ssl.get_server_certificate(("127.0.0.1", broker.port), ca_certs=str(broker.authority.ca))
        return x509.load_pem_x509_certificate(pem.encode())

    async with tenant_broker(tmp_path, clock=clock) as broker:
        first, worker = await asyncio.to_thread(shown), broker.tls.certificate.read_bytes()
        pid = broker.broker.pid
        clock.shift_s = 0.0
        await until(lambda: broker.broker.pid not in (0, pid))
        await until(broker.registrar.listening.is_set)
        second = await asyncio.to_thread(shown)
        assert second.serial_number != first.serial_number
        assert second.not_valid_after_utc > first.not_valid_after_utc
        assert broker.tls.certificate.read_bytes() != worker
        heard: list[Message] = []
        settings = ConnectionSettings(host="127.0.0.1", port=broker.port, client_id="w", tls=broker.tls)
        connection = Connection(settings, on_message=heard.append)
        await connection.open()
        await connection.close()


async def test_the_commands_lead_from_an_invitation_to_a_revocation(tmp_path):
    where = ("--tenant", "acme", "--set", f"data_dir={tmp_path}")
    async with tenant_broker(tmp_path) as broker:
        thread = asyncio.to_thread
        told = await thread(nearcast, "invite", "cam-1", "--output", tmp_path / "claim", *where)
        assert "nearcast devices join" in told
        told = await thread(nearcast, "join", tmp_path / "claim", tmp_path / "id")
        assert f"cam-1 of acme at mqtts://127.0.0.1:{broker.port}" in told
        assert "Not due yet." in await thread(nearcast, "renew", tmp_path / "id", "--if-due")
        renewed = json.loads(await thread(nearcast, "renew", tmp_path / "id", "--json"))
        assert (renewed["name"], renewed["tenant"]) == ("cam-1", "acme")
        assert renewed["renew_at"] < renewed["ends_at"]
        rows = json.loads(await thread(nearcast, "list", "--json", *where))["devices"]
        assert [(row["name"].partition("+")[0], row["state"]) for row in rows] == [
            ("claim", "used"),
            ("cam-1", "valid"),
        ]
        told = await thread(nearcast, "revoke", "cam-1", *where)
        assert "2 certificate(s) revoked; the broker refuses it now" in told
        told = await thread(nearcast, "renew", tmp_path / "id", code=69)
        assert "the broker says that our certificate was revoked" in told
        assert "holds a claim" in await thread(nearcast, "renew", tmp_path / "claim", code=64)
        assert "revoked" in await thread(nearcast, "list", *where)
        identity = DeviceIdentity.load(tmp_path / "id")
        settings = ConnectionSettings(host="127.0.0.1", port=broker.port, client_id="x", tls=identity_tls(identity))
        assert await refusal(Connection(settings, on_message=lambda _m: None).open()) is Code.UNAVAILABLE
    told = await asyncio.to_thread(nearcast, "invite", "cam-2", "--output", tmp_path / "claim2", "--json", *where)
    assert json.loads(told)["folder"] == str(tmp_path / "claim2")  # also while the node is down
    await asyncio.to_thread(nearcast, "join", tmp_path / "claim2", tmp_path / "id2", code=69)


async def test_what_was_revoked_while_the_node_was_down_holds_at_its_next_start(tmp_path):
    async with tenant_broker(tmp_path, host="0.0.0.0", names=("localhost",)) as broker:
        assert broker.authority.place.url == f"mqtts://localhost:{broker.port}"
        port = broker.port
        broker.authority.invite(tmp_path / "claim", name="a", kind="device", uses=1, life_s=600)
        identity = await join(tmp_path / "claim", tmp_path / "a")
    told = await asyncio.to_thread(nearcast, "revoke", "a", "--tenant", "acme", "--set", f"data_dir={tmp_path}")
    assert "next start" in told
    async with tenant_broker(tmp_path, port=port) as broker:
        settings = ConnectionSettings(host="127.0.0.1", port=port, client_id="x", tls=identity_tls(identity))
        assert await refusal(Connection(settings, on_message=lambda _m: None).open()) is Code.UNAVAILABLE
        assert broker.denied == {"a"}
        await until(lambda: broker.authority.registry.rights().unpurged == ())
