"""The contract for Triton's Python backend: runs in the peer's own environment and imports nothing of ours."""

from __future__ import annotations

import json
import time

import numpy as np
import triton_python_backend_utils as pb_utils

SLOW_S = 0.04


class TritonPythonModel:
    """The parameter `kind` of the configuration says which model of the contract this is."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        self.kind = config["parameters"]["kind"]["string_value"]
        self.sums: dict[object, float] = {}

    def execute(self, requests: list) -> list:
        return [self.answer(request) for request in requests]

    def answer(self, request):
        tensors = {tensor.name(): tensor for tensor in request.inputs()}
        if self.kind == "add":
            a, b = tensors["a"].as_numpy(), tensors["b"].as_numpy()
            outputs = [pb_utils.Tensor("sum", a + b), pb_utils.Tensor("difference", a - b)]
        elif self.kind == "sequence":
            outputs = [self.accumulate(tensors)]
        elif self.kind == "bf16":
            outputs = [pb_utils.Tensor.from_dlpack("y", tensors["x"].to_dlpack())]
        else:
            if self.kind == "slow":
                time.sleep(SLOW_S)
            outputs = [pb_utils.Tensor("y", tensors["x"].as_numpy())]
        wanted = set(request.requested_output_names())
        return pb_utils.InferenceResponse([output for output in outputs if output.name() in wanted])

    def accumulate(self, tensors):
        """The sum of all that the sequence has sent, as the sequence batcher's controls say where it begins."""
        sequence = tensors["CORRID"].as_numpy().reshape(-1)[0]
        if tensors["START"].as_numpy().reshape(-1)[0]:
            self.sums[sequence] = 0.0
        self.sums[sequence] += float(tensors["x"].as_numpy().astype(np.float64).sum())
        y = np.array([[self.sums[sequence]]], np.float32)
        if tensors["END"].as_numpy().reshape(-1)[0]:
            del self.sums[sequence]
        return pb_utils.Tensor("y", y)
