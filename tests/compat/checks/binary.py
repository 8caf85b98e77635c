"""The binary tensor data extension of REST."""

from __future__ import annotations

import json
from typing import Any

from tests.compat.checks.inference import NOT_JSON, require_same
from tests.compat.clients import JSON_SIZE, RefusedError, Rest, read_rest, require_ok
from tests.compat.contract import ADD, DIFFERENCE, IDENTITY, SLOW, SUM, add_inputs
from tests.compat.registry import EXTENSION, REST, Check, add, check, expect
from tests.compat.tensors import DATATYPES, Tensor, make, sample

NAME = "binary_tensor_data"
ALL = {"binary_data_output": True}


@check("binary.input", EXTENSION, REST, extension=NAME)
def binary_input(client: Rest) -> None:
    """Inputs may come as binary data while the answer is JSON."""
    answer = client.infer(ADD, add_inputs(), binary=True)
    expect(not answer.binary, "the answer is binary though nobody asked for it")
    require_same(answer.outputs["sum"], SUM, "sum")


@check("binary.input.mixed", EXTENSION, REST, extension=NAME)
def mixed_inputs(client: Rest) -> None:
    """One input as binary data and one as JSON."""
    require_same(client.infer(ADD, add_inputs(), binary=["b"]).outputs["difference"], DIFFERENCE, "difference")


@check("binary.output.all", EXTENSION, REST, extension=NAME)
def all_outputs(client: Rest) -> None:
    """`binary_data_output` makes every output binary."""
    answer = client.infer(ADD, add_inputs(), parameters=ALL)
    expect(answer.binary == {"sum", "difference"}, f"binary are {sorted(answer.binary)}")
    require_same(answer.outputs["sum"], SUM, "sum")
    require_same(answer.outputs["difference"], DIFFERENCE, "difference")


@check("binary.output.one", EXTENSION, REST, extension=NAME)
def one_output(client: Rest) -> None:
    """`binary_data` makes one output binary and leaves the other as JSON."""
    answer = client.infer(ADD, add_inputs(), binary_outputs={"sum": True, "difference": False})
    expect(answer.binary == {"sum"}, f"binary are {sorted(answer.binary)}")
    require_same(answer.outputs["sum"], SUM, "sum")
    require_same(answer.outputs["difference"], DIFFERENCE, "difference")


@check("binary.output.override", EXTENSION, REST, extension=NAME)
def override(client: Rest) -> None:
    """`binary_data` of one output wins over `binary_data_output`."""
    answer = client.infer(ADD, add_inputs(), binary_outputs={"sum": False, "difference": True}, parameters=ALL)
    expect(answer.binary == {"difference"}, f"binary are {sorted(answer.binary)}")


@check("binary.header", EXTENSION, REST, extension=NAME)
def header(client: Rest) -> None:
    """A binary answer has the header that says where its JSON ends, and is application/octet-stream."""
    message, data = client.request(add_inputs(), binary=True, parameters=ALL)
    answer = _post(client, ADD, json.dumps(message).encode(), data)
    size = answer.headers.get(JSON_SIZE.lower(), "")
    expect(size.isdigit() and 0 < int(size) < len(answer.body), f"the header is {size!r}")
    json.loads(answer.body[: int(size)])
    expect(answer.headers.get("content-type") == "application/octet-stream", "another content type")


@check("binary.raw_request", EXTENSION, REST, extension=NAME)
def raw_request(client: Rest) -> None:
    """A body without JSON (header 0) is the data of a model's only input; its one free axis follows from the size."""
    tensor = make("FP32", (1, 4), [1, 2, 3, 4])
    headers = {JSON_SIZE: "0", "Content-Type": "application/octet-stream"}
    answer = read_rest(require_ok(client.http("POST", f"/v2/models/{SLOW}/infer", tensor.raw, headers)))
    expect(answer.outputs["y"].raw == tensor.raw, f"y is {answer.outputs['y']}")


def _refused(name: str, text: str, header_size: Any, sizes: int | None, extra: bytes) -> None:
    def run(client: Rest) -> None:
        message, data = client.request(add_inputs(), binary=True)
        if sizes is not None:
            message["inputs"][1]["parameters"]["binary_data_size"] = sizes
        body = json.dumps(message).encode()
        size = header_size(len(body), len(data)) if callable(header_size) else len(body)
        try:
            _post(client, ADD, body, data + extra, size)
        except RefusedError as error:
            expect(error.blames_client, f"it blames the server: {error}")
        else:
            expect(False, "it was answered")

    add(Check(f"binary.refuse.{name}", EXTENSION, text, (REST,), run, NAME))


_refused("header_too_large", "A header beyond the body's end is refused.", lambda j, d: j + d + 1, None, b"")
_refused("header_within_json", "A header that cuts the JSON is refused.", lambda j, d: j - 2, None, b"")
_refused("header_no_number", "A header that is no number is refused.", lambda j, d: "many", None, b"")
_refused("size_too_small", "A binary_data_size below what the shape needs is refused.", None, 28, b"")
_refused("size_too_large", "A binary_data_size beyond the body's end is refused.", None, 36, b"")
_refused("size_negative", "A negative binary_data_size is refused.", None, -32, b"")
_refused("left_over", "Binary data that belongs to no input is refused.", None, None, b"\0\0\0\0")


def _post(client: Rest, model: str, body: bytes, data: bytes, size: Any = None) -> Any:
    headers = {"Content-Type": "application/octet-stream", JSON_SIZE: str(len(body) if size is None else size)}
    return require_ok(client.http("POST", f"/v2/models/{model}/infer", body + data, headers))


def _identity(tensor: Tensor) -> Any:
    def run(client: Rest) -> None:
        answer = client.infer(IDENTITY[tensor.datatype], {"x": tensor}, binary=True, parameters=ALL)
        expect(answer.binary == {"y"}, "the output is not binary")
        require_same(answer.outputs["y"], tensor)

    return run


for _datatype in DATATYPES:
    _text = f"{_datatype} with its extremes comes back unchanged, as binary data."
    add(Check(f"binary.{_datatype}", EXTENSION, _text, (REST,), _identity(sample(_datatype)), NAME))
for _datatype, _values in NOT_JSON.items():
    _text = f"{_datatype} values that JSON lacks come back unchanged, as binary data."
    add(
        Check(
            f"binary.{_datatype}.not_json", EXTENSION, _text, (REST,), _identity(make(_datatype, (2, 2), _values)), NAME
        )
    )
