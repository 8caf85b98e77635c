"""Who may still join a queue: classes of requests, shed lowest first, and in each first who is beyond its share.

What counts is the queue wait ahead of a request, never the time of its answer (DAGOR, Zhou et al., SoCC 2018): a slow
model is not overload. A queue that was empty a moment ago is a burst, which may wait; one that has not been empty for
an interval stands, and is kept short (CoDel, RFC 8289, in the form of Maurer, "Fail at Scale", ACM Queue 2015). The
interval is the time that the request itself could wait, so deadlines of 20 ms and of 2 s are each judged by their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager

from nearcast.errors import Code
from router.policy.candidates import Candidates
from router.policy.choose import Choice, Chooser, wait_s
from router.policy.config import PolicyConfig
from router.policy.facts import Reject, RequestFacts
from router.policy.state import VersionState
from router.policy.tenants import RANKS, Tenants

_SHED_GAIN = 0.02
_PATIENCE_GAIN = 0.05
_JITTER_MIN, _JITTER_SPAN = 0.8, 0.4
_HINT_MS_MAX = 30_000
_ORDINARY = 1


class _Queue:
    """The queue for one model, as decisions see it.

    `since`: none has found a free slot from then on; None = the last one did. `shed` is the smoothed share of requests
    that were refused. `patience` holds for each rank how much time its requests have, smoothed, and when the last came.
    """

    __slots__ = ("patience", "shed", "since")

    def __init__(self) -> None:
        self.since: float | None = None
        self.shed = 0.0
        self.patience: list[tuple[float, float]] = [(0.0, -math.inf)] * RANKS

    def copy(self) -> _Queue:
        """Another one that knows the same."""
        other = _Queue()
        other.since, other.shed, other.patience = self.since, self.shed, self.patience[:]
        return other


class Admission:
    """Asked only where a request would wait.

    Args:
        config: all parameters.
        random: draws from [0, 1) and comes from a seeded generator.
        full: whether a target takes no more than it has.
    """

    __slots__ = (
        "_beyond_shares", "_burst_share", "_class_shares", "_full", "_memory_s", "_random", "_rehearsing",
        "_wait_max_s", "queues", "tenants",
    )  # fmt: skip

    def __init__(self, config: PolicyConfig, random: Callable[[], float], full: Callable[[VersionState], bool]) -> None:
        self._random = random
        self._full = full
        self.configure(config)
        self._rehearsing = False
        self.queues: dict[str, _Queue] = {}
        self.tenants = Tenants(shares_max=config.tenant_shares_max, idle_s=config.tenant_idle_ms / 1e3)

    def configure(self, config: PolicyConfig) -> None:
        """Go on with other parameters; queues and shares stay as they are."""
        shares = (config.class_shares + config.class_shares[-1:] * RANKS)[:RANKS]
        # Half of the way down to the next class: below the others of the same, above all of the lower ones.
        lower = [max((other for other in shares if other < share), default=0.0) for share in shares]
        self._class_shares = shares
        self._beyond_shares = tuple((share + below) / 2.0 for share, below in zip(shares, lower, strict=True))
        self._burst_share = config.burst_share
        self._wait_max_s = config.queue_wait_ms_max / 1e3
        self._memory_s = config.patience_ms / 1e3

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """What is asked within leaves no trace: queues are copies, and who asks is not counted as wanting something."""
        queues = self.queues
        self.queues = {model: queue.copy() for model, queue in queues.items()}
        self._rehearsing = True
        try:
            yield
        finally:
            self.queues, self._rehearsing = queues, False

    def relax(self, model: str) -> None:
        """A request of this model found a free slot: no queue stands. Only worth a call while `queues` is not empty."""
        queue = self.queues.get(model)
        if queue is not None:
            queue.since = None
            queue.shed -= _SHED_GAIN * queue.shed

    def ration(
        self,
        now: float,
        facts: RequestFacts,
        choice: Choice,
        table: Candidates,
        limit_s: float,
        chooser: Chooser,
        *,
        late: bool = False,
    ) -> Choice | Reject:
        """The choice, if the request may wait that long; else the best one with a queue it may join; else a refusal.

        `late`: the choice is by its median, and so would be the other one.
        """
        idle_s = choice.t95_s - choice.wait_s
        slack_s = min(max(limit_s - idle_s, 0.0), self._wait_max_s)
        queue = self.queues.get(facts.model)
        if queue is None:
            queue = self.queues[facts.model] = _Queue()
        allowed_s = self._allowance_s(now, queue, facts, slack_s, idle_s)
        other: Choice | None = choice
        full = self._full
        if choice.wait_s > allowed_s or full(choice.version):
            scan = chooser.pick_late if late else chooser.pick
            other = scan(now, table, facts, limit_s, lambda version: wait_s(version) <= allowed_s and not full(version))
        if other is None:
            return self._refuse(facts, choice.wait_s, allowed_s, slack_s)
        queue.shed -= _SHED_GAIN * queue.shed
        if other.wait_s <= 0.0:
            queue.since = None
        return other

    def spread(self, model: str, reject: Reject) -> Reject:
        """The same refusal, with a hint that does not bring the whole crowd back at once.

        The pause grows with the measured excess: where two of three are refused, each waits three times as long.
        """
        if reject.retry_after_ms is None:
            return reject
        factor = _JITTER_MIN + _JITTER_SPAN * self._random()
        queue = self.queues.get(model)
        if queue is not None and reject.code is Code.OVERLOADED:
            queue.shed += _SHED_GAIN * (1.0 - queue.shed)
            factor /= 1.0 - queue.shed
        hint_ms = min(_HINT_MS_MAX, max(1, math.ceil(reject.retry_after_ms * factor)))
        return Reject(reject.code, reject.message, hint_ms, reject.reason, reject.terms)

    def sweep(self, now: float, models: Container[str]) -> None:
        """Forget models that no target holds, and those and tenants that nobody asks for; as often as one likes."""
        self.tenants.sweep(now)
        for model, queue in list(self.queues.items()):
            if model not in models or (queue.since is None and queue.shed < _SHED_GAIN / 2):
                del self.queues[model]

    def _allowance_s(self, now: float, queue: _Queue, facts: RequestFacts, slack_s: float, idle_s: float) -> float:
        """How long a queue the request may join, if it could wait `slack_s` and an idle target takes `idle_s`."""
        if queue.since is None:
            queue.since = now
        rank = rank_of(facts.priority)
        mean_s, at = queue.patience[rank]
        time_s = slack_s + idle_s
        gain = _PATIENCE_GAIN if now - at <= self._memory_s else 1.0
        queue.patience[rank] = (mean_s + gain * (time_s - mean_s), now)
        if not self._rehearsing:
            self.tenants.share(facts.model, facts.tenant, rank)
        part = self._class_shares[rank]
        if now - queue.since < slack_s:
            part = max(part, self._burst_share)
        elif self._is_beyond(facts):
            # Behind the others of its class, before all lower ones. Too much of the highest is ordinary.
            rank = max(rank, _ORDINARY)
            part, rank = self._beyond_shares[rank], rank + 1
        return part * self._least_s(now, queue, slack_s, idle_s, rank)

    def _refuse(self, facts: RequestFacts, wait: float, allowed_s: float, slack_s: float) -> Reject:
        """The refusal of a request that would be in time, but has to leave its place to others."""
        if self._is_beyond(facts):
            reason, why = "tenant_share", f"Tenant {facts.tenant!r} has more than its share of {facts.model!r}"
        else:
            reason, why = "shed", f"{facts.model!r} is overloaded and serves more important requests"
        # Sooner than in half an interval the same request would be judged the same.
        pause_s = max(wait - allowed_s, slack_s / 2.0)
        text = f"{why}; the queue takes {wait * 1e3:.0f} ms."
        return Reject(Code.OVERLOADED, text, math.ceil(pause_s * 1e3), reason)

    def _is_beyond(self, facts: RequestFacts) -> bool:
        share = self.tenants.known(facts.model, facts.tenant)
        return share is not None and share.exceeded(rank_of(facts.priority))

    def _least_s(self, now: float, queue: _Queue, slack_s: float, idle_s: float, rank: int) -> float:
        """The least patience of this request and of the ranks above: who has time must not fill their queue.

        Those for whom this way is too far even without a queue do not count.
        """
        for mean_s, at in queue.patience[:rank]:
            if idle_s < mean_s < idle_s + slack_s and now - at <= self._memory_s:
                slack_s = mean_s - idle_s
        return slack_s


def rank_of(priority: int) -> int:
    """0 is shed last. Class 1 is the highest; 0 says nothing and comes next; then 2; all others are the lowest."""
    return (1, 0, 2)[priority] if 0 <= priority <= 2 else RANKS - 1
