"""What the codec costs per message: peek, decode, encode, beside protobuf's own parser and serializer."""

from __future__ import annotations

import timeit
from collections.abc import Callable

import numpy as np

from benchmarks.rows import Row
from nearcast.wire.request import TensorRequest, WireRequest
from nearcast.wire.response import TensorResponse
from nearcast.wire.v1 import oip_pb2 as pb

SIZES = {"600B": 600, "3.4kB": 3400, "602kB": 602_112}
"""Raw tensor sizes: a small feature vector, one Silero VAD step, one 224x224x3 float picture."""


def run(quick: bool) -> list[Row]:
    """Measure every message size; the best of five repeats."""
    rows = []
    for label, size_bytes in SIZES.items():
        rounds = max(20, min(20_000, 400_000_000 // size_bytes // 50) // (10 if quick else 1))
        for name, step in _steps(size_bytes).items():
            rows.append(Row(f"wire_{name}_{label}", _best_us(step, rounds), "us"))
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


def _best_us(step: Callable[[], object], rounds: int) -> float:
    return min(timeit.repeat(step, number=rounds, repeat=5)) / rounds * 1e6
