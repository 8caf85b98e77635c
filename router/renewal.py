"""Keeps a node's certificate fresh: renewed at two thirds of its life, and shown to every new peer from then on."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nearcast.clock import SYSTEM_CLOCK, Clock
from nearcast.errors import MeshError
from nearcast.identity import Identity, Validity, renew
from nearcast.metrics import Collector, Registry
from nearcast.runtime import run_in_daemon
from nearcast.telemetry import get_logger

if TYPE_CHECKING:
    from prometheus_client import Metric

_log = get_logger(__name__)
_EXPONENT_MAX = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class RenewalLimits:
    """When to ask for a certificate, and how often again.

    Attributes:
        spread_share: nodes that joined together ask at different instants of this first share of the last third.
        rest_share: a new certificate is kept for this share of its life, even if the node's clock calls it old.
        backoff_base_s, backoff_max_s: the n-th failure is followed by 0 to base · 2^n seconds, at most max.
        pause_min_s: between any two attempts.
        pause_max_s: after this the clock is read again: it may have been set, or the machine been asleep.
    """

    spread_share: float = 0.1
    rest_share: float = 0.1
    backoff_base_s: float = 1.0
    backoff_max_s: float = 60.0
    pause_min_s: float = 1.0
    pause_max_s: float = 600.0


class Renewal(Collector):
    """Renews the certificate of a running node. Nothing that it meets ends it or keeps the node from serving.

    Args:
        identity: the one from which the node's listeners and channels were made.
        control: the controller's URL; "" = the one that the identity's folder names.
        registry: where the end of the certificate's life is shown.
        limits: when to ask.
        clock: its wall time is compared with the certificate's.
    """

    def __init__(
        self,
        identity: Identity,
        *,
        control: str = "",
        registry: Registry | None = None,
        limits: RenewalLimits | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._identity = identity
        self._control = control
        self._limits = limits or RenewalLimits()
        self._clock = clock
        self._validity = identity.validity()
        if registry is not None:
            registry.register(self)
        self._task: asyncio.Task[None] | None = None

    def collect(self) -> Iterable[Metric]:
        """When the certificate that is in use ends."""
        from prometheus_client.core import GaugeMetricFamily

        text = "When this node's certificate expires, in seconds since 1970."
        yield GaugeMetricFamily("nc_certificate_ends_at_seconds", text, self._validity.ends_at)

    @property
    def validity(self) -> Validity:
        """Of the certificate that is shown now."""
        return self._validity

    def start(self) -> None:
        """Begin to watch the certificate."""
        self._task = asyncio.get_running_loop().create_task(self._keep_fresh())

    async def close(self) -> None:
        """Stop at once."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _keep_fresh(self) -> None:
        limits = self._limits
        rest_s = limits.pause_min_s
        while True:
            await asyncio.sleep(rest_s)
            await self._wait_until_due()
            failures = 0
            while not await self._renew(failures):
                failures += 1
                span_s = min(limits.backoff_max_s, limits.backoff_base_s * 2.0 ** min(failures, _EXPONENT_MAX))
                await asyncio.sleep(max(limits.pause_min_s, span_s * random.random()))
            life_s = self._validity.ends_at - self._validity.starts_at
            rest_s = max(limits.pause_min_s, life_s * limits.rest_share)

    async def _wait_until_due(self) -> None:
        spread_s = (self._validity.ends_at - self._validity.renew_at) * self._limits.spread_share
        due_at = self._validity.renew_at + spread_s * random.random()
        while (left_s := due_at - self._clock.wall()) > 0:  # noqa: ASYNC110 (nothing tells of a clock that was set)
            await asyncio.sleep(min(left_s, self._limits.pause_max_s))

    async def _renew(self, failures: int) -> bool:
        """Try once; whether it worked. Of n failures in a row the log shows about log2(n)."""
        try:
            folder = self._identity.certificate.parent
            await run_in_daemon(lambda: renew(folder, control=self._control), name="renew-certificate")
            self._identity.reload()
            self._validity = self._identity.validity()
        except (MeshError, OSError) as error:
            if failures & (failures - 1) == 0:
                valid_for_s = round(self._validity.ends_at - self._clock.wall())
                _log.warning("certificate_not_renewed", error=str(error), attempt=failures + 1, valid_for_s=valid_for_s)
            return False
        _log.info("certificate_renewed", failures=failures)
        return True
