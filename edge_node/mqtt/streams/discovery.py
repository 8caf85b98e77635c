"""Telling Home Assistant which streams there are, in its MQTT discovery format. Off unless configured.

Each stream with events becomes a sensor that shows the class names of the last event. The retained message expires, so
that a stream that is gone does not stay for ever.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

import msgspec

from edge_node.mqtt.ledger.records import Input
from nearcast.clock import Clock
from nearcast.transport.mqtt import topics
from nearcast.transport.mqtt.message import Message

EXPIRY_S = 172_800
REPEAT_S = 43_200.0
NAMES = "(value_json.results | map(attribute='class_name') | unique | join(', '))"


def sensor(prefix: str, node: str, item: Input) -> Message:
    """The retained message that makes a stream a sensor, available while the node is."""
    events = topics.event_topic(item.tenant, item.device, item.stream)
    device = f"nearcast_{item.tenant}_{item.device}"
    body = {
        "name": item.stream,
        "unique_id": f"{device}/{item.stream}",
        "state_topic": events,
        "value_template": f"{{{{ {NAMES} or 'none' }}}}",
        "json_attributes_topic": events,
        "availability_topic": topics.node_topic(item.tenant, node, "state"),
        "availability_template": "{{ value_json.state }}",
        "device": {"identifiers": [device], "name": item.device},
        "origin": {"name": "nearcast"},
    }
    return Message(
        topic=f"{prefix}/sensor/{item.device}/{item.stream}/config",
        payload=msgspec.json.encode(body),
        retain=True,
        content_type="application/json",
    )


class Discovery:
    """Tells of each stream when it has its first event, again after half a day, and to each new connection.

    Args:
        prefix: first level of the discovery topics, `homeassistant` unless Home Assistant is told otherwise.
        node: this node's name: its presence is the sensors' availability.
        publish: takes the message and the monotonic instant when it expires.
        clock: monotonic.
        streams_max: that are remembered; the one that was told of longest ago is forgotten first.
    """

    def __init__(
        self, prefix: str, node: str, publish: Callable[[Message, float], None], clock: Clock, streams_max: int
    ) -> None:
        self._prefix = prefix
        self._node = node
        self._publish = publish
        self._clock = clock
        self._streams_max = streams_max
        self._told: OrderedDict[str, float] = OrderedDict()

    def tell(self, item: Input) -> None:
        """A stream has an event."""
        now = self._clock.monotonic()
        if now - self._told.get(item.key, -math.inf) < REPEAT_S:
            return
        self._told[item.key] = now
        self._told.move_to_end(item.key)
        if len(self._told) > self._streams_max:
            self._told.popitem(last=False)
        self._publish(sensor(self._prefix, self._node, item), now + EXPIRY_S)

    def forget(self) -> None:
        """The next connection may be to another broker, or to one that was born empty."""
        self._told.clear()
