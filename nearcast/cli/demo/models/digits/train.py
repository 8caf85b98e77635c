"""Train the digits models of the demo on scikit-learn's digits and write them next to this file.

`python nearcast/cli/demo/models/digits/train.py` needs the development install (scikit-learn, onnx). The same versions
give the same bytes. Written: `digits-1.onnx` and `digits-2.onnx` (int8, for the edge), `digits-large-1.onnx` (float32,
for the cloud), `samples.npz`: test images with labels, and one image on which releases 1 and 2 disagree, the golden
inputs `golden.npz`, and `seven.npy` to try by hand.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

HERE = Path(__file__).parent
OPSET, IR_VERSION = 17, 8
PIXEL_MAX = 16.0


def build_graph(model: MLPClassifier) -> onnx.ModelProto:
    """The network as ONNX: `image` FP32 [N, 64] with pixels 0..16 -> `probabilities` FP32 [N, 10]."""
    scale = numpy_helper.from_array(np.array(1 / PIXEL_MAX, np.float32), "scale")
    nodes, weights, last = [helper.make_node("Mul", ["image", "scale"], ["x0"])], [scale], "x0"
    layers = len(model.coefs_)
    for i, (weight, bias) in enumerate(zip(model.coefs_, model.intercepts_, strict=True)):
        weights += [
            numpy_helper.from_array(weight.astype(np.float32), f"w{i}"),
            numpy_helper.from_array(bias.astype(np.float32), f"b{i}"),
        ]
        nodes.append(helper.make_node("Gemm", [last, f"w{i}", f"b{i}"], [f"g{i}"]))
        last = f"g{i}"
        if i < layers - 1:
            nodes.append(helper.make_node("Relu", [last], [f"r{i}"]))
            last = f"r{i}"
    nodes.append(helper.make_node("Softmax", [last], ["probabilities"], axis=1))
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 64])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", 10])],
        weights,
    )
    result = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(result)
    return result


class Calibration(CalibrationDataReader):  # type: ignore[misc]
    """Training images, one batch at a time, from which the quantiser learns the activation ranges."""

    def __init__(self, images: np.ndarray) -> None:
        self._batches = iter(np.array_split(images.astype(np.float32), 10))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"image": batch}


def quantise(model: onnx.ModelProto, images: np.ndarray, out: Path) -> None:
    """Write the int8 form: per-channel int8 weights, uint8 activations."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "float.onnx"
        onnx.save(model, source)
        quantize_static(
            source,
            out,
            Calibration(images),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            op_types_to_quantize=["Gemm"],
        )


def shift(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each 8x8 image moved by up to one pixel: what release 2 additionally learns from."""
    moved = images.reshape(-1, 8, 8).copy()
    for i, (dy, dx) in enumerate(rng.integers(-1, 2, size=(len(moved), 2))):
        moved[i] = np.roll(moved[i], (dy, dx), axis=(0, 1))
    return moved.reshape(-1, 64)


def main() -> None:
    """Train, quantise, compare, write."""
    images, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(images, labels, test_size=0.25, random_state=7, stratify=labels)
    first = MLPClassifier((128, 64), random_state=1, max_iter=60).fit(train_x / PIXEL_MAX, train_y)
    more_x = np.concatenate([train_x, shift(train_x, np.random.default_rng(2))])
    second = MLPClassifier((128, 64), random_state=2, max_iter=60).fit(more_x / PIXEL_MAX, np.tile(train_y, 2))
    large = MLPClassifier((512, 256), random_state=3, max_iter=60).fit(train_x / PIXEL_MAX, train_y)

    quantise(build_graph(first), train_x, HERE / "digits-1.onnx")
    quantise(build_graph(second), train_x, HERE / "digits-2.onnx")
    onnx.save(build_graph(large), HERE / "digits-large-1.onnx")

    batch = test_x.astype(np.float32)
    answers = {}
    for name in ("digits-1", "digits-2", "digits-large-1"):
        answers[name] = InferenceSession(HERE / f"{name}.onnx").run(None, {"image": batch})[0]
        print(f"{name}: accuracy {(answers[name].argmax(1) == test_y).mean():.4f} on {len(test_y)} test images")
    one, two = answers["digits-1"], answers["digits-2"]
    differ = np.flatnonzero((one.argmax(1) != two.argmax(1)) & (one.max(1) > 0.5) & (two.max(1) > 0.5))
    best = differ[np.argmax(np.minimum(one[differ].max(1), two[differ].max(1)))]
    print(
        f"test image {best}: release 1 says {one[best].argmax()}, "
        f"release 2 says {two[best].argmax()}, label {test_y[best]}"
    )
    clear = np.flatnonzero((one.argmax(1) == test_y) & (two.argmax(1) == test_y) & (one.max(1) > 0.9))
    chosen = [int(clear[test_y[clear] == digit][0]) for digit in range(10)]
    np.savez_compressed(
        HERE / "samples.npz",
        images=batch[chosen],
        labels=test_y[chosen],
        disputed=batch[best],
        disputed_label=test_y[best],
    )
    np.savez_compressed(HERE / "golden.npz", in_image=batch[chosen])
    np.save(HERE / "seven.npy", batch[chosen[7]][None, :])


if __name__ == "__main__":
    main()
