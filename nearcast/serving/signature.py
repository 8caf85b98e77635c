"""Checking requests against what a version declares, once per request and in a few microseconds."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from math import prod
from typing import Any

import msgspec
import numpy as np

from nearcast.errors import Code, MeshError
from nearcast.handler import Tensors
from nearcast.serving.pipeline.flow import ready_names
from nearcast.store.manifest import Manifest, Tensor
from nearcast.wire.tensors import datatype_of, dtype_of

PASSED_FORMS_MAX = 64
"""Forms of requests that are remembered as good."""

COMMON_ELEMENTS_MAX = 16
"""Elements of an input without a batch axis that is compared before requests are joined."""


class Size(msgspec.Struct, frozen=True):
    """How large checked inputs are: rows along the batch axes (1 where the model cannot be batched), and elements."""

    rows: int
    elements: int


class Signature:
    """The declared tensors of a version, prepared for the hot path.

    Attributes:
        batchable: every tensor has a free batch axis, but for small inputs that requests may have in common (a sample
            rate), and the model keeps no hidden state.
        input_axes: batch axis per input that has one; empty unless `batchable`.
        output_axes: batch axis per output; empty unless `batchable`.
        fixed: no input has a free axis, so every request costs the same.
    """

    __slots__ = (
        "_common", "_inputs", "_keyed", "_names", "_passed", "_ready", "_ready_names", "_title", "batchable", "fixed",
        "input_axes", "output_axes", "output_names",
    )  # fmt: skip

    def __init__(self, manifest: Manifest) -> None:
        self._title = f"{manifest.name} release {manifest.release}"
        self._inputs: list[tuple[str, np.dtype[Any], Tensor]] = [
            (tensor.name, dtype_of(tensor.datatype), tensor) for tensor in manifest.inputs
        ]
        self._passed: dict[Hashable, Size] = {}
        self._names = frozenset(tensor.name for tensor in manifest.inputs)
        self._ready_names = ready_names(manifest)
        self._ready = Signature(manifest.of_model()) if self._ready_names else None
        self.output_names = frozenset(tensor.name for tensor in manifest.outputs)
        joined = [tensor for tensor in manifest.inputs if _has_batch_axis(tensor)]
        common = [tensor for tensor in manifest.inputs if not _has_batch_axis(tensor)]
        self.batchable = (
            manifest.stateful != "hidden"
            and bool(joined)
            and all(map(_may_be_common, common))
            and all(map(_has_batch_axis, manifest.outputs))
        )
        self.input_axes = {t.name: t.batch_axis or 0 for t in joined} if self.batchable else {}
        self._common = [tensor.name for tensor in common] if self.batchable else []
        self.output_axes = {t.name: t.batch_axis or 0 for t in manifest.outputs} if self.batchable else {}
        self.fixed = all(axis >= 0 for tensor in manifest.inputs for axis in tensor.shape)
        self._keyed = any(
            axis == -1 and index != tensor.batch_axis for tensor in joined for index, axis in enumerate(tensor.shape)
        )

    def check(self, inputs: Tensors, form: Hashable = None) -> Size:
        """Refuse inputs that are not the declared ones, and say how large they are.

        Args:
            inputs: by name.
            form: equal only for inputs of equal names, types and shapes, which are then checked once; None = unknown.

        Raises:
            MeshError: as `require` and `rows`.
        """
        size = self._passed.get(form)
        if size is None:
            self.require(inputs)
            size = Size(self.rows(inputs), sum(array.size for array in inputs.values()))
            if form is not None:
                if len(self._passed) >= PASSED_FORMS_MAX:
                    self._passed.clear()
                self._passed[form] = size
        return size

    def require(self, inputs: Tensors) -> None:
        """Refuse inputs that are not the declared ones.

        Raises:
            MeshError: INVALID_REQUEST naming the tensor, what is expected and what came.
        """
        for name, dtype, tensor in self._inputs:
            array = inputs.get(name)
            if array is None:
                if (ready := self._ready_for(inputs)) is None:
                    raise self._missing(tensor, inputs)
                ready.require(inputs)
                return
            if array.dtype != dtype:
                raise MeshError(
                    Code.INVALID_REQUEST,
                    f"Input {name} of {self._title} must be {tensor.datatype}, got {datatype_of(array.dtype)}.",
                )
            shape = array.shape
            if not _matches(shape, tensor.shape):
                raise MeshError(
                    Code.INVALID_REQUEST,
                    f"Input {name} of {self._title} must have shape {list(tensor.shape)}, got {list(shape)}.",
                )
        if len(inputs) != len(self._inputs):
            if (ready := self._ready_for(inputs)) is not None:
                ready.require(inputs)
                return
            unknown = sorted(set(inputs) - self._names)
            raise MeshError(
                Code.INVALID_REQUEST,
                f"Model {self._title} has no input {unknown[0][:128]}; it takes {', '.join(sorted(self._names))}.",
            )

    def require_outputs(self, names: Sequence[str]) -> None:
        """Refuse a request for outputs that do not exist.

        Raises:
            MeshError: INVALID_REQUEST naming the output.
        """
        for name in names:
            if name not in self.output_names:
                raise MeshError(
                    Code.INVALID_REQUEST,
                    f"Model {self._title} has no output {name[:128]}; it gives {', '.join(sorted(self.output_names))}.",
                )

    def rows(self, inputs: Tensors) -> int:
        """Rows along the batch axes; 1 where the model cannot be batched.

        Raises:
            MeshError: INVALID_REQUEST if the inputs disagree.
        """
        if (ready := self._ready_for(inputs)) is not None:
            return ready.rows(inputs)
        first, rows = "", -1
        for name, axis in self.input_axes.items():
            got = inputs[name].shape[axis]
            if rows == -1:
                first, rows = name, got
            elif got != rows:
                raise MeshError(
                    Code.INVALID_REQUEST,
                    f"Input {name} has {got} rows along axis {axis}, but input {first} has {rows}.",
                )
        return 1 if rows == -1 else rows

    def late_quantile(self, quantile: float) -> float:
        """The quantile of run times at which work counts as late.

        Where shapes differ so do the times: then only what even a quick run could not save is late.
        """
        return 1.0 - quantile if quantile and self._keyed else quantile

    def key(self, inputs: Tensors) -> Hashable:
        """What must be equal for two requests to be joined: the other free axes, and inputs without a batch axis."""
        if (ready := self._ready_for(inputs)) is not None:
            return "ready", ready.key(inputs)
        if not self._common and not self._keyed:
            return ()
        common = tuple([inputs[name].tobytes() for name in self._common])
        if not self._keyed:
            return common
        shapes = [inputs[name].shape for name in self.input_axes]
        free = [s[:axis] + s[axis + 1 :] for s, axis in zip(shapes, self.input_axes.values(), strict=True)]
        return (*free, *common)

    def _ready_for(self, inputs: Tensors) -> Signature | None:
        """What declares these inputs, if they are the model's own and come in place of the pipeline's."""
        return self._ready if self._ready is not None and inputs.keys() == self._ready_names else None

    def _missing(self, tensor: Tensor, inputs: Tensors) -> MeshError:
        got = ", ".join(sorted(inputs))[:200] or "none"
        return MeshError(
            Code.INVALID_REQUEST,
            f"Input {tensor.name} ({tensor.datatype} {list(tensor.shape)}) of {self._title} is missing; got {got}.",
        )


def _matches(got: tuple[int, ...], declared: tuple[int, ...]) -> bool:
    return len(got) == len(declared) and all(d in (-1, g) for g, d in zip(got, declared, strict=True))


def _may_be_common(tensor: Tensor) -> bool:
    return tensor.datatype != "BYTES" and -1 not in tensor.shape and prod(tensor.shape) <= COMMON_ELEMENTS_MAX


def _has_batch_axis(tensor: Tensor) -> bool:
    axis = tensor.batch_axis
    return axis is not None and 0 <= axis < len(tensor.shape) and tensor.shape[axis] == -1
