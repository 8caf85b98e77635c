"""The way from the router to a node and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from simulations.scenario import NodeSpec
from simulations.world import World

_LARGE_BYTES = 64 * 1024


class Link:
    """A delay each way, and an uplink that large bodies share one by one; small ones pass between their frames.

    While the link is `cut` nothing arrives, neither what is sent nor what is on its way. `lost`: the router knows.
    """

    def __init__(self, world: World, spec: NodeSpec) -> None:
        self._world = world
        self.rtt_s = spec.rtt_ms / 1e3
        self.s_per_byte = 0.0 if spec.tier == "local" else 8e-6 / spec.uplink_mbit_per_s
        self.is_cut = False
        self.is_lost = False
        self.free_at = 0.0
        self._epoch = 0
        self.flights: dict[object, Callable[[], None]] = {}
        """What to call for each request on its way when the connection is found to be lost."""

    def transfer_s(self, size_bytes: int) -> float:
        """How long a body sent now takes to leave, the bodies before it included."""
        busy_s = max(0.0, self.free_at - self._world.now) if size_bytes >= _LARGE_BYTES else 0.0
        return busy_s + size_bytes * self.s_per_byte

    def there(self, share: float, size_bytes: int, arrive: Callable[..., None], *arguments: Any) -> None:
        """Carry something to the node; `share` of the round trip is its delay."""
        delay_s = self.transfer_s(size_bytes)
        if size_bytes >= _LARGE_BYTES:
            self.free_at = self._world.now + delay_s
        self._carry(delay_s + share * self.rtt_s, arrive, arguments)

    def back(self, share: float, arrive: Callable[..., None], *arguments: Any) -> None:
        """Carry something small; `share` of the round trip is its delay."""
        self._carry(share * self.rtt_s, arrive, arguments)

    def cut(self) -> None:
        """Nothing passes any more."""
        self.is_cut = True
        self._epoch += 1

    def mend(self) -> None:
        """Messages pass again; a lost connection still has to be made anew."""
        self.is_cut = False

    def lose(self) -> None:
        """The router learns that the connection is lost: whoever waits for an answer is told."""
        if not self.is_cut:
            return
        self.is_lost = True
        flights, self.flights = self.flights, {}
        for tell in flights.values():
            tell()

    def _carry(self, delay_s: float, arrive: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if not self.is_cut:
            self._world.after(delay_s, self._arrive, self._epoch, arrive, arguments)

    def _arrive(self, epoch: int, arrive: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if epoch == self._epoch:
            arrive(*arguments)
