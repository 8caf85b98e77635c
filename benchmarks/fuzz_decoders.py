"""Decoders beside a reference: the lazy parser of requests and answers against protobuf's own, on mutated messages."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
from google.protobuf.message import DecodeError

from benchmarks.fuzz_mutations import infer_message
from nearcast.errors import Code, MeshError
from nearcast.handler import Served, Tensors
from nearcast.transport.json_tensors import decode_request
from nearcast.transport.ngh2_framing import MessageReader
from nearcast.wire.framing import encode_field
from nearcast.wire.message import parameters_of
from nearcast.wire.request import PiecedRequest, WireRequest
from nearcast.wire.response import WireResponse
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
    asked = [seed_message(rng) for _ in range(min(count, 200))]
    answered = [seed_answer(rng) for _ in range(min(count, 100))]
    for index in range(count):
        corpus, judge_one = (answered, judge_answer) if index % 4 == 0 else (asked, judge)
        body = mutate_message(rng.choice(corpus), corpus, rng)
        tally.messages += 1
        problem = judge_one(body, tally)
        if problem:
            tally.note(problem, body)
    return tally


def judge(body: bytes, tally: Tally) -> str:
    """Compare one request with what protobuf reads, and with itself in pieces; "" if all is well."""
    try:
        theirs: pb.ModelInferRequest | None = pb.ModelInferRequest.FromString(body)
    except DecodeError:
        theirs = None
    ours = _read(lambda: WireRequest(body), REFUSALS)
    problem = _weigh(ours, theirs, tally, () if theirs is None else theirs.inputs, "raw_input_contents")
    if not problem and _differ(ours, _read(lambda: PiecedRequest(_cut(body)), REFUSALS)):
        tally.disagreements += 1
        return "it means something else in pieces"
    return problem


def judge_answer(body: bytes, tally: Tally) -> str:
    """The same of one answer; whatever is wrong with it is the fault of the peer that sent it."""
    try:
        theirs: pb.ModelInferResponse | None = pb.ModelInferResponse.FromString(body)
    except DecodeError:
        theirs = None
    ours = _read(lambda: WireResponse(body, Served()), frozenset({Code.INTERNAL}))
    return _weigh(ours, theirs, tally, () if theirs is None else theirs.outputs, "raw_output_contents")


_Message: TypeAlias = WireRequest | WireResponse
_Theirs: TypeAlias = pb.ModelInferRequest | pb.ModelInferResponse | None


def _read(make: Callable[[], _Message], refusals: frozenset[Code]) -> _Message | Code | Exception:
    """What was read, its tensors and requested outputs too; the code of a refusal; or the error that is none."""
    try:
        message = make()
        if isinstance(message, WireRequest):
            message.requested_outputs()
        message.decode()
    except MeshError as error:
        return error.code if error.code in refusals else error
    except Exception as error:  # noqa: BLE001 - that is what is looked for
        return error
    return message


def _weigh(ours: _Message | Code | Exception, theirs: _Theirs, tally: Tally, tensors: Sequence[Any], raws: str) -> str:
    if isinstance(ours, Code):
        tally.stricter += theirs is not None
        return ""
    if isinstance(ours, Exception):
        tally.crashes += 1
        return repr(ours)
    tally.accepted += 1
    if theirs is None:
        tally.disagreements += 1
        return "protobuf refuses it"
    found = ours.decode()
    same = (
        (ours.model, ours.version, ours.id) == (theirs.model_name, theirs.model_version, theirs.id)
        and _same_parameters(ours.parameters, parameters_of(theirs.parameters))
        and list(found) == [tensor.name for tensor in tensors]
        and all(list(array.shape) == list(tensor.shape) for array, tensor in zip(found.values(), tensors, strict=True))
        and _same_raw(found, tensors, getattr(theirs, raws))
    )
    if not same:
        tally.disagreements += 1
        return "the values differ"
    return ""


def _differ(one: _Message | Code | Exception, other: _Message | Code | Exception) -> bool:
    """Whether the same bytes, read in two ways, mean two things."""
    if isinstance(one, WireRequest) and isinstance(other, WireRequest):
        return _meaning(one) != _meaning(other)
    return one is not other


def _meaning(request: WireRequest) -> tuple[object, ...]:
    tensors = [(name, array.dtype, repr(array.tolist())) for name, array in request.decode().items()]
    return request.model, request.version, request.id, tuple(request.requested_outputs()), request.encode(), tensors


def _cut(body: bytes) -> list[bytes]:
    """A message as it may come: the head in the first piece, if it ends with raw contents."""
    ends = sorted({max(0, len(body) - 3), max(0, len(body) - 1), len(body)})
    return [body[start:stop] for start, stop in pairwise([0, *ends])]


def _same_parameters(ours: object, theirs: object) -> bool:
    # NaN differs from itself; its text does not.
    return repr(sorted(dict(ours).items())) == repr(sorted(dict(theirs).items()))  # type: ignore[call-overload]


def _same_raw(found: Tensors, tensors: Sequence[Any], raw_contents: Sequence[bytes]) -> bool:
    raws = iter(raw_contents)
    for array, tensor in zip(found.values(), tensors, strict=True):
        if tensor.HasField("contents") or tensor.datatype in ("BYTES", "BOOL"):
            if not tensor.HasField("contents"):
                next(raws, None)
            continue
        if array.tobytes() != next(raws, b""):
            return False
    return True


def seed_message(rng: random.Random) -> bytes:
    """A good request: raw or typed contents, several tensors, parameters of every kind."""
    if rng.random() < 0.3:
        return infer_message(rng)
    message = pb.ModelInferRequest(model_name="m" * rng.randrange(20), model_version="1", id="i")
    _fill(message, message.inputs, message.raw_input_contents, rng)
    if rng.random() < 0.5:
        message.outputs.add(name="y").parameters["classification"].int64_param = 3
    body = message.SerializeToString()
    # An id may follow the raw contents; of two the last one counts.
    return body + encode_field(3, "iü".encode()) if rng.random() < 0.3 else body


def seed_answer(rng: random.Random) -> bytes:
    """A good answer."""
    message = pb.ModelInferResponse(model_name="m" * rng.randrange(20), model_version="1", id="i")
    _fill(message, message.outputs, message.raw_output_contents, rng)
    return message.SerializeToString()


def _fill(message: Any, tensors: Any, raws: Any, rng: random.Random) -> None:
    typed = rng.choice((0.0, 0.0, 0.5, 1.0))
    for index in range(rng.randrange(4)):
        tensor = tensors.add(name=f"t{index}", shape=[rng.choice((0, 1, 2, 3, 16)) for _ in range(rng.randrange(3))])
        size = int(np.prod(tensor.shape))
        tensor.datatype = rng.choice(("INT8", "INT32", "FP32", "BOOL", "BYTES"))
        if rng.random() < typed:
            contents: Any = {
                "INT8": tensor.contents.int_contents,
                "INT32": tensor.contents.int_contents,
                "FP32": tensor.contents.fp32_contents,
                "BOOL": tensor.contents.bool_contents,
                "BYTES": tensor.contents.bytes_contents,
            }[tensor.datatype]
            contents.extend([b"x"] * size if tensor.datatype == "BYTES" else [1] * size)
        else:
            raws.append(bytes(size * (4 if tensor.datatype in ("INT32", "FP32") else 1)))
    message.parameters["i"].int64_param = rng.randrange(100)
    message.parameters["s"].string_param = "text"


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
