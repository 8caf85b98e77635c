"""The doctor and real faults: each broken thing fails its own line, and no other."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import ClassVar

import msgspec
import pytest
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from edge_node.broker import Broker, BrokerLimits
from edge_node.broker.process import mosquitto_path
from edge_node.broker.tenant import tenant_folder
from edge_node.broker.tenant_broker import TenantBroker
from edge_node.config import EdgeConfig
from edge_node.doctor.examine import examine
from edge_node.doctor.findings import DoctorLimits, Subject
from edge_node.doctor.nagle import measure_stalls
from edge_node.doctor.player import playing
from edge_node.doctor.subject import find_subject
from edge_node.mqtt.worker import MqttWorker
from nearcast.cli import main
from nearcast.clock import ManualClock
from nearcast.runtime import ExitCode
from nearcast.transport.mqtt.connection import Connection, ConnectionSettings
from nearcast.transport.mqtt.message import Message
from tests.integration.mqtt_parts import Doubler

FAST = DoctorLimits(answer_timeout_s=3.0, silence_s=0.6, autosave_margin_s=3.0, rounds=5)
CHECKS = ["clock", "certificates", "broker", "mqtt5", "nagle-here", "nagle-broker", "acl", "persistence", "node"]
WRITE_ONLY = "topic write nc/v1/#\ntopic read nc/v1/local/+/up/#\ntopic read nc/v1/local/node/n1/#\n"


class Changed(Broker):
    """The node's own broker with some lines of its configuration replaced."""

    settings: ClassVar[dict[str, str]] = {}

    def _mosquitto(self) -> list[str]:
        command = super()._mosquitto()
        path = self._folder / "mosquitto.conf"
        kept = [line for line in path.read_text().splitlines() if line.split()[0] not in self.settings]
        path.write_text("\n".join([f"{name} {value}" for name, value in self.settings.items()] + kept) + "\n")
        return command


@asynccontextmanager
async def mosquitto(folder: Path, **settings: str) -> AsyncIterator[Broker]:
    if mosquitto_path() is None:
        pytest.skip("mosquitto is not installed")
    kind = type("Changed", (Changed,), {"settings": settings})
    broker = await kind.start(folder, kind="mosquitto", limits=BrokerLimits(autosave_interval_s=1))
    try:
        yield broker
    finally:
        await broker.stop()


@asynccontextmanager
async def answering(broker: Broker, folder: Path) -> AsyncIterator[None]:
    worker = MqttWorker(Doubler(), Doubler(), node="n1", host=broker.host, port=broker.port, inbox=folder / "i.sqlite")
    await worker.start()
    try:
        await worker.wait_connected()
        yield
    finally:
        await worker.drain(1.0)


@asynccontextmanager
async def only_311(broker: Broker) -> AsyncIterator[int]:
    """A door in front of a real broker that turns MQTT 5 away, as a broker of 3.1.1 does (3.1.1, 3.2.2.3)."""

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            writer.write(data)
        writer.close()

    async def admit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = await reader.read(4096)
        if first[8:9] != b"\x04":
            writer.write(b"\x20\x02\x00\x01" if first else b"")
            writer.close()
            return
        inner_reader, inner_writer = await asyncio.open_connection(broker.host, broker.port)
        inner_writer.write(first)
        await asyncio.gather(pass_on(reader, inner_writer), pass_on(inner_reader, writer))

    server = await asyncio.start_server(admit, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


def subject_of(port: int, name: str, folder: Path | None = None) -> Subject:
    config = None if folder is None else folder / "mosquitto.conf"
    return Subject(
        host="127.0.0.1",
        port=port,
        device=f"doctor-{name}",
        node="n1",
        broker_config=config,
        data_dir=Path("/nonexistent"),
    )


async def failing(subject: Subject, *, limits: DoctorLimits = FAST, **options) -> set[str]:
    """The checks that fail."""
    found = await examine(subject, limits=limits, **options)
    assert sorted(finding.check for finding in found) == sorted(CHECKS), "each check has one line"
    print(*found, sep="\n")
    return {finding.check for finding in found if finding.status == "fail"}


def write_expired(folder: Path) -> None:
    """An identity whose certificate ended yesterday."""
    key, now = ec.generate_private_key(ec.SECP256R1()), dt.datetime.now(dt.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "n1")])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=8))
        .not_valid_after(now - dt.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    folder.mkdir(parents=True)
    (folder / "node.pem").write_bytes(made.public_bytes(Encoding.PEM))


async def test_every_broken_thing_fails_its_own_line(tmp_path):
    (tmp_path / "acl").write_text(WRITE_ONLY)
    write_expired(tmp_path / "data" / "identity")
    tenant = asyncio.create_task(with_certificates(tmp_path))
    async with (
        mosquitto(tmp_path / "sound") as sound,
        mosquitto(tmp_path / "nagle", set_tcp_nodelay="false") as nagle,
        mosquitto(tmp_path / "acl-broker", acl_file=str(tmp_path / "acl")) as deaf,
        mosquitto(tmp_path / "forgetful", persistence="false") as forgetful,
        mosquitto(tmp_path / "liar", persistence="false") as liar,
        mosquitto(tmp_path / "alone") as alone,
        only_311(alone) as old_port,
        answering(sound, tmp_path),
    ):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            free = taken.getsockname()[1]
        (tmp_path / "liar" / "mosquitto.conf").write_text((tmp_path / "sound" / "mosquitto.conf").read_text())
        hasty = msgspec.structs.replace(FAST, autosave_margin_s=0.2)
        well = subject_of(sound.port, "a", folder=tmp_path / "sound")
        told = await asyncio.gather(
            failing(well),
            failing(msgspec.structs.replace(well, device="doctor-b"), clock=ManualClock(wall=1_000.0)),
            failing(msgspec.structs.replace(well, device="doctor-c", data_dir=tmp_path / "data")),
            failing(subject_of(nagle.port, "d", folder=tmp_path / "nagle")),
            failing(subject_of(deaf.port, "e", folder=tmp_path / "acl-broker")),
            failing(subject_of(forgetful.port, "f", folder=tmp_path / "forgetful")),
            failing(subject_of(liar.port, "g", folder=tmp_path / "liar"), limits=hasty),
            failing(subject_of(old_port, "h")),
            failing(subject_of(free, "i")),
            says_online_and_is_silent(alone),
            tenant,
        )
    assert told == [
        set(),
        {"clock"},
        {"certificates"},
        {"nagle-broker"},
        {"acl"},
        {"persistence"},
        {"persistence"},
        {"mqtt5"},
        {"broker"},
        {"node"},
        {"acl"},
    ]


async def says_online_and_is_silent(broker: Broker) -> set[str]:
    settings = ConnectionSettings(host=broker.host, port=broker.port, client_id="pretender")
    pretender = Connection(settings, on_message=lambda _: None)
    await pretender.open()
    pretender.publish(Message(topic="nc/v1/local/node/n1/state", payload=b'{"state":"online"}', retain=True))
    try:
        return await failing(subject_of(broker.port, "j"), limits=msgspec.structs.replace(FAST, answer_timeout_s=1.5))
    finally:
        await pretender.close()


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def with_certificates(folder: Path) -> set[str]:
    """A tenant's broker is sound, and then lets devices hear everything."""
    place = tenant_folder(folder, "acme")
    tenant = await TenantBroker.start(place, tenant="acme", broker_limits=BrokerLimits(autosave_interval_s=1))
    try:
        subject = find_subject(EdgeConfig(name="n1", data_dir=str(folder)), tenant="acme")
        assert subject.broker_config == place / "broker" / "mosquitto.conf"
        subject = msgspec.structs.replace(subject, broker_config=None)  # the other brokers show what saving means
        assert await failing(subject) == set()
        access = place / "access"
        access.write_text(access.read_text() + "\npattern read nc/v1/acme/#\n")
        before = tenant.broker.pid
        await tenant.broker.stop()  # its keeper starts it again, with the changed file
        while tenant.broker.pid in (0, before) or not is_listening(subject.port):
            await asyncio.sleep(0.02)
        return await failing(subject)
    finally:
        await tenant.stop()


async def test_nagle_on_our_own_side_is_told_from_that_of_the_broker(tmp_path):
    async with (
        mosquitto(tmp_path / "sound") as sound,
        playing(subject_of(sound.port, "k"), "device", None, FAST) as player,
    ):
        transport = player.connection._transport
        assert transport is not None
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)
        here, there = await measure_stalls(player, "nc/v1/local/doctor-k/state", FAST)
    assert (here.status, there.status) == ("fail", "ok"), (here, there)


def test_the_command_prints_each_line_and_a_numbered_exit(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    arguments = ["doctor", "--set", f"data_dir={tmp_path}", "--url", f"mqtt://127.0.0.1:{port}/local"]
    for more in ([], ["--json"]):
        result = CliRunner().invoke(main, [*arguments, *more])
        assert result.exit_code == ExitCode.UNAVAILABLE, result.output
    findings = json.loads(result.output)["findings"]
    assert [one["check"] for one in findings if one["status"] == "fail"] == ["broker"]
    assert all(one["status"] == "skip" for one in findings if one["check"] in ("acl", "persistence", "node"))


def test_the_own_brokers_address_is_read_from_its_configuration(tmp_path):
    result = CliRunner().invoke(main, ["doctor", "--set", f"data_dir={tmp_path}", "--set", "mqtt.broker=spawn"])
    assert result.exit_code == ExitCode.USAGE
    assert "has the node ever run" in result.output
