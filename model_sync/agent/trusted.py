"""The agent's own files, read again: is every trusted role what its keys signed, every small target its digest?"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import msgspec
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Targets  # type: ignore[attr-defined]

from nearcast.store.manifest import SHA256_PATTERN

TOP_LEVEL = ("timestamp", "snapshot", "targets")


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """A file that the agent would not believe, and does better without."""

    path: Path
    problem: str


def find_damage(agent: Path) -> Iterator[Damage]:
    """Look at metadata, small targets and the floor of the clock in the folder `agent`."""
    metadata = agent / "metadata"
    yield from _check_roles(metadata)
    for path in sorted((agent / "targets").glob("*.json")):
        if re.fullmatch(SHA256_PATTERN, path.stem) and hashlib.sha256(path.read_bytes()).hexdigest() != path.stem:
            yield Damage(path=path, problem="Its content is not what its name says.")
    clock = agent / "clock.json"
    try:
        if clock.exists():
            msgspec.json.decode(clock.read_bytes(), type=dict[str, float])
    except msgspec.DecodeError:
        yield Damage(path=clock, problem="The floor of the clock is torn; it begins at this release's build time.")


def _check_roles(metadata: Path) -> Iterator[Damage]:
    root: Metadata[Root] | None = None
    history = {int(path.name.partition(".")[0]): path for path in (metadata / "root_history").glob("*.root.json")}
    for version in sorted(history):
        try:
            root = _next_root(history[version], version, root)
        except (RepositoryError, ValueError) as error:
            yield Damage(path=history[version], problem=f"It is not a root that follows: {error}.")
            return
    link = metadata / "root.json"
    if root is None:
        return
    if not link.is_symlink() or link.resolve() != history[max(history)].resolve():
        yield Damage(path=link, problem="It does not lead to the newest root.")
    targets: Metadata[Targets] | None = None
    for name in TOP_LEVEL:
        path = metadata / f"{name}.json"
        if path.exists():
            found, problem = _read_role(path, name, root.signed)
            if problem:
                yield Damage(path=path, problem=problem)
            elif name == "targets":
                targets = found
    yield from _check_delegated(metadata, targets)


def _next_root(path: Path, version: int, before: Metadata[Root] | None) -> Metadata[Root]:
    root = Metadata[Root].from_bytes(path.read_bytes())
    if root.signed.version != version or (before is not None and version != before.signed.version + 1):
        raise ValueError("its version is out of order")
    for judge in (before or root, root):
        judge.signed.verify_delegate("root", root.signed_bytes, root.signatures)
    return root


def _check_delegated(metadata: Path, targets: Metadata[Targets] | None) -> Iterator[Damage]:
    delegations = targets.signed.delegations if targets is not None else None
    for path in sorted(metadata.glob("*.json")):
        name = unquote(path.name.removesuffix(".json"))
        if name in (*TOP_LEVEL, "root"):
            continue
        judge = targets.signed if targets is not None and delegations and name in (delegations.roles or {}) else None
        _, problem = _read_role(path, name, judge)
        if problem:
            yield Damage(path=path, problem=problem)


def _read_role(path: Path, name: str, judge: Root | Targets | None) -> tuple[Metadata[Any] | None, str]:
    """The role, and what is wrong with it; `judge` None = nobody here can tell who should have signed it."""
    try:
        role: Metadata[Any] = Metadata.from_bytes(path.read_bytes())
        if judge is not None:
            judge.verify_delegate(name, role.signed_bytes, role.signatures)
    except (RepositoryError, ValueError) as error:
        return None, f"It is torn, or not signed by the keys that count now ({str(error).rstrip('.')[:120]})."
    return role, ""
