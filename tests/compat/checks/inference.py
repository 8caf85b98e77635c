"""What an answered inference request looks like."""

from __future__ import annotations

import json
from typing import Any

from nearcast.wire.v1 import oip_pb2 as pb
from tests.compat.clients import Grpc, Rest, read_rest, require_ok, set_parameter
from tests.compat.contract import ADD, DIFFERENCE, IDENTITY, SUM, add_inputs
from tests.compat.registry import GRPC, MUST, RECOMMENDED, REST, Check, add, check, expect
from tests.compat.tensors import DATATYPES, TYPED_FIELDS, Tensor, make, sample

NOT_JSON = {
    "FP16": [float("nan"), float("inf"), float("-inf"), -0.0],
    "BF16": [float("nan"), float("inf"), float("-inf"), -0.0],
    "FP32": [float("nan"), float("inf"), float("-inf"), -0.0],
    "FP64": [float("nan"), float("inf"), float("-inf"), -0.0],
    "BYTES": [b"\xff\xfe\x00\x80", b"", b"\x00", b"\xc3"],
}
"""What only raw bytes can carry."""
LARGE = make("FP32", (1000, 1000), range(1_000_000))
HUGE = make("FP32", (1500, 3000), range(4_500_000))


def require_same(found: Tensor, wanted: Tensor, name: str = "y") -> None:
    """The very same bytes, not only near values."""
    expect(found.datatype == wanted.datatype, f"{name} is {found.datatype}, not {wanted.datatype}")
    expect(found.shape == wanted.shape, f"{name} has the shape {list(found.shape)}, not {list(wanted.shape)}")
    expect(found.raw == wanted.raw, f"{name} is {found}, not {wanted}")


def require_identity(client: Any, tensor: Tensor, **options: Any) -> None:
    """The identity model of the tensor's datatype gives it back."""
    require_same(client.infer(IDENTITY[tensor.datatype], {"x": tensor}, **options).outputs["y"], tensor)


def binary(client: Any) -> dict[str, Any]:
    """Options that make a request and its answer travel as raw bytes, if the server says that it can."""
    if client.transport == GRPC or "binary_tensor_data" not in client.extensions():
        return {}
    return {"binary": True, "parameters": {"binary_data_output": True}}


@check("infer.outputs", MUST)
def outputs(client: Any) -> None:
    """A request without outputs gets every output, with the right values."""
    answer = client.infer(ADD, add_inputs())
    expect(set(answer.outputs) == {"sum", "difference"}, f"outputs are {sorted(answer.outputs)}")
    require_same(answer.outputs["sum"], SUM, "sum")
    require_same(answer.outputs["difference"], DIFFERENCE, "difference")


@check("infer.outputs.requested", MUST)
def requested_outputs(client: Any) -> None:
    """A request that names outputs gets those only."""
    answer = client.infer(ADD, add_inputs(), outputs=["difference"])
    expect(set(answer.outputs) == {"difference"}, f"outputs are {sorted(answer.outputs)}")
    require_same(answer.outputs["difference"], DIFFERENCE, "difference")


@check("infer.model_name", MUST)
def names_model(client: Any) -> None:
    """The answer names the model."""
    expect(client.infer(ADD, add_inputs()).model == ADD, "the answer names another model")


@check("infer.model_version", RECOMMENDED)
def names_version(client: Any) -> None:
    """The answer names the version that ran."""
    expect(client.infer(ADD, add_inputs()).version, "the answer names no version")


@check("infer.version", MUST)
def explicit_version(client: Any) -> None:
    """A request for one version is answered by it."""
    version = client.infer(ADD, add_inputs()).version
    expect(version, "the answer names no version to ask for")
    answer = client.infer(ADD, add_inputs(), version=version)
    expect(answer.version == version, f"version {answer.version} answers")


@check("infer.id", MUST)
def echoes_id(client: Any) -> None:
    """The id of the request is the id of the answer."""
    answer = client.infer(ADD, add_inputs(), request_id="request-7")
    expect(answer.id == "request-7", f"the id is {answer.id!r}")


@check("infer.id.unicode", RECOMMENDED)
def echoes_any_id(client: Any) -> None:
    """An id may hold any text."""
    answer = client.infer(ADD, add_inputs(), request_id="Anfrage ✓ 7")
    expect(answer.id == "Anfrage ✓ 7", f"the id is {answer.id!r}")


@check("infer.inputs.any_order", MUST)
def any_order(client: Any) -> None:
    """Inputs are known by their names, not by their order."""
    answer = client.infer(ADD, dict(reversed(add_inputs().items())))
    require_same(answer.outputs["difference"], DIFFERENCE, "difference")


@check("infer.parameters.unknown", MUST)
def unknown_parameters(client: Any) -> None:
    """Parameters that the server does not know do no harm."""
    parameters = {"my_text": "a", "my_number": 7, "my_flag": True}
    answer = client.infer(ADD, add_inputs(), parameters=parameters)
    require_same(answer.outputs["sum"], SUM, "sum")


@check("infer.parameters.tensor", MUST)
def tensor_parameters(client: Any) -> None:
    """Parameters of inputs and of requested outputs do no harm."""
    if client.transport == GRPC:
        request = client.request(ADD, add_inputs(), outputs=["sum"])
        set_parameter(request.inputs[0].parameters["note"], "x")
        set_parameter(request.outputs[0].parameters["note"], 1)
        answer = client.send(request)
    else:
        message, _ = client.request(add_inputs(), outputs=["sum"])
        message["inputs"][0]["parameters"] = {"note": "x"}
        message["outputs"][0]["parameters"] = {"note": 1}
        answer = client.send(ADD, message)
    require_same(answer.outputs["sum"], SUM, "sum")


@check("infer.parameters.all_kinds", MUST, GRPC)
def parameter_kinds(client: Grpc) -> None:
    """Parameters of all five kinds are read: bool, int64, string, double, uint64."""
    request = client.request(ADD, add_inputs(), parameters={"a": True, "b": -(2**63), "c": "✓", "d": 0.5})
    request.parameters["e"].uint64_param = 2**64 - 1
    require_same(client.send(request).outputs["sum"], SUM, "sum")


@check("infer.contents.typed", MUST, GRPC)
def typed_contents(client: Grpc) -> None:
    """Tensors may come as typed contents."""
    answer = client.infer(ADD, add_inputs(), typed=True)
    require_same(answer.outputs["sum"], SUM, "sum")


@check("infer.contents.not_both", MUST, GRPC)
def answers_one_way(client: Grpc) -> None:
    """An answer has raw contents for all outputs or for none, and no output has both."""
    reply = client.call("ModelInfer", client.request(ADD, add_inputs()))
    if reply.raw_output_contents:
        expect(not any(o.contents.ByteSize() for o in reply.outputs), "an output has raw and typed contents")
        expect(len(reply.raw_output_contents) == len(reply.outputs), "not one raw content for each output")
    else:
        expect(all(o.contents.ByteSize() for o in reply.outputs), "an output has no contents")


@check("infer.json.nested", MUST, REST)
def nested(client: Rest) -> None:
    """Data may be nested as the shape says."""
    message, _ = client.request(add_inputs())
    for entry in message["inputs"]:
        entry["data"] = [entry["data"][:4], entry["data"][4:]]
    require_same(client.send(ADD, message).outputs["sum"], SUM, "sum")


@check("infer.json.unknown_members", RECOMMENDED, REST)
def unknown_members(client: Rest) -> None:
    """Members of the request that the protocol does not know are ignored."""
    message, _ = client.request(add_inputs())
    require_same(client.send(ADD, message | {"added_later": {"x": 1}}).outputs["sum"], SUM, "sum")


@check("infer.json.content_type", RECOMMENDED, REST)
def content_type(client: Rest) -> None:
    """A JSON answer says that it is application/json."""
    message, _ = client.request(add_inputs())
    found = client.http("POST", f"/v2/models/{ADD}/infer", json.dumps(message).encode()).headers.get("content-type", "")
    expect(found.startswith("application/json"), f"it says {found!r}")


@check("infer.json.no_content_type", RECOMMENDED, REST)
def without_content_type(client: Rest) -> None:
    """A request without Content-Type is read as JSON."""
    message, _ = client.request(add_inputs())
    answer = require_ok(client.http("POST", f"/v2/models/{ADD}/infer", json.dumps(message).encode()))
    require_same(read_rest(answer).outputs["sum"], SUM, "sum")


@check("infer.shape.one_row", MUST)
def one_row(client: Any) -> None:
    """A free axis takes the size 1."""
    require_identity(client, make("FP32", (1, 1), [0.25]))


@check("infer.shape.empty", RECOMMENDED)
def empty(client: Any) -> None:
    """A tensor without elements keeps its shape."""
    require_identity(client, make("FP32", (0, 3), []))


@check("infer.shape.empty_bytes", RECOMMENDED)
def empty_bytes(client: Any) -> None:
    """A BYTES tensor without elements keeps its shape."""
    require_identity(client, make("BYTES", (0, 2), []))


@check("infer.large", RECOMMENDED)
def large(client: Any) -> None:
    """A tensor of 4 MB goes through, over REST as binary data where the server offers it."""
    require_identity(client, LARGE, **binary(client))


@check("infer.large.18mb", RECOMMENDED, GRPC)
def huge(client: Grpc) -> None:
    """A tensor of 18 MB goes through."""
    require_identity(client, HUGE)


@check("infer.method.unknown", MUST, GRPC)
def unknown_method(client: Grpc) -> None:
    """A method that does not exist is UNIMPLEMENTED."""
    from tests.compat.clients import SERVICE, RefusedError

    try:
        client.call_bytes(SERVICE + "NoSuchMethod", pb.ServerLiveRequest().SerializeToString())
    except RefusedError as error:
        expect(error.status == "UNIMPLEMENTED", f"it says {error}")
    else:
        expect(False, "it was answered")


def _add_datatypes() -> None:
    """One check for each datatype and way that it can travel."""
    for datatype in DATATYPES:
        text = f"{datatype} with its extremes comes back unchanged"
        json_level = RECOMMENDED if datatype in ("FP16", "BF16") else MUST
        raw_level = RECOMMENDED if datatype == "BF16" else MUST
        add(Check(f"datatype.{datatype}.raw", raw_level, f"{text}, as raw contents.", (GRPC,), _identity(datatype)))
        add(Check(f"datatype.{datatype}.json", json_level, f"{text}, as JSON.", (REST,), _identity(datatype)))
        if datatype in TYPED_FIELDS:
            run = _identity(datatype, typed=True)
            add(Check(f"datatype.{datatype}.typed", MUST, f"{text}, as typed contents.", (GRPC,), run))
    for datatype, values in NOT_JSON.items():
        level = RECOMMENDED if datatype == "BF16" else MUST
        what = "Bytes that are no UTF-8" if datatype == "BYTES" else f"NaN, infinities and -0 in {datatype}"
        tensor = make(datatype, (2, 2), values)
        add(Check(f"datatype.{datatype}.not_json", level, f"{what} come back unchanged.", (GRPC,), _raw(tensor)))


def _identity(datatype: str, **options: Any) -> Any:
    return lambda client: require_identity(client, sample(datatype), **options)


def _raw(tensor: Tensor) -> Any:
    return lambda client: require_identity(client, tensor, **binary(client))


_add_datatypes()
