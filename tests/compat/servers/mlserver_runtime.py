"""The contract as a custom runtime of MLServer: runs in MLServer's own environment and imports nothing of ours."""

from __future__ import annotations

import time

from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.errors import InferenceError
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput

SLOW_S = 0.04


class ContractModel(MLModel):
    """`parameters.extra.kind` says which model of the contract this is."""

    async def load(self) -> bool:
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        kind = self.settings.parameters.extra["kind"]
        self._require(payload)
        if kind == "add":
            tensors = {tensor.name: NumpyCodec.decode_input(tensor) for tensor in payload.inputs}
            found = {"sum": tensors["a"] + tensors["b"], "difference": tensors["a"] - tensors["b"]}
            outputs = [NumpyCodec.encode_output(name, array) for name, array in found.items()]
        else:
            if kind == "slow":
                time.sleep(SLOW_S)  # a model that computes holds its worker just so
            (x,) = payload.inputs
            outputs = [
                ResponseOutput(name="y", shape=x.shape, datatype=x.datatype, data=x.data, parameters=x.parameters)
            ]
        wanted = {output.name for output in payload.outputs or []}
        return InferenceResponse(
            model_name=self.name,
            model_version=self.version,
            id=payload.id,
            outputs=[output for output in outputs if not wanted or output.name in wanted],
        )

    def _require(self, payload: InferenceRequest) -> None:
        """What MLServer leaves to its runtimes: that the names are those of the metadata."""
        for asked, declared in ((payload.inputs, self.inputs), (payload.outputs, self.outputs)):
            names, known = {tensor.name for tensor in asked or []}, {tensor.name for tensor in declared or []}
            if names - known or (asked is payload.inputs and known - names):
                raise InferenceError(f"Model {self.name} has {sorted(known)}, the request names {sorted(names)}.")
