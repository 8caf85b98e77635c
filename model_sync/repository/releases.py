"""What a team's next list of releases has to fulfil, beside its signatures: releases come or go, and none changes.

A withdrawn release is vouched for no longer. Its number is not used again, so that one number never means two things.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence

from tuf.api.metadata import TargetFile, Targets  # type: ignore[attr-defined]

from model_sync.repository.layout import models_path, parse_models_path, withdrawn_paths
from model_sync.repository.succession import delegated_roles
from model_sync.rollout.document import ChannelDocument
from nearcast.errors import Code, MeshError
from nearcast.store.manifest import MANIFEST_SIZE_BYTES_MAX, decode_manifest


def require_withdrawn(role: Targets, current: Targets, channels: Iterable[ChannelDocument]) -> None:
    """Refuse to take back a withdrawal, to withdraw what is not there, or what a channel points to.

    Raises:
        MeshError: UNTRUSTED, CONFLICT for the last.
    """
    before, withdrawn = withdrawn_paths(current), withdrawn_paths(role)
    if not before <= withdrawn or withdrawn & set(role.targets):
        raise MeshError(Code.UNTRUSTED, "What was withdrawn must stay withdrawn, and cannot be published again.")
    if not withdrawn <= before | set(current.targets):
        raise MeshError(Code.UNTRUSTED, "Only what the role has published can be withdrawn.")
    for document in channels:
        for rollout in document.rollouts:
            for pick in (rollout.stable, rollout.candidate):
                if pick and models_path(rollout.model, pick.release) in withdrawn:
                    raise MeshError(
                        Code.CONFLICT,
                        f"Channel {document.channel} points to release {pick.release} of {rollout.model}; "
                        "point it elsewhere first: roll back, or push a new release.",
                    )


def added_releases(
    name: str, role: Targets, current: Targets, *, targets: Targets, published: Callable[[str], Sequence[int]]
) -> dict[str, TargetFile]:
    """The releases that a models role adds, by target path.

    Args:
        name: of the role.
        role: its next version.
        current: its present version.
        targets: the targets role, which says what the team may publish.
        published: releases of a model that any team has published, oldest first.

    Raises:
        MeshError: UNTRUSTED if a published release changes or the team may not publish one, CONFLICT if a number is not
            newer, FORBIDDEN if the model belongs to another team.
    """
    withdrawn = withdrawn_paths(role)
    for path, target in current.targets.items():
        if role.targets.get(path) != target and path not in withdrawn:
            raise MeshError(Code.UNTRUSTED, f"{path} was published already and must stay as it is.")
    added = {path: target for path, target in role.targets.items() if path not in current.targets}
    for path in added:
        model, release = parse_models_path(path)
        if not delegated_roles(targets)[name].is_delegated_path(path):
            raise MeshError(Code.UNTRUSTED, f"The team of {name} may not publish {path}.")
        earlier = published(model)
        gone = max((number for other, number in map(parse_models_path, withdrawn) if other == model), default=0)
        if release <= gone:
            raise MeshError(Code.CONFLICT, f"Release {gone} of {model} was withdrawn; number the next one higher.")
        if earlier and release <= earlier[-1]:
            raise MeshError(
                Code.CONFLICT, f"Release {release} of {model} is not newer than the published {earlier[-1]}."
            )
        if earlier and models_path(model, earlier[-1]) not in current.targets:
            raise MeshError(Code.FORBIDDEN, f"The model {model} belongs to another team; choose another name.")
    return added


def require_whole(
    path: str, target: TargetFile, manifests: Mapping[str, bytes], has_blob: Callable[[str, int], bool]
) -> None:
    """Refuse a release without the manifest that was signed, or without one of its files.

    Raises:
        MeshError: UNTRUSTED, INVALID_REQUEST if something is missing.
    """
    data = manifests.get(path)
    if data is None or len(data) > MANIFEST_SIZE_BYTES_MAX:
        raise MeshError(Code.INVALID_REQUEST, f"The manifest of {path} is missing or too large.")
    if target.length != len(data) or target.hashes != {"sha256": hashlib.sha256(data).hexdigest()}:
        raise MeshError(Code.UNTRUSTED, f"The manifest of {path} is not the one that was signed.")
    manifest = decode_manifest(data)
    if models_path(manifest.name, manifest.release) != path:
        raise MeshError(Code.UNTRUSTED, f"The manifest of {path} describes {manifest.name} {manifest.release}.")
    for entry in manifest.files:
        if not has_blob(entry.sha256, entry.size_bytes):
            raise MeshError(
                Code.INVALID_REQUEST,
                f"The file {entry.path} of {manifest.name} {manifest.release} is not in the repository, "
                "or not whole; upload its blob first.",
            )
