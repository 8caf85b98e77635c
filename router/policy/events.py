"""What happened to a request: the events that feed the policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from nearcast.errors import Code
from nearcast.handler import Served

if TYPE_CHECKING:
    from router.policy.breaker import Breaker
    from router.policy.state import VersionState
    from router.policy.tenants import Part
    from router.policy.tiers import TierGate

FAULTS = frozenset({Code.INTERNAL, Code.UNAVAILABLE, Code.DEADLINE})
"""Codes that speak against the target. OVERLOADED is an honest answer and only pushes back."""
MISPLACED = frozenset({Code.MODEL_NOT_FOUND, Code.VERSION_MISMATCH})
"""Codes of a target that does not serve what was asked for."""


class Outcome(msgspec.Struct, frozen=True, omit_defaults=True):
    """How one attempt ended.

    `code` None = answered; CANCELLED = we gave it up. `sent` tells whether the target may have executed it. `told`: the
    target itself said so, over a connection that holds; else the channel did.
    """

    code: Code | None = None
    sent: bool = True
    retry_after_ms: int | None = None
    served: Served | None = None
    told: bool = False


ANSWERED = Outcome()
ABANDONED = Outcome(code=Code.CANCELLED)


class Attempt(msgspec.Struct, eq=False):
    """One send, open until `Policy.on_reply` has closed it. Only the policy changes it; a recorder numbers it.

    `doubted`: the model has failed on this request elsewhere.
    """

    version: VersionState
    sent_at: float
    size_bytes: int
    kind: str
    load_at_send: float
    remaining_s: float | None
    share: Part
    timed: bool = False
    trials: tuple[Breaker | TierGate, ...] = ()
    open: bool = True
    passed_delay: bool = False
    doubted: bool = False
    number: int = -1

    @property
    def target(self) -> str:
        """Name of the target."""
        return self.version.target.name

    @property
    def release(self) -> str:
        """The model version that was asked for."""
        return self.version.version
