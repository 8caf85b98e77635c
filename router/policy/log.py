"""The decision log as bytes: every call into the policy, so that the same code can make the same decisions again.

A file is a chain of frames (length, CRC-32, MessagePack list of records). It begins with a `Start`; then either the
policy is new, or a `Checkpoint` holds its state. Attempts are named by the number of their `Sent`, counted from the
policy's beginning. Tensors are never in here; names of tenants and sequences are.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import msgspec

from nearcast.errors import Code, MeshError
from nearcast.load import NodeReport, Tier
from router.policy.config import PolicyConfig
from router.policy.events import Outcome
from router.policy.facts import Decision, Reject, RequestFacts, Send

FORMAT = 1
FRAME_SIZE_BYTES_MAX = 64 * 1024 * 1024
_HEAD = struct.Struct("<II")


class Start(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """The head of a file.

    Attributes:
        format: of this file.
        run: names the policy's life; files of one run continue each other.
        number: of this file in its run, from 0; only the first begins with a new policy.
        lost: records that are missing between the file before and this one.
        node: whose decisions these are.
        release: of the software.
        seed, config: what the policy was made of.
    """

    format: int
    run: str
    number: int
    lost: int
    node: str
    release: str
    seed: int
    config: dict[str, Any]


class Checkpoint(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """The whole state of the policy, for `router.policy.checkpoint`; `sent` attempts were made so far."""

    now: float
    sent: int
    state: bytes


class Reconfigured(msgspec.Struct, frozen=True, array_like=True, tag=12):
    """`reconfigure`."""

    now: float
    config: dict[str, Any]


class TargetAdded(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """`add_target` said `known`."""

    now: float
    name: str
    tier: Tier
    domain: str
    known: bool


class TargetRemoved(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """`remove_target`."""

    now: float
    name: str


class Reported(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """`on_report`."""

    now: float
    name: str
    report: NodeReport


class Probed(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """`on_probe`."""

    now: float
    name: str
    rtt_s: float | None
    connecting: bool


class ConnectionLost(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """`on_connection_lost`."""

    now: float
    name: str


class Decided(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """`decide`: exactly one of `send` and `reject` came back."""

    now: float
    facts: RequestFacts
    explain: bool
    send: Send | None
    reject: Reject | None

    @property
    def decision(self) -> Decision | None:
        """What came back."""
        return self.send if self.send is not None else self.reject


class Sent(msgspec.Struct, frozen=True, array_like=True, tag=8):
    """`on_sent`. No facts, no send: those of the last `Decided`."""

    now: float
    kind: str
    facts: RequestFacts | None
    send: Send | None


class Replied(msgspec.Struct, frozen=True, array_like=True, tag=9):
    """`on_reply`."""

    now: float
    attempt: int
    outcome: Outcome


class Hedged(msgspec.Struct, frozen=True, array_like=True, tag=10):
    """`hedge` said `send`."""

    now: float
    attempt: int
    facts: RequestFacts
    tried: tuple[str, ...]
    send: Send | None


class Retried(msgspec.Struct, frozen=True, array_like=True, tag=11):
    """`retry` said `send`."""

    now: float
    attempt: int
    facts: RequestFacts
    outcome: Outcome
    tried: tuple[str, ...]
    send: Send | None


Record: TypeAlias = (
    Start | Checkpoint | Reconfigured | TargetAdded | TargetRemoved | Reported | Probed | ConnectionLost | Decided
    | Sent | Replied | Hedged | Retried
)  # fmt: skip

"""One call into the policy, or the begin of a file."""

_encoder = msgspec.msgpack.Encoder()


def read_config(config: dict[str, Any]) -> PolicyConfig:
    """The configuration of a `Start` or `Reconfigured`.

    Raises:
        MeshError: UNSUPPORTED if another release wrote it, with settings that this one does not have.
    """
    try:
        return msgspec.convert(config, PolicyConfig)
    except msgspec.ValidationError as error:
        raise MeshError(
            Code.UNSUPPORTED,
            f"Another release wrote this log, and its settings differ ({error}); replay with that one.",
        ) from error


def encode(records: Sequence[Record]) -> bytes:
    """One frame."""
    body = _encoder.encode(records)
    return _HEAD.pack(len(body), zlib.crc32(body)) + body


def decode(data: bytes) -> Iterator[Record]:
    """The records of a file. What a crash has cut off at the end is left out.

    Raises:
        MeshError: INVALID_REQUEST if a frame is damaged or no decision log.
    """
    decoder = msgspec.msgpack.Decoder(list[Record])  # 2 ms, which a node that only writes need not wait for
    at, view = 0, memoryview(data)
    while at + _HEAD.size <= len(view):
        size, checksum = _HEAD.unpack_from(view, at)
        body = view[at + _HEAD.size : at + _HEAD.size + size]
        if size > FRAME_SIZE_BYTES_MAX or (len(body) < size and at == 0):
            raise MeshError(Code.INVALID_REQUEST, f"No decision log, or damaged at byte {at}: use another file.")
        if len(body) < size:
            return
        if zlib.crc32(body) != checksum:
            raise MeshError(Code.INVALID_REQUEST, f"The decision log is damaged at byte {at}; use another file.")
        try:
            yield from decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise MeshError(Code.INVALID_REQUEST, f"The decision log cannot be read at byte {at}: {error}.") from error
        at += _HEAD.size + size
