"""The sync process: holder of the online key and of the mesh's authority, one HTTPS listener."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path

from aiohttp import web

from model_sync.controller.api import Controller
from model_sync.controller.config import SyncConfig
from model_sync.controller.enrolment import EnrolmentAuthority
from model_sync.controller.home import ENROLMENT_FILE, fresh_identity, last_port, lock_home, write_control
from model_sync.controller.online_key import load_online_keys, settle_online_key
from model_sync.home import default_home
from model_sync.repository.repository import Repository
from nearcast import runtime, telemetry
from nearcast.config import load_config
from nearcast.errors import Code, MeshError
from nearcast.identity import CertificateAuthority, reload_certificate, server_tls
from nearcast.runtime import Shutdown, announce, format_address, listen_error, parse_address

_log = telemetry.get_logger("model_sync.controller.app")


def run_sync(config: SyncConfig) -> int:
    """Run the sync process to its end; answers its exit code."""
    return runtime.run(lambda shutdown: serve(config, shutdown), drain_s=config.drain_s + 1.0)


async def serve(config: SyncConfig, shutdown: Shutdown) -> int:
    """Serve the control API until the shutdown is requested.

    Raises:
        MeshError: if the keys are missing, another process serves the same home, or the address is taken.
    """
    home = Path(config.home) if config.home else default_home() / "sync"
    telemetered = telemetry.start("sync", config.telemetry)
    with lock_home(home):
        authority = CertificateAuthority.load(home / "ca")
        enrolment = EnrolmentAuthority(
            home / ENROLMENT_FILE,
            lifetime_s=config.certificate_lifetime_s,
            invites_max=config.limits.invites_max,
            invite_ttl_s_max=config.limits.invite_ttl_s_max,
        )
        repository = Repository(home / "repository", *load_online_keys(home))
        settle_online_key(home, repository.online_keyid)
        controller = Controller(
            repository,
            enrolment,
            authority,
            CertificateAuthority.load(home / "device-ca"),
            limits=config.limits,
            trial=config.trial,
        )
        tls = server_tls(fresh_identity(home, authority), require_client=False, alpn=("http/1.1",))
        runner = web.AppRunner(controller.application(), access_log=None, shutdown_timeout=config.drain_s)
        try:
            await _refresh(controller)
            await runner.setup()
            controller.url = await listen(runner, config, home, tls)
            addresses = {"control": controller.url}
            if config.metrics:
                addresses["metrics"] = await telemetered.serve_metrics(config.metrics)
            write_control(home, controller.url)
            announce("sync", **addresses)
            await _keep_fresh(controller, home, authority, tls, config.refresh_s, shutdown)
        finally:
            controller.hint.close()
            await runner.cleanup()
            await telemetered.close()
            enrolment.close()
    return 0


async def listen(runner: web.AppRunner, config: SyncConfig, home: Path, tls: ssl.SSLContext) -> str:
    """Open the listener; answers the URL that nodes are told."""
    host, port = parse_address(config.address)
    ports = [port] if port else [*last_port(home, host), 0]
    for attempt in ports:
        try:
            await web.TCPSite(runner, host, attempt, ssl_context=tls).start()
            break
        except OSError as error:
            if attempt == ports[-1] or error.errno != errno.EADDRINUSE:
                raise listen_error(error, config.address) from error
    address = config.public_address or format_address(*runner.addresses[0][:2])
    if not config.public_address and host in ("0.0.0.0", "::"):  # noqa: S104 (a comparison, nothing is bound)
        raise MeshError(
            Code.INVALID_REQUEST, f"Nodes cannot reach {config.address}; set public_address to what they can reach."
        )
    return f"https://{address}"


async def _keep_fresh(
    controller: Controller,
    home: Path,
    authority: CertificateAuthority,
    tls: ssl.SSLContext,
    refresh_s: float,
    shutdown: Shutdown,
) -> None:
    while not shutdown.requested:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(refresh_s):
                await shutdown.wait()
        if shutdown.requested:
            return
        try:
            reload_certificate(tls, fresh_identity(home, authority))
        except (OSError, MeshError):
            _log.exception("certificate_not_reloaded")
        await _refresh(controller)


async def _refresh(controller: Controller) -> None:
    try:
        await controller.refresh()
    except (OSError, MeshError):
        # A full disk or a lost key must not end the process: what is signed holds on, and the next round tries again.
        _log.exception("refresh_failed")


def load_sync_config(
    path: Path | None, overrides: Sequence[str], *, home: Path | None = None, environ: Mapping[str, str] | None = None
) -> SyncConfig:
    """The layered configuration; `home` (an option of the command) is stronger than all of it."""
    environ = os.environ if environ is None else environ
    # NEARCAST_HOME is the operator's folder, not a setting of this process.
    settings = {key: value for key, value in environ.items() if key != "NEARCAST_HOME"}
    chosen = [*overrides, *([f"home={home}"] if home else [])]
    return load_config(SyncConfig, path=path, environ=settings, overrides=chosen).value
