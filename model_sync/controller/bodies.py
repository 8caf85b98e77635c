"""What the control API takes as JSON; anything else in a body is refused."""

from __future__ import annotations

from typing import Annotated

import msgspec

from model_sync.rollout.transitions import Action
from nearcast.store.manifest import ModelName, Release
from nearcast.store.pointer import Share


class EnrolRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /v1/enrol`."""

    secret: Annotated[str, msgspec.Meta(min_length=16, max_length=256)]
    csr: str


class RenewRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /v1/renew`."""

    csr: str


class InviteRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /v1/invites`."""

    name: str
    role: str = "edge"
    ttl_s: float = 3600.0


class ReleaseRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /v1/releases`: the signed role as a JSON object, the added manifests as text by target path."""

    team: ModelName
    metadata: msgspec.Raw
    manifests: dict[str, str] = {}


class RolesRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /v1/roles`: the next offline roles as JSON objects, those of the teams by role name."""

    root: msgspec.Raw = msgspec.Raw()
    targets: msgspec.Raw = msgspec.Raw()
    models: dict[str, msgspec.Raw] = {}


class RolloutRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Body of `POST /v1/rollouts`."""

    channel: ModelName
    model: ModelName
    action: Action
    release: Release | None = None
    share: Share = 0.0
    wave: Share = 1.0
    disagreement_max: Share | None = None
    reason: Annotated[str, msgspec.Meta(max_length=1024)] = ""
