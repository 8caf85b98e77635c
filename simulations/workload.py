"""Who asks, and when."""

from __future__ import annotations

from collections.abc import Callable

from simulations.world import World


def arrive_poisson(world: World, *, rate_per_s: float, until_s: float, request: Callable[[], None]) -> None:
    """Call `request` with exponential gaps of mean `1 / rate_per_s` seconds until `until_s`."""
    random = world.stream("arrivals")

    def arrive() -> None:
        request()
        schedule()

    def schedule() -> None:
        time_s = world.now + random.expovariate(rate_per_s)
        if time_s < until_s:
            world.at(time_s, arrive)

    schedule()
