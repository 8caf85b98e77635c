"""REST bodies with binary data: one whose JSON was seen before means what it means when its JSON is parsed."""

from __future__ import annotations

import json
import random
from typing import Any

from benchmarks.fuzz_decoders import REFUSALS, Tally, mutate_message
from nearcast.errors import Code, MeshError
from nearcast.transport.json_layouts import JsonLayouts
from nearcast.transport.json_tensors import Body, Wanted, decode_request
from nearcast.wire.request import TensorRequest

_SIZE_BYTES = 2
_ITEM_SIZES = {"FP32": 4, "INT16": 2, "UINT8": 1, "INT64": 8, "BOOL": 1, "FP16": 2}


def compare_json(rng: random.Random, count: int) -> Tally:
    """Whatever is recognised means the same as what is parsed; what is neither is refused."""
    tally = Tally()
    layouts = JsonLayouts()
    corpus = [seed_body(rng) for _ in range(min(count, 100))]
    for _ in range(count):
        data = rng.choice(corpus)
        if rng.random() < 0.5:
            # The same JSON with other values.
            start = _SIZE_BYTES + int.from_bytes(data[:_SIZE_BYTES], "big")
            data = data[:start] + rng.randbytes(len(data) - start)
        else:
            data = mutate_message(data, corpus, rng)
        tally.messages += 1
        problem = judge_json(data, layouts, tally)
        if problem:
            tally.note(problem, data)
    return tally


def judge_json(data: bytes, layouts: JsonLayouts, tally: Tally) -> str:
    """Compare one body, whose first bytes say where its JSON ends; "" if all is well."""
    size_bytes, body = int.from_bytes(data[:_SIZE_BYTES], "big"), data[_SIZE_BYTES:]
    forms: tuple[Body, ...] = (body, memoryview(body))
    try:
        known = [layouts.read("m", "", form, size_bytes) for form in forms]
        parsed = [decode_request("m", "", form, size_bytes, _no_region) for form in forms]
    except MeshError as error:
        if error.code not in REFUSALS:
            tally.crashes += 1
            return f"refused with {error.code}"
        return ""
    except Exception as error:  # noqa: BLE001 - that is what is looked for
        tally.crashes += 1
        return repr(error)
    tally.accepted += 1
    meanings = {_meaning(request, wanted) for request, wanted in parsed}
    meanings |= {_meaning(request, request.form.wanted) for request in known if request is not None}
    layouts.learn(body, size_bytes, *parsed[0])
    if len(meanings) != 1:
        tally.disagreements += 1
        return "the values differ"
    return ""


def seed_body(rng: random.Random) -> bytes:
    """A good body: several inputs, most of them behind the JSON."""
    inputs, raw = [], b""
    for index in range(rng.randrange(1, 4)):
        datatype, size = rng.choice(sorted(_ITEM_SIZES)), rng.choice((0, 1, 3, 16))
        tensor: dict[str, Any] = {"name": f"t{index}", "datatype": datatype, "shape": [size]}
        if rng.random() < 0.9:
            tensor["parameters"] = {"binary_data_size": size * _ITEM_SIZES[datatype]}
            raw += bytes(size * _ITEM_SIZES[datatype])
        else:
            tensor["data"] = [1] * size
        inputs.append(tensor)
    message: dict[str, Any] = {"inputs": inputs, "parameters": {"binary_data_output": rng.random() < 0.5}}
    if rng.random() < 0.5:
        message |= {"id": "r", "outputs": [{"name": "y", "parameters": {"binary_data": True}}]}
    text = json.dumps(message).encode()
    return len(text).to_bytes(_SIZE_BYTES, "big") + text + raw


def _meaning(request: TensorRequest, wanted: Wanted) -> str:
    tensors = [(name, array.dtype, array.tolist()) for name, array in request.decode().items()]
    return repr((request.id, sorted(request.parameters.items()), [*request.requested_outputs()], wanted, tensors))


def _no_region(*_: Any) -> Any:
    raise MeshError(Code.UNSUPPORTED, "There is no shared memory here.")
