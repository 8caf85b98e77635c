"""One connection after another, for whoever wants to stay connected to a broker."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from random import Random
from typing import NoReturn

from nearcast.backoff import ReconnectLimits, Reconnects
from nearcast.errors import MeshError
from nearcast.telemetry import get_logger

_log = get_logger("nearcast.mqtt")


async def stay_connected(
    live: Callable[[Callable[[], None]], Awaitable[None]],
    *,
    name: str,
    limits: ReconnectLimits,
    generator: Random | None = None,
    on_trouble: Callable[[str], None] = lambda _trouble: None,
) -> NoReturn:
    """Have one connection after another, until cancelled.

    Args:
        live: one connection, from the CONNECT to the loss, at which it returns or raises. It calls its argument once
            messages can pass.
        name: where to, for the log.
        limits: of the waits between two of them.
        generator: of the jitter.
        on_trouble: told what `live` raised.
    """
    reconnects = Reconnects(limits, generator or Random())
    now = asyncio.get_running_loop().time
    while True:
        up_at: list[float] = []
        trouble = ""
        try:
            await live(lambda: up_at.append(now()))  # noqa: B023  # called while `live` runs
        except (MeshError, TimeoutError) as error:
            trouble = error.message if isinstance(error, MeshError) else "The broker did not answer in time."
            level = _log.debug if reconnects.attempt else _log.warning  # one line for each outage
            level("not_connected", name=name, error=trouble)
        except Exception as error:  # noqa: BLE001  # who does not try again is deaf for ever
            trouble = f"The connection failed unexpectedly: {error!r}."
            _log.exception("not_connected", name=name)
        if trouble:
            on_trouble(trouble)
        await asyncio.sleep(reconnects.wait_s(now() - up_at[0] if up_at else 0.0))
