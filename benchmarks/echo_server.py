"""Servers that echo: `python -m benchmarks.echo_server ngh2|grpcio|peer [IDENTITY]`, with TLS if an identity is given.

Each answers the bytes of a message at `PATH`, and the tensors of an inference request at `INFER_PATH`. `peer` is plain
grpc.aio with nothing of ours in it but the generated protobuf classes.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import uvloop

from benchmarks.router_node import EchoModel
from nearcast.identity import load_identity
from nearcast.runtime import announce, keep_pages
from nearcast.transport.grpc import make_server
from nearcast.transport.oip import MODEL_INFER, oip_methods
from nearcast.transport.seam import Call, Methods, Reply
from nearcast.transport.service import InferenceService
from nearcast.wire.v1 import oip_pb2 as pb

PATH = "/benchmark.Echo/Echo"
INFER_PATH = MODEL_INFER
MESSAGE_SIZE_BYTES_MAX = 64 * 1024 * 1024


async def echo(message: bytes | Sequence[bytes], call: Call) -> Reply:
    """Back as it came: what is large is never joined."""
    return Reply((message,) if isinstance(message, bytes) else message)


async def start_peer(identity: Path | None) -> str:
    """A grpc.aio server: raw bytes without a parser, inference with protobuf's."""

    async def answer(message: bytes, context: Any) -> bytes:
        return message

    async def infer(request: pb.ModelInferRequest, context: Any) -> pb.ModelInferResponse:
        tensor = request.inputs[0]
        return pb.ModelInferResponse(
            model_name=request.model_name,
            model_version="1",
            id=request.id,
            outputs=[
                pb.ModelInferResponse.InferOutputTensor(name="y", datatype=tensor.datatype, shape=list(tensor.shape))
            ],
            raw_output_contents=[request.raw_input_contents[0]],
        )

    raw: Any = grpc.unary_unary_rpc_method_handler(answer)
    parsed: Any = grpc.unary_unary_rpc_method_handler(
        infer, pb.ModelInferRequest.FromString, pb.ModelInferResponse.SerializeToString
    )

    class Handlers(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> Any:
            return raw if details.method == PATH else parsed

    options = [(f"grpc.max_{way}_message_length", MESSAGE_SIZE_BYTES_MAX) for way in ("send", "receive")]
    server = grpc.aio.server(options=options)
    server.add_generic_rpc_handlers((Handlers(),))
    if identity is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        pair = ((identity / "node.key").read_bytes(), (identity / "node.pem").read_bytes())
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    await server.start()
    globals()["_keep"] = server
    return f"127.0.0.1:{port}"


async def main(arguments: Sequence[str]) -> None:
    kind, identity = arguments[0], Path(arguments[1]) if len(arguments) > 1 else None
    if kind == "peer":
        address = await start_peer(identity)
    else:
        keep_pages()
        model = EchoModel()
        infer = oip_methods(InferenceService(model, model, server_name="bench"), trusted=False).unary[INFER_PATH]
        server = make_server(
            "ngh2" if kind == "ngh2" else "grpcio",
            Methods(unary={PATH: echo, INFER_PATH: infer}, pieced=frozenset((PATH, INFER_PATH))),
            address="127.0.0.1:0",
            identity=None if identity is None else load_identity(identity),
        )
        await server.start()
        address = server.address
    announce("echo", address=address)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1:]))
