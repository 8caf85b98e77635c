"""The benchmark's model as a custom runtime of MLServer, on ONNX Runtime: runs in MLServer's own environment."""

# mypy: ignore-errors

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class OnnxModel(MLModel):
    """One session with one thread that does not spin, as every server here has.

    `extra.axes`: the batch axis of each tensor. Requests bring it first, where adaptive batching joins them.
    """

    async def load(self) -> bool:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path = Path(__file__).with_name("model.onnx")
        self._session = ort.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
        self._axes = self.settings.parameters.extra["axes"]
        self._names = [output.name for output in self._session.get_outputs()]
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        feeds = {tensor.name: NumpyCodec.decode_input(tensor) for tensor in payload.inputs}
        for name, axis in self._axes.items():
            if axis and name in feeds:
                feeds[name] = np.ascontiguousarray(np.moveaxis(feeds[name], 0, axis))
        results = dict(zip(self._names, self._session.run(self._names, feeds), strict=True))
        for name, axis in self._axes.items():
            if axis and name in results:
                results[name] = np.ascontiguousarray(np.moveaxis(results[name], axis, 0))
        outputs = [NumpyCodec.encode_output(name, array) for name, array in results.items()]
        return InferenceResponse(model_name=self.name, model_version=self.version, id=payload.id, outputs=outputs)
