"""Logs and metrics of one process, set up by one call.

Logs go to stderr (stdout belongs to `announce` and to command output): structlog on top of stdlib logging, JSON
unless a person watches. Metrics live in a registry of their own and are served on loopback.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import msgspec
import structlog

from nearcast.metrics import LateRegistry
from nearcast.runtime.http_listener import HttpListener

if TYPE_CHECKING:
    from aiohttp import web
    from prometheus_client import CollectorRegistry

Answering: TypeAlias = "Callable[[web.Request], Awaitable[web.Response]]"
"""What answers a GET beside the metrics."""

_QUIET = ("aiohttp.access", "asyncio", "tuf", "urllib3", "grpc")
"""Libraries whose chatter below WARNING is no event of the mesh."""


LIKE_EVENTS_MAX = 50
LIKE_EVENTS_S = 10.0
EVENTS_MAX = 1024
"""Different events told apart within that time."""
CONNECTIONS_MAX = 64
"""To the metrics; the oldest goes for a newer one, and whoever scrapes comes again."""
_log = logging.getLogger(__name__)


class TelemetryConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a process logs. `auto` writes for people on a terminal and JSON elsewhere."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "console"] = "auto"


class Telemetry:
    """The metrics of one process and their listener.

    Attributes:
        collectors: where to register what need not be read yet.
    """

    def __init__(self, service: str) -> None:
        self.service = service
        self.collectors = LateRegistry()
        self._listener: HttpListener | None = None

    @property
    def registry(self) -> CollectorRegistry:
        """The same as a registry of Prometheus' library, which is imported for it."""
        return self.collectors.made()

    async def serve_metrics(
        self, address: str, *, tls: ssl.SSLContext | None = None, routes: Mapping[str, Answering] | None = None
    ) -> str:
        """Serve `GET /metrics` and return the address, with the port that the system chose.

        `routes` are what a part answers beside it, by path, such as `nearcast route explain`.

        Raises:
            MeshError: if the address is taken, or reachable from other machines without certificates.
        """

        async def make_runner() -> web.AppRunner:
            from aiohttp import web

            await asyncio.get_running_loop().run_in_executor(None, import_module, "prometheus_client")
            app = web.Application()
            for path, answer in {"/metrics": self._answer, **(routes or {})}.items():
                app.router.add_get(path, answer)
            runner = web.AppRunner(app, access_log=None)
            await runner.setup()
            assert runner.server is not None
            _bound_connections(runner.server)
            return runner

        listener = HttpListener(address, make_runner, tls=tls)
        await listener.start()
        self._listener = listener
        return listener.address

    async def close(self) -> None:
        """Stop serving metrics."""
        if self._listener is not None:
            await self._listener.close()
            self._listener = None

    async def _answer(self, request: web.Request) -> web.Response:
        from aiohttp import web
        from prometheus_client.exposition import choose_encoder

        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(self.registry), headers={"Content-Type": content_type})


def _bound_connections(server: web.Server) -> None:
    made = server.connection_made

    def connection_made(handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        made(handler, transport)
        # All beyond the bound: one that was told to close stays among them until the loop's next turn.
        for oldest in server.connections[:-CONNECTIONS_MAX]:
            oldest.force_close()

    # The library has hooks for requests, none for connections.
    server.connection_made = connection_made  # type: ignore[method-assign]


class Repetition(logging.Filter):
    """Lets the same event through `LIKE_EVENTS_MAX` times in `LIKE_EVENTS_S`, then says once how many were left out.

    Clients cause most events; none of them may fill the disk.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._monotonic = monotonic
        self._began_at = 0.0
        self._counts: dict[tuple[str, str], int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        now = self._monotonic()
        if now - self._began_at >= LIKE_EVENTS_S or len(self._counts) >= EVENTS_MAX:
            left_out = sum(count - LIKE_EVENTS_MAX for count in self._counts.values() if count > LIKE_EVENTS_MAX)
            self._began_at, self._counts = now, {}
            if left_out:
                _log.warning("left out %d like events", left_out)
        # structlog hands over a mapping, the standard library a template; what it is filled with does not count.
        message = record.msg
        event = str(message.get("event", "")) if isinstance(message, dict) else str(message)
        key = (record.name, event[:200])
        self._counts[key] = count = self._counts.get(key, 0) + 1
        return count <= LIKE_EVENTS_MAX


def start(service: str, config: TelemetryConfig) -> Telemetry:
    """Set up the logging of this process and return its metrics. Calling it again replaces the logging set-up."""
    chain: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        _name_service(service),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *chain,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(Repetition())
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=chain,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_renderers(config)],
        )
    )
    root = logging.getLogger()
    for old in root.handlers[:]:
        if getattr(old, "is_nearcast", False):
            root.removeHandler(old)
    handler.is_nearcast = True  # type: ignore[attr-defined]
    root.addHandler(handler)
    set_level(config.level)
    return Telemetry(service)


def set_level(level: str) -> None:
    """Log from this level up, from now on."""
    root = logging.getLogger()
    root.setLevel(level.upper())
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(root.level, logging.WARNING))


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """The logger of a module. Events are stable `noun_verb` names, what varies goes into fields."""
    # Bound to stdlib logging from the start: structlog's own default, before `start`, would print to stdout.
    return cast(
        "structlog.stdlib.BoundLogger",
        structlog.wrap_logger(logging.getLogger(name), wrapper_class=structlog.stdlib.BoundLogger),
    )


def _name_service(service: str) -> structlog.typing.Processor:
    def add(_logger: Any, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        event.setdefault("service", service)
        return event

    return add


def _renderers(config: TelemetryConfig) -> list[structlog.typing.Processor]:
    is_json = config.format == "json" or (config.format == "auto" and not sys.stderr.isatty())
    if is_json:
        return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    return [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
