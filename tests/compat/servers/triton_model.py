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
        self.sums: dict[int, float] = {}

    def execute(self, requests: list) -> list:
        return [self.answer(request, slot) for slot, request in enumerate(requests)]

    def answer(self, request, slot: int):
        tensors = {tensor.name(): tensor for tensor in request.inputs()}
        if self.kind == "add":
            a, b = tensors["a"].as_numpy(), tensors["b"].as_numpy()
            outputs = [pb_utils.Tensor("sum", a + b), pb_utils.Tensor("difference", a - b)]
        elif self.kind == "sequence":
            outputs = [self.accumulate(tensors, slot)]
        elif self.kind == "bf16":
            outputs = [pb_utils.Tensor.from_dlpack("y", tensors["x"].to_dlpack())]
        else:
            if self.kind == "slow":
                time.sleep(SLOW_S)
            outputs = [pb_utils.Tensor("y", tensors["x"].as_numpy())]
        wanted = set(request.requested_output_names())
        return pb_utils.InferenceResponse([output for output in outputs if output.name() in wanted])

    def accumulate(self, tensors, slot: int):
        """The sum of all that the sequence has sent. The sequence batcher keeps each one in its slot of the batch."""
        if not tensors["READY"].as_numpy().reshape(-1)[0]:
            return pb_utils.Tensor("y", np.zeros((1, 1), np.float32))  # an empty slot; nobody gets this answer
        if tensors["START"].as_numpy().reshape(-1)[0]:
            self.sums[slot] = 0.0
        self.sums[slot] += float(tensors["x"].as_numpy().astype(np.float64).sum())
        return pb_utils.Tensor("y", np.array([[self.sums[slot]]], np.float32))
