"""What a baseline is: a published load balancer that chooses a node and learns from what it sees."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from random import Random
from typing import ClassVar

from nearcast.errors import Code
from nearcast.handler import Served
from nearcast.load import NodeReport
from router.policy.facts import RequestFacts


class Baseline(ABC):
    """Chooses one node for each request. Deterministic: all randomness comes from `random`; times are seconds.

    The driver around it sends, retries once on another node after a failure or a refusal, ends the request at its
    deadline, and passes on exactly what the live policy hears: a report of every node each quarter of a second together
    with the round trip of its probe, trailers of every answer, and lost connections (the node is left out of `nodes`).

    Attributes:
        name: for tables; also the key under which it is registered.
        home: the scenario it was made for; there it must beat round robin.
    """

    name: ClassVar[str]
    home: ClassVar[str]

    def __init__(self, random: Random) -> None:
        self.random = random

    @abstractmethod
    def choose(self, now: float, facts: RequestFacts, nodes: Sequence[str]) -> str:
        """The node for this request. `nodes` are those that hold the model and are connected; never empty."""

    def probe(self, now: float, nodes: Sequence[str]) -> Sequence[str]:
        """Nodes to probe now, asked after each choice; a probe is answered by `on_report` one round trip later."""
        return ()

    def on_report(self, now: float, node: str, report: NodeReport, rtt_s: float) -> None:
        """A node said how it is, to a probe that took `rtt_s` there and back. `report.role` is its tier."""
        return

    def on_sent(self, now: float, node: str) -> None:
        """A request leaves for `node`; every one is followed by exactly one `on_reply`."""
        return

    def on_reply(self, now: float, node: str, latency_s: float, served: Served | None, code: Code | None) -> None:
        """It is over: answered (`code` None, `served` says what happened), failed, refused, or given up (DEADLINE)."""
        return
