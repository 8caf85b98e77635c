"""What the policy learns from an error: did the target say it, or has the channel lost the target?"""

from __future__ import annotations

import pytest

from nearcast.errors import Code, MeshError
from nearcast.transport.call_status import call_error
from nearcast.transport.seam import CallError
from router.exchange import read_outcome


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (call_error(14, "edge-2 is gone", (("nc-code", "UNAVAILABLE"), ("nc-sent", "1"))), True),
        (call_error(14, "a proxy has lost its upstream", (("server", "proxy"),)), False),
        (CallError(Code.UNAVAILABLE, "The connection was lost.", sent=True), False),
        (MeshError(Code.INTERNAL, "The answer is malformed."), False),
    ],
)
def test_who_tells(error: MeshError, told: bool) -> None:
    outcome = read_outcome(error)
    assert (outcome.code, outcome.sent, outcome.told) == (error.code, error.sent, told)
