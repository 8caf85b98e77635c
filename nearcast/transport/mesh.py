"""What mesh nodes ask each other beside inference. Offered on mesh listeners (mTLS) only."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Collection, Sequence
from contextlib import aclosing

from nearcast.errors import Code, MeshError
from nearcast.identity.name import parse_uri
from nearcast.load import NodeReport
from nearcast.transport.report_feed import WATCHERS_MAX, ReportFeed
from nearcast.transport.seam import Call, Channel, Methods, Reply, StreamMethod, UnaryMethod
from nearcast.transport.service import Report
from nearcast.wire.report import Watch, decode_report, decode_watch, encode_report, encode_watch

REPORT = "/nearcast.wire.v1.Mesh/Report"
WATCH_REPORT = "/nearcast.wire.v1.Mesh/WatchReport"


def mesh_methods(report: Report) -> Methods:
    """The methods of `nearcast.wire.v1.Mesh`.

    Args:
        report: what this node says about itself now; called once per probe, and many times a second while watched.
    """
    feed = ReportFeed(report)

    async def answer(_: bytes, call: Call) -> Reply:
        parse_uri(call.identity)
        return Reply((encode_report(report()),))

    async def watch(bodies: AsyncIterator[bytes], call: Call) -> AsyncIterator[Reply]:
        parse_uri(call.identity)
        if feed.watchers >= WATCHERS_MAX:
            raise MeshError(
                Code.OVERLOADED, f"{WATCHERS_MAX} routers watch this node already; ask for reports one by one."
            )
        asked = decode_watch(await anext(bodies, b""))
        async with aclosing(feed.follow(interval_s=asked.interval_s, gap_s=asked.gap_s)) as reports:
            async for body in reports:
                yield Reply((body,))

    return Methods(unary={REPORT: answer}, stream={WATCH_REPORT: watch})


async def watch_report(channel: Channel, watch: Watch) -> AsyncGenerator[NodeReport, None]:
    """The reports of the node behind a channel as they come; ends when the node drains.

    Raises:
        CallError: UNSUPPORTED by a node that offers no stream of reports; the channel's error.
        MeshError: INTERNAL if a report is malformed.
    """

    async def wish() -> AsyncIterator[Sequence[bytes]]:
        yield (encode_watch(watch),)

    last, report = b"", NodeReport(node="", role="")
    replies = channel.stream(WATCH_REPORT, wish())
    async with aclosing(replies):
        async for body in replies:
            if body != last:
                last, report = body, decode_report(body)
            yield report


def join_methods(*parts: Methods) -> Methods:
    """Several sets of methods as one, for one listener.

    Raises:
        ValueError: if two parts offer the same path.
    """
    unary = {path: method for part in parts for path, method in part.unary.items()}
    stream = {path: method for part in parts for path, method in part.stream.items()}
    if len(unary) + len(stream) != sum(len(part.unary) + len(part.stream) for part in parts):
        raise ValueError("two parts offer the same method path")
    passing = {path: method for part in parts for path, method in part.passing.items()}
    pieced = frozenset().union(*(part.pieced for part in parts))
    return Methods(unary=unary, stream=stream, passing=passing, pieced=pieced)


class Members:
    """Who may call a mesh listener: every identity of the mesh, but for the names that were removed from it."""

    def __init__(self) -> None:
        self._removed: frozenset[str] = frozenset()

    def remove_only(self, names: Collection[str]) -> None:
        """Refuse exactly these names from now on, also on connections that are open."""
        self._removed = frozenset(names)

    def guard(self, methods: Methods) -> Methods:
        """The same methods, for members alone; others get FORBIDDEN."""
        return Methods(
            unary={path: self._unary(method) for path, method in methods.unary.items()},
            stream={path: self._stream(method) for path, method in methods.stream.items()},
            pieced=methods.pieced,
        )

    def _unary(self, method: UnaryMethod) -> UnaryMethod:
        # No coroutine of its own: this is on the way of every forwarded request.
        def guarded(body: bytes, call: Call) -> Awaitable[Reply]:
            if self._removed:
                self._require(call)
            return method(body, call)

        return guarded

    def _stream(self, method: StreamMethod) -> StreamMethod:
        def guarded(bodies: AsyncIterator[bytes], call: Call) -> AsyncIterator[Reply]:
            if self._removed:
                self._require(call)
            return method(bodies, call)

        return guarded

    def _require(self, call: Call) -> None:
        role, name = parse_uri(call.identity)
        if name in self._removed:
            raise MeshError(
                Code.FORBIDDEN, f"The {role} {name!r} was removed from the mesh; it must join again to be answered."
            )
