"""The signatures of a push: as many of the team's keys as its threshold wants, here or from other holders.

The first run of a push whose team needs more signatures than there are keys in reach leaves a draft; once the others
have signed it, the same command finds their signatures there and goes on.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuf.api.metadata import Metadata, Root, Targets  # type: ignore[attr-defined]

from model_sync.publisher.drafts import describe_missing, read_draft, sign_change, waiting, write_draft
from model_sync.publisher.key_ring import NEW_SUFFIX, KeyRing
from model_sync.publisher.roles import Change, Roles
from model_sync.repository.succession import MODELS_PREFIX, delegated_roles
from nearcast.errors import Code, MeshError

DRAFT_FOLDER = "draft"
"""Where a draft lies by default, in the folder above the operator's."""


def sign_release(
    name: str,
    role: Metadata[Targets],
    roles: Mapping[str, Metadata[Targets]],
    operator: Path,
    draft: Path | None = None,
) -> Metadata[Targets]:
    """The models role with enough signatures; with those of a draft, if it is the same change.

    Args:
        name: of the role.
        role: its next version, unsigned.
        roles: the present models roles; `operator` holds the verified root and targets role beside them.
        operator: the operator's folder.
        draft: folder that collects signatures; None = `draft` beside `operator`.

    Raises:
        MeshError: UNTRUSTED if no key in reach is one of the team's, CONFLICT if other holders have to sign first.
    """
    draft = draft or operator.parent / DRAFT_FOLDER
    cache, ring = operator / "tuf", KeyRing(operator)
    present = Roles(
        root=Metadata[Root].from_file(str(cache / "root.json")),
        targets=Metadata[Targets].from_file(str(cache / "targets.json")),
        models=roles,
        online={},
    )
    change: Change = {name: role}
    if draft.exists() and _is_same(drafted := read_draft(draft), change):
        change = drafted
    lacking = sign_change(change, present, ring)
    if name in lacking:
        if not lacking[name][0].signed:
            reasons = " ".join(ring.reasons) or f"{operator} holds none of {_ids(lacking[name][0].waiting)}."
            raise MeshError(
                Code.UNTRUSTED, f"The role {name} is not signed by a key that the targets role delegates to: {reasons}"
            )
        write_draft(draft, change, lacking)
        raise MeshError(
            Code.CONFLICT,
            f"{describe_missing(name, lacking[name][0])} Let another holder run: nearcast keys sign {draft} --key KEY; "
            "then run this push again.",
        )
    signed: Metadata[Targets] = change[name]
    for keyid in waiting(signed):
        del signed.signatures[keyid]
    return signed


def forget_draft(name: str, operator: Path, draft: Path | None = None) -> None:
    """Remove the draft of a push that has come through."""
    draft = draft or operator.parent / DRAFT_FOLDER
    if [path.name for path in draft.glob("*")] == [f"{name}.json"]:
        shutil.rmtree(draft)


def find_team(operator: Path) -> str:
    """The team whose key lies in an operator's folder, or is noted there.

    Raises:
        MeshError: FORBIDDEN if there is none, INVALID_REQUEST if there are several.
    """
    files = [path.stem for path in operator.glob(f"{MODELS_PREFIX}*.pem") if not path.stem.endswith(NEW_SUFFIX)]
    names = {stem.removeprefix(MODELS_PREFIX) for stem in files} or _noted_teams(operator)
    if not names:
        raise MeshError(Code.FORBIDDEN, f"{operator} holds no key of a team; only who holds one can push.")
    if len(names) > 1:
        known = ", ".join(sorted(names))
        raise MeshError(Code.INVALID_REQUEST, f"There are keys of several teams; choose --team of {known}.")
    return names.pop()


def _noted_teams(operator: Path) -> set[str]:
    ring, targets = KeyRing(operator), Metadata[Targets].from_file(str(operator / "tuf" / "targets.json")).signed
    return {
        name.removeprefix(MODELS_PREFIX)
        for name, role in delegated_roles(targets).items()
        if name.startswith(MODELS_PREFIX) and any(ring.has(keyid) for keyid in role.keyids)
    }


def _is_same(drafted: Change, change: Change) -> bool:
    """Whether a draft says the same, but for the moment at which its term ends."""
    return _without_term(drafted) == _without_term(change)


def _without_term(change: Change) -> dict[str, Any]:
    return {name: {**role.signed.to_dict(), "expires": ""} for name, role in change.items()}


def _ids(keys: tuple[Any, ...]) -> str:
    return ", ".join(key.keyid[:8] for key in keys)
