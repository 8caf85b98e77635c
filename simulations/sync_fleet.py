"""A fleet of agents behind access links, one origin, and the control API's hint, all in virtual time.

What decides is live: `rollout.transitions` makes the document, `replica` follows it, `swarm` fetches. What is
simulated: links (`network`), the origin's request rate, and how long local steps take.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from model_sync.replica.state import Goal, Want
from model_sync.replica.swarm import SwarmLimits
from model_sync.rollout.document import ChannelDocument, Pick
from model_sync.rollout.transitions import Command, apply, find_rollout
from simulations.network import Network
from simulations.sync_node import Costs, Payload, SyncNode
from simulations.world import World

MODEL, CHANNEL = "detector", "stable"
MBIT = 1e6 / 8


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSpec:
    """The setting. Rates are in bytes/s, times in seconds.

    Attributes:
        check_round_trips, check_bytes: what a look at changed metadata costs a node: root, timestamp, snapshot, models
            role, rollout role, channel document and manifest, one after the other.
        requests_per_s: what one core of the sync process answers; measured: 0.25 ms of processor time for a request.
        hint_waiters_max: long polls that it keeps open; other nodes learn of a change by their next poll.
        poll_s: mean pause between checks.
        uploads_max: chunks that a peer gives at a time.
        knows_peers: whether nodes know of each other.
    """

    nodes: int = 200
    up: float = 20 * MBIT
    down: float = 20 * MBIT
    origin_up: float = 200 * MBIT
    rtt_s: float = 0.05
    loss: float = 0.01
    check_round_trips: int = 7
    check_bytes: int = 24_000
    requests_per_s: float = 4_000.0
    hint_waiters_max: int = 10_000
    poll_s: float = 30.0
    uploads_max: int = 8
    knows_peers: bool = True
    costs: Costs = field(default_factory=Costs)
    limits: SwarmLimits | None = None
    seed: int = 1


def sha256_of(release: int) -> str:
    """A digest that stands for a release's manifest."""
    return f"{release:064x}"


class Fleet:
    """Nodes that serve release `stable` and hold `installed`, and the channel they follow."""

    def __init__(self, spec: FleetSpec, *, installed: tuple[int, ...], stable: int) -> None:
        self.spec = spec
        self.world = World(spec.seed)
        self.network = Network(self.world, rtt_s=spec.rtt_s, loss=spec.loss)
        self.origin = self.network.add(up=spec.origin_up, down=spec.origin_up)
        self.nodes: dict[str, SyncNode] = {}
        self.document = apply(None, _command("stable", stable))
        self._random = self.world.stream("fleet")
        self._origin_free_at = 0.0
        names = [f"edge-{index}" for index in range(spec.nodes)]
        releases = {release: sha256_of(release) for release in installed}
        for name in names:
            self.nodes[name] = SyncNode(
                self.world,
                self.network,
                name,
                place=self.network.add(up=spec.up, down=spec.down),
                origin=self.origin,
                fleet=self.nodes,
                installed=releases,
                stable=stable,
                costs=spec.costs,
                uploads_max=spec.uploads_max,
                limits=spec.limits,
            )
        for name, node in self.nodes.items():
            node.follow(_want(self.document, rollback_ok=()), None)
            if spec.knows_peers:
                node.members = tuple(other for other in names if other != name)
            node.active_at = None

    def publish(self, action: str, release: int, payload: Payload | None) -> None:
        """An operator's command at this instant: the next document, signed, and the hint to everyone who waits."""
        before = find_rollout(self.document, MODEL)
        assert before is not None
        self.document = apply(self.document, _command(action, release, newest=max(release, before.stable.release)))
        # A delta has an index besides.
        trips = self.spec.check_round_trips + (payload is not None and payload.is_delta)
        for index, node in enumerate(self.nodes.values()):
            waits = index < self.spec.hint_waiters_max
            delay_s = self._answer_at() + self.spec.rtt_s / 2 if waits else 2 * self.spec.poll_s * self._random.random()
            self.world.after(delay_s, lambda node=node: self._check(node, payload, trips))

    def _answer_at(self) -> float:
        """Seconds until the origin has answered one more request; it works through them one by one."""
        self._origin_free_at = max(self.world.now, self._origin_free_at) + 1.0 / self.spec.requests_per_s
        return self._origin_free_at - self.world.now

    def _check(self, node: SyncNode, payload: Payload | None, trips: int) -> None:
        if trips:
            half_s = self.spec.rtt_s / 2
            self.world.after(half_s, lambda: self._answer(node, payload, trips))
            return
        node.follow(_want(self.document, rollback_ok=(1,)), payload)

    def _answer(self, node: SyncNode, payload: Payload | None, trips: int) -> None:
        size = self.spec.check_bytes / self.spec.check_round_trips

        def there() -> None:
            self.world.after(self.spec.rtt_s / 2, lambda: self._check(node, payload, trips - 1))

        self.network.send_later(self._answer_at(), self.origin, node.place, size, there)


def _command(action: str, release: int, newest: int = 0) -> Command:
    return Command(
        channel=CHANNEL,
        model=MODEL,
        action=action,  # type: ignore[arg-type]
        pick=Pick(release=release, manifest_sha256=sha256_of(release)),
        newest=newest,
        rollback_ok=frozenset({1}),
        reason="simulated",
    )


def _want(document: ChannelDocument, rollback_ok: tuple[int, ...]) -> Want:
    """What the agent makes of a verified document."""
    rollout = find_rollout(document, MODEL)
    assert rollout is not None
    stable = Goal(release=rollout.stable.release, sha256=rollout.stable.manifest_sha256, rollback_ok=rollback_ok)
    return Want(intent=document.intent, stable=stable, rollback=rollout.rollback, salt=rollout.salt)
