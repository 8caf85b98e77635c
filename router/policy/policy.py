"""The state machine: events in, decisions out. One request: `decide`, then per send `on_sent` and `on_reply`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from nearcast.errors import Code
from nearcast.load import NodeReport, Tier
from router.policy import explanation, refuse
from router.policy.admission import Admission, rank_of
from router.policy.budget import TokenBudget
from router.policy.candidates import Candidates
from router.policy.choose import Choice, Chooser
from router.policy.config import LASTING, PolicyConfig
from router.policy.degrade import Degrader, Found
from router.policy.events import MISPLACED, Attempt, Outcome
from router.policy.facts import Decision, Reject, RequestFacts, Send
from router.policy.fleet import Fleet
from router.policy.generator import SplitMix
from router.policy.health import Health
from router.policy.hedge import Hedger, hedge_delay_s
from router.policy.learn import Learner
from router.policy.sequences import Sequences
from router.policy.state import VersionState
from router.policy.target import TargetState

_FOREVER_S = 1e9
_SETTLE_PAUSE_S = 0.001
_DOUBTED = "second_opinion"
_STATE_IS_LOST = frozenset({"gone", "draining", "connection_lost", "away", "not_resident"})


class Policy:
    """Chooses targets. Not thread-safe; `now` is a monotonic instant in seconds that never goes back.

    Args:
        config: all parameters.
        seed: of the policy's own generator: the same events and seed give the same decisions.
        random: draws from [0, 1) instead of that generator.

    In-flight invariant: the sum of `own` over all targets equals the number of open attempts, always.
    """

    def __init__(self, config: PolicyConfig, seed: int = 0, *, random: Callable[[], float] | None = None) -> None:
        self.config = config
        self._fleet = Fleet(config)
        self._generator = SplitMix(seed)
        draw = random or self._generator.random
        self._chooser = Chooser(config, draw)
        self._health = Health(config, self._fleet)
        self._learner = Learner(config, self._fleet, self._health)
        self._admission = Admission(config, draw, self._health.full)
        self._degrader = Degrader(self._fleet, self._chooser, self._admission)
        self._hedger = Hedger(
            share=config.hedge_share,
            burst=config.hedge_burst,
            brownout_share=config.brownout_share,
            brownout_smoothing=config.brownout_smoothing,
        )
        self._retries = TokenBudget(share=config.retry_share, burst=config.retry_burst, per_s=config.retry_per_s)
        self._sequences = Sequences(config.sequences_max)
        self._take_times(config)
        self._refreshed_at: float | None = None
        self.outstanding = 0

    def reconfigure(self, now: float, config: PolicyConfig) -> None:
        """Go on with other parameters, and with everything that was learnt. Those in `LASTING` must be the same.

        Raises:
            ValueError: if one of them is not.
        """
        if changed := [name for name in sorted(LASTING) if getattr(config, name) != getattr(self.config, name)]:
            raise ValueError(f"{', '.join(changed)} hold for the whole life of a policy")
        self.config = config
        for part in (self._fleet, self._chooser, self._health, self._learner, self._admission):
            part.configure(config)
        self._hedger.configure(
            share=config.hedge_share,
            burst=config.hedge_burst,
            brownout_share=config.brownout_share,
            brownout_smoothing=config.brownout_smoothing,
        )
        self._retries.configure(share=config.retry_share, burst=config.retry_burst, per_s=config.retry_per_s)
        self._take_times(config)
        self._refresh(now)

    # What is known ---------------------------------------------------------------------------------------------------

    @property
    def models(self) -> dict[str, tuple[str, ...]]:
        """Models and the versions that some target holds."""
        return {model: tuple(sorted(index.versions)) for model, index in self._fleet.models.items()}

    @property
    def targets(self) -> tuple[TargetState, ...]:
        """All targets, also removed ones with open attempts. For reading only."""
        return tuple(self._fleet.targets.values())

    @property
    def hedger(self) -> Hedger:
        """Budget and brown-out gates. For reading only."""
        return self._hedger

    @property
    def retries(self) -> TokenBudget:
        """The budget of retries. For reading only."""
        return self._retries

    def newest(self, model: str) -> str:
        """The largest release of a model that is hot on some target; "" = none."""
        index = self._fleet.models.get(model)
        return index.newest if index is not None else ""

    def holders(self, model: str, version: str = "", *, loading: bool = False) -> tuple[str, ...]:
        """Names of the targets that hold a version hot or load it on demand ("" = any version; or `loading` it now)."""
        index = self._fleet.models.get(model)
        if index is None:
            return ()
        lists = index.versions.values() if not version else [index.versions.get(version)]
        held = [v for table in lists if table for v in table.versions]
        return tuple(v.target.name for v in held if loading or v.residency == "hot" or v.load_s)

    def utilisation(self, name: str) -> float:
        """Requests believed to be on a target, per slot; infinite for one that is not known."""
        target = self._fleet.targets.get(name)
        return _FOREVER_S if target is None else target.load / target.slots

    # Targets come, go and speak --------------------------------------------------------------------------------------

    def add_target(self, now: float, name: str, tier: Tier, domain: str = "") -> bool:
        """Know a target from now on. `domain` groups targets that fail together. False = there are too many."""
        return self._fleet.add(now, name, tier, domain)

    def remove_target(self, now: float, name: str) -> None:
        """Choose a target no more."""
        self._fleet.remove(now, name)

    def on_report(self, now: float, name: str, report: NodeReport) -> None:
        """A target spoke for itself."""
        target = self._fleet.targets.get(name)
        if target is not None:
            self._fleet.report(now, target, report)

    def on_probe(self, now: float, name: str, rtt_s: float | None, *, connecting: bool = False) -> None:
        """A probe was answered after `rtt_s`, or not at all (None).

        `connecting`: the time holds the making of the connection, too, and so is no round trip.
        """
        target = self._fleet.targets.get(name)
        if target is None:
            return
        if rtt_s is None:
            target.breaker.open(now)
        else:
            if not connecting:
                target.observe_probe(now, rtt_s)
            target.breaker.probe_succeeded()
        self._fleet.settle(now, target)

    def on_connection_lost(self, now: float, name: str) -> None:
        """The connection to a target broke: nothing goes there until it has had time, or answers a probe."""
        target = self._fleet.targets.get(name)
        if target is not None:
            self._learner.lose(now, target)

    # One request -----------------------------------------------------------------------------------------------------

    def decide(self, now: float, facts: RequestFacts, *, explain: bool = False) -> Decision:
        """Where the request goes, or why nowhere. Only `on_sent` counts it.

        With `explain` it comes with the terms of every candidate, and later decisions are as if nobody had asked.
        """
        if explain:
            return self._explain(now, facts)
        if self._refreshed_at is None or now - self._refreshed_at >= self._refresh_s:
            self._refresh(now)
        index = self._fleet.models.get(facts.model)
        if index is None:
            return refuse.unknown_model(facts.model, self._fleet.models)
        remaining = facts.remaining_s
        limit = _FOREVER_S if remaining is None else remaining - self._reserve_s
        decision: Decision | None = None
        if facts.sequence:
            decision = self._bound(now, facts, index.versions, limit)
        if decision is None:
            version = facts.version or index.newest
            table = index.versions.get(version)
            choice = self._chooser.pick(now, table, facts, limit) if table is not None else None
            refusal: Reject | None = None
            if choice is not None:
                if choice.wait_s > 0.0 and table is not None:
                    choice, refusal = self._ration(now, facts, choice, table, limit)
                elif self._admission.queues:
                    self._admission.relax(facts.model)
            if choice is not None:
                decision = self._send(facts, choice, limit, "best")
            else:
                found = self._degrader.find(now, facts, index, version, limit, refusal)
                decision = found if isinstance(found, Reject) else self._send_found(facts, found, limit)
            if facts.sequence:
                decision = self._say_moved(facts, decision)
        return decision

    def on_sent(self, now: float, facts: RequestFacts, send: Send, kind: str = "first") -> Attempt:
        """The request leaves for `send.target`. `kind` is first, hedge or retry.

        Raises:
            KeyError: if the target is not known any more; decide again.
        """
        target = self._fleet.targets[send.target]
        version = target.versions.get((send.model or facts.model, send.version))
        if version is None:
            # Forwarded to us, or the report has just changed: count it all the same.
            version = VersionState(target, send.model or facts.model, send.version)
        rank = rank_of(facts.priority)
        share = self._admission.tenants.share(version.model, facts.tenant, rank).parts[rank]
        share.enter()
        first = kind == "first"
        timed = first and send.hedge_after_s is not None
        attempt = Attempt(version, now, facts.size_bytes, kind, target.enter(), facts.remaining_s, share, timed)
        version.own += 1
        self.outstanding += 1
        if version.forgiven:
            version.settle(now)
        if not version.plain:
            gates = (target.breaker, version.breaker, target.gate)
            attempt.trials = tuple(gate for gate in gates if gate is not None and gate.start_trial())
        if first:
            self._hedger.budget.earn()
            self._retries.earn()
        elif send.reason == _DOUBTED:
            attempt.doubted = True
        if facts.sequence and (facts.stateful or version.stateful):
            self._sequences.bind(facts.tenant, facts.model, facts.sequence, send.target, send.version)
        return attempt

    def on_reply(self, now: float, attempt: Attempt, outcome: Outcome) -> None:
        """The attempt is over. A second call for the same attempt changes nothing."""
        if not attempt.open:
            return
        attempt.open = False
        attempt.share.leave()
        version = attempt.version
        target = version.target
        self.outstanding -= 1
        target.own -= 1
        version.own -= 1
        target.answered += 1
        target.weigh()
        for breaker in attempt.trials:
            breaker.end_trial()
        if target.gone:
            self._fleet.release(target)
        if attempt.timed and not attempt.passed_delay:
            self._hedger.gate(target.tier).note(0.0)
        if outcome.code is None:
            self._learner.take_answer(now, attempt, outcome)
        elif attempt.doubted and outcome.code is Code.INTERNAL:
            # Two fail alike: rather the request is to blame than both, and the first has answered for it.
            self._fleet.settle(now, target)
        else:
            self._learner.take_failure(now, attempt, outcome, outcome.code)
        if outcome.code is not None:
            version.settle(now)
        elif now - version.settled_at >= _SETTLE_PAUSE_S:
            # An ordinary answer of an ordinary candidate changes nothing but what was measured.
            (version.measure if version.plain else version.settle)(now)

    def hedge(self, now: float, facts: RequestFacts, attempt: Attempt, tried: Sequence[str] = ()) -> Send | None:
        """Asked when a hedge delay has passed: where a copy goes, or None. `facts.remaining_s` is what is left now.

        Same version, another target (in another failure domain if there is one), that would begin within one run, and
        able to answer in time at its 95th percentile; within the budget and outside a brown-out.
        """
        if not attempt.open:
            return None
        if attempt.timed and not attempt.passed_delay:
            attempt.passed_delay = True
            self._hedger.gate(attempt.version.target.tier).note(1.0)
        if self._keeps_state(facts, attempt.version) or not facts.idempotent:
            return None
        limit = _FOREVER_S if facts.remaining_s is None else facts.remaining_s - self._reserve_s
        own = attempt.version.target
        model = attempt.version.model
        table = self._table(model, attempt.release)
        if table is None:
            return None

        def free(v: VersionState) -> bool:
            return v.target is not own and v.target.queue <= v.target.slots and v.target.name not in tried

        def away(v: VersionState) -> bool:
            return v.target.domain != own.domain and free(v)

        pick = self._chooser.pick
        choice = pick(now, table, facts, limit, away) or pick(now, table, facts, limit, free)
        if choice is None:
            self._hedger.denied["nowhere"] += 1
            return None
        if not self._hedger.take(now, own.tier):
            return None
        stand_in = "" if model == facts.model else model
        return Send(choice.version.target.name, attempt.release, None, (), "hedge", model=stand_in)

    def retry(
        self, now: float, facts: RequestFacts, attempt: Attempt, outcome: Outcome, tried: Sequence[str]
    ) -> Send | None:
        """Asked after a failed attempt: where it is sent once more, or None. `tried` holds every target so far.

        A send that never left is free; every other one costs a token. What may have run is repeated only without state.
        """
        code = outcome.code
        if code is None or len(tried) >= self.config.attempts_max:
            return None
        refused = code in MISPLACED or (code is Code.UNAVAILABLE and not outcome.sent)
        if not refused:
            if code not in (Code.UNAVAILABLE, Code.INTERNAL, Code.OVERLOADED):
                return None
            if self._keeps_state(facts, attempt.version):
                return None
            if code is not Code.OVERLOADED and not facts.idempotent:
                return None
        limit = _FOREVER_S if facts.remaining_s is None else facts.remaining_s - self._reserve_s
        lost = code is Code.UNAVAILABLE and limit > 0.0
        model = attempt.version.model
        stand_in = "" if model == facts.model else model
        for version in (attempt.release, *(() if stand_in else facts.fallbacks)):
            # Who does not serve this version may serve the fallback.
            here_too = code in MISPLACED and version != attempt.release
            table = self._table(model, version)
            if table is None:
                continue

            def keep(v: VersionState, here_too: bool = here_too) -> bool:  # noqa: FBT001
                return here_too or v.target.name not in tried

            choice = (
                self._chooser.pick(now, table, facts, limit, keep)
                or self._chooser.pick_late(now, table, facts, limit, keep)
                # Who was set aside is better than nobody; who may be late, by our guess, better than a sure failure.
                or self._chooser.pick_late(now, table, facts, _FOREVER_S if lost else limit, keep, panic=True)
            )
            if choice is not None:
                if not refused and not self._retries.spend(now):
                    return None
                missed = version != attempt.release
                reason = _DOUBTED if code is Code.INTERNAL else "retry"
                return Send(choice.version.target.name, version, None, (), reason, missed, (), stand_in)
        return None

    # Inside ----------------------------------------------------------------------------------------------------------

    def _take_times(self, config: PolicyConfig) -> None:
        self._reserve_s = config.reserve_ms / 1e3
        self._delay_min_s = config.hedge_delay_ms_min / 1e3
        self._refresh_s = config.refresh_ms / 1e3

    def _refresh(self, now: float) -> None:
        elapsed = 0.0 if self._refreshed_at is None else now - self._refreshed_at
        self._refreshed_at = now
        self._fleet.refresh(now, elapsed)
        self._health.refresh(now)
        self._admission.sweep(now, self._fleet.models)

    def _table(self, model: str, version: str) -> Candidates | None:
        index = self._fleet.models.get(model)
        return index.versions.get(version) if index is not None else None

    def _keeps_state(self, facts: RequestFacts, version: VersionState) -> bool:
        return facts.stateful or version.stateful

    def _send(self, facts: RequestFacts, choice: Choice, limit: float, reason: str) -> Send:
        version, second = choice.version, choice.second
        if second is None:
            return Send(version.target.name, version.version, None, (), reason)
        delay: float | None = None
        if facts.idempotent and not version.stateful and not facts.stateful:
            delay = hedge_delay_s(choice.t95_s, choice.second_t95_s, limit, self._delay_min_s, self._hedger.patience)
        return Send(version.target.name, version.version, delay, (second.target.name,), reason)

    def _send_found(self, facts: RequestFacts, found: Found, limit: float) -> Send:
        send = self._send(facts, found.choice, limit, found.reason)
        return msgspec.structs.replace(send, missed=found.missed, model=found.model)

    def _bound(self, now: float, facts: RequestFacts, versions: dict[str, Candidates], limit: float) -> Decision | None:
        """A known sequence goes to the target that holds its state, as the version that it began with."""
        binding = self._sequences.get(facts.tenant, facts.model, facts.sequence)
        if binding is None or (facts.pinned and facts.version != binding[1]):
            return None
        name, release = binding
        table = versions.get(release)
        held = [v for v in table.versions if v.target.name == name] if table is not None else []
        if table is None or not held or held[0].obstacle(now)[0] in _STATE_IS_LOST:
            return None
        choice = self._chooser.pick_late(now, table, facts, limit, lambda v: v is held[0], panic=True)
        if choice is None:
            return refuse.nothing_feasible(now, held, facts.size_bytes, limit, facts.remaining_s)
        granted, refusal = self._ration(now, facts, choice, table, limit, late=True)
        if refusal is not None:
            return self._admission.spread(facts.model, refusal)
        return None if granted is None else Send(name, release, None, (), "sequence")

    def _say_moved(self, facts: RequestFacts, decision: Decision) -> Decision:
        """State never moves: whoever gets a sequence that another target held must say so, and so do we."""
        binding = self._sequences.get(facts.tenant, facts.model, facts.sequence)
        if binding is None or not isinstance(decision, Send) or binding == (decision.target, decision.version):
            return decision
        return msgspec.structs.replace(decision, reason="moved", hedge_after_s=None)

    def _ration(
        self,
        now: float,
        facts: RequestFacts,
        choice: Choice,
        table: Candidates,
        limit: float,
        *,
        late: bool = False,
    ) -> tuple[Choice | None, Reject | None]:
        if choice.wait_s <= 0.0:
            return choice, None
        found = self._admission.ration(now, facts, choice, table, limit, self._chooser, late=late)
        return (None, found) if isinstance(found, Reject) else (found, None)

    def _explain(self, now: float, facts: RequestFacts) -> Decision:
        drawn = self._generator.state
        with self._admission.rehearsal():
            decision = Policy.decide(self, now, facts)
        self._generator.state = drawn
        index = self._fleet.models.get(facts.model)
        if index is None:
            return decision
        limit = _FOREVER_S if facts.remaining_s is None else facts.remaining_s - self._reserve_s
        # A bound sequence goes on with the version that it began with, whatever is asked for.
        bound = (decision.version,) if isinstance(decision, Send) and not decision.model else ()
        names = dict.fromkeys((facts.version or index.newest, *facts.fallbacks, *bound))
        tables = [("", index.versions[name]) for name in names if name in index.versions]
        return explanation.explain(now, facts, decision, tables + self._degrader.stand_ins(facts, index), limit)
