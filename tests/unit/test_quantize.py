"""Int8 variants: kept where they are faster and good enough, refused with the figure where they are not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from model_sync.publisher import quantize
from model_sync.publisher.bundle import create_bundle, read_spec, verify_bundle
from model_sync.publisher.quantize import Examples, Variant, quantize_bundle, read_examples
from nearcast.cli.bundle import command
from nearcast.errors import Code, MeshError
from nearcast.serving.engines import load_engine
from nearcast.store.contents import Contents
from nearcast.store.manifest import Manifest

WIDTH, CLASSES, ROWS = 1024, 8, 64
NEXT = Variant(release=2, semver="1.0.0+int8")
SPEC = """
name = "wide"
release = 1
semver = "1.0.0"
engine = "onnxruntime"
model_file = "wide.onnx"
licence = "Apache-2.0"
quality = 0.9
quality_tolerance = {tolerance}
golden = ["golden.npz"]
[[inputs]]
name = "x"
datatype = "FP32"
shape = [-1, {width}]
batch_axis = 0
[[outputs]]
name = "y"
datatype = "FP32"
shape = [-1, {classes}]
batch_axis = 0
"""


def make_bundle(folder: Path, *, tolerance: float = 0.05, layers: int = 2, noise: float = 0.0) -> tuple[Path, Manifest]:
    """Matrix products that wait for memory: there a quarter of the bytes is a fraction of the time."""
    generator = np.random.default_rng(7)
    nodes, weights, last = [], [], "x"
    for index in range(layers):
        columns = CLASSES if index == layers - 1 else WIDTH
        weight = generator.normal(0, 0.05, (WIDTH, columns)).astype(np.float32)
        if noise and columns == WIDTH:
            weight[0, :] = noise
        weights.append(numpy_helper.from_array(weight, f"w{index}"))
        nodes.append(helper.make_node("MatMul", [last, f"w{index}"], [f"m{index}"]))
        last = f"m{index}"
    nodes.append(helper.make_node("Identity", [last], ["y"]))
    graph = helper.make_graph(
        nodes,
        "wide",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", CLASSES])],
        weights,
    )
    source = folder / "source"
    source.mkdir()
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), source / "wide.onnx")
    np.savez(source / "golden.npz", in_x=generator.normal(size=(1, WIDTH)).astype(np.float32))
    (source / "spec.toml").write_text(SPEC.format(tolerance=tolerance, width=WIDTH, classes=CLASSES))
    return folder / "bundle", create_bundle(read_spec(source / "spec.toml"), source, folder / "bundle")


def write_examples(folder: Path, manifest: Manifest, **more: np.ndarray) -> Path:
    images = np.random.default_rng(8).normal(size=(ROWS, WIDTH)).astype(np.float32)
    np.savez(folder / "examples.npz", in_x=images, **more)
    return folder / "examples.npz"


@pytest.fixture(autouse=True)
def short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "ROUND_TIME_S", 0.002)


def test_a_variant_that_pays_becomes_a_bundle_of_its_own(tmp_path: Path) -> None:
    bundle, manifest = make_bundle(tmp_path)
    data = write_examples(tmp_path, manifest)
    asked = ["quantize", str(bundle), "--out", str(tmp_path / "int8"), "--data", str(data), "--home", str(tmp_path)]
    result = CliRunner().invoke(command, [*asked, "--json"], catch_exceptions=False)
    report = json.loads(result.stdout)
    assert result.exit_code == 0, report
    assert report["measure"] == "disagreement"
    assert all(trial["loss"] <= 0.05 for trial in report["trials"] if trial["way"] == report["kept"])
    made = verify_bundle(tmp_path / "int8")
    assert (made.release, made.parent, made.variant, made.semver) == (2, 1, "int8", "1.0.0+int8")
    assert made.quality <= manifest.quality
    assert made.properties["quantised"] == report["kept"]
    small, large = (m.file(m.model_file).size_bytes for m in (made, manifest))
    assert small < large / 3
    x = {"x": np.ones((1, WIDTH), np.float32)}
    was, now = (load_engine(Contents(m, b)).run(x)["y"] for m, b in ((manifest, bundle), (made, tmp_path / "int8")))
    assert 0 < np.abs(was - now).max() < 0.2 * np.abs(was).max()


def test_what_is_not_faster_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "FASTER_MIN", 0.01)
    bundle, manifest = make_bundle(tmp_path)
    examples = read_examples(write_examples(tmp_path, manifest), manifest)
    report = quantize_bundle(bundle, manifest, tmp_path / "int8", NEXT, examples=examples)
    assert report.kept == ""
    assert all("not faster here" in trial.verdict for trial in report.trials)
    assert not (tmp_path / "int8").exists()


def test_what_loses_too_much_is_refused(tmp_path: Path) -> None:
    """Labels that the original gets right by a hair: a weight of another size spoils the scale of its column."""
    bundle, manifest = make_bundle(tmp_path, tolerance=0.0, layers=3, noise=300.0)
    engine = load_engine(Contents(manifest, bundle))
    with np.load(write_examples(tmp_path, manifest)) as arrays:
        labels = engine.run({"x": arrays["in_x"]})["y"].argmax(-1)
    examples = read_examples(write_examples(tmp_path, manifest, label=labels), manifest)
    report = quantize_bundle(bundle, manifest, tmp_path / "int8", NEXT, examples=examples)
    assert report.measure == "accuracy"
    assert report.kept == ""
    assert any("accuracy worse by" in trial.verdict for trial in report.trials)


def test_what_cannot_be_judged_is_said(tmp_path: Path) -> None:
    bundle, manifest = make_bundle(tmp_path)
    with pytest.raises(MeshError, match="1 examples are too few") as caught:
        quantize_bundle(bundle, manifest, tmp_path / "int8", NEXT)
    assert caught.value.code is Code.INVALID_REQUEST
    with pytest.raises(MeshError, match="release above 1"):
        quantize_bundle(
            bundle, manifest, tmp_path / "int8", Variant(release=1, semver="1"), examples=Examples(inputs=())
        )
    np.savez(tmp_path / "bad.npz", in_x=np.zeros((3, WIDTH), np.float32), label=np.zeros(4))
    with pytest.raises(MeshError, match="different numbers of rows"):
        read_examples(tmp_path / "bad.npz", manifest)
    np.savez(tmp_path / "bad.npz", in_y=np.zeros((3, WIDTH), np.float32))
    with pytest.raises(MeshError, match="cannot be used"):
        read_examples(tmp_path / "bad.npz", manifest)
