"""A change of offline roles on its way to enough signatures.

A draft is a folder with one plain TUF metadata file for each role that changes (`root.json`, `targets.json`,
`models-<team>.json`). An entry with an empty `sig` is a key that may still sign. The folder goes from holder to holder;
each adds a signature, and whoever has the controller in reach submits it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Signature, Targets  # type: ignore[attr-defined]
from tuf.api.serialization import DeserializationError
from tuf.api.serialization.json import JSONSerializer

from model_sync.publisher.control_client import ControlClient
from model_sync.publisher.key_ring import KeyRing
from model_sync.publisher.roles import ONLINE, Change, Roles
from model_sync.publisher.signers import find_key, open_signer
from model_sync.repository.layout import encode_metadata, withdrawn_paths
from model_sync.repository.succession import MODELS_PREFIX, Missing, delegated_roles, missing_signatures
from nearcast.durable import write_file
from nearcast.errors import Code, MeshError

DRAFT_FILES_MAX = 256


def sign_change(change: Change, roles: Roles, ring: KeyRing) -> dict[str, list[Missing]]:
    """Sign with every key in reach that is still wanted; answers what each role lacks then, if anything."""
    lacking: dict[str, list[Missing]] = {}
    for name in sorted(change, key=lambda one: ("root", "targets").index(one) if one in ("root", "targets") else 2):
        while missing := lacks(name, change, roles):
            signer = next((found for key in missing[0].waiting if (found := ring.signer(key))), None)
            if signer is None and len(missing) > 1:
                signer = next((found for key in missing[1].waiting if (found := ring.signer(key))), None)
            if signer is None:
                lacking[name] = missing
                break
            sign(change[name], signer)
    return lacking


def sign(role: Metadata[Any], signer: Any) -> None:
    """Add one signature.

    Raises:
        MeshError: FORBIDDEN if the key refuses, for example because of a wrong PIN.
    """
    try:
        role.sign(signer, append=True)
    except RepositoryError as error:
        reason = error.__cause__ or error
        raise MeshError(
            Code.FORBIDDEN, f"The key {signer.public_key.keyid[:8]} did not sign: {reason or type(reason).__name__}."
        ) from error


def lacks(name: str, change: Change, roles: Roles) -> list[Missing]:
    """What a role of a change still lacks."""
    root = (change.get("root") or roles.root).signed
    targets = (change.get("targets") or roles.targets).signed
    return missing_signatures(name, change[name], present=roles.root.signed, root=root, targets=targets)


def write_draft(folder: Path, change: Change, lacking: dict[str, list[Missing]]) -> None:
    """Leave a change for others to sign.

    Raises:
        MeshError: CONFLICT if the folder holds something else.
    """
    if folder.exists() and any(path.stem not in change for path in folder.iterdir()):
        raise MeshError(Code.CONFLICT, f"{folder} holds another draft; submit it, or remove it.")
    for name, role in change.items():
        for missing in lacking.get(name, []):
            for key in missing.waiting:
                role.signatures.setdefault(key.keyid, Signature(key.keyid, ""))
        write_file(folder / f"{name}.json", role.to_bytes(JSONSerializer()))


def read_draft(folder: Path) -> Change:
    """Read a change back.

    Raises:
        MeshError: INVALID_REQUEST if the folder is no draft.
    """
    change: Change = {}
    try:
        for path in sorted(folder.glob("*.json"))[:DRAFT_FILES_MAX]:
            change[path.stem] = Metadata[Any].from_file(str(path))
            if change[path.stem].signed.type != ("root" if path.stem == "root" else "targets"):
                raise ValueError(f"{path.name} is of another role")
    except (OSError, ValueError, RepositoryError, DeserializationError) as error:
        raise MeshError(Code.INVALID_REQUEST, f"{folder} holds no draft that can be read: {error}.") from error
    if not change:
        raise MeshError(Code.INVALID_REQUEST, f"{folder} holds no draft; `nearcast keys rotate` and its like make one.")
    return change


def co_sign(folder: Path, keys: Sequence[str], operator: Path) -> Change:
    """Sign what a draft wants of these keys; needs no controller. Answers the draft as it is now.

    Args:
        folder: the draft.
        keys: places of private keys; none = what `operator` has in reach.
        operator: the holder's own folder, if there is one.

    Raises:
        MeshError: FORBIDDEN if the draft wants none of them.
    """
    change, ring = read_draft(folder), KeyRing(operator)
    places = {place.key.keyid: place for place in map(find_key, keys)}
    signed = 0
    for role in change.values():
        for keyid in waiting(role):
            if keyid in places:
                ring.note(places[keyid])
                sign(role, open_signer(places[keyid]))
                signed += 1
            elif not keys and (signer := ring.signer_of(keyid)):
                sign(role, signer)
                signed += 1
    if not signed:
        wanted = sorted({keyid[:8] for role in change.values() for keyid in waiting(role)})
        raise MeshError(
            Code.FORBIDDEN,
            f"The draft wants nothing of this key; it waits for: {', '.join(wanted) or 'nobody, submit it'}.",
        )
    write_draft(folder, change, {})
    return change


def waiting(role: Metadata[Any]) -> list[str]:
    """Ids of the keys that a draft still lists without a signature."""
    return [keyid for keyid, signature in role.signatures.items() if not signature.signature]


def submit(change: Change, roles: Roles, client: ControlClient, operator: Path) -> int:
    """Publish a change that has its signatures; answers the new serial.

    Raises:
        MeshError: CONFLICT if signatures are missing, else what the controller says.
    """
    for role in change.values():
        for keyid in waiting(role):
            del role.signatures[keyid]
    for name in change:
        for missing in lacks(name, change, roles):
            raise MeshError(Code.CONFLICT, describe_missing(name, missing))
    body: dict[str, Any] = {name: change[name].to_dict() for name in ("root", "targets") if name in change}
    body["models"] = {name: role.to_dict() for name, role in change.items() if name.startswith(MODELS_PREFIX)}
    serial = int(client.call("POST", "/v1/roles", body)["serial"])
    root = change.get("root") or roles.root
    write_file(operator / "root.json", encode_metadata(root))
    ring, targets = KeyRing(operator), (change.get("targets") or roles.targets).signed
    for name, role in {**root.signed.roles, **delegated_roles(targets)}.items():
        ring.settle(name, role.keyids)
    return serial


def describe_missing(name: str, missing: Missing) -> str:
    """One sentence on what a role still lacks."""
    others = ", ".join(key.keyid[:8] for key in missing.waiting) or "nobody"
    return (
        f"{name} has {missing.signed} of {missing.threshold} signatures for {missing.judge}; still possible: {others}."
    )


def describe(name: str, role: Metadata[Any], known: Path) -> list[str]:
    """What a holder signs, in words. `known`: the operator's cache of roles, against which news are told."""
    signed = role.signed
    lines = [f"{name} version {signed.version}, until {signed.expires:%Y-%m-%d}"]
    if isinstance(signed, Root):
        entries = {one: signed.roles[one] for one in ("root", "targets")} | {ONLINE: signed.roles["timestamp"]}
    else:
        entries = dict(delegated_roles(signed))
    for one, entry in entries.items():
        lines.append(f"  {one}: {entry.threshold} of {', '.join(keyid[:8] for keyid in entry.keyids)}")
    if isinstance(signed, Targets):
        seen = known / f"{name}.json"
        before = Metadata[Targets].from_file(str(seen)).signed.targets if seen.exists() else {}
        new = {path: target for path, target in signed.targets.items() if before.get(path) != target}
        lines += [f"  vouches for {path} sha256 {target.hashes.get('sha256', '?')}" for path, target in new.items()]
        lines += [f"  withdraws {path}" for path in sorted(withdrawn_paths(signed))]
    return lines
