"""What the sync process is told: where it keeps its state, where it listens, and the bounds of what it accepts."""

from __future__ import annotations

from typing import Annotated

import msgspec

from model_sync.rollout.trial import TrialLimits
from nearcast.telemetry import TelemetryConfig

Seconds = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]


class SyncLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Bounds of the sync process.

    Attributes:
        blob_size_bytes_max: one file of a model.
        body_size_bytes_max: a JSON request that carries signed metadata and manifests.
        small_body_size_bytes_max: any other JSON request.
        uploads_max: blobs received at the same time.
        upload_stall_s: an upload that stays silent this long is dropped.
        hint_waiters_max: long polls of enrolled nodes; hint_strangers_max: of anyone else.
        hint_wait_s_max: one long poll.
        nodes_max: entries of the directory; node_ttl_s: time after its last word when a node leaves it.
        report_ttl_s: time after its last report when a node counts as silent.
        reports_bytes_max: the last reports of all nodes together.
        judge_s: time between two looks at the running trials.
        invites_max: invitations that nobody has used yet; invite_ttl_s_max: how long one may hold.
    """

    blob_size_bytes_max: Count = 2 * 1024**3
    body_size_bytes_max: Count = 64 * 1024**2
    small_body_size_bytes_max: Count = 256 * 1024
    uploads_max: Count = 8
    upload_stall_s: Seconds = 30.0
    hint_waiters_max: Count = 10_000
    hint_strangers_max: Count = 64
    hint_wait_s_max: Seconds = 60.0
    nodes_max: Count = 10_000
    node_ttl_s: Seconds = 90.0
    report_ttl_s: Seconds = 180.0
    reports_bytes_max: Count = 256 * 1024**2
    judge_s: Seconds = 1.0
    invites_max: Count = 10_000
    invite_ttl_s_max: Seconds = 7 * 86_400.0


class SyncConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One sync process.

    Attributes:
        home: the folder that `nearcast keys init` made for it (`<home>/sync`).
        address: where it listens. Port 0 = the port of its last run if that is free, else any.
        public_address: host:port that nodes reach it at, where that is not `address` (NAT, 0.0.0.0); "" = `address`.
        metrics: where it serves metrics; "" = nowhere.
        certificate_lifetime_s: of the certificates that it issues to nodes; they renew at two thirds.
        refresh_s: how often it looks whether a signature has passed half of its life.
        drain_s: how long requests may take to finish at the end.
        trial: when it ends a trial by itself.
    """

    home: str = ""
    address: str = "127.0.0.1:0"
    public_address: str = ""
    metrics: str = ""
    certificate_lifetime_s: Annotated[float, msgspec.Meta(ge=60, le=7 * 86_400)] = 7 * 86_400.0
    refresh_s: Seconds = 600.0
    drain_s: Seconds = 3.0
    telemetry: TelemetryConfig = TelemetryConfig()
    trial: TrialLimits = TrialLimits()
    limits: SyncLimits = SyncLimits()
