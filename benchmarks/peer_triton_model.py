"""The benchmark's model for Triton's Python backend, on ONNX Runtime: runs in the peer's own environment."""

# mypy: ignore-errors

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """One session with one thread that does not spin, as every server here has.

    The parameter `axes`: the batch axis of each tensor. Requests bring it first, where Triton's batcher wants it.
    """

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path = Path(config["parameters"]["model"]["string_value"])
        self.session = ort.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
        self.axes = {pair.split("=")[0]: int(pair.split("=")[1]) for pair in _axes(config).split(",") if pair}
        self.inputs = [entry["name"] for entry in config["input"]]
        self.outputs = [entry["name"] for entry in config["output"]]
        self.joins = config["max_batch_size"] > 0

    def execute(self, requests: list) -> list:
        tensors = [[self.read(request, name) for name in self.inputs] for request in requests]
        if not self.joins or len(requests) == 1:
            return [self.answer(self.run(dict(zip(self.inputs, each, strict=True)))) for each in tensors]
        joined = {name: np.concatenate([each[i] for each in tensors]) for i, name in enumerate(self.inputs)}
        results = self.run(joined)
        at = np.cumsum([0, *(each[0].shape[0] for each in tensors)])
        return [self.answer([array[at[i] : at[i + 1]] for array in results]) for i in range(len(requests))]

    def read(self, request, name: str) -> np.ndarray:
        return pb_utils.get_input_tensor_by_name(request, name).as_numpy()

    def run(self, feeds: dict) -> list:
        for name, axis in self.axes.items():
            if axis and name in feeds:
                feeds[name] = np.ascontiguousarray(np.moveaxis(feeds[name], 0, axis))
        results = self.session.run(self.outputs, feeds)
        return [
            np.moveaxis(array, self.axes[name], 0) if self.axes.get(name) else array
            for name, array in zip(self.outputs, results, strict=True)
        ]

    def answer(self, arrays: list):
        return pb_utils.InferenceResponse(
            [
                pb_utils.Tensor(name, np.ascontiguousarray(array))
                for name, array in zip(self.outputs, arrays, strict=True)
            ]
        )


def _axes(config: dict) -> str:
    return config["parameters"]["axes"]["string_value"]
