"""What goes into the ledger and what comes out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeAlias, TypeVar

import msgspec

from edge_node.mqtt.admission import Request
from edge_node.mqtt.idempotency import Verdict
from nearcast.transport.mqtt.message import Message

Link: TypeAlias = Literal["device", "upstream"]
"""`device`: the broker that requests come from. `upstream`: a second one, which gets events and dead letters too."""
LINK_BITS: Mapping[Link, int] = {"device": 1, "upstream": 2}
Kind: TypeAlias = Literal["request", "input", "outgoing", "dropped"]
"""What a dead letter was: a request, a stream's message, one that a broker refused; or a note of what was dropped."""
NOTICE_EXPIRY_S = 30
"""Message Expiry of an answer for which nobody may wait any more, such as 408."""
T = TypeVar("T")


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """An answer as it was decided once and for all. `expires` is a monotonic instant of the boot that wrote it."""

    topic: str
    payload: bytes = b""
    content_type: str = ""
    correlation: bytes = b""
    user: dict[str, str] = {}
    expires: float


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """A message that leaves the node on every link, in order per topic.

    Attributes:
        ttl_s: its Message Expiry, counted from the commit; what has passed while the machine was off is not known, so
            it counts anew after a reboot.
    """

    topic: str
    payload: bytes = b""
    content_type: str = "application/json"
    user: dict[str, str] = {}
    ttl_s: float


class Input(msgspec.Struct, frozen=True, kw_only=True):
    """One admitted message of a stream, as the ledger stores it (without its payload).

    Attributes:
        boot, seq: the device's own count; "" and None where it keeps none.
        arrived: monotonic instant of this boot.
    """

    tenant: str
    device: str
    stream: str
    boot: str = ""
    seq: int | None = None
    ts: str = ""
    content_type: str = ""
    user: dict[str, str] = {}
    arrived: float

    @property
    def key(self) -> str:
        """The stream's name among all: order holds within it."""
        return f"{self.tenant}/{self.device}/{self.stream}"


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message that the ledger owes to `links` (a sum of `LINK_BITS`).

    Attributes:
        expires: monotonic.
        is_event: nobody asks for it again, as a device does for its answer.
    """

    id: int
    message: Message
    expires: float
    links: int = LINK_BITS["device"]
    size_bytes: int = 0
    is_event: bool = False


@dataclass(frozen=True, slots=True)
class Admission:
    """What the ledger did with a request: `id` of its row, and the answer to send again if it is a replay."""

    verdict: Verdict
    id: int
    replay: Outgoing | None = None


@dataclass(frozen=True, slots=True)
class Unanswered:
    """A request that was accepted before a restart. `attempts` counts the crashes that it may have caused."""

    id: int
    request: Request
    payload: bytes
    attempts: int
    same_boot: bool


@dataclass(frozen=True, slots=True)
class Intake:
    """What the ledger did with a stream's message. `lost`: numbers that the device skipped before it.

    Verdicts: `accept`: it is row `id`. `duplicate`: it was taken before. `full`: there is no room and the policy is
    `reject`. Each of them may be acknowledged.
    """

    verdict: Literal["accept", "duplicate", "full"]
    id: int = 0
    lost: int = 0


@dataclass(frozen=True, slots=True)
class StoredInput:
    """A stream's message that waits for its execution. `attempts` counts the crashes that it may have caused."""

    id: int
    input: Input
    payload: bytes
    attempts: int = 0
    same_boot: bool = True


@dataclass(frozen=True, slots=True)
class Advance:
    """What one stream's message has brought about. `buried`: the reason why it becomes a dead letter."""

    row: int
    events: Sequence[Event] = ()
    buried: str = ""


@dataclass(frozen=True, slots=True)
class Committed:
    """What one transaction did: outbox rows that came, those that were dropped, and all drops by reason."""

    added: Sequence[Outgoing]
    dropped: frozenset[int]
    reasons: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Revived:
    """Dead letters that are rows again, to be executed or sent."""

    requests: Sequence[Unanswered]
    inputs: Sequence[StoredInput]
    outgoing: Sequence[Outgoing]


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """Rows in the order of their ids. `through`: every row up to this id was looked at."""

    rows: Sequence[T]
    through: int


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a restarted node has to finish.

    Attributes:
        requests: accepted and unanswered.
        inputs: the last waiting row of each stream that has some, by `Input.key`.
        outbox: for each link, the last owed row of each topic that has some.
        crashed: the former life did not end cleanly.
    """

    requests: Sequence[Unanswered]
    inputs: Mapping[str, int]
    outbox: Mapping[Link, Mapping[str, int]]
    crashed: bool = False


class Letter(msgspec.Struct, frozen=True, kw_only=True):
    """One dead letter, as it is listed. `name`: the model, the stream, or the link.

    Attributes:
        at: wall clock, seconds since 1970, as far as the node's clock was right.
        replay: somebody asked for it to be tried again.
    """

    id: int
    at: float
    kind: Kind
    tenant: str
    device: str
    name: str
    reason: str
    attempts: int
    size_bytes: int
    replay: bool = False
