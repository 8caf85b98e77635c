"""The targets and the index from model and version to candidates."""

from __future__ import annotations

from nearcast.load import NodeReport, Tier
from router.policy.candidates import Candidates
from router.policy.config import PolicyConfig
from router.policy.state import VersionState
from router.policy.target import TargetState
from router.policy.tiers import TierGate

_TIER_MIN = 3
_IN_FLIGHT_MAX = 100_000
_INFINITY = float("inf")


class ModelIndex:
    """The candidates of one model. `newest` is the largest release that is hot somewhere; "" = none is."""

    __slots__ = ("newest", "versions")

    def __init__(self, versions: dict[str, Candidates]) -> None:
        self.versions = versions
        held = [version for table in versions.values() for version in table.versions]
        usable = [v for v in held if v.residency == "hot"] or [v for v in held if v.load_s]
        self.newest = max(usable, key=lambda v: (v.number, v.version)).version if usable else ""


class Fleet:
    """All targets of one router."""

    def __init__(self, config: PolicyConfig) -> None:
        self.targets: dict[str, TargetState] = {}
        self.configure(config)
        self.models: dict[str, ModelIndex] = {}
        self.gates: dict[str, TierGate] = {"cloud": TierGate(config)}
        self._queues: list[float] = []
        self._free_places: list[int] = []

    def configure(self, config: PolicyConfig) -> None:
        """Go on with other parameters; the next `refresh` brings the sums up to date."""
        self._config = config
        self._stale_s = config.stale_ms / 1e3
        for target in self.targets.values():
            target.configure(config)

    def add(self, now: float, name: str, tier: Tier, domain: str) -> bool:
        """Know a target. A target that came back keeps its open attempts; False if there are too many targets."""
        known = self.targets.get(name)
        if known is not None:
            # Also if it came back as another kind of node: requests of before are still open there.
            known.domain, known.gate = domain or name, self.gates.get(tier)
            if known.tier != tier:
                known.place_in(tier, self._config)
                self.settle(now, known)
            if known.gone:
                known.gone = False
                self.index(now, {version.model for version in known.versions.values()})
            return True
        if len(self.targets) >= self._config.targets_max:
            return False
        if self._free_places:
            place = self._free_places.pop()
        else:
            place = len(self._queues)
            self._queues.append(0.0)
        target = self.targets[name] = TargetState(name, tier, domain, self._config, self._queues, place)
        target.gate = self.gates.get(tier)
        return True

    def remove(self, now: float, name: str) -> None:
        """Send nothing there any more. The state stays while attempts are open."""
        target = self.targets.get(name)
        if target is None:
            return
        target.gone = True
        self.release(target)
        self.index(now, {version.model for version in target.versions.values()})

    def release(self, target: TargetState) -> None:
        """Forget a target that is gone and has no open attempts any more."""
        if target.gone and target.own == 0 and self.targets.get(target.name) is target:
            del self.targets[target.name]
            self._free_places.append(target.place)

    def report(self, now: float, target: TargetState, report: NodeReport) -> None:
        """Take a report. Only what changes the set of candidates rebuilds the tables of a model."""
        slots = max(1, min(report.slots, _IN_FLIGHT_MAX))
        unsettled = slots != target.slots or report.draining != target.draining
        target.slots, target.draining = slots, report.draining
        others = max(0, min(report.in_flight, _IN_FLIGHT_MAX)) - target.present
        if target.reported_at is None:
            target.others = others
        target.reported_at = now
        target.observe_others(others)
        target.weigh()
        seen: set[tuple[str, str]] = set()
        changed: set[str] = set()
        for claim in report.versions[: self._config.versions_max]:
            key = (claim.model, claim.version)
            seen.add(key)
            version = target.versions.get(key)
            if version is None:
                version = target.versions[key] = VersionState(target, claim.model, claim.version)
                changed.add(claim.model)
            elif claim == version.claimed and version.residency == "hot":
                continue  # as most of the time: nothing is new
            elif version.residency != claim.residency:
                changed.add(claim.model)
            version.claim(now, claim)
            unsettled = True
        for key in [key for key in target.versions if key not in seen]:
            del target.versions[key]
            changed.add(key[0])
        if changed:
            self.index(now, changed)
        if unsettled:
            self.settle(now, target)

    def settle(self, now: float, target: TargetState) -> None:
        """Bring the rows of one target up to date."""
        for version in target.versions.values():
            version.settle(now)

    def settle_tier(self, now: float, tier: str) -> None:
        """Bring the rows of all targets of a tier up to date."""
        for target in self.targets.values():
            if target.tier == tier:
                self.settle(now, target)

    def index(self, now: float, models: set[str]) -> None:
        """Rebuild the tables of some models."""
        held: dict[str, dict[str, list[VersionState]]] = {model: {} for model in models}
        for target in self.targets.values():
            for version in target.versions.values():
                if version.model in models and not target.gone:
                    held[version.model].setdefault(version.version, []).append(version)
        for model in sorted(models):
            if held[model]:
                tables = {name: Candidates(self._queues, rows, now) for name, rows in held[model].items()}
                self.models[model] = ModelIndex(tables)
            else:
                self.models.pop(model, None)

    def refresh(self, now: float, elapsed_s: float) -> None:
        """Apply what changes without events: ages, forgiveness, hot bounds; stale loads drift to the fleet's mean."""
        forgive = 0.5 ** (elapsed_s * 1e3 / self._config.error_half_life_ms)
        live = [target for target in self.targets.values() if not target.gone]
        mean = sum(target.others for target in live) / len(live) if live else 0.0
        for target in live:
            age_s = self._stale_s if target.reported_at is None else now - target.reported_at
            if age_s > self._stale_s:
                keep = 0.5 ** (elapsed_s / self._stale_s)
                target.others = target.others * keep + mean * (1.0 - keep)
            if elapsed_s > 0.0:
                target.count_rate(elapsed_s)
        self._mark_hot(live)
        for index in self.models.values():
            for table in index.versions.values():
                table.refresh(now, forgive)

    def _mark_hot(self, live: list[TargetState]) -> None:
        tiers: dict[str, list[TargetState]] = {}
        for target in live:
            tiers.setdefault(target.tier, []).append(target)
        for members in tiers.values():
            bound = _INFINITY
            if len(members) >= _TIER_MIN:
                busy = sorted((target.queue + target.slots - 1.0) / target.slots for target in members)
                bound = busy[min(len(busy) - 1, int(self._config.hot_quantile * len(busy)))]
            for target in members:
                # A target with a free slot is never hot.
                target.hot_above = max(bound * target.slots + 1.0 - target.slots, 1.0)
