"""A policy that writes down every call into it, with what came back."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from nearcast.load import NodeReport, Tier
from router.policy import checkpoint
from router.policy.config import PolicyConfig
from router.policy.events import Attempt, Outcome
from router.policy.facts import Decision, RequestFacts, Send
from router.policy.log import (
    Checkpoint,
    ConnectionLost,
    Decided,
    Hedged,
    Probed,
    Reconfigured,
    Record,
    Replied,
    Reported,
    Retried,
    Sent,
    TargetAdded,
    TargetRemoved,
)
from router.policy.policy import Policy

FAILED_MAX = 256
"""Failed attempts that a checkpoint holds beside the open ones, because a retry may still be asked for them."""


class Sink(Protocol):
    """Where the records go. Neither call may raise or wait."""

    def append(self, record: Record) -> None:
        """Take a record, or drop and count it."""
        ...

    def is_due(self, now: float) -> bool:
        """Whether it wants a checkpoint. Asked at each report."""
        ...

    def begin(self, record: Checkpoint) -> None:
        """Take a checkpoint: whoever reads may begin here."""
        ...


class RecordedPolicy(Policy):
    """Decides as `Policy` does. A call costs about a microsecond more; the records are made into bytes elsewhere."""

    def __init__(self, config: PolicyConfig, seed: int, sink: Sink) -> None:
        super().__init__(config, seed)
        self._own = _Notes(sink)

    def __reduce__(self) -> tuple[Any, ...]:
        """A checkpoint holds the policy, not its recorder."""
        return checkpoint.blank, (), {k: v for k, v in vars(self).items() if k != "_own"}

    def reconfigure(self, now: float, config: PolicyConfig) -> None:
        super().reconfigure(now, config)
        self._own.append(Reconfigured(now, msgspec.to_builtins(config)))

    def add_target(self, now: float, name: str, tier: Tier, domain: str = "") -> bool:
        known = super().add_target(now, name, tier, domain)
        self._own.append(TargetAdded(now, name, tier, domain, known))
        return known

    def remove_target(self, now: float, name: str) -> None:
        super().remove_target(now, name)
        self._own.append(TargetRemoved(now, name))

    def on_report(self, now: float, name: str, report: NodeReport) -> None:
        super().on_report(now, name, report)
        own = self._own
        own.append(Reported(now, name, report))
        if own.sink.is_due(now):
            own.facts = own.decision = None
            attempts = (*own.failed, *own.attempts.values())
            own.sink.begin(Checkpoint(now, own.sent, checkpoint.save(self, attempts)))

    def on_probe(self, now: float, name: str, rtt_s: float | None, *, connecting: bool = False) -> None:
        super().on_probe(now, name, rtt_s, connecting=connecting)
        self._own.append(Probed(now, name, rtt_s, connecting))

    def on_connection_lost(self, now: float, name: str) -> None:
        super().on_connection_lost(now, name)
        self._own.append(ConnectionLost(now, name))

    def decide(self, now: float, facts: RequestFacts, *, explain: bool = False) -> Decision:
        decision = Policy.decide(self, now, facts, explain=explain)
        own = self._own
        own.facts, own.decision = facts, decision
        if type(decision) is Send:
            own.append(Decided(now, facts, explain, decision, None))
        else:
            own.append(Decided(now, facts, explain, None, decision))  # type: ignore[arg-type]
        return decision

    def on_sent(self, now: float, facts: RequestFacts, send: Send, kind: str = "first") -> Attempt:
        attempt = Policy.on_sent(self, now, facts, send, kind)
        own = self._own
        attempt.number = own.sent
        own.attempts[own.sent] = attempt
        own.sent += 1
        own.append(Sent(now, kind, None if facts is own.facts else facts, None if send is own.decision else send))
        return attempt

    def on_reply(self, now: float, attempt: Attempt, outcome: Outcome) -> None:
        if not attempt.open:
            return
        Policy.on_reply(self, now, attempt, outcome)
        own = self._own
        del own.attempts[attempt.number]
        if outcome.code is not None:
            own.failed.append(attempt)
        own.append(Replied(now, attempt.number, outcome))

    def hedge(self, now: float, facts: RequestFacts, attempt: Attempt, tried: Sequence[str] = ()) -> Send | None:
        send = Policy.hedge(self, now, facts, attempt, tried)
        self._own.append(Hedged(now, attempt.number, facts, tuple(tried), send))
        return send

    def retry(
        self, now: float, facts: RequestFacts, attempt: Attempt, outcome: Outcome, tried: Sequence[str]
    ) -> Send | None:
        send = Policy.retry(self, now, facts, attempt, outcome, tried)
        self._own.append(Retried(now, attempt.number, facts, outcome, tuple(tried), send))
        return send


class _Notes:
    """What the recorder itself has to remember."""

    __slots__ = ("append", "attempts", "decision", "facts", "failed", "sent", "sink")

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.append = sink.append
        self.sent = 0
        self.attempts: dict[int, Attempt] = {}
        self.failed: deque[Attempt] = deque(maxlen=FAILED_MAX)
        self.facts: RequestFacts | None = None
        self.decision: Decision | None = None
