"""What a device keeps until it is done: a request until its reply, a sample until the broker has it.

Pure: events with a monotonic instant go in, instructions come out; `mqtt.py` holds the connection and the clock. These
are the rules for a device in any language:

1. A request has one key, its Correlation Data: 16 random bytes, the same however often the request is sent. The node
   executes it once and answers each copy alike.
2. A request ends with a reply that carries its key, or with its deadline. A PUBACK ends nothing: it says that the
   broker has the message, and a broker may forget.
3. After a lost connection everything that is kept is sent again, oldest first, once the replies are subscribed.
4. A request that the broker has confirmed and nobody answers is sent again after a growing, jittered pause.
5. A reply with `retry-after-ms` was not accepted: the same request is sent again after that pause, plus jitter. Unless
   it says `dedup`: then it is the stored answer, and will not change.
6. `ttl-ms` and Message Expiry state the time that is left when the message is sent.
7. No more messages are unconfirmed than the broker's Receive Maximum allows.
8. A sample carries `boot-id`, new at each start of the device, and `seq`, growing per stream; it is kept until its
   PUBACK and keeps both when it is sent again, so that the node can tell a repetition from a loss.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass
from math import ceil, inf, isfinite
from typing import TYPE_CHECKING

import msgspec

from nearcast.backoff import full_jitter_s
from nearcast.client.mqtt_limits import DeviceLimits
from nearcast.errors import Code, MeshError
from nearcast.transport.mqtt.message import Message

if TYPE_CHECKING:
    from random import Random

WAKE_UPS_FACTOR = 4
"""Wake-ups of ended requests stay listed; at this many times `kept_max` the list is made anew."""
PAUSE_DIGITS_MAX = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Send:
    """Publish this now."""

    key: bytes
    message: Message


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """Tell whoever waits for `key`: the reply, None for a sample that the broker has, or the error."""

    key: bytes
    reply: Message | None = None
    error: MeshError | None = None


@dataclass(slots=True, eq=False)
class _Kept:
    message: Message
    deadline: float
    is_request: bool
    attempts: int = 0
    unconfirmed: bool = False
    again_at: float = inf


class Outbox:
    """All that one device has sent or has to send. Instants are monotonic seconds.

    Args:
        limits: bounds.
        generator: for the jitter.
    """

    def __init__(self, limits: DeviceLimits, generator: Random) -> None:
        self._limits = limits
        self._generator = generator
        self._kept: dict[bytes, _Kept] = {}
        self._bytes = 0
        self._ready: deque[bytes] = deque()
        self._wake_ups: list[tuple[float, bytes]] = []
        self._window = 0
        self._unconfirmed = 0
        self._trouble = "The device is not connected yet."

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def wake_up_at(self) -> float:
        """When `tick` has something to do; infinity if never."""
        return self._wake_ups[0][0] if self._wake_ups else inf

    def put(
        self, now: float, key: bytes, message: Message, *, deadline: float = inf, is_request: bool
    ) -> list[Send | End]:
        """Take a message; what is to be done at once.

        Raises:
            MeshError: OVERLOADED if too much is kept already, CONFLICT for a key that is in use.
        """
        if key in self._kept:
            raise MeshError(Code.CONFLICT, "A request with this key is under way; use a new key for each request.")
        limits = self._limits
        if len(self._kept) >= limits.kept_max or self._bytes + len(message.payload) > limits.kept_bytes_max:
            raise MeshError(Code.OVERLOADED, f"{len(self._kept)} messages wait for the broker or an answer already.")
        self._kept[key] = _Kept(message, deadline, is_request)
        self._bytes += len(message.payload)
        self._wake(deadline, key)
        self._ready.append(key)
        return self._send_ready(now)

    def online(self, now: float, window: int) -> list[Send | End]:
        """A connection is up and subscribed; at most `window` messages may be unconfirmed on it."""
        self._window = min(window, self._limits.in_flight_max)
        self._unconfirmed = 0
        self._ready = deque(self._kept)
        for kept in self._kept.values():
            kept.unconfirmed, kept.again_at = False, inf
        return self._send_ready(now)

    def offline(self, trouble: str) -> None:
        """There is no connection, and why."""
        self._window = 0
        self._trouble = trouble

    def confirmed(self, now: float, key: bytes, *, taken: bool) -> list[Send | End]:
        """The broker's PUBACK for a message of this connection."""
        self._unconfirmed -= 1
        kept = self._kept.get(key)
        if kept is None:
            return self._send_ready(now)
        kept.unconfirmed = False
        if not taken:
            refusal = MeshError(Code.FORBIDDEN, f"The broker refused a message on {kept.message.topic}.")
            return [self._end(key, error=refusal), *self._send_ready(now)]
        if not kept.is_request:
            return [self._end(key), *self._send_ready(now)]
        if kept.again_at == inf:  # else its 429 overtook the PUBACK and has set the pause
            self._send_again(key, kept, now + self._limits.silence_s + self._jitter_s(kept))
        return self._send_ready(now)

    def replied(self, now: float, key: bytes, reply: Message) -> list[Send | End]:
        """A reply. One that nobody waits for is the second copy, or too late."""
        kept = self._kept.get(key)
        if kept is None or not kept.is_request:
            return []
        pause_s = _pause_s(reply)
        again_at = inf if pause_s is None else now + pause_s + self._jitter_s(kept)
        if again_at >= kept.deadline:
            return [self._end(key, reply=reply)]
        self._send_again(key, kept, again_at)
        return []

    def forget(self, key: bytes) -> None:
        """Nobody waits for this any more."""
        if key in self._kept:
            self._end(key)

    def tick(self, now: float) -> list[Send | End]:
        """Time has passed."""
        out: list[Send | End] = []
        while self._wake_ups and self._wake_ups[0][0] <= now:
            _, key = heapq.heappop(self._wake_ups)
            kept = self._kept.get(key)
            if kept is None:
                continue
            if kept.deadline <= now:
                out.append(self._end(key, error=self._overdue(kept)))
            elif kept.again_at <= now:
                kept.again_at = inf
                self._ready.append(key)
        return out + self._send_ready(now)

    def _send_ready(self, now: float) -> list[Send | End]:
        out: list[Send | End] = []
        while self._ready and self._unconfirmed < self._window:
            key = self._ready.popleft()
            kept = self._kept.get(key)
            if kept is None or kept.unconfirmed or kept.deadline <= now:
                continue
            kept.attempts += 1
            kept.unconfirmed = True
            self._unconfirmed += 1
            out.append(Send(key=key, message=_with_time_left(kept, now)))
        return out

    def _send_again(self, key: bytes, kept: _Kept, at: float) -> None:
        kept.again_at = at
        self._wake(at, key)

    def _jitter_s(self, kept: _Kept) -> float:
        limits = self._limits
        return full_jitter_s(kept.attempts - 1, self._generator, base_s=limits.silence_s, max_s=limits.silence_s_max)

    def _wake(self, at: float, key: bytes) -> None:
        if not isfinite(at):
            return
        if len(self._wake_ups) > WAKE_UPS_FACTOR * self._limits.kept_max:
            listed = [(min(kept.deadline, kept.again_at), key) for key, kept in self._kept.items()]
            listed += [(kept.deadline, key) for key, kept in self._kept.items() if kept.again_at < kept.deadline]
            self._wake_ups = [each for each in listed if isfinite(each[0])]
            heapq.heapify(self._wake_ups)
        heapq.heappush(self._wake_ups, (at, key))

    def _end(self, key: bytes, *, reply: Message | None = None, error: MeshError | None = None) -> End:
        self._bytes -= len(self._kept.pop(key).message.payload)
        return End(key=key, reply=reply, error=error)

    def _overdue(self, kept: _Kept) -> MeshError:
        if not self._window:
            return MeshError(Code.UNAVAILABLE, self._trouble, sent=kept.attempts > 0)
        if not kept.attempts:
            return MeshError(Code.DEADLINE, "The deadline passed before it could be sent.", sent=False)
        what = "No answer" if kept.is_request else "The broker did not confirm the message"
        times = "once" if kept.attempts == 1 else f"{kept.attempts} times"
        advice = " Does a node read this tenant's topics on this broker?" if kept.is_request else ""
        text = f"{what} within the deadline; it was sent {times}.{advice}"
        return MeshError(Code.DEADLINE, text, sent=True)


def _pause_s(reply: Message) -> float | None:
    """How long to wait before the same request may be accepted; None for an answer that is final."""
    text = reply.user.get("retry-after-ms", "")
    if "dedup" in reply.user or not text.isascii() or not text.isdigit() or len(text) > PAUSE_DIGITS_MAX:
        return None
    return int(text) / 1e3


def _with_time_left(kept: _Kept, now: float) -> Message:
    message = kept.message
    if not isfinite(kept.deadline):
        return message
    left_s = kept.deadline - now
    if not kept.is_request:
        return message.expiring(ceil(left_s))
    user = {**message.user, "ttl-ms": str(max(1, round(left_s * 1e3)))}
    return msgspec.structs.replace(message, user=user, expiry_s=ceil(left_s))
