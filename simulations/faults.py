"""What goes wrong, and when."""

from __future__ import annotations

from collections.abc import Iterable

from simulations.fleet import Node
from simulations.world import World


def slow_down(world: World, nodes: Iterable[Node], *, factor: float, from_s: float, to_s: float) -> None:
    """A brown-out: the nodes answer, but `factor` times slower, between two instants."""
    for node in nodes:
        world.at(from_s, lambda node=node: setattr(node, "slowdown", factor))  # type: ignore[misc]
        world.at(to_s, lambda node=node: setattr(node, "slowdown", 1.0))  # type: ignore[misc]
