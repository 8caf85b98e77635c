"""The signed word on what a channel serves: TUF target `channels/<channel>.json`, delegated to the `rollout` role."""

from __future__ import annotations

from typing import Annotated

import msgspec

from nearcast.store.manifest import ModelName, Release, Sha256
from nearcast.store.pointer import Share

INTENTS_PER_ROOT = 2**32
"""How many intents one root has room for."""


def first_intent(root_version: int) -> int:
    """The first intent that a root has room for. Who stole the online key can use up intents only until the next root:
    channels go on from here once the key is replaced.
    """
    return (root_version - 1) * INTENTS_PER_ROOT + 1


def last_intent(root_version: int) -> int:
    """The last intent that a root has room for; nodes that know this root as the newest refuse more."""
    return root_version * INTENTS_PER_ROOT


class Pick(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A release that the rollout role picks; valid only if the models role vouches for the same manifest digest."""

    release: Release
    manifest_sha256: Sha256


class Rollout(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One model in one channel.

    Attributes:
        stable: what answers by default.
        candidate: what is on trial, if anything.
        wave: share of the nodes that install the candidate: node seed = f(node, salt) < wave.
        share: share of the requests on such nodes that the candidate answers.
        salt: new for each rollout; input of both hashes.
        rollback: this document lowers `stable` on purpose; allowed only to a release in `rollback_ok`.
        disagreement_max: share of the shadowed inputs that the candidate may answer otherwise; 1 = any (a retrained
            model answers most inputs a little differently, one that was converted should answer none so).
        reason, by, at: why, which operator (or the controller itself), and when, in seconds since 1970.
    """

    model: ModelName
    stable: Pick
    candidate: Pick | None = None
    wave: Share = 1.0
    share: Share = 0.0
    salt: str = ""
    rollback: bool = False
    disagreement_max: Share = 1.0
    reason: str = ""
    by: str = ""
    at: float = 0.0


class ChannelDocument(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All models of one channel. `intent` grows by one with each change and never falls."""

    schema: Annotated[int, msgspec.Meta(ge=1, le=1)] = 1
    channel: ModelName
    intent: Annotated[int, msgspec.Meta(ge=1)]
    rollouts: tuple[Rollout, ...] = ()
