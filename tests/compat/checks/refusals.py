"""Requests that are wrong: each must be refused, blamed on the client, with a reason, and harm nobody after it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tests.compat.clients import Grpc, RefusedError, Rest, require_ok
from tests.compat.contract import ADD, IDENTITY, SUM, A, add_inputs
from tests.compat.registry import BOTH, GRPC, MUST, RECOMMENDED, REST, Check, add, check, expect
from tests.compat.tensors import Tensor, make

Send = Callable[[Any], Any]
REFUSALS: dict[str, tuple[str, tuple[str, ...], Send, str]] = {}
"""What is wrong, over which transports, how to send it, and whether the protocol's text says that it is wrong."""


def wrong(
    name: str, text: str, transports: str | tuple[str, ...] = BOTH, *, level: str = MUST
) -> Callable[[Send], Send]:
    def register(send: Send) -> Send:
        REFUSALS[name] = (text, (transports,) if isinstance(transports, str) else transports, send, level)
        return send

    return register


@wrong("unknown_model", "A model that does not exist")
def _(client: Any) -> Any:
    return client.infer("no_such_model", add_inputs())


@wrong("unknown_version", "A version that does not exist")
def _(client: Any) -> Any:
    return client.infer(ADD, add_inputs(), version="999")


@wrong("metadata_unknown_model", "Metadata of a model that does not exist")
def _(client: Any) -> Any:
    return client.model_metadata("no_such_model")


@wrong("metadata_unknown_version", "Metadata of a version that does not exist")
def _(client: Any) -> Any:
    return client.model_metadata(ADD, "999")


@wrong("missing_input", "A request without one of the inputs")
def _(client: Any) -> Any:
    return client.infer(ADD, {"a": A})


@wrong("no_inputs", "A request without inputs", level=RECOMMENDED)
def _(client: Any) -> Any:
    return client.infer(ADD, {})


@wrong("unknown_input", "An input that the model does not have", level=RECOMMENDED)
def _(client: Any) -> Any:
    return client.infer(ADD, add_inputs() | {"c": A})


@wrong("unknown_output", "A requested output that the model does not have")
def _(client: Any) -> Any:
    return client.infer(ADD, add_inputs(), outputs=["product"])


@wrong("other_datatype", "INT32 where the model takes FP32")
def _(client: Any) -> Any:
    return client.infer(ADD, add_inputs() | {"a": make("INT32", (2, 4), range(8))})


@wrong("unknown_datatype", "A datatype that the protocol does not have")
def _(client: Any) -> Any:
    if client.transport == REST:
        message, _ = client.request(add_inputs())
        message["inputs"][0]["datatype"] = "FLOAT32"
        return client.send(ADD, message)
    request = client.request(ADD, add_inputs())
    request.inputs[0].datatype = "FLOAT32"
    return client.send(request)


@wrong("other_shape", "Rows of 3 where the model takes rows of 4")
def _(client: Any) -> Any:
    three = make("FP32", (2, 3), range(6))
    return client.infer(ADD, {"a": three, "b": three})


@wrong("other_rank", "One axis where the model takes two")
def _(client: Any) -> Any:
    flat = make("FP32", (4,), range(4))
    return client.infer(ADD, {"a": flat, "b": flat})


@wrong("negative_shape", "A negative size in a shape")
def _(client: Any) -> Any:
    return _with_shape(client, (-1, 4))


@wrong("too_few_elements", "Fewer elements than the shape says")
def _(client: Any) -> Any:
    return _with_shape(client, (3, 4))


@wrong("too_many_elements", "More elements than the shape says")
def _(client: Any) -> Any:
    return _with_shape(client, (1, 4))


@wrong("shape_overflow", "A shape whose product overflows 64 bits")
def _(client: Any) -> Any:
    return _with_shape(client, (2**33, 2**33))


@wrong("duplicate_input", "The same input twice", GRPC, level=RECOMMENDED)
def _(client: Grpc) -> Any:
    request = client.request(ADD, add_inputs())
    request.inputs[1].name = "a"
    return client.send(request)


@wrong("raw_and_typed", "Raw contents beside typed contents", GRPC)
def _(client: Grpc) -> Any:
    request = client.request(ADD, add_inputs())
    request.inputs[0].contents.fp32_contents.extend(A.values())
    return client.send(request)


@wrong("raw_for_some", "Raw contents for one input of two", GRPC)
def _(client: Grpc) -> Any:
    request = client.request(ADD, add_inputs())
    del request.raw_input_contents[1]
    return client.send(request)


@wrong("raw_left_over", "More raw contents than inputs", GRPC)
def _(client: Grpc) -> Any:
    request = client.request(ADD, add_inputs())
    request.raw_input_contents.append(b"\0\0\0\0")
    return client.send(request)


@wrong("typed_elsewhere", "FP32 data in the field for INT64", GRPC)
def _(client: Grpc) -> Any:
    request = client.request(ADD, add_inputs(), typed=True)
    request.inputs[0].contents.Clear()
    request.inputs[0].contents.int64_contents.extend(range(8))
    return client.send(request)


@wrong("bytes_framing", "A BYTES element longer than what is left", GRPC)
def _(client: Grpc) -> Any:
    return client.infer(IDENTITY["BYTES"], {"x": Tensor("BYTES", (1, 1), b"\xff\xff\xff\x7fab")})


@wrong("bytes_count", "Fewer BYTES elements than the shape says", GRPC, level=RECOMMENDED)
def _(client: Grpc) -> Any:
    return client.infer(IDENTITY["BYTES"], {"x": Tensor("BYTES", (2, 1), b"\x02\0\0\0ab")})


@wrong("no_model_name", "A request that names no model", GRPC, level=RECOMMENDED)
def _(client: Grpc) -> Any:
    return client.infer("", add_inputs())


@wrong("no_protobuf", "A message that is no protobuf", GRPC)
def _(client: Grpc) -> Any:
    return client.call_bytes("/inference.GRPCInferenceService/ModelInfer", b"\xff\xff\xff\xff\x0f{}")


@wrong("no_json", "A body that is no JSON", REST)
def _(client: Rest) -> Any:
    return _post(client, b'{"inputs": [')


@wrong("empty_body", "An empty body", REST)
def _(client: Rest) -> Any:
    return _post(client, b"")


@wrong("json_list", "A body that is JSON but no object", REST)
def _(client: Rest) -> Any:
    return _post(client, b"[1, 2]")


@wrong("text_for_number", "Text in the data of an FP32 tensor", REST)
def _(client: Rest) -> Any:
    return _with_data(client, ADD, ["x"] * 8)


@wrong("integer_overflow", "300 in the data of a UINT8 tensor", REST, level=RECOMMENDED)
def _(client: Rest) -> Any:
    message, _ = client.request({"x": make("UINT8", (1, 2), [1, 2])})
    message["inputs"][0]["data"] = [1, 300]
    return client.send(IDENTITY["UINT8"], message)


@wrong("fraction_for_integer", "1.5 in the data of an INT32 tensor", REST, level=RECOMMENDED)
def _(client: Rest) -> Any:
    message, _ = client.request({"x": make("INT32", (1, 2), [1, 2])})
    message["inputs"][0]["data"] = [1, 1.5]
    return client.send(IDENTITY["INT32"], message)


@wrong("ragged", "Nested data whose rows have different lengths", REST, level=RECOMMENDED)
def _(client: Rest) -> Any:
    return _with_data(client, ADD, [[1, 2, 3], [4, 5, 6, 7, 8]])


@wrong("wrong_method", "GET where the protocol has POST", REST, level=RECOMMENDED)
def _(client: Rest) -> Any:
    return require_ok(client.http("GET", f"/v2/models/{ADD}/infer"))


@wrong("unknown_path", "A path that the protocol does not have", REST, level=RECOMMENDED)
def _(client: Rest) -> Any:
    return require_ok(client.http("GET", "/v2/no/such/path"))


@check("refuse.then_serve", MUST)
def serves_on(client: Any) -> None:
    """After every one of the wrong requests the next right one is answered."""
    for _, transports, send, _ in REFUSALS.values():
        if client.transport in transports:
            try:
                send(client)
            except Exception:
                continue
    answer = client.infer(ADD, add_inputs())
    expect(answer.outputs["sum"].raw == SUM.raw, "the next answer is wrong")


def _with_shape(client: Any, shape: tuple[int, ...]) -> Any:
    if client.transport == REST:
        message, _ = client.request(add_inputs())
        message["inputs"][0]["shape"] = list(shape)
        return client.send(ADD, message)
    request = client.request(ADD, add_inputs())
    del request.inputs[0].shape[:]
    request.inputs[0].shape.extend(shape)
    return client.send(request)


def _with_data(client: Rest, model: str, data: list[Any]) -> Any:
    message, _ = client.request(add_inputs())
    message["inputs"][0]["data"] = data
    return client.send(model, message)


def _post(client: Rest, body: bytes) -> Any:
    return require_ok(client.http("POST", f"/v2/models/{ADD}/infer", body, {"Content-Type": "application/json"}))


def _refusal(client: Any, send: Send) -> RefusedError:
    try:
        answer = send(client)
    except RefusedError as error:
        return error
    raise AssertionError(f"it was answered: {json.dumps(str(answer))[:160]}")


def _is_refused(send: Send) -> Callable[[Any], None]:
    return lambda client: _refusal(client, send) and None


def _is_explained(send: Send) -> Callable[[Any], None]:
    def run(client: Any) -> None:
        error = _refusal(client, send)
        expect(error.blames_client, f"it blames the server: {error}")
        expect(
            error.message,
            f"it gives no reason: {error.status}" + (', or not as {"error": text}' if client.transport == REST else ""),
        )

    return run


for _id, (_text, _transports, _send, _level) in REFUSALS.items():
    add(Check(f"refuse.{_id}", _level, f"{_text} is refused.", _transports, _is_refused(_send)))
    add(
        Check(
            f"refuse.{_id}.reason",
            RECOMMENDED,
            f"{_text} is refused with a client error and a reason.",
            _transports,
            _is_explained(_send),
        )
    )
