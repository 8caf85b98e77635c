"""A node's sync agent in virtual time: the live replica machine and the live swarm on a simulated network and host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from model_sync.replica.events import Booted, Done, Event, Intended, Loaded, Polled, Sampled, Ticked
from model_sync.replica.instructions import Cancel, Instruction, Refresh, Run, Watch, WritePointer
from model_sync.replica.machine import Replica
from model_sync.replica.state import Goal, Memory, State, Want
from model_sync.replica.swarm import PEERS_MAX, TICK_S, Ask, Drop, Kind, Look, Swarm, SwarmLimits
from model_sync.replica.turns import turns_of
from nearcast.store.manifest import CHUNK_SIZE_BYTES
from nearcast.store.pointer import Pointer
from simulations.network import Network
from simulations.world import World

ORIGIN = "origin"
HANDSHAKE_ROUND_TRIPS = 2
"""TCP and TLS 1.3, before the first request of a connection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """What has to be moved for one release: the full blob, or a delta to it."""

    sha256: str
    size_bytes: int
    is_delta: bool = False

    @property
    def chunks(self) -> int:
        """How many chunks it has."""
        return -(-self.size_bytes // CHUNK_SIZE_BYTES)

    def chunk_bytes(self, chunk: int) -> int:
        """Size of one chunk; the last one is shorter."""
        return min(CHUNK_SIZE_BYTES, self.size_bytes - chunk * CHUNK_SIZE_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What a step takes besides the network, in seconds; `patch_s` only where a delta was fetched."""

    plan_s: float = 0.005
    patch_s: float = 0.25
    verify_s: float = 0.03
    stage_s: float = 0.05
    gate_s: float = 0.5
    load_s: float = 0.1


class SyncNode:
    """One node that follows one model. `fleet` finds the other nodes by name, `members` are those it knows of.

    Attributes:
        began_at, fetched_at, active_at: virtual instants at which the download began, the payload was whole, and the
            pointer named the new release.
    """

    def __init__(
        self,
        world: World,
        network: Network,
        name: str,
        *,
        place: int,
        origin: int,
        fleet: dict[str, SyncNode],
        installed: dict[int, str],
        stable: int,
        costs: Costs,
        uploads_max: int,
        limits: SwarmLimits | None,
    ) -> None:
        self.name = name
        self.place = place
        self.began_at: float | None = None
        self.fetched_at: float | None = None
        self.active_at: float | None = None
        self.swarm: Swarm | None = None
        self.uploads = 0
        self.payload: Payload | None = None
        self.members: tuple[str, ...] = ()
        self._world, self._network, self._origin, self._fleet = world, network, origin, fleet
        self._costs, self._uploads_max, self._limits = costs, uploads_max, limits
        self._random: Random = world.stream(f"node/{name}")
        self._flows: dict[tuple[str, int], int] = {}
        self._connected: set[str] = {ORIGIN}
        self._job = 0
        gated = {str(release): sha256 for release, sha256 in installed.items()}
        back = tuple(release for release in installed if release < stable)
        memory = Memory(model="detector", committed=stable, rollback_ok=back, gated=gated)
        self.replica = Replica(name, memory, Pointer(stable=stable), installed, draw=self._random.random)
        self.send(Booted())

    def follow(self, want: Want, payload: Payload | None) -> None:
        """A verified document says this; `payload` is what a new release costs to fetch."""
        self.payload = payload
        self.send(Polled())
        self.send(Intended(want))

    def send(self, event: Event) -> None:
        """Give the machine an event and do what it says, as the shell of the agent does."""
        for instruction in self.replica.handle(self._world.now, event):
            self._carry_out(instruction)
        if self.replica.deadline < float("inf"):
            self._world.at(max(self._world.now, self.replica.deadline), lambda: self.send(Ticked()))

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case Run(job, step, goal):
                self._run(job, step, goal)
            case Refresh(job, release) if job and release is not None:
                self._world.after(self._costs.load_s, lambda: self.send(Loaded(job)))
            case Watch(job, _):
                for tick in range(1, 12):
                    self._world.after(0.5 * tick, lambda job=job: self.send(Sampled(job, 10)))
            case WritePointer(pointer):
                self.active_at = self._world.now
                self._world.record(self.name, "pointer", pointer.stable, pointer.candidate)
            case Cancel():
                self._abandon()
            case _:
                pass

    def _run(self, job: int, step: State, goal: Goal) -> None:
        del goal
        if step is State.FETCH:
            self._job = job
            self._fetch()
            return
        costs = self._costs
        took_s = {
            State.PLAN: costs.plan_s,
            State.PATCH: costs.patch_s if self.payload is not None and self.payload.is_delta else 0.0,
            State.VERIFY: costs.verify_s,
            State.STAGE: costs.stage_s,
            State.GATE: costs.gate_s,
        }[step]
        self._world.after(took_s, lambda: self.send(Done(job)))

    # Fetching.

    def _fetch(self) -> None:
        payload = self.payload
        assert payload is not None
        now = self._world.now
        self.began_at = now
        if not self.members:
            self._stream(payload)
            return
        turns = turns_of(self.name, self.members, payload.sha256, payload.chunks)
        draw = self._random.random
        swarm = Swarm(now, payload.chunks, payload.size_bytes, turns=turns, limits=self._limits, draw=draw)
        self.swarm = swarm
        swarm.join(ORIGIN, Kind.ORIGIN)
        size = min(len(self.members), PEERS_MAX)
        for name in self._random.sample(self.members, size):
            swarm.join(name, Kind.PEER)
        self._tick()

    def _stream(self, payload: Payload) -> None:
        """Without peers: the whole payload over one connection."""
        half_s = self._network.rtt_s / 2

        def done() -> None:
            self._world.after(half_s, self._fetched)

        self._network.send_later(half_s, self._origin, self.place, payload.size_bytes, done)

    def _fetched(self) -> None:
        self.fetched_at = self._world.now
        self._world.record(self.name, "fetched")
        self.send(Done(self._job))

    def _abandon(self) -> None:
        for flow in self._flows.values():
            self._network.cancel(flow)
        self._flows.clear()

    def _tick(self) -> None:
        if self.swarm is not None and not self.swarm.is_complete:
            self._pump()
            self._world.after(TICK_S, self._tick)

    def _pump(self) -> None:
        swarm = self.swarm
        assert swarm is not None
        for request in swarm.next_requests(self._world.now):
            match request:
                case Ask(source, chunk):
                    self._flows[source, chunk] = 0
                    self._reach(source, lambda source=source, chunk=chunk: self._ask(source, chunk))  # type: ignore[misc]
                case Look(source):
                    self._reach(source, lambda source=source: self._look(source))  # type: ignore[misc]
                case Drop(source, chunk):
                    self._network.cancel(self._flows.pop((source, chunk), 0))

    def _reach(self, source: str, then: Callable[[], None]) -> None:
        trips = 0.5 if source in self._connected else 0.5 + HANDSHAKE_ROUND_TRIPS
        self._connected.add(source)
        self._world.after(trips * self._network.rtt_s, then)

    def _ask(self, source: str, chunk: int) -> None:
        payload, swarm, half_s = self.payload, self.swarm, self._network.rtt_s / 2
        assert payload is not None
        assert swarm is not None
        if (source, chunk) not in self._flows:
            return
        peer = self._fleet.get(source)
        if peer is not None and not peer.admit():
            self._world.after(half_s, lambda: self._refused(source, chunk))
            return

        def done() -> None:
            if peer is not None:
                peer.uploads -= 1
            self._world.after(half_s, lambda: self._arrived(source, chunk))

        place = self._origin if peer is None else peer.place
        flow = self._network.send(place, self.place, payload.chunk_bytes(chunk), done)
        self._flows[source, chunk] = flow

    def _refused(self, source: str, chunk: int) -> None:
        assert self.swarm is not None
        if self._flows.pop((source, chunk), None) is not None:
            self.swarm.busy(self._world.now, source, chunk)
            self._pump()

    def _arrived(self, source: str, chunk: int) -> None:
        swarm, now = self.swarm, self._world.now
        assert swarm is not None
        if self._flows.pop((source, chunk), None) is None or swarm.is_complete:
            return
        swarm.arrived(now, source, chunk)
        peer = self._fleet.get(source)
        if peer is not None:
            swarm.holds(now, source, peer.held)
        self._pump()
        if swarm.is_complete:
            self._fetched()

    def _look(self, source: str) -> None:
        """The peer is asked at this instant; the answer is here half a round trip later."""
        held, is_known = self._fleet[source].held, self._fleet[source].swarm is not None

        def answered() -> None:
            assert self.swarm is not None
            if is_known:
                self.swarm.holds(self._world.now, source, held)
            else:
                self.swarm.absent(self._world.now, source)
            self._pump()

        self._world.after(self._network.rtt_s / 2, answered)

    # For the others.

    @property
    def held(self) -> int:
        """Chunks that this node can give."""
        return self.swarm.held if self.swarm is not None else 0

    def admit(self) -> bool:
        """Take an upload if there is room for one more."""
        if self.uploads >= self._uploads_max:
            return False
        self.uploads += 1
        return True
