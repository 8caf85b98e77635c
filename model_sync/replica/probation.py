"""The judgement on a version on trial, from the host's counters."""

from __future__ import annotations

from dataclasses import dataclass

from model_sync.replica.state import ReplicaLimits


@dataclass(slots=True, kw_only=True)
class Probation:
    """Counts errors since the trial began. `heard` is whether the host answered the last time it was asked."""

    requests: int = 0
    errors: int = 0
    heard: bool = True

    def judge(self, requests: int, errors: int, limits: ReplicaLimits) -> str:
        """Why the version failed, or "" so far. The arguments are the host's counters now.

        Fails with at least `errors_min` new errors that are at least `error_share_max` of the new requests: one bad
        request of three condemns nothing, nor do five of a thousand.
        """
        if requests < self.requests or errors < self.errors:
            self.requests = self.errors = 0  # the host was restarted
        asked, failed = requests - self.requests, errors - self.errors
        if failed >= limits.errors_min and failed >= limits.error_share_max * asked:
            return f"{failed} of {asked} requests failed during its probation."
        return ""
