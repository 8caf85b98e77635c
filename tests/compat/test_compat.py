"""The conformance suite on nearcast itself: every check passes over both gRPC servers and over REST."""

from __future__ import annotations

import pytest

from tests.compat.children import nearcast_server
from tests.compat.clients import Grpc, Rest
from tests.compat.registry import (
    CHECKS,
    EXTENSION,
    GRPC,
    MUST,
    PASS,
    REST,
    Check,
    NonconformingError,
    Result,
    expect,
    run_check,
)
from tests.compat.suite import checks_over
from tests.compat.table import Server, write_page


@pytest.fixture(scope="module")
def places():
    with nearcast_server() as where:
        yield where


@pytest.mark.parametrize("kind", ["ngh2", "grpcio", "rest"])
def test_every_check_passes(places, kind):
    client = Rest(places["rest"]) if kind == "rest" else Grpc(places[kind])
    try:
        results = [run_check(item, client) for item in checks_over(client.transport)]
    finally:
        client.close()
    assert len(results) > 120
    assert [result for result in results if result.status != PASS] == []


class Announcing:
    """A client of a server that announces one extension."""

    transport = GRPC

    def extensions(self):
        return {"offered(index)"}


@pytest.mark.parametrize(("extension", "status"), [("", "fail"), ("offered", "fail"), ("unheard_of", "absent")])
def test_a_failure_is_absence_only_where_the_extension_is_not_announced(extension, status):
    def fails(client):
        expect(False, "because")

    result = run_check(Check("x", EXTENSION, "X.", (GRPC,), fails, extension), Announcing())
    assert result == Result("x", GRPC, status, "because")
    with pytest.raises(NonconformingError, match="because"):
        fails(None)


def test_the_page_counts_the_worse_of_two_runs_and_says_why():
    name = next(item.id for item in CHECKS.values() if item.level == MUST)
    server = Server(
        "one", [Result(name, GRPC, "pass"), Result(name, GRPC, "fail", "a | b"), Result(name, REST, "pass")]
    )
    assert server.counts(MUST, GRPC)[:2] == (0, 1)
    assert server.counts(MUST, REST)[:2] == (1, 0)
    page = write_page([server])
    assert "a \\| b" in page
    assert all(f"| `{item.id}`" in page for item in CHECKS.values())
