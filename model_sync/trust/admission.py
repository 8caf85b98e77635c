"""Whether a vouched release may run here now: it must not be older than what runs, nor in quarantine."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from nearcast.errors import Code, MeshError


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What a node holds of one model.

    `floor` is the newest release committed as stable and not rolled back since (0 = none); `rollback_ok` are releases
    to which the models role lets a signed rollback return from there.
    """

    floor: int = 0
    stable: int | None = None
    last_good: int | None = None
    rollback_ok: Collection[int] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ban:
    """A manifest that failed here, under which rollout document and salt, and why."""

    sha256: str
    release: int
    intent: int
    salt: str
    reason: str


def require_not_older(model: str, release: int, standing: Standing, *, rollback: bool) -> None:
    """Refuse a fall of the release counter.

    Allowed below the floor are only: what is stable already, and, in a document that says rollback, `last_good` and
    the releases in `rollback_ok`.

    Raises:
        MeshError: UNTRUSTED, saying what runs and how to roll back.
    """
    if release >= standing.floor or release == standing.stable:
        return
    if not rollback:
        raise MeshError(
            Code.UNTRUSTED,
            f"Refused {model} release {release}: it is older than release {standing.floor}, which runs; "
            "roll back with `nearcast rollback`.",
        )
    if release != standing.last_good and release not in standing.rollback_ok:
        allowed = ", ".join(str(one) for one in sorted(standing.rollback_ok)) or "none"
        raise MeshError(
            Code.UNTRUSTED,
            f"Refused to roll {model} back from release {standing.floor} to {release}: the models role allows a return "
            f"only to: {allowed}; push a new release instead.",
        )


def require_not_banned(model: str, sha256: str, bans: Sequence[Ban], *, intent: int, salt: str) -> None:
    """Refuse a quarantined manifest, unless a newer rollout of it (newer document, new salt) asks again.

    Raises:
        MeshError: UNTRUSTED with the reason of the quarantine.
    """
    for ban in bans:
        if ban.sha256 == sha256 and not (intent > ban.intent and salt != ban.salt):
            raise MeshError(
                Code.UNTRUSTED,
                f"Refused {model} release {ban.release}: it is in quarantine here because {ban.reason} "
                "Start a new rollout to try it again.",
            )
