"""Decoders beside a reference: the lazy parser of requests against protobuf's own, on mutated messages."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from benchmarks.fuzz_mutations import infer_message
from nearcast.errors import Code, MeshError
from nearcast.handler import Tensors
from nearcast.transport.json_tensors import decode_request
from nearcast.transport.ngh2_framing import MessageReader
from nearcast.wire.message import parameters_of
from nearcast.wire.request import WireRequest
from nearcast.wire.v1 import oip_pb2 as pb

REFUSALS = frozenset({Code.INVALID_REQUEST, Code.UNSUPPORTED, Code.TOO_LARGE})


@dataclass(slots=True)
class Tally:
    """What happened to the messages of one run."""

    messages: int = 0
    accepted: int = 0
    stricter: int = 0
    disagreements: int = 0
    crashes: int = 0
    first: list[str] = field(default_factory=list)

    def note(self, what: str, body: bytes) -> None:
        """Keep the first few."""
        if len(self.first) < 5:
            self.first.append(f"{what}: {body.hex()}")


def compare(rng: random.Random, count: int) -> Tally:
    """Whatever protobuf refuses we refuse; what both take means the same; we may refuse more, never fail."""
    tally = Tally()
    corpus = [seed_message(rng) for _ in range(200)]
    for _ in range(count):
        body = mutate_message(rng.choice(corpus), corpus, rng)
        tally.messages += 1
        problem = judge(body, tally)
        if problem:
            tally.note(problem, body)
    return tally


def judge(body: bytes, tally: Tally) -> str:
    """Compare one message; "" if all is well."""
    try:
        theirs: pb.ModelInferRequest | None = pb.ModelInferRequest.FromString(body)
    except DecodeError:
        theirs = None
    try:
        ours = WireRequest(body)
        ours.requested_outputs()
        tensors = ours.decode()
    except MeshError as error:
        if error.code not in REFUSALS:
            tally.crashes += 1
            return f"refused with {error.code}"
        tally.stricter += theirs is not None
        return ""
    except Exception as error:  # noqa: BLE001 - that is what is looked for
        tally.crashes += 1
        return repr(error)
    tally.accepted += 1
    if theirs is None:
        tally.disagreements += 1
        return "protobuf refuses it"
    same = (
        (ours.model, ours.version, ours.id) == (theirs.model_name, theirs.model_version, theirs.id)
        and _same_parameters(ours.parameters, parameters_of(theirs.parameters))
        and list(tensors) == [tensor.name for tensor in theirs.inputs]
        and all(
            list(array.shape) == list(tensor.shape)
            for array, tensor in zip(tensors.values(), theirs.inputs, strict=True)
        )
        and _same_raw(tensors, theirs)
    )
    if not same:
        tally.disagreements += 1
        return "the values differ"
    return ""


def _same_parameters(ours: object, theirs: object) -> bool:
    # NaN differs from itself; its text does not.
    return repr(sorted(dict(ours).items())) == repr(sorted(dict(theirs).items()))  # type: ignore[call-overload]


def _same_raw(tensors: Tensors, theirs: pb.ModelInferRequest) -> bool:
    raws = iter(theirs.raw_input_contents)
    for array, tensor in zip(tensors.values(), theirs.inputs, strict=True):
        if tensor.HasField("contents") or tensor.datatype in ("BYTES", "BOOL"):
            if not tensor.HasField("contents"):
                next(raws, None)
            continue
        if array.tobytes() != next(raws, b""):
            return False
    return True


def seed_message(rng: random.Random) -> bytes:
    """A good message: raw or typed contents, several tensors, parameters of every kind."""
    if rng.random() < 0.3:
        return infer_message(rng)
    message = pb.ModelInferRequest(model_name="m" * rng.randrange(20), model_version="1", id="i")
    for index in range(rng.randrange(4)):
        tensor = message.inputs.add(name=f"t{index}", shape=[rng.randrange(4) for _ in range(rng.randrange(3))])
        size = int(np.prod(tensor.shape))
        tensor.datatype = rng.choice(("INT8", "INT32", "FP32", "BOOL", "BYTES"))
        if rng.random() < 0.5:
            contents: Any = {
                "INT8": tensor.contents.int_contents,
                "INT32": tensor.contents.int_contents,
                "FP32": tensor.contents.fp32_contents,
                "BOOL": tensor.contents.bool_contents,
                "BYTES": tensor.contents.bytes_contents,
            }[tensor.datatype]
            contents.extend([b"x"] * size if tensor.datatype == "BYTES" else [1] * size)
        else:
            message.raw_input_contents.append(bytes(size * (4 if tensor.datatype in ("INT32", "FP32") else 1)))
    message.parameters["i"].int64_param = rng.randrange(100)
    message.parameters["s"].string_param = "text"
    if rng.random() < 0.5:
        message.outputs.add(name="y").parameters["classification"].int64_param = 3
    return message.SerializeToString()


def mutate_message(body: bytes, corpus: list[bytes], rng: random.Random) -> bytes:
    """Flip, set, cut, insert and splice bytes."""
    data = bytearray(body)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(7):
            case 0 if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 1 if data:
                data[at % len(data)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, 0x0B, 0x0C, 0x2A, 0x3A))
            case 2:
                del data[at : at + rng.choice((1, 1, 4, 1000))]
            case 3:
                data[at:at] = rng.randbytes(rng.choice((1, 2, 8)))
            case 4:
                other = rng.choice(corpus)
                start = rng.randrange(len(other) + 1)
                data[at:at] = other[start : start + rng.randrange(40)]
            case 5 if at < len(data) and data[at] < 0x80:
                # The same number in more bytes than it needs.
                data[at : at + 1] = bytes((data[at] | 0x80, 0))
            case _:
                data[at:at] = b"\xff" * rng.choice((4, 9, 10, 11)) + b"\x01"
    return bytes(data)


def feed(data: bytes) -> None:
    """Give bytes to each decoder that strangers reach; whatever is no refusal is raised."""
    for work in (_read_wire, _read_json, _read_messages):
        try:
            work(data)
        except MeshError as error:
            if error.code not in REFUSALS:
                raise


def _read_wire(data: bytes) -> None:
    request = WireRequest(data)
    request.requested_outputs()
    request.decode()


def _read_json(data: bytes) -> None:
    decode_request("m", "", data, min(len(data), 1 + data[0] * 8) if data else 0, _no_region)


def _read_messages(data: bytes) -> None:
    reader = MessageReader(1 << 16, "gzip")
    for start in range(0, len(data), 7):
        reader.feed(data[start : start + 7])


def _no_region(*_: Any) -> Any:
    raise MeshError(Code.UNSUPPORTED, "There is no shared memory here.")
