"""What a cascade costs in quality, and what it saves: a small model on the edge, a larger one behind, a labelled set.

Both are trained here on scikit-learn's digits. The threshold is chosen on images of its own, as an operator would: the
lowest one that loses at most half a point there. What is printed is measured on others, through the live router.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier

from benchmarks.rows import Row
from nearcast.handler import RequestContext
from nearcast.serving import ModelHost
from nearcast.store import Store
from nearcast.store.manifest import Cascade
from nearcast.wire.request import TensorRequest
from router.policy import Policy, PolicyConfig
from router.router import Router
from tests.tiny_models import activate, install, tensor

Floats: TypeAlias = npt.NDArray[np.floating[Any]]
LOSS_POINTS_MAX = 0.5
THRESHOLDS = np.round(np.arange(0.3, 1.0, 0.02), 2)
PIXEL_MAX = 16.0


def run(*, quick: bool) -> list[Row]:
    """Accuracy of the small model, of the large one and of the cascade, and the share that was escalated."""
    digits = load_digits()
    images, labels = digits.data.astype(np.float32), digits.target
    order = np.random.default_rng(7).permutation(len(images))
    train, choose, judged = np.split(order, [700, 1100])
    if quick:
        judged = judged[:300]
    small, large = train_small(images[train], labels[train]), train_large(images[train], labels[train])
    threshold = choose_threshold(small[1](images[choose]), large[1](images[choose]), labels[choose])
    with tempfile.TemporaryDirectory() as name:
        answered, counts = asyncio.run(ask_all(Path(name), small[0], large[0], threshold, images[judged]))
    truth = labels[judged]
    alone, best, both = (
        100 * float((answers == truth).mean())
        for answers in (small[1](images[judged]).argmax(1), large[1](images[judged]).argmax(1), answered)
    )
    share = counts["escalated"] / len(judged)
    note = f"{len(judged)} labelled images, threshold {threshold:g} chosen on {len(choose)} others"
    return [
        Row("cascade.small_accuracy_percent", alone, "%", "every request answered by the small model"),
        Row("cascade.large_accuracy_percent", best, "%", "every request answered by the large model"),
        Row("cascade.accuracy_percent", both, "%", note),
        Row("cascade.lost_points", best - both, "points", "against the large model alone"),
        Row("cascade.escalated_share", share, "share", "of all requests"),
        Row("cascade.cloud_calls_saved_share", 1.0 - share, "share", "against sending every request there"),
        Row("cascade.kept_failed", counts["kept_failed"] + counts["kept_late"], "requests"),
    ]


def train_small(images: Floats, labels: npt.NDArray[Any]) -> tuple[bytes, Any]:
    """A linear model on 4 x 4 pixels; as ONNX and as a function."""
    pool = np.zeros((64, 16), np.float32)
    for pixel in range(64):
        pool[pixel, pixel // 16 * 4 + pixel % 8 // 2] = 0.25 / PIXEL_MAX
    fitted = LogisticRegression(max_iter=2000).fit(images @ pool, labels)
    return (
        as_onnx([(pool @ fitted.coef_.T, fitted.intercept_)]),
        lambda batch: fitted.predict_proba(batch @ pool),
    )


def train_large(images: Floats, labels: npt.NDArray[Any]) -> tuple[bytes, Any]:
    """A perceptron with two hidden layers; as ONNX and as a function."""
    fitted = MLPClassifier((256, 128), max_iter=400, random_state=0).fit(images / PIXEL_MAX, labels)
    first, *others = zip(fitted.coefs_, fitted.intercepts_, strict=True)
    return (
        as_onnx([(first[0] / PIXEL_MAX, first[1]), *others]),
        lambda batch: fitted.predict_proba(batch / PIXEL_MAX),
    )


def as_onnx(layers: list[tuple[Floats, Floats]]) -> bytes:
    """Layers of weights and biases, relu between them, as `x` FP32 [n, 64] -> `p` FP32 [n, 10]."""
    nodes, constants, last = [], [], "x"
    for index, (weight, bias) in enumerate(layers):
        constants += [
            numpy_helper.from_array(weight.astype(np.float32), f"w{index}"),
            numpy_helper.from_array(bias.astype(np.float32), f"b{index}"),
        ]
        nodes.append(helper.make_node("Gemm", [last, f"w{index}", f"b{index}"], [f"g{index}"]))
        last = f"g{index}"
        if index < len(layers) - 1:
            nodes.append(helper.make_node("Relu", [last], [f"r{index}"]))
            last = f"r{index}"
    nodes.append(helper.make_node("Softmax", [last], ["p"], axis=1))
    spec = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "digits", [spec("x", TensorProto.FLOAT, ["n", 64])], [spec("p", TensorProto.FLOAT, ["n", 10])], constants
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data


def choose_threshold(small: Floats, large: Floats, labels: npt.NDArray[Any]) -> float:
    """The lowest threshold that loses at most `LOSS_POINTS_MAX` against the large model."""
    best = (large.argmax(1) == labels).mean()
    for threshold in THRESHOLDS:
        answers = np.where(small.max(1) < threshold, large.argmax(1), small.argmax(1))
        if 100 * (best - (answers == labels).mean()) <= LOSS_POINTS_MAX:
            return float(threshold)
    return 1.0


async def ask_all(
    folder: Path, small: bytes, large: bytes, threshold: float, images: Floats
) -> tuple[npt.NDArray[Any], dict[str, int]]:
    """The classes that the router answers, one request per image, and what became of the uncertain ones."""
    fields: dict[str, Any] = {"inputs": (tensor("x", "FP32", (-1, 64)),), "outputs": (tensor("p", "FP32", (-1, 10)),)}
    hosts = []
    told: dict[str, Any] = {"cascade": Cascade(larger="large", output="p", high=threshold)}
    for name, model, more in (("small", small, told), ("large", large, {})):
        store = Store(folder / name)
        install(store, model, name=name, **fields, **more)
        activate(store, name, stable=1)
        hosts.append(ModelHost(store, node="edge" if name == "small" else "core"))
        await hosts[-1].start()
    router = Router(Policy(PolicyConfig(), seed=1), local=hosts[0], node="edge")
    await router.start()
    router.attach("core", hosts[1], "cloud")
    router.policy.on_report(asyncio.get_running_loop().time(), "core", hosts[1].report())
    classes = []
    for image in images:
        answer = await router.infer(TensorRequest(model="small", inputs={"x": image[None]}), RequestContext())
        classes.append(int(answer.decode()["p"].argmax()))
    counts = dict(router.statistics.escalations)
    await router.close()
    for host in hosts:
        await host.close()
    return np.asarray(classes), counts
