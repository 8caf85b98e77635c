"""A fluid network in virtual time: flows share access links max-min fairly, none faster than loss lets TCP be.

Only access links bound (the core is wide). Rates hold for one step; a flow that ends within a step ends at its exact
instant, and what it frees is shared out at the next step.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from simulations.world import World

STEP_S = 0.01
SEGMENT_BYTES = 1448
Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


def loss_rate_bytes_per_s(rtt_s: float, loss: float) -> float:
    """What one TCP connection reaches at a random loss, MSS / RTT · sqrt(3 / 2p); infinite without loss or distance.

    Source: M. Mathis et al., "The macroscopic behavior of the TCP congestion avoidance algorithm", 1997.
    """
    return SEGMENT_BYTES / rtt_s * math.sqrt(1.5 / loss) if rtt_s > 0 and loss > 0 else math.inf


def fair_rates(sources: Indices, sinks: Indices, up: Floats, down: Floats, cap: float) -> Floats:
    """Max-min fair rates of flows, each through the uplink of its source and the downlink of its sink.

    Water-filling: in each round all flows whose bound is the lowest on both of their links are settled at it.
    """
    rates = np.zeros(len(sources))
    open_ = np.arange(len(sources))
    up, down = up.copy(), down.copy()
    while len(open_):
        s, d = sources[open_], sinks[open_]
        share_up = up / np.maximum(1, np.bincount(s, minlength=len(up)))
        share_down = down / np.maximum(1, np.bincount(d, minlength=len(down)))
        bound = np.minimum(np.minimum(share_up[s], share_down[d]), cap)
        low_up, low_down = np.full(len(up), np.inf), np.full(len(down), np.inf)
        np.minimum.at(low_up, s, bound)
        np.minimum.at(low_down, d, bound)
        settled = (bound <= low_up[s] * (1 + 1e-9)) & (bound <= low_down[d] * (1 + 1e-9))
        rates[open_[settled]] = bound[settled]
        np.subtract.at(up, s[settled], bound[settled])
        np.subtract.at(down, d[settled], bound[settled])
        np.maximum(up, 0.0, out=up)
        np.maximum(down, 0.0, out=down)
        open_ = open_[~settled]
    return rates


class Network:
    """Places with an uplink and a downlink, and the flows between them. Sizes in bytes, capacities in bytes/s."""

    def __init__(self, world: World, *, rtt_s: float, loss: float) -> None:
        self.rtt_s = rtt_s
        self.sent_bytes: list[float] = []
        self._world = world
        self._cap = loss_rate_bytes_per_s(rtt_s, loss)
        self._up: list[float] = []
        self._down: list[float] = []
        self._flows: dict[int, tuple[int, int, float, Callable[[], None]]] = {}
        self._count = 0
        self._ticking = False

    def add(self, *, up: float, down: float) -> int:
        """A place; returns its number."""
        self._up.append(up)
        self._down.append(down)
        self.sent_bytes.append(0.0)
        return len(self._up) - 1

    def send_later(self, delay_s: float, source: int, sink: int, size_bytes: float, done: Callable[[], None]) -> None:
        """As `send`, after a delay, for a flow that nobody cancels."""

        def begin() -> None:
            self.send(source, sink, size_bytes, done)

        self._world.after(delay_s, begin)

    def send(self, source: int, sink: int, size_bytes: float, done: Callable[[], None]) -> int:
        """Begin a flow; `done` is called when its last byte leaves, half a round trip before it is there."""
        self._count += 1
        self._flows[self._count] = (source, sink, size_bytes, done)
        if not self._ticking:
            self._ticking = True
            self._world.after(0.0, self._tick)
        return self._count

    def cancel(self, flow: int) -> None:
        """End a flow before its time; nothing happens if it has ended."""
        self._flows.pop(flow, None)

    def _tick(self) -> None:
        flows = self._flows
        if not flows:
            self._ticking = False
            return
        numbers = list(flows)
        sources = np.fromiter((flows[n][0] for n in numbers), np.int64, len(numbers))
        sinks = np.fromiter((flows[n][1] for n in numbers), np.int64, len(numbers))
        rates = fair_rates(sources, sinks, np.asarray(self._up), np.asarray(self._down), self._cap)
        for number, rate in zip(numbers, rates.tolist(), strict=True):
            source, sink, left, done = flows[number]
            moved = min(left, rate * STEP_S)
            self.sent_bytes[source] += moved
            if left <= rate * STEP_S:
                self._world.after(left / rate, lambda n=number: self._finish(n))
            flows[number] = (source, sink, left - moved, done)
        self._world.after(STEP_S, self._tick)

    def _finish(self, number: int) -> None:
        flow = self._flows.pop(number, None)
        if flow is not None:
            flow[3]()
