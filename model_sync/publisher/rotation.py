"""Changes of keys as an operator makes them: add, rotate, revoke, and another term; with enough keys at once.

Where the keys in reach are too few the change is left as a draft (`drafts`), which other holders sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from securesystemslib.signer import CryptoSigner, Key  # type: ignore[attr-defined]

from model_sync.publisher.control_client import ControlClient
from model_sync.publisher.drafts import describe_missing, sign_change, submit, write_draft
from model_sync.publisher.key_ring import NEW_SUFFIX, KeyRing
from model_sync.publisher.roles import ONLINE, Change, Roles, extend, now, read_roles, set_keys, withdraw
from model_sync.publisher.signers import find_key
from model_sync.repository.layout import models_path
from model_sync.repository.signing_key import write_key
from model_sync.repository.succession import MODELS_PREFIX, Missing, delegated_roles
from nearcast.errors import Code, MeshError


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """One change of a role's keys.

    Attributes:
        role: root, targets, models-<team> or online.
        keys: keys to add, as `signers.find_key` reads them.
        drop: ids, or beginnings of ids, of keys to remove.
        threshold: from now on; None = as it is.
        paths: target paths of a new team; () = any model.
        withdraw: (model, release) pairs that the models role shall vouch for no longer.
    """

    role: str
    keys: Sequence[str] = ()
    drop: Sequence[str] = ()
    threshold: int | None = None
    paths: Sequence[str] = ()
    withdraw: Sequence[tuple[str, int]] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a change: published under `serial`, or a draft that lacks signatures."""

    changed: tuple[str, ...]
    serial: int | None = None
    lacking: dict[str, list[Missing]] = field(default_factory=dict)


def add_keys(client: ControlClient, operator: Path, wish: Wish, *, signers: Sequence[str], draft: Path) -> Outcome:
    """Add keys to a role, or a new team; without `wish.keys` a new team gets a key made here.

    Raises:
        MeshError: INVALID_REQUEST if there is nothing to add, FORBIDDEN if no key in reach may sign.
    """
    roles, ring = read_roles(client, operator), KeyRing(operator, signers)
    is_new = wish.role.startswith(MODELS_PREFIX) and wish.role not in delegated_roles(roles.targets.signed)
    before = [] if is_new else roles.keys(wish.role)
    if wish.role == ONLINE:
        raise MeshError(Code.INVALID_REQUEST, "The online role has one key, which the controller makes: rotate it.")
    if not wish.keys and not is_new:
        raise MeshError(Code.INVALID_REQUEST, f"Name the key that {wish.role} gets: --key.")
    keys = [*before, *(_note_all(ring, wish.keys) or [_make_key(operator, wish.role)])]
    threshold = wish.threshold or (1 if is_new else roles.role(wish.role).threshold)
    at = now()
    change = set_keys(roles, wish.role, keys, threshold=threshold, paths=wish.paths, at=at)
    return _finish(change, roles, client, operator, ring, draft)


def rotate_keys(client: ControlClient, operator: Path, wish: Wish, *, signers: Sequence[str], draft: Path) -> Outcome:
    """Replace a key of a role: `wish.drop`, or its only one, by `wish.keys`, or by one made here.

    Raises:
        MeshError: INVALID_REQUEST if it is not clear which key goes, FORBIDDEN if no key in reach may sign.
    """
    roles, ring = read_roles(client, operator), KeyRing(operator, signers)
    at = now()
    if wish.role == ONLINE:
        answer = client.call("POST", "/v1/online-key")
        keys = [Key.from_dict(str(answer["keyid"]), dict(answer["key"]))]
        change = set_keys(roles, ONLINE, keys, threshold=1, at=at)
        return _finish(change, roles, client, operator, ring, draft)
    before = roles.keys(wish.role)
    if not wish.drop and len(before) > 1:
        known = ", ".join(key.keyid[:8] for key in before)
        raise MeshError(Code.INVALID_REQUEST, f"{wish.role} has several keys; say which one goes: --old of {known}.")
    gone = _match(before, wish.drop) if wish.drop else {before[0].keyid}
    new = _note_all(ring, wish.keys) or [_make_key(operator, wish.role)]
    keys = [*(key for key in before if key.keyid not in gone), *new]
    threshold = wish.threshold or roles.role(wish.role).threshold
    change = set_keys(roles, wish.role, keys, threshold=threshold, at=at)
    change = _withdraw(change, roles, wish, at)
    return _finish(change, roles, client, operator, ring, draft)


def revoke_keys(client: ControlClient, operator: Path, wish: Wish, *, signers: Sequence[str], draft: Path) -> Outcome:
    """Take keys away from a role without replacing them.

    Raises:
        MeshError: INVALID_REQUEST if fewer keys than the threshold would remain: then rotate.
    """
    roles, ring = read_roles(client, operator), KeyRing(operator, signers)
    before, at = roles.keys(wish.role), now()
    gone = _match(before, wish.drop)
    keys = [key for key in before if key.keyid not in gone]
    threshold = wish.threshold or roles.role(wish.role).threshold
    if len(keys) < threshold or wish.role == ONLINE:
        raise MeshError(
            Code.INVALID_REQUEST,
            f"{wish.role} needs {threshold} keys, and {len(keys)} would remain; replace the key: "
            f"nearcast keys rotate {wish.role}.",
        )
    change = _withdraw(set_keys(roles, wish.role, keys, threshold=threshold, at=at), roles, wish, at)
    return _finish(change, roles, client, operator, ring, draft)


def renew_roles(client: ControlClient, operator: Path, *, draft: Path | None = None) -> dict[str, datetime]:
    """Sign every role for another term of which a key is in `operator`'s reach, and publish; answers the expiries.

    Raises:
        MeshError: UNTRUSTED if the controller shows roles that this operator's root does not vouch for, or older ones;
            FORBIDDEN without any key of an offline role; CONFLICT if a draft waits for other holders.
    """
    roles, ring = read_roles(client, operator), KeyRing(operator)
    names = [name for name in roles.present() if any(ring.has(key.keyid) for key in roles.keys(name))]
    if not names:
        raise MeshError(Code.FORBIDDEN, f"{operator} holds no key of an offline role; nothing was signed.")
    change = extend(roles, names, now())
    outcome = _finish(change, roles, client, operator, ring, draft or operator.parent / "draft")
    require_done(outcome, draft or operator.parent / "draft")
    return {name: change[name].signed.expires for name in names}


def require_done(outcome: Outcome, draft: Path) -> None:
    """Tell the caller that other holders have to sign.

    Raises:
        MeshError: CONFLICT with what to do next.
    """
    if outcome.serial is None:
        lines = "; ".join(describe_missing(name, one[0]).rstrip(".") for name, one in outcome.lacking.items())
        raise MeshError(
            Code.CONFLICT,
            f"{lines}. The draft is in {draft}; its holders run: nearcast keys sign {draft} --key KEY; then: "
            f"nearcast keys submit {draft}",
        )


def _finish(change: Change, roles: Roles, client: ControlClient, operator: Path, ring: KeyRing, draft: Path) -> Outcome:
    lacking = sign_change(change, roles, ring)
    changed = tuple(sorted(change))
    if lacking:
        if not any(role.signatures for role in change.values()) and ring.reasons:
            raise MeshError(Code.FORBIDDEN, f"Nothing could be signed: {' '.join(ring.reasons)}")
        write_draft(draft, change, lacking)
        return Outcome(changed=changed, lacking=lacking)
    return Outcome(changed=changed, serial=submit(change, roles, client, operator))


def _withdraw(change: Change, roles: Roles, wish: Wish, at: datetime) -> Change:
    if not wish.withdraw:
        return change
    if wish.role not in roles.models:
        raise MeshError(Code.INVALID_REQUEST, f"Releases are withdrawn from a models role, not from {wish.role}.")
    return withdraw(change, roles, wish.role, [models_path(*one) for one in wish.withdraw], at)


def _note_all(ring: KeyRing, texts: Sequence[str]) -> list[Key]:
    places = [find_key(text) for text in texts]
    for place in places:
        ring.note(place)
    return [place.key for place in places]


def _make_key(operator: Path, role: str) -> Key:
    """A key that takes over `<role>.pem` once the change holds; one made for a change that never came is reused."""
    path = operator / f"{role}{NEW_SUFFIX}.pem"
    if path.exists():
        return find_key(str(path)).key
    signer = CryptoSigner.generate_ed25519()
    write_key(path, signer)
    return signer.public_key


def _match(keys: Sequence[Key], wanted: Sequence[str]) -> set[str]:
    found = set()
    for beginning in wanted:
        matches = [key.keyid for key in keys if key.keyid.startswith(beginning)]
        if len(matches) != 1 or not beginning:
            known = ", ".join(key.keyid[:8] for key in keys)
            raise MeshError(Code.INVALID_REQUEST, f"{beginning!r} begins no one key id; there are: {known}.")
        found.add(matches[0])
    return found
