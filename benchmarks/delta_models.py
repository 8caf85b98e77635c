"""Pairs of model files, old and new: synthetic changes of real and of generated weights, and releases trained here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from benchmarks.delta_training import Digits, Network, finetune, load_digits, train

SEED = 7
Floats: TypeAlias = NDArray[np.float32]
Codes: TypeAlias = NDArray[np.int8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two files; `residuals` are the symbols that a coder of differences faces (one array a byte plane)."""

    name: str
    old: bytes
    new: bytes
    residuals: tuple[NDArray[np.uint8], ...] = ()
    note: str = ""


# -- synthetic --------------------------------------------------------------------------------------------------------


def synthetic_pairs(*, quick: bool) -> Iterator[Pair]:
    """The same weights changed in ways of which the figures of other codecs are known."""
    rng = np.random.default_rng(SEED)
    generated = [generate_weights(rng, (512, 512)) for _ in range(3 if quick else 10)]
    magika = magika_weights()
    for suffix, weights in (("", generated), ("_magika", magika)):
        scales = [float(np.abs(each).max()) / 127 for each in weights]
        codes = [quantise(each, scale) for each, scale in zip(weights, scales, strict=True)]
        tuned = [nudge(each, rng) for each in codes]
        yield code_pair(f"int8_finetune{suffix}", codes, tuned, scales)
        noised = [each + rng.normal(0, 0.02 * each.std(), each.shape).astype(np.float32) for each in weights]
        again = [quantise(each, scale) for each, scale in zip(noised, scales, strict=True)]
        yield code_pair(f"requantised{suffix}", codes, again, scales)
    if not quick:
        large = [quantise(generate_weights(rng, (2048, 2048)), 0.01) for _ in range(6)]
        yield code_pair("int8_finetune_large", large, [nudge(each, rng) for each in large], [0.01] * len(large))
    model = onnx.load(str(magika_file()))
    yield Pair(name="reexport", old=magika_file().read_bytes(), new=export_again(model))
    shift = [each + rng.normal(0, 1e-3 * each.std(), each.shape).astype(np.float32) for each in generated[:3]]
    yield float_pair("float_all_layers_1e-3", generated[:3], shift)
    yield float_pair("retrained", generated[:3], [generate_weights(rng, (512, 512)) for _ in range(3)], judged=False)


def generate_weights(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
    """Laplace weights whose few outliers set the scale, at 21 sigma: then 2 % of noise changes one code in ten."""
    weights = rng.laplace(0, 0.05, shape).astype(np.float32)
    weights[rng.integers(shape[0], size=4), rng.integers(shape[1], size=4)] = 21 * weights.std()
    return weights


def magika_file() -> Path:
    """A real model of 3 MB that the demo installs."""
    import magika

    (found,) = (Path(magika.__file__).parent / "models").glob("*/model.onnx")
    return found


def magika_weights() -> list[Floats]:
    """Its large tensors."""
    tensors = [numpy_helper.to_array(each) for each in onnx.load(str(magika_file())).graph.initializer]
    return [each for each in tensors if each.dtype == np.float32 and each.size > 10_000]


def nudge(codes: Codes, rng: np.random.Generator) -> Codes:
    """Codes of which 2 % moved by one."""
    moves = np.where(rng.random(codes.shape) < 0.02, rng.choice([-1, 1], codes.shape), 0)
    return np.clip(codes + moves, -127, 127).astype(np.int8)


def export_again(model: onnx.ModelProto) -> bytes:
    """The same weights from another exporter: nodes renamed, tensors in another order, other words about itself."""
    again = onnx.ModelProto()
    again.CopyFrom(model)
    again.producer_name, again.producer_version = "another exporter", "2.0"
    again.graph.name = "exported-again"
    helper.set_model_props(again, {"exported": "2026-11-01", "framework": "another"})
    for index, node in enumerate(again.graph.node):
        node.name = f"/module/{node.op_type}_{index}"
    tensors = list(again.graph.initializer)[::-1]
    del again.graph.initializer[:]
    again.graph.initializer.extend(tensors)
    return again.SerializeToString()


# -- trained here -----------------------------------------------------------------------------------------------------


def real_pairs(*, quick: bool) -> Iterator[Pair]:
    """Two releases each of networks trained here on handwritten digits: the second has seen more of them."""
    width = 256 if quick else 768
    first_data, all_data = load_digits(share=0.8), load_digits(share=1.0)

    first = train(Network.random(width, seed=SEED), first_data, epochs=12)
    scales = [float(np.abs(each).max()) / 127 for each in first.weights]
    second = finetune(first, all_data, epochs=2)
    pair = code_pair("real_fixed_scales", _codes(first, scales), _codes(second, scales), scales)
    yield replace(pair, note=f"{pair.note}, {_learned(first, second, all_data)}")

    aware = train(Network.random(width, seed=SEED + 1), first_data, epochs=10)
    scales = [float(np.abs(each).max()) / 127 for each in aware.weights]
    aware = train(aware, first_data, epochs=3, scales=scales)
    later = finetune(aware, all_data, epochs=2, scales=scales)
    pair = code_pair("real_quantisation_aware", _codes(aware, scales), _codes(later, scales), scales)
    yield replace(pair, note=f"{pair.note}, {_learned(aware, later, all_data)}")

    yield float_pair("real_float", first.weights, second.weights)

    exported = float_model(second.weights)
    again = export_again(exported)
    at_equal_offsets = _zigzag(_at_equal_offsets(exported.SerializeToString(), again))
    yield Pair(name="real_reexport", old=exported.SerializeToString(), new=again, residuals=(at_equal_offsets,))

    other = train(Network.random(width, seed=SEED + 2), all_data, epochs=12)
    yield float_pair("real_retrained", first.weights, other.weights, judged=False)


def _learned(old: Network, new: Network, data: Digits) -> str:
    return f"accuracy {old.accuracy(data):.3f} then {new.accuracy(data):.3f}"


def _codes(network: Network, scales: Sequence[float]) -> list[Codes]:
    return [quantise(each, scale) for each, scale in zip(network.weights, scales, strict=True)]


def _at_equal_offsets(old: bytes, new: bytes) -> NDArray[np.uint8]:
    under = np.frombuffer(old[: len(new)].ljust(len(new), b"\0"), np.uint8)
    return np.frombuffer(new, np.uint8) - under


# -- files ------------------------------------------------------------------------------------------------------------


def quantise(weights: Floats, scale: float) -> Codes:
    """Symmetric 8-bit codes."""
    return np.clip(np.round(weights / scale), -127, 127).astype(np.int8)


def code_pair(name: str, old: Sequence[Codes], new: Sequence[Codes], scales: Sequence[float]) -> Pair:
    """Two ONNX files with 8-bit weights."""
    difference = np.concatenate([(b.view(np.uint8) - a.view(np.uint8)).ravel() for a, b in zip(old, new, strict=True)])
    return Pair(
        name=name,
        old=code_model(old, scales).SerializeToString(),
        new=code_model(new, scales).SerializeToString(),
        residuals=(_zigzag(difference),),
        note=f"{np.mean(difference != 0):.1%} of the codes changed",
    )


def float_pair(name: str, old: Sequence[Floats], new: Sequence[Floats], *, judged: bool = True) -> Pair:
    """Two ONNX files with 32-bit weights; their residual is the difference of words, byte plane by byte plane."""
    before, after = (np.concatenate([each.ravel() for each in group]).view(np.uint32) for group in (old, new))
    difference = after - before
    planes = ((difference << np.uint32(1)) ^ np.negative(difference >> np.uint32(31))).view(np.uint8).reshape(-1, 4)
    return Pair(
        name=name,
        old=float_model(old).SerializeToString(),
        new=float_model(new).SerializeToString(),
        residuals=tuple(planes.T) if judged else (),
    )


def float_model(weights: Sequence[Floats]) -> onnx.ModelProto:
    """x times each matrix in turn."""
    nodes = [_multiply(index, f"w{index}") for index in range(len(weights))]
    return _model(nodes, [numpy_helper.from_array(each, f"w{index}") for index, each in enumerate(weights)])


def code_model(codes: Sequence[Codes], scales: Sequence[float]) -> onnx.ModelProto:
    """The same with weights that are dequantised first."""
    nodes: list[Any] = []
    tensors: list[Any] = []
    for index, (each, scale) in enumerate(zip(codes, scales, strict=True)):
        nodes.append(helper.make_node("DequantizeLinear", [f"q{index}", f"s{index}"], [f"w{index}"]))
        nodes.append(_multiply(index, f"w{index}"))
        tensors.append(numpy_helper.from_array(each, f"q{index}"))
        tensors.append(numpy_helper.from_array(np.array(scale, np.float32), f"s{index}"))
    return _model(nodes, tensors)


def _multiply(index: int, weight: str) -> Any:
    return helper.make_node("MatMul", [f"h{index}", weight], [f"h{index + 1}"])


def _model(nodes: list[Any], tensors: list[Any]) -> onnx.ModelProto:
    last = sum(node.op_type == "MatMul" for node in nodes)
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("h0", TensorProto.FLOAT, ["n", None])],
        [helper.make_tensor_value_info(f"h{last}", TensorProto.FLOAT, ["n", None])],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _zigzag(difference: NDArray[np.uint8]) -> NDArray[np.uint8]:
    symbols: NDArray[np.uint8] = (difference << np.uint8(1)) ^ np.negative(difference >> np.uint8(7))
    return symbols
