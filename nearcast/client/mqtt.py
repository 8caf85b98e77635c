"""The client for devices: ask and stream over MQTT 5, through outages of the link, the broker and the node.

```python
async with MqttDevice("mqtt://10.0.0.5:1883/local/camera-1") as device:
    answer = await device.infer("digits", {"image": image}, deadline_ms=500)
    await device.send("vibration", window)
```

The rules that it follows stand in `mqtt_outbox.py`, the topics and properties in `docs/mqtt.md`.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from random import Random
from typing import Any, Self, TypeAlias

import msgspec

from nearcast.client.answer import Answer
from nearcast.client.mqtt_limits import DeviceLimits
from nearcast.client.mqtt_link import DeviceLink
from nearcast.client.mqtt_outbox import End, Outbox, Send
from nearcast.client.mqtt_shadow import Shadow
from nearcast.client.trace import current_trace
from nearcast.clock import SYSTEM_CLOCK, Clock
from nearcast.errors import Code, MeshError
from nearcast.handler import Parameter, Tensors
from nearcast.telemetry import get_logger
from nearcast.transport.mqtt import topics
from nearcast.transport.mqtt.connection import Connection, ConnectionSettings, parse_url
from nearcast.transport.mqtt.content_types import JSON, PROTOBUF
from nearcast.transport.mqtt.message import Message
from nearcast.transport.mqtt.payload import decode_reply, encode_request
from nearcast.transport.mqtt.tls import TlsFiles
from nearcast.wire.request import TensorRequest
from nearcast.wire.status import TRACE

DEADLINE_MS = 30_000.0
_log = get_logger("nearcast.device")

Apply = Callable[[dict[str, Any]], dict[str, Any]]
"""Takes the settings that are wished for and returns all that the device has now; raises MeshError to refuse."""
_Waiter: TypeAlias = asyncio.Future[Message | None]


class MqttDevice:
    """One device on one broker. Lives on one event loop; connects in the background, and again after each loss.

    Args:
        url: `mqtt://host:port/tenant/device`, or `mqtts://…` for TLS.
        tls: the device's certificate, and whom to trust; None with `mqtts` = the machine's authorities, no certificate.
        apply: called with the settings that somebody wishes, see `Apply`; None = there are none to be set.
        client_id: stable, because the broker keeps replies under it while the device is away.
        replies: last level of the reply topic; two programs of one device need two.
        announce: whether others see on the topic `state` that the device is there.
        limits: bounds.
        clock: its monotonic time must be the loop's.

    Raises:
        MeshError: INVALID_REQUEST for a URL that names no device.
    """

    def __init__(
        self,
        url: str,
        *,
        tls: TlsFiles | None = None,
        apply: Apply | None = None,
        client_id: str = "",
        replies: str = "device",
        announce: bool = True,
        limits: DeviceLimits | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        host, port, path = parse_url(url)
        self.tenant, _, self.device = path.partition("/")
        if not self.device:
            raise MeshError(Code.INVALID_REQUEST, f"{url!r} names no device; write mqtt://host:port/tenant/device.")
        self._state_topic = topics.device_state_topic(self.tenant, self.device)
        self._reply_topic = topics.reply_topic(self.tenant, self.device, topics.require_id(replies, "reply topic"))
        self._desired_topic = topics.device_desired_topic(self.tenant, self.device)
        self._apply = apply
        self._shadow = Shadow()
        self._limits = limits or DeviceLimits()
        self._now = clock.monotonic
        generator = Random()  # a seed of its own: devices that lost the same broker must not come back together
        self._outbox = Outbox(self._limits, generator)
        self._waiting: dict[bytes, _Waiter] = {}
        self._boot_id = secrets.token_hex(8)
        self._last_seq: dict[str, int] = {}
        self._announce = announce
        self._connection: Connection | None = None
        self._on_the_way: dict[int, bytes] = {}
        self._alarm: asyncio.TimerHandle | None = None
        self._life: asyncio.Task[None] | None = None
        settings = ConnectionSettings(
            host=host,
            port=port,
            client_id=client_id or f"{self.tenant}-{self.device}",
            session_expiry_s=self._limits.session_expiry_s,
            will=self._presence("offline") if announce else None,
            will_delay_s=self._limits.will_delay_s,
            tls=tls or (TlsFiles() if url.startswith("mqtts:") else None),
        )
        self.link = DeviceLink(
            settings,
            {self._reply_topic: False} | ({} if apply is None else {self._desired_topic: True}),
            limits=self._limits.reconnect,
            generator=generator,
            on_up=self._go_on,
            on_down=self._hold,
            on_message=self._receive,
            on_published=self._published,
        )

    async def __aenter__(self) -> Self:
        self._life = asyncio.get_running_loop().create_task(self.link.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def infer(
        self,
        model: str,
        inputs: Tensors,
        *,
        version: str = "",
        outputs: Sequence[str] = (),
        deadline_ms: float = DEADLINE_MS,
        content_type: str = PROTOBUF,
        key: bytes = b"",
        parameters: Mapping[str, Parameter] | None = None,
        user: Mapping[str, str] | None = None,
    ) -> Answer:
        """Ask a model and wait for its answer, however often the connection is lost meanwhile.

        Args:
            model: its name.
            inputs: arrays by name.
            version: a release or a semver; empty = what the node serves.
            outputs: those wanted; empty = all.
            deadline_ms: how long the answer is worth something.
            content_type: the format of the request, and of the answer if `user` names no other in `accept`.
            key: the same key makes it the same request, also after a restart of the device; empty = a new one.
            parameters: of the request.
            user: further user properties, such as `sequence-start`.

        Raises:
            MeshError: what the node answered; DEADLINE without an answer, UNAVAILABLE if there was no broker either;
                OVERLOADED if too many requests are open; FORBIDDEN if the broker refused the message.
        """
        began = self._now()
        request = TensorRequest(model=model, inputs=inputs, outputs=outputs, parameters=dict(parameters or {}))
        payload, described = encode_request(request, content_type)
        properties = {**(user or {}), **described}
        reply = await self.ask(
            model, payload, content_type, version=version, deadline_ms=deadline_ms, key=key, user=properties
        )
        response = decode_reply(reply.payload, reply.content_type or content_type, reply.user, model=model)
        served = response.served
        return Answer(
            outputs=response.decode(),
            served_by=served.node or reply.user.get("served-by", ""),
            tier=served.tier,
            version=served.version,
            latency_ms=(self._now() - began) * 1e3,
        )

    async def ask(
        self,
        model: str,
        payload: bytes,
        content_type: str,
        *,
        version: str = "",
        deadline_ms: float = DEADLINE_MS,
        key: bytes = b"",
        user: Mapping[str, str] | None = None,
    ) -> Message:
        """The same with a payload as it is, such as a JPEG; returns the reply as it is, whatever its status."""
        message = Message(
            topic=topics.request_topic(self.tenant, self.device, model, version),
            payload=payload,
            content_type=content_type,
            correlation=key or secrets.token_bytes(16),
            response_topic=self._reply_topic,
            user={**_tracing(), **(user or {})},
        )
        deadline = self._now() + deadline_ms / 1e3
        waiter = self._put(message.correlation, message, deadline, is_request=True)
        reply = await self._wait(message.correlation, waiter)
        assert reply is not None
        return reply

    async def send(
        self,
        stream: str,
        sample: bytes,
        content_type: str = "",
        *,
        expiry_ms: float = float("inf"),
        user: Mapping[str, str] | None = None,
    ) -> None:
        """Send one sample of a stream; returns once the broker has it. Samples arrive in the order of the calls.

        Args:
            stream: its name.
            sample: the payload.
            content_type: what it is; empty = one tensor as raw bytes, as the stream's model declares it.
            expiry_ms: after which the sample is worth nothing any more.
            user: further user properties, such as `dtype`, `shape` or `ts`.

        Raises:
            MeshError: DEADLINE or UNAVAILABLE if it expired here; OVERLOADED if too many wait already; FORBIDDEN if the
                broker refused it.
        """
        topic = topics.data_topic(self.tenant, self.device, stream)
        if stream not in self._last_seq and len(self._last_seq) >= self._limits.streams_max:
            raise MeshError(Code.OVERLOADED, f"A device may have at most {self._limits.streams_max} streams.")
        seq = self._last_seq.get(stream, 0) + 1
        properties = {**_tracing(), **(user or {}), "boot-id": self._boot_id, "seq": str(seq)}
        message = Message(topic=topic, payload=sample, content_type=content_type, user=properties)
        key = f"{stream}/{seq}".encode()
        waiter = self._put(key, message, self._now() + expiry_ms / 1e3, is_request=False)
        self._last_seq[stream] = seq  # only now: a sample that was refused here leaves no gap
        await self._wait(key, waiter)

    async def close(self) -> None:
        """Say goodbye. Who still waits gets CANCELLED."""
        if self._life is not None:
            self._life.cancel()
            await asyncio.gather(self._life, return_exceptions=True)
            self._life = None
            self._hold("The device was closed.")
        if self._alarm is not None:
            self._alarm.cancel()
        for key, waiter in list(self._waiting.items()):
            self._outbox.forget(key)
            if not waiter.done():
                waiter.set_exception(MeshError(Code.CANCELLED, "The device was closed.", sent=True))

    # -- the connection -----------------------------------------------------------------------------------------------

    def _go_on(self, connection: Connection) -> None:
        self._connection = connection
        self._on_the_way.clear()
        if self._announce:
            self._state(self._presence("online"))
        if self._shadow.version:
            self._report()
        self._do(self._outbox.online(self._now(), connection.publish_window))

    def _hold(self, trouble: str) -> None:
        self._connection = None
        self._outbox.offline(trouble)

    def _presence(self, state: str) -> Message:
        body = msgspec.json.encode({"state": state, "boot_id": self._boot_id})
        return Message(topic=self._state_topic, payload=body, retain=True, content_type=JSON)

    def _report(self) -> None:
        topic = topics.device_reported_topic(self.tenant, self.device)
        self._state(Message(topic=topic, payload=self._shadow.report(), retain=True, content_type=JSON))

    def _state(self, message: Message) -> None:
        """At QoS 0: a state is said again at the next connection, and needs no place in the broker's window."""
        if self._connection is not None:
            with contextlib.suppress(MeshError):
                self._connection.publish(msgspec.structs.replace(message, qos=0))

    # -- messages -----------------------------------------------------------------------------------------------------

    def _receive(self, message: Message) -> None:
        if message.topic == self._desired_topic:
            self._set(message.payload)
        else:
            self._do(self._outbox.replied(self._now(), message.correlation, message))

    def _published(self, mid: int, taken: bool) -> None:  # noqa: FBT001  # the connection's signature
        key = self._on_the_way.pop(mid, None)
        if key is not None:
            self._do(self._outbox.confirmed(self._now(), key, taken=taken))

    def _set(self, payload: bytes) -> None:
        assert self._apply is not None
        try:
            wish = self._shadow.read(payload)
        except MeshError as error:  # it has not even a version to be answered with
            _log.warning("wish_not_understood", error=error.message)
            return
        if wish is None:
            return
        try:
            self._shadow.has(self._apply(wish))
        except MeshError as error:
            self._shadow.problem = error.message
        except Exception:  # noqa: BLE001  # the program's own code, which must not end the connection
            _log.exception("wish_not_followed")
            self._shadow.problem = "The device failed on it; see its log."
        self._report()

    def _put(self, key: bytes, message: Message, deadline: float, *, is_request: bool) -> _Waiter:
        todo = self._outbox.put(self._now(), key, message, deadline=deadline, is_request=is_request)
        waiter = self._waiting[key] = asyncio.get_running_loop().create_future()
        self._do(todo)
        return waiter

    async def _wait(self, key: bytes, waiter: _Waiter) -> Message | None:
        try:
            return await waiter
        finally:
            del self._waiting[key]
            self._outbox.forget(key)

    def _do(self, instructions: Iterable[Send | End]) -> None:
        for each in instructions:
            if isinstance(each, Send):
                self._send(each)
            else:
                self._end(each)
        self._set_alarm()

    def _send(self, each: Send) -> None:
        if self._connection is None:
            return
        try:
            self._on_the_way[self._connection.publish(each.message)] = each.key
        except MeshError as error:
            if error.code is not Code.UNAVAILABLE:  # a lost connection: the next one sends it
                self._outbox.forget(each.key)
                self._end(End(key=each.key, error=error))

    def _end(self, each: End) -> None:
        waiter = self._waiting.get(each.key)
        if waiter is None or waiter.done():
            return
        if each.error is not None:
            waiter.set_exception(each.error)
        else:
            waiter.set_result(each.reply)

    def _set_alarm(self) -> None:
        at = self._outbox.wake_up_at
        if self._alarm is not None:
            if self._alarm.when() <= at and not self._alarm.cancelled():
                return
            self._alarm.cancel()
        self._alarm = None
        if at != float("inf"):
            self._alarm = asyncio.get_running_loop().call_at(at, self._ring)

    def _ring(self) -> None:
        self._alarm = None
        self._do(self._outbox.tick(self._now()))


def _tracing() -> dict[str, str]:
    trace = current_trace()
    return {TRACE: trace} if trace else {}
