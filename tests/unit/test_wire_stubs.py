"""The stubs are what the schema says, and live beside a foreign library that registers `inference.*`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nearcast.wire.request import WireRequest
from nearcast.wire.v1 import oip_pb2 as pb

ROOT = Path(__file__).parents[2]
OURS = dict(pb.DESCRIPTOR.message_types_by_name)


def _fields(message):
    return {
        field.name: (
            field.number,
            field.type,
            field.is_repeated,
            field.message_type.name if field.message_type else "",
        )
        for field in message.fields
    }


def test_both_libraries_work_in_one_process():
    from tritonclient.grpc import InferInput, service_pb2

    tensor = InferInput("x", [2, 2], "FP32")
    tensor.set_data_from_numpy(np.arange(4, dtype=np.float32).reshape(2, 2))
    foreign = service_pb2.ModelInferRequest(model_name="m", id="7", inputs=[tensor._get_tensor()])
    foreign.raw_input_contents.append(tensor._get_content())
    request = WireRequest(foreign.SerializeToString())
    assert (request.model, request.id) == ("m", "7")
    assert request.decode()["x"].tolist() == [[0.0, 1.0], [2.0, 3.0]]
    ours = pb.ModelInferRequest.FromString(foreign.SerializeToString())
    assert ours.SerializeToString(deterministic=True) == foreign.SerializeToString(deterministic=True)


def _configuration():
    """Those messages that belong to Triton's model configuration, of which we have a part."""
    from tritonclient.grpc import model_config_pb2

    return sorted(set(OURS) & set(model_config_pb2.DESCRIPTOR.message_types_by_name))


@pytest.mark.parametrize("name", sorted(set(OURS) - set(_configuration())))
def test_numbers_and_types_are_those_of_the_public_protocol(name):
    from tritonclient.grpc import service_pb2

    theirs = service_pb2.DESCRIPTOR.message_types_by_name[name]
    mine = _fields(OURS[name])
    if name == "ModelMetadataResponse":
        assert mine.pop("properties")[0] == 6  # the specification has it, Triton has not
    assert mine == _fields(theirs)
    for nested in OURS[name].nested_types:
        if nested.name != "PropertiesEntry":
            assert _fields(nested) == _fields(theirs.nested_types_by_name[nested.name])


@pytest.mark.parametrize("name", _configuration())
def test_the_part_of_the_configuration_has_the_public_numbers(name):
    from tritonclient.grpc import model_config_pb2

    theirs = model_config_pb2.DESCRIPTOR.message_types_by_name[name]
    assert _fields(OURS[name]).items() <= _fields(theirs).items()
    for nested in OURS[name].nested_types:
        assert _fields(nested).items() <= _fields(theirs.nested_types_by_name[nested.name]).items()
    for kind in OURS[name].enum_types:
        public = {v.name: v.number for v in theirs.enum_types_by_name[kind.name].values}
        assert {v.name: v.number for v in kind.values} == public
    public = model_config_pb2.DESCRIPTOR.enum_types_by_name["DataType"].values
    assert {v.name: v.number for v in public} == dict(pb.DataType.items())


def test_no_service_of_the_public_package_is_declared():
    assert pb.DESCRIPTOR.package == "nearcast.wire.v1"
    assert not pb.DESCRIPTOR.services_by_name


def test_stubs_match_the_schema(tmp_path):
    """Compares with what the schema files declare; skipped only where the generator is not installed."""
    protoc = pytest.importorskip("grpc_tools.protoc")
    files = sorted(str(path) for path in (ROOT / "proto/nearcast/wire/v1").glob("*.proto"))
    assert len(files) == 2
    assert protoc.main(["protoc", f"-I{ROOT / 'proto'}", f"--python_out={tmp_path}", *files]) == 0
    for made in tmp_path.rglob("*_pb2.py"):
        committed = (ROOT / made.relative_to(tmp_path)).read_text()
        serialized = [line for line in committed.splitlines() if "AddSerializedFile" in line]
        assert serialized == [line for line in made.read_text().splitlines() if "AddSerializedFile" in line]


def test_no_python_lives_beside_the_schema():
    assert not list((ROOT / "proto").rglob("*.py"))
