"""The control API of the mesh over HTTPS: repository files, enrolment, node directory, releases and rollouts.

A client certificate is optional at the TLS level and required per route. What may be published or picked is decided by
`Repository` and `rollout.transitions`; this file only knows HTTP.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import re
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from model_sync.controller.bodies import (
    EnrolRequest,
    InviteRequest,
    ReleaseRequest,
    RenewRequest,
    RolesRequest,
    RolloutRequest,
)
from model_sync.controller.config import SyncLimits
from model_sync.controller.delta_uploads import DeltaUploads
from model_sync.controller.enrolment import EnrolmentAuthority
from model_sync.controller.hint import Hint
from model_sync.controller.node_directory import Announcement, NodeDirectory
from model_sync.controller.online_key import make_next_online_key, settle_online_key
from model_sync.controller.trial_watch import TrialWatch
from model_sync.controller.uploads import Uploads
from model_sync.repository.repository import Repository
from model_sync.rollout.document import ChannelDocument, Pick
from model_sync.rollout.report import REPORT_SIZE_BYTES_MAX, SIGNATURE_HEADER
from model_sync.rollout.transitions import Command, apply, find_rollout
from model_sync.rollout.trial import TrialLimits
from nearcast.clock import SYSTEM_CLOCK, Clock
from nearcast.errors import CATALOGUE, Code, MeshError
from nearcast.identity import CertificateAuthority, JoinToken, parse_uri, peer_uri
from nearcast.store.manifest import is_model_name
from nearcast.telemetry import get_logger

NODE_ROLES = ("edge", "cloud", "router")
MESH_ROLES = (*NODE_ROLES, "sync", "operator")
_FOLDERS = ("metadata", "targets", "blobs", "deltas")
_SMALL_FOLDERS = ("metadata", "targets")
_SEGMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,255}")
_log = get_logger("model_sync.controller")
T = TypeVar("T")


class Controller:
    """Answers the control API. One per process; `url` is what invitations tell nodes."""

    def __init__(
        self,
        repository: Repository,
        enrolment: EnrolmentAuthority,
        authority: CertificateAuthority,
        device_authority: CertificateAuthority,
        *,
        limits: SyncLimits | None = None,
        trial: TrialLimits | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        limits = limits or SyncLimits()
        self.url = ""
        self.hint = Hint(
            repository.serial,
            waiters_max=limits.hint_waiters_max,
            strangers_max=limits.hint_strangers_max,
            wait_s_max=limits.hint_wait_s_max,
        )
        self._repository = repository
        self._enrolment = enrolment
        self._authority = authority
        self._device_authority = device_authority
        self._nodes = NodeDirectory(nodes_max=limits.nodes_max, ttl_s=limits.node_ttl_s, began=clock.monotonic())
        self._uploads = Uploads(repository.folder, limits)
        self._delta_uploads = DeltaUploads(repository.folder, self._uploads)
        self._trials = TrialWatch(
            repository, trial=trial or TrialLimits(), limits=limits, clock=clock, change=self._change_channel
        )
        self._limits = limits
        self._clock = clock
        # One change at a time: each reads the present state, decides, and signs the next.
        self._change = asyncio.Lock()

    def application(self) -> web.Application:
        """The routes."""
        app = web.Application(middlewares=[answer_errors], client_max_size=self._limits.body_size_bytes_max)
        app.add_routes(
            [
                web.get("/repository/{path:.+}", self._file),
                web.get("/v1/ca", self._ca),
                web.get("/v1/hint", self._wait_hint),
                web.post("/v1/enrol", self._enrol),
                web.post("/v1/renew", self._renew),
                web.post("/v1/invites", self._invite),
                web.get("/v1/nodes", self._list_nodes),
                web.post("/v1/nodes/self", self._announce),
                web.delete("/v1/nodes/{name}", self._remove_node),
                web.put("/v1/blobs/{sha256}", self._put_blob),
                web.put("/v1/deltas/{result}/{name}", self._put_delta),
                web.post("/v1/releases", self._publish),
                web.post("/v1/roles", self._publish_offline),
                web.post("/v1/online-key", self._offer_online_key),
                web.post("/v1/rollouts", self._roll),
                web.get("/v1/channels/{channel}", self._channel),
                web.get("/v1/channels/{channel}/status", self._channel_status),
                web.post("/v1/reports", self._take_report),
                web.get("/v1/lineage", self._read_lineage),
            ]
        )
        app.cleanup_ctx.append(self._trials.run)
        return app

    async def refresh(self) -> bool:
        """Sign online metadata again at half of its life, and warn of offline roles that need an operator soon."""
        async with self._change:
            changed = await asyncio.to_thread(self._repository.refresh)
        self.hint.announce(self._repository.serial)
        now = self._clock.wall()
        for role, expires in self._repository.offline_expiries().items():
            days = (expires.timestamp() - now) / 86_400
            if days < 30:
                _log.warning("role_expires", role=role, days_left=round(days, 1))
        return changed

    # -- repository ---------------------------------------------------------------------------------------------------

    async def _file(self, request: web.Request) -> web.StreamResponse:
        segments = request.match_info["path"].split("/")
        if segments[0] not in _FOLDERS or len(segments) > 4 or not all(map(_SEGMENT.fullmatch, segments)):
            raise web.HTTPNotFound
        path = self._repository.folder.joinpath(*segments)
        if not path.is_file():
            raise web.HTTPNotFound
        # Everything but the timestamp never changes under its name.
        is_mutable = segments[-1] == "timestamp.json"
        control = "no-cache" if is_mutable else "public, max-age=31536000, immutable"
        if segments[0] in _SMALL_FOLDERS and "Range" not in request.headers:
            return _whole_file(request, path, control)
        return web.FileResponse(path, headers={"Cache-Control": control})

    async def _wait_hint(self, request: web.Request) -> web.Response:
        since = _query(request, "since", int, 0)
        wait_s = _query(request, "wait_s", float, 25.0)
        is_enrolled = bool(peer_uri(_tls(request)))
        serial = await self.hint.wait(since, max(0.0, wait_s), is_enrolled=is_enrolled)
        return web.json_response({"serial": serial})

    async def _put_blob(self, request: web.Request) -> web.Response:
        self._require(request, ("operator",))
        await self._uploads.receive(request.match_info["sha256"], request.content_length, request.content)
        return web.json_response({"sha256": request.match_info["sha256"]})

    async def _put_delta(self, request: web.Request) -> web.Response:
        self._require(request, ("operator",))
        result, name = request.match_info["result"], request.match_info["name"]
        await self._delta_uploads.receive(result, name, request.content_length, request.content)
        return web.json_response({"result": result, "name": name})

    async def _publish(self, request: web.Request) -> web.Response:
        _, operator = self._require(request, ("operator",))
        wanted = await self._body(request, ReleaseRequest, self._limits.body_size_bytes_max)
        manifests = {path: text.encode() for path, text in wanted.manifests.items()}
        async with self._change:
            serial = await asyncio.to_thread(
                self._repository.publish_models, wanted.team, bytes(wanted.metadata), manifests
            )
            await self._trials.record_published(manifests, operator)
        self.hint.announce(serial)
        _log.info("release_published", operator=operator, team=wanted.team, added=sorted(manifests), serial=serial)
        return web.json_response({"serial": serial})

    async def _publish_offline(self, request: web.Request) -> web.Response:
        _, operator = self._require(request, ("operator",))
        wanted = await self._body(request, RolesRequest, self._limits.body_size_bytes_max)
        models = {name: bytes(role) for name, role in wanted.models.items()}
        repository = self._repository
        async with self._change:
            serial = await asyncio.to_thread(
                repository.publish_offline, bytes(wanted.root) or None, bytes(wanted.targets) or None, models
            )
            settle_online_key(repository.folder.parent, repository.online_keyid)
        self.hint.announce(serial)
        _log.info("offline_roles_changed", operator=operator, root=repository.root_version, serial=serial)
        return web.json_response({"serial": serial})

    async def _offer_online_key(self, request: web.Request) -> web.Response:
        """Make the next online key; it signs nothing before root and targets trust it."""
        _, operator = self._require(request, ("operator",))
        async with self._change:
            signer = make_next_online_key(self._repository.folder.parent)
            self._repository.offer_signer(signer)
        _log.info("online_key_made", operator=operator, keyid=signer.public_key.keyid)
        return web.json_response({"keyid": signer.public_key.keyid, "key": signer.public_key.to_dict()})

    async def _roll(self, request: web.Request) -> web.Response:
        _, operator = self._require(request, ("operator",))
        intent, serial = await self._change_channel(await self._body(request, RolloutRequest), operator)
        return web.json_response({"intent": intent, "serial": serial})

    async def _change_channel(self, wanted: RolloutRequest, by: str) -> tuple[int, int]:
        async with self._change:
            before = find_rollout(self._repository.channel(wanted.channel), wanted.model)
            intent, serial = await asyncio.to_thread(self._decide, wanted, by)
            await self._trials.record(wanted, by, before, intent)
        self.hint.announce(serial)
        _log.info(
            "channel_changed", by=by, channel=wanted.channel, model=wanted.model, action=wanted.action,
            release=wanted.release, intent=intent, serial=serial, reason=wanted.reason,
        )  # fmt: skip
        return intent, serial

    def _decide(self, wanted: RolloutRequest, by: str) -> tuple[int, int]:
        repository = self._repository
        pick = None
        if wanted.release is not None:
            published = repository.find(wanted.model, wanted.release)
            pick = Pick(release=wanted.release, manifest_sha256=published.manifest_sha256)
        document = repository.channel(wanted.channel)
        current = find_rollout(document, wanted.model)
        allowed: frozenset[int] = frozenset()
        if current is not None:
            allowed = repository.find(wanted.model, current.stable.release).rollback_ok
        following = apply(
            document,
            Command(
                channel=wanted.channel,
                model=wanted.model,
                action=wanted.action,
                pick=pick,
                share=wanted.share,
                wave=wanted.wave,
                salt=secrets.token_hex(8),
                reason=wanted.reason,
                newest=max(repository.releases(wanted.model), default=0),
                rollback_ok=allowed,
                disagreement_max=wanted.disagreement_max,
                by=by,
                at=round(self._clock.wall(), 3),
            ),
        )
        serial = repository.publish_channel(following)
        signed = repository.channel(wanted.channel)
        assert signed is not None
        return signed.intent, serial

    async def _channel(self, request: web.Request) -> web.Response:
        document = self._document(request.match_info["channel"])
        return web.Response(body=msgspec.json.encode(document), content_type="application/json")

    def _document(self, name: str) -> ChannelDocument:
        document = self._repository.channel(name) if is_model_name(name) else None
        if document is None:
            raise MeshError(Code.MODEL_NOT_FOUND, "There is no such channel yet; the first push to it makes it.")
        return document

    # -- trials -------------------------------------------------------------------------------------------------------

    async def _take_report(self, request: web.Request) -> web.Response:
        _, name = self._require(request, NODE_ROLES)
        data = await self._read(request, REPORT_SIZE_BYTES_MAX)
        certificate = _tls(request).getpeercert(binary_form=True)
        accepted = self._trials.take(name, data, request.headers.get(SIGNATURE_HEADER, ""), certificate)
        return web.json_response({"accepted": accepted})

    async def _channel_status(self, request: web.Request) -> web.Response:
        self._require(request, ("operator",))
        document = self._document(request.match_info["channel"])
        members = [member.name for member in self._enrolment.members() if member.role in NODE_ROLES]
        return web.json_response(self._trials.describe(document, request.query.get("model", ""), members))

    async def _read_lineage(self, request: web.Request) -> web.Response:
        self._require(request, ("operator",))
        changes = await self._trials.history(request.query.get("model", ""))
        return web.Response(body=msgspec.json.encode({"changes": changes}), content_type="application/json")

    # -- members ------------------------------------------------------------------------------------------------------

    async def _ca(self, request: web.Request) -> web.Response:
        authority = self._device_authority if request.query.get("kind") == "device" else self._authority
        return web.Response(body=authority.certificate_pem, content_type="application/x-pem-file")

    async def _enrol(self, request: web.Request) -> web.Response:
        wanted = await self._body(request, EnrolRequest)
        certificate, root_version = self._enrolment.enrol(wanted.secret, wanted.csr.encode(), self._authority)
        _log.info("node_enrolled", peer=request.remote)
        return self._certificate(certificate, root_version)

    async def _renew(self, request: web.Request) -> web.Response:
        role, name = self._require(request, MESH_ROLES)
        wanted = await self._body(request, RenewRequest)
        certificate = self._enrolment.renew(name, role, wanted.csr.encode(), self._authority)
        return self._certificate(certificate, self._repository.root_version)

    def _certificate(self, certificate: bytes, root_version: int) -> web.Response:
        return web.json_response(
            {
                "certificate": certificate.decode(),
                "ca": self._authority.certificate_pem.decode(),
                "root": self._repository.root_bytes(root_version).decode(),
            }
        )

    async def _invite(self, request: web.Request) -> web.Response:
        _, operator = self._require(request, ("operator",))
        wanted = await self._body(request, InviteRequest)
        version = self._repository.root_version
        secret, expires_at = self._enrolment.invite(wanted.name, wanted.role, wanted.ttl_s, version)
        token = JoinToken(
            control=self.url,
            ca_sha256=self._authority.fingerprint,
            root_sha256=hashlib.sha256(self._repository.root_bytes(version)).hexdigest(),
            name=wanted.name,
            role=wanted.role,
            secret=secret,
            expires_at=expires_at,
        )
        _log.info("node_invited", operator=operator, name=wanted.name, role=wanted.role)
        return web.json_response({"token": token.encode(), "expires_at": expires_at})

    async def _list_nodes(self, request: web.Request) -> web.Response:
        role, _ = self._require(request, MESH_ROLES)
        now = self._clock.monotonic()
        rows = self._nodes.rows(now)
        if role == "operator" and request.query.get("all") == "1":
            live = {row["name"] for row in rows}
            rows += [
                {"name": m.name, "role": m.role, "addresses": {}, "seen_s_ago": None, "models": {}}
                for m in self._enrolment.members()
                if m.name not in live
            ]
        if self._nodes.is_complete(now):
            return web.json_response({"nodes": rows})
        return web.json_response({"nodes": rows, "is_complete": False, "removed": self._enrolment.removed()})

    async def _announce(self, request: web.Request) -> web.Response:
        role, name = self._require(request, NODE_ROLES)
        announcement = await self._body(request, Announcement)
        self._nodes.announce(self._clock.monotonic(), name, role, announcement)
        return web.json_response({"name": name, "role": role, "removed": self._enrolment.removed()})

    async def _remove_node(self, request: web.Request) -> web.Response:
        _, operator = self._require(request, ("operator",))
        name = request.match_info["name"]
        if name == operator:
            raise MeshError(Code.CONFLICT, "You cannot remove yourself; let another operator do it.")
        self._enrolment.remove(name)
        self._nodes.remove(name)
        self._trials.forget(name)
        _log.info("node_removed", operator=operator, name=name)
        return web.json_response({"name": name})

    # -- shared -------------------------------------------------------------------------------------------------------

    def _require(self, request: web.Request, roles: tuple[str, ...]) -> tuple[str, str]:
        """Role and name of a caller with one of `roles` whose certificate still counts."""
        tls = _tls(request)
        uri = peer_uri(tls)
        if not uri:
            raise MeshError(Code.UNAUTHENTICATED, "This call needs a certificate of this mesh; join it first.")
        role, name = parse_uri(uri)
        if role not in roles:
            raise MeshError(Code.FORBIDDEN, f"This call is not for the role {role}; it needs: {', '.join(roles)}.")
        self._enrolment.require_member(name, role, hashlib.sha256(tls.getpeercert(binary_form=True)).hexdigest())
        return role, name

    async def _read(self, request: web.Request, size_bytes_max: int) -> bytes:
        if (request.content_length or 0) > size_bytes_max:
            raise MeshError(Code.TOO_LARGE, f"The body is larger than {size_bytes_max} bytes.")
        data = await request.read()
        if len(data) > size_bytes_max:
            raise MeshError(Code.TOO_LARGE, f"The body is larger than {size_bytes_max} bytes.")
        return data

    async def _body(self, request: web.Request, type_: type[T], size_bytes_max: int | None = None) -> T:
        data = await self._read(request, size_bytes_max or self._limits.small_body_size_bytes_max)
        try:
            return msgspec.json.decode(data, type=type_)
        except msgspec.DecodeError as error:
            raise MeshError(Code.INVALID_REQUEST, f"The body does not fit: {error}.") from error


@web.middleware
async def answer_errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Turn every failure into the catalogue's status and a JSON body; nothing internal leaves the process."""
    try:
        return await handler(request)
    except MeshError as error:
        return _refusal(error)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        code = Code.TOO_LARGE if error.status == 413 else Code.INVALID_REQUEST
        return web.json_response({"error": error.reason, "code": code}, status=error.status)
    except (ConnectionError, asyncio.CancelledError):
        raise
    except Exception as error:  # noqa: BLE001 (the edge of the process: bad input must not end it)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            _log.warning("disk_full")
            return _refusal(MeshError(Code.UNAVAILABLE, "The controller's disk is full; make room and try again."))
        _log.exception("request_failed", method=request.method, route=request.path)
        return _refusal(MeshError(Code.INTERNAL, "The controller failed on this request; its log says why."))


def _refusal(error: MeshError) -> web.Response:
    headers = {}
    if error.retry_after_ms is not None:
        headers["Retry-After"] = str(-(-error.retry_after_ms // 1000))
    body = {"error": error.message, "code": error.code}
    return web.json_response(body, status=CATALOGUE[error.code].http, headers=headers)


def _whole_file(request: web.Request, path: Path, control: str) -> web.Response:
    """Metadata in one read: every node asks for it after a change, and `FileResponse` takes four times as long."""
    data = path.read_bytes()
    tag = hashlib.sha256(data).hexdigest()[:32]
    headers = {"Cache-Control": control, "ETag": f'"{tag}"'}
    if any(known.value == tag for known in request.if_none_match or ()):
        return web.Response(status=304, headers=headers)
    return web.Response(body=data, headers=headers, content_type="application/json")


def _tls(request: web.Request) -> Any:
    return None if request.transport is None else request.transport.get_extra_info("ssl_object")


def _query(request: web.Request, name: str, type_: Callable[[str], T], default: T) -> T:
    text = request.query.get(name)
    if text is None:
        return default
    try:
        return type_(text)
    except ValueError as error:
        raise MeshError(Code.INVALID_REQUEST, f"The query value {name} must be a number.") from error
