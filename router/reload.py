"""A configuration read again while the router runs: what may change does, the rest is named."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import msgspec

from nearcast.config import Loaded
from router.config import RouterConfig
from router.policy.config import LASTING

S = TypeVar("S", bound=msgspec.Struct)
_LASTING_PROBE = frozenset({"directory_ms", "announce_ms", "connects_max"})


@dataclass(frozen=True, slots=True)
class Merged:
    """The configuration that holds now, the keys that changed, and those that only a new start can change."""

    config: RouterConfig
    changed: tuple[str, ...]
    kept: tuple[str, ...]


def merge(old: RouterConfig, new: RouterConfig) -> Merged:
    """Take from `new` what a running router can take: its targets, policy, probes and log level."""
    config = msgspec.structs.replace(
        old,
        targets=new.targets,
        policy=_take(old.policy, new.policy, LASTING),
        probe=_take(old.probe, new.probe, _LASTING_PROBE),
        telemetry=msgspec.structs.replace(old.telemetry, level=new.telemetry.level),
    )
    return Merged(config, _differences(old, config), _differences(config, new))


def _take(old: S, new: S, lasting: frozenset[str]) -> S:
    return msgspec.structs.replace(new, **{name: getattr(old, name) for name in lasting})


def _differences(one: RouterConfig, other: RouterConfig) -> tuple[str, ...]:
    values = {row.key: row.value for row in Loaded(other).rows()}
    return tuple(row.key for row in Loaded(one).rows() if row.value != values[row.key])
