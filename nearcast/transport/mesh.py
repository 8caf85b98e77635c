"""What mesh nodes ask each other beside inference. Offered on mesh listeners (mTLS) only."""

from __future__ import annotations

from nearcast.identity.name import parse_uri
from nearcast.transport.seam import Call, Methods, Reply
from nearcast.transport.service import Report
from nearcast.wire.report import encode_report

REPORT = "/nearcast.wire.v1.Mesh/Report"


def mesh_methods(report: Report) -> Methods:
    """The methods of `nearcast.wire.v1.Mesh`.

    Args:
        report: what this node says about itself now; called once per probe.
    """

    async def answer(_: bytes, call: Call) -> Reply:
        parse_uri(call.identity)
        return Reply((encode_report(report()),))

    return Methods(unary={REPORT: answer})


def join_methods(*parts: Methods) -> Methods:
    """Several sets of methods as one, for one listener.

    Raises:
        ValueError: if two parts offer the same path.
    """
    unary = {path: method for part in parts for path, method in part.unary.items()}
    stream = {path: method for part in parts for path, method in part.stream.items()}
    if len(unary) + len(stream) != sum(len(part.unary) + len(part.stream) for part in parts):
        raise ValueError("two parts offer the same method path")
    return Methods(unary=unary, stream=stream)
