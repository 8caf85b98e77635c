"""Whether what is said is heard. A broker grants subscriptions that it never delivers to, so only delivery counts."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from contextlib import AsyncExitStack

import msgspec

from edge_node.doctor.findings import DoctorLimits, Finding, Subject
from edge_node.doctor.player import Player, playing
from nearcast.errors import MeshError
from nearcast.transport.mqtt import topics
from nearcast.transport.mqtt.message import Message

UNKNOWN_MODEL = "nearcast-doctor"
"""A node answers 404 to it: that is an answer."""
_ACL_ADVICE = "Compare the broker's access rules with the topics of nc/v1; the node's own brokers have the right ones."


class Conversation:
    """Both sides of the broker, as far as we may play them.

    Args:
        subject: what is examined.
        device: a device.
        node: something of the node's; None = we have no certificate for it.
    """

    def __init__(self, subject: Subject, device: Player, node: Player | None, limits: DoctorLimits) -> None:
        self._subject = subject
        self._device = device
        self._node = node
        self._limits = limits

    async def find_access(self) -> Finding:
        """Send something along each way that a device and a node use, and see it arrive."""
        subject, device, node = self._subject, self._device, self._node
        own_state = topics.device_state_topic(subject.tenant, subject.device)
        ways = [self._arrives(device, own_state, device)]
        if node is not None:
            ways.append(self._arrives(node, self.node_topic, device))
        if node is not None and subject.device_tls is None:
            ways += [
                self._arrives(device, topics.request_topic(subject.tenant, subject.device, UNKNOWN_MODEL), node),
                self._arrives(node, topics.reply_topic(subject.tenant, subject.device, "doctor"), device),
            ]
        troubles = [trouble for trouble in await asyncio.gather(*ways) if trouble]
        if subject.device_tls is not None and node is not None:
            troubles += await self._overheard(node, device)
        if troubles:
            return Finding(check="acl", status="fail", detail="; ".join(troubles), advice=_ACL_ADVICE)
        if node is None:
            detail = "a device hears what it may; without a certificate of the node's the other ways are not tried"
            return Finding(check="acl", status="warn", detail=detail)
        return Finding(check="acl", status="ok", detail=f"all {len(ways)} ways deliver")

    async def find_node(self) -> Finding:
        """Whether the node says that it is there, and then answers."""
        subject, limits = self._subject, self._limits
        state = await self._state(topics.node_topic(subject.tenant, subject.node, "state"))
        if state is None:
            detail = f"no node {subject.node} has said anything on this broker"
            return Finding(check="node", status="warn", detail=detail, advice="Start it: nearcast edge.")
        if state != "online":
            return Finding(check="node", status="fail", detail=f"{subject.node} is {state}", advice="Start it.")
        clock = asyncio.get_running_loop().time
        correlation = secrets.token_bytes(16)
        reply = topics.reply_topic(subject.tenant, subject.device, "doctor")
        await self._device.connection.subscribe(reply)
        topic = topics.request_topic(subject.tenant, subject.device, UNKNOWN_MODEL)
        asked = Message(
            topic=topic,
            content_type="application/octet-stream",
            correlation=correlation,
            response_topic=reply,
            user={"ttl-ms": f"{1e3 * limits.answer_timeout_s:g}"},
        )
        began = clock()
        self._device.connection.publish(asked)
        answer = await self._device.hears(
            lambda message: message.topic == reply and message.correlation == correlation, limits.answer_timeout_s
        )
        if answer is None:
            detail = f"{subject.node} says that it is online and answers nothing within {limits.answer_timeout_s:g} s"
            return Finding(check="node", status="fail", detail=detail, advice="Read the node's log.")
        status, took_ms = answer.user.get("status", "?"), 1e3 * (clock() - began)
        return Finding(check="node", status="ok", detail=f"{subject.node} answers {status} in {took_ms:.1f} ms")

    @property
    def node_topic(self) -> str:
        """Where a node may write and a device may read."""
        return topics.node_topic(self._subject.tenant, f"doctor-{self._subject.device}"[:64], "state")

    async def _state(self, topic: str) -> str | None:
        try:
            await self._device.connection.subscribe(topic, retained=True)
        except MeshError:
            return None
        found = await self._device.hears(lambda message: message.topic == topic, self._limits.silence_s)
        if found is None:
            return None
        try:
            return str(msgspec.json.decode(found.payload)["state"])
        except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError):
            return None

    async def _arrives(self, sender: Player, topic: str, receiver: Player) -> str:
        """Send a message; returns "" once it is there, else what went wrong."""
        correlation = secrets.token_bytes(16)
        try:
            await receiver.connection.subscribe(topic)
            taken = await sender.confirmed(Message(topic=topic, correlation=correlation))
        except (MeshError, TimeoutError) as error:
            return f"{topic}: {error}"
        if await _hears(receiver, correlation, self._limits.silence_s):
            return ""
        return f"{topic}: granted, but nothing is delivered" if taken else f"{topic}: the broker refuses what we say"

    async def _overheard(self, node: Player, device: Player) -> Sequence[str]:
        """What a device hears of another one's."""
        foreign = topics.node_topic(self._subject.tenant, f"doctor-{self._subject.device}"[:64], "desired")
        correlation = secrets.token_bytes(16)
        try:
            await device.connection.subscribe(foreign)
            await node.confirmed(Message(topic=foreign, correlation=correlation))
        except (MeshError, TimeoutError):
            return []  # refused: so much the better
        heard = await _hears(device, correlation, self._limits.silence_s)
        return [f"{foreign}: a device hears what is the node's"] if heard else []


async def find_deliveries(subject: Subject, limits: DoctorLimits) -> list[Finding]:
    """Whether messages arrive, and whether a running node answers.

    Raises:
        MeshError: UNAVAILABLE if the broker does not let us in.
    """
    async with AsyncExitStack() as stack:
        device = await stack.enter_async_context(playing(subject, "device", subject.device_tls, limits))
        node = None
        if subject.plays_node:
            node = await stack.enter_async_context(playing(subject, "node", subject.node_tls, limits))
        conversation = Conversation(subject, device, node, limits)
        return [await conversation.find_access(), await conversation.find_node()]


async def _hears(player: Player, correlation: bytes, timeout_s: float) -> bool:
    return await player.hears(lambda message: message.correlation == correlation, timeout_s) is not None
