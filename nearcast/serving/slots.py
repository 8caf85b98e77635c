"""One model on this node: its pointer, its hot versions, and which of them answers what."""

from __future__ import annotations

import asyncio
from typing import Literal, TypeAlias

import msgspec

from nearcast.errors import Code, MeshError
from nearcast.handler import InferRequest, RequestContext
from nearcast.serving.shadow import Pair
from nearcast.serving.statistics import Statistics, quantile_us
from nearcast.serving.version import HotVersion
from nearcast.store import Manifest, Pointer

State: TypeAlias = Literal["hot", "loading", "failed", "cold"]
"""`cold`: on disk, and not loaded because memory is short or nothing asked for it."""


class VersionStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One version as the agent and the operator see it. `errors` counts what the model failed; `codes` all errors.

    `p50_us` and `p99_us` are of the model's time; `latency` counts answers by bucket of their whole time on this node,
    as in `statistics`, only buckets that are used. `compared`, `disagreed`: see `shadow`.
    """

    release: int
    state: State
    error: str = ""
    semver: str = ""
    requests: int = 0
    errors: int = 0
    p50_us: float = 0.0
    p99_us: float = 0.0
    in_flight: int = 0
    inline: bool = False
    codes: dict[str, int] = {}
    latency: dict[str, int] = {}
    compared: int = 0
    disagreed: int = 0


class Slot(msgspec.Struct, eq=False):
    """The mutable state of one model. Only the host changes it, on the loop.

    Attributes:
        since: when each hot version became so, in monotonic seconds.
        cold: releases that wait for a request before they are loaded: memory was short.
        waiting: requests for each release that is not hot yet.
        manifests: of what is wanted or hot.
        load_s: how long the last load took; 0 = none yet.
        pinned: what serves this model is never sent away.
    """

    name: str
    pointer: Pointer = msgspec.field(default_factory=Pointer)
    stable: HotVersion | None = None
    by_name: dict[str, HotVersion] = msgspec.field(default_factory=dict)
    hot: dict[int, HotVersion] = msgspec.field(default_factory=dict)
    draining: set[HotVersion] = msgspec.field(default_factory=set)
    since: dict[int, float] = msgspec.field(default_factory=dict)
    loading: dict[int, float] = msgspec.field(default_factory=dict)
    cold: set[int] = msgspec.field(default_factory=set)
    waiting: dict[int, int] = msgspec.field(default_factory=dict)
    manifests: dict[int, Manifest] = msgspec.field(default_factory=dict)
    load_s: float = 0.0
    pinned: bool = False
    failed: dict[int, str] = msgspec.field(default_factory=dict)
    problem: str = ""
    turn: asyncio.Lock = msgspec.field(default_factory=asyncio.Lock)
    pair: Pair | None = None

    def wanted(self) -> tuple[int, ...]:
        """Releases to have in memory, the most important first."""
        pointer = self.pointer
        found = (pointer.stable, pointer.candidate, pointer.last_good)
        return tuple(dict.fromkeys(release for release in found if release is not None))

    def route(self) -> None:
        """Flip to what the pointer says, as far as it is hot; until the stable release is, the old one serves."""
        if self.pointer.stable is None:
            self.stable = None
        elif (stable := self.hot.get(self.pointer.stable)) is not None:
            self.stable = stable
        names: dict[str, HotVersion] = {}
        for release in sorted(self.hot):
            names[self.hot[release].manifest.semver] = self.hot[release]
        # A release number always wins over a semver that looks like one.
        self.by_name = names | {version.wire_version: version for version in self.hot.values()}
        self.pair = self._pair()

    def _pair(self) -> Pair | None:
        """The version on trial and its reference: the candidate and stable, else stable and what it replaced."""
        pointer = self.pointer
        trial = self.hot.get(pointer.candidate or pointer.stable or 0)
        reference = self.hot.get((pointer.stable if pointer.candidate else pointer.last_good) or 0)
        pair = Pair(trial, reference) if trial is not None and reference is not None else None
        return pair if pair is not None and pair.comparable else None

    def unused(self) -> list[HotVersion]:
        """Hot versions that the pointer no longer names and that answer nothing."""
        wanted = self.wanted()
        return [v for release, v in self.hot.items() if release not in wanted and v is not self.stable]

    def needs(self, version: HotVersion) -> bool:
        """Whether a version answers requests by the pointer, and is no mere fallback."""
        return version is self.stable or version.release in (self.pointer.stable, self.pointer.candidate)

    def choose(self, request: InferRequest, context: RequestContext) -> HotVersion | None:
        """The hot version that answers a request; None if the one asked for is not hot."""
        wanted = context.version or request.version
        version = self.by_name.get(wanted) if wanted else self.stable
        if (version is None or version.stateful) and not request.version:
            version = self._keeping_sequence(request, context, version)
        return version

    def on_demand(self, version: str) -> int | None:
        """The release of that name ("" = stable) if it is cold and a request may bring it in."""
        releases = {str(release): release for release in self.wanted()}
        semvers = {self.manifests[release].semver: release for release in self.wanted() if release in self.manifests}
        release = (semvers | releases).get(version) if version else self.pointer.stable
        return release if release in self.cold else None

    def manifest(self, version: str) -> Manifest:
        """The manifest of a version that answers, or would once it is loaded; "" = stable.

        Raises:
            MeshError: VERSION_MISMATCH or UNAVAILABLE.
        """
        found = self.by_name.get(version) if version else self.stable
        if found is not None:
            return found.manifest
        release = self.on_demand(version)
        if release is None or release not in self.manifests:
            raise self.mismatch(version) if version else self.unavailable()
        return self.manifests[release]

    def mismatch(self, wanted: str) -> MeshError:
        """The error for a version that is not hot here."""
        hot = ", ".join(str(release) for release in sorted(self.hot)) or "none"
        return MeshError(
            Code.VERSION_MISMATCH, f"Model {self.name} has no version {wanted[:64]!r} here; hot releases: {hot}."
        )

    def unavailable(self) -> MeshError:
        """The error while no version answers."""
        stable = self.pointer.stable
        if stable in self.loading:
            return MeshError(
                Code.UNAVAILABLE, f"Model {self.name} release {stable} is still loading.", retry_after_ms=100
            )
        if stable is not None and stable in self.failed:
            return MeshError(Code.UNAVAILABLE, f"Model {self.name} release {stable} could not be loaded on this node.")
        return MeshError(Code.UNAVAILABLE, f"Model {self.name} has no active version on this node.")

    def status(self, statistics: dict[tuple[str, int], Statistics]) -> tuple[VersionStatus, ...]:
        """Every version that is in use or in memory, by release."""
        releases = sorted({*self.wanted(), *self.hot, *self.loading})
        return tuple(self._status(release, statistics.get((self.name, release))) for release in releases)

    def _status(self, release: int, statistics: Statistics | None) -> VersionStatus:
        version = self.hot.get(release)
        state: State = "cold"
        if version is not None:
            state = "hot"
        elif release in self.loading:
            state = "loading"
        elif release in self.failed:
            state = "failed"
        counted = statistics or Statistics()
        return VersionStatus(
            release=release,
            state=state,
            error=self.failed.get(release, "") if state == "failed" else "",
            semver=self.manifests[release].semver if release in self.manifests else "",
            requests=counted.requests,
            errors=counted.errors,
            p50_us=round(quantile_us(counted.compute, 0.5), 1),
            p99_us=round(quantile_us(counted.compute, 0.99), 1),
            in_flight=version.in_flight if version else 0,
            inline=version.inline if version else False,
            codes={str(code): count for code, count in sorted(counted.codes.items())},
            latency={str(bucket): count for bucket, count in enumerate(counted.total) if count},
            compared=counted.compared,
            disagreed=counted.disagreed,
        )

    def _keeping_sequence(
        self, request: InferRequest, context: RequestContext, otherwise: HotVersion | None
    ) -> HotVersion | None:
        """A sequence stays with the version that it began on until it ends, or that version is gone."""
        key = (context.tenant, request.sequence_id)
        if not key[1] or request.parameters.get("sequence_start") is True or (otherwise and key in otherwise.sequences):
            return otherwise
        for version in (*self.hot.values(), *self.draining):
            if key in version.sequences:
                return version
        return otherwise
