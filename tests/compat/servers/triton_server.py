"""Starts Triton's core with the Python backend, from the wheel of nvidia-pytriton in its own environment."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from benchmarks.peers import put_triton_model, triton
from tests.compat.contract import ADD, IDENTITY, SEQUENCE, SLOW
from tests.compat.tensors import DATATYPES

MODEL = Path(__file__).with_name("triton_model.py")

SCHEDULER = """dynamic_batching {
  priority_levels: 2
  default_priority_level: 2
  default_queue_policy { default_timeout_microseconds: 60000000 allow_timeout_override: true timeout_action: REJECT }
}
"""
CONTROLS = """sequence_batching {
  max_sequence_idle_microseconds: 5000000
  control_input [
    { name: "START" control [ { kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, 1 ] } ] },
    { name: "READY" control [ { kind: CONTROL_SEQUENCE_READY int32_false_true: [ 0, 1 ] } ] }
  ]
}
"""


def tensors(side: str, *entries: tuple[str, str, str]) -> str:
    """The `input` or `output` of a config.pbtxt."""
    return "".join(
        f'{side} [ {{ name: "{name}" data_type: TYPE_{kind} dims: [ {dims} ] }} ]\n' for name, kind, dims in entries
    )


def put(folder: Path, name: str, kind: str, body: str, *, batch: int = 0) -> None:
    """One model of the repository."""
    put_triton_model(folder, name, f"max_batch_size: {batch}\n{body}", code=MODEL, parameters={"kind": kind})


def write_models(folder: Path) -> None:
    """The contract as a model repository."""
    for datatype in DATATYPES:
        kind = "STRING" if datatype == "BYTES" else datatype
        body = tensors("input", ("x", kind, "-1, -1")) + tensors("output", ("y", kind, "-1, -1"))
        put(folder, IDENTITY[datatype], "bf16" if datatype == "BF16" else "identity", body)
    pair = tensors("input", ("a", "FP32", "4"), ("b", "FP32", "4"))
    both = tensors("output", ("sum", "FP32", "4"), ("difference", "FP32", "4"))
    put(folder, ADD, "add", pair + both + SCHEDULER, batch=512)
    body = tensors("input", ("x", "FP32", "4")) + tensors("output", ("y", "FP32", "4"))
    put(folder, SLOW, "slow", body + SCHEDULER, batch=1)
    # The first axis of a frame is the batch; four sequences may be open at once.
    body = tensors("input", ("x", "INT8", "3, 40")) + tensors("output", ("y", "FP32", "1"))
    put(folder, SEQUENCE, "sequence", body + CONTROLS, batch=4)


@contextlib.contextmanager
def contract_server(folder: Path) -> Iterator[dict[str, str]]:
    """The contract served by Triton's core."""
    models = folder / "models"
    models.mkdir()
    write_models(models)
    with triton(models) as where:
        yield where
