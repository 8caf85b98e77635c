"""From a peer's gRPC status to the error that a caller of a channel gets; both kinds of channel share it."""

from __future__ import annotations

from nearcast.errors import Code
from nearcast.transport.seam import CallError, Metadata
from nearcast.wire import status

_RESOURCE_EXHAUSTED = 8
_TOO_LARGE = "message larger than max"


def call_error(number: int, message: str, trailers: Metadata) -> CallError:
    """The error of a call that ended with a status other than OK; `message` is still percent-encoded."""
    error = status.error_from_status(number, message, trailers, kind=CallError)
    is_foreign = not any(name == status.CODE for name, _ in trailers)
    if is_foreign and number == _RESOURCE_EXHAUSTED and _TOO_LARGE in error.message:
        # grpcio's word for it. As "overloaded" it would be sent to one node after the other.
        error = CallError(Code.TOO_LARGE, f"{error.message}; send smaller batches.")
    error.trailers = tuple(trailers)
    return error
