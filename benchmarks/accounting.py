"""Random calls into the policy: what it counts as in flight must be what is outstanding, after every one of them."""

from __future__ import annotations

import time
from collections import Counter
from random import Random

from benchmarks.rows import Row
from nearcast.errors import Code
from nearcast.handler import Served
from nearcast.load import NodeReport, Tier, VersionReport
from router.policy import Attempt, Outcome, Policy, PolicyConfig, RequestFacts, Send

EVENTS, EVENTS_QUICK = 1_000_000, 100_000
SEED = 4
NAMES = ("local", *(f"peer-{i}" for i in range(6)), *(f"cloud-{i}" for i in range(3)))
CODES = (
    None, None, None, None, None, None, Code.INTERNAL, Code.UNAVAILABLE, Code.DEADLINE, Code.OVERLOADED,
    Code.CANCELLED, Code.VERSION_MISMATCH, Code.MODEL_NOT_FOUND, Code.INVALID_REQUEST,
)  # fmt: skip
OPEN_MAX = 300
CLOSED_KEPT_MAX = 50


def tier_of(name: str) -> Tier:
    """The tier of a target by its name."""
    return "local" if name == "local" else "peer" if name.startswith("peer") else "cloud"


class Storm:
    """Calls a policy at random: targets leave with attempts open and come back, replies come twice, reports lie.

    Args:
        policy: gets the calls.
        seed: of the calls.
    """

    def __init__(self, policy: Policy, seed: int) -> None:
        self.policy = policy
        self.events: Counter[str] = Counter()
        self.open: list[tuple[RequestFacts, Attempt]] = []
        self._closed: list[Attempt] = []
        self._random = Random(seed)
        self._now = 0.0
        for name in NAMES[:5]:
            policy.add_target(0.0, name, tier_of(name))
        kinds = [(self._send, 30), (self._reply, 30), (self._hedge, 12), (self._reply_twice, 4), (self._report, 10)]
        kinds += [(self._probe, 4), (self._lose, 1), (self._add, 5), (self._remove, 4)]
        self._calls = [call for call, _ in kinds]
        self._weights = [weight for _, weight in kinds]

    def run(self, events: int) -> int:
        """Make so many calls; returns after how many of them the sums were wrong."""
        random, wrong = self._random, 0
        for _ in range(events):
            self._now += random.expovariate(2000.0) if random.random() > 0.001 else random.random() * 3.0
            call = self._reply if len(self.open) >= OPEN_MAX else random.choices(self._calls, self._weights)[0]
            self.events[call.__name__.strip("_")] += 1
            call()
            wrong += not self.is_sound()
        return wrong

    def is_sound(self) -> bool:
        """In flight is what is outstanding, in all, and on every target apart."""
        per_target = Counter(id(attempt.version.target) for _, attempt in self.open)
        targets = self.policy.targets
        return self.policy.outstanding == len(self.open) == sum(target.own for target in targets) and all(
            target.own == per_target[id(target)] and target.load >= target.own for target in targets
        )

    def drain(self) -> bool:
        """Answer all that is open; whether nothing is left then."""
        while self.open:
            self._reply()
        return self.policy.outstanding == 0 and all(target.own == 0 for target in self.policy.targets)

    def _send(self) -> None:
        random = self._random
        facts = RequestFacts(
            model=random.choice(("m", "n")),
            version=random.choice(("", "1", "2")),
            fallbacks=random.choice(((), ("1",))),
            size_bytes=random.choice((0, 600, 600_000)),
            remaining_s=random.choice((None, random.random())),
            stateful=random.random() < 0.1,
            idempotent=random.random() < 0.9,
            priority=random.randrange(4),
            sequence=random.choice(("", "", "", "a", "b")),
            tenant=random.choice(("local", "other")),
        )
        decision = self.policy.decide(self._now, facts, explain=random.random() < 0.02)
        if isinstance(decision, Send):
            self._sent(facts, decision, "first")
        elif random.random() < 0.1:
            # A request that another router sent here: it is counted, whatever we hold.
            local = Send("local", facts.version)
            self._sent(facts, local, "forwarded")

    def _sent(self, facts: RequestFacts, send: Send, kind: str) -> None:
        try:
            attempt = self.policy.on_sent(self._now, facts, send, kind)
        except KeyError:
            self.events["unknown target"] += 1
            return
        self.events[kind] += 1
        self.open.append((facts, attempt))

    def _reply(self) -> None:
        if not self.open:
            return
        random = self._random
        at = random.randrange(len(self.open))
        self.open[at], self.open[-1] = self.open[-1], self.open[at]
        facts, attempt = self.open.pop()
        code = random.choice(CODES)
        served = Served(
            compute_us=random.randrange(90_000), queue_us=random.randrange(9_000), in_flight=random.randrange(-3, 30)
        )
        outcome = Outcome(
            code=code,
            sent=random.random() < 0.8,
            retry_after_ms=50 if code is Code.OVERLOADED else None,
            served=served if code is None and random.random() < 0.9 else None,
            told=random.random() < 0.3,
        )
        self.policy.on_reply(self._now, attempt, outcome)
        self._closed = [*self._closed[-CLOSED_KEPT_MAX:], attempt]
        again = self.policy.retry(self._now, facts, attempt, outcome, (attempt.target,))
        if again is not None:
            self._sent(facts, again, "retry")

    def _reply_twice(self) -> None:
        if self._closed:
            self.policy.on_reply(self._now, self._random.choice(self._closed), Outcome(Code.CANCELLED))

    def _hedge(self) -> None:
        if self.open:
            facts, attempt = self._random.choice(self.open)
            copy = self.policy.hedge(self._now, facts, attempt, (attempt.target,))
            if copy is not None:
                self._sent(facts, copy, "hedge")

    def _report(self) -> None:
        random = self._random
        versions = tuple(
            VersionReport(
                model=model,
                version=version,
                residency=random.choice(("hot", "hot", "hot", "loading", "cold")),
                eta_ms=random.choice((0.0, 20.0)),
                service_p50_us=random.random() * 20_000,
                service_p95_us=random.random() * 60_000,
                stateful=random.choice(("none", "none", "none", "hidden")),
            )
            for model in ("m", "n")
            for version in ("1", "2")
            if random.random() < 0.8
        )
        slots, in_flight = random.randrange(-1, 8), random.randrange(-5, 50)
        report = NodeReport(
            node="x", role="edge", slots=slots, in_flight=in_flight, draining=random.random() < 0.05, versions=versions
        )
        self.policy.on_report(self._now, random.choice(NAMES), report)

    def _probe(self) -> None:
        random = self._random
        rtt_s = None if random.random() < 0.2 else random.random() * 0.1
        self.policy.on_probe(self._now, random.choice(NAMES), rtt_s, connecting=random.random() < 0.2)

    def _lose(self) -> None:
        self.policy.on_connection_lost(self._now, self._random.choice(NAMES))

    def _add(self) -> None:
        # Under another tier, too: a name may come back as another node while the old one's requests are open.
        name = self._random.choice(NAMES)
        tier = tier_of(name) if self._random.random() < 0.9 else self._random.choice(("peer", "cloud"))
        self.policy.add_target(self._now, name, tier)

    def _remove(self) -> None:
        self.policy.remove_target(self._now, self._random.choice(NAMES))


def run(*, quick: bool) -> list[Row]:
    """A million random calls, looked at after each."""
    events = EVENTS_QUICK if quick else EVENTS
    storm = Storm(Policy(PolicyConfig(retry_burst=1e6, hedge_burst=1e6, brownout_share=1.0), SEED), SEED)
    began = time.process_time()
    wrong = storm.run(events)
    seconds = time.process_time() - began
    seen = storm.events
    kinds = ("first", "hedge", "retry", "forwarded", "reply_twice", "remove")
    note = ", ".join(f"{seen[kind]} {kind}" for kind in kinds)
    return [
        Row("accounting.events", events, "1", note),
        Row("accounting.wrong_sums", wrong, "1", "calls after which in-flight was not what is outstanding"),
        Row("accounting.left_after_drain", 0.0 if storm.drain() else 1.0, "1"),
        Row("accounting.seconds", seconds, "s", "processor time"),
    ]
