"""The node's ear for certificate requests: one connection to the tenant's broker, one question at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from edge_node.broker.access import REGISTRAR
from edge_node.broker.provisioning import ProvisioningLimits, QuestionRate
from edge_node.broker.tenant import TenantAuthority
from nearcast.backoff import ReconnectLimits
from nearcast.clock import SYSTEM_CLOCK, Clock
from nearcast.errors import CATALOGUE, MeshError
from nearcast.telemetry import get_logger
from nearcast.transport.mqtt.connection import Connection, ConnectionSettings
from nearcast.transport.mqtt.message import Message
from nearcast.transport.mqtt.provisioning import (
    CertificateAnswer,
    answer_message,
    certificate_filter,
    read_request,
    requester,
)
from nearcast.transport.mqtt.reconnect import stay_connected
from nearcast.transport.mqtt.tls import TlsFiles

RECONNECT = ReconnectLimits(base_s=0.1, max_s=5.0)
OK = 200
_log = get_logger("nearcast.broker")


class Registrar:
    """Answers certificate requests. Its session ends with the connection: a device that hears nothing asks again.

    Args:
        authority: who grants.
        host, port: the tenant's broker.
        tls: the registrar's own certificate.
    """

    def __init__(
        self, authority: TenantAuthority, *, host: str, port: int, tls: TlsFiles, clock: Clock = SYSTEM_CLOCK
    ) -> None:
        self._authority = authority
        self._settings = ConnectionSettings(host=host, port=port, client_id=REGISTRAR, tls=tls)
        self._limits: ProvisioningLimits = authority.limits
        self._clock = clock
        self._rate = QuestionRate(authority.limits)
        self._connection: Connection | None = None
        self.listening = asyncio.Event()

    async def run(self) -> None:
        """Listen until cancelled."""
        await stay_connected(self._listen, name=f"registrar {self._authority.place.tenant}", limits=RECONNECT)

    def forget_presence(self, device: str) -> None:
        """Clear what a device without rights left for those who come later. Nothing happens without a connection."""
        prefix = f"nc/v1/{self._authority.place.tenant}/{device}/"
        if self._connection is not None:
            for topic in ("state", "up/reported"):
                self._connection.publish(Message(topic=f"{prefix}{topic}", retain=True))

    async def _listen(self, up: Callable[[], None]) -> None:
        waiting: asyncio.Queue[Message] = asyncio.Queue(self._limits.questions_waiting_max)
        lost = asyncio.Event()

        def receive(message: Message) -> None:
            connection.acknowledge(message)  # who gets no answer asks again
            if not waiting.full():
                waiting.put_nowait(message)

        connection = Connection(self._settings, on_message=receive, on_lost=lambda _reason: lost.set())
        try:
            await connection.open()
            await connection.subscribe(certificate_filter(self._authority.place.tenant))
            self._connection = connection
            self.listening.set()
            up()
            async with asyncio.TaskGroup() as group:
                answering = group.create_task(self._answer_all(connection, waiting))
                await lost.wait()
                answering.cancel()
        finally:
            self.listening.clear()
            self._connection = None
            await connection.close(flush_timeout_s=0.2)

    async def _answer_all(self, connection: Connection, waiting: asyncio.Queue[Message]) -> None:
        while True:
            asked = await waiting.get()
            name = requester(asked.topic)
            if not name:
                continue
            try:
                answer = await asyncio.to_thread(self._answer, name, asked)
                connection.publish(answer_message(self._authority.place.tenant, name, answer, asked))
            except Exception as error:  # noqa: BLE001  # one question must not end the registrar
                _log.warning("question_unanswered", asker=name, error=str(error))

    def _answer(self, name: str, asked: Message) -> CertificateAnswer:
        identifier = asked.correlation.decode(errors="replace")  # until the body has been read
        try:
            self._rate.require(name, self._clock.monotonic())
            request = read_request(asked.payload)
            identifier = request.id
            holder, certificate = self._authority.issue(name, request.device, request.csr.encode())
        except MeshError as error:
            _log.warning("certificate_refused", asker=name, code=error.code, reason=error.message)
            return CertificateAnswer(status=CATALOGUE[error.code].http, id=identifier, error=error.message)
        _log.info("certificate_issued", asker=name, name=holder)
        return CertificateAnswer(
            status=OK,
            id=identifier,
            name=holder,
            certificate=certificate.decode(),
            ca=self._authority.ca_pem.decode(),
        )
