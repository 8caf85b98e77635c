"""Calls with grpcio itself, to check a server's outputs with a client that is not ours."""

from __future__ import annotations

from typing import Any

import grpc

TIMEOUT_S = 10.0


def call(address: str, path: str, message: bytes) -> bytes:
    """One unary call over plaintext; returns the raw reply."""
    with grpc.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)]) as channel:
        method: Any = channel.unary_unary(path)
        reply: bytes = method(message, timeout=TIMEOUT_S)
    return reply
