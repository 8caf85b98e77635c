"""The topic tree `nc/v1`. Fixed positions, so that a broker's access patterns can bind a device to its own part."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal, TypeAlias

import msgspec

from nearcast.errors import Code, MeshError
from nearcast.transport.mqtt.content_types import SUFFIXES

ID_PATTERN = r"[a-z0-9_-]{1,64}"
VERSION_PATTERN = r"[0-9A-Za-z._-]{1,64}"
TOPIC_LENGTH_MAX = 512
TOPIC_LEVELS_MAX = 8
TOPICS_MAX = 4096
"""Request topics of which is remembered what they name: devices ask the same again and again."""
RESERVED_DEVICES = frozenset({"node", "dlq"})
NodeLeaf: TypeAlias = Literal["state", "models", "metrics", "desired", "reported"]
_ID = re.compile(ID_PATTERN)
_REQUEST = re.compile(rf"nc/v1/({ID_PATTERN})/({ID_PATTERN})/up/infer/([^/]*)(?:/([^/]*))?")
_DATA = re.compile(rf"nc/v1/({ID_PATTERN})/({ID_PATTERN})/up/data/({ID_PATTERN})")
_VERSION = re.compile(VERSION_PATTERN)
_BELOW = re.compile(r"[^+#\0]+")
_MODEL = re.compile(rf"({ID_PATTERN})(?:@({VERSION_PATTERN}))?")


class RequestTopic(msgspec.Struct, frozen=True, kw_only=True):
    """A request's topic. `model` is "" where the topic names none: the device is known and can be told.

    `suffix` is the last level of a device that cannot send a Content Type: `json`, `cbor` or `bin`; "" = none.
    """

    tenant: str
    device: str
    model: str
    version: str = ""
    suffix: str = ""

    @property
    def reply(self) -> str:
        """Where the answer goes if the request names no Response Topic; the only place for MQTT 3.1.1."""
        name = self.model or "_"
        return reply_topic(self.tenant, self.device, f"{name}/{self.suffix}" if self.suffix else name)


def is_id(text: str) -> bool:
    """Whether `text` may name a tenant, a device or a node."""
    return _ID.fullmatch(text) is not None


def is_version(text: str) -> bool:
    """Whether `text` may name a version of a model."""
    return _VERSION.fullmatch(text) is not None


def require_id(text: str, what: str) -> str:
    """`text`, if it may be one level of a topic.

    Raises:
        MeshError: INVALID_REQUEST naming `what`.
    """
    if not is_id(text):
        raise MeshError(
            Code.INVALID_REQUEST, f"{text!r} is no {what}: use 1 to 64 lower-case letters, digits, `_` and `-`."
        )
    return text


def parse_request(topic: str) -> RequestTopic | None:
    """Split a request's topic; None if tenant or device cannot be read from it, so that nobody can be answered."""
    return _parse_request(topic) if len(topic) <= TOPIC_LENGTH_MAX else None


@lru_cache(TOPICS_MAX)
def _parse_request(topic: str) -> RequestTopic | None:
    found = _REQUEST.fullmatch(topic)
    if found is None:
        return None
    tenant, device, name, suffix = found.groups()
    if device in RESERVED_DEVICES:
        return None
    parts = _MODEL.fullmatch(name)
    if parts is None or (suffix is not None and suffix not in SUFFIXES):
        return RequestTopic(tenant=tenant, device=device, model="")
    return RequestTopic(tenant=tenant, device=device, model=parts[1], version=parts[2] or "", suffix=suffix or "")


def request_topic(tenant: str, device: str, model: str, version: str = "", suffix: str = "") -> str:
    """Where a device asks `model`; `version` pins one; `suffix` announces the format without a Content Type.

    Raises:
        MeshError: INVALID_REQUEST if a part cannot be a topic level.
    """
    prefix = _device_prefix(tenant, device)
    name = f"{model}@{version}" if version else model
    if _MODEL.fullmatch(name) is None:
        raise MeshError(Code.INVALID_REQUEST, f"{name!r} is no model name with an optional @version.")
    if suffix and suffix not in SUFFIXES:
        raise MeshError(Code.INVALID_REQUEST, f"{suffix!r} is no format; use {', '.join(SUFFIXES)}.")
    return f"{prefix}up/infer/{name}/{suffix}" if suffix else f"{prefix}up/infer/{name}"


def request_filter(tenant: str) -> str:
    """The subscription for all requests of a tenant that end with a model."""
    return f"nc/v1/{require_id(tenant, 'tenant')}/+/up/infer/+"


def suffixed_filter(tenant: str) -> str:
    """The subscription for all requests of a tenant that end with a format."""
    return f"{request_filter(tenant)}/+"


def device_level(topic: str) -> str:
    """The level at which a topic of the tree names a device; "" if it is not as deep."""
    levels = topic.split("/", 4)
    return levels[3] if len(levels) > 4 else ""


def down_prefix(tenant: str, device: str) -> str:
    """Everything that the mesh may say to a device lies under this prefix."""
    return f"nc/v1/{tenant}/{device}/down/"


def reply_topic(tenant: str, device: str, name: str) -> str:
    """A device's reply topic, `name` being the model or a word of the client's choice."""
    return f"{down_prefix(tenant, device)}reply/{name}"


def is_own_reply_topic(topic: str, tenant: str, device: str) -> bool:
    """Whether a requester may be answered on `topic`: a Response Topic is its own word and could name another's."""
    prefix = down_prefix(tenant, device)
    if not topic.startswith(prefix) or len(topic) > TOPIC_LENGTH_MAX or topic.count("/") >= TOPIC_LEVELS_MAX:
        return False
    return _BELOW.fullmatch(topic, len(prefix)) is not None


def data_topic(tenant: str, device: str, stream: str) -> str:
    """Where a device sends the samples of one of its streams.

    Raises:
        MeshError: INVALID_REQUEST if a part cannot be a topic level.
    """
    return f"{_device_prefix(tenant, device)}up/data/{require_id(stream, 'stream')}"


def data_filter(tenant: str) -> str:
    """The subscription for all streams of a tenant."""
    return f"nc/v1/{require_id(tenant, 'tenant')}/+/up/data/+"


def is_data(topic: str) -> bool:
    """Whether a topic is one of a stream. Cheap: it is asked of every message."""
    return topic.split("/", 6)[4:6] == ["up", "data"]


def parse_data(topic: str) -> tuple[str, str, str] | None:
    """Tenant, device and stream of a stream's topic; None if they cannot be read from it."""
    found = _DATA.fullmatch(topic)
    return None if found is None or found[2] in RESERVED_DEVICES else (found[1], found[2], found[3])


def event_topic(tenant: str, device: str, stream: str) -> str:
    """Where the results of a stream go, for whoever may read them."""
    return f"nc/v1/{tenant}/{device}/out/{stream}"


def device_state_topic(tenant: str, device: str) -> str:
    """Retained presence of a device, and its will."""
    return f"{_device_prefix(tenant, device)}state"


def device_desired_topic(tenant: str, device: str) -> str:
    """Retained settings that a device is to have: under its own `down/`, where it may read."""
    return f"{_device_prefix(tenant, device)}down/desired"


def device_reported_topic(tenant: str, device: str) -> str:
    """Retained settings that a device has: under its own `up/`, where it may write."""
    return f"{_device_prefix(tenant, device)}up/reported"


def _device_prefix(tenant: str, device: str) -> str:
    require_id(tenant, "tenant")
    if require_id(device, "device") in RESERVED_DEVICES:
        raise MeshError(Code.INVALID_REQUEST, f"{device!r} is reserved; choose another device name.")
    return f"nc/v1/{tenant}/{device}/"


def node_topic(tenant: str, node: str, leaf: NodeLeaf) -> str:
    """One of a node's own topics.

    Raises:
        MeshError: INVALID_REQUEST if a part cannot be a topic level.
    """
    return f"nc/v1/{require_id(tenant, 'tenant')}/node/{require_id(node, 'node name')}/{leaf}"


def dead_letter_topic(tenant: str, node: str) -> str:
    """Where a node tells of what it gave up."""
    return f"nc/v1/{require_id(tenant, 'tenant')}/dlq/{require_id(node, 'node name')}"
