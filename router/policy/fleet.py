"""The targets and the index from model and version to candidates."""

from __future__ import annotations

from nearcast.load import NodeReport, Tier
from router.policy.config import PolicyConfig
from router.policy.state import TargetState, VersionState

_TIER_MIN = 3
_IN_FLIGHT_MAX = 100_000


class ModelIndex:
    """The candidates of one model. `newest` is the largest release that is hot somewhere; "" = none is."""

    __slots__ = ("newest", "versions")

    def __init__(self) -> None:
        self.versions: dict[str, list[VersionState]] = {}
        self.newest = ""


class Fleet:
    """All targets of one router."""

    def __init__(self, config: PolicyConfig) -> None:
        self._config = config
        self._stale_s = config.stale_ms / 1e3
        self.targets: dict[str, TargetState] = {}
        self.models: dict[str, ModelIndex] = {}

    def add(self, now: float, name: str, tier: Tier, domain: str) -> bool:
        """Know a target. A target that came back keeps its open attempts; False if there are too many targets."""
        known = self.targets.get(name)
        if known is not None:
            # Also if it came back as another kind of node: requests of before are still open there.
            known.tier, known.domain = tier, domain or name
            if known.gone:
                known.gone = False
                self.settle(now, known)
                self.index()
            return True
        if len(self.targets) >= self._config.targets_max:
            return False
        self.targets[name] = TargetState(name, tier, domain, self._config)
        return True

    def remove(self, now: float, name: str) -> None:
        """Send nothing there any more. The state stays while attempts are open."""
        target = self.targets.get(name)
        if target is None:
            return
        target.gone = True
        if target.own == 0:
            del self.targets[name]
        self.settle(now, target)
        self.index()

    def report(self, now: float, target: TargetState, report: NodeReport) -> None:
        """Take a report. Only what changes the set of candidates rebuilds the index."""
        target.slots = max(1, min(report.slots, _IN_FLIGHT_MAX))
        target.draining = report.draining
        claimed = float(max(0, min(report.in_flight, _IN_FLIGHT_MAX)))
        target.others = max(0.0, claimed - target.own) if target.reported_at is None else target.others
        target.reported_at = now
        target.observe_others(max(0.0, claimed - target.own))
        seen: set[tuple[str, str]] = set()
        changed = False
        for claim in report.versions:
            key = (claim.model, claim.version)
            seen.add(key)
            version = target.versions.get(key)
            if version is None:
                version = target.versions[key] = VersionState(target, claim.model, claim.version)
                changed = True
            changed = changed or version.residency != claim.residency
            version.claim(now, claim)
        for key in [key for key in target.versions if key not in seen]:
            del target.versions[key]
            changed = True
        self.settle(now, target)
        if changed:
            self.index()

    def settle(self, now: float, target: TargetState) -> None:
        """Bring the sums of one target up to date."""
        for version in target.versions.values():
            version.settle(now)

    def index(self) -> None:
        """Rebuild the lists of candidates."""
        models: dict[str, ModelIndex] = {}
        for target in self.targets.values():
            if target.gone:
                continue
            for version in target.versions.values():
                index = models.get(version.model)
                if index is None:
                    index = models[version.model] = ModelIndex()
                index.versions.setdefault(version.version, []).append(version)
        for index in models.values():
            held = [v for versions in index.versions.values() for v in versions]
            usable = [v for v in held if v.residency == "hot"] or [v for v in held if v.load_s]
            index.newest = max(usable, key=lambda v: (v.number, v.version)).version if usable else ""
        self.models = models

    def refresh(self, now: float, elapsed_s: float) -> None:
        """Apply what changes without events: ages, forgiveness, hot bounds; stale loads drift to the fleet's mean."""
        forgive = 0.5 ** (elapsed_s * 1e3 / self._config.error_half_life_ms)
        live = [target for target in self.targets.values() if not target.gone]
        mean = sum(target.others for target in live) / len(live) if live else 0.0
        for target in live:
            age_s = self._stale_s if target.reported_at is None else now - target.reported_at
            if age_s > self._stale_s and target.others > 0.0:
                keep = 0.5 ** (elapsed_s / self._stale_s)
                target.others = target.others * keep + mean * (1.0 - keep)
                target.load = target.own + target.others
            for version in target.versions.values():
                version.error *= forgive
                version.window.prune(now)
                version.settle(now)
        self._mark_hot(live)

    def _mark_hot(self, live: list[TargetState]) -> None:
        tiers: dict[str, list[TargetState]] = {}
        for target in live:
            tiers.setdefault(target.tier, []).append(target)
        for members in tiers.values():
            bound = float("inf")
            if len(members) >= _TIER_MIN:
                loads = sorted(target.load for target in members)
                bound = loads[min(len(loads) - 1, int(self._config.hot_quantile * len(loads)))]
            for target in members:
                # A target with a free slot is never hot.
                target.hot_above = max(bound, float(target.slots))
