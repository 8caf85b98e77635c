"""The lease service, for client listeners, and the question a client asks. Rules for clients: `lease.proto`."""

from __future__ import annotations

from collections.abc import Callable

from nearcast.transport.seam import Call, Channel, Methods, Reply
from nearcast.wire.lease import Lease, LeaseQuestion, decode_lease, decode_question, encode_lease, encode_question

LEASE = "/nearcast.wire.v1.Routing/Lease"


def lease_methods(grant: Callable[[LeaseQuestion, Call], Lease]) -> Methods:
    """The methods of `nearcast.wire.v1.Routing`.

    Args:
        grant: answers one question of the caller; raises MeshError to refuse.
    """

    async def answer(body: bytes, call: Call) -> Reply:
        return Reply((encode_lease(grant(decode_question(body), call)),))

    return Methods(unary={LEASE: answer})


async def ask_lease(channel: Channel, question: LeaseQuestion, *, deadline: float) -> Lease:
    """Ask a router or a node for a lease.

    Raises:
        CallError: the refusal; UNSUPPORTED from a server that knows no leases.
        MeshError: INTERNAL if the answer is malformed.
    """
    reply = await channel.unary(LEASE, (encode_question(question),), deadline=deadline)
    return decode_lease(b"".join(reply.body))
