"""What bounds a device."""

from __future__ import annotations

from dataclasses import dataclass, field

from nearcast.backoff import ReconnectLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceLimits:
    """Bounds of one device.

    Attributes:
        kept_max, kept_bytes_max: requests without a reply and samples that the broker has not confirmed; more are
            refused at once.
        in_flight_max: of these, how many may be unconfirmed at the same time, where the broker allows more.
        streams_max: streams that are numbered.
        silence_s, silence_s_max: a request that the broker has confirmed and nobody has answered is sent again after
            the first of these, plus full jitter over an exponential that ends at the second.
        reconnect: how soon a lost connection is made again.
        session_expiry_s: how long the broker keeps replies for a device that is away.
        will_delay_s: how long a device may be away before the others are told.
    """

    kept_max: int = 1024
    kept_bytes_max: int = 32 * 1024 * 1024
    in_flight_max: int = 64
    streams_max: int = 256
    silence_s: float = 1.0
    silence_s_max: float = 4.0
    reconnect: ReconnectLimits = field(default_factory=ReconnectLimits)
    session_expiry_s: int = 300
    will_delay_s: int = 10
