"""Logged decisions once more: the same code in virtual time, and with other settings what it would have done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from nearcast.errors import Code, MeshError
from router.policy import Attempt, Decision, Policy, PolicyConfig, RequestFacts, Send
from router.policy import checkpoint as checkpoints
from router.policy.log import (
    FORMAT,
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
    Start,
    TargetAdded,
    TargetRemoved,
    decode,
    read_config,
)

CLOSED_MAX = 10_000
"""Closed attempts that are remembered, because a retry may still be asked for them."""
Settings: TypeAlias = Callable[[PolicyConfig], PolicyConfig]
Answer: TypeAlias = Decision | bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A record, counted from 1, at which the replay says something else."""

    record: int
    call: str
    now: float
    logged: Answer
    replayed: Answer


@dataclass(slots=True, kw_only=True)
class ReplayResult:
    """What a replay saw.

    Attributes:
        records: replayed.
        sends: by kind: first, hedge, retry, forwarded.
        decisions: answers compared, by call: `decide`, `hedge`, `retry`, `add_target`.
        different: how many of them are others.
        first: the first of those.
        changes: what became what, by number.
        gaps: places where records are missing, with how many (0 = nobody knows).
        skipped: records that speak of attempts before the log's begin, or from within a gap.
    """

    records: int = 0
    sends: Counter[str] = field(default_factory=Counter)
    decisions: Counter[str] = field(default_factory=Counter)
    different: Counter[str] = field(default_factory=Counter)
    first: Difference | None = None
    changes: Counter[tuple[str, str]] = field(default_factory=Counter)
    gaps: list[tuple[str, int]] = field(default_factory=list)
    skipped: int = 0

    @property
    def identical(self) -> bool:
        """Whether every answer is the logged one."""
        return not self.different


def read(paths: Sequence[Path]) -> Iterable[Record]:
    """The records of files in the order in which they were written.

    Raises:
        MeshError: if a file cannot be read or is no decision log.
    """
    for path in sorted(paths, key=lambda path: path.name):
        try:
            data = path.read_bytes()
        except OSError as error:
            raise MeshError(Code.INVALID_REQUEST, f"{path} cannot be read: {error.strerror}.") from error
        yield from decode(data)


def replay(records: Iterable[Record], settings: Settings | None = None) -> ReplayResult:
    """Drive a policy with the logged calls and compare what it says.

    Args:
        records: of one or more runs, in order.
        settings: makes other settings of the logged ones. History stays as it was: each decision is asked for after
            what really happened, and counts as another one if it names another target or reason. After a checkpoint
            such a policy begins with the targets alone and warms up.

    Raises:
        MeshError: if the log or a checkpoint was written by a release that differs too much.
    """
    player = _Player(settings)
    for record in records:
        player.play(record)
    return player.result


class _Player:
    def __init__(self, settings: Settings | None) -> None:
        self.result = ReplayResult()
        self._settings = settings
        self._policy: Policy | None = None
        self._start: Start | None = None
        self._attempts: dict[int, Attempt] = {}
        self._closed: dict[int, Attempt] = {}
        self._sent = 0
        self._last: tuple[RequestFacts, Decision | None] | None = None

    def play(self, record: Record) -> None:
        if isinstance(record, Start):
            self._begin(record)
        elif isinstance(record, Checkpoint):
            if self._policy is None:
                self._resume(record)
        elif self._policy is None:
            self.result.skipped += 1
        else:
            self.result.records += 1
            self._call(self._policy, record)

    def _call(self, policy: Policy, record: Record) -> None:
        match record:
            case Decided(now, facts, explain):
                self._last = facts, record.decision
                self._compare(now, "decide", record.decision, policy.decide(now, facts, explain=explain))
            case Sent():
                self._send(policy, record)
            case TargetAdded(now, name, tier, domain, known):
                self._compare(now, "add_target", known, policy.add_target(now, name, tier, domain))
            case TargetRemoved(now, name):
                policy.remove_target(now, name)
            case Reconfigured(now, config):
                policy.reconfigure(now, self._configure(config))
            case Reported(now, name, report):
                policy.on_report(now, name, report)
            case Probed(now, name, rtt_s, connecting):
                policy.on_probe(now, name, rtt_s, connecting=connecting)
            case ConnectionLost(now, name):
                policy.on_connection_lost(now, name)
            case Replied() | Hedged() | Retried():
                self._follow(policy, record)

    def _begin(self, start: Start) -> None:
        """The head of a file: a new policy, the same one going on, or a gap."""
        if start.format != FORMAT:
            raise MeshError(Code.UNSUPPORTED, f"Release {start.release} wrote this log in another format; use it.")
        before, self._start = self._start, start
        if start.number == 0:
            self._reset(Policy(self._configure(start.config), start.seed), 0, ())
        elif before is None or before.run != start.run or before.number != start.number - 1 or start.lost:
            self._policy = None
            if before is not None:
                self.result.gaps.append((f"before file {start.number} of run {start.run}", start.lost))

    def _resume(self, record: Checkpoint) -> None:
        assert self._start is not None
        logged, attempts = checkpoints.load(record.state)
        if self._settings is None:
            self._reset(logged, record.sent, attempts)
            return
        policy = Policy(self._configure(self._start.config), self._start.seed)
        for target in logged.targets:
            if not target.gone:
                policy.add_target(record.now, target.name, target.tier, target.domain)
        self._reset(policy, record.sent, ())

    def _reset(self, policy: Policy, sent: int, attempts: tuple[Attempt, ...]) -> None:
        self._policy, self._sent, self._last = policy, sent, None
        self._attempts = {attempt.number: attempt for attempt in attempts if attempt.open}
        self._closed = {attempt.number: attempt for attempt in attempts if not attempt.open}

    def _configure(self, logged: dict[str, Any]) -> PolicyConfig:
        config = read_config(logged)
        return config if self._settings is None else self._settings(config)

    def _send(self, policy: Policy, record: Sent) -> None:
        number, self._sent = self._sent, self._sent + 1
        self.result.sends[record.kind] += 1
        facts, send = record.facts, record.send
        if self._last is not None:
            facts = facts or self._last[0]
            if send is None and isinstance(self._last[1], Send):
                send = self._last[1]
        if facts is None or send is None:
            self.result.skipped += 1
            return
        try:
            self._attempts[number] = policy.on_sent(record.now, facts, send, record.kind)
        except KeyError:
            # With other settings a target may not be known.
            self.result.skipped += 1

    def _follow(self, policy: Policy, record: Replied | Hedged | Retried) -> None:
        attempt = self._attempts.get(record.attempt) or self._closed.get(record.attempt)
        if attempt is None:
            self.result.skipped += 1
        elif isinstance(record, Replied):
            policy.on_reply(record.now, attempt, record.outcome)
            self._attempts.pop(record.attempt, None)
            self._closed[record.attempt] = attempt
            if len(self._closed) > CLOSED_MAX:
                del self._closed[next(iter(self._closed))]
        elif isinstance(record, Hedged):
            send = policy.hedge(record.now, record.facts, attempt, record.tried)
            self._compare(record.now, "hedge", record.send, send)
        else:
            send = policy.retry(record.now, record.facts, attempt, record.outcome, record.tried)
            self._compare(record.now, "retry", record.send, send)

    def _compare(self, now: float, call: str, logged: Answer, replayed: Answer) -> None:
        result = self.result
        result.decisions[call] += 1
        if logged == replayed or (self._settings is not None and _name(call, logged) == _name(call, replayed)):
            return
        result.different[call] += 1
        result.changes[_name(call, logged), _name(call, replayed)] += 1
        if result.first is None:
            result.first = Difference(record=result.records, call=call, now=now, logged=logged, replayed=replayed)


def _name(call: str, decision: Answer) -> str:
    """A decision in one or two words, so that alike changes can be counted."""
    if isinstance(decision, Send):
        words = f"{decision.target} ({decision.reason})"
        return words if call != "decide" or decision.hedge_after_s is None else f"{words}, may hedge"
    if isinstance(decision, bool) or decision is None:
        return f"{call}: {'no' if not decision else 'yes'}"
    return f"refused ({decision.reason or decision.code})"
