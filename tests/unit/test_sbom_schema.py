"""The bill of materials against the schema that CycloneDX publishes, which its library ships."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from model_sync.publisher.sbom import make_sbom
from tests.tiny_models import affine_model, write_version

SCHEMAS = files("cyclonedx.schema._res")
IGNORED = {
    "$schema", "$id", "$comment", "title", "description", "default", "examples", "format", "definitions", "meta:enum",
    "deprecated", "$ref",
}  # fmt: skip
INSIDE = {"properties", "additionalProperties", "items", "additionalItems", "if", "then", "else"}
TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
}


def load(name: str) -> Any:
    return json.loads((SCHEMAS / name).read_text())


def length(kind: type) -> Any:
    return lambda value: len(value) if isinstance(value, kind) else 0


def listed(rule: Any) -> Any:
    return [rule] if isinstance(rule, str) else rule


SIMPLE = {
    "type": lambda value, rule: any(
        isinstance(value, TYPES[kind]) for kind in ([rule] if isinstance(rule, str) else rule)
    ),
    "enum": lambda value, rule: value in rule,
    "const": lambda value, rule: value == rule,
    "pattern": lambda value, rule: not isinstance(value, str) or re.search(rule, value) is not None,
    "minLength": lambda value, rule: not isinstance(value, str) or len(value) >= rule,
    "maxLength": lambda value, rule: length(str)(value) <= rule,
    "minimum": lambda value, rule: not isinstance(value, int) or value >= rule,
    "maximum": lambda value, rule: not isinstance(value, int) or value <= rule,
    "exclusiveMinimum": lambda value, rule: not isinstance(value, int) or value > rule,
    "minItems": lambda value, rule: not isinstance(value, list) or len(value) >= rule,
    "maxItems": lambda value, rule: length(list)(value) <= rule,
    "uniqueItems": lambda value, rule: not isinstance(value, list) or len({*map(json.dumps, value)}) == len(value),
    "required": lambda value, rule: not isinstance(value, dict) or set(rule) <= set(value),
}
COMBINED = {
    "oneOf": lambda valid, rule: sum(map(valid, rule)) == 1,
    "anyOf": lambda valid, rule: any(map(valid, rule)),
    "allOf": lambda valid, rule: all(map(valid, rule)),
    "not": lambda valid, rule: not valid(rule),
}


def problems(value: Any, schema: Any, root: Any, at: str = "$") -> list[str]:
    """What JSON Schema (draft 7, the keywords that CycloneDX uses) has against a value; unknown keywords are errors."""
    if schema is True:
        return []
    if "$ref" in schema:
        file, _, pointer = schema["$ref"].partition("#")
        root = load(file.replace(".schema.json", ".SNAPSHOT.schema.json")) if file else root
        schema = root
        for part in filter(None, pointer.split("/")):
            schema = schema[part]
        return problems(value, schema, root, at)
    found = list(inside(value, schema, root, at))
    for keyword, rule in schema.items():
        if keyword in SIMPLE:
            fits = SIMPLE[keyword](value, rule)
        elif keyword in COMBINED:
            fits = COMBINED[keyword](lambda part: not problems(value, part, root, at), rule)
        else:
            assert keyword in IGNORED | INSIDE, f"the check does not know {keyword}"
            continue
        found += [] if fits else [f"{at}: {keyword} {str(rule)[:80]}"]
    return found


def inside(value: Any, schema: Any, root: Any, at: str) -> Iterator[str]:
    """Problems of members, items and branches."""
    properties = schema.get("properties", {})
    for key, member in value.items() if isinstance(value, dict) else ():
        if key in properties:
            yield from problems(member, properties[key], root, f"{at}.{key}")
        elif schema.get("additionalProperties") is False:
            yield f"{at}.{key} is not known"
    for index, item in enumerate(value) if isinstance(value, list) and isinstance(schema.get("items"), dict) else ():
        yield from problems(item, schema["items"], root, f"{at}[{index}]")
    if "if" in schema:
        branch = "else" if problems(value, schema["if"], root, at) else "then"
        yield from problems(value, schema.get(branch, True), root, at)


@pytest.fixture
def bill(tmp_path: Path) -> Any:
    manifest = write_version(tmp_path, affine_model(), release=3, extra={"notes.txt": b"notes"})
    manifest = replace(manifest, licence="Apache-2.0 OR MIT", data_sha256="d" * 64, parent=2, description="doubles")
    return json.loads(make_sbom(manifest))


def test_the_bill_fits_the_published_schema(bill: Any) -> None:
    schema = load("bom-1.6.SNAPSHOT.schema.json")
    assert problems(bill, schema, schema) == []
    for broken in (
        bill | {"specVersion": 1.6}, bill | {"serialNumber": "7"}, bill | {"surprise": 1},
        bill | {"components": [{"type": "model", "name": "x"}]}, bill | {"components": [{"type": "file"}]},
        bill | {"components": [bill["components"][0] | {"hashes": [{"alg": "SHA-256", "content": "short"}]}]},
        bill | {"components": bill["components"][:1] * 2},
    ):  # fmt: skip
        assert problems(broken, schema, schema), "the check finds what does not fit"


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
