"""What the codec costs per message: peek, decode, encode, beside protobuf's own parser; and MQTT's payload formats."""

from __future__ import annotations

import timeit
from collections.abc import Callable
from functools import partial

import numpy as np

from benchmarks.rows import Row
from edge_node.mqtt.admission import Request, admit
from edge_node.mqtt.envelope import reply, to_inference
from edge_node.mqtt.limits import MessageLimits
from nearcast.handler import ModelMetadata, Served, Tensors, TensorSpec
from nearcast.transport.mqtt.content_types import CBOR, JSON, OCTETS, PROTOBUF
from nearcast.transport.mqtt.message import Message
from nearcast.transport.mqtt.payload import encode_request
from nearcast.transport.mqtt.topics import reply_topic, request_topic
from nearcast.wire.request import TensorRequest, WireRequest
from nearcast.wire.response import TensorResponse
from nearcast.wire.v1 import oip_pb2 as pb

SIZES = {"600B": 600, "3.4kB": 3400, "602kB": 602_112}
"""Raw tensor sizes: a small feature vector, one Silero VAD step, one 224x224x3 float picture."""
SERVED = Served(node="edge-1", tier="local", version="3")


def run(quick: bool) -> list[Row]:
    """Measure every message size; the best of five repeats."""
    rows = []
    for label, size_bytes in SIZES.items():
        rounds = max(20, min(20_000, 400_000_000 // size_bytes // 50) // (10 if quick else 1))
        for name, step in _steps(size_bytes).items():
            rows.append(Row(f"wire_{name}_{label}", _best_us(step, rounds), "us"))
    for name, step in _mqtt_steps(256).items():
        rows.append(Row(f"wire_mqtt_{name}_1kB", _best_us(step, 500 if quick else 5_000), "us"))
    return rows


def _steps(size_bytes: int) -> dict[str, Callable[[], object]]:
    tensors = {"input": np.zeros((1, size_bytes // 4), np.float32)}
    body = TensorRequest(model="silero-vad", id="r-12345", inputs=tensors).encode()

    def protobuf_decode() -> object:
        message = pb.ModelInferRequest.FromString(body)
        header = message.inputs[0]
        return np.frombuffer(message.raw_input_contents[0], "<f4").reshape(tuple(header.shape))

    def protobuf_encode() -> object:
        message = pb.ModelInferResponse(model_name="silero-vad", model_version="3", id="r-12345")
        message.outputs.add(name="input", datatype="FP32", shape=tensors["input"].shape)
        message.raw_output_contents.append(tensors["input"].tobytes())
        return message.SerializeToString()

    return {
        "peek": lambda: WireRequest(body),
        "decode": lambda: WireRequest(body).decode(),
        "decode_protobuf": protobuf_decode,
        "encode": lambda: TensorResponse(
            model="silero-vad", version="3", id="r-12345", outputs=tensors
        ).encode_pieces(),
        "encode_protobuf": protobuf_encode,
    }


def _mqtt_steps(elements: int) -> dict[str, Callable[[], object]]:
    """Admission of a request, and for each format: the node reads the request and writes the answer."""
    tensors = {"x": np.linspace(0, 1, elements, dtype=np.float32)[None]}
    specs = (TensorSpec("x", "FP32", (-1, elements)),)
    metadata = ModelMetadata(name="m", versions=("1",), platform="", inputs=specs, outputs=specs)
    limits = MessageLimits()
    steps: dict[str, Callable[[], object]] = {}
    for short, kind in (("raw", OCTETS), ("protobuf", PROTOBUF), ("cbor", CBOR), ("json", JSON)):
        payload, user = encode_request(TensorRequest(model="m", inputs=tensors), kind)
        message = Message(
            topic=request_topic("local", "device", "m"),
            payload=payload,
            content_type=kind,
            correlation=bytes(16),
            response_topic=reply_topic("local", "device", "main"),
            user={**user, "ttl-ms": "5000"},
        )
        request = admit(message, 0.0, limits, nonce=b"nonce")
        assert isinstance(request, Request)
        steps[f"admit_{short}"] = partial(admit, message, 0.0, limits, nonce=b"nonce")
        steps[f"read_{short}"] = partial(_read, request, payload, metadata)
        steps[f"answer_{short}"] = partial(_answer, request, tensors)
    return steps


def _read(request: Request, payload: bytes, metadata: ModelMetadata) -> object:
    return to_inference(request, payload, metadata, {}).decode()


def _answer(request: Request, tensors: Tensors) -> object:
    return reply(request, TensorResponse(model="m", version="3", outputs=tensors, served=SERVED))


def _best_us(step: Callable[[], object], rounds: int) -> float:
    return min(timeit.repeat(step, number=rounds, repeat=5)) / rounds * 1e6
