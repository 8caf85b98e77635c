"""A download from sources of every kind, honest or not: it ends within its bounds while one honest source lives."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_sync.replica.swarm import LIE, TICK_S, Ask, Drop, Kind, Look, Swarm, SwarmLimits
from model_sync.replica.turns import neighbourhood, turns_of

LIMITS = SwarmLimits()
CHUNK = 256 * 1024


@dataclass(frozen=True)
class Behaviour:
    """`honest`, `liar` (wrong bytes), `mute` (never answers), `busy`, `empty` (claims much, breaks), `absent`."""

    kind: str
    took_s: float
    share: float = 1.0
    leaves_at: float = 1e9


def drive(chunks: int, sources: dict[str, tuple[Kind, Behaviour]], seed: int, until_s: float = 3_000.0) -> Driven:
    return Driven(chunks, sources, seed).run(until_s)


class Driven:
    """One swarm in virtual time against sources that behave as told."""

    def __init__(self, chunks: int, sources: dict[str, tuple[Kind, Behaviour]], seed: int) -> None:
        self.random = Random(seed)
        self.swarm = Swarm(0.0, chunks, chunks * CHUNK, draw=self.random.random)
        self.sources = sources
        self.chunks = chunks
        self.verified: list[int] = []
        self.origin_asks = 0
        self.in_flight: dict[tuple[str, int], int] = {}
        self.answers: list[tuple[float, int, str, int | None]] = []
        self.count = 0
        self.now = 0.0

    def holding(self, name: str) -> int:
        share = self.sources[name][1].share
        return sum(1 << chunk for chunk in range(self.chunks) if (chunk * 7 % self.chunks) < share * self.chunks)

    def run(self, until_s: float) -> Driven:
        for name, (kind, _) in self.sources.items():
            self.swarm.join(name, kind)
        while not self.swarm.is_complete and self.now < until_s:
            self.step()
            due = self.answers[0][0] if self.answers else until_s
            self.now = min(self.now + TICK_S, due) if due > self.now else self.now
            while self.answers and self.answers[0][0] <= self.now:
                self.answer(*heapq.heappop(self.answers)[1:])
        return self

    def step(self) -> None:
        for request in self.swarm.next_requests(self.now):
            match request:
                case Ask(source, chunk):
                    assert not self.swarm.held >> chunk & 1, "what is here is not asked for"
                    assert self.swarm.banned.get(source, 0.0) <= self.now
                    self.origin_asks += self.sources[source][0] is Kind.ORIGIN
                    self.count += 1
                    self.in_flight[source, chunk] = self.count
                    self.plan(source, chunk)
                case Look(source):
                    self.plan(source, None)
                case Drop(source, chunk):
                    self.in_flight.pop((source, chunk), None)
        per_source = {name: sum(1 for owner, _ in self.in_flight if owner == name) for name in self.sources}
        assert len(self.in_flight) == self.swarm.in_flight <= LIMITS.requests_max
        for name, asked in per_source.items():
            is_origin = self.sources[name][0] is Kind.ORIGIN
            assert asked <= (LIMITS.origin_requests_max if is_origin else LIMITS.source_requests_max)
        assert all(until <= self.now + LIMITS.ban_max_s for until in self.swarm.banned.values())

    def plan(self, source: str, chunk: int | None) -> None:
        behaviour = self.sources[source][1]
        if behaviour.kind != "mute":
            self.count += 1
            took_s = 0.05 if chunk is None else behaviour.took_s * (0.5 + self.random.random())
            heapq.heappush(self.answers, (self.now + took_s, self.in_flight.get((source, chunk), 0), source, chunk))

    def answer(self, number: int, source: str, chunk: int | None) -> None:
        behaviour, swarm = self.sources[source][1], self.swarm
        if chunk is None:
            if behaviour.kind == "absent":
                swarm.absent(self.now, source)
            elif self.now >= behaviour.leaves_at:
                swarm.lost(self.now, source)
            else:
                swarm.holds(self.now, source, self.holding(source))
            return
        if self.in_flight.get((source, chunk)) != number:
            return
        del self.in_flight[source, chunk]
        if self.now >= behaviour.leaves_at or behaviour.kind == "empty":
            swarm.lost(self.now, source, chunk)
        elif behaviour.kind == "liar":
            swarm.corrupt(self.now, source, chunk)
        elif behaviour.kind == "busy" and self.random.random() < 0.8:
            swarm.busy(self.now, source, chunk)
        else:
            self.verified.append(chunk)
            swarm.arrived(self.now, source, chunk)


behaviours = st.builds(
    Behaviour,
    kind=st.sampled_from(["honest", "liar", "mute", "busy", "empty", "absent"]),
    took_s=st.sampled_from([0.02, 0.3, 4.0, 30.0]),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    leaves_at=st.sampled_from([0.5, 5.0, 1e9]),
)


@settings(max_examples=60, deadline=None)
@given(
    chunks=st.integers(1, 40),
    peers=st.lists(behaviours, max_size=12),
    honest=st.sampled_from([Kind.ORIGIN, Kind.MIRROR, Kind.PEER]),
    seed=st.integers(0, 2**16),
)
def test_one_honest_source_is_enough(chunks: int, peers: list[Behaviour], honest: Kind, seed: int) -> None:
    sources = {f"peer-{i}": (Kind.PEER, behaviour) for i, behaviour in enumerate(peers)}
    sources["honest"] = (honest, Behaviour("honest", 0.2))
    driven = drive(chunks, sources, seed)
    assert driven.swarm.is_complete
    assert sorted(driven.verified) == list(range(chunks)), "each chunk arrives once"


def test_sources_that_lie_delay_by_a_bounded_time() -> None:
    liars = {f"liar-{i}": (Kind.PEER, Behaviour("liar", 0.3)) for i in range(20)}
    alone = drive(40, {"origin": (Kind.ORIGIN, Behaviour("honest", 0.2))}, 1)
    among = drive(40, {**liars, "origin": (Kind.ORIGIN, Behaviour("honest", 0.2))}, 1)
    assert among.swarm.is_complete
    assert among.now < alone.now + LIMITS.stall_s + 10.0
    assert all(until > 0 for until in among.swarm.banned.values())


def test_a_good_peer_spares_the_origin() -> None:
    sources = {
        "origin": (Kind.ORIGIN, Behaviour("honest", 0.2)),
        **{f"peer-{i}": (Kind.PEER, Behaviour("honest", 0.2)) for i in range(4)},
    }
    driven = drive(40, sources, 3)
    assert driven.swarm.is_complete
    assert driven.origin_asks == 0


def test_without_peers_the_origin_gives_all_at_once() -> None:
    swarm = Swarm(0.0, 40, 40 * CHUNK, turns=(9,) * 40, draw=Random(1).random)
    swarm.join("origin", Kind.ORIGIN)
    asks = swarm.next_requests(0.0)
    assert all(isinstance(request, Ask) and request.source == "origin" for request in asks)
    assert len({request.chunk for request in asks if isinstance(request, Ask)}) == LIMITS.origin_requests_max
    assert swarm.in_flight == LIMITS.origin_requests_max


def test_bans_grow_and_end() -> None:
    swarm = Swarm(0.0, 4, 4 * CHUNK, draw=lambda: 0.5)
    swarm.join("mirror", Kind.MIRROR)
    now, lengths = 0.0, []
    for _ in range(10):
        asks = [request for request in swarm.next_requests(now) if isinstance(request, Ask)]
        assert asks, "after its ban a source is asked again"
        swarm.corrupt(now, "mirror", asks[0].chunk)
        lengths.append(swarm.banned["mirror"] - now)
        assert not [r for r in swarm.next_requests(now + 0.5 * lengths[-1]) if isinstance(r, Ask)]
        now = swarm.banned["mirror"]
    assert lengths[0] == LIMITS.ban_base_s * 2 ** (LIE - 1)
    assert lengths == sorted(lengths)
    assert lengths[-1] == LIMITS.ban_max_s


def test_the_rarest_chunk_comes_first() -> None:
    swarm = Swarm(0.0, 3, 3 * CHUNK, limits=SwarmLimits(requests_max=1), draw=lambda: 0.5)
    for name, held in (("a", 0b111), ("b", 0b011), ("c", 0b001)):
        swarm.join(name, Kind.PEER)
        swarm.holds(0.0, name, held)
    assert swarm.next_requests(0.0) == (Ask("a", 2),)


def test_what_is_late_at_the_end_is_asked_of_a_second_source() -> None:
    swarm = Swarm(0.0, 2, 2 * CHUNK, draw=lambda: 0.5)
    for name in ("a", "b"):
        swarm.join(name, Kind.PEER)
        swarm.holds(0.0, name, 0b11)
    first = {request.chunk: request.source for request in swarm.next_requests(0.0) if isinstance(request, Ask)}
    swarm.arrived(0.3, first[0], 0)
    assert swarm.next_requests(0.4) == ()
    second = "b" if first[1] == "a" else "a"
    assert swarm.next_requests(0.9) == (Ask(second, 1),)
    swarm.arrived(1.0, second, 1)
    assert swarm.is_complete
    assert swarm.next_requests(1.0) == (Drop(first[1], 1),)


@given(st.sets(st.text(st.characters(codec="ascii", categories=["Ll", "Nd"]), min_size=1), min_size=1, max_size=40))
def test_every_chunk_has_exactly_one_first_member(members: set[str]) -> None:
    chunks = 17
    places = [turns_of(node, members, "ab" * 32, chunks) for node in members]
    for chunk in range(chunks):
        assert sorted(place[chunk] for place in places) == list(range(len(members)))


@pytest.mark.parametrize("count", [3, 256, 2_000])
def test_a_large_mesh_falls_into_parts_that_agree(count: int) -> None:
    members = [f"edge-{i}" for i in range(count)]
    parts = {node: frozenset({node, *neighbourhood(node, members, 256)}) for node in members[:50]}
    for node, part in parts.items():
        assert len(part) <= 400
        assert all(parts[other] == part for other in part if other in parts), node
