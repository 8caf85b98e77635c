"""A pipeline that does not fit is refused when it is loaded, and one that fits says the same on every machine."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from model_sync.publisher.bundle import read_spec
from model_sync.publisher.fetch import CATALOGUE, list_known
from nearcast.errors import Code, MeshError
from nearcast.serving.pipeline.flow import decodes, ready_names, require_flow
from nearcast.serving.signature import Signature
from nearcast.store.manifest import File, Manifest, Pipeline, decode_manifest
from nearcast.store.steps import PIXELS_MAX
from tests.tiny_models import tensor

FILE = File(path="model.onnx", size_bytes=0, sha256="0" * 64, chunks=())
IMAGE = (tensor("image", "BYTES", (-1,)),)
PIXELS = (tensor("x", "FP32", (-1, 3, 8, 8)),)
LOGITS = (tensor("y", "FP32", (-1, 3)),)
TOP = tuple(tensor(name, datatype, (-1, 2)) for name, datatype in (("scores", "FP32"), ("labels", "BYTES")))
BEFORE: list[dict[str, Any]] = [
    {"step": "decode_image", "source": "image", "target": "x"},
    {"step": "resize", "tensor": "x", "width": 8, "height": 8},
    {"step": "normalise", "tensor": "x"},
    {"step": "layout", "tensor": "x"},
]
AFTER: list[dict[str, Any]] = [{"step": "softmax", "tensor": "y"}, {"step": "top_k", "source": "y", "k": 2}]


def manifest(
    before: list[dict[str, Any]] = BEFORE, after: list[dict[str, Any]] = AFTER, **fields: Any
) -> tuple[Manifest, Pipeline]:
    sides = {"inputs": fields.pop("model_inputs", PIXELS), "outputs": fields.pop("model_outputs", LOGITS)}
    pipeline = msgspec.convert({"before": before, "after": after} | msgspec.to_builtins(sides), Pipeline)
    described: dict[str, Any] = {"inputs": IMAGE, "outputs": TOP, "labels": ("r", "g", "b")} | fields
    made = Manifest(
        name="colours", release=1, semver="1", engine="onnxruntime", model_file="model.onnx", files=(FILE,),
        licence="MIT", pipeline=pipeline, **described,
    )  # fmt: skip
    return made, pipeline


def change(at: int, **fields: Any) -> list[dict[str, Any]]:
    return [{**step, **fields} if index == at else step for index, step in enumerate(BEFORE)]


def test_a_pipeline_that_fits_passes_and_survives_its_way() -> None:
    made, pipeline = manifest()
    require_flow(made, pipeline)
    assert decode_manifest(made.encode()) == made
    assert decodes(made)
    assert made.of_model().inputs == PIXELS
    assert made.of_model().pipeline is msgspec.UNSET


def test_without_steps_a_manifest_is_what_older_agents_know() -> None:
    made, _ = manifest()
    plain = made.of_model().encode()
    for younger in (b"pipeline", b"response_cache", b"quality_tolerance"):
        assert younger not in plain
    cached = msgspec.structs.replace(made, response_cache=True, quality_tolerance=0.2)
    assert decode_manifest(cached.encode()) == cached
    with pytest.raises(MeshError, match="unknown field `code`"):
        decode_manifest(made.encode().replace(b'"before":', b'"code": "os.system", "before":'))


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"before": BEFORE[1:]}, "resize names the tensor x; there are image"),
        ({"before": [BEFORE[0], *BEFORE[2:]]}, "normalise takes numbers"),
        ({"before": BEFORE[:1]}, "makes the input x images of any size"),
        ({"before": BEFORE[:-1]}, r"makes the input x FP32 \[-1, 8, 8, 3\]; declared is FP32 \[-1, 3, 8, 8\]"),
        ({"before": change(1, width=9)}, r"\[-1, 3, 8, 9\]"),
        ({"before": change(2, mean=[1.0, 2.0])}, "2 numbers for the 3 channels"),
        ({"before": change(2, datatype="FP16")}, "makes the input x FP16"),
        ({"before": change(0, target="other")}, "names the tensor x; there are other"),
        ({"before": [*BEFORE, {"step": "constant", "tensor": "s", "datatype": "INT64", "values": [1]}]}, "nothing"),
        ({"before": [*BEFORE, {"step": "constant", "tensor": "x", "datatype": "INT64", "values": [1]}]}, "already"),
        ({"before": [*BEFORE, {"step": "constant", "tensor": "c", "datatype": "FP32", "values": [1, 2]}]}, "2 values"),
        ({"inputs": (tensor("image", "UINT8", (-1,)),)}, "decode_image takes BYTES"),
        ({"after": AFTER[:1]}, "makes no output scores"),
        ({"after": [AFTER[0], {"step": "top_k", "source": "y", "k": 4}]}, "wants 4 of y, which has a last axis of 3"),
        ({"labels": ()}, "makes no output labels"),
        ({"model_outputs": (tensor("y", "INT32", (-1, 3)),)}, "softmax takes floating-point"),
        ({"model_outputs": (tensor("y", "FP32", (1, 3), None),)}, "the model's y has no batch axis"),
        (
            {"after": [{"step": "detect_boxes", "box_source": "y", "score_source": "y",
                        "grids": [{"rows": 1, "columns": 1, "sizes": [[1, 1]]}]}]},
            r"detect_boxes takes \[images, 1, 4\], not FP32 \[-1, 3\]",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(MeshError, match=match) as caught:
        require_flow(*manifest(**wrong))
    assert caught.value.code is Code.UNTRUSTED


@pytest.mark.parametrize(
    "before",
    [
        [{"step": "eval", "code": "1"}],
        change(0, pixels_max=PIXELS_MAX + 1),
        change(0, formats=["tiff"]),
        change(1, width=100_000),
        BEFORE * 5,
    ],
)
def test_no_manifest_asks_for_more_than_a_host_bears(before: list[dict[str, Any]]) -> None:
    with pytest.raises(msgspec.ValidationError):
        manifest(before)


def test_a_ready_tensor_may_come_in_place_of_the_image() -> None:
    made, _ = manifest()
    assert ready_names(made) == {"x"}
    signature = Signature(made)
    ready = {"x": np.zeros((2, 3, 8, 8), np.float32)}
    image = {"image": np.array([b"jpeg"], object)}
    signature.require(ready)
    signature.require(image)
    assert (signature.rows(ready), signature.rows(image)) == (2, 1)
    assert signature.key(ready) != signature.key(image)
    with pytest.raises(MeshError, match=r"Input x .* must have shape"):
        signature.require({"x": np.zeros((2, 3, 8, 9), np.float32)})
    with pytest.raises(MeshError, match="Input image .* is missing; got z"):
        signature.require({"z": ready["x"]})
    with pytest.raises(MeshError, match="no input x"):
        signature.require(ready | image)


@pytest.mark.parametrize("name", list_known())
def test_every_model_of_the_catalogue_fits_and_keeps_its_licence(name: str) -> None:
    known, spec = list_known()[name], read_spec(CATALOGUE / name / "bundle.toml")
    taken = {file.name for package in known.packages for file in package.files}
    there = (
        taken | {path.name for path in (CATALOGUE / name).iterdir()} | ({"LICENSE"} if known.licence_text else set())
    )
    assert {spec.model_file, *spec.files, *spec.golden} <= there
    assert "LICENSE" in spec.files
    assert (spec.name, spec.licence) == (name, known.licence)
    if spec.pipeline is not msgspec.UNSET:
        fields = {key: getattr(spec, key) for key in ("inputs", "outputs", "labels", "pipeline")}
        require_flow(msgspec.structs.replace(manifest()[0], **fields), spec.pipeline)
