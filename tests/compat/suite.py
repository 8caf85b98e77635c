"""All checks, and a run of them against one server."""

from __future__ import annotations

import importlib

from tests.compat.clients import Grpc, Rest
from tests.compat.registry import CHECKS, Check, Result, run_check

MODULES = ("health", "inference", "refusals", "binary", "streaming", "extensions", "behaviour")
for _name in MODULES:
    importlib.import_module(f"tests.compat.checks.{_name}")


def checks_over(transport: str) -> list[Check]:
    """The checks that speak of one transport, in the order of the report."""
    return [item for item in CHECKS.values() if transport in item.transports]


def run_suite(grpc: str = "", rest: str = "", only: str = "") -> list[Result]:
    """Every check over the transports that are named; `only`: those whose id contains it."""
    results = []
    for client in ([Grpc(grpc)] if grpc else []) + ([Rest(rest)] if rest else []):
        try:
            results += [run_check(item, client) for item in checks_over(client.transport) if only in item.id]
        finally:
            client.close()
    return results
