"""Int8 variants of a bundle: made in several ways, measured here, kept only if one is faster and still good enough.

Quantised is not faster by itself: whether it is depends on operators, batch and processor. So every way is timed in
turns with the original, and the median ratio of many rounds must be below one for sure. The ways are those of ONNX
Runtime's quantisation tool.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from model_sync.publisher.bundle import BundleSpec, create_bundle, describe_file
from model_sync.publisher.licence import PublishPolicy
from nearcast.errors import Code, MeshError
from nearcast.handler import Tensors
from nearcast.serving.engines import LoadedModel, load_engine
from nearcast.serving.golden import read_tensors
from nearcast.serving.joining import join
from nearcast.serving.signature import Signature
from nearcast.store.contents import Contents
from nearcast.store.manifest import Manifest

ROUNDS = 21
UPPER_RANK = 15
"""Of 21 sorted ratios the 16th bounds their median from above with 98 % confidence (sign test)."""
ROUND_TIME_S = 0.02
FASTER_MIN = 0.95
"""A variant must take at most this share of the original's time: less gain is not worth another file."""
ROWS_MIN, ROWS_MAX = 32, 4096
CALIBRATION_ROWS_MAX = 512
ATOL = 0.05
"""Golden outputs of an int8 variant: its kernels differ by a quantisation step between processors."""
_LOG = logging.getLogger(__name__)

Progress = Callable[[str], None]


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One way of quantising, measured.

    Attributes:
        way: its name.
        time_ratio: its run time over the original's, the median of all rounds; `time_ratio_max` bounds that median.
        loss: what it is worse by, in the unit of `Report.measure`.
        verdict: "" if it may be kept, else why not.
    """

    way: str
    size_bytes: int = 0
    time_ratio: float = 0.0
    time_ratio_max: float = 0.0
    loss: float = 0.0
    verdict: str = ""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it. `kept` names the way whose bundle was written; "" if the original stays the best.

    `measure` says how the loss was measured: "accuracy" where rows have labels, "disagreement" of the most likely class
    where they have none, "error" (relative, L2) where the output is no choice.
    """

    model: str
    release: int
    rows: int
    measure: str
    tolerance: float
    size_bytes: int
    trials: tuple[Trial, ...]
    kept: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """Real inputs, each of one row or one vector, and their labels if known. Even ones calibrate, odd ones judge."""

    inputs: tuple[Tensors, ...]
    labels: npt.NDArray[np.int64] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """How the new bundle is named: its release and version."""

    release: int
    semver: str


def quantize_bundle(
    folder: Path,
    manifest: Manifest,
    out: Path,
    variant: Variant,
    *,
    examples: Examples | None = None,
    rows: int = 1,
    policy: PublishPolicy | None = None,
    progress: Progress = lambda _: None,
) -> Report:
    """Try every way and write the bundle of the fastest that is good enough; none if there is none.

    Args:
        folder: a verified bundle.
        manifest: what it says.
        out: the new bundle folder; missing or empty.
        variant: release and version of the new bundle.
        examples: what to calibrate and judge with; None = the bundle's golden vectors.
        rows: the batch at which time counts.
        policy: which licences are allowed.
        progress: told of every step.

    Raises:
        MeshError: UNSUPPORTED for models that cannot be quantised here, INVALID_REQUEST for too few examples,
            UNAVAILABLE if the tool is not installed, CONFLICT if `out` holds something.
    """
    _require_float_onnx(manifest)
    if variant.release <= manifest.release:
        raise MeshError(Code.INVALID_REQUEST, f"The variant needs a release above {manifest.release}.")
    contents = Contents(manifest, folder)
    signature = Signature(manifest)
    if rows > 1 and not signature.batchable:
        raise MeshError(Code.INVALID_REQUEST, f"{manifest.name} cannot be batched; leave out the rows.")
    examples = examples or Examples(inputs=tuple(read_tensors(contents, vector.inputs) for vector in manifest.golden))
    if len(examples.inputs) < ROWS_MIN:
        raise MeshError(
            Code.INVALID_REQUEST,
            f"{len(examples.inputs)} examples are too few to judge by; give at least {ROWS_MIN} with --data.",
        )
    judge = _Judge(contents, signature.input_axes, examples, rows)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            trials, models = [], {}
            for way in WAYS:
                progress(way)
                path = Path(scratch) / f"{way}.onnx"
                trial = judge.try_way(way, folder / manifest.model_file, path)
                trials.append(trial)
                if not trial.verdict:
                    models[way] = path
            best = min((t for t in trials if not t.verdict), key=lambda t: t.time_ratio, default=None)
            if best is not None:
                _write_bundle(manifest, contents, models[best.way], out, variant, best, policy)
    finally:
        judge.close()
    return Report(
        model=manifest.name,
        release=manifest.release,
        rows=rows,
        measure=judge.measure,
        tolerance=manifest.quality_tolerance,
        size_bytes=manifest.file(manifest.model_file).size_bytes,
        trials=tuple(trials),
        kept=best.way if best is not None else "",
    )


def read_examples(path: Path, manifest: Manifest) -> Examples:
    """Examples from an `.npz` file: arrays `in_<name>` with one row each along the batch axis, and perhaps `label`.

    Raises:
        MeshError: INVALID_REQUEST naming what does not fit.
    """
    axes = Signature(manifest).input_axes
    if not axes:
        raise MeshError(
            Code.INVALID_REQUEST, f"{manifest.name} has no batch axis; its golden vectors are the examples."
        )
    try:
        with np.load(path, allow_pickle=False) as arrays:
            given = {tensor.name: arrays[f"in_{tensor.name}"] for tensor in manifest.inputs}
            labels = arrays["label"].astype(np.int64) if "label" in arrays.files else None
    except (OSError, ValueError, KeyError) as error:
        raise MeshError(Code.INVALID_REQUEST, f"The examples {path} cannot be used: {error}.") from error
    tensors = {name: given[name] for name in axes}
    counts = {tensor.shape[axes[name]] for name, tensor in tensors.items()} | (
        {len(labels)} if labels is not None else set()
    )
    if len(counts) != 1:
        raise MeshError(Code.INVALID_REQUEST, f"The arrays of {path} have different numbers of rows.")
    count = min(counts.pop(), ROWS_MAX)
    rows = tuple(given | {name: t.take([row], axis=axes[name]) for name, t in tensors.items()} for row in range(count))
    for row in rows[:1]:
        Signature(manifest).require(row)
    return Examples(inputs=rows, labels=None if labels is None else labels[:count])


class _Judge:
    """The original, and how a variant compares with it."""

    def __init__(self, contents: Contents, axes: dict[str, int], examples: Examples, rows: int) -> None:
        manifest = self._manifest = contents.manifest
        self._calibration = examples.inputs[0 : 2 * CALIBRATION_ROWS_MAX : 2]
        self._held = examples.inputs[1::2]
        self._labels = None if examples.labels is None else examples.labels[1::2]
        self._timed = join([self._held[row % len(self._held)] for row in range(rows)], axes)
        self._original = load_engine(contents, threads=1)
        self._output = manifest.outputs[0].name
        self._answers = self._answer(self._original)
        is_choice = self._answers[0].ndim > 0 and self._answers[0].shape[-1] > 1
        self.measure = "accuracy" if self._labels is not None else "disagreement" if is_choice else "error"

    def close(self) -> None:
        self._original.close()

    def try_way(self, way: str, source: Path, target: Path) -> Trial:
        """Make a variant and measure it."""
        try:
            with _quiet():
                WAYS[way](source, target, self._calibration)
            engine = self._load(target)
        except ImportError as error:
            raise MeshError(
                Code.UNAVAILABLE, "The quantisation tool is not installed; install nearcast[quantize]."
            ) from error
        except Exception as error:  # noqa: BLE001 - the tool raises whatever comes; one way less to try
            _LOG.info("%s failed", way, exc_info=True)
            return Trial(way=way, verdict=f"cannot be made: {str(error)[:200]}")
        with contextlib.closing(engine):
            loss = self._loss(engine)
            ratios = sorted(_compare(self._original, engine, self._timed))
        trial = Trial(
            way=way,
            size_bytes=target.stat().st_size,
            time_ratio=round(ratios[ROUNDS // 2], 3),
            time_ratio_max=round(ratios[UPPER_RANK], 3),
            loss=round(loss, 4),
        )
        return msgspec.structs.replace(trial, verdict=self._verdict(trial))

    def _verdict(self, trial: Trial) -> str:
        tolerance = self._manifest.quality_tolerance
        if trial.loss > tolerance:
            return f"{self.measure} worse by {trial.loss:.4f}, allowed is {tolerance:g}"
        if trial.time_ratio_max > FASTER_MIN:
            return f"not faster here: {trial.time_ratio:.2f} of the time, at most {trial.time_ratio_max:.2f}"
        return ""

    def _load(self, path: Path) -> LoadedModel:
        manifest = msgspec.structs.replace(
            self._manifest, model_file=path.name, files=(describe_file(path),), golden=(), sbom_file=None
        )
        return load_engine(Contents(manifest, path.parent), threads=1)

    def _answer(self, engine: LoadedModel) -> list[npt.NDArray[Any]]:
        return [engine.run(inputs)[self._output] for inputs in self._held]

    def _loss(self, engine: LoadedModel) -> float:
        answers = self._answer(engine)
        if self.measure == "error":
            return float(np.mean([_relative_error(was, now) for was, now in zip(self._answers, answers, strict=True)]))
        was, now = (np.array([answer.argmax(-1).ravel()[0] for answer in each]) for each in (self._answers, answers))
        if self._labels is None:
            return float(np.mean(was != now))
        return float(np.mean(was == self._labels) - np.mean(now == self._labels))


def _relative_error(was: npt.NDArray[Any], now: npt.NDArray[Any]) -> float:
    size = float(np.linalg.norm(was.astype(np.float64)))
    return float(np.linalg.norm(now.astype(np.float64) - was)) / size if size else 0.0


def _compare(original: LoadedModel, variant: LoadedModel, inputs: Tensors) -> Iterator[float]:
    """Time ratios of rounds in which both run, in turns, so that what else the machine does hits both."""
    began = time.perf_counter()
    for _ in range(3):
        original.run(inputs)
        variant.run(inputs)
    runs = max(1, int(ROUND_TIME_S / ((time.perf_counter() - began) / 3)))
    for number in range(ROUNDS):
        first, second = (original, variant) if number % 2 else (variant, original)
        took = {id(engine): _time(engine, inputs, runs) for engine in (first, second)}
        yield took[id(variant)] / took[id(original)]


def _time(engine: LoadedModel, inputs: Tensors, runs: int) -> float:
    began = time.perf_counter()
    for _ in range(runs):
        engine.run(inputs)
    return time.perf_counter() - began


def _require_float_onnx(manifest: Manifest) -> None:
    if manifest.engine != "onnxruntime":
        raise MeshError(
            Code.UNSUPPORTED,
            f"{manifest.model_file} cannot be quantised here; convert it to int8 where it was trained.",
        )
    if manifest.encryption is not None:
        raise MeshError(Code.UNSUPPORTED, "The bundle is sealed; quantise the plain one and seal the result.")
    if not all(tensor.datatype.startswith("FP") for tensor in manifest.outputs[:1]):
        raise MeshError(Code.UNSUPPORTED, f"The output {manifest.outputs[0].name} is no floating-point tensor.")


def _write_bundle(
    manifest: Manifest,
    contents: Contents,
    model: Path,
    out: Path,
    variant: Variant,
    trial: Trial,
    policy: PublishPolicy | None,
) -> None:
    """The original's description with the new model; golden outputs are what the variant answers."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)
        name = f"{Path(manifest.model_file).stem}-int8.onnx"
        shutil.copyfile(model, source / name)
        golden = []
        for index, vector in enumerate(manifest.golden):
            golden.append(f"golden-{index}.npz")
            arrays: dict[str, Any] = {f"in_{k}": v for k, v in read_tensors(contents, vector.inputs).items()}
            np.savez(source / golden[-1], **arrays)
        shared = set(BundleSpec.__struct_fields__) & set(Manifest.__struct_fields__) - {"files", "golden"}
        spec = BundleSpec(
            **{field: getattr(manifest, field) for field in shared}
            | {
                "release": variant.release,
                "semver": variant.semver,
                "variant": "int8",
                "model_file": name,
                "quality": max(0.0, manifest.quality - max(0.0, trial.loss)),
                "parent": manifest.release,
                "golden": tuple(golden),
                "atol": max([ATOL, *(vector.atol for vector in manifest.golden)]),
                "properties": {**manifest.properties, "quantised": trial.way},
            }
        )
        create_bundle(spec, source, out, policy=policy)


# The ways. Weights are int8 per channel; activations are uint8 because the fast kernels of x86 multiply u8 by s8.


def _dynamic(source: Path, target: Path, _: Sequence[Tensors]) -> None:
    """Activation ranges are taken anew in each run: for transformers and other matrix products."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(source, target, weight_type=QuantType.QInt8, per_channel=True)


def _static(source: Path, target: Path, calibration: Sequence[Tensors], **more: Any) -> None:
    """Activation ranges come from the calibration examples."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    quantize_static(
        source,
        target,
        _Reader(calibration),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        **more,
    )


def _static_products(source: Path, target: Path, calibration: Sequence[Tensors]) -> None:
    """Only matrix products: convolutions and what is between them often lose."""
    _static(source, target, calibration, op_types_to_quantize=["Gemm", "MatMul"])


class _Reader:
    """Feeds the tool's calibration, in the form that it asks for."""

    def __init__(self, calibration: Sequence[Tensors]) -> None:
        self._left = iter(calibration)

    def get_next(self) -> dict[str, Any] | None:
        inputs = next(self._left, None)
        return None if inputs is None else dict(inputs)


WAYS: dict[str, Callable[[Path, Path, Sequence[Tensors]], None]] = {
    "dynamic": _dynamic,
    "static": _static,
    "static-products": _static_products,
}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The tool advises its own user through the root logger, who is not ours."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
