"""Who gets a certificate for which name. Pure: what is known comes in, a grant or a reason comes out.

A *claim* is an invitation: with its certificate a device may ask for one of its own, once unless it was made for more.
A device that has a certificate renews it. A repeated question of the same key is answered again and costs nothing: the
first answer may have been lost.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_node.broker.access import Kind, holder_name, is_device
from nearcast.errors import Code, MeshError
from nearcast.transport.mqtt.topics import RESERVED_DEVICES, require_id

READER_NAME_LENGTH_MAX = 57


@dataclass(frozen=True, slots=True, kw_only=True)
class ProvisioningLimits:
    """Bounds of the certificates of one tenant.

    Attributes:
        certificate_life_s: of a device's certificate; renewed at two thirds, so it must outlast an outage threefold.
        claim_life_s_max: how long an invitation may hold.
        claim_uses_max: devices of one claim.
        claims_max, holders_max: open claims, and devices and readers, of one tenant.
        certificates_per_holder_max: certificates of one holder that are valid at the same time.
        reuse_after_s: how long the name of an expired certificate is given to nobody. A TLS connection that was made
            before and has not said who it is yet is cut by the broker within this time.
        question_interval_s, question_burst: how often one asker is heard.
        askers_max: askers whose times are remembered; the one longest unheard of is forgotten first.
        questions_waiting_max: more are dropped; the asker repeats.
        own_life_s: of the certificates of the broker and of the node, which renews them at two thirds.
        purge_life_s: of the certificate with which the node ends the session of a revoked holder.
        watch_interval_s: how often the node looks whether a revocation or a certificate of its own is due.
        restart_interval_s: the broker is not restarted more often; a second revocation waits, a hundred share one.
    """

    certificate_life_s: float = 30 * 86_400.0
    claim_life_s_max: float = 30 * 86_400.0
    claim_uses_max: int = 10_000
    claims_max: int = 256
    holders_max: int = 10_000
    certificates_per_holder_max: int = 8
    reuse_after_s: float = 120.0
    question_interval_s: float = 10.0
    question_burst: int = 5
    askers_max: int = 1_000
    questions_waiting_max: int = 64
    own_life_s: float = 7 * 86_400.0
    purge_life_s: float = 60.0
    watch_interval_s: float = 0.5
    restart_interval_s: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """An invitation.

    Attributes:
        name: Common Name of its certificate.
        holder: Common Name of the one that it is for; "" = its user chooses the name of a device.
        uses_left: how many more holders it makes.
        expires_at: wall-clock second.
    """

    name: str
    kind: Kind = "device"
    holder: str = ""
    uses_left: int = 1
    expires_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """What is known of a name.

    Attributes:
        keys: fingerprints of the public keys of its certificates that hold.
        certificates: how many hold.
        free_at: from when on it may be given away, because none holds any more; None = it always could.
        purged: whether the broker knows nothing of a former holder any more.
    """

    name: str
    keys: frozenset[str] = frozenset()
    certificates: int = 0
    free_at: float | None = None
    purged: bool = True


def wanted_name(asker: str, wanted: str, claim: Claim | None) -> str:
    """The Common Name that a question is about.

    Args:
        asker: Common Name of whoever asks.
        wanted: what it says it wants to be called; heard only if its claim leaves it open.
        claim: the asker's claim, if it is one.

    Raises:
        MeshError: FORBIDDEN for an asker that may not have any, INVALID_REQUEST for a bad name.
    """
    if asker.startswith("claim+"):
        if claim is None:
            raise MeshError(Code.FORBIDDEN, "This claim was revoked or has expired; ask for another one.")
        if not claim.holder and not wanted:
            raise MeshError(Code.INVALID_REQUEST, "The claim leaves the name open; say what to be called, with --name.")
        return claim.holder or holder_name(claim.kind, require_holder(wanted, claim.kind))
    if is_device(asker) or asker.startswith("reader+"):
        return asker
    raise MeshError(Code.FORBIDDEN, f"{asker!r} is given no certificate.")


def require_grant(key: str, claim: Claim | None, holder: Holder, now: float, limits: ProvisioningLimits) -> bool:
    """Whether the certificate that is granted spends a use of the claim.

    Args:
        key: fingerprint of the public key of the question.
        claim: the asker's claim, if it is one.
        holder: the name that the certificate is to be for.
        now: wall-clock second.
        limits: bounds.

    Raises:
        MeshError: FORBIDDEN, CONFLICT or OVERLOADED where nothing is granted.
    """
    if holder.certificates >= limits.certificates_per_holder_max:
        raise MeshError(Code.OVERLOADED, f"{holder.name!r} has {holder.certificates} valid certificates; use them.")
    if claim is None:
        if not holder.certificates:
            raise MeshError(Code.FORBIDDEN, f"The certificates of {holder.name!r} were revoked.")
        return False
    if key in holder.keys:
        return False
    if holder.certificates:
        raise MeshError(Code.CONFLICT, f"{holder.name!r} is in use; revoke it first or choose another name.")
    if claim.uses_left < 1 or now >= claim.expires_at:
        raise MeshError(Code.FORBIDDEN, "This claim is used up or has expired; ask for another one.")
    if holder.free_at is not None:
        if not claim.holder:
            raise MeshError(
                Code.CONFLICT, f"{holder.name!r} was given before; only a claim that names it does it again."
            )
        if not holder.purged or now < holder.free_at:
            raise MeshError(Code.OVERLOADED, f"{holder.name!r} has become free just now; ask again in two minutes.")
    return True


def require_holder(name: str, kind: Kind) -> str:
    """`name`, if a device or reader may be called so.

    Raises:
        MeshError: INVALID_REQUEST.
    """
    require_id(name, kind)
    if name in RESERVED_DEVICES or (kind == "reader" and len(name) > READER_NAME_LENGTH_MAX):
        raise MeshError(Code.INVALID_REQUEST, f"{name!r} is reserved or too long; choose another name.")
    return name


class QuestionRate:
    """How often each asker is heard: the generic cell rate algorithm (ITU-T I.371), one number per asker.

    Args:
        limits: `question_interval_s`, `question_burst` and `askers_max`.
    """

    def __init__(self, limits: ProvisioningLimits) -> None:
        self._limits = limits
        self._due: dict[str, float] = {}

    def require(self, asker: str, now: float) -> None:
        """Count a question of `asker` at the monotonic second `now`.

        Raises:
            MeshError: OVERLOADED if it asks too often.
        """
        interval_s = self._limits.question_interval_s
        due = max(self._due.pop(asker, now), now)
        early = due - now > interval_s * (self._limits.question_burst - 1)
        self._due[asker] = due if early else due + interval_s
        if len(self._due) > self._limits.askers_max:
            del self._due[next(iter(self._due))]
        if early:
            raise MeshError(Code.OVERLOADED, f"One question in {interval_s:g} s is enough; ask again later.")
