"""What else could answer where the version asked for has nobody in time, or only behind a queue that is not for it.

In this order: another release that may answer, a target that is in time at its median, one that was set aside, and a
smaller model that stands in. Only then comes a refusal.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from router.policy import refuse
from router.policy.admission import Admission
from router.policy.candidates import Candidates
from router.policy.choose import Choice, Chooser
from router.policy.facts import Reject, RequestFacts
from router.policy.fleet import Fleet, ModelIndex
from router.policy.state import VersionState

_LOW_PRIORITY = 2
_STAND_INS_MAX = 4


class Found(NamedTuple):
    """A choice and why it is one. `model` stands in for the one asked for; "" = it is that one."""

    choice: Choice
    reason: str
    missed: bool = False
    model: str = ""


class Degrader:
    """Looks for the second best."""

    __slots__ = ("_admission", "_chooser", "_fleet")

    def __init__(self, fleet: Fleet, chooser: Chooser, admission: Admission) -> None:
        self._fleet = fleet
        self._chooser = chooser
        self._admission = admission

    def find(
        self, now: float, facts: RequestFacts, index: ModelIndex, version: str, limit_s: float, refusal: Reject | None
    ) -> Found | Reject:
        """The second best, or the refusal. `refusal` says why the request may not wait for the best; None = no such."""
        versions = index.versions
        wanted = [(version, False), *((name, True) for name in facts.fallbacks if name != version)]
        tables = [(versions[name], missed) for name, missed in wanted if name in versions]
        for table, missed in tables[:]:
            if missed:
                found = self._pick(now, facts, table, limit_s)
                if isinstance(found, Choice):
                    return Found(found, "fallback", missed)
                refusal = refusal or found
        if facts.priority < _LOW_PRIORITY:
            for panic in (False, True):
                for table, missed in tables:
                    found = self._pick_late(now, facts, table, limit_s, panic=panic)
                    if isinstance(found, Choice):
                        return Found(found, "panic" if panic else "late", missed)
                    refusal = refusal or found
        return self._stand_in(now, facts, tables, limit_s) or self._admission.spread(
            facts.model, refusal or self._refuse(now, facts, index, version, tables, limit_s)
        )

    def stand_ins(self, facts: RequestFacts, index: ModelIndex) -> list[tuple[str, Candidates]]:
        """The smaller models that may answer, newest release first. Never where state or a release is asked for."""
        if facts.sequence or facts.stateful or facts.pinned:
            return []
        held = [version for table in index.versions.values() for version in table.versions]
        if any(version.stateful for version in held):
            return []
        names = sorted({version.smaller for version in held if version.smaller} - {facts.model})[:_STAND_INS_MAX]
        found: list[tuple[str, Candidates]] = []
        for name in names:
            releases = self._fleet.models[name].versions if name in self._fleet.models else {}
            newest = sorted(releases.values(), key=lambda table: (table.versions[0].number, table.versions[0].version))
            found += [(name, table) for table in reversed(newest)]
        return found

    def _pick(self, now: float, facts: RequestFacts, table: Candidates, limit_s: float) -> Choice | Reject | None:
        choice = self._chooser.pick(now, table, facts, limit_s)
        if choice is None or choice.wait_s <= 0.0:
            return choice
        return self._admission.ration(now, facts, choice, table, limit_s, self._chooser)

    def _pick_late(
        self, now: float, facts: RequestFacts, table: Candidates, limit_s: float, *, panic: bool
    ) -> Choice | Reject | None:
        choice = self._chooser.pick_late(now, table, facts, limit_s, panic=panic)
        if choice is None or choice.wait_s <= 0.0:
            return choice
        return self._admission.ration(now, facts, choice, table, limit_s, self._chooser, late=True)

    def _stand_in(
        self, now: float, facts: RequestFacts, tables: list[tuple[Candidates, bool]], limit_s: float
    ) -> Found | None:
        index = self._fleet.models[facts.model]
        for name, table in self.stand_ins(facts, index) if tables else ():
            smaller = msgspec.structs.replace(facts, model=name)
            choice = self._chooser.pick(now, table, smaller, limit_s, _is_ready)
            if choice is not None and choice.wait_s > 0.0:
                rationed = self._admission.ration(now, smaller, choice, table, limit_s, self._chooser)
                choice = rationed if isinstance(rationed, Choice) and _is_ready(rationed.version) else None
            if choice is not None:
                return Found(choice, "smaller", model=name)
        return None

    def _refuse(
        self,
        now: float,
        facts: RequestFacts,
        index: ModelIndex,
        version: str,
        tables: list[tuple[Candidates, bool]],
        limit_s: float,
    ) -> Reject:
        every = [held for table, _ in tables for held in table.versions]
        if not every:
            return refuse.unknown_version(facts.model, version, index)
        offered = [held for held in every if held.offers(facts)]
        if not offered:
            return refuse.not_offered(facts, every)
        return refuse.nothing_feasible(now, offered, facts.size_bytes, limit_s, facts.remaining_s)


def _is_ready(version: VersionState) -> bool:
    return version.residency == "hot" and not version.stateful
