"""`python -m tests.compat --grpc HOST:PORT --rest URL [--only WORD] [--json]` checks a server that holds the contract.

`--all` starts nearcast, MLServer and Triton's core one after another (`make bench-peers` installs the last two) and,
with `--write FILE`, makes the page of their results. Exits 1 if the named server, or nearcast, fails a check.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
import tempfile
from pathlib import Path

from tests.compat.children import nearcast_server
from tests.compat.registry import ABSENT, CHECKS, FAIL, PASS, Result
from tests.compat.suite import run_suite
from tests.compat.table import Server, write_page

PEERS = {"MLServer 1.7.1": "mlserver", "Triton 2.51": "triton"}
TRANSPORTS_OF_NEARCAST = ("ngh2", "grpcio")


def main() -> int:
    """Run the suite."""
    parser = argparse.ArgumentParser(prog="python -m tests.compat", description=__doc__)
    parser.add_argument("--grpc", default="", metavar="HOST:PORT")
    parser.add_argument("--rest", default="", metavar="URL")
    parser.add_argument("--only", default="", metavar="WORD", help="checks whose id contains WORD")
    parser.add_argument("--all", action="store_true", help="start and check nearcast, MLServer and Triton's core")
    parser.add_argument("--write", type=Path, metavar="FILE", help="with --all: the page of results")
    parser.add_argument("--json", action="store_true", help="print every result as JSON")
    options = parser.parse_args()
    if not (options.all or options.grpc or options.rest):
        parser.error("name a server by --grpc or --rest, or say --all")
    if options.all:
        servers = [check_nearcast(options.only), *(check_peer(name, options.only) for name in PEERS)]
    else:
        servers = [Server(options.grpc or options.rest, run_suite(options.grpc, options.rest, options.only))]
    if options.json:
        print(json.dumps({s.name: [dataclasses.asdict(r) for r in s.results] for s in servers}, indent=1))
    else:
        for server in servers:
            print_results(server)
    if options.write:
        options.write.write_text(write_page(servers))
    return 1 if any(result.status == FAIL for result in servers[0].results) else 0


def check_nearcast(only: str) -> Server:
    """Our own server, started here: both gRPC servers and REST."""
    with nearcast_server() as where:
        results: list[Result] = []
        for kind in TRANSPORTS_OF_NEARCAST:
            results += run_suite(grpc=where[kind], only=only)
        return Server("nearcast", results + run_suite(rest=where["rest"], only=only))


def check_peer(name: str, only: str) -> Server:
    """Another server, started here from its own environment."""
    module = importlib.import_module(f"tests.compat.servers.{PEERS[name]}_server")
    with tempfile.TemporaryDirectory() as folder, module.contract_server(Path(folder)) as where:
        return Server(name, run_suite(where["grpc"], where["rest"], only))


def print_results(server: Server) -> None:
    """What did not pass, and how many did."""
    counts = {status: sum(r.status == status for r in server.results) for status in (PASS, FAIL, ABSENT)}
    for result in server.results:
        if result.status != PASS:
            head = f"{result.status:6} {CHECKS[result.check].level:11} {result.transport:4}"
            print(head, result.check, result.detail)
    print(f"{server.name}: {counts[PASS]} passed, {counts[FAIL]} failed, {counts[ABSENT]} not offered", flush=True)


if __name__ == "__main__":
    sys.exit(main())
