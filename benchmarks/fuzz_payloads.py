"""What devices send, mutated: every payload format through admission and decoding, as a request and in a stream, and
every answer through a device.

Whatever comes is a request, samples, a refusal with a status of the convention, or an error of the catalogue; nothing
else.
"""

from __future__ import annotations

import io
import json
import random
import struct
import wave
from collections.abc import Mapping

import cbor2
import numpy as np

from benchmarks.fuzz_decoders import REFUSALS, Tally, mutate_message
from edge_node.mqtt import envelope
from edge_node.mqtt.admission import Refusal, Request, admit
from edge_node.mqtt.ledger.records import StoredInput
from edge_node.mqtt.limits import MessageLimits
from edge_node.mqtt.streams.admission import Dropped, admit_input
from edge_node.mqtt.streams.definition import StreamDefinition
from edge_node.mqtt.streams.plan import make_plan
from edge_node.mqtt.streams.samples import read_samples, read_tensor
from nearcast.errors import Code, MeshError
from nearcast.handler import ModelMetadata, TensorSpec
from nearcast.transport.mqtt import content_types as types
from nearcast.transport.mqtt import payload as payloads
from nearcast.transport.mqtt.message import Message
from nearcast.transport.mqtt.status import STATUS
from nearcast.wire.request import TensorRequest
from nearcast.wire.response import TensorResponse

STATUSES = frozenset({200, 400, 403, 404, 408, 409, 413, 415, 429, 500, 503, 504})
LIMITS = MessageLimits(payload_bytes_max=4096, image_bytes_max=1024)
TOPIC = "nc/v1/local/cam/up/infer/m"
MODELS = tuple(
    ModelMetadata(name="m", versions=("1",), platform="", inputs=inputs, outputs=(TensorSpec("y", "FP32", (-1, 2)),))
    for inputs in (
        (TensorSpec("x", "FP32", (-1, 2)),),
        (TensorSpec("x", "BYTES", (-1,)),),
        (TensorSpec("x", "INT16", (1, -1)), TensorSpec("rate", "INT64", ())),
    )
)
USERS: tuple[Mapping[str, str], ...] = (
    {},
    {"ttl-ms": "100", "shape": "3,2"},
    {"dtype": "FP32", "name": "x", "accept": types.JSON},
    {"shape": "[-1]", "dtype": "bytes", "output": "z"},
    {"accept": types.CBOR, "version": "1.0"},
)
DATA = "nc/v1/local/cam/up/data/mic"
STREAM_USERS: tuple[Mapping[str, str], ...] = (
    {},
    {"dtype": "FP64", "shape": "2,2"},
    {"dtype": "bytes"},
    {"seq": "1", "boot-id": "b", "ts": "now", "name": "x"},
    {"seq": "-1"},
)
PLANS = tuple(
    make_plan(StreamDefinition(name="mic", model="m", window=window, scale=scale), metadata)
    for metadata in (
        ModelMetadata(name="m", versions=("1",), platform="", inputs=(spec,), outputs=())
        for spec in (
            TensorSpec("x", "FP32", (-1, 2)),
            TensorSpec("x", "INT16", (1, -1)),
            TensorSpec("x", "BOOL", (-1,)),
        )
    )
    for window, scale in ((0, 1.0), (4, 1.0), (4, 0.5))
)
SUFFIX_OF = {kind: suffix for suffix, kind in types.SUFFIXES.items()}


def attack(rng: random.Random, count: int) -> Tally:
    """Mutated requests and answers; `crashes` counts what was neither taken nor refused."""
    tally = Tally()
    corpus = seed_payloads()
    bodies = [body for _, body in corpus]
    for _ in range(count):
        kind, body = rng.choice(corpus)
        data = mutate_message(body, bodies, rng) if rng.random() < 0.95 else body
        tally.messages += 1
        try:
            way = rng.choice((ask, ask, ask, hear, stream))
            tally.accepted += way(data, kind, rng)
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            tally.crashes += 1
            tally.note(f"{kind}: {error!r}", data)
    return tally


def ask(data: bytes, kind: str, rng: random.Random) -> bool:
    """One request as the node sees it; whether it was taken. What is no refusal is raised."""
    without = rng.random() < 0.3
    fitting = f"/{SUFFIX_OF[kind]}" if kind in SUFFIX_OF else ""
    suffix = rng.choice(("/json", "/cbor", "/bin", "/raw")) if rng.random() < 0.05 else fitting if without else ""
    elsewhere = rng.choice(("nc/v1/other/x/down/a", "nc/v1/local/cam/down/a/b/c/d", "a")) if rng.random() < 0.05 else ""
    message = Message(
        topic=TOPIC + suffix,
        payload=data,
        content_type="" if without else kind,
        correlation=b"" if without else rng.randbytes(4),
        response_topic="" if without else elsewhere or rng.choice(("", "nc/v1/local/cam/down/a")),
        user={} if without else rng.choice(USERS),
    )
    verdict = admit(message, 0.0, LIMITS, nonce=b"nonce")
    if isinstance(verdict, Refusal):
        answer = envelope.refusal_message(verdict)
        assert verdict.status in STATUSES
        assert answer.topic.startswith("nc/v1/local/cam/down/")
        return False
    return execute(verdict, data, rng.choice(MODELS))


def execute(request: Request, data: bytes, model: ModelMetadata) -> bool:
    """Decode a request and answer it; whether the model would have run."""
    try:
        tensors = envelope.to_inference(request, data, model, {}).decode()
    except MeshError as error:
        if error.code not in REFUSALS:
            raise
        answer = envelope.error_reply(request, error, status=None, expires=1.0)
        assert int(answer.user["status"]) in STATUSES
        return False
    for name, array in tensors.items():
        assert isinstance(name, str)
        assert array.dtype.isnative
        assert array.nbytes <= 16 * len(data) + 64
    outputs = {"y": np.zeros((1, 2), np.float32), "label": np.array([b"seven"], dtype=object)}
    response = TensorResponse(model="m", version="1", outputs=outputs)
    try:
        envelope.reply(request, response)
    except MeshError as error:
        if error.code is not Code.INVALID_REQUEST:
            raise
    return True


def hear(data: bytes, kind: str, rng: random.Random) -> bool:
    """One answer as a device sees it; whether it could be read."""
    user = {"status": "200", **rng.choice(USERS)} if rng.random() < 0.9 else {"status": "429", "retry-after-ms": "1e9"}
    try:
        payloads.decode_reply(data, kind, user, model="m").decode()
    except MeshError as error:
        if error.code is not Code.INTERNAL:
            raise
        return False
    return True


def stream(data: bytes, kind: str, rng: random.Random) -> bool:
    """One message of a stream, as far as its samples; whether there are any."""
    plan = rng.choice(PLANS)
    message = Message(topic=DATA, payload=data, content_type=rng.choice((kind, "")), user=rng.choice(STREAM_USERS))
    item = admit_input(message, 0.0, 0.0, LIMITS, {"mic"})
    if isinstance(item, Dropped):
        return False
    try:
        # What a number becomes in a type that has it not is up to numpy.
        with np.errstate(all="ignore"):
            (read_samples if plan.shape else read_tensor)(plan, StoredInput(1, item, data))
    except MeshError as error:
        if error.code not in REFUSALS:
            raise
        return False
    return True


def seed_payloads() -> list[tuple[str, bytes]]:
    """Good requests and answers of every format, and the forms that only CBOR has."""
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    request = TensorRequest(model="m", inputs={"x": x}, id="r1", parameters={"a": 1, "b": "c"}, outputs=["y"])
    response = TensorResponse(model="m", version="1", outputs={"y": x, "label": np.array([b"a", b"b"], dtype=object)})
    seeds = [(types.OCTETS, x.tobytes()), (types.OCTETS, b"text")]
    for kind in (types.JSON, types.CBOR, types.PROTOBUF):
        seeds.append((kind, payloads.encode_request(request, kind)[0]))
        seeds.append((kind, payloads.encode_reply(response, kind)[0]))
    typed = cbor2.CBORTag(85, x.tobytes())
    maps = (
        {"x": typed},
        {"x": cbor2.CBORTag(40, [[3, 2], typed])},
        {"x": cbor2.CBORTag(1040, [[3, 2], [1, 2, 3, 4, 5, 6]])},
        {"x": {"dtype": "BYTES", "shape": [2], "data": ["a", b"b"]}},
        {"id": "a", "ttl_ms": 500, "inputs": {"x": x.tolist(), "rate": 16_000}},
    )
    seeds += [(types.CBOR, cbor2.dumps(each)) for each in maps]
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}
    seeds.append((types.JSON, json.dumps({"id": "a", "ttl_ms": 5, "inputs": [tensor]}).encode()))
    fmt = b"RIFF\xff\xff\xff\xffWAVEfmt \x10\x00\x00\x00" + struct.pack("<HHIIHH", 3, 1, 8000, 64000, 8, 64)
    seeds.append((types.WAV, fmt + b"data\xff\xff\xff\xff" + np.array([1e300, np.nan, 0.5]).tobytes()))
    seeds += [(types.IMAGES[0], b"\xff\xd8\xff\xe0" + bytes(64)), (types.WAV, tone(1)), (types.WAV, tone(2))]
    return seeds


def tone(width: int) -> bytes:
    """A short WAV file."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(width)
        writer.setframerate(16_000)
        writer.writeframes(bytes(range(64)) * width)
    return file.getvalue()


assert frozenset(STATUS.values()) | {200, 408} <= STATUSES, "the catalogue has a status that devices do not know"
