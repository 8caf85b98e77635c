"""Proxies that the router is measured beside: Envoy, HAProxy, one made of grpc.aio. HTTP/2 on both sides, one core.

`python -m benchmarks.router_peers ADDRESS [IDENTITY]` is the one made of grpc.aio.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import uvloop

from benchmarks.peers import FOLDER, free_port, stop_group
from benchmarks.processes import SERVER_CPU
from nearcast.transport.grpcio_channel import TLS_SERVER_NAME

ENVOY = FOLDER / "envoy" / "bin" / "envoy"
START_TIMEOUT_S = 20.0
MESSAGE_SIZE_BYTES_MAX = 64 * 1024 * 1024
_FILTERS = "type.googleapis.com/envoy.extensions.filters"
WINDOW_BYTES = 1 << 20
"""Of a stream, as ours: HAProxy's own default would let 64 kB pass at a time."""


@contextlib.contextmanager
def envoy(target: str, identity: Path | None, folder: Path) -> Iterator[dict[str, Any]]:
    """Envoy with one listener, one route and one cluster; no retries, no log, no statistics sink."""
    port = free_port()
    host, _, target_port = target.rpartition(":")
    http2 = {"initial_stream_window_size": WINDOW_BYTES, "initial_connection_window_size": 64 * WINDOW_BYTES}
    cluster: dict[str, Any] = {
        "name": "node",
        "type": "STATIC",
        "load_assignment": {
            "cluster_name": "node",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(host, int(target_port))}}]}],
        },
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {"http2_protocol_options": http2},
            }
        },
    }
    if identity is not None:
        cluster["transport_socket"] = _envoy_tls(identity)
    manager = {
        "@type": f"{_FILTERS}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "in",
        "codec_type": "HTTP2",
        "generate_request_id": False,
        "http2_protocol_options": http2,
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "node", "timeout": "0s"}}],
                }
            ]
        },
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{_FILTERS}.http.router.v3.Router"},
            }
        ],
    }
    chain = {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
    listener = {"name": "in", "address": _address("127.0.0.1", port), "filter_chains": [chain]}
    config = folder / f"envoy-{port}.json"
    config.write_text(json.dumps({"static_resources": {"listeners": [listener], "clusters": [cluster]}}))
    command = [str(ENVOY), "-c", str(config), "--concurrency", "1", "--disable-hot-restart", "-l", "error"]
    with _running(command, port, folder) as child:
        yield child


@contextlib.contextmanager
def haproxy(target: str, identity: Path | None, folder: Path) -> Iterator[dict[str, Any]]:
    """HAProxy with one thread, one front and one server."""
    port = free_port()
    server = f"server node {target} proto h2"
    if identity is not None:
        pair = folder / f"haproxy-{port}.pem"
        pair.write_bytes((identity / "node.pem").read_bytes() + (identity / "node.key").read_bytes())
        server = f"server node {target} ssl verify required ca-file {identity}/ca.pem crt {pair} alpn h2"
    config = folder / f"haproxy-{port}.cfg"
    config.write_text(f"""
global
    nbthread 1
    tune.h2.initial-window-size {WINDOW_BYTES}
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    http-reuse always
frontend in
    bind 127.0.0.1:{port} proto h2
    default_backend nodes
backend nodes
    {server}
""")
    with _running([str(shutil.which("haproxy")), "-db", "-f", str(config)], port, folder) as child:
        yield child


def _envoy_tls(identity: Path) -> dict[str, Any]:
    pair = {
        "certificate_chain": {"filename": str(identity / "node.pem")},
        "private_key": {"filename": str(identity / "node.key")},
    }
    return {
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
            "common_tls_context": {
                "alpn_protocols": ["h2"],
                "tls_certificates": [pair],
                "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
                "validation_context": {"trusted_ca": {"filename": str(identity / "ca.pem")}},
            },
        },
    }


def _address(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}


@contextlib.contextmanager
def _running(command: list[str], port: int, folder: Path) -> Iterator[dict[str, Any]]:
    log = folder / f"{port}.log"
    with log.open("wb") as out:
        child = subprocess.Popen(
            ["taskset", "-c", str(SERVER_CPU), *command], stdout=out, stderr=out, start_new_session=True
        )
    try:
        ends_at = time.monotonic() + START_TIMEOUT_S
        while not _listens(port):
            if child.poll() is not None or time.monotonic() > ends_at:
                raise RuntimeError(f"{command[0]} is not ready: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)
        yield {"address": f"127.0.0.1:{port}", "pid": child.pid}
    finally:
        stop_group(child)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def main() -> None:
    """The proxy of grpc.aio: messages are passed as they came."""
    target, identity = sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else None
    options: list[tuple[str, Any]] = [
        (f"grpc.max_{way}_message_length", MESSAGE_SIZE_BYTES_MAX) for way in ("send", "receive")
    ]
    if identity is None:
        channel = grpc.aio.insecure_channel(target, options)
    else:
        credentials = grpc.ssl_channel_credentials(
            (identity / "ca.pem").read_bytes(),
            (identity / "node.key").read_bytes(),
            (identity / "node.pem").read_bytes(),
        )
        named = [*options, ("grpc.ssl_target_name_override", TLS_SERVER_NAME)]
        channel = grpc.aio.secure_channel(target, credentials, named)

    class Handlers(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> Any:
            onward: Any = channel.unary_unary(details.method)

            async def passing(message: bytes, context: Any) -> bytes:
                call = onward(message)
                answer: bytes = await call
                context.set_trailing_metadata(await call.trailing_metadata())
                return answer

            forward: Any = grpc.unary_unary_rpc_method_handler(passing)
            return forward

    server = grpc.aio.server(options=options)
    server.add_generic_rpc_handlers((Handlers(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(json.dumps({"address": f"127.0.0.1:{port}", "pid": os.getpid()}), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
