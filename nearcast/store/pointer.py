"""`serving.json`: which versions of one model a node serves, and to which share of the requests."""

from __future__ import annotations

from typing import Annotated

import msgspec

from nearcast.store.manifest import Release

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Pointer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The small mutable object per model, replaced atomically, written by the agent alone.

    Attributes:
        stable: release that answers by default; None = none activated yet.
        candidate: release under trial, with `share` of the requests; None = no trial, or not installed here.
        last_good: release to fall back to; kept on disk and, while memory allows, warm.
        salt: input of the split's hash; a new one for each rollout.
        intent: TUF version of the rollout document that this pointer follows; larger = newer.
    """

    stable: Release | None = None
    candidate: Release | None = None
    share: Share = 0.0
    salt: str = ""
    last_good: Release | None = None
    intent: int = 0
