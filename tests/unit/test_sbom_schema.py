"""The bill of materials against the schema that CycloneDX publishes, which its library ships."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from msgspec.structs import replace

from model_sync.publisher.sbom import make_sbom
from tests.tiny_models import affine_model, write_version


def problem(bill: Any) -> object:
    """What the published schema has against a bill; None = nothing."""
    return JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(bill))


@pytest.fixture
def bill(tmp_path: Path) -> Any:
    manifest = write_version(tmp_path, affine_model(), release=3, extra={"notes.txt": b"notes"})
    manifest = replace(manifest, licence="Apache-2.0 OR MIT", data_sha256="d" * 64, parent=2, description="doubles")
    return json.loads(make_sbom(manifest))


def test_the_bill_fits_the_published_schema(bill: Any) -> None:
    assert problem(bill) is None
    for broken in (
        bill | {"specVersion": 1.6}, bill | {"serialNumber": "7"}, bill | {"surprise": 1},
        bill | {"components": [{"type": "model", "name": "x"}]}, bill | {"components": [{"type": "file"}]},
        bill | {"components": [bill["components"][0] | {"hashes": [{"alg": "SHA-256", "content": "short"}]}]},
        bill | {"components": bill["components"][:1] * 2},
    ):  # fmt: skip
        assert problem(broken), "the check finds what does not fit"


def test_the_bill_says_what_a_reader_asks_for(bill: Any, tmp_path: Path) -> None:
    model = bill["metadata"]["component"]
    assert (model["type"], model["name"], model["version"]) == ("machine-learning-model", "affine", "1.0.3")
    assert model["licenses"] == [{"expression": "Apache-2.0 OR MIT"}]
    assert model["pedigree"]["ancestors"][0]["bom-ref"] == "affine@2"
    assert {part["name"]: part["type"] for part in bill["components"]} == {
        "model.onnx": "file", "notes.txt": "file", "training data": "data",
    }  # fmt: skip
    assert all(part["hashes"][0]["alg"] == "SHA-256" for part in [*bill["components"], model])
    assert bill["metadata"]["tools"]["components"][0]["name"] == "nearcast"
    assert "timestamp" not in bill["metadata"]
    properties = {each["name"]: each["value"] for each in model["properties"]}
    assert properties["nearcast:data_sha256"] == "d" * 64
    assert properties["nearcast:release"] == "3"
